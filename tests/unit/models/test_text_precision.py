"""Text encoders in half precision and in 8 bits: how near their states and pictures are, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ldm.checkpoint.convert import save_diffusers
from ldm.models.text import MissingT5, TextEncoder, TextTower, build_encoder, encode_texts, text_bytes
from ldm.models.text.int8 import Int8Linear
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.sources import cache_hashes, load_towers
from tests.families import make

torch.set_num_threads(1)
PROMPTS = ["a red apple", "", "two green apples and a dog, seen from above"]
BOUNDS = {"bf16": 0.999, "fp16": 0.9999, "int8": 0.998}
"""Least mean cosine of tokens' states with those in float32; a single token's is above 0.97."""


class Folders:
    """A model's folder of each family, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getitem__(self, kind: str) -> Path:
        if not (self.root / kind).exists():
            parts = make(kind, self.root / "tokens" / kind)
            own = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
            save_diffusers(self.root / kind, scheduler=parts.scheduler, **own)  # type: ignore[arg-type]
        return self.root / kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("precision"))


def kinds_of(encoder: TextEncoder) -> set[str]:
    return {str(p.dtype).removeprefix("torch.") for p in [*encoder.model.parameters(), *encoder.model.buffers()]}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("sd3", "bf16"), ("sd3", "int8"), ("zimage", "int8")]
    + [
        pytest.param(kind, precision, marks=pytest.mark.slow)
        for kind, precision in [("sd3", "fp16"), ("zimage", "bf16"), ("zimage", "fp16")]
        + [("pixart", precision) for precision in BOUNDS]
    ],
)
def test_states_and_pictures_are_near_those_of_float32(kind: str, precision: str, folders: Folders) -> None:
    exact = TextToImage.load(folders[kind])
    other = TextToImage.load(folders[kind], text_precision=precision)  # type: ignore[arg-type]
    wanted, found = (encode_texts(pipe.text, PROMPTS) for pipe in (exact, other))
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, "whatever it was computed in"
        if not value.is_floating_point():
            assert torch.equal(found[key], value)
            continue
        mask = wanted.get(key.replace("text", "mask")) if key.startswith("text") else None
        a, b = (v if mask is None else v[mask] for v in (found[key], value))
        near = cosine_similarity(a, b, dim=-1)
        assert near.mean() > BOUNDS[precision], key
        assert near.min() > 0.97, key
    settings = Settings(steps=3, sampler="euler", guidance=3.0, size=(16, 16))
    own, far = (pipe.sample(PROMPTS[:1], settings=settings) for pipe in (other, exact))
    without = exact.sample(["a big dog"], settings=settings)
    moved, usual = (own - far).square().mean().sqrt(), (without - far).square().mean().sqrt()
    print(f"{kind} {precision}: picture moved {moved:.5f}, by another prompt {usual:.5f}")
    assert 0 < moved < 0.1 * usual


@pytest.mark.parametrize("kind", ["sd3", "zimage"])
def test_8_bits_are_made_as_weights_are_read(kind: str, folders: Folders) -> None:
    """The same as of the whole encoder; CLIP beside them stays as it is; the planned bytes are those held."""
    exact, eight = load_towers(str(folders[kind])), load_towers(str(folders[kind]), "int8")
    for whole, made in zip(exact, eight, strict=True):
        assert text_bytes(whole, "fp32") == sum(p.nbytes for p in whole.model.parameters())
        if isinstance(whole, TextTower):
            assert all(torch.equal(v, made.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
            continue
        assert any(isinstance(m, Int8Linear) for m in made.model.modules())
        held = {**dict(made.model.named_parameters()), **made.model.state_dict()}
        with torch.device("meta"):
            planned = text_bytes(build_encoder(whole.config), "int8")
        assert planned == sum(v.nbytes for v in held.values())
        quantized = whole.quantize_8bit()
        assert torch.equal(made(PROMPTS)["text"], quantized(PROMPTS)["text"])
    for half in ("bf16", "fp16"):
        for made, whole in zip(load_towers(str(folders[kind]), half), exact, strict=True):  # type: ignore[arg-type]
            held_bytes = sum(p.nbytes for p in made.model.parameters())
            with torch.device("meta"):
                assert text_bytes(build_encoder(whole.config), half) == held_bytes  # type: ignore[arg-type]


def test_a_model_of_clip_alone_has_half_precision_and_no_8_bits(folders: Folders) -> None:
    for kind in ("sd3_clip", "sd3_no_t5"):
        with pytest.raises(ValueError, match="text_precision: 'int8', but this model's text encoders are CLIP's"):
            TextToImage.load(folders[kind], text_precision="int8")
        half = TextToImage.load(folders[kind], text_precision="bf16")
        assert all(kinds_of(e) <= {"bfloat16", "float32"} for e in half.text)
        found = encode_texts(half.text, PROMPTS)
        wanted = encode_texts(TextToImage.load(folders[kind]).text, PROMPTS)
        told = [k for k in wanted if not isinstance(half.text[int(k.partition(".")[2] or 0)], MissingT5)]
        assert all(cosine_similarity(found[k], wanted[k], dim=-1).min() > 0.998 for k in told)
    with pytest.raises(ValueError, match=r"text_precision: 'half' is not one of \['fp32', 'bf16', 'fp16', 'int8'\]"):
        TextToImage.load(folders["sd3"], text_precision="half")  # type: ignore[arg-type]


def test_caches_of_another_precision_are_others(folders: Folders) -> None:
    """Also where rounding changes no weight."""
    plain = load_towers(str(folders["sd3"]))
    rounded = [tower.bfloat16().float() for tower in load_towers(str(folders["sd3"]))]
    half = [tower.bfloat16() for tower in load_towers(str(folders["sd3"]))]
    told = [cache_hashes(towers=towers) for towers in (plain, rounded, half, load_towers(str(folders["sd3"]), "int8"))]
    assert told[1]["text"] == told[2]["text"]
    assert len({tuple(sorted(one.items())) for one in told}) == 4
