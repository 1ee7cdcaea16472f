"""The page of the studio: its tabs, its looks, and how it is served."""

from __future__ import annotations

import importlib
import secrets
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

from ldm.web.serve import check_gradio
from ldm.web.studio.commands import Commands, Main
from ldm.web.studio.places import Places
from ldm.web.studio.queue import Queue
from ldm.web.studio.studio import Studio

COOKIE = "ldm_studio"


def build(places: Places, main: Main) -> Any:
    """The gradio page. Raises ValueError when gradio is not installed."""
    from ldm.web.studio import tab_data, tab_draw, tab_models, tab_train, tab_watch

    gr = check_gradio()
    studio = Studio(places, Commands(main), Queue(places.runs))
    with gr.Blocks(title="ldm studio", analytics_enabled=False) as app:
        gr.HTML("<div class='top'><h1>ldm studio</h1></div>", padding=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Data", id="data"):
                folder, data = tab_data.build(gr, studio)
            with gr.Tab("Train", id="train") as tab:
                train, opened = tab_train.build(gr, studio, folder)
            opened(tab)
            with gr.Tab("Watch", id="watch"):
                watch = tab_watch.build(gr, studio)
            with gr.Tab("Draw", id="draw") as tab:
                draw, opened = tab_draw.build(gr, studio)
            opened(tab)
            with gr.Tab("Models", id="models") as tab:
                models, opened = tab_models.build(gr, studio)
            opened(tab)
        for fill in (data, train, watch, draw, models):
            fill(app)
    return app


def looks(gr: Any) -> dict[str, Any]:
    """Theme and style; no font is fetched from anywhere."""
    fonts = ["Inter", "ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.orange, neutral_hue=gr.themes.colors.stone, font=fonts, font_mono=mono,
        radius_size=gr.themes.sizes.radius_md,
    ).set(button_primary_background_fill="#b3541e", button_primary_background_fill_hover="#97461a",
          button_primary_background_fill_dark="#b3541e", button_primary_text_color="white")  # fmt: skip
    css = (resources.files("ldm.web.studio") / "studio.css").read_text(encoding="utf-8")
    return {"theme": theme, "css": css}


def launch(
    places: Places, main: Main, *, host: str, port: int, token: str | None, ready: Callable[[], None] | None = None,
    wait: bool = True,
) -> Any:  # fmt: skip
    """Serve the page, until interrupted if `wait`. Raises OSError where the port is taken."""
    gr = check_gradio()
    app = build(places, main)
    app.queue(default_concurrency_limit=4)
    kwargs: dict[str, Any] = {}
    if token is not None:
        kwargs["middleware"] = [importlib.import_module("starlette.middleware").Middleware(Guard, token=token)]
    app.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        allowed_paths=[str(root) for root in places.roots], footer_links=[], app_kwargs=kwargs, show_error=False,
        **looks(gr),
    )  # fmt: skip
    if ready is not None:
        ready()
    try:
        while wait:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        if wait:
            app.close()
    return app


class Guard:
    """Lets nobody in without the token: in the address at first, in a cookie from then on."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"].endswith("/startup-events"):
            await self.app(scope, receive, send)
            return
        from http.cookies import SimpleCookie
        from urllib.parse import parse_qs

        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        headers = dict(scope["headers"])
        held = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
        if self._right(given):
            await self.app(scope, receive, self._keeping(send))
        elif held is not None and self._right(held.value):
            await self.app(scope, receive, send)
        else:
            await self._refuse(scope, send)

    def _right(self, told: str) -> bool:
        return secrets.compare_digest(told.encode(), self.token.encode())

    def _keeping(self, send: Any) -> Any:
        cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"

        async def more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
            await send(message)

        return more

    async def _refuse(self, scope: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        text = b"ldm studio: the address needs its token, as `ldm studio` printed it"
        head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": head})
        await send({"type": "http.response.body", "body": text})
