"""SD3's ControlNet trained in miniature over a frozen transformer: what it is shown, cached or not; what it exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SD3ControlNetModel

from ldm.checkpoint.control_files import load_control
from ldm.checkpoint.convert import save_diffusers
from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.objectives.control import LatentControlObjective
from ldm.pipeline import Control, Settings, TextToImage
from ldm.recipes import assemble, controlnet
from ldm.recipes.controlnet import latents_for
from ldm.rng import Rng
from ldm.train import trainer
from tests import families, miniature, ranks
from tests.integration.test_controlnet_training import config, log
from tests.integration.test_finetune import SLOW, exported, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("sd3"))
    parts = families.make("sd3_clip", root / "t5")
    save_diffusers(
        root / "sd3", network=parts.network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler
    )
    return root


def told(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    made = config(root, out, engine={"zero_stage": 3}, base=str(root / "sd3"), samples={}, conditions=[], **changes)
    made["task"]["layers"] = 2
    return made


def test_two_processes_stop_resume_and_export_theirs(project: Path) -> None:
    """ZeRO 3 on two ranks over a cache of latents, stopped and resumed, is one run; diffusers loads what comes out."""
    cached = {"cache": str(project / "cache")}
    runs = {k: told(project, f"z-{k}", **cached) for k in ("whole", "halves")}
    for run in runs.values():
        run["data"]["pairs"]["condition"]["cache"] = "latents"
    assert ranks.run(train, 2, runs["whole"], timeout=SLOW) == [0, 0]
    assert ranks.run(train, 2, runs["halves"], 2, timeout=SLOW) == [trainer.AGAIN] * 2
    assert ranks.run(train, 2, runs["halves"], timeout=SLOW) == [0, 0]
    found = {k: exported(project / f"z-{k}") for k in runs}
    assert found["whole"]
    assert all(torch.equal(found["whole"][k], found["halves"][k]) for k in found["whole"])
    gaps = [row["control_sensitivity"] for row in log(project / "z-whole")]
    # The convolution of the condition and those behind the blocks both start at zero: two steps until it is seen.
    assert [gap != 0 for gap in gaps] == [False, False, True, True]
    theirs = SD3ControlNetModel.from_pretrained(project / "z-whole" / "export").state_dict()
    net = load_control(project / "z-whole")
    assert all(torch.equal(v, theirs[k]) for k, v in net.state_dict().items())
    base = TextToImage.load(project / "sd3")
    still = base.network.state_dict()
    control = Control(network=net, picture=torch.rand(3, 16, 16), scale=20.0)
    how = Settings(steps=2, guidance=2.0, sampler="euler")
    plain, under = (p.sample(["a red dot"], settings=how) for p in (base, base.controlled([control])))
    assert (plain - under).abs().max() > 1e-4
    assert all(torch.equal(v, still[k]) for k, v in TextToImage.load(project / "sd3").network.state_dict().items())


def test_it_is_shown_in_training_what_it_is_drawn_under(project: Path) -> None:
    """Pixels, moments and the pipeline come to the same latents; the loss is the same from either."""
    run = decode(RunConfig, told(project, "seen"))
    made = assemble(run.task, run.data, run.train, 0, 0)
    loss = made.objective
    assert isinstance(loss, LatentControlObjective)
    base = TextToImage.load(project / "sd3")
    net = controlnet.started(run.task, base)  # type: ignore[arg-type]
    pixels = torch.rand(2, 3, 16, 16)
    moments = base.codec.moments(2 * pixels - 1)
    own = latents_for(net, base.codec)  # type: ignore[arg-type]
    drawn = base.controlled([Control(network=net, picture=pixels)])._controls.told((16, 16), [0, 1])
    assert torch.equal(own(pixels), drawn["condition.0"])
    torch.testing.assert_close(own(moments), own(pixels), rtol=0, atol=1e-6)
    # As diffusers' script: scaled, without the shift, where the pooled text is left out.
    theirs = moments.chunk(2, 1)[0] * base.codec.autoencoder.config.scaling_factor
    torch.testing.assert_close(own(pixels), theirs, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        for parameter in loss.trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1, "caption": ["a red dot", "a blue bar"], "weight": torch.ones(2)}
    forms = ({"condition": pixels}, {"condition.moments": moments})
    losses = [loss({**batch, **more}, Rng(0, (0, 1)))[0] for more in forms]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    other = loss({**batch, "condition": 1 - pixels}, Rng(0, (0, 1)))[0]
    assert abs(other.item() - losses[0].item()) > 1e-6


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"channels": 1}, r"task\.channels: 1, but its ControlNets see latents"),
        ({"layers": 9}, r"task\.base .*: layers: 9 is not between 1 and 2"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], why: str, project: Path) -> None:
    tree = told(project, "wrong")
    tree["task"] |= changes
    run = decode(RunConfig, yaml.safe_load(yaml.safe_dump(tree)))
    with pytest.raises(ValueError, match=why):
        assemble(run.task, run.data, run.train, 0, 0)


def test_layers_are_of_sd3(project: Path) -> None:
    miniature.teacher(project)
    run = decode(RunConfig, config(project, "unet", layers=2, samples={}, conditions=[]))
    with pytest.raises(ValueError, match=r"task\.layers: 2 is of Stable Diffusion 3"):
        assemble(run.task, run.data, run.train, 0, 0)
