"""What the U-Net and the networks that control it are both made of: the encoder and the middle (arXiv 2112.10752).

Legend: B batch, C channels, H, W latent pixels, T tokens, D width of the text, E width of the time embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.models.layers import Downsample, Embedding, ResnetBlock, Upsample, repeated, sinusoid
from ldm.models.network import Granularity, Looks, Network, granularity
from ldm.models.unet.config import DOWN, MID, UNetConfig
from ldm.models.unet.transformer import Attention, Transformer2D
from ldm.types import Cond

IMAGE_KV = "image_kv"
"""Of `cond`, with a point and a number behind it, one for each picture: (B, N, ...), keys and values of all
cross-attentions in running order, as `ldm.models.unet.image_prompt` makes them."""


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
        only_cross = config.only_cross[level]
        self.attentions = nn.ModuleList(_transformer(config, level, only_cross) for _ in inputs) if attend else None
        self.downsamplers = nn.ModuleList([Downsample(width, symmetric=True)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if up else None

    def step(self, index: int, x: Tensor, time: Tensor, *told: Any) -> Tensor:
        """Resnet number `index`, and its transformer, which is `told` of the text and of pictures."""
        x = self.resnets[index](x, time)
        return x if self.attentions is None else self.attentions[index](x, *told)

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

    def forward(self, x: Tensor, time: Tensor, *told: Any) -> Tensor:
        """`told`: of the text and of pictures, as `Told` has it."""
        x = self.resnets[0](x, time)
        for attend, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = attend(x, *told)
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


def _transformer(config: UNetConfig, level: int, only_cross: bool = False) -> Transformer2D:
    return Transformer2D(
        config.block_out_channels[level],
        heads=config.heads[level],
        depth=config.per_level("transformer_layers_per_block")[level],
        text=config.per_level("cross_attention_dim")[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        dropout=config.dropout,
        only_cross=only_cross,
    )


def _down_stages(config: UNetConfig) -> nn.ModuleList:
    widths, layers = config.block_out_channels, config.per_level("layers_per_block")
    stages = nn.ModuleList()
    for i, kind in enumerate(config.down_block_types):
        inputs = [widths[max(i - 1, 0)]] + [widths[i]] * (layers[i] - 1)
        stages.append(Stage(config, i, inputs, attend=kind == DOWN[0], down=i < config.levels - 1))
    return stages


Told = tuple[Any, ...]
"""What a transformer is told beside its input: the text, its keys and values where they are known, and those of
pictures where there are any."""


class Residuals(NamedTuple):
    """What is added to a U-Net's skips, in the order in which it makes them, and to its middle: (B, C, h or 1, w or 1).

    B may be the rows of the whole batch, or of its equal parts where nothing tells them apart yet ("copies").
    """

    down: tuple[Tensor, ...]
    mid: Tensor

    def onto(self, x: Tensor, skips: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The middle's features and the skips with these."""
        return _sum(x, self.mid), [_sum(a, b) for a, b in zip(skips, self.down, strict=True)]

    def plus(self, other: Residuals) -> Residuals:
        """Of two control networks together."""
        mid, down = other.onto(self.mid, self.down)
        return Residuals(tuple(down), mid)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    rows = max(len(a), len(b))
    return repeated(a, rows) + repeated(b, rows).to(a.dtype)


