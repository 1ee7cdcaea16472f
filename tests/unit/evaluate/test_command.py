"""`ldm evaluate` on tiny random models, against ranks, errors and pictures computed here by other means."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.checkpoint.folders import write_module
from ldm.cli import evaluate
from ldm.config.load import encode
from ldm.data.manifest import resolve
from ldm.diffusion import Discrete, Epsilon
from ldm.evaluate import measure
from ldm.metrics import features
from ldm.models.presets import CLIPS
from ldm.models.text import build_clip
from ldm.models.text.openclip import fitted, tokenizer_of
from ldm.recipes.sources import load_autoencoder, load_clip
from tests.unit.evaluate.models import tiny_model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the export of a tiny random CLIP."""
    torch.manual_seed(1)
    config, folder = CLIPS["tiny"], tmp_path_factory.mktemp("clip")
    weights = build_clip(config).state_dict()
    write_module(folder / "export" / "clip", weights, {"_class_name": "CLIP", **encode(config)})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of tiny random networks."""
    return tiny_model(tmp_path_factory.mktemp("model"), Discrete(), Epsilon())


def plain_captions(split: str) -> dict[str, str]:
    """Key -> plain caption, read from the tar without our reader."""
    path = resolve("emoji").parent / f"{split}-00000.tar"
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m) for m in tar if m.name.endswith(".json")}
        return {n.removesuffix(".json"): json.load(f)["captions"][0][0] for n, f in members.items() if f is not None}


def run(tmp_path: Path, *argv: Any) -> dict[str, Any]:
    out = tmp_path / "figures.json"
    assert evaluate.main([str(a) for a in (*argv, "--out", out)]) == 0
    return json.loads(out.read_text())


def test_captions_are_the_splits_own_and_drawn_by_seed() -> None:
    truth = plain_captions("heldout")
    assert sorted(measure.caption_pool("emoji", "heldout")) == sorted(set(truth.values()))
    drawn = measure.draw("emoji", "heldout", 40, seed=3)
    assert len(set(drawn.captions)) == 40
    samples = measure._samples("emoji", "heldout")
    assert [truth[samples.key(i)] for i in drawn.ids] == list(drawn.captions)
    assert drawn == measure.draw("emoji", "heldout", 40, seed=3)
    assert set(drawn.captions) != set(measure.draw("emoji", "heldout", 40, seed=4).captions)
    assert len(measure.draw("emoji", "heldout").captions) == len(set(truth.values())), "a small split is taken whole"


def test_retrieval_of_real_pictures_is_the_rank(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the whole pool as candidates nothing is drawn: R@k is the share of ranks below k."""
    pool = measure.caption_pool("emoji", "heldout")
    argv = ("retrieval", "--clip", clip, "--split", "heldout", "--real", "--count", 30, "--candidates", len(pool))
    found = run(tmp_path, *argv)
    drawn = measure.draw("emoji", "heldout", 30)
    tower, config = load_clip(str(clip / "export"))
    tower: Any = tower
    images = measure.real_pictures("emoji", "heldout", drawn.ids, config.image_size)
    with torch.no_grad():
        scores = (
            tower.encode_image(images, normalize=True) @ tower.encode_text(tokenizer_of(config)(pool), normalize=True).T
        )
    own = torch.tensor([pool.index(c) for c in drawn.captions])
    rank = (scores > scores.gather(1, own[:, None])).sum(1)
    for k in (1, 5, 10):
        assert found["result"][f"R@{k}"]["rate"] == pytest.approx(float((rank < k).float().mean()), abs=1e-6)
    assert found["result"]["R@1"]["chance"] == 1 / len(pool)
    assert found["protocol"]["pictures"] == "real"
    assert "R@10" in capsys.readouterr().out


