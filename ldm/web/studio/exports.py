"""A run's files, and the commands that write its model for other programs."""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoint import files
from ldm.web.studio.runs import Run, config_of
from ldm.web.studio.training import size

FORMS = {
    "diffusers": "diffusers folder (a LoRA is merged into its base)",
    "single": "single file (A1111, ComfyUI; a LoRA is merged)",
    "kohya": "LoRA file in kohya's form (A1111, ComfyUI)",
    "lora": "LoRA file in diffusers' form",
    "plain": "what the run itself exports (ldm export)",
}
_SUFFIX = {"diffusers": "", "single": ".safetensors", "kohya": ".safetensors", "lora": ".safetensors", "plain": ""}


def checkpoints(run: Run) -> list[int]:
    """The steps of its whole checkpoints."""
    return files.steps(run.folder / "checkpoints")


def contents(run: Run) -> list[tuple[str, str]]:
    """(file or folder, size) of what the run holds, exports first."""
    rows = []
    places = [run.folder / "export", *sorted(run.folder.glob("for_*")), *sorted(run.folder.glob("checkpoints/step-*"))]
    for place in places:
        if place.is_dir():
            inner = [f for f in place.rglob("*") if f.is_file()]
            if inner:
                rows.append((f"{place.relative_to(run.folder)}/", size(sum(f.stat().st_size for f in inner))))
        elif place.is_file():
            rows.append((str(place.relative_to(run.folder)), size(place.stat().st_size)))
    return rows


def target(run: Run, form: str, step: int | None) -> Path:
    """Where an export goes: into the run's folder, under a name that says what it is."""
    at = f"_step_{step}" if step is not None else ""
    where = run.folder / f"for_{form}{at}{_SUFFIX[form]}"
    k = 2
    while where.exists():
        where = run.folder / f"for_{form}{at}_{k}{_SUFFIX[form]}"
        k += 1
    return where


def command(run: Run, form: str, step: int | None, out: str, folder: str) -> list[str]:
    """The words behind `ldm`; `folder` is the run's as typed. Raises ValueError where there is nothing to export."""
    if not checkpoints(run) and not (run.folder / "export").is_dir():
        raise ValueError(f"{run.name}: has no checkpoint yet, so there is nothing to export")
    if form == "plain":
        return ["export", folder, out, *([] if step is None else ["--step", str(step)])]
    source = folder if step is None else f"{folder}@{step}"
    argv = ["convert", source, out, "--to", form]
    adapter = ((config_of(run.folder).get("task") or {}).get("adapter") or {}).get("kind")
    if form in ("lora", "kohya") and adapter not in ("lora", "pivotal"):
        argv += ["--base", run.base]
    return argv
