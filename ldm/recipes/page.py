"""A run's page: the pictures it learnt from, the same prompts and noise before and after."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from ldm.checkpoint import files
from ldm.data.grid import sheet
from ldm.data.images import resize
from ldm.recipes.pictures import first

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
figure{display:inline-block;margin:0 1rem 1rem 0;vertical-align:top}img{max-width:100%;min-width:14rem;
image-rendering:pixelated;border-radius:4px}figcaption{font-size:.85rem;color:#555}details img{min-width:8rem}"""


def write_page(out: Path, images: Path | None, prompts: Sequence[str]) -> Path:
    """Write `page.html` into a run folder from its sample grids."""
    grids = sorted((out / "samples").glob("step-*.png"))
    parts = ["<!doctype html><meta charset=utf-8>", f"<title>{html.escape(out.name)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{html.escape(out.name)}</h1>")
    if images is not None:
        sheet([resize(p, (96, 96), "pad") for p in first(images, 16)], 8).save(out / "pictures.png")
        parts.append(_figure("pictures.png", "what it learnt from"))
    if grids:
        steps = [int(p.stem.rpartition("-")[2]) for p in grids]
        parts.append("<h2>The same prompts and noise</h2>")
        if len(grids) > 1:
            parts.append(_figure(f"samples/{grids[0].name}", "before" if steps[0] == 0 else f"after {steps[0]} steps"))
        parts.append(_figure(f"samples/{grids[-1].name}", f"after {steps[-1]} steps"))
        parts.append("<ol>" + "".join(f"<li>{html.escape(p) or '(empty)'}</li>" for p in prompts) + "</ol>")
        between = "".join(
            _figure(f"samples/{p.name}", f"step {s}") for p, s in zip(grids[1:-1], steps[1:-1], strict=True)
        )
        parts += [f"<details><summary>Between</summary>{between}</details>"] if between else []
    files.write_text(out / "page.html", "\n".join(parts) + "\n")
    return out / "page.html"


def _figure(source: str, caption: str) -> str:
    return f'<figure><img src="{html.escape(source)}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
