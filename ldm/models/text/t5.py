"""T5's encoder, which SD3, FLUX.1 and PixArt are told their text by; transformers' module, imported lazily.

Legend: B batch, T tokens of the context, D width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm.models.text.base import own_precision
from ldm.models.text.captions import clean
from ldm.models.text.config import T5Config
from ldm.models.text.pretrained import (
    PretrainedEncoder,
    PretrainedTokenizer,
    has_sentencepiece,
    padding_free,
    tokenizer_folder,
    transformers_for,
)
from ldm.types import Cond

TITLE = "T5 text encoder"
FORMS = (("tokenizer.json",), ("spiece.model",))
"""Files that a tokenizer's folder has: those of one of these, and others that say more."""


class T5Tokenizer(PretrainedTokenizer):
    """T5's unigram tokenizer from the folder of a model: `tokenizer.json`, or `spiece.model` alone.

    `lower`: of small letters; `clean`, which may be set later: of captions that are cleaned as PixArt's pipeline does.
    """

    def __init__(self, folder: Path, *, context: int, lower: bool = False) -> None:
        folder = tokenizer_folder(folder, TITLE, FORMS)
        cls = transformers_for(f"the {TITLE}").T5TokenizerFast
        if not (folder / "tokenizer.json").is_file() and not has_sentencepiece():
            raise ValueError(
                f"tokenizer {str(folder)!r}: reading spiece.model needs sentencepiece and protobuf: "
                "pip install 'ldm[transformers]'"
            )
        super().__init__(cls.from_pretrained(str(folder), local_files_only=True), folder, context)
        self.end: int = self._fast.eos_token_id
        self.lower, self.clean = lower, False

    @property
    def limit(self) -> int:
        """How many tokens of a prompt's own fit beside the end token."""
        return self.context - 1

    def framed(self, ids: Sequence[int]) -> list[int]:
        """A prompt's own ids as the encoder takes them: cut at `limit`, with the end token."""
        return [*ids[: self.limit], self.end]

    def _plain(self, text: str) -> list[int]:
        if self.clean:
            return super()._plain(clean(text))
        return super()._plain(text.lower().strip() if self.lower else text)


class T5Encoder(PretrainedEncoder):
    """T5's encoder: the normed states of its last layer at all `max_length` tokens.

    In float16 the layers whose values would overflow stay in float32. Prompts are taken as they are, or in small
    letters (`lower`), or cleaned where the tokenizer is told to `clean` them.
    """

    title = TITLE
    linear_in_float32 = ("wo",)

    def __init__(self, config: T5Config) -> None:
        super().__init__(config, _build(config))

    @property
    def table(self) -> nn.Embedding:
        """The token embeddings (V, D)."""
        return self.model.shared

    def _read_tokenizer(self) -> T5Tokenizer:
        folder = tokenizer_folder(self.config.tokenizer, TITLE, FORMS)
        return T5Tokenizer(folder, context=self.config.max_length, lower=self.config.lower)

    def forward(self, texts: Sequence[str]) -> Cond:
        """{"text": (B, T, D)} and, where the family masks, "mask" (B, T)."""
        return self.encode(*self.tokenizer.batch(self.tokenizer.rows(texts)))

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Cond:
        """States of token ids (B, T), True in `mask` where they are no padding; never under autocast.

        An encoder from which padding is hidden takes ids of the padding for it where there is no `mask`.
        """
        tokens, zero = tokens.to(self.table.weight.device), self.config.padding == "zero"
        if not (self.config.masked or zero):
            mask = None
        elif mask is None:
            mask = padding_free(tokens, self)
        else:
            mask = mask.to(tokens.device)
        with own_precision(tokens.device):
            # transformers looks into a mask, which cannot be done on the meta device; its shape is the states' alone
            seen = None if mask is None or mask.is_meta else mask.long()
            states = self.model(inputs_embeds=self._embed(tokens), attention_mask=seen).last_hidden_state
        if mask is None:
            return {"text": states}
        states = states.masked_fill(~mask[..., None], 0) if zero else states
        return {"text": states, "mask": mask} if self.config.masked else {"text": states}


def _build(config: T5Config) -> nn.Module:
    """transformers' module with random weights; the embedding is in it once."""
    transformers = transformers_for(f"the {TITLE}")
    model = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            layer_norm_epsilon=config.layer_norm_epsilon,
            feed_forward_proj=config.feed_forward_proj,
            dropout_rate=0.0,
            use_cache=False,
            is_encoder_decoder=False,
        )
    )
    model.encoder.embed_tokens = None  # the same as `shared`; ours are looked up there and given as vectors
    return model