def test_drawn_pictures_and_their_protocol(clip: Path, model: Path, tmp_path: Path) -> None:
    """The same protocol gives the same figures, whatever the batch; the weights' hashes tell models apart."""
    argv = ("retrieval", "--model", model, "--clip", clip, "--split", "heldout", "--count", 6, "--candidates", 8)
    argv += ("--steps", 2, "--guidance", 2)
    one, two = run(tmp_path, *argv, "--batch", 6), run(tmp_path, *argv, "--batch", 4)
    assert one == two
    protocol = one["protocol"]
    said = {"measure": "retrieval", "split": "heldout", "count": 6, "seed": 0}
    assert said.items() <= protocol.items()
    assert {"sampler": "dpmpp_2m", "steps": 2, "guidance": 2}.items() <= protocol.items()
    assert {"data", "size", "precision", "weights", "clip", "clip_weights", "clip_size"} <= protocol.keys()
    assert len({*protocol["weights"].values(), protocol["clip_weights"]}) == 4
    assert one["result"]["candidates"] == 8
    assert "R@10" not in one["result"], "of 8 candidates, ten are always found"


def test_reconstruction_is_that_of_the_posterior_mean(model: Path, tmp_path: Path) -> None:
    found = run(tmp_path, "reconstruction", "--model", model, "--split", "heldout", "--count", 5, "--size", 32)
    autoencoder = load_autoencoder(str(model))
    images = measure.real_pictures("emoji", "heldout", measure.draw("emoji", "heldout", 5).ids, 32)
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(images).chunk(2, dim=1)[0]).clamp(-1, 1)
    error = ((decoded.double() - images.double()) / 2).square().flatten(1).mean(1)
    assert found["result"]["psnr"]["mean"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-3)
    assert found["protocol"]["count"] == 5


def test_features_of_the_same_pictures_are_no_distance_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with the split's own pictures is at distance 0; brighter ones are not."""
    small = features.Encoder("pixels@2", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
    monkeypatch.setattr(features, "load_network", lambda name, weights: small)
    drawn = measure.draw("emoji", "heldout", 12)
    images = features.to_uint8(measure.real_pictures("emoji", "heldout", drawn.ids, 32)).permute(0, 2, 3, 1)
    argv = ("features", "--pictures", tmp_path / "own", "--split", "heldout", "--count", 12)
    (tmp_path / "own").mkdir()
    for i, picture in enumerate(images):
        Image.fromarray(picture.numpy()).save(tmp_path / "own" / f"{i}.png")
    same = run(tmp_path, *argv)["result"]
    assert abs(same["frechet_distance[pixels@2]"]) < 1e-9
    assert same["precision"] == same["recall"] == 1
    assert "fid" not in same
    for i, picture in enumerate(images // 2):
        Image.fromarray(picture.numpy()).save(tmp_path / "own" / f"{i}.png")
    assert run(tmp_path, *argv)["result"]["frechet_distance[pixels@2]"] > 0.5
    assert "equal counts" in capsys.readouterr().out


def test_features_of_a_clip_are_named_by_it_and_never_fid(clip: Path, model: Path, tmp_path: Path) -> None:
    argv = ("features", "--model", model, "--split", "heldout", "--count", 6, "--steps", 2, "--network", f"clip:{clip}")
    found = run(tmp_path, *argv)
    tower, config = load_clip(str(clip / "export"))
    name = found["protocol"]["network"]
    assert name.startswith(f"clip:{clip}@{config.image_size}#")
    assert {f"frechet_distance[{name}]", f"kernel_distance[{name}]", "precision", "recall"} <= found["result"].keys()
    assert not {"fid", "kid"} & found["result"].keys()
    wanted = {"data", "split", "count", "size", "seed", "sampler", "steps", "guidance", "weights", "precision"}
    assert wanted <= found["protocol"].keys()
    drawn = measure.draw("emoji", "heldout", 6)
    real = measure.real_pictures("emoji", "heldout", drawn.ids, found["protocol"]["size"])
    tower: Any = tower
    with torch.no_grad():
        direct = tower.encode_image(fitted(real, config), normalize=True)
    assert torch.allclose(measure.feature_network(f"clip:{clip}")(real), direct, atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("retrieval", "--split", "heldout", "--count", "9999"), "count: 9999"),
        (
            ("retrieval", "--split", "heldout", "--candidates", "1"),
            "--candidates must be at least 2, got 1",
        ),
        (("retrieval", "--split", "evening"), "evening"),
        (("reconstruction", "--model", "nowhere"), "nowhere"),
        (("features", "--pictures", "nowhere", "--network", "vgg"), "vgg"),
    ],
)
def test_mistakes_name_the_value(argv: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate.main(list(argv))
