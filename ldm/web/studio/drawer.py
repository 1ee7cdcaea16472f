"""Draws what the page asks for, by `ldm sample` and `ldm edit` in this process, where the models stay loaded."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import progress
from ldm.web.studio import drawing
from ldm.web.studio.drawing import Form, Place
from ldm.web.studio.runs import config_of
from ldm.web.studio.studio import Studio
from ldm.web.studio.words import shown

COMPARE = {"no": "off", "base": "tuned beside its base", "grid": "a grid over one or two settings"}


@dataclass(frozen=True)
class Asked:
    """What the page's fields hold, by their names, and (LoRA, weight) pairs."""

    told: Mapping[str, Any]
    loras: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Drawn:
    """Pictures, what was said beside, and whether it was stopped."""

    pictures: list[Path]
    notes: list[str]
    stopped: bool = False


class Drawer:
    """One person's drawing: one command at a time."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._stop, self._busy = threading.Event(), threading.Lock()

    # --- what is asked ------------------------------------------------------------------------------------------------
    def form(self, asked: Asked) -> Form:
        """The form, with files only below the folders. Raises ValueError."""
        told, places = asked.told, self.studio.places
        width, height = int(told["width"] or 0), int(told["height"] or 0)
        if (width > 0) != (height > 0):
            raise ValueError("size: give width and height, or neither")
        form = Form(
            model=places.model(told["model"]), prompt=told["prompt"] or "", out=self._out(),
            negative=told["negative"] or "", sampler=told["sampler"] or None,
            steps=int(told["steps"]) or None, guidance=float(told["guidance"]) or None, seed=int(told["seed"] or 0),
            count=int(told["count"] or 1), size=(height, width) if width > 0 else None,
            loras=tuple((places.short(places.inside(path, "LoRA")), weight) for path, weight in asked.loras),
            embeddings=tuple(places.short(places.inside(path, "embedding")) for path in told["embeddings"] or ()),
        )  # fmt: skip
        return self._started(form, told["editor"], float(told["strength"]))

    def _started(self, form: Form, editor: Mapping[str, Any] | None, strength: float) -> Form:
        """With the picture of the editor, and the mask of what is painted on it."""
        picture = None if editor is None else editor.get("background")
        if picture is None or picture.convert("RGBA").getchannel("A").getbbox() is None:
            return form
        mask = drawing.mask_of(editor["layers"] if editor is not None else [], picture.size)
        kept = None if mask is None else self._keep(mask)
        # `ldm edit img2img` takes no strength of 1, of which nothing of the picture would be left
        strength = min(strength, 0.99) if mask is None else strength
        return replace(form, picture=self._keep(_plain(picture)), mask=kept, strength=strength)

    def _out(self) -> str:
        return self.studio.places.short(self.studio.places.drawn / time.strftime("%Y-%m-%d"))

    def _keep(self, picture: Image.Image) -> str:
        """A picture of the page as a file, once for the same pixels, so that the command can be run again."""
        held = io.BytesIO()
        picture.save(held, "PNG")
        data = held.getvalue()
        path = self.studio.places.drawn / "inputs" / f"{hashlib.blake2b(data, digest_size=6).hexdigest()}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            path.write_bytes(data)
        return self.studio.places.short(path)

    def places(self, asked: Asked) -> tuple[list[Place], int]:
        """The commands that were asked for, and the columns to show their pictures in. Raises ValueError."""
        form, told = self.form(asked), asked.told
        drawing.command(form)  # refuses what cannot be, before anything is drawn
        if told["compare"] == "base":
            return drawing.beside(form, self._base(form)), form.count if form.count > 1 else 2
        if told["compare"] == "grid":
            return drawing.grid(form, [(told["axis_1"], told["values_1"]), (told["axis_2"], told["values_2"])])
        return [Place("", form)], min(form.count, 4)

    def _base(self, form: Form) -> str:
        """What the model was tuned from; itself where it is no run."""
        if form.loras:
            return form.model
        path = Path(form.model)
        run = path if (path / "config.yaml").is_file() else path.parent
        return str((config_of(run).get("task") or {}).get("base") or form.model)

    # --- drawing ------------------------------------------------------------------------------------------------------
    def typed(self, form: Form) -> str:
        """The command as it is typed."""
        return shown(drawing.command(form))

    def draw(self, form: Form, tell: progress.Told | None = None, more: Sequence[str] = ()) -> Drawn:
        """Run the command. Raises ValueError where it says what is wrong, or while another is drawn."""
        if not self._busy.acquire(blocking=False):
            raise ValueError("another picture is being drawn; stop it first")
        self._stop.clear()

        def told(what: str, done: int, total: int | None) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            if tell is not None:
                tell(what, done, total)

        try:
            said = self.studio.commands.here(drawing.command(form, *more), told)
        except KeyboardInterrupt:
            return Drawn([], ["stopped"], True)
        finally:
            self._busy.release()
        return Drawn(drawing.pictures(said.lines), _notes(said.notes), self._stop.is_set())

    def redraw(self, asked: Asked, path: Path, tell: progress.Told | None = None) -> tuple[Drawn, str]:
        """One picture of a batch from its own noise, with the page's settings; and the command."""
        record = drawing.record(path)
        if whole := drawing.whole_only(record):
            raise ValueError(f"redraw: {whole}")
        form = self.form(asked)
        form = replace(form, prompt=record["prompt"], seed=int(record["seed"]), picture=None, mask=None,
                       count=max(int(record.get("count") or 1), int(record["index"]) + 1))  # fmt: skip
        more = ("--index", str(record["index"]))
        return self.draw(form, tell, more), shown(drawing.command(form, *more))

    def stop(self) -> bool:
        """End the drawing after its step; whether there was one."""
        self._stop.set()
        return self._busy.locked()

    def newest(self, most: int = 8) -> list[Path]:
        """The pictures that were drawn last."""
        found = [p for p in self.studio.places.drawn.glob("*-*-*/[0-9]*.png") if p.is_file()]
        return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)[:most]


def _plain(picture: Image.Image) -> Image.Image:
    """On white, as `ldm edit` reads it."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _notes(text: str) -> list[str]:
    """What a command said beside, without its own name and what only a terminal needs."""
    lines = [line.partition(": ")[2] for line in text.splitlines() if line.startswith(("ldm sample: ", "ldm edit: "))]
    return [line for line in lines if "holds pictures already" not in line]
