"""CompVis single files: our names against diffusers' converter at the real shapes, and round trips of small models."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import maps, single, weights
from ldm.checkpoint.convert import load_diffusers, load_model, load_single, open_model, save_diffusers, save_single
from ldm.checkpoint.opened import Opened, OpenedText, empty, shapes_of
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.checkpoint.weights import Entry
from ldm.cli import convert as cli
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.schedule import Discrete
from ldm.models import presets
from tests.parity.test_diffusers_folder import make

torch.set_num_threads(1)


def shapes_only(config: Any) -> dict[str, Entry]:
    """A source with the tensors' shapes and no memory."""
    return weights.of_state({k: v.detach() for k, v in empty(config).state_dict().items()})


@functools.cache
def family(name: str) -> Opened:
    """A published family at its real shape, on the meta device."""
    vae = presets.AUTOENCODERS["kl_f8_sdxl" if name == "sdxl" else "kl_f8"]
    text = presets.TEXTS[name.partition("_")[0]]
    return Opened(
        name,
        presets.UNETS[name],
        shapes_only(presets.UNETS[name]),
        vae,
        shapes_only(vae),
        tuple(OpenedText(t, shapes_only(t)) for t in text),
        scheduler_to_diffusers(Discrete(), V() if name == "sd21" else Epsilon()),
    )


@pytest.mark.parametrize("name", ["sd15", "sd15_inpainting", "sd15_pix2pix", "sd21", "sdxl"])
def test_unet_and_autoencoder_names_are_those_diffusers_reads(name: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    model = family(name)
    file = {k: e.read() for k, e in single.tensors(model).items()}
    config = {
        "layers_per_block": 2,
        "addition_embed_type": model.network_config.addition_embed_type,
        "class_embed_type": None,
        "num_class_embeds": None,
    }
    theirs = convert_ldm_unet_checkpoint(dict(file), config)
    native = single._unet_names(model.network_config)
    assert set(theirs) == set(native)
    assert all(theirs[k] is file[single.UNET + other] for k, other in native.items())
    theirs = convert_ldm_vae_checkpoint(
        {k: v for k, v in file.items() if k.startswith(single.VAE)},
        {"down_block_types": [0] * 4, "up_block_types": [0] * 4, "block_out_channels": [0] * 4},
    )
    native = maps.vae_to_compvis(model.vae, 4)
    assert set(theirs) == set(native)
    for key, other in native.items():
        assert theirs[key].shape == model.vae[key].shape
        if "attentions" not in key:
            assert theirs[key] is file[single.VAE + other]


@pytest.mark.parametrize("index", [0, 1])
def test_text_names_are_those_diffusers_reads(index: int) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    parts = make("sdxl")
    model = Opened.of(parts.network, parts.autoencoder, parts.text, parts.scheduler)
    file = {k: e.read() for k, e in single.tensors(model).items()}
    tower = model.text[index]
    hf = {k: e.read() for k, e in maps.follow(maps.text_to_hf(tower.source), tower.source, "").items()}
    if index == 0:
        theirs = convert_ldm_clip_checkpoint(file, remove_prefix="conditioner.embedders.0.transformer.")
        assert set(theirs) == set(hf)
    else:
        small = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1))
        file["conditioner.embedders.1.model.text_projection"] = torch.zeros(
            32, 20
        )  # they take its height for the width
        hf["text_projection.weight"] = torch.zeros(20, 32)
        theirs = convert_open_clip_checkpoint(small, file, prefix="conditioner.embedders.1.model.")
        theirs = {k if k.startswith(("text_model.", "text_proj")) else f"text_model.{k}": v for k, v in theirs.items()}
        assert set(theirs) == set(hf)
    assert all(torch.equal(theirs[k], hf[k]) for k in hf)


@pytest.mark.parametrize("name", ["sd15", "sd15_inpainting", "sd15_pix2pix", "sd21", "sdxl"])
def test_strangers_files_are_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name)
    stored = single.tensors(model)
    extra = {"alphas_cumprod": torch.zeros(1000), "betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    if name == "sd15":
        extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.zeros(1, 77)
    if name == "sd21":
        extra["cond_stage_model.model.logit_scale"] = torch.zeros(())
    if name == "sdxl":
        extra["conditioner.embedders.1.model.logit_scale"] = torch.zeros(())
        extra["denoiser.sigmas"] = torch.zeros(1000)
    monkeypatch.setattr(weights, "open_file", lambda path: {**stored, **weights.of_state(extra)})
    monkeypatch.setattr(weights, "metadata", lambda path: {})
    opened = single.open_single(Path("model.safetensors")).check()
    assert opened.network_config.in_channels == model.network_config.in_channels
    assert shapes_of(opened.network_config) == shapes_of(model.network_config)
    assert opened.vae_config == model.vae_config
    assert [t.config for t in opened.text] == [t.config for t in model.text]
    assert opened.scheduler == model.scheduler
    assert single.open_single(Path("m"), prediction="epsilon").scheduler["prediction_type"] == "epsilon"
    stored["model.diffusion_model.surprise.weight"] = Entry(torch.Size([1]), torch.float32, lambda: torch.zeros(1))
    with pytest.raises(ValueError, match=r"U-Net: not known 1 key.*surprise"):
        single.open_single(Path("model.safetensors"))


def same(ours: Any, theirs: Any, half: bool = False) -> bool:
    pairs = [(ours.network, theirs.network), (ours.autoencoder, theirs.autoencoder)]
    pairs += [(a.model, b.model) for a, b in zip(ours.text, theirs.text, strict=True)]

    def equal(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.half().float() if half else a, b)

    skip = "text_projection" if len(ours.text) == 1 else "-"
    return all(equal(v, b.state_dict()[k]) for a, b in pairs for k, v in a.state_dict().items() if k != skip)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "inpainting"])