class Encoder(Network):
    """Embeddings, the stages down and the middle; abstract. Shapes and `cond` are those of `UNet.forward`."""

    compiled_sizes: ClassVar[bool | None] = True  # equal blocks run at several levels

    def __init__(self, config: UNetConfig) -> None:
        """`config` is of the U-Net whose encoder it is."""
        super().__init__()
        self.in_channels = config.in_channels
        widths, time = config.block_out_channels, config.time_width
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time, extra=config.time_cond_proj_dim)
        self.class_embedding = _class_embedding(config)
        extra = config.projection_class_embeddings_input_dim
        self.add_embedding = Embedding(extra, time) if config.addition_embed_type and extra else None
        self.down_blocks = _down_stages(config)
        self.mid_block = Middle(config)
        self.recompute = False
        self._kv_widths: list[int] = []  # set when all stages are there

    @property
    @abstractmethod
    def of_unet(self) -> UNetConfig:
        """The settings of the U-Net whose encoder it is."""

    def stages(self) -> list[tuple[str, Stage | Middle]]:
        """Names and modules in the order in which they run."""
        down = [(f"down_blocks.{i}", cast("Stage", stage)) for i, stage in enumerate(self.down_blocks)]
        return [*down, ("mid_block", self.mid_block)]

    def _halfway(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, list[Tensor], Tensor, Iterator[Told]]:
        """(middle features, skips, activated time embedding, what the transformers of the rest are told)."""
        if "copies" in cond:
            x, t, cond = _once(x, t, cond)
        if "concat" in cond:
            x = torch.cat([x, cond["concat"].to(x.dtype)], dim=1)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the {self.title} takes {self.in_channels} channels, got {x.shape[1]} (with concat)")
        x = x.to(self._dtype)
        text = cond["text"].to(x.dtype) if "text" in cond else x.new_zeros(0)
        told = self._told(text, cond)
        time = nn.functional.silu(self.time(t, cond, len(x), x.dtype))
        x = self._entered(self.conv_in(x), cond)
        skips = [x]
        for number, stage in enumerate(cast("Iterable[Stage]", self.down_blocks)):
            for i in range(len(stage.resnets)):
                own = () if stage.attentions is None else next(told)
                x = self._step(stage, i, x, repeated(time, len(x)), own)
                skips.append(x)
            self.pass_by(f"down_blocks.{number}", x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = self._across(x, repeated(time, len(x)), next(told) if len(self.mid_block.attentions) else ())
        self.pass_by("mid_block", x)
        return x, skips, time, told

    def _told(self, text: Tensor, cond: Cond) -> Iterator[Told]:
        """Of each transformer in running order."""
        known = cond["kv"].split(self._kv_widths, dim=-1) if "kv" in cond else [None] * len(self._kv_widths)
        images = [value for key, value in sorted(cond.items()) if is_image(key)]
        if not images:
            return ((text, kv) for kv in known)
        each = zip(*(value.split(self._kv_widths, dim=-1) for value in images))
        return ((text, kv, seen) for kv, seen in zip(known, each, strict=True))

    def _entered(self, x: Tensor, cond: Cond) -> Tensor:
        """What the first stage is given of what `conv_in` gives."""
        return x

    def _step(self, stage: Stage, index: int, x: Tensor, time: Tensor, told: Told) -> Tensor:
        if not self._one_by_one:
            return self._run(stage.step, index, x, time, *told)
        x = self._run(stage.resnets[index], x, time)
        return x if stage.attentions is None else self._run(stage.attentions[index], x, *told)

    def _across(self, x: Tensor, time: Tensor, told: Told) -> Tensor:
        """The middle."""
        if not self._one_by_one:
            return self._run(self.mid_block, x, time, *told)
        first, *rest = self.mid_block.resnets
        x = self._run(first, x, time)
        for attend, resnet in zip(self.mid_block.attentions, rest, strict=True):
            x = self._run(attend, x, *told)
            x = self._run(resnet, x, repeated(time, len(x)))
        return x

    @property
    def _one_by_one(self) -> bool:
        """Blocks that come and go are computed again each by itself, so that one alone is there for it."""
        return self.recompute and self.streaming is not None

    def _widths(self) -> list[int]:
        """Of each transformer's keys and values of the text."""
        return [2 * m.channels * len(m.transformer_blocks) for m in self.transformers()]

    def transformers(self) -> list[Transformer2D]:
        """In the order in which they run."""
        return [m for _, stage in self.stages() for m in stage.modules() if isinstance(m, Transformer2D)]

    def time(self, t: Tensor, cond: Cond, batch: int, dtype: torch.dtype) -> Tensor:
        """The embedding (B, E) of times and of all that is added to them, before its activation."""
        config = self.of_unet
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

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Resnets, transformers and resamplings."""
        for prefix, stage in self.stages():
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
        return sinusoid(t, width, cos_first=self.of_unet.flip_sin_to_cos, shift=self.of_unet.freq_shift)

    def _run(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        return self.run_again(step, *args, on=self.recompute)


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


def is_image(key: str) -> bool:
    """Whether a key of `cond` has the keys and values of a picture that is a prompt."""
    return key.partition(".")[0] == IMAGE_KV


def _once(x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    """The first of the equal parts, with the text of all."""
    rows = x.shape[0] // cond["copies"].shape[0]
    return (
        x[:rows],
        t[:rows],
        {k: v if k in ("text", "kv") or is_image(k) else v[:rows] for k, v in cond.items() if k != "copies"},
    )


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
