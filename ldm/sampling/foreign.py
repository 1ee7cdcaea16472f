"""Settings that other programs wrote into their pictures, as options of `ldm sample`; refused by name if ambiguous.

Read are A1111's "parameters" (Forge, SD.Next and Civitai write them too) and ComfyUI's "prompt", where its graph is the
plain one: one KSampler from an empty latent. The noise is never the same: every program draws its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_A1111 = {
    "euler": "euler", "euler a": "euler_ancestral", "heun": "heun", "dpm2": "kdpm2", "lms": "lms", "ddim": "ddim",
    "plms": "plms", "unipc": "unipc", "lcm": "lcm", "tcd": "tcd", "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2m sde": "dpmpp_2m_sde",
}  # fmt: skip
_COMFY = {
    "euler": "euler", "euler_ancestral": "euler_ancestral", "heun": "heun", "dpm_2": "kdpm2", "lms": "lms",
    "ddim": "ddim", "ddpm": "ddpm", "uni_pc": "unipc", "lcm": "lcm", "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde", "deis": "deis",
}  # fmt: skip
_SPACINGS = {
    "": None, "uniform": None, "normal": None, "karras": "karras", "exponential": "exponential",
    "align your steps": "ays", "align_your_steps": "ays",
}  # fmt: skip
_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_2m_sde": "exponential"}
_BOOKKEEPING = {
    "model hash", "vae hash", "version", "lora hashes", "ti hashes", "hashes", "batch size", "batch pos", "user",
    "civitai resources", "civitai metadata", "created date", "rng", "size",
}  # fmt: skip
_OTHERS = {
    "invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI", "Dream": "InvokeAI", "dream": "InvokeAI",
    "fooocus_scheme": "Fooocus", "generation_data": "another program", "Comment": "NovelAI or another program",
    "drawthings": "Draw Things", "sui_image_params": "SwarmUI",
}  # fmt: skip
_PAIR = re.compile(r'\s*([^:,]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_PLAIN_NODES = {
    "KSampler", "CLIPTextEncode", "EmptyLatentImage", "CheckpointLoaderSimple", "VAEDecode", "SaveImage",
    "PreviewImage", "VAELoader", "LoraLoader", "LoraLoaderModelOnly", "CLIPSetLastLayer", "Note",
}  # fmt: skip


@dataclass
class Foreign:
    """Options by their names, the program that wrote them, its model's name, and what of it is not used."""

    program: str
    options: dict[str, Any]
    model: str = ""
    unused: list[str] = field(default_factory=list)


def read(texts: Mapping[str, str]) -> Foreign:
    """From a picture's texts by key. Raises ValueError that names what is not there, not known or ambiguous."""
    if "parameters" in texts and not texts["parameters"].lstrip().startswith("{"):
        return _parameters(texts["parameters"])
    if "prompt" in texts and texts["prompt"].lstrip().startswith("{"):
        return _graph(texts["prompt"])
    for key, program in _OTHERS.items():
        if key in texts:
            raise ValueError(f"its settings are of {program} (text {key!r}), which are not read")
    if "parameters" in texts:
        raise ValueError("its settings are JSON under 'parameters' (as Fooocus and SwarmUI write), which is not read")
    if texts:
        raise ValueError(f"it has no settings, only the texts {sorted(texts)}")
    raise ValueError("it has no settings in it; a program that saved it anew may have taken them out")


def _parameters(text: str) -> Foreign:
    lines = text.strip().splitlines()
    if not lines or not re.match(r"\s*Steps:\s*\d", lines[-1]):
        raise ValueError("its 'parameters' do not end with a line of settings that begins with 'Steps:'")
    pairs = {m[1].strip(): _unquoted(m[2].strip()) for m in _PAIR.finditer(lines[-1])}
    head = "\n".join(lines[:-1])
    prompt, _, negative = head.partition("Negative prompt:")
    known = {name.lower(): value for name, value in pairs.items()}
    if "denoising strength" in known and not any(name.startswith("hires") for name in known):
        raise ValueError(f"it was drawn from another picture (Denoising strength: {known['denoising strength']})")
    name, grid = known.pop("sampler", ""), known.pop("schedule type", "")
    for end in (" karras", " exponential"):
        if name.lower().endswith(end):
            name, grid = name[: -len(end)], end.strip()
    sampler = _named("Sampler", name, _A1111, name.lower())
    automatic = grid.lower() == "automatic"
    spacing = _AUTOMATIC.get(sampler) if automatic else _named("Schedule type", grid, _SPACINGS, grid.lower())
    options: dict[str, Any] = {
        "prompts": [_one_line(prompt)], "negative": _one_line(negative), "sampler": sampler, "spacing": spacing,
        "steps": _number("Steps", known.pop("steps", ""), int), "prompt_weights": True, "long_prompts": True,
        "guidance": _number("CFG scale", known.pop("cfg scale", "7"), float),
        "seed": _number("Seed", known.pop("seed", ""), int),
    }  # fmt: skip
    if size := re.fullmatch(r"(\d+)\s*x\s*(\d+)", known.pop("size", "")):
        options["size"] = [int(size[2]), int(size[1])]
    if "eta" in known:
        options["eta"] = _number("Eta", known.pop("eta"), float)
    model = known.pop("model", "")
    unused = [f"{name}: {value}" for name, value in pairs.items() if name.lower() in known.keys() - _BOOKKEEPING]
    return Foreign("A1111", options, model, unused)


