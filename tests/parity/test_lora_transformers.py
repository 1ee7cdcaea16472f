"""LoRA files of FLUX.1 and SD3 in the names of many tools: what diffusers makes of them is what we do.

diffusers converts FLUX.1's names; for SD3's authors' names, which its LoRA reader does not know, the oracle is its
conversion of single files: the file's change added to the authors' weights, and these converted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.adapters.corrections import Correction
from ldm.adapters.low_rank import Loras, LowRank
from ldm.checkpoint.lora_files import read_lora
from ldm.models.network import Network
from ldm.models.networks import diffusers_keys
from ldm.models.transformers import presets
from ldm.models.transformers.flux import FluxTransformer
from ldm.models.transformers.sd3 import SD3Transformer
from tests.parity.test_transformers import deviation, randomized

torch.set_num_threads(1)
State = dict[str, Tensor]
WIDTH = 3072


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def flux_layers(width: int, text: int = 4096, pooled: int = 768) -> dict[str, tuple[int, int]]:
    """(out, in) of the authors' layers of the first two double blocks and single blocks and of the ends, as BFL's."""
    found = {}
    for i in range(2):
        for s in ("img", "txt"):
            found |= {
                f"double_blocks.{i}.{s}_attn.qkv": (3 * width, width),
                f"double_blocks.{i}.{s}_attn.proj": (width, width),
                f"double_blocks.{i}.{s}_mlp.0": (4 * width, width),
                f"double_blocks.{i}.{s}_mlp.2": (width, 4 * width),
                f"double_blocks.{i}.{s}_mod.lin": (6 * width, width),
            }
        found |= {
            f"single_blocks.{i}.linear1": (7 * width, width),
            f"single_blocks.{i}.linear2": (width, 5 * width),
            f"single_blocks.{i}.modulation.lin": (3 * width, width),
        }
    for name, into in (("time_in", 256), ("vector_in", pooled), ("guidance_in", 256)):
        found |= {f"{name}.in_layer": (width, into), f"{name}.out_layer": (width, width)}
    return found | {
        "img_in": (width, 64),
        "txt_in": (width, text),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }


def kohya(layers: dict[str, tuple[int, int]], alpha: float | None = 1.5, rank: int = 2) -> State:
    """sd-scripts' tensors for these layers; those of fused layers are blocks in half of them, as `split_qkv` writes."""
    file = {}
    for seed, (name, (out, into)) in enumerate(layers.items()):
        key = "lora_unet_" + name.replace(".", "_")
        up, down = draw(out, rank, seed=seed), draw(rank, into, seed=seed)
        count = 3 if name.endswith("qkv") else 4 if name.endswith("linear1") else 1
        if count > 1 and ".1." in name:
            width = out // 3 if count == 3 else out // 7
            sizes = [width] * 3 if count == 3 else [width] * 3 + [4 * width]
            up = torch.block_diag(*[draw(n, rank, seed=seed + k) for k, n in enumerate(sizes)])
            down = draw(count * rank, into, seed=seed)
        file |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if alpha is not None:
            file[f"{key}.alpha"] = torch.tensor(alpha)
    return file


def same_changes(ours: dict[str, Correction], theirs: State) -> None:
    """Against diffusers' lora_A and lora_B, applied to a random vector: the widths are real."""
    names = {k.removesuffix(".lora_A.weight") for k in theirs if k.endswith(".lora_A.weight")}
    assert {n for n in ours if not n.endswith(".bias")} == names
    for name in names:
        low = ours[name]
        assert isinstance(low, LowRank)
        a, b = theirs[f"{name}.lora_A.weight"].double(), theirs[f"{name}.lora_B.weight"].double()
        x = draw(a.shape[1], seed=5).double()
        wanted = b @ (a @ x)
        assert (low.scale * (low.up.double() @ (low.down.double() @ x)) - wanted).norm() < 1e-6 * wanted.norm(), name


@pytest.fixture(scope="module")
def dev() -> Network:
    """FLUX.1 dev's shapes with two blocks of each kind, without memory."""
    with torch.device("meta"):
        return FluxTransformer(replace(presets.FLUX_DEV, num_layers=2, num_single_layers=2))


