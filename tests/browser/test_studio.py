"""The studio in a browser: from a folder of five emoji to a picture of the LoRA, through the page alone.

LDM_SHOTS=FOLDER keeps pictures of the page.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ldm.web import live
from ldm.web.studio.drawing import record
from ldm.web.studio.queue import Queue
from tests.browser.conftest import Served, environment, serve

SLOW = 90_000
"""Milliseconds, on a busy machine."""


def shot(page: Any, name: str) -> None:
    if told := os.environ.get("LDM_SHOTS"):
        page.wait_for_timeout(700)
        Path(told).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(told) / f"{name}.png", full_page=True)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def fits(page: Any) -> None:
    """Nothing is wider than the page."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def write(page: Any, where: str, text: str) -> None:
    field = page.locator(f"{where} input, {where} textarea").first
    field.fill(text)
    field.blur()


def press(page: Any, button: str, then: str, seconds: float = 10) -> None:
    """Click until what follows is there: a page that was loaded a moment ago may not listen yet."""
    from playwright.sync_api import Error

    end = time.monotonic() + SLOW / 1000
    while True:
        page.click(button)
        try:
            page.locator(then).first.wait_for(timeout=1000 * seconds)
            return
        except Error:
            assert time.monotonic() < end, f"{button}: {then} never came"


def choose(page: Any, where: str, text: str) -> None:
    page.fill(f"{where} input", text)
    page.keyboard.press("Enter")


def wait(condition: Any, seconds: float = SLOW / 1000) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
    return found


def same(a: Path, b: Path) -> bool:
    """Equal pictures, but for rare roundings: MKL's sums depend on where in memory an array happens to lie."""
    first, second = (np.asarray(Image.open(path).convert("RGB"), int) for path in (a, b))
    return first.shape == second.shape and np.abs(first - second).max() <= 1 and (first != second).mean() < 1e-3


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """A run after its first steps that makes no more inside: a fast machine would be done before the page looks."""
    log = run / "log" / "metrics.jsonl"
    wait(lambda: log.is_file() and log.stat().st_size)
    job = Queue(run.parent).of(run)
    assert job is not None
    trainer = psutil.Process(job.pid).children(recursive=True)
    for process in trainer:
        process.suspend()
    try:
        yield
    finally:
        for process in trainer:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def test_from_a_folder_to_a_picture(browser: Any, folder: Path) -> None:
    studio = serve(folder)
    try:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(SLOW)
        errors: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(studio.address)
        data(page, folder)
        train(page, folder)
        page = again(browser, page, studio, folder)
        draw(page, folder)
        models(page, folder)
        narrow(page)
        assert errors == []
        assert {url for url in requests if not url.startswith((studio.address, "data:", "blob:"))} == set()
    finally:
        Queue(folder / "runs")
        studio.stop()
    assert "Traceback" not in (folder / "studio.log").read_text()


def data(page: Any, folder: Path) -> None:
    """A wrong folder is one line; captions are edited in place, and all at once."""
    page.wait_for_selector("#caption-4 textarea", state="visible")
    choose(page, "#data-folder", "nowhere")
    press(page, "#data-open", "#data-said .err")
    assert page.inner_text("#data-said .err") == "folder 'nowhere': no such folder"
    choose(page, "#data-folder", "/etc")
    press(page, "#data-open", "text=not below the folders")
    end = time.monotonic() + SLOW / 1000
    while not page.locator("#data-said .cmd").count():  # the list of folders may take what was typed a moment later
        assert time.monotonic() < end
        choose(page, "#data-folder", "cats")
        page.wait_for_timeout(500)
        page.click("#data-open")
        page.wait_for_timeout(5000)
    assert "5\npictures" in page.inner_text("#data-figures")
    write(page, "#caption-0", "a cat, crying with joy")
    wait(lambda: "a cat, crying with joy\n" in [p.read_text() for p in folder.glob("cats/*.txt")], 60)
    page.get_by_text("Change all captions").click()
    write(page, "#data-trigger", "mycat")
    page.click("#data-add")
    page.get_by_text("ldm data captions cats --trigger mycat").wait_for()
    assert all(p.read_text().startswith("mycat, ") for p in folder.glob("cats/*.txt"))
    assert page.input_value("#caption-0 textarea") == "mycat, a cat, crying with joy"
    shot(page, "data")


