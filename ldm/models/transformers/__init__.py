"""Diffusion transformers (SD3, FLUX.1, PixArt) with diffusers' parameter names, on shared blocks."""
