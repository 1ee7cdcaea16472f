"""Judges of open_clip against open_clip's own preprocessing, towers and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from ldm.cli import evaluate
from ldm.cli.__main__ import main
from ldm.data.grid import to_pil
from ldm.data.images import pixels, to_float
from ldm.evaluate import measure
from ldm.models.text.openclip import OpenClipConfig, fitted, tokenizer_of
from ldm.recipes.sources import clip_tower, load_clip, weights_hash
from tests import miniature

SIZE = 32
PROMPTS = ["a red dot", "", "a dog " * 60, "Grüße, 世界!"]
TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CUSTOM = {**TINY, "custom_text": True, "init_logit_bias": -10}  # as SigLIP's: the text tower is a module of its own


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two tiny architectures among open_clip's."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "Tiny-8.json").write_text(json.dumps(TINY))
    (folder / "Tiny-8-custom.json").write_text(json.dumps(CUSTOM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
        patch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, architectures: None) -> dict[str, Path]:
    """Random weights of both, in both forms."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for seed, name in enumerate(("Tiny-8", "Tiny-8-custom")):
        torch.manual_seed(seed)
        weights = open_clip.create_model(name).state_dict()
        found[name] = folder / f"{name}.safetensors"
        save_file(weights, found[name])
        torch.save({"state_dict": weights}, found[name].with_suffix(".pt"))
    return found


def pictures(count: int, height: int = SIZE, width: int = SIZE, margin: int = 0) -> list[Image.Image]:
    shape = (count, height // 4, width // 4, 3)
    noise = np.random.default_rng(0).integers(margin, 256 - margin, shape, dtype=np.uint8)
    return [Image.fromarray(n).resize((width, height), Image.Resampling.BICUBIC) for n in noise]


def tensors(opened: list[Image.Image]) -> torch.Tensor:
    return to_float(np.stack([pixels(p) for p in opened]))


@pytest.mark.parametrize("form", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", ["Tiny-8", "Tiny-8-custom"])
@torch.no_grad()
def test_features_are_open_clips_own(files: dict[str, Path], name: str, form: str) -> None:
    path = files[name].with_suffix(form)
    clip, config = load_clip(f"open_clip:{name}:{path}")
    theirs, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(path))
    theirs: Any = theirs.eval()
    opened = pictures(5)
    want = theirs.encode_image(torch.stack([preprocess(p) for p in opened]), normalize=True)  # type: ignore[operator]
    assert (measure.clip_features(tensors(opened), clip, config) - want).abs().max() < 1e-5
    ours: Any = clip
    texts = theirs.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True)
    assert (ours.encode_text(tokenizer_of(config)(PROMPTS), normalize=True) - texts).abs().max() < 1e-5
    raw = theirs.encode_text(open_clip.get_tokenizer(name)(PROMPTS))
    assert (ours.encode_text(tokenizer_of(config)(PROMPTS)) - raw).abs().max() < 1e-5
    assert ours.logit_scale == theirs.logit_scale
    assert not any(p.requires_grad for p in clip.parameters())
    assert weights_hash(clip) == weights_hash(load_clip(f"open_clip:{name}:{files[name]}")[0])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(20, 20), (80, 80), (64, 44), (41, 90)])
def test_pictures_of_other_sizes_are_fitted_as_open_clip_does(shape: Any, resize_mode: Any, interpolation: Any) -> None:
    """PIL rounds to 8 bits after each of its two passes, and cuts off there what overshoots."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    how = {"interpolation": interpolation, "resize_mode": resize_mode, "fill_color": 128, **plain}
    preprocess: Any = image_transform_v2(PreprocessCfg(size=SIZE, **how), is_train=False)
    config = OpenClipConfig(architecture="Tiny-8", image_size=SIZE, **how)
    for margin, off in ((64, 2), (0, 4)):
        opened = pictures(3, shape[0], shape[1], margin)
        want = torch.stack([preprocess(p) for p in opened])
        found = (fitted(tensors(opened), config) + 1) / 2
        assert found.shape == want.shape
        assert (found - want).abs().max() < off / 255
        assert 0 <= found.min() <= found.max() <= 1


def test_tags_bring_their_own_preprocessing_and_activation(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights by path are seen as all published ones of their architecture agree to be."""
    half, own = (0.5, 0.5, 0.5), {"interpolation": "bilinear", "resize_mode": "squash"}
    tag = {"file": str(files["Tiny-8"]), "mean": half, "std": half, **own, "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-8", {"one": tag})
    clip, config = load_clip("open_clip:Tiny-8:one")
    assert isinstance(config, OpenClipConfig)
    assert (config.mean, config.std) == (half, half)
    assert {"mean": half, "std": half, **own} == config.told()
    theirs, _, preprocess = open_clip.create_model_and_transforms("Tiny-8", pretrained="one", force_quick_gelu=True)
    theirs, opened = theirs.eval(), pictures(4)
    with torch.no_grad():
        want: Any = theirs.encode_image(torch.stack([preprocess(p) for p in opened]), normalize=True)  # type: ignore
    assert (measure.clip_features(tensors(opened), clip, config) - want).abs().max() < 1e-5
    assert load_clip("open_clip:Tiny-8")[1] == config, "the only tag need not be named"
    assert load_clip(f"open_clip:Tiny-8:{files['Tiny-8']}")[1] == config
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-8", {"one": tag, "two": {**tag, "mean": (0.4, 0.5, 0.6)}})
    seen = load_clip(f"open_clip:Tiny-8:{files['Tiny-8']}")[1]
    assert isinstance(seen, OpenClipConfig)
    assert seen.mean == open_clip.OPENAI_DATASET_MEAN, "they disagree: open_clip's default"
    assert seen.std == half
    with pytest.raises(ValueError, match=r"add which weights.*'one', 'two'"):
        load_clip("open_clip:Tiny-8")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_mistakes_are_told_in_one_line(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    for source, says in {
        "open_clip:ViT-X-99:openai": r"architecture 'ViT-X-99'.*open_clip\.list_models\(\)",
        "open_clip:Tiny-8": "no published weights: expected a file",
        "open_clip:Tiny-8:nothing": "'nothing': no such file or tag",
        "open_clip:RN50:nothing": "'nothing': no such file or tag.*'openai', 'yfcc15m'",
        "open_clip:RN50:openai": r"could not be downloaded .*without a network.*open_clip:RN50:PATH",
        f"open_clip:Tiny-8-custom:{files['Tiny-8'].with_name('none')}": "no such file or tag",
        f"open_clip:ViT-S-32-alt:{files['Tiny-8']}": "plain tensors that fits",
        f"open_clip:Tiny-8:{tmp_path / 'evil.pt'}": "plain tensors that fits",
    }.items():
        with pytest.raises(ValueError, match=says) as error:
            load_clip(source)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="no text tower"):
        clip_tower(f"open_clip:Tiny-8:{files['Tiny-8']}")