def read(tmp_path: Path, file: State, network: Network, **options: Any) -> dict[str, Correction]:
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "x.safetensors", metadata=options)
    return read_lora(tmp_path / "x.safetensors", network, [])


@pytest.mark.parametrize("alpha", [1.5, None])
def test_flux_kohya(dev: Network, alpha: float | None, tmp_path: Path) -> None:
    """sd-scripts' names at the real width; the ends have alphas of their rank, which diffusers does not read."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert

    file = kohya(flux_layers(WIDTH), alpha)
    for key in [k for k in file if "final_layer" in k and k.endswith("alpha")]:
        file[key] = torch.tensor(2.0)
    theirs = convert(dict(file))
    theirs = {k if k.startswith("transformer.") else f"transformer.{k}": v for k, v in theirs.items()}
    found = read(tmp_path, file, dev)
    same_changes(found, theirs)
    sparse = found["transformer.single_transformer_blocks.1.proj_mlp"]
    assert isinstance(sparse, LowRank)
    assert sparse.rank == 2  # of the 8 in the file


def xlabs() -> State:
    file = {}
    for i in range(2):
        for k in "12":
            start = f"double_blocks.{i}.processor."
            file[f"{start}qkv_lora{k}.down.weight"] = draw(4, WIDTH, seed=i)
            file[f"{start}qkv_lora{k}.up.weight"] = draw(3 * WIDTH, 4, seed=i + 1)
            file[f"{start}proj_lora{k}.down.weight"] = draw(4, WIDTH, seed=i + 2)
            file[f"{start}proj_lora{k}.up.weight"] = draw(WIDTH, 4, seed=i + 3)
        start = f"single_blocks.{i}.processor."
        file[f"{start}qkv_lora.down.weight"] = draw(4, WIDTH, seed=i + 4)
        file[f"{start}qkv_lora.up.weight"] = draw(3 * WIDTH, 4, seed=i + 5)
        file[f"{start}proj_lora.down.weight"] = draw(4, 5 * WIDTH, seed=i + 6)
        file[f"{start}proj_lora.up.weight"] = draw(WIDTH, 4, seed=i + 7)
    return file


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_flux_xlabs(dev: Network, prefix: str, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers as convert

    file = {prefix + k: v for k, v in xlabs().items()}
    same_changes(read(tmp_path, file, dev), convert(dict(file)))


def onetrainer() -> State:
    """Attention's names alone: diffusers' own reader drops the ends of others, such as `ff_net_0_proj`."""
    file = {}
    blocks = [f"transformer_blocks_{i}_attn_{n}" for i in range(2) for n in
              ("to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]  # fmt: skip
    blocks += [f"single_transformer_blocks_{i}_attn_{n}" for i in range(2) for n in ("to_q", "to_k", "to_v")]
    for seed, name in enumerate(blocks):
        key = f"lora_transformer_{name}"
        file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"] = draw(2, WIDTH, seed=seed), draw(WIDTH, 2)
        file[f"{key}.alpha"] = torch.tensor(0.5)
    return file


def test_flux_onetrainer(dev: Network, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert

    same_changes(read(tmp_path, onetrainer(), dev), convert(onetrainer()))


@pytest.mark.slow
def test_flux_control_lora(tmp_path: Path) -> None:
    """BFL's own: all layers under their names, biases of lora_B; img_in is as wide as the model's.

    diffusers 0.42 swaps the halves of norm_out's lora_A too, which are ranks: there its product is another one.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers as convert

    with torch.device("meta"):
        network = FluxTransformer(presets.FLUX_DEV)
    file, two = {}, flux_layers(WIDTH)
    counts = {"double_blocks": 19, "single_blocks": 38}
    names = {n: s for n, s in two.items() if "_blocks" not in n}
    for kind, count in counts.items():
        for n, s in two.items():
            if n.startswith(f"{kind}.0."):
                names |= {n.replace(".0.", f".{i}.", 1): s for i in range(count)}
    for seed, (name, (out, into)) in enumerate(names.items()):
        file |= {f"{name}.lora_A.weight": draw(2, into, seed=seed), f"{name}.lora_B.weight": draw(out, 2, seed=seed)}
        file[f"{name}.lora_B.bias"] = draw(out, seed=seed)
    plain = dict(file)
    for i in range(19):
        norms = [f"double_blocks.{i}.{s}_attn.norm.{n}_norm.scale" for s in ("img", "txt") for n in ("query", "key")]
        plain |= {n: draw(128) for n in norms}
    plain |= {f"single_blocks.{i}.norm.{n}_norm.scale": draw(128) for i in range(38) for n in ("query", "key")}
    theirs, ours = convert(plain), read(tmp_path, file, network)
    key = "transformer.norm_out.linear.lora_A.weight"
    theirs[key] = theirs[key].flip(0)
    same_changes(ours, {k: v for k, v in theirs.items() if ".lora_" in k and not k.endswith(".bias")})
    for key, value in theirs.items():
        if key.endswith(".lora_B.bias"):
            bias = ours[key.replace(".lora_B.bias", ".bias")]
            assert torch.allclose(bias.change().float(), value)


