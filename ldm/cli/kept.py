"""The models of the last drawings, kept where one process runs several commands (`ldm studio`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

SHARE = 0.3
"""Of the memory, which several kept models may take together; one is always kept."""
_keeps = False
_kept: dict[tuple[Any, ...], tuple[TextToImage, frozenset[str]]] = {}


def start() -> None:
    """Keep models from now on."""
    global _keeps
    _keeps = True


def load(source: str | Path, **how: Any) -> TextToImage:
    """`TextToImage.load`, or the same model as it was loaded before, without LoRAs that were added since."""
    from ldm.pipeline import TextToImage

    if not _keeps:
        return TextToImage.load(source, **how)
    key = (str(source), _written(source), *sorted((k, str(v)) for k, v in how.items()))
    if key in _kept:
        pipeline, own = _kept[key] = _kept.pop(key)  # the newest last
        if pipeline._loras is not None and (more := set(pipeline._loras.weights) - own):
            pipeline.unload_loras(*more)
        return pipeline
    for old in [k for k in _kept if k[0] == str(source)]:
        del _kept[old]
    pipeline = TextToImage.load(source, **how)
    own = frozenset(() if pipeline._loras is None else pipeline._loras.weights)
    _kept[key] = (pipeline, own)
    while len(_kept) > 1 and sum(_bytes(p) for p, _ in _kept.values()) > SHARE * _memory(pipeline):
        del _kept[next(iter(_kept))]
    return pipeline


def drop(pipeline: TextToImage) -> None:
    """Keep a model no longer: something was added to it that cannot be taken out."""
    for key in [k for k, (one, _) in _kept.items() if one is pipeline]:
        del _kept[key]


def _written(source: str | Path) -> int:
    """When the newest of a source's own files was written; 0 for what is not here."""
    path = Path(source)
    export = path / "export" if (path / "export").is_dir() else path
    files = [f for f in export.rglob("*") if f.is_file()] if export.is_dir() else [export] if export.is_file() else []
    return max((f.stat().st_mtime_ns for f in files), default=0)


def _bytes(pipeline: TextToImage) -> int:
    modules = [pipeline.network, *pipeline.others]
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _memory(pipeline: TextToImage) -> int:
    if pipeline.device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(pipeline.device).total_memory
    import psutil

    return psutil.virtual_memory().total
