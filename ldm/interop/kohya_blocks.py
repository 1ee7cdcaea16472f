"""sd-scripts' rates by block of SDXL's U-Net, whose blocks it counts in the original order."""

from __future__ import annotations

from ldm.interop.sheet import Sheet

SDXL = (
    ("time_embedding", "add_embedding"),
    ("conv_in",),
    ("down_blocks.0.resnets.0",),
    ("down_blocks.0.resnets.1",),
    ("down_blocks.0.downsamplers",),
    ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0"),
    ("down_blocks.1.resnets.1", "down_blocks.1.attentions.1"),
    ("down_blocks.1.downsamplers",),
    ("down_blocks.2.resnets.0", "down_blocks.2.attentions.0"),
    ("down_blocks.2.resnets.1", "down_blocks.2.attentions.1"),
    ("mid_block.resnets.0",),
    ("mid_block.attentions.0",),
    ("mid_block.resnets.1",),
    ("up_blocks.0.resnets.0", "up_blocks.0.attentions.0"),
    ("up_blocks.0.resnets.1", "up_blocks.0.attentions.1"),
    ("up_blocks.0.resnets.2", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers"),
    ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0"),
    ("up_blocks.1.resnets.1", "up_blocks.1.attentions.1"),
    ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers"),
    ("up_blocks.2.resnets.0",),
    ("up_blocks.2.resnets.1",),
    ("up_blocks.2.resnets.2",),
    ("conv_norm_out", "conv_out"),
)
"""Embeddings, nine input blocks, three of the middle, nine output blocks, the last layers; our names of each."""


def rates(sheet: Sheet, rate: float) -> None:
    """`block_lr`, a rate for each block, as shares of the run's."""
    given = [float(value) for word in sheet.texts("block_lr") for value in word.split(",") if value.strip()]
    if len(given) != len(SDXL):
        sheet.refuse("block_lr", f"{len(given)} rates, expected {len(SDXL)}, of SDXL's blocks")
        return
    shares = {name: value / rate for names, value in zip(SDXL, given, strict=True) for name in names}
    sheet.keep("block_lr", "train.optim.rates.blocks", shares, "by our names of its blocks, as shares of the rate")
