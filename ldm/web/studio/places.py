"""The folders that the studio was started with: it reads and writes below them alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.formats import SUFFIXES

DEEP, MOST = 5, 4000
"""Levels of folders, and folders in all, that are looked through."""
MODELS = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class Places:
    """`roots` are absolute; `runs`, where trainings are, and `drawn`, where pictures go, lie below one of them."""

    roots: tuple[Path, ...]
    runs: Path
    drawn: Path

    @staticmethod
    def of(folders: Sequence[Path], runs: Path, drawn: Path) -> Places:
        """Raises ValueError for a folder that is not there."""
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"folder {str(folder)!r}: no such folder")
        runs, drawn = runs.resolve(), drawn.resolve()
        for made in (runs, drawn):
            made.mkdir(parents=True, exist_ok=True)
        roots = [folder.resolve() for folder in folders]
        roots += [made for made in (runs, drawn) if not any(made.is_relative_to(root) for root in roots)]
        return Places(tuple(dict.fromkeys(roots)), runs, drawn)

    def inside(self, text: str | Path | None, what: str = "folder") -> Path:
        """The path below one of the folders that a text means. Raises ValueError for any other, there or not."""
        told = str(text or "").strip()
        if not told:
            raise ValueError(f"{what}: none is given")
        path = Path(os.path.expanduser(told))
        tries = [path] if path.is_absolute() else [Path.cwd() / path, *(root / path for root in self.roots)]
        good = [p for p in (one.resolve() for one in tries) if any(p.is_relative_to(root) for root in self.roots)]
        if not good:
            below = ", ".join(map(str, self.roots))
            raise ValueError(f"{what} {told!r}: not below the folders that the studio was started with ({below})")
        return next((p for p in good if p.exists()), good[0])

    def folder(self, text: str | Path | None, what: str = "folder") -> Path:
        """`inside`, of a folder that is there."""
        path = self.inside(text, what)
        if not path.is_dir():
            raise ValueError(f"{what} {str(text)!r}: no such folder")
        return path

    def model(self, text: str | None, what: str = "model") -> str:
        """A model's name as commands take it: a shipped one's or a hub's as it is, a path only below the folders."""
        told = (text or "").strip()
        if not told:
            raise ValueError(f"{what}: none is given")
        looks_like_path = told.startswith(("/", ".", "~")) or told.count("/") != 1
        if ("/" in told or "\\" in told or Path(told).exists()) and (looks_like_path or Path(told).exists()):
            return self.short(self.inside(told, what))
        return told

    def encoder(self, text: str | None) -> str:
        """An image encoder as `model`, or open_clip:ARCH:WEIGHTS; "" is the command's own."""
        told = (text or "").strip()
        if not told.startswith("open_clip:"):
            return self.model(told, "image encoder") if told else ""
        weights = told.partition(":")[2].rpartition(":")[2]
        if weights.startswith("~") or "/" in weights or Path(weights).exists():
            self.inside(weights, "image encoder")
        return told

    def short(self, path: Path) -> str:
        """As it is typed: relative where that is below the working folder."""
        here = Path.cwd()
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    def pictures(self) -> list[str]:
        """Folders that hold pictures, but no runs; the one that the page was started in last."""
        found = {self.short(folder) for folder, files in self._walk() if any(_is_picture(f) for f in files)}
        return sorted(found, key=lambda name: (name == ".", name))

    def sets(self) -> list[str]:
        """Data sets that `ldm data build` made."""
        return sorted(self.short(folder) for folder, files in self._walk() if "manifest.json" in files)

    def file(self, text: str | Path | None, what: str) -> str:
        """`inside`, of a file that is there, as it is typed."""
        path = self.inside(text, what)
        if not path.is_file():
            raise ValueError(f"{what} {str(text)!r}: no such file")
        return self.short(path)

    def files(self) -> list[str]:
        """Weights in files of their own: LoRAs, embeddings, single files."""
        found = {self.short(folder / f) for folder, files in self._walk() for f in files if f.endswith(MODELS)}
        return sorted(found)

    def models(self) -> list[str]:
        """Folders of diffusers."""
        return sorted(self.short(folder) for folder, files in self._walk() if "model_index.json" in files)

    def _walk(self) -> Iterator[tuple[Path, list[str]]]:
        seen = 0
        for root in self.roots:
            for name, folders, files in os.walk(root):
                folder = Path(name)
                if folder.is_relative_to(self.runs) or folder.is_relative_to(self.drawn):
                    folders[:] = []
                    continue
                deep = len(folder.relative_to(root).parts)
                folders[:] = sorted(f for f in folders if not _passed_over(f)) if deep < DEEP else []
                seen += 1
                if seen > MOST:
                    return
                yield folder, files


def _passed_over(name: str) -> bool:
    return name.startswith((".", "__")) or name in ("node_modules", "site-packages")


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
