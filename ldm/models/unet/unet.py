"""Text-conditional U-Net (Rombach et al. 2022, arXiv 2112.10752) with diffusers' parameter names and config keys.

Legend: B batch, C channels, H, W latent pixels, T tokens, D width of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ldm.models.layers import NormSiLU, ResnetBlock, repeated
from ldm.models.unet.config import UP, UNetConfig
from ldm.models.unet.encoder import Encoder, Middle, Residuals, Stage
from ldm.models.unet.transformer import Attention, Transformer2D
from ldm.types import Cond


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


class UNet(Encoder):
    """Noisy latents, times and conditioning -> the raw prediction."""

    title = "U-Net"
    component = "unet"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.config: UNetConfig = config
        self.out_channels, self.needs = config.out_channels, needs(config)
        self.up_blocks = _up_stages(config)
        self.conv_norm_out = NormSiLU(config.norm_num_groups, config.block_out_channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(config.block_out_channels[0], config.out_channels, 3, padding=1)
        self.compiled_widths = _one_count_of_heads(self.transformers())
        self._kv_widths = self._widths()
        self._start_as_identity()

    @property
    def of_unet(self) -> UNetConfig:
        return self.config

    def stages(self) -> list[tuple[str, Stage | Middle]]:
        up = [(f"up_blocks.{i}", cast("Stage", stage)) for i, stage in enumerate(self.up_blocks)]
        return [*super().stages(), *up]

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

    def forward(self, x: Tensor, t: Tensor, cond: Cond, residuals: Residuals | None = None) -> Tensor:
        """(B, C, H, W) at times t (B,) or (1,) -> (B, C', H, W).

        `cond`: "text" (B, T, D), or "kv" that `keys_values` made of it; "concat" (B, C'', H, W), added to the channels;
        "class" (B,) or (B, P); "pooled" (B, P) with "time_ids" (B, 6); "guidance" (B,), the w of w-conditioned models,
        which is the guidance scale - 1; "image_kv.N" (B, M, ...), of pictures that are prompts. "copies" (n, 0) tells
        that x, t and all but the text are n times the same rows, as guidance has them: they are computed once up to the
        first cross-attention. `residuals` are added to the skips and the middle.
        """
        rows = x.shape[0]
        x, skips, time, told = self._halfway(x, t, cond)
        if residuals is not None:
            x, skips = residuals.onto(x, skips)
        for number, stage in enumerate(cast("Iterable[Stage]", self.up_blocks)):
            for i in range(len(stage.resnets)):
                own = () if stage.attentions is None else next(told)
                x = torch.cat([x, repeated(skips.pop(), len(x))], dim=1)
                x = self._step(stage, i, x, repeated(time, len(x)), own)
            self.pass_by(f"up_blocks.{number}", x)
            if stage.upsamplers is not None:
                h, w = skips[-1].shape[2:]
                even = (h, w) == (2 * x.shape[2], 2 * x.shape[3])
                x = stage.upsamplers[0](x, None if even else (h, w))
        return repeated(self.conv_norm_out.before(self.conv_out, x), rows)

    def middle(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What `forward` has in its middle, (B, C, h, w): features for a classifier; the second half does not run."""
        return repeated(self._halfway(x, t, cond)[0], x.shape[0])

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
        if "text" not in cond or not self._kv_widths or any(self.config.only_cross):  # whose first attention wants it
            return cond
        return {k: v for k, v in cond.items() if k != "text"} | {"kv": self.keys_values(cond["text"])}

    def prepared_numbers(self, rows: int, tokens: int) -> int:
        return 0 if any(self.config.only_cross) else rows * tokens * sum(self._kv_widths)

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


def _one_count_of_heads(layers: Iterable[Transformer2D]) -> bool:
    """As Stable Diffusion 1 has it; where the width of a head is the same instead, each width is code of its own."""
    return len({m.heads for layer in layers for m in layer.modules() if isinstance(m, Attention)}) == 1


def needs(config: UNetConfig) -> frozenset[str]:
    """Text, and what else the embeddings are made of."""
    found = {"text"} | ({"pooled", "time_ids"} if config.addition_embed_type else set())
    found |= {"guidance"} if config.time_cond_proj_dim is not None else set()
    classes = config.class_embed_type is not None or config.num_class_embeds is not None
    return frozenset(found | ({"class"} if classes else set()))
