"""Checkpoint folders that are complete or absent: written beside, hashed, synced, renamed; `latest` last.

Layout: `checkpoints/step-N/` with the ranks' files and `manifest.json` (size and SHA-256 of each), `checkpoints/latest`
with the newest folder's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside, to be filled inside; at the end it takes the place of an old one, which stays until then.

    Where filling it raises, the old one stays and nothing else.
    """
    beside, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            os.rename(folder, old)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of a new file beside, to be written inside; at the end it takes the place of an old one."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def describe(path: Path) -> dict[str, object]:
    """Size and hash of a file that was just written, after syncing it."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def staging(root: Path, step: int) -> Path:
    """The folder where a checkpoint is written before it is published."""
    return root / f".step-{step}.tmp"


def publish(root: Path, step: int, files: dict[str, dict[str, object]], keep: int, keep_every: int = 0) -> Path:
    """Rename the staging folder into place, point `latest` at it and remove all but the newest `keep` up to it.

    Steps that `keep_every` divides are milestones: they stay beside those, for good (0: there are none).

    A step that was published before is replaced only after the new one is whole. Later steps are damaged ones that the
    run went back behind: they stay, and never count as kept.
    """
    beside, final = staging(root, step), root / f"step-{step}"
    write_text(beside / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
    sync(beside)
    if final.exists():
        old = root / f".step-{step}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(beside, final)
        shutil.rmtree(old)
    else:
        os.rename(beside, final)
    sync(root)
    write_text(root / "latest", final.name)
    for extra in [s for s in steps(root) if s <= step][:-keep] if keep > 0 else []:
        if not keep_every or extra % keep_every:
            shutil.rmtree(root / f"step-{extra}")
    for rest in [*root.glob(".step-*.tmp"), *root.glob(".step-*.old")]:  # of a process that died while saving
        shutil.rmtree(rest)
    return final


def kept(run: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is: among its checkpoints, or kept as the best one."""
    root = run / "checkpoints"
    return run / "best" if step not in steps(root) and step in steps(run / "best") else root


def withdraw(root: Path, after: int) -> None:
    """Remove what was published of later steps than `after`, to which the run went back."""
    late = [s for s in steps(root) if s > after]
    if not late:
        return
    rest = [s for s in steps(root) if s <= after]
    if rest:
        write_text(root / "latest", f"step-{rest[-1]}")
    for step in late:
        old = root / f".step-{step}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(root / f"step-{step}", old)
        shutil.rmtree(old)


def step_of(folder: Path) -> int:
    """N of a folder named step-N."""
    return int(folder.name.removeprefix("step-"))


def steps(root: Path) -> list[int]:
    """Steps that have a published folder, oldest first."""
    if not root.is_dir():
        return []
    found = [_NAME.fullmatch(p.name) for p in root.iterdir() if p.is_dir()]
    return sorted(int(m.group(1)) for m in found if m)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file has its size and hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    for name, size, sha256 in files:
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != size:
            return f"{name}: {path.stat().st_size} bytes, expected {size}"
        if digest(path) != sha256:
            return f"{name}: contents changed (SHA-256 differs)"
    return None


def newest(root: Path, upto: int | None = None) -> Path | None:
    """The newest undamaged checkpoint (of at most step `upto`), or None; each damaged one is named in a warning and
    left where it is."""
    return search(root, upto)[0]


def search(root: Path, upto: int | None = None) -> tuple[Path | None, list[str]]:
    """`newest`, and what is wrong with each later one that is damaged."""
    problems: list[str] = []
    for step in reversed([s for s in steps(root) if upto is None or s <= upto]):
        folder = root / f"step-{step}"
        problem = damage(folder)
        if problem is None:
            return folder, problems
        warnings.warn(f"checkpoint {folder} is damaged ({problem}); trying the one before", stacklevel=3)
        problems.append(f"{folder.name}: {problem}")
    return None, problems


def newest_of_run(root: Path) -> Path | None:
    """`newest`; None where there has never been one. Raises ValueError when there are some and all are damaged."""
    found, problems = search(root)
    if found is None and problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{root}: every checkpoint is damaged ({'; '.join(problems[:3])}{more}): there is nothing to go on from. "
            "Put a whole one back, or take another `out`, or begin again at step 0 with --from-scratch, which keeps "
            "what is there"
        )
    return found
