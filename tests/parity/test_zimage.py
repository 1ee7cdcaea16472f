"""Z-Image's transformer against diffusers with the same weights: outputs, gradients, ragged texts, names and counts.

diffusers computes RMS norms' statistics and rotary positions in float32 whatever the weights' type; for float64 it is
given replacements, written here. Its output has the other sign, and its times run from 0 at noise to 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.networks import diffusers_keys
from ldm.models.transformers import presets
from ldm.models.transformers.zimage import ZImageConfig, ZImageTransformer
from tests.parity.test_transformers import deviation, exact_rms, randomized, same_gradients

torch.set_num_threads(1)
MODULE = "diffusers.models.transformers.transformer_z_image"
CONFIGS: dict[str, ZImageConfig] = {
    "tiny": presets.ZIMAGE_TINY,
    "wide": replace(presets.ZIMAGE_TINY, dim=288, n_heads=2, n_kv_heads=2, axes_dims=(48, 48, 48), n_refiner_layers=2),
    "other": replace(presets.ZIMAGE_TINY, qk_norm=False, all_patch_size=(1,), norm_eps=1e-3, rope_theta=10.0),
}


def exact_table(dim: list[int], end: list[int], theta: float) -> list[Tensor]:
    angles = [
        torch.outer(torch.arange(e).double(), theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d))
        for d, e in zip(dim, end, strict=True)
    ]
    return [torch.polar(torch.ones_like(a), a) for a in angles]


def exact_attention(
    self: Any, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None, freqs_cis: Tensor, **_: Any
) -> Tensor:
    """Softmax of turned queries and keys, by itself, in the type that it is given."""
    q, k, v = (f(hidden_states).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    q, k = (
        torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * freqs_cis[:, :, None]).flatten(-2)
        for y in (q, k)
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, None, None], -torch.inf)
    return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.models.normalization.RMSNorm.forward", exact_rms)
    monkeypatch.setattr(f"{MODULE}.RopeEmbedder.precompute_freqs_cis", staticmethod(exact_table))
    monkeypatch.setattr(f"{MODULE}.ZSingleStreamAttnProcessor.__call__", exact_attention)


def pair(config: ZImageConfig, dtype: torch.dtype = torch.float64) -> tuple[ZImageTransformer, Any]:
    from diffusers import ZImageTransformer2DModel

    theirs = randomized(ZImageTransformer2DModel(**diffusers_keys(config)), dtype)
    ours = ZImageTransformer(config).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(config: ZImageConfig, lengths: list[int], size: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """Texts of these lengths in one batch, with numbers where their masks leave them out."""
    x = torch.randn(len(lengths), config.in_channels, *size, dtype=dtype)
    text = torch.randn(len(lengths), max(lengths) + 3, config.cap_feat_dim, dtype=dtype)
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]
    return x, torch.tensor([31.25, 500.0, 977.0])[: len(lengths)], {"text": text, "mask": mask}


def their_output(theirs: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """As diffusers' pipeline calls it."""
    texts = [row[seen] for row, seen in zip(cond["text"], cond["mask"], strict=True)]
    patch = theirs.all_patch_size[0]
    out = theirs(list(x.unsqueeze(2).unbind(0)), (1000 - t) / 1000, texts, return_dict=False, patch_size=patch)[0]
    return -torch.stack(out).squeeze(2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("lengths", "size"),
    [([5, 40, 64], (8, 12)), ([7, 30], (16, 8)), ([32], (16, 16)), ([1, 33], (10, 6))],
    ids=["ragged", "as long when filled up", "nothing to fill up", "one token"],
)
def test_outputs_and_gradients(name: str, lengths: list[int], size: tuple[int, int], exact: None) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CONFIGS[name])
    x, t, cond = inputs(ours.config, lengths, size, torch.float64)
    wanted = their_output(theirs, x, t, cond)
    out = ours(x, t, cond)
    assert deviation(out, wanted) < 1e-12
    same_gradients(ours, theirs, out, wanted)
    known = ours.prepared(cond)
    assert known["mask"].sum(1).tolist() == [(n + 31) // 32 * 32 for n in lengths]
    assert known["context"].shape[1] == (max(lengths) + 31) // 32 * 32


def test_a_batch_of_other_lengths_is_what_each_is_alone() -> None:
    """Also where the tokens of a text do not stand together."""
    torch.manual_seed(0)
    ours, _ = pair(presets.ZIMAGE_TINY)
    x, t, cond = inputs(ours.config, [5, 40, 64], (8, 12), torch.float64)
    with torch.no_grad():
        out = ours(x, t, cond)
        for i, n in enumerate([5, 40, 64]):
            alone = ours(x[i : i + 1], t[i : i + 1], {"text": cond["text"][i : i + 1, :n]})
            assert deviation(out[i : i + 1], alone) < 1e-12
        apart = torch.zeros_like(cond["text"]), torch.zeros_like(cond["mask"])
        places = torch.arange(67)[torch.arange(67) % 13 != 1][:40]
        apart[0][0, places], apart[1][0, places] = cond["text"][1, :40], True
        other = ours(x[1:2], t[1:2], {"text": apart[0][:1], "mask": apart[1][:1]})
        assert deviation(other, out[1:2]) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_as_diffusers_is(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CONFIGS[name], torch.float32)
    x, t, cond = inputs(ours.config, [5, 40, 64], (8, 12), torch.float32)
    wanted, out = their_output(theirs, x, t, cond), ours(x, t, cond)
    assert deviation(out, wanted) < 1e-5
    same_gradients(ours, theirs, out, wanted, 1e-5)


@pytest.mark.slow
def test_real_width() -> None:
    """One block of each kind, a text and a picture that end within 32 tokens; gradients of a part of the weights."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    config = replace(presets.ZIMAGE, n_layers=1, n_refiner_layers=1)
    theirs = ZImageTransformer2DModel(**diffusers_keys(config))
    with torch.device("meta"):
        ours = ZImageTransformer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x, t, cond = inputs(config, [45], (12, 20), torch.float32)
    wanted, out = their_output(theirs, x, t, cond), ours(x, t, cond)
    assert deviation(out, wanted) < 1e-5
    some = ["layers.0.attention.to_q.weight", "context_refiner.0.feed_forward.w2.weight", "t_embedder.mlp.0.bias"]
    weight = torch.randn_like(out)
    for key, found, expected in zip(
        some,
        torch.autograd.grad((out * weight).sum(), [ours.get_parameter(k) for k in some]),
        torch.autograd.grad((wanted * weight).sum(), [theirs.get_parameter(k) for k in some]),
        strict=True,
    ):
        assert deviation(found, expected) < 1e-4, key


def test_names_shapes_and_count() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        ours, theirs = ZImageTransformer(presets.ZIMAGE), ZImageTransformer2DModel(**diffusers_keys(presets.ZIMAGE))
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == 6_154_908_736
