"""Small tokenizers of T5 and Qwen in the forms that they are published in; no vocabulary can be downloaded."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

WORDS = (
    "a red apple",
    "two green eyes of a cat",
    "Smiling face, with SUNGLASSES!",
    "the quick brown fox jumps over the lazy dog",
    "naïve café über größe",
    "photo of a house at night, rain",
    "isn't it? yes: 12345 67890",
)
CORPUS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 5)) + f" {i}" for i in range(100)]
PROMPTS = ["a red apple", "", "Smiling face, with SUNGLASSES!", "a very long one " * 20]
ODD = [
    *PROMPTS,
    "  two   spaces\tand\nlines  ",
    "FULL－WIDTH，ﬁ ligature ① 日本 🙂 café",
    "a <extra_id_3> b</s> c <pad>",
    "A1 'quotes' \"double\" (brackets:1.3) <lora:x:1>",
    "the end",
]
PIECES = 200
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What Qwen3's own does with one message of a user."""
T5: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
QWEN: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def t5_tokenizer(folder: Path, *, form: str = "both") -> Path:
    """`form`: "both" as SD3's tokenizer_3 and FLUX.1's tokenizer_2, "spiece" as PixArt's tokenizer, "json"."""
    import sentencepiece
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512, "legacy": True, **special}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**special, "additional_special_tokens": extra})
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).get_piece_size()
    if form == "spiece":
        write_json(folder / "added_tokens.json", {token: size + 99 - i for i, token in enumerate(extra)})
        return folder
    T5TokenizerFast.from_pretrained(str(folder)).save_pretrained(str(folder / "saved"))
    shutil.copyfile(folder / "saved" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "saved")
    if form == "json":
        (folder / "spiece.model").unlink()
    return folder


def qwen_tokenizer(folder: Path, *, form: str = "json") -> Path:
    """`form`: "json" as Z-Image's tokenizer, all files; "parts" without tokenizer.json, "jinja" a template's file."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS, vocab_size=320, show_progress=False)
    bpe.save_model(str(folder))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = bpe.get_vocab_size()
    added = {
        str(size + i): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, name in enumerate(names)
    }
    config = {
        "added_tokens_decoder": added,
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    if form == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    else:
        config["chat_template"] = TEMPLATE
    write_json(folder / "tokenizer_config.json", config)
    if form == "json":
        from transformers import Qwen2TokenizerFast

        Qwen2TokenizerFast.from_pretrained(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder
