"""The measurement as Markdown, and its place in a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.gpu.rows import MODES, WHAT

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Key = tuple[str, str, str, str]
Pair = dict[str, dict[str, Any]]


def markdown(record: dict[str, Any]) -> str:
    """Everything that a reader wants of `gpu.json`."""
    machine, rows = record["machine"], record["rows"]
    parts = [_machine(record), _tests(record["tests"])]
    pairs = _pairs(rows)
    training = {k: v for k, v in pairs.items() if k[1] in ("full", "lora", "engine")}
    drawing = {k: v for k, v in pairs.items() if k[1] == "sampling"}
    of = "the makers' bf16 rate" if machine["peak_of"] == "maker" else "the measured bf16 matrix product"
    if training:
        parts += [f"### Training steps\nMFU is of {of}, {machine['peak_tflops']:.3g} TFLOP/s.", _table(training)]
    if drawing:
        parts += ["### Sampling\nLatents; text encoders and the autoencoder's decoder are not in it.", _table(drawing)]
    parts += _scaled(record["scaled"])
    same = [row for row in rows if row["what"] == "same" and row["status"] == "measured"]
    if same:
        told = ", ".join(f"{row['title']} {row['apart']:.0e}" for row in same)
        parts.append(f"One answer of both networks, of the same weights in float32, differs by (relative): {told}.")
    return "\n\n".join([*parts, *_rest(rows)]) + "\n"


def _machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    cuda = f", driver {m['driver']}, CUDA {m['cuda']}, cuDNN {m['cudnn']}" if m["device"] == "cuda" else ""
    quick = " The smallest sizes, to see that it runs: the figures mean nothing." if record["quick"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items() if version)
    return (
        f"**{m['card']}**, {m['memory_bytes'] / 1e9:.1f} GB{cuda}, torch {m['torch']}, Python {m['python']} "
        f"({packages}); {record['made']}, {record['seconds']:.0f} s in all.{quick} Measured: a bf16 matrix product "
        f"{m['measured_tflops']:.3g} TFLOP/s, memory {m['measured_gb_per_s']:.3g} GB/s."
    )


def _tests(tests: dict[str, Any]) -> str:
    told = f"Tests marked `gpu`: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} left out"
    told += f", {tests['seconds']:.0f} s{'; ' if tests['ended'] else ''}{tests['ended']}."
    lines = [f"* failed: `{one['name']}`: {one['why']}" for one in tests["failing"]]
    lines += [f"* left out, {count}: {why}" for why, count in sorted(tests["left_out"].items())]
    return "\n".join([told, *(["", *lines] if lines else [])])


def _pairs(rows: list[dict[str, Any]]) -> dict[Key, Pair]:
    """Measured rows of ours with theirs beside them."""
    found: dict[Key, Pair] = {}
    for row in rows:
        if row["status"] == "measured" and row["what"] != "same":
            found.setdefault((row["title"], row["what"], row["mode"], row["layout"]), {})[row["side"]] = row
    return found


HEAD = (
    "family", "what", "how", "batch", "ldm images/s", "MFU", "peak GB", "planned images/s", "planned GB",
    "diffusers images/s", "GB", "ldm / diffusers",
)  # fmt: skip


def _table(pairs: dict[Key, Pair]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for (title, what, mode, layout), pair in pairs.items():
        mine, other = pair.get("ldm"), pair.get("diffusers")
        any_one = mine or other or {}
        how = MODES[mode] + (", channels_last" if layout == "channels_last" else "")
        batch = f"{any_one['batch']} of {any_one['pixels']} px"
        if mine and other and mine["batch"] != other["batch"]:
            batch = f"{mine['batch']} and {other['batch']} of {any_one['pixels']} px"
        planned = (any_one.get("planned") or {}) if mine else {}
        ratio = mine["images_per_second"] / other["images_per_second"] if mine and other else None
        cells = [
            title, WHAT[what], how, batch, _of(mine, "images_per_second"), _share(mine), _of(mine, "peak_gb"),
            _number(planned.get("images_per_second")), _number(planned.get("peak_gb")),
            _of(other, "images_per_second"), _of(other, "peak_gb"), _number(ratio, "{:.2f}"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(row: dict[str, Any] | None, key: str) -> str:
    return "" if row is None else _number(row[key])


def _share(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["mfu"] is None else f"{100 * row['mfu']:.1f} %"


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def _scaled(scaled: list[dict[str, Any]]) -> list[str]:
    if not scaled:
        return []
    told = "Not measured: the line through the two numbers of blocks above, at 19 + 38 blocks."
    lines = [
        "### FLUX.1 dev whole, scaled",
        told,
        "",
        "| side | what | batch | images/s | GB |",
        "|---|---|---|---|---|",
    ]
    for one in scaled:
        cells = [one["side"], WHAT[one["what"]], str(one["batch"])]
        cells += [_number(one[key]) for key in ("images_per_second", "peak_gb")]
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _rest(rows: list[dict[str, Any]]) -> list[str]:
    failed = [f"* {_name(row)}: {row['why']}" for row in rows if row["status"] == "failed"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "left out":
            reasons.setdefault(row["why"], []).append(_name(row))
    left = [f"* {why}: {len(names)} rows ({'; '.join(names)})" for why, names in reasons.items()]
    found = []
    if failed:
        found.append("\n".join(["Failed:", "", *failed]))
    if left:
        found.append("\n".join(["Left out:", "", *left]))
    return found


def _name(row: dict[str, Any]) -> str:
    layout = ", channels_last" if row["layout"] == "channels_last" else ""
    return f"{row['title']}, {WHAT[row['what']]}, {MODES[row['mode']]}{layout}, {row['side']}"


def insert(page: Path, text: str, option: str = "--docs") -> None:
    """Put the text between a page's marks; a page that is not there becomes the text alone.

    Raises ValueError for a page without the marks.
    """
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        return
    whole = page.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{option}: {str(page)!r} has no lines {BEGIN!r} and {END!r} to write between")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
