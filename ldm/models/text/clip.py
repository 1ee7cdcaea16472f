"""Text conditioning by open_clip's towers; imported lazily.

Legend: B batch, T tokens of the context, D width of the hidden states, P width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.models.text.base import TextEncoder, own_precision
from ldm.models.text.config import ClipConfig, TextConfig
from ldm.models.text.tokenizer import build_tokenizer
from ldm.models.wide import quickened
from ldm.types import Cond

if TYPE_CHECKING:
    from open_clip import CLIP


def build_clip(config: ClipConfig) -> CLIP:
    """An open_clip model with random weights; `encode_image` takes (B, 3, S, S), `encode_text` tokens (B, T)."""
    from open_clip import CLIP

    both = open_clip_config(config)
    # a temperature of shape (1,): DeepSpeed cannot broadcast parameters without a dimension
    quick = config.quick_gelu
    return CLIP(both["embed_dim"], both["vision_cfg"], both["text_cfg"], quick_gelu=quick, nonscalar_logit_scale=True)


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """The same model as an open_clip model config (its JSON)."""
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.vision_head_width,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }


class TextTower(TextEncoder):
    """A frozen text tower: prompts -> tokens -> hidden states and pooled vector, in the weights' own precision."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        from open_clip.transformer import QuickGELU, TextTransformer

        self.model = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            mlp_ratio=(config.mlp_width or 4 * config.width) / config.width,
            output_dim=config.projection,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        )
        quickened(self.model)
        self.tokenizer = build_tokenizer(config)
        self.requires_grad_(False).eval()

    @property
    def table(self) -> nn.Embedding:
        """The token embeddings (V, D)."""
        return self.model.token_embedding

    @staticmethod
    def of_clip(model: CLIP, config: TextConfig) -> TextTower:
        """A copy of the text tower of an open_clip model."""
        tower = TextTower(config)
        names = set(tower.model.state_dict())
        tower.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in names}, strict=True)
        return tower

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    def encode(self, tokens: Tensor) -> Cond:
        """{"text": (B, T, D), "pooled": (B, P)} of token ids (B, T); never under autocast."""
        model, rule = self.model, self.config.output
        tokens = tokens.to(model.positional_embedding.device)
        with own_precision(tokens.device):
            x = self._embed(tokens) + model.positional_embedding[: tokens.shape[1]]
            mask = model.attn_mask
            assert mask is not None
            mask = mask[: tokens.shape[1], : tokens.shape[1]]
            before = x
            for block in model.transformer.resblocks:
                before, x = x, block(x, attn_mask=mask)
            last = model.ln_final(x)
            end = last[torch.arange(len(tokens), device=tokens.device), self._pooled_at(tokens)]
            pooled = end if model.text_projection is None else end @ model.text_projection
            if rule == "last":
                return {"text": last, "pooled": pooled}
            return {"text": model.ln_final(before) if rule == "penultimate_norm" else before, "pooled": pooled}

    def _pooled_at(self, tokens: Tensor) -> Tensor:
        """Where the pooled vector is taken, (B,)."""
        if self.config.pooled_at == "largest":  # new vectors beyond the table have no part in it
            return tokens.masked_fill(tokens >= self.config.vocab_size, -1).argmax(1)
        return (tokens == self.tokenizer.end).int().argmax(1)

    def forward(self, texts: Sequence[str]) -> Cond:
        """`encode(tokenize(texts))`, with zeros for empty prompts where the family says so."""
        cond = self.encode(self.tokenize(texts))
        if self.config.zero_empty:
            keep = torch.tensor([t != "" for t in texts], device=cond["text"].device)
            cond = {k: v * keep.view(-1, *[1] * (v.ndim - 1)) for k, v in cond.items()}
        return cond
