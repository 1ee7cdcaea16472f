"""The gallery page: self-contained, escaped, well-formed, with its pictures unharmed."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.demo.page import DemoResults, RetrievalFigure, build, write_demo_page
from ldm.web import chart
from ldm.web.gallery import Bar, Curve, Fact, Gallery, Picture

VOID = {"meta", "img", "br", "line", "path"}


class Outline(HTMLParser):
    """Tags, attributes and text; fails on a tag closed in the wrong order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


def picture(level: int = 120, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (level, 40, 200))


def page() -> Gallery:
    gallery = Gallery("A <title> & more", "What `x_t` is.")
    gallery.hero([picture(), Picture(picture(7), "one")]).facts([Fact("9 ×", "chance", "of 64")])
    section = gallery.section("The data", "First.\n\nSecond <b>.")
    section.grid([Picture(picture(), 'a "quoted" caption', "0.91"), None]).heading("More").text("A remark.")
    section.matrix({"ddim": [picture(), None], "euler": [picture(3), picture(4)]}, ["1 step", "2 steps"], divide=True)
    section.curve([Curve("run", range(50), [1 / (i + 1) for i in range(50)], smooth=0.9)], "step", "loss", log_y=True)
    section.bars([Bar("ours", 14.7, 11, 19, 1.56, "9.4 × chance")])
    section.table(["what", "time"], [["train", 3.14159], ["sample", 2]]).command("ldm sample 'a <b>'")
    return gallery.footer("Licence: MIT")


