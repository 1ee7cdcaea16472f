"""What the denoising loss tells a network: guidance scales, each encoder's text or the empty one, its tokens' times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config.load import decode
from ldm.diffusion import DynamicShift, Flow, FluxShift, Process, Velocity
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.types import Cond

VAE = AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)
COUNT = 600


class Probe(nn.Module):
    """Remembers what it was told."""

    guidance_width: int | None = 8
    guidance_is_scale = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen = {"x": x, "t": t, **cond}
        return self.scale * x


def three_encoders(texts: Any) -> Cond:
    """As SD3's: two towers with pooled vectors, and a third with a mask; every number tells the caption's length."""
    size = torch.tensor([float(len(t)) for t in texts])
    rows, tokens = size.view(-1, 1, 1), max(3, *(len(t) for t in texts)) if max(map(len, texts)) else 2
    mask = torch.stack([torch.arange(tokens) < max(1, len(t)) for t in texts])
    return {
        "text.0": rows.expand(-1, 4, 2), "pooled.0": size[:, None].expand(-1, 3),
        "text.1": rows.expand(-1, 4, 2), "pooled.1": size[:, None].expand(-1, 3),
        "text.2": rows.expand(-1, tokens, 5) * mask.unsqueeze(2), "mask.2": mask,
    }  # fmt: skip


def one_encoder(texts: Any) -> Cond:
    return {"text": torch.zeros(len(texts), 3, 2)}


def objective(encode: Any = one_encoder, network: Any = None, process: Any = None, **options: Any) -> DenoiseObjective:
    process = process or Process(schedule=Flow(), prediction=Velocity())
    chosen = DenoiseOptions(**{"drop": 0.0, **options})
    return DenoiseObjective(network or Probe(), process, LatentCodec.of(Autoencoder(VAE)), encode, chosen)


def batch_of(count: int = COUNT, side: int = 2) -> dict[str, Any]:
    return {
        "moments": torch.zeros(count, 8, side, side),
        "caption": ["x" * (1 + p % 5) for p in range(count)],
        "position": torch.arange(count),
        "weight": torch.ones(count),
    }


def told(built: DenoiseObjective, batch: dict[str, Any]) -> dict[str, Tensor]:
    built(batch, Rng.of(3, batch["position"]))
    return built.trained.seen  # pyright: ignore


def test_one_guidance_scale():
    assert told(objective(guidance=1.0), batch_of(4))["guidance"].tolist() == [1.0] * 4
    distilled = Probe()
    distilled.guidance_is_scale = False  # LCM's kind is told the scale - 1
    assert told(objective(network=distilled, guidance=3.5), batch_of(4))["guidance"].tolist() == [2.5] * 4
    assert "guidance" not in told(objective(), batch_of(4))


def test_a_range_of_guidance_scales():
    """Even in the range, and each sample's own, whatever its batch is."""
    from scipy import stats

    built = objective(guidance=(1.0, 5.0))
    scales = told(built, batch_of())["guidance"]
    assert stats.kstest(scales.numpy(), stats.uniform(1, 4).cdf).pvalue > 0.01
    part = {key: value[7:11] for key, value in batch_of().items()}
    assert torch.equal(told(built, part)["guidance"], scales[7:11])


def test_a_network_that_is_told_none():
    plain = Probe()
    plain.guidance_width = None
    with pytest.raises(ValueError, match=r"guidance 1\.0: the network is told no guidance scale; write null"):
        objective(network=plain, guidance=1.0)


@pytest.mark.parametrize("live", [False, True])
def test_each_encoder_alone(live):
    """Shares as told, independent of each other and of the whole caption's; a tower's two keys go together."""
    shares = (0.5, 0.0, 0.25)
    built = DenoiseObjective(
        Probe(), Process(schedule=Flow(), prediction=Velocity()), LatentCodec.of(Autoencoder(VAE)), three_encoders,
        DenoiseOptions(drop=0.2, drop_each=shares), live=live,
    )  # fmt: skip
    batch = batch_of()
    seen = told(built, batch)
    gone = [seen[f"text.{i}"].flatten(1).abs().sum(1) == 0 for i in range(3)]
    rng = Rng.of(3, batch["position"])
    whole = rng.uniform("drop") < 0.2
    for i, share in enumerate(shares):
        assert torch.equal(gone[i], whole | (rng.uniform(f"drop {i}") < share))
        assert float(gone[i].float().mean()) == pytest.approx(1 - 0.8 * (1 - share), abs=0.06)
    both = float((gone[0] & gone[2] & ~whole).float().mean())
    assert both == pytest.approx(0.8 * 0.5 * 0.25, abs=0.04)
    for i in (0, 1):
        assert torch.equal(seen[f"pooled.{i}"].abs().sum(1) == 0, gone[i])
    assert seen["mask.2"].dtype == torch.bool
    lengths = torch.tensor([len(c) for c in batch["caption"]])
    assert torch.equal(seen["mask.2"].sum(1), torch.where(gone[2], 1, lengths))


def test_cached_texts_of_other_lengths():
    """A batch's masked texts shorter than the empty prompt, and longer, without and with `drop_each`."""
    for tokens in (1, 9):
        texts = three_encoders(["x" * tokens] * 6)
        built = objective(three_encoders, drop=0.5, drop_each=(0.5, 0.5, 0.5))
        batch = batch_of(6) | {k: v[..., :tokens, :] if k == "text.2" else v for k, v in texts.items()}
        batch["mask.2"] = batch["mask.2"][:, :tokens]
        del batch["caption"]
        seen = told(built, batch)
        assert seen["text.2"].shape[1] == seen["mask.2"].shape[1] == tokens
        assert set(seen["mask.2"].sum(1).tolist()) <= {1, tokens}


def test_without_masks_lengths_must_agree():
    built = objective(one_encoder, drop=0.5)
    batch = batch_of(4) | {"text": torch.zeros(4, 5, 2)}
    with pytest.raises(ValueError, match="cond 'text' has texts of 3 and 5 tokens and no 'mask'"):
        told(built, batch)


def test_flux_shift_counts_the_pictures_tokens():
    """Of latents 32 x 16: 16 x 8 tokens of 2 x 2."""
    density = FluxShift(dynamic=DynamicShift(base_image_seq_len=16, max_image_seq_len=512, base_shift=0.1))
    process = Process(schedule=Flow(shift=3.0, dynamic=DynamicShift()), prediction=Velocity(), density=density)
    batch = batch_of(50) | {"moments": torch.zeros(50, 8, 32, 16)}
    t = told(objective(process=process), batch)["t"]
    assert torch.equal(t, 1000 * density.of_tokens(128).warp(Rng.of(3, batch["position"]).uniform("time")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -1.0}, "guidance must be a scale of at least 0 or"),
        ({"guidance": (5.0, 1.0)}, "guidance must be a scale of at least 0 or"),
        ({"drop_each": (0.1, 1.5, 0.0)}, "drop_each must be in"),
        ({"drop_each": (0.1, 0.1)}, r"drop_each: expected a share for each of 1 text encoders, got \[0.1, 0.1\]"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_from_a_config():
    assert decode(DenoiseOptions, {"guidance": [1.0, 5.0], "drop_each": [0.4, 0.4, 0.4]}) == DenoiseOptions(
        guidance=(1.0, 5.0), drop_each=(0.4, 0.4, 0.4)
    )
    assert decode(DenoiseOptions, {"guidance": 1}).guidance == 1.0