def test_round_trip_of_small_models(name: str, tmp_path: Path) -> None:
    parts = make(name)
    kinds: dict[str, Any] = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
    save_single(tmp_path / "m.safetensors", **kinds, scheduler=parts.scheduler)
    back = load_single(tmp_path / "m.safetensors")
    assert same(parts, back)
    assert back.scheduler == parts.scheduler
    assert [t.config for t in back.text] == [t.config for t in parts.text] or name == "sd1"
    # through the command line to a folder in half precision and back to a file
    assert (
        cli.main([str(tmp_path / "m.safetensors"), str(tmp_path / "d"), "--to", "diffusers", "--dtype", "float16"]) == 0
    )
    if name != "sd2":  # whose folder has a layer less
        assert same(parts, load_diffusers(tmp_path / "d"), half=True)
    assert cli.main([str(tmp_path / "d"), str(tmp_path / "again.safetensors"), "--to", "compvis"]) == 0
    tokens = parts.text[0].tokenize(["a red apple"])
    again = load_model(tmp_path / "again.safetensors")
    ours, theirs = parts.text[0].encode(tokens)["text"], again.text[0].encode(tokens)["text"]
    assert (ours - theirs).norm() < 2e-3 * ours.norm()
    with pytest.raises(ValueError, match="exists already"):
        cli.main([str(tmp_path / "d"), str(tmp_path / "again.safetensors"), "--to", "compvis"])


def test_averaged_weights_on_request(tmp_path: Path) -> None:
    parts = make("sd1")
    save_single(
        tmp_path / "m.safetensors",
        network=parts.network,
        autoencoder=parts.autoencoder,
        text=parts.text,
        scheduler=parts.scheduler,
    )
    with pytest.raises(ValueError, match="EMA weights asked for"):
        load_single(tmp_path / "m.safetensors", ema=True)
    source = weights.open_file(tmp_path / "m.safetensors")
    state = weights.read_all(source)
    for key in list(state):
        if key.startswith("model."):
            state["model_ema." + key.removeprefix("model.").replace(".", "")] = state[key] + 1
    about = {single.CONFIG: weights.metadata(tmp_path / "m.safetensors")[single.CONFIG]}
    weights.write_file(tmp_path / "ema.safetensors", weights.of_state(state), metadata=about)
    raw, mean = load_single(tmp_path / "ema.safetensors"), load_single(tmp_path / "ema.safetensors", ema=True)
    assert torch.equal(raw.network.conv_in.weight, parts.network.conv_in.weight)
    assert torch.equal(mean.network.conv_in.weight, parts.network.conv_in.weight + 1)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "good.ckpt")
    assert torch.equal(weights.open_file(tmp_path / "good.ckpt")["a"].read(), torch.ones(2))
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.ckpt", "old.ckpt"):
        with pytest.raises(ValueError, match=rf"{name}: refused: it would run .*exec"):
            weights.open_file(tmp_path / name)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.ckpt"):
        weights.open_file(tmp_path / "cut.ckpt")


def test_damaged_and_strange_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write_file(tmp_path / "a.safetensors", weights.of_state({"x": torch.ones(64)}))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a whole safetensors file"):
        weights.open_file(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="not recognised as a single file"):
        open_model(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a hub id"):
        open_model(tmp_path / "nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"nobody/nothing: .*download it where there is a network"):
        open_model("nobody/nothing")


def test_saving_replaces_a_folder_with_a_sharded_one(tmp_path: Path) -> None:
    parts = make("sd1")
    kinds: dict[str, Any] = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
    save_diffusers(tmp_path / "m", **kinds, scheduler=parts.scheduler)
    save_diffusers(tmp_path / "m", **kinds, scheduler=parts.scheduler, shard_bytes=50_000)
    assert not (tmp_path / "m/unet/diffusion_pytorch_model.safetensors").exists()
    assert same(parts, load_diffusers(tmp_path / "m"))


def test_converting_needs_little_memory(tmp_path: Path) -> None:
    """A file of 512 MB in 16 tensors is rewritten by a process that grows by less than half of that."""
    import resource

    block = torch.zeros(8 * 1024 * 1024)
    big = {f"t{i}": Entry(block.shape, block.dtype, lambda: block) for i in range(16)}
    weights.write_file(tmp_path / "big.safetensors", big)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = weights.open_file(tmp_path / "big.safetensors")
    weights.write_file(tmp_path / "half.safetensors", source, dtype=torch.float16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024
    assert (tmp_path / "half.safetensors").stat().st_size < 0.51 * (tmp_path / "big.safetensors").stat().st_size