def flux_pair() -> tuple[FluxTransformer, Any, Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]]:
    """A small FLUX.1 here and inside diffusers' pipeline, and what both answer."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    config = replace(presets.FLUX_TINY, out_channels=None)
    theirs = randomized(FluxTransformer2DModel(**diffusers_keys(config)), torch.float32)
    ours = FluxTransformer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pipe = FluxPipeline(None, None, None, None, None, None, theirs)
    x, text, pooled = draw(1, 4, 8, 6), draw(1, 5, 20), draw(1, 12)
    t, guidance = torch.tensor([600.0]), torch.tensor([3.5])
    ids = FluxPipeline._prepare_latent_image_ids(1, 4, 3, torch.device("cpu"), torch.float32)

    def their(net: Any) -> Tensor:
        tokens = FluxPipeline._pack_latents(x, 1, 4, 8, 6)
        out = net(tokens, text, pooled, t / 1000, ids, torch.zeros(5, 3), guidance).sample
        return FluxPipeline._unpack_latents(out, 64, 48, 8)

    def our(net: nn.Module) -> Tensor:
        return net(x, t, {"text": text, "pooled": pooled, "guidance": guidance})

    return ours, pipe, our, their


def both_answer(path: Path, network: Network, pipe: Any, our: Any, their: Any) -> None:
    """The same with a file, at another weight, and the plain answer to the bit after it is taken out."""
    with torch.no_grad():
        plain = our(network)
        assert deviation(plain, their(pipe.transformer)) < 1e-5
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        loras = Loras(network, [])
        loras.add("x", read_lora(path, network, []))
        assert deviation(our(network), plain) > 0.01
        assert deviation(our(network), their(pipe.transformer)) < 1e-5
        loras.set({"x": 0.4})
        pipe.set_adapters(pipe.get_active_adapters(), 0.4)
        assert deviation(our(network), their(pipe.transformer)) < 1e-5
        loras.remove()
        assert torch.equal(our(network), plain)


@pytest.mark.parametrize("form", ["kohya", "xlabs", "diffusers"])
def test_flux_pipeline_with_a_file(form: str, tmp_path: Path) -> None:
    """Without single blocks' linear1 and the embeddings, where diffusers knows the real width alone, or drops keys."""
    network, pipe, our, their = flux_pair()
    if form == "kohya":
        layers = {n: s for n, s in flux_layers(32, 20, 12).items() if "blocks" in n and "linear1" not in n}
        file = {k: 0.2 * v if v.ndim else v for k, v in kohya(layers).items()}
    elif form == "xlabs":
        shapes = {k: (v.shape[0] * 32 // WIDTH or 4, v.shape[1] * 32 // WIDTH or 4) for k, v in xlabs().items()}
        file = {k: 0.2 * draw(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    else:
        file = {}
        for seed, (name, module) in enumerate(pipe.transformer.named_modules()):
            if isinstance(module, nn.Linear):
                rank = 2 + seed % 3
                file[f"transformer.{name}.lora_A.weight"] = 0.2 * draw(rank, module.in_features, seed=seed)
                file[f"transformer.{name}.lora_B.weight"] = 0.2 * draw(module.out_features, rank, seed=seed)
                file[f"transformer.{name}.alpha"] = torch.tensor(1.5)  # as TheLastBen's files have them
    save_file(file, tmp_path / "x.safetensors")
    both_answer(tmp_path / "x.safetensors", network, pipe, our, their)


def test_sd3_pipeline_with_a_file_of_its_script(tmp_path: Path) -> None:
    """PEFT's layers put on the pipeline's transformer, saved by `save_lora_weights` with the settings in the header."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    config = presets.SD3_TINY
    made = [randomized(SD3Transformer2DModel(**diffusers_keys(config)), torch.float32) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    network = SD3Transformer(config)
    network.load_state_dict(made[0].state_dict(), strict=True)
    targets = [n for n, m in made[1].named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    made[1].add_adapter(PeftConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, p in made[1].named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape)
    layers, notes = get_peft_model_state_dict(made[1]), _collate_lora_metadata({"transformer": made[1]})
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **notes)
    pipe = StableDiffusion3Pipeline(made[0], None, None, None, None, None, None, None, None)
    x, text, pooled, t = draw(1, 4, 8, 6), draw(1, 5, 20), draw(1, 12), torch.tensor([600.0])
    both_answer(
        tmp_path / "pytorch_lora_weights.safetensors", network, pipe,
        lambda net: net(x, t, {"text": text, "pooled": pooled}), lambda net: net(x, text, pooled, t).sample,
    )  # fmt: skip


def sd3_authors(width: int, layers: int, dual: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the authors' weights, as the published single files have them (mmdit's modules)."""
    linear = {
        "x_embedder.proj": (width, 4, 2, 2),
        "context_embedder": (width, 20),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 12),
        "y_embedder.mlp.2": (width, width),
        "final_layer.linear": (16, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(layers):
        for side in ("x_block", "context_block"):
            start, last = f"joint_blocks.{i}.{side}.", side == "context_block" and i == layers - 1
            linear[f"{start}attn.qkv"] = (3 * width, width)
            parts = 2 if last else 9 if side == "x_block" and i in dual else 6
            linear[f"{start}adaLN_modulation.1"] = (parts * width, width)
            if not last:
                linear |= {f"{start}attn.proj": (width, width), f"{start}mlp.fc1": (4 * width, width)}
                linear[f"{start}mlp.fc2"] = (width, 4 * width)
            if side == "x_block" and i in dual:
                linear |= {f"{start}attn2.qkv": (3 * width, width), f"{start}attn2.proj": (width, width)}
    return linear


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_sd3_authors_names(form: str, tmp_path: Path) -> None:
    """Every layer of the authors' at once, against diffusers' conversion of the weights with the change in them."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    config, width = presets.SD3_TINY, 32
    shapes = sd3_authors(width, 3, (0, 1))
    weights: State = {"pos_embed": draw(1, 144, width)}
    for name, shape in shapes.items():
        weights |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    for i in range(3):
        sides = ["x_block.attn", "context_block.attn", *(["x_block.attn2"] if i < 2 else [])]
        weights |= {f"joint_blocks.{i}.{s}.ln_{n}.weight": draw(8) for s in sides for n in "qk"}
    file, changed = {}, dict(weights)
    for seed, (name, shape) in enumerate(shapes.items()):
        up, down = draw(shape[0], 3, seed=seed), draw(3, *shape[1:], seed=seed)
        key = f"lora_unet_{name.replace('.', '_')}" if form == "kohya" else f"diffusion_model.{name}"
        ends = ("lora_up", "lora_down") if form == "kohya" else ("lora_B", "lora_A")
        file[f"{key}.{ends[0]}.weight"] = up.view(*up.shape, *[1] * (len(shape) - 2))
        file |= {f"{key}.{ends[1]}.weight": down, f"{key}.alpha": torch.tensor(2.0)}
        changed[f"{name}.weight"] = weights[f"{name}.weight"] + 2 / 3 * (up @ down.flatten(1)).view(shape)
    network = SD3Transformer(config)
    network.load_state_dict(convert(dict(weights)), strict=True)
    Loras(network, []).add("x", read(tmp_path, file, network))
    for name, value in convert(dict(changed)).items():
        assert torch.allclose(network.state_dict()[name], value, atol=1e-5), name