def train(page: Any, folder: Path) -> None:
    """The plan stands beside the settings; the run begins, is stopped and saved."""
    tab(page, "Train")
    page.wait_for_selector("#train-plan .facts")
    assert re.search(r"\d MB\s+memory", page.inner_text("#train-plan"))
    for name, value in (("steps", "80"), ("batch", "1"), ("every", "40"), ("name", "mycat")):
        write(page, f"#train-{name}", value)
    command = page.get_by_text(re.compile("ldm finetune lora --images cats --base emoji --out runs/mycat --steps 80"))
    command.first.wait_for()
    shot(page, "train")
    press(page, "#train-start", "text=queued; the tab Watch follows it", 30)
    tab(page, "Watch")
    with held(folder / "runs" / "mycat"):
        page.wait_for_selector("#watch-sample img")  # of step 0
        page.wait_for_selector("#watch-head .dot.trains")
        page.click("#watch-now")
        page.wait_for_selector("#watch-said .cmd, #watch-said .err")
        page.click("#watch-stop")
        page.wait_for_selector("#watch-said :text('kill -TERM')")
    page.locator("#watch-head", has_text="stopped, saved").wait_for()
    assert not (folder / "runs" / "mycat" / "done.json").exists()
    assert list((folder / "runs" / "mycat" / "checkpoints").glob("step-*"))


