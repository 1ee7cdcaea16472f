"""The page of a run: what is in its log is on the page, also of a run that is being written."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli.__main__ import main
from ldm.web import live, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log = tmp_path / "<b>run</b>" / "log"
    log.mkdir(parents=True)
    rows = [
        {"step": s, "loss": 1 / s if s != 40 else "nan", "lr": 1e-4, "grad_norm": 2.0, "images_per_second": 1234.5,
         "memory_gib": 3.0, "seconds_left": 7260.0, "utilisation": 0.42, "cost": 17.125}
        for s in range(10, 110, 10)
    ]  # fmt: skip
    rows.insert(5, {"step": 50, "validation_loss": 0.5})
    rows.append({"step": 100, "validation_loss": 0.25})
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 110, "lo'
    (log / "metrics.jsonl").write_text(text)
    (log / "events.jsonl").write_text(json.dumps({"step": 70, "event": "rollback", "from": 82, "ahead": 12}) + "\n")
    (log.parent / "config.yaml").write_text("name: <i>x</i>\ntrain:\n  steps: 4000\n")
    samples = log.parent / "samples"
    samples.mkdir()
    for step in range(0, 1000, 50):
        Image.new("RGB", (8, 8), (step // 4, 0, 0)).save(samples / f"step-{step:07d}.png")
    return log.parent


def test_figures_are_the_last_ones(folder: Path) -> None:
    found = {f.label: f for f in run.facts(run.read(folder))}
    assert (found["steps"].value, found["steps"].note) == ("100", "of 4\u202f000")
    assert (found["loss"].value, found["loss"].note) == ("0.01", "held out 0.25")
    assert (found["images a second"].value, found["images a second"].note) == ("1\u202f234", "42% of the peak")
    assert found["left at this pace"].value == "2 h 1 min"
    assert found["cost so far"].value == "17.12"


def test_curves_leave_out_what_is_no_number(folder: Path) -> None:
    rows = run.read(folder).rows
    found = run.curve(rows, "loss", "training")
    assert found is not None
    assert list(zip(found.x, found.y)) == [(float(s), 1 / s) for s in range(10, 110, 10) if s != 40]
    assert run.curve(rows, "nothing", "") is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (181, "3 min"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert run.duration(seconds) == text


def test_the_page_is_whole_and_asks_for_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "run", str(folder), "--samples", "4"]) == 0
    assert "step 100" in capsys.readouterr().out
    html = (folder / "run.html").read_text()
    assert "<b>run" not in html
    assert "<i>x" not in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    steps = re.findall(r"<figcaption>step (\d+)", html)
    assert steps == ["950", "650", "300", "0"]  # 4 of 20, evenly, the last first
    for title in ("Samples", "Loss", "Gradient norm", "Utilisation", "Events", "Config"):
        assert f"{title}</h2>" in html
    assert "Loss by noise level" not in html
    assert "rollback" in html
    (folder / "done.json").write_text("{}")
    assert "finished and exported" in run.page(run.read(folder)).html()


def test_mistakes_are_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "run", str(tmp_path)]) == 2
    assert "no log/metrics.jsonl" in capsys.readouterr().err
    assert main(["show", "run", str(tmp_path), "--samples", "0"]) == 2
    assert "--samples must be at least 1" in capsys.readouterr().err


def test_a_live_page_follows_the_run(folder: Path) -> None:
    server = live.Server(folder, 4, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"

    def get(path: str = "") -> str:
        with urllib.request.urlopen(address + path) as answer:
            return answer.read().decode()

    try:
        first, before = get(), get("state")
        assert before in first  # the page knows what it shows
        assert get("state") == before
        assert "connect-src 'self'" in first
        with (folder / "log" / "metrics.jsonl").open("a") as file:
            file.write('\n{"step": 120, "loss": 0.125}\n')
        assert get("state") != before
        assert "<b>120</b>" in get()
        assert "<b>120</b>" not in first
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("../log/metrics.jsonl")
    finally:
        server.shutdown()
        server.server_close()


def test_a_live_page_before_the_first_step(tmp_path: Path) -> None:
    assert "first step is not made yet" in live.page(tmp_path, 4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--port", "-1"], "--port"), (["--out", "x.html"], "--out"), (["--samples", "0"], "--samples")],
)
def test_mistakes_about_live_pages(folder: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["show", "run", str(folder), "--live", *argv]) == 2
    assert words in capsys.readouterr().err
    assert main(["show", "run", str(folder / "no"), "--live"]) == 2
    assert "no such folder" in capsys.readouterr().err