def test_the_page_asks_for_nothing() -> None:
    """No address anywhere in what a browser would load, and a policy that forbids it."""
    html = page().html()
    outline = Outline(html)
    for tag, attributes in outline.tags:
        for name, value in attributes.items():
            if name in {"src", "href", "data", "action", "srcset", "poster", "xlink:href"}:
                assert (value or "").startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp", html)
    assert not outline.all("link")
    policy = [m["content"] or "" for m in outline.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert policy[0].startswith("default-src 'none'")


def test_text_is_escaped() -> None:
    outline = Outline(page().html())
    assert "A <title> & more" in outline.words
    assert "Second <b>." in outline.words
    assert "ldm sample 'a <b>'" in outline.words
    assert not outline.all("b") or len(outline.all("b")) == 1  # the fact's own
    assert 'a "quoted" caption' in [a.get("alt") for a in outline.all("img")]
    assert "x_t" in outline.words
    assert "`" not in outline.words


def test_every_link_has_its_section() -> None:
    gallery = page()
    gallery.section("Samplers & steps")
    outline = Outline(gallery.html())
    anchors = {a["id"] for a in outline.all("section")}
    assert {(a["href"] or "")[1:] for a in outline.all("a")} == anchors == {"the-data", "samplers-steps"}
    with pytest.raises(ValueError, match="section 'The data': there is one of that name already"):
        gallery.section("The data")


def decoded(source: str | None) -> Image.Image:
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_pictures_survive() -> None:
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype("uint8")
    outline = Outline(Gallery("x").hero([Image.fromarray(smooth)]).html())
    shown = [decoded(a["src"]) for a in outline.all("img") if (a["src"] or "").startswith("data:image/webp")]
    assert len(shown) == 1
    error = np.abs(np.asarray(shown[0].convert("RGB"), dtype=float) - smooth)
    assert error.mean() < 4


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    html = Gallery("x").hero([clear]).html()
    shown = decoded(next(a["src"] for a in Outline(html).all("img") if "webp" in (a["src"] or "")))
    assert np.asarray(shown.convert("RGB")).min() > 250


def test_a_page_is_the_same_twice_and_written_whole(tmp_path: Path) -> None:
    path = page().write(tmp_path / "deep" / "gallery.html")
    assert path.read_text(encoding="utf-8") == page().html()
    assert [p.name for p in path.parent.iterdir()] == ["gallery.html"]


def test_mistakes_are_named() -> None:
    section = Gallery("x").section("s")
    with pytest.raises(ValueError, match="matrix row 'ddim': 1 pictures for 2 columns"):
        section.matrix({"ddim": [picture()]}, ["1", "2"])
    with pytest.raises(ValueError, match="table: 1 values for 2 columns in"):
        section.table(["a", "b"], [["x"]])
    with pytest.raises(ValueError, match=r"chart 'loss': no finite point in any of \['run'\]"):
        section.curve([Curve("run", [0, 1], [math.nan, math.inf])], "step", "loss")


def test_numbers_are_set_right() -> None:
    section = Gallery("x").section("s").table(["what", "count", "time"], [["a", 3, "1.5 s"], ["b", "—", "−2 s"]])
    assert section.html.count("class='number'") == 2 + 4
    assert [chart.number(v) for v in (0, 12, 12000, 3.14159, 0.0151, 1234.5)] == [
        "0",
        "12",
        "12\u202f000",
        "3.14",
        "0.0151",
        "1\u202f234",
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1200), (0.013, 0.4), (-2.3, 1.1), (5, 5.001)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = chart.ticks(low, high)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert [y for _, y in chart.smoothed([(i, 3.0) for i in range(5)], 0.99)] == pytest.approx([3.0] * 5)
    raw = [(0, 1.0), (1, 3.0)]
    assert chart.smoothed(raw, 0.0) == raw
    assert chart.smoothed(raw, 0.5)[1][1] == pytest.approx((0.5 * 1 * 0.5 + 0.5 * 3) / 0.75)


def test_a_chart_puts_points_where_they_belong() -> None:
    svg = chart.line_chart([Curve("a", [0, 1, 2], [0.0, 1.0, 0.5])], "x", "y")
    path = re.search(r"d='M([^']+)'", svg)
    assert path
    points = [tuple(map(float, p.split(","))) for p in path.group(1).split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y2 - y1 == pytest.approx((y0 - y1) / 2, abs=0.2)  # down is larger in a drawing


def test_a_long_curve_is_thinned() -> None:
    svg = chart.line_chart([Curve("a", range(100_000), [1.0 + i % 2 for i in range(100_000)])], "x", "y")
    assert len(svg) < 60_000


def demo_results() -> DemoResults:
    one = picture()
    return DemoResults(
        lede="How.",
        hero=[Picture(one, "a red apple")],
        facts=[Fact("5 ×", "chance")],
        data=[Picture(one, "apple")],
        noising={"linear": [one, one], "cosine": [one, one]},
        noising_times=["0", "999"],
        loss=[Curve("loss", [1, 2], [1.0, 0.5])],
        prompts=["a", "b"],
        stages={"before": [one, one], "after": [one, None]},
        retrieval=[RetrievalFigure(label="demo", rate=0.1, low=0.05, high=0.2, chance=1 / 64, images=64)],
        sampler_steps=[1, 1000],
        samplers={"ddim": [one, one], "lcm": [one, None]},
        guidance_scales=[1, 7.5],
        guidance={"a": [one, one]},
        heldout={"new": ([one, one], [one])},
        compositional={"pair": ([one], [one])},
        neighbours=[(Picture(one, "a"), [Picture(one, "near", "0.93")]), (Picture(one, "a"), [])],
        costs=[["training", "1 s", "1 GB", "3"]],
        commands=["ldm demo"],
        footer="MIT",
    )


def test_the_demo_page_has_every_part(tmp_path: Path) -> None:
    outline = Outline(write_demo_page(demo_results(), tmp_path / "g.html").read_text(encoding="utf-8"))
    assert len(outline.all("section")) == 9
    for words in ("1\u202f000 steps", "w = 7.5", "6.4 × chance, n = 64", "0.93", "cosine", "New combinations"):
        assert words in outline.words
    pictures = [a for a in outline.all("img") if a.get("class") == "zoom"]
    assert all(a["alt"] for a in pictures)
    assert len(pictures) == 1 + 1 + 4 + 3 + 3 + 2 + 3 + 2 + 3


def test_absent_parts_leave_no_trace() -> None:
    outline = Outline(build(DemoResults(title="T")).html())
    assert outline.all("section") == outline.all("nav") == []
    assert outline.words.split() == ["T", "ldm", "T"]