def again(browser: Any, page: Any, studio: Served, folder: Path) -> Any:
    """Another page finds the run and lets it go on; it ends although that page is closed."""
    page.reload()
    tab(page, "Watch")
    press(page, "#watch-again", "#watch-head .dot.trains, #watch-head .dot.prepares", 30)
    address = page.url
    page.goto("about:blank")
    wait(lambda: (folder / "runs" / "mycat" / "done.json").exists())
    page.goto(address)
    tab(page, "Watch")
    page.locator("#watch-head", has_text="finished").wait_for()
    page.wait_for_selector("#watch-charts svg")
    page.wait_for_selector("#watch-sample img")
    assert "Step 80" in page.inner_text("#watch-sample")
    slider = page.locator("#watch-slider input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    page.get_by_text("Step 0 ").wait_for()
    page.keyboard.press("End")
    shot(page, "watch")
    assert (folder / "runs" / "mycat" / "log" / "metrics.jsonl").read_text().count('"step": 80,') == 1
    return page


def draw(page: Any, folder: Path) -> None:
    """Pictures are those of the command that is shown; one is drawn again; base and tuned stand side by side."""
    tab(page, "Draw")
    wait(lambda: page.input_value("#draw-model input") == "runs/mycat", 60)  # which is new
    write(page, "#draw-prompt", "")
    page.click("#draw-draw")
    page.get_by_text("prompt: it is empty").wait_for()
    write(page, "#draw-prompt", "mycat, grinning cat")
    for name, value in (("steps", "4"), ("seed", "3"), ("count", "2")):
        write(page, f"#draw-{name}", value)
    page.click("#draw-draw")
    page.wait_for_selector("#draw-said .cmd")
    page.wait_for_selector("#draw-gallery img")
    drawn = sorted(folder.glob("drawn/*/[0-9]*.png"))
    assert len(drawn) == 2
    command = shlex.split(page.inner_text("#draw-said .cmd"))[1:]
    command[command.index("--out") + 1] = "typed"
    subprocess.run([sys.executable, "-m", "ldm.cli", *command], cwd=folder, env=environment(), check=True)
    typed = sorted(folder.glob("typed/[0-9]*.png"))
    for path, own in zip(drawn, typed, strict=True):
        assert same(path, own)
        assert record(path)["weights"] == record(own)["weights"]
    page.locator("#draw-gallery button.thumbnail-item").nth(1).click()
    page.wait_for_selector("#draw-settings table")
    assert "dpmpp_2m" in page.inner_text("#draw-settings")
    shot(page, "draw")
    page.click("#draw-redraw")
    page.get_by_text("--index 1").wait_for()
    third = wait(lambda: sorted(folder.glob("drawn/*/[0-9]*.png"))[2:])[0]
    assert record(third)["index"] == 1
    assert same(third, drawn[1])
    side_by_side(page, folder, drawn[0])
    several(page, folder)


def side_by_side(page: Any, folder: Path, drawn: Path) -> None:
    """Base and tuned on the same noise; then a part of the base's picture is painted over and drawn anew."""
    page.get_by_text("Compare", exact=True).click()
    page.get_by_text("tuned beside its base").click()
    write(page, "#draw-count", "1")
    page.click("#draw-draw")
    page.get_by_text("tuned: mycat").first.wait_for()
    base, tuned = sorted(folder.glob("drawn/*/[0-9]*.png"))[3:5]
    assert (record(base)["model"], record(tuned)["model"]) == ("emoji", "runs/mycat")
    assert same(tuned, drawn)
    shot(page, "compare")
    page.get_by_text("off", exact=True).click()
    page.locator("#draw-gallery button.thumbnail-item").nth(0).click()
    page.click("#draw-onward")
    page.get_by_text("It is the picture to start from").wait_for()
    canvas = page.locator("#draw-editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1] + 10, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.click("#draw-draw")
    page.get_by_text("ldm edit inpaint").wait_for()
    shot(page, "inpaint")
    painted = max(folder.glob("drawn/*/[0-9]*.png"), key=lambda p: p.stat().st_mtime)
    assert record(painted)["command"][:2] == ["edit", "inpaint"]
    mask = np.asarray(Image.open(folder / record(painted)["command"][3]))
    assert 0 < (mask > 0).mean() < 0.9
    before, after = (np.asarray(Image.open(p).convert("RGB"), int) for p in (base, painted))
    changed = np.abs(before - after).max(2) > 0
    assert changed[mask > 127].any()
    assert not changed[mask == 0].any()


def several(page: Any, folder: Path) -> None:
    """Two LoRAs with weights and an embedding redraw the whole of a picture, as the command that is shown does."""
    words = np.random.default_rng(0).normal(scale=0.02, size=(1, 192)).astype(np.float32)
    save_file({"<meow>": words}, folder / "meow.safetensors")
    page.locator("#draw-gallery button.thumbnail-item, #draw-gallery .thumbnails button").first.click()
    page.get_by_text("An edited picture is drawn again with all of its command").wait_for()
    assert page.is_disabled("#draw-redraw")
    assert page.is_disabled("#draw-use")
    page.click("#draw-onward")
    page.get_by_text("It is the picture to start from").wait_for()
    page.get_by_text("LoRAs and embeddings").click()
    choose(page, "#draw-model", "emoji")
    for k, (lora, weight) in enumerate((("runs/mycat", "0.5"), ("runs/mycat/export/kohya.safetensors", "-0.25"))):
        choose(page, f"#draw-lora-{k}", lora)
        page.fill(f"#draw-weight-{k} input[type=number]", weight)
        page.keyboard.press("Tab")
    choose(page, "#draw-embeddings", "meow.safetensors")
    page.keyboard.press("Escape")
    write(page, "#draw-prompt", "a <meow> cat")
    page.wait_for_timeout(1000)
    page.click("#draw-draw")
    page.get_by_text("ldm edit img2img").wait_for()
    shot(page, "several")
    command = shlex.split(page.inner_text("#draw-said .cmd"))[1:]
    told = "--lora runs/mycat:0.5 --lora runs/mycat/export/kohya.safetensors:-0.25 --embedding meow.safetensors"
    assert told in shlex.join(command)
    drawn = max(folder.glob("drawn/*-*/[0-9]*.png"), key=lambda p: p.stat().st_mtime)
    assert record(drawn)["command"] == command
    command[command.index("--out") + 1] = "typed_edit"
    subprocess.run([sys.executable, "-m", "ldm.cli", *command], cwd=folder, env=environment(), check=True)
    assert same(drawn, folder / "typed_edit" / "0000.png")


def models(page: Any, folder: Path) -> None:
    """The LoRA as kohya's file, which loads."""
    tab(page, "Models")
    page.get_by_text("LoRA file in kohya's form").click()
    page.click("#models-export")
    page.get_by_text("kohya, LoRA on").wait_for()
    shot(page, "models")
    from safetensors import safe_open

    with safe_open(folder / "runs" / "mycat" / "for_kohya.safetensors", "np") as file:
        names = list(file.keys())
    assert names
    assert all(name.startswith("lora_unet_") for name in names)


def narrow(page: Any) -> None:
    """A telephone."""
    page.set_viewport_size({"width": 375, "height": 800})
    for name in ("Data", "Train", "Watch", "Draw", "Models"):
        if not page.get_by_role("tab", name=name).is_visible():
            page.locator(".overflow-menu button").first.click()
            page.locator(".overflow-dropdown button", has_text=name).click()
        else:
            tab(page, name)
        page.wait_for_timeout(300)
        fits(page)
        shot(page, f"narrow_{name.lower()}")


def test_a_live_page_follows(browser: Any, tmp_path: Path) -> None:
    """`ldm show run RUN --live` in a browser: new figures come by themselves."""
    log = tmp_path / "log" / "metrics.jsonl"
    log.parent.mkdir()
    server = live.Server(tmp_path, 4, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    try:
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.get_by_text("first step is not made yet").wait_for()
        for steps in (2, 3):
            rows = [{"step": 10 * s, "loss": 1 / s, "lr": 1e-4} for s in range(1, steps + 1)]
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
            page.locator(".fact b", has_text=str(10 * steps)).wait_for()
        assert page.locator("svg").count() == 2  # loss and learning rate
    finally:
        page.close()
        server.shutdown()
        server.server_close()


def test_another_host_needs_the_token(folder: Path) -> None:
    studio = serve(folder, "--host", "0.0.0.0", "--token", "0123456789abc")
    try:
        for wrong in ("", "?token=0123456789abd", "gradio_api/file=" + str(folder / "cats")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(studio.address + wrong)
            assert refused.value.code == 401
        with urllib.request.urlopen(studio.address + "?token=0123456789abc") as answer:
            cookie = answer.headers["set-cookie"].partition(";")[0]
        asked = urllib.request.Request(studio.address + "config", headers={"cookie": cookie})
        assert urllib.request.urlopen(asked).status == 200
        outside = urllib.request.Request(studio.address + "gradio_api/file=/etc/passwd", headers={"cookie": cookie})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(outside)
        assert refused.value.code in (403, 404)
    finally:
        studio.stop()
