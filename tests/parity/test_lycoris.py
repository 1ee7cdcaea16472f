"""LoHa, LoKr and OFT: LyCORIS and PEFT with the same weights change outputs and weights as here, files both ways."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters.layers import split
from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet
from ldm.adapters.low_rank import Loras
from ldm.adapters.sites import all_sites
from ldm.checkpoint.lora_files import read_lora
from ldm.checkpoint.lycoris_files import write_lycoris, write_peft
from tests.unit.adapters.test_lora import EVERY, filled, inputs, model, weights

torch.set_num_threads(1)
CONFIGS = {
    "loha": LoraConfig(algo="loha", rank=3, alpha=2.0, targets=EVERY),
    "loha dora": LoraConfig(algo="loha", rank=3, alpha=2.0, targets=EVERY, dora=True),
    "lokr": LoraConfig(algo="lokr", rank=2, alpha=3.0, targets=EVERY),
    "lokr factor": LoraConfig(algo="lokr", rank=1, alpha=0.5, factor=2, targets=EVERY),
    "lokr both": LoraConfig(algo="lokr", rank=1, alpha=0.5, decompose_both=True, targets=EVERY),
    "lokr full": LoraConfig(algo="lokr", rank=4, alpha=2.0, full_matrix=True, targets=EVERY),
    "oft": LoraConfig(algo="oft", rank=4, targets=EVERY),
    "oft bound": LoraConfig(algo="oft", rank=4, constraint=0.01, targets=EVERY),
}
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "up_blocks.0.resnets.0.conv1"


def trained(config: LoraConfig) -> tuple[LoraNet, LoraAdapter]:
    unet, tower = model()
    adapter = LoraAdapter(config)
    return filled(adapter.attach(unet, [tower])), adapter


def file_of(config: LoraConfig, path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """What the trained net answers, and its file's tensors."""
    net, adapter = trained(config)
    unet, tower = model()
    write_lycoris(path, adapter.corrections(weights(net)), unet.config, sites=all_sites(unet, [tower]))
    net.eval()
    return net(*inputs()).detach(), load_file(path)


def their_module(name: str, layer: nn.Module, tensors: dict[str, Tensor]) -> Any:
    from lycoris.modules import get_module, make_module

    kind: Any
    kind, parts = get_module(tensors, name)
    return make_module(kind, parts, name, layer)


def _instead(module: Any, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return module(args[0])


def test_lengths_are_split_as_lycoris_does_it() -> None:
    from lycoris.functional.general import factorization

    for length in range(1, 400):
        for factor in (-1, 1, 2, 4, 5, 8, 16, 64):
            assert split(length, factor) == factorization(length, factor), (length, factor)


@pytest.mark.parametrize("name", CONFIGS)
def test_lycoris_reads_the_file_as_what_was_trained(name: str, tmp_path: Path) -> None:
    """Its modules of our file, put on the same U-Net, give our trained output; merged here it is that too.

    Its forward is what it trains with; its `get_diff_weight` of 4.1.3 has the scale of LoHa and LoKr squared.
    """
    answer, tensors = file_of(CONFIGS[name], tmp_path / "x.safetensors")
    unet, tower = model()
    with torch.no_grad():
        changed = 0
        for layer_name, layer in list(unet.named_modules()):
            key = "lora_unet_" + layer_name.replace(".", "_")
            if isinstance(layer, nn.Linear | nn.Conv2d) and any(k.startswith(f"{key}.") for k in tensors):
                made = their_module(key, layer, tensors)
                made.org_forward = type(layer).forward.__get__(layer)  # q, k and v are one product without hooks
                layer.register_forward_hook(partial(_instead, made.eval()))
                changed += 1
        assert changed == len({k.partition(".")[0] for k in tensors})
        assert not torch.allclose(model()[0](*inputs()), answer, atol=1e-3)
        assert torch.allclose(unet(*inputs()), answer, atol=2e-5)
        ours, _ = model()
        Loras(ours, [tower]).add("x", read_lora(tmp_path / "x.safetensors", ours, [tower]))
        assert torch.allclose(ours(*inputs()), answer, atol=2e-5)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", ["loha", "lokr", "diag-oft"])
@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_a_layer_of_lycoris_is_read_to_one_in_a_million(kind: str, layer: str, tucker: bool, tmp_path: Path) -> None:
    from lycoris import DiagOFTModule, LohaModule, LokrModule

    unet, tower = model()
    module: Any
    key, module = "lora_unet_" + layer.replace(".", "_"), unet.get_submodule(layer)
    cls = {"loha": LohaModule, "lokr": LokrModule, "diag-oft": DiagOFTModule}[kind]
    more = {"constraint": 0.02, "rescaled": True} if kind == "diag-oft" else {"alpha": 3.0}
    theirs = cls(key, module, 1.0, lora_dim=2, use_tucker=tucker, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        x = torch.randn(2, module.weight.shape[1], *[5] * (module.weight.ndim - 2), generator=generator)
        wanted = theirs.eval()(x) - module(x)
    state = {f"{key}.{k}": v.contiguous() for k, v in theirs.state_dict().items() if not k.startswith("org_module")}
    save_file(state, tmp_path / "x.safetensors")
    (found,) = read_lora(tmp_path / "x.safetensors", unet, [tower]).values()
    delta = found.delta(module.weight.detach()).float()
    given = nn.functional.conv2d(x, delta, padding=1) if delta.ndim == 4 else nn.functional.linear(x, delta)
    assert wanted.abs().max() > 1e-2
    assert torch.allclose(given, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "oft exact", "oft shared"])
def test_peft_reads_and_writes_the_same_adapter(kind: str, tmp_path: Path) -> None:
    """Its adapter, saved, is merged here to its output; written again from here, it reads the same."""
    import peft

    linear = ["to_q", "to_k", "ff.net.2"] if "oft" in kind else ["to_q", "to_k", "ff.net.2", "conv1", "proj_in"]
    settings: dict[str, Any] = {"target_modules": linear, "init_weights": False}
    config = {
        "loha": lambda: peft.LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, **settings),
        "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, **settings),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=True, **settings),
        "oft exact": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **settings),
        "oft shared": lambda: peft.OFTConfig(oft_block_size=4, block_share=True, **settings),
    }[kind]()
    torch.manual_seed(3)
    unet, tower = model()
    theirs = peft.get_peft_model(unet, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        answer = theirs(*inputs())
        assert not torch.allclose(model()[0](*inputs()), answer, atol=2e-4)
        theirs.save_pretrained(tmp_path / "unet")
        for round in range(2):
            ours, _ = model()
            found = read_lora(tmp_path if round == 0 else tmp_path / "again", ours, [tower])
            Loras(ours, [tower]).add("x", found)
            assert torch.allclose(ours(*inputs()), answer, atol=2e-5), round
            write_peft(tmp_path / "again", found)
        again, _ = model()
        read = peft.PeftModel.from_pretrained(again, tmp_path / "again" / "unet").eval()  # type: ignore[arg-type]
        assert torch.allclose(read(*inputs()), answer, atol=2e-5)


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_peft_reads_what_was_trained_here(algo: Any, tmp_path: Path) -> None:
    import peft

    net, adapter = trained(LoraConfig(algo=algo, rank=2, alpha=3.0, targets=("attention", "convolution")))
    write_peft(tmp_path, adapter.corrections(weights(net)))
    other, _ = model()
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "unet").eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(theirs(*inputs()), net.eval()(*inputs()), atol=2e-5)
