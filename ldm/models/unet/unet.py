"""Text-conditional U-Net (Rombach et al. 2022, arXiv 2112.10752) with diffusers' parameter names and config keys.

Legend: B batch, C channels, H, W latent pixels, T tokens, D width of the text, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ldm.models.layers import (
    Downsample,
    Embedding,
    NormSiLU,
    ResnetBlock,
    Upsample,
    repeated,
    sinusoid,
)
from ldm.models.network import Granularity, Looks, Network, granularity
from ldm.models.unet.config import DOWN, MID, UP, UNetConfig
from ldm.models.unet.transformer import Attention, Transformer2D
from ldm.types import Cond


class Stage(nn.Module):
    """Resnets of one resolution, each followed by a transformer where there is cross-attention, and a resampling."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        inputs: list[int],
        *,
        attend: bool,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.resnets = nn.ModuleList(_resnet(config, cin, width) for cin in inputs)
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in inputs) if attend else None
        self.downsamplers = nn.ModuleList([Downsample(width, symmetric=True)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if up else None

    def step(self, index: int, x: Tensor, time: Tensor, text: Tensor, kv: Tensor | None) -> Tensor:
        """Resnet number `index`, and its transformer."""
        x = self.resnets[index](x, time)
        return x if self.attentions is None else self.attentions[index](x, text, kv)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules in the order in which they run."""
        for i, resnet in enumerate(self.resnets):
            yield f"resnets.{i}", resnet
            if self.attentions is not None:
                yield f"attentions.{i}", self.attentions[i]
        for name, samplers in (("downsamplers", self.downsamplers), ("upsamplers", self.upsamplers)):
            yield from ((f"{name}.{i}", module) for i, module in enumerate(samplers or ()))


class Middle(nn.Module):
    """resnet, transformer, resnet at the coarsest resolution; or one resnet."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, attend = config.block_out_channels[-1], config.mid_block_type == MID[0]
        self.attentions = nn.ModuleList([_transformer(config, config.levels - 1)] if attend else [])
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(1 + attend))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, kv: Tensor | None) -> Tensor:
        x = self.resnets[0](x, time)
        for attend, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = attend(x, text, kv)
            x = resnet(x, repeated(time, len(x)))
        return x

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules in the order in which they run."""
        for i, resnet in enumerate(self.resnets):
            yield f"resnets.{i}", resnet
            if i < len(self.attentions):
                yield f"attentions.{i}", self.attentions[i]


def _resnet(config: UNetConfig, cin: int, cout: int) -> ResnetBlock:
    return ResnetBlock(
        cin,
        cout,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        time=config.time_width,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        dropout=config.dropout,
    )


def _transformer(config: UNetConfig, level: int) -> Transformer2D:
    return Transformer2D(
        config.block_out_channels[level],
        heads=config.heads[level],
        depth=config.per_level("transformer_layers_per_block")[level],
        text=config.per_level("cross_attention_dim")[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        dropout=config.dropout,
    )


def _down_stages(config: UNetConfig) -> nn.ModuleList:
    widths, layers = config.block_out_channels, config.per_level("layers_per_block")
    stages = nn.ModuleList()
    for i, kind in enumerate(config.down_block_types):
        inputs = [widths[max(i - 1, 0)]] + [widths[i]] * (layers[i] - 1)
        stages.append(Stage(config, i, inputs, attend=kind == DOWN[0], down=i < config.levels - 1))
    return stages


def _up_stages(config: UNetConfig) -> nn.ModuleList:
    """Each resnet takes the channels before it and those of one skip connection, the last ones first."""
    widths, layers = config.block_out_channels, config.per_level("layers_per_block")
    skips = [widths[0]]
    for i, count in enumerate(layers):
        skips += [widths[i]] * (count + (i < config.levels - 1))
    stages, before = nn.ModuleList(), widths[-1]
    for kind, i in zip(config.up_block_types, reversed(range(config.levels)), strict=True):
        inputs = []
        for _ in range(layers[i] + 1):
            inputs.append(before + skips.pop())
            before = widths[i]
        stages.append(Stage(config, i, inputs, attend=kind == UP[0], up=i > 0))
    return stages


class UNet(Network):
    """Noisy latents, times and conditioning -> the raw prediction."""

    title = "U-Net"
    component = "unet"
    compiled_sizes: ClassVar[bool | None] = True  # equal blocks run at several levels

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config: UNetConfig = config
        self.in_channels, self.out_channels, self.needs = config.in_channels, config.out_channels, _needs(config)
        widths, time = config.block_out_channels, config.time_width
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time, extra=config.time_cond_proj_dim)
        self.class_embedding = _class_embedding(config)
        extra = config.projection_class_embeddings_input_dim
        self.add_embedding = Embedding(extra, time) if config.addition_embed_type and extra else None
        self.down_blocks = _down_stages(config)
        self.mid_block = Middle(config)
        self.up_blocks = _up_stages(config)
        self.conv_norm_out = NormSiLU(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.recompute = False
        self.compiled_widths = _one_count_of_heads(self.transformers())
        self._kv_widths = [2 * m.channels * len(m.transformer_blocks) for m in self.transformers()]
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Residual branches and the output start at zero (Dhariwal & Nichol 2021)."""
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)  # type: ignore[arg-type]
            elif isinstance(module, Transformer2D):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W) at times t (B,) or (1,) -> (B, C', H, W).

        `cond`: "text" (B, T, D), or "kv" that `keys_values` made of it; "concat" (B, C'', H, W), added to the channels;
        "class" (B,) or (B, P); "pooled" (B, P) with "time_ids" (B, 6); "guidance" (B,), the w of w-conditioned models,
        which is the guidance scale - 1. "copies" (n, 0) tells that x, t and all but the text are n times the same rows,
        as guidance has them: they are computed once up to the first cross-attention.
        """
        rows = x.shape[0]
        x, skips, time, text, known = self._halfway(x, t, cond)
        for number, stage in enumerate(cast("Iterable[Stage]", self.up_blocks)):
            for i in range(len(stage.resnets)):
                kv = None if stage.attentions is None else next(known)
                x = torch.cat([x, repeated(skips.pop(), len(x))], dim=1)
                x = self._step(stage, i, x, repeated(time, len(x)), text, kv)
            self.pass_by(f"up_blocks.{number}", x)
            if stage.upsamplers is not None:
                h, w = skips[-1].shape[2:]
                even = (h, w) == (2 * x.shape[2], 2 * x.shape[3])
                x = stage.upsamplers[0](x, None if even else (h, w))
        return repeated(self.conv_norm_out.before(self.conv_out, x), rows)

    def middle(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What `forward` has in its middle, (B, C, h, w): features for a classifier; the second half does not run."""
        return repeated(self._halfway(x, t, cond)[0], x.shape[0])

    def _halfway(
        self, x: Tensor, t: Tensor, cond: Cond
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Iterator[Tensor | None]]:
        """(middle features, skips, activated time embedding, text, what is known of the rest's keys and values)."""
        if "copies" in cond:
            x, t, cond = _once(x, t, cond)
        if "concat" in cond:
            x = torch.cat([x, cond["concat"].to(x.dtype)], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"the U-Net takes {self.config.in_channels} channels, got {x.shape[1]} (with concat)")
        x = x.to(self._dtype)
        text = cond["text"].to(x.dtype) if "text" in cond else x.new_zeros(0)
        known = iter(cond["kv"].split(self._kv_widths, dim=-1) if "kv" in cond else [None] * len(self._kv_widths))
        time = nn.functional.silu(self.time(t, cond, len(x), x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for number, stage in enumerate(cast("Iterable[Stage]", self.down_blocks)):
            for i in range(len(stage.resnets)):
                kv = None if stage.attentions is None else next(known)
                x = self._step(stage, i, x, repeated(time, len(x)), text, kv)
                skips.append(x)
            self.pass_by(f"down_blocks.{number}", x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        kv = next(known) if len(self.mid_block.attentions) else None
        x = self._across(x, repeated(time, len(x)), text, kv)
        self.pass_by("mid_block", x)
        return x, skips, time, text, known

    def _step(self, stage: Stage, index: int, x: Tensor, time: Tensor, text: Tensor, kv: Tensor | None) -> Tensor:
        if not self._one_by_one:
            return self._run(stage.step, index, x, time, text, kv)
        x = self._run(stage.resnets[index], x, time)
        return x if stage.attentions is None else self._run(stage.attentions[index], x, text, kv)

    def _across(self, x: Tensor, time: Tensor, text: Tensor, kv: Tensor | None) -> Tensor:
        """The middle."""
        if not self._one_by_one:
            return self._run(self.mid_block, x, time, text, kv)
        first, *rest = self.mid_block.resnets
        x = self._run(first, x, time)
        for attend, resnet in zip(self.mid_block.attentions, rest, strict=True):
            x = self._run(attend, x, text, kv)
            x = self._run(resnet, x, repeated(time, len(x)))
        return x

    @property
    def _one_by_one(self) -> bool:
        """Blocks that come and go are computed again each by itself, so that one alone is there for it."""
        return self.recompute and self.streaming is not None

    def transformers(self) -> list[Transformer2D]:
        """In the order in which they run."""
        stages = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [m for stage in stages for m in stage.modules() if isinstance(m, Transformer2D)]

    def keys_values(self, text: Tensor) -> Tensor:
        """cond "kv" (B, T, ...) for text (B, T, D): what every cross-attention makes of it, once for many calls.

        The values are those that the layers compute themselves; it may stand in for "text" wherever rows of a batch are
        joined or chosen.
        """
        text = text.to(self._dtype)
        found = []
        for layer in self.transformers():
            self.fetch(layer)
            found.append(layer.keys_values(text))
        return torch.cat(found, dim=-1)

    def prepared(self, cond: Cond) -> Cond:
        """With "kv", all keys and values of the cross-attentions, in place of "text"."""
        if "text" not in cond or not self._kv_widths:
            return cond
        return {k: v for k, v in cond.items() if k != "text"} | {"kv": self.keys_values(cond["text"])}

    def prepared_numbers(self, rows: int, tokens: int) -> int:
        return rows * tokens * sum(self._kv_widths)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Resnets, transformers and resamplings."""
        stages = [(f"down_blocks.{i}", stage) for i, stage in enumerate(self.down_blocks)]
        stages += [("mid_block", self.mid_block)]
        stages += [(f"up_blocks.{i}", stage) for i, stage in enumerate(self.up_blocks)]
        for prefix, stage in cast("list[tuple[str, Stage | Middle]]", stages):
            yield from ((f"{prefix}.{name}", module) for name, module in stage.layers())

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """Transformer blocks: of SDXL's 70 there are two kinds, while most of its resnets are there once."""
        yield from (block for layer in self.transformers() for block in layer.transformer_blocks)

    def attention_layers(self) -> Iterator[tuple[str, nn.Module, Looks]]:
        """ "...attn1" on the picture itself, "...attn2" on the text."""
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                yield name, module, "cross" if name.endswith("attn2") else "own"

    def correctable(self) -> Iterator[tuple[str, nn.Module, str]]:
        """All linear layers and convolutions."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                yield name, module, _group(name)

    def places(self) -> dict[str, int]:
        """After the last layer of each resolution, before it is resampled, and of the middle."""
        widths = self.config.block_out_channels
        down = {f"down_blocks.{i}": width for i, width in enumerate(widths)}
        return down | {"mid_block": widths[-1]} | {f"up_blocks.{i}": width for i, width in enumerate(widths[::-1])}

    @property
    def usual_place(self) -> str:
        return "mid_block"

    @property
    def middle_channels(self) -> int:
        return self.config.block_out_channels[-1]

    @property
    def middle_groups(self) -> int:
        return self.config.norm_num_groups

    @property
    def guidance_width(self) -> int | None:
        return self.config.time_cond_proj_dim

    def told_guidance(self, width: int | None) -> UNet:
        """A copy with a projection of w that starts as zero."""
        present, new = self.config.time_cond_proj_dim, "time_embedding.cond_proj.weight"
        if present not in (None, width):
            raise ValueError(f"guidance_embedding: the teacher has one already, of width {present}, not {width}")
        made = UNet(replace(self.config, time_cond_proj_dim=width)).to(next(self.parameters()).device)
        weights = self.state_dict()
        if width is not None and present is None:
            weights[new] = torch.zeros_like(made.get_parameter(new))
        made.load_state_dict(weights, strict=True)
        return made.requires_grad_(True)

    def time(self, t: Tensor, cond: Cond, batch: int, dtype: torch.dtype) -> Tensor:
        """The embedding (B, E) of times and of all that is added to them, before its activation."""
        config = self.config
        t = t.reshape(-1).expand(batch)
        guidance = None
        if "guidance" in cond:
            if config.time_cond_proj_dim is None:
                raise ValueError('cond "guidance" needs a U-Net with time_cond_proj_dim')
            w = sinusoid(1000.0 * cond["guidance"].float(), config.time_cond_proj_dim, cos_first=False, shift=1.0)
            guidance = w.to(dtype)
        emb = self.time_embedding(self._sinusoid(t, config.block_out_channels[0]).to(dtype), guidance)
        if self.class_embedding is not None:
            label = _needed(cond, "class")
            if config.class_embed_type == "timestep":
                label = self._sinusoid(label, config.block_out_channels[0])
            emb = emb + self.class_embedding(label.to(dtype) if config.class_embed_type else label)
        if self.add_embedding is not None:
            ids, pooled = _needed(cond, "time_ids"), _needed(cond, "pooled")
            assert config.addition_time_embed_dim is not None
            sizes = self._sinusoid(ids.flatten(), config.addition_time_embed_dim).view(len(ids), -1)
            emb = emb + self.add_embedding(torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=-1))
        return emb

    def enable_gradient_checkpointing(self, on: bool | Granularity = True) -> None:
        """What training computes again in the backward pass instead of keeping it.

        "block" (True): each resnet with its transformer, the least memory; "transformer": each transformer block, whose
        tokens weigh most at fine levels; "none" (False). Raises ValueError for another name.
        """
        chosen = granularity(on)
        self.recompute = chosen == "block"
        for layer in self.transformers():
            layer.recompute = chosen == "transformer"

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _sinusoid(self, t: Tensor, width: int) -> Tensor:
        return sinusoid(t, width, cos_first=self.config.flip_sin_to_cos, shift=self.config.freq_shift)

    def _run(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        return self.run_again(step, *args, on=self.recompute)


def _one_count_of_heads(layers: Iterable[Transformer2D]) -> bool:
    """As Stable Diffusion 1 has it; where the width of a head is the same instead, each width is code of its own."""
    return len({m.heads for layer in layers for m in layer.modules() if isinstance(m, Attention)}) == 1


def _needs(config: UNetConfig) -> frozenset[str]:
    """Text, and what else the embeddings are made of."""
    found = {"text"} | ({"pooled", "time_ids"} if config.addition_embed_type else set())
    found |= {"guidance"} if config.time_cond_proj_dim is not None else set()
    classes = config.class_embed_type is not None or config.num_class_embeds is not None
    return frozenset(found | ({"class"} if classes else set()))


def _group(name: str) -> str:
    if ".attn1." in name or ".attn2." in name:
        return "attention"
    if ".ff." in name:
        return "feed_forward"
    if name.endswith((".proj_in", ".proj_out")):
        return "projection"
    if name.endswith(".time_emb_proj"):
        return "time"
    return "convolution" if ".resnets." in name or "samplers." in name else "other"


def _once(x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    """The first of the equal parts, with the text of all."""
    rows = x.shape[0] // cond["copies"].shape[0]
    return x[:rows], t[:rows], {k: v if k in ("text", "kv") else v[:rows] for k, v in cond.items() if k != "copies"}


def _class_embedding(config: UNetConfig) -> nn.Module | None:
    kind, time, width = config.class_embed_type, config.time_width, config.projection_class_embeddings_input_dim
    if kind == "timestep":
        return Embedding(config.block_out_channels[0], time)
    if kind == "identity":
        return nn.Identity()
    if kind == "projection":
        return Embedding(width or 0, time)
    if kind == "simple_projection":
        return nn.Linear(width or 0, time)
    return nn.Embedding(config.num_class_embeds, time) if config.num_class_embeds is not None else None


def _needed(cond: Cond, key: str) -> Tensor:
    if key not in cond:
        raise ValueError(f"this U-Net needs cond {key!r}; got {sorted(cond)}")
    return cond[key]
