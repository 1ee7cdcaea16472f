"""LoRA files of other tools: each kind's change against its published formula, and against PEFT's own merging."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters.low_rank import Loras
from ldm.adapters.sites import all_sites, other_sites
from ldm.checkpoint.lora_files import read_adapter, read_lora
from ldm.models.text import TextConfig, TextTower
from ldm.models.unet import UNet
from tests.unit.adapters.test_lora import TEXT, model

SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
UNEVEN = "up_blocks.0.resnets.0.conv1"
SMALL = "down_blocks.0.attentions.0.proj_in"
NORM = "down_blocks.0.resnets.0.norm1"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def merged(path: Path, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A U-Net layer's weight before and after a file is merged, float64."""
    unet, tower = model()
    site = (all_sites(unet, [tower]) | other_sites(unet, [tower]))[f"unet.{name}"]
    before = site.read().double().clone()
    Loras(unet, [tower]).add("x", read_lora(path, unet, [tower], **options))
    return before, site.read().double()


def weight_of(name: str) -> Tensor:
    unet, tower = model()
    return all_sites(unet, [tower])[f"unet.{name}"].read().double()


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted.view(found.shape), atol=2e-6, rtol=1e-5)


def pair(name: str, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of one layer under kohya's name, with alpha of half the rank."""
    base, key = weight_of(name), kohya(name)
    return {
        f"{key}.lora_down.weight": draw(rank, *base.shape[1:]),
        f"{key}.lora_up.weight": draw(base.shape[0], rank, *[1] * (base.ndim - 2), seed=1),
        f"{key}.alpha": torch.tensor(rank / 2),
    }


def product(file: dict[str, Tensor], name: str) -> Tensor:
    key = kohya(name)
    up, down = (file[f"{key}.lora_{k}.weight"].double().flatten(1) for k in ("up", "down"))
    return 0.5 * (up @ down).view(weight_of(name).shape)


@pytest.mark.parametrize("name", [SQUARE, WIDE, CONV, UNEVEN, SMALL])
@pytest.mark.parametrize("axis", [0, 1])
def test_magnitudes_by_row_and_by_column(name: str, axis: int, tmp_path: Path) -> None:
    """LyCORIS: dora_scale (out, 1, ..) is of rows, (1, in, ..) of columns, over all other axes (LyCORIS#216)."""
    file, base = pair(name), weight_of(name)
    total = base + product(file, name)
    others = [i for i in range(base.ndim) if i != axis]
    norms = total.square().sum(others, keepdim=True).sqrt()
    scale = norms * (1 + 0.3 * torch.rand(norms.shape, generator=torch.Generator().manual_seed(2)))
    save_file(file | {kohya(name) + ".dora_scale": scale.float()}, tmp_path / "x.safetensors")
    assert close(merged(tmp_path / "x.safetensors", name)[1], total * (scale / norms).float().double())


@pytest.mark.parametrize(("shape", "axis"), [((8,), 0), ((1, 8), 1), ((8, 1), 0)])
def test_a_square_weight_is_decided_by_the_form(shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    file, base = pair(SQUARE), weight_of(SQUARE)
    assert base.shape == (8, 8)
    scale = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(file | {kohya(SQUARE) + ".dora_scale": scale.view(shape)}, tmp_path / "x.safetensors")
    total = base + product(file, SQUARE)
    across = scale.double() / total.norm(dim=1 - axis)
    assert close(
        merged(tmp_path / "x.safetensors", SQUARE)[1], total * (across[:, None] if axis == 0 else across[None])
    )


def test_magnitudes_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(pair(WIDE) | {kohya(WIDE) + ".dora_scale": torch.ones(1, 5)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"magnitudes \(1, 5\), the model's weight is \(8, 16\)"):
        merged(tmp_path / "x.safetensors", WIDE)


@pytest.mark.parametrize("name", [SQUARE, CONV])
def test_hadamard(name: str, tmp_path: Path) -> None:
    base, key = weight_of(name), kohya(name)
    wide = base.flatten(1).shape[1]
    a1, b1, a2, b2 = draw(len(base), 3), draw(3, wide, seed=1), draw(len(base), 3, seed=2), draw(3, wide, seed=3)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    file = {f"{key}.{n}": t for n, t in zip(names, (a1, b1, a2, b2), strict=True)} | {f"{key}.alpha": torch.tensor(1.5)}
    save_file(file, tmp_path / "x.safetensors")
    wanted = 1.5 / 3 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    assert close(merged(tmp_path / "x.safetensors", name)[1], base + wanted.view(base.shape))


def test_hadamard_of_a_kernel_in_three(tmp_path: Path) -> None:
    base, key = weight_of(CONV), kohya(CONV)
    file, sides = {f"{key}.alpha": torch.tensor(2.0)}, []
    for i in (1, 2):
        core, a, b = draw(2, 2, 3, 3, seed=i), draw(2, base.shape[0], seed=i + 4), draw(2, base.shape[1], seed=i + 8)
        file |= {f"{key}.hada_t{i}": core, f"{key}.hada_w{i}_a": a, f"{key}.hada_w{i}_b": b}
        sides.append(torch.einsum("ijkl,io,jc->ockl", core.double(), a.double(), b.double()))
    save_file(file, tmp_path / "x.safetensors")
    assert close(merged(tmp_path / "x.safetensors", CONV)[1], base + sides[0] * sides[1])


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", [WIDE, CONV])
def test_kronecker(name: str, factored: bool, tmp_path: Path) -> None:
    base, key = weight_of(name), kohya(name)
    out, into, *kernel = base.shape
    w1 = draw(2, 2)
    file = {f"{key}.lokr_w1": w1, f"{key}.alpha": torch.tensor(1.0)}
    if factored:
        core = draw(3, 3, *kernel) if kernel else None
        a, b = (draw(3, out // 2), draw(3, into // 2)) if kernel else (draw(out // 2, 3), draw(3, into // 2))
        file |= {f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b} | ({f"{key}.lokr_t2": core} if core is not None else {})
        w2 = a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)
        scale = 1 / 3
    else:
        w2, scale = draw(out // 2, into // 2, *kernel), 1.0  # two whole factors: alpha is not looked at
        file[f"{key}.lokr_w2"] = w2
    save_file(file, tmp_path / "x.safetensors")
    wanted = torch.zeros_like(base)
    for i in range(2):
        for j in range(2):
            wanted[i * out // 2 : (i + 1) * out // 2, j * into // 2 : (j + 1) * into // 2] = w1[i, j] * w2
    assert close(merged(tmp_path / "x.safetensors", name)[1], base + scale * wanted)


def test_a_convolution_in_three(tmp_path: Path) -> None:
    """LoCon's `lora_mid`: 1x1 down, the kernel between, 1x1 up."""
    base, key = weight_of(CONV), kohya(CONV)
    down, mid, up = draw(2, base.shape[1], 1, 1), draw(2, 2, 3, 3), draw(base.shape[0], 2, 1, 1)
    file = {f"{key}.lora_{n}.weight": t for n, t in (("down", down), ("mid", mid), ("up", up))}
    save_file(file | {f"{key}.alpha": torch.tensor(4.0)}, tmp_path / "x.safetensors")
    x = torch.randn(1, base.shape[1], 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.functional.conv2d
    chain = conv(conv(conv(x, down.double()), mid.double(), padding=1), up.double())
    before, after = merged(tmp_path / "x.safetensors", CONV)
    assert torch.allclose(conv(x, after - before, padding=1), 2 * chain, atol=1e-5)


def test_whole_differences_norms_and_biases(tmp_path: Path) -> None:
    unet, _ = model()
    weight, norm = draw(*weight_of(WIDE).shape), draw(8)
    bias = draw(*unet.get_submodule(CONV).bias.shape)  # type: ignore[union-attr]
    save_file(
        {
            f"{kohya(WIDE)}.diff": weight,
            f"{kohya(CONV)}.diff_b": bias,
            f"{kohya(NORM)}.w_norm": norm,
            f"{kohya(NORM)}.b_norm": 2 * norm,
            "lora_te_text_model_final_layer_norm.w_norm": draw(16),
        },
        tmp_path / "x.safetensors",
    )
    for name, wanted in ((WIDE, weight), (f"{CONV}.bias", bias), (NORM, norm), (f"{NORM}.bias", 2 * norm)):
        before, after = merged(tmp_path / "x.safetensors", name)
        assert close(after, before + wanted.double()), name


def test_a_linear_file_for_a_1x1_convolution(tmp_path: Path) -> None:
    file = pair(SMALL)
    flat = {k: v.flatten(1) if v.ndim == 4 else v for k, v in file.items()}
    save_file(flat, tmp_path / "x.safetensors")
    assert close(merged(tmp_path / "x.safetensors", SMALL)[1], weight_of(SMALL) + product(file, SMALL))


NAMES = [
    "base_model.model." + SQUARE,
    "unet." + SQUARE,
    "unet._orig_mod." + SQUARE,
    "lora_unet." + SQUARE,
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "lycoris_" + SQUARE.replace(".", "_"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "ends",
    ["lora_down.weight lora_up.weight", "lora_A.weight lora_B.weight", "lora_A.my-own.weight lora_B.my-own.weight"],
)
def test_names_of_other_tools(name: str, ends: str, tmp_path: Path) -> None:
    """OneTrainer's dots, its names shared with others (OMI), ComfyUI's, LyCORIS', PEFT's with an adapter's name."""
    down, up = ends.split()
    file = pair(SQUARE)
    a, b = file[kohya(SQUARE) + ".lora_down.weight"], file[kohya(SQUARE) + ".lora_up.weight"]
    save_file({f"{name}.{down}": a, f"{name}.{up}": b}, tmp_path / "x.safetensors")
    assert close(merged(tmp_path / "x.safetensors", SQUARE)[1], weight_of(SQUARE) + b.double() @ a.double())


@pytest.mark.parametrize(
    ("stem", "site"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora", "self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", "self_attn.out_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.v_proj.lora_linear_layer", "self_attn.v_proj"),
        ("text_encoder.encoder.layers.0.self_attn.k_proj.lora_linear_layer", "self_attn.k_proj"),
        ("lora_te.text_model.encoder.layers.0.mlp.fc1.lora", "mlp.fc1"),
        ("clip_l.text_model.encoder.layers.0.mlp.fc2.lora", "mlp.fc2"),
    ],
)
def test_names_in_text_towers(stem: str, site: str, tmp_path: Path) -> None:
    unet, tower = model()
    own = all_sites(unet, [tower])[f"text_encoder.text_model.encoder.layers.0.{site}"]
    a, b = draw(2, own.read().shape[1]), draw(own.read().shape[0], 2)
    save_file({f"{stem}.down.weight": a, f"{stem}.up.weight": b}, tmp_path / "x.safetensors")
    wanted = own.read() + b @ a
    Loras(unet, [tower]).add("x", read_lora(tmp_path / "x.safetensors", unet, [tower]))
    assert torch.allclose(own.read(), wanted, atol=1e-6)


def test_the_projection_of_a_tower(tmp_path: Path) -> None:
    """OneTrainer trains SDXL's text_projection too, which is stored the other way round here."""
    unet, _ = model()
    tower = TextTower(TextConfig(**{**vars(TEXT), "projection": 12}))
    a, b = draw(2, 16), draw(12, 2)
    save_file(
        {"lora_te1_text_projection.lora_down.weight": a, "lora_te1_text_projection.lora_up.weight": b},
        tmp_path / "x.safetensors",
    )
    assert tower.model.text_projection is not None
    wanted = tower.model.text_projection.detach() + (b @ a).T
    Loras(unet, [tower]).add("x", read_lora(tmp_path / "x.safetensors", unet, [tower]))
    assert torch.allclose(tower.model.text_projection, wanted, atol=1e-6)


PEFT = [
    {"r": 4, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 2, "lora_alpha": 3, "use_dora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"attn2.to_q": 2}, "alpha_pattern": {"to_q": 1, "attn2.to_q": 5}},
    {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["conv1", "to_out.0"]},
    {"kind": "LoHaConfig", "r": 4, "alpha": 2, "use_effective_conv2d": True, "target_modules": ["to_q", "conv1"]},
    {"kind": "LoKrConfig", "r": 3, "alpha": 2, "target_modules": ["to_q", "conv1", "fc"]},
    {"kind": "LoKrConfig", "r": 64, "alpha": 16, "target_modules": ["to_q"]},
]


@pytest.mark.parametrize("settings", PEFT, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_of_peft_merges_as_peft_does(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    import peft

    options = {"target_modules": ["to_q", "to_v", "conv1"], "init_lora_weights": False, "use_dora": False} | settings
    kind = options.pop("kind", "LoraConfig")
    if kind != "LoraConfig":
        options["init_weights"] = options.pop("init_lora_weights")
        options.pop("use_dora")
    unet, _ = model()
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(unet, getattr(peft, kind)(**options))  # type: ignore[arg-type]
    for name, p in wrapped.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1 + 0.2 * torch.rand(p.shape))
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(p)
    wrapped.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(model()[0], str(tmp_path))  # type: ignore[arg-type]
    wanted = again.merge_and_unload().state_dict()
    found, tower = model()
    path = tmp_path if what == "folder" else tmp_path / "adapter_model.safetensors"
    Loras(found, [tower]).add("x", read_lora(path, found, [tower]))
    state = found.state_dict()
    plain = model()[0].state_dict()
    assert any((state[k] - plain[k]).abs().max() > 1e-3 for k in state)
    assert all(torch.allclose(state[k], wanted[k], atol=3e-6, rtol=1e-5) for k in state)


def test_a_folder_of_components(tmp_path: Path) -> None:
    """PEFT's DreamBooth example: unet/ and text_encoder/, each an adapter of its own."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    layers = {"unet": SQUARE, "text_encoder": "text_model.encoder.layers.1.self_attn.k_proj"}
    for component, name in layers.items():
        (tmp_path / component).mkdir()
        wide = 8 if component == "unet" else 16
        file = {"lora_A.weight": draw(2, wide), "lora_B.weight": draw(wide, 2)}
        names = {f"base_model.model.{name}.{k}": v for k, v in file.items()}
        save_file(names, tmp_path / component / "adapter_model.safetensors")
        (tmp_path / component / "adapter_config.json").write_text(json.dumps(config))
    unet, tower = model()
    found = read_lora(tmp_path, unet, [tower])
    assert set(found) == {f"{c}.{n}" for c, n in layers.items()}
    assert all(torch.allclose(low.change(), (3.0 * draw(w, 2) @ draw(2, w)).double(), atol=1e-6)
               for low, w in zip(found.values(), (8, 16), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8, "lora_alpha": 8}, "the rank of .* is 8, the file has 2"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not one of"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base's weights too"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True changes what the tensors mean"),
        ({"r": 2, "use_dora": True}, "says DoRA, and .* has no magnitudes"),
    ],
)
def test_settings_that_cannot_be_honoured(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = {
        f"base_model.model.{SQUARE}.lora_A.weight": draw(2, 8),
        f"base_model.model.{SQUARE}.lora_B.weight": draw(8, 2),
    }
    save_file(file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    with pytest.raises(ValueError, match=words):
        merged(tmp_path, SQUARE)


def test_what_two_places_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tensor's alpha counts before the settings beside the file; those count where nothing else tells."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    file = pair(SQUARE)
    save_file(file, tmp_path / "with.safetensors")
    change = product(file, SQUARE)
    assert close(merged(tmp_path / "with.safetensors", SQUARE)[1], weight_of(SQUARE) + change)
    bare = {k: v for k, v in file.items() if not k.endswith("alpha")}
    save_file(bare, tmp_path / "without.safetensors")
    with caplog.at_level(logging.WARNING):
        assert close(merged(tmp_path / "without.safetensors", SQUARE)[1], weight_of(SQUARE) + 8 * change)
    assert "adapter_config.json beside it alone" in caplog.text
    (tmp_path / "alone").mkdir()
    save_file(bare, tmp_path / "alone/x.safetensors", metadata={"ss_network_alpha": "1.0", "ss_network_dim": "2"})
    with caplog.at_level(logging.WARNING):
        assert close(merged(tmp_path / "alone/x.safetensors", SQUARE)[1], weight_of(SQUARE) + 2 * change)
    assert "the header says alpha 1.0 of rank 2, but no tensor does" in caplog.text


def test_the_header_before_the_settings_beside(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    told = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 4}}
    notes = {"lora_adapter_metadata": json.dumps(told)}
    file = {f"unet.{SQUARE}.lora_A.weight": draw(2, 8), f"unet.{SQUARE}.lora_B.weight": draw(8, 2)}
    save_file(file, tmp_path / "pytorch_lora_weights.safetensors", metadata=notes)
    wanted = weight_of(SQUARE) + 2 * (draw(8, 2) @ draw(2, 8)).double()
    assert close(merged(tmp_path / "pytorch_lora_weights.safetensors", SQUARE)[1], wanted)


def test_a_few_unknown_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = pair(SQUARE) | {"lora_unet_surprise.lora_down.weight": draw(2, 4), "something": draw(3)}
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"3 of 5 tensors fit this model; not used: 2 key.*surprise.*--lenient"):
        merged(tmp_path / "x.safetensors", SQUARE)
    with caplog.at_level(logging.WARNING):
        _, after = merged(tmp_path / "x.safetensors", SQUARE, lenient=True)
    assert close(after, weight_of(SQUARE) + product(file, SQUARE))
    assert "lora_unet_surprise" in caplog.text
    assert "something" in caplog.text
    save_file({"something": draw(3)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="none of its 1 tensors fits this model"):
        merged(tmp_path / "y.safetensors", SQUARE, lenient=True)


def test_kinds_that_are_not_known_are_named(tmp_path: Path) -> None:
    save_file(pair(SQUARE) | {f"{kohya(WIDE)}.glora_a": draw(2, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"attn2_to_k\.glora_a"):
        merged(tmp_path / "x.safetensors", SQUARE)
    save_file(pair(SQUARE) | {f"{kohya(WIDE)}.oft_blocks": draw(2, 2, 4, 4)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="BOFT"):
        merged(tmp_path / "y.safetensors", SQUARE)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    file = pair(SQUARE)
    file[f"{kohya(SQUARE)}.lora_up.weight"][0, 0] = torch.nan
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors.*NaN or infinity.*attn1_to_q\.lora_up\.weight"):
        merged(tmp_path / "x.safetensors", SQUARE)


def test_half_and_eighth_precision(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        file = {k: v.to(kind) for k, v in pair(SQUARE).items()}
        save_file(file, tmp_path / "x.safetensors")
        wanted = weight_of(SQUARE) + product({k: v.float() for k, v in file.items()}, SQUARE)
        assert close(merged(tmp_path / "x.safetensors", SQUARE)[1], wanted)


def test_pickled_files(tmp_path: Path) -> None:
    file = pair(SQUARE)
    torch.save({"state_dict": file}, tmp_path / "x.ckpt")
    torch.save(file, tmp_path / "y.pt")
    for name in ("x.ckpt", "y.pt"):
        assert close(merged(tmp_path / name, SQUARE)[1], weight_of(SQUARE) + product(file, SQUARE))


def test_bundled_embeddings(tmp_path: Path) -> None:
    """OneTrainer puts a token's vectors beside the corrections."""
    unet, tower = model()
    rows = {"bundle_emb.<my.dog>.clip_l": draw(2, 16), "bundle_emb.cat.string_to_param.*": draw(1, 16)}
    save_file(pair(SQUARE) | rows, tmp_path / "x.safetensors")
    found = read_adapter(tmp_path / "x.safetensors", unet, [tower])
    assert torch.equal(found.embeddings["<my.dog>"][0], draw(2, 16))
    assert set(found.embeddings) == {"<my.dog>", "cat"}
    save_file(pair(SQUARE) | {"bundle_emb.x.clip_l_out": draw(2, 16)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"bundle_emb\.x\.clip_l_out"):
        read_adapter(tmp_path / "y.safetensors", unet, [tower])


def test_a_run_is_taken_for_its_file(tmp_path: Path) -> None:
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    save_file(pair(SQUARE), export / "pytorch_lora_weights.safetensors")
    unet, tower = model()
    assert set(read_lora(tmp_path / "run", unet, [tower])) == {f"unet.{SQUARE}"}
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="not exported yet"):
        read_lora(tmp_path / "early", unet, [tower])
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file(pair(SQUARE), tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"it holds \['a.safetensors', 'b.safetensors'\]"):
        read_lora(tmp_path / "two", unet, [tower])
    assert load_file(tmp_path / "two/a.safetensors")
    assert isinstance(unet, UNet)
