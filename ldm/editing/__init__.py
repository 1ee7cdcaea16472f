"""Editing pictures: img2img, inpainting, inversion, prompt-to-prompt, instructions, super-resolution, CLIP guidance."""

from ldm.editing.canvas import Canvas, encode
from ldm.editing.edits import Change, attention_maps, clip_guide, edit, img2img, inpaint, invert, redraw
from ldm.editing.instruct import instruct
from ldm.editing.upscale import upscale

__all__ = [
    "Canvas",
    "Change",
    "attention_maps",
    "clip_guide",
    "edit",
    "encode",
    "img2img",
    "inpaint",
    "instruct",
    "invert",
    "redraw",
    "upscale",
]