def run(tmp_path: Path, *argv: Any) -> dict[str, Any]:
    assert evaluate.main([str(a) for a in (*argv, "--out", tmp_path / "figures.json")]) == 0
    return json.loads((tmp_path / "figures.json").read_text())


def test_retrieval_and_distances_by_an_open_clip_model(files: dict[str, Path], tmp_path: Path) -> None:
    """On shipped pictures: R@k by ranks of open_clip's own features; the network is named with its weights' hash."""
    source = f"open_clip:Tiny-8:{files['Tiny-8']}"
    drawn = measure.draw("emoji", "heldout", 12)
    pool = list(drawn.pool)
    argv = ("retrieval", "--clip", source, "--split", "heldout", "--real", "--count", 12, "--candidates", len(pool))
    found = run(tmp_path, *argv)
    theirs, _, preprocess = open_clip.create_model_and_transforms("Tiny-8", pretrained=str(files["Tiny-8"]))
    theirs, see = theirs.eval(), preprocess
    opened = to_pil(measure.real_pictures("emoji", "heldout", drawn.ids, SIZE))
    with torch.no_grad():
        images: Any = theirs.encode_image(torch.stack([see(p) for p in opened]), normalize=True)  # type: ignore
        texts: Any = theirs.encode_text(open_clip.get_tokenizer("Tiny-8")(pool), normalize=True)  # type: ignore
    scores = images @ texts.T
    own = torch.tensor([pool.index(c) for c in drawn.captions])
    rank = (scores > scores.gather(1, own[:, None])).sum(1)
    for k in (1, 5, 10):
        assert found["result"][f"R@{k}"]["rate"] == pytest.approx(float((rank < k).float().mean()), abs=1e-6)
    told = found["protocol"]
    clip, _ = load_clip(source)
    assert (told["clip"], told["clip_weights"], told["clip_size"]) == (source, weights_hash(clip), SIZE)
    assert told["clip_input"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    for i, picture in enumerate(opened):
        picture.save(tmp_path / f"{i:02d}.png")
    argv = ("features", "--network", f"clip:{source}", "--pictures", tmp_path, "--split", "heldout", "--count", 12)
    found = run(tmp_path, *argv)
    name = f"clip:{source}@{SIZE}#{weights_hash(clip)[:12]}"
    assert found["protocol"]["network"] == name
    assert abs(found["result"][f"frechet_distance[{name}]"]) < 1e-6, "the split's own pictures"


def test_prompts_and_rows_by_an_open_clip_model(files: dict[str, Path], tmp_path: Path) -> None:
    root = miniature.project(tmp_path)
    model = str(miniature.teacher(root))
    source, out = f"open_clip:Tiny-8:{files['Tiny-8']}", tmp_path / "prompts.json"
    argv = ["--data", str(root / "data"), "--clip", source]
    drawing = ["--split", "train", "--count", "3", "--each", "2", "--model", model, "--steps", "2", "--no-diversity"]
    assert main(["evaluate", "prompts", *argv, *drawing, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {"clip_score", "retrieved", "cmmd"} <= found["result"].keys()
    assert found["protocol"]["clip_input"]["interpolation"] == "bicubic"
    rows = ["--model", f"m={model}", "--samplers", "ddim", "--steps", "1", "--splits", "train", "--count", "4"]
    rows += ["--network", f"clip:{source}", "--candidates", "4", "--reference", "4", "--clip-guidance", "2"]
    assert main(["evaluate", "samplers", *argv, *rows, "--no-bounds", "--out", str(tmp_path / "table")]) == 0
    (row,) = json.loads((tmp_path / "table" / "results.json").read_text())
    assert row["protocol"]["clip"] == source
    assert row["protocol"]["clip_input"] == found["protocol"]["clip_input"]
