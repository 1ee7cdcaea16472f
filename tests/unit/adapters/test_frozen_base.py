"""Adapters over stored weights train as over a whole model that has the stored values; nothing is merged into them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.lora import LoraAdapter, LoraConfig, Low
from ldm.adapters.low_rank import row_norms
from ldm.adapters.tokens import NewToken, TokensAdapter, TokensConfig
from ldm.checkpoint import lora_files
from ldm.models.frozen import Stored, held_bytes, store
from ldm.models.text import encode_texts
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.pipeline import TextToImage
from ldm.rng import Rng

torch.set_num_threads(1)
ADAPTERS = {
    "lora": lambda: LoraAdapter(LoraConfig(rank=2, targets=("attention", "convolution", "time"))),
    "lora and text": lambda: LoraAdapter(LoraConfig(rank=2, targets=("attention", "feed_forward"), text=True)),
    "dora": lambda: LoraAdapter(LoraConfig(rank=2, dora=True, targets=("attention", "convolution"))),
    "tokens": lambda: TokensAdapter(TokensConfig(tokens=(NewToken(token="<thing>", initializer=("dog",)),))),
}


@pytest.fixture(scope="module")
def emoji() -> TextToImage:
    return TextToImage.load("emoji")


def copied(pipeline: TextToImage) -> TextToImage:
    other = pipeline.with_network(copy.deepcopy(pipeline.network))
    other.text, other.codec = copy.deepcopy(pipeline.text), copy.deepcopy(pipeline.codec)
    return other


def gradients(pipeline: TextToImage, adapter: Any, half: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradients at corrections that are not zero."""
    torch.manual_seed(0)
    trained: nn.Module = adapter.attach(pipeline.network, pipeline.text)
    for name, p in trained.named_parameters():
        if name.endswith("up"):
            nn.init.normal_(p, std=0.05)
    live = adapter.trains_text
    encode = (lambda texts: encode_texts(pipeline.text, texts)) if live else torch.no_grad()(pipeline.encode_text)
    options = DenoiseOptions(drop=0.0)
    objective = DenoiseObjective(
        trained, pipeline.process, pipeline.codec, encode, options, live=live, below=pipeline.network
    )
    positions = [0, 1]
    caption = ["a red <thing>", "<thing>"] if isinstance(adapter, TokensAdapter) else ["a red dog", "a tree"]
    batch = {
        "moments": Rng.of(1, positions).normal("moments", (8, 16, 16)), "caption": caption, "weight": torch.ones(2),
        "position": positions,
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, _ = objective(batch, Rng.of(3, positions))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("storage", "half"), [("bf16", False), ("int8", False), ("nf4", False), ("nf4", True)])
def test_as_over_the_whole_model_with_the_stored_values(
    storage: Any, half: bool, kind: str, emoji: TextToImage
) -> None:
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    stored, plain = copied(emoji), copied(emoji)
    for part in (stored.network, *stored.text):
        store(part, storage)
    plain.network.load_state_dict(stored.network.state_dict(), strict=True)
    for one, other in zip(plain.text, stored.text, strict=True):
        one.load_state_dict(other.state_dict(), strict=True)
    found, of_found = gradients(stored, ADAPTERS[kind](), half)
    whole, of_whole = gradients(plain, ADAPTERS[kind](), half)
    assert found == pytest.approx(whole, rel=2e-2 if half else 1e-5)
    assert set(of_found) == set(of_whole)
    for name, gradient in of_whole.items() if not half else ():
        assert (of_found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    total = sum(gradient.square().sum() for gradient in of_whole.values())
    wrong = sum((of_found[name] - gradient).square().sum() for name, gradient in of_whole.items())
    assert wrong <= (0.03 if half else 1e-4) ** 2 * total


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_dora_starts_as_the_stored_model(storage: Any, emoji: TextToImage) -> None:
    """Its magnitudes are the norms of what is stored, so that before the first step nothing is corrected."""
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    pipeline = copied(emoji)
    store(pipeline.network, storage)
    network = pipeline.network
    args = torch.randn(2, 4, 16, 16), torch.tensor([7, 500]), emoji.encode_text(["a dog", "a tree"])
    before = network(*args)
    net = LoraAdapter(LoraConfig(rank=2, dora=True)).attach(network, [])
    layers = [layer for layer in net.layers.values() if isinstance(layer, Low)]
    assert any(isinstance(layer._site.module, Stored) for layer in layers)
    for layer in layers:
        assert layer.magnitude is not None
        assert torch.equal(layer.magnitude, row_norms(layer._site.read()))
    torch.testing.assert_close(net(*args), before, rtol=1e-5, atol=1e-5)


def test_a_lora_is_not_merged_into_stored_weights(tmp_path: Path, emoji: TextToImage) -> None:
    """It would be lost in a copy; into the base as it is it goes."""
    pipeline = copied(emoji)
    adapter = LoraAdapter(LoraConfig(rank=2, targets=("attn2.to_k",)))
    net = adapter.attach(pipeline.network, [])
    lora = adapter.lora(dict(net.named_parameters()))
    net.detach()
    path = tmp_path / "a.safetensors"
    lora_files.write_lora(path, lora, pipeline.network.config)
    store(pipeline.network, "int8")
    before = held_bytes(pipeline.network)
    for _ in range(2):  # the first has left nothing behind
        with pytest.raises(ValueError, match=r"nothing can be merged into unet\..*attn2\.to_k, whose weight is stored"):
            pipeline.load_lora(path)
    assert held_bytes(pipeline.network) == before
    copied(emoji).load_lora(path)