def _graph(text: str) -> Foreign:
    try:
        nodes: dict[str, Any] = json.loads(text)
        kinds = {key: str(node["class_type"]) for key, node in nodes.items()}
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"its text 'prompt' is no graph of ComfyUI: {error}") from error
    if odd := sorted(set(kinds.values()) - _PLAIN_NODES):
        raise ValueError(f"its graph of ComfyUI has nodes that are not read: {', '.join(odd)}")
    samplers = [key for key, kind in kinds.items() if kind == "KSampler"]
    if len(samplers) != 1:
        raise ValueError(f"its graph of ComfyUI has {len(samplers)} nodes KSampler, expected one")
    inputs = nodes[samplers[0]]["inputs"]

    def linked(name: str, *expected: str) -> dict[str, Any]:
        kind = kinds.get(str(inputs[name][0])) if isinstance(inputs.get(name), list) else None
        if kind not in expected:
            raise ValueError(f"ComfyUI's KSampler: {name} comes from {kind}, expected {' or '.join(expected)}")
        return nodes[str(inputs[name][0])]["inputs"]

    def plain(name: str, value: Any, kind: type) -> Any:
        if isinstance(value, (list, dict)) or value is None:
            raise ValueError(f"ComfyUI's {name} comes from another node, which is not read")
        return _number(name, str(value), kind) if kind is not str else str(value)

    if plain("denoise", inputs.get("denoise", 1), float) != 1:
        raise ValueError(f"ComfyUI's KSampler begins within a picture (denoise {inputs['denoise']})")
    latent = linked("latent_image", "EmptyLatentImage")
    sampler, grid = plain("sampler_name", inputs.get("sampler_name"), str), plain("scheduler", inputs["scheduler"], str)
    options: dict[str, Any] = {
        "prompts": [_one_line(plain("text", linked("positive", "CLIPTextEncode").get("text"), str))],
        "negative": _one_line(plain("text", linked("negative", "CLIPTextEncode").get("text"), str)),
        "sampler": _named("sampler_name", sampler, _COMFY, sampler),
        "spacing": _named("scheduler", grid, _SPACINGS, grid), "steps": plain("steps", inputs.get("steps"), int),
        "guidance": plain("cfg", inputs.get("cfg"), float), "seed": plain("seed", inputs.get("seed"), int),
        "size": [plain(side, latent.get(side), int) for side in ("height", "width")],
        "prompt_weights": True, "long_prompts": True,
    }  # fmt: skip
    models = [str(n["inputs"].get("ckpt_name")) for n in nodes.values() if n["class_type"] == "CheckpointLoaderSimple"]
    unused = []
    for node in nodes.values():
        if node["class_type"] in ("LoraLoader", "LoraLoaderModelOnly", "VAELoader", "CLIPSetLastLayer"):
            told = ", ".join(f"{k} {v}" for k, v in node["inputs"].items() if not isinstance(v, list))
            unused.append(f"{node['class_type']} ({told})")
    return Foreign("ComfyUI", options, ", ".join(models), unused)


def _named(what: str, name: str, known: Mapping[str, Any], key: str) -> Any:
    if key not in known:
        raise ValueError(f"{what} {name!r} is none that is known here: {', '.join(k for k in known if k)}")
    return known[key]


def _number(what: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what}: expected a number, got {text!r}") from None


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value


def _one_line(text: str) -> str:
    return " ".join(text.split())
