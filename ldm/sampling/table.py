"""The table of samplers in the documentation, made from `SAMPLERS`."""

from __future__ import annotations

from ldm.sampling.registry import SAMPLERS, SamplerInfo


def _eta(info: SamplerInfo) -> str:
    low, high = info.eta_range
    return f"{low:g} to {high:g}, default {info.eta:g}" if high > low else "none"


def table() -> str:
    """Markdown: a row for each sampler, in order of name."""
    lines = [
        "| sampler | paper | order | stochastic | network calls a step | eta | default times | ends at |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(SAMPLERS):
        info = SAMPLERS[name]
        end = "the data" if info.end == "data" else "the first noise level"
        kind = "yes" if info.stochastic else "if eta > 0" if info.eta_range[1] > 0 else "no"
        cells = [f"`{name}`", info.paper, str(info.order), kind, f"{info.cost:g}", _eta(info), info.spacing, end]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
