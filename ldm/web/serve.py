"""A page to draw from words: prompt -> pictures, in a browser (`ldm serve`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ldm.data.grid import to_pil
from ldm.pipeline import SAMPLERS, Progress, Settings, TextToImage

MOST = 64
"""Pictures of one request."""


def draw(
    pipeline: TextToImage,
    prompt: str,
    *,
    negative: str,
    sampler: str,
    steps: int,
    guidance: float,
    seed: int,
    count: int,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """`count` pictures of one prompt; those of `ldm sample` with the same settings.

    Raises ValueError for an empty prompt, or a value that `Settings` does not allow.
    """
    if not prompt.strip():
        raise ValueError("prompt: it is empty; write what to draw")
    if not 1 <= count <= MOST:
        raise ValueError(f"count: must be in [1, {MOST}], got {count}")
    settings = Settings(sampler=sampler, steps=steps, guidance=guidance, negative=negative, seed=seed)
    return to_pil(pipeline.sample([prompt.strip()] * count, settings=settings, progress=progress))


def build_app(pipeline: TextToImage, title: str, examples: Sequence[str] = ()) -> Any:
    """The gradio page over one model. Raises ValueError when gradio is not installed."""
    gr = check_gradio()
    with gr.Blocks(title=f"ldm: {title}") as app:
        gr.Markdown(f"# {title}\nThe same words and seed give the same picture.")
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox(label="Prompt", value=examples[0] if examples else "", lines=2)
                negative = gr.Textbox(label="Negative prompt")
                sampler = gr.Dropdown(list(SAMPLERS), value="dpmpp_2m", label="Sampler")
                steps = gr.Slider(1, 250, value=25, step=1, label="Steps")
                guidance = gr.Slider(0, 15, value=3.0, step=0.1, label="Guidance")
                seed = gr.Number(value=0, precision=0, label="Seed")
                count = gr.Slider(1, 16, value=4, step=1, label="Pictures")
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=2):
                gallery = gr.Gallery(label="Pictures", columns=4, object_fit="contain", format="png")
        inputs = [prompt, negative, sampler, steps, guidance, seed, count]
        if examples:
            gr.Examples([[text] for text in examples], inputs=[prompt])
        handle = _handler(gr, pipeline)
        button.click(handle, inputs, gallery, api_name="draw", concurrency_limit=1)
        prompt.submit(handle, inputs, gallery, api_name=False, concurrency_limit=1)
    return app


def _handler(gr: Any, pipeline: TextToImage) -> Callable[..., list[Image.Image]]:
    """The page's function: mistakes become the page's messages, steps its progress bar."""

    def handle(
        prompt: str, negative: str, sampler: str, steps: float, guidance: float, seed: float, count: float,
        progress: Any = gr.Progress(),  # noqa: B008 (how gradio hands it in)
    ) -> list[Image.Image]:  # fmt: skip
        try:
            return draw(
                pipeline,
                prompt,
                negative=negative,
                sampler=sampler,
                steps=int(steps),
                guidance=float(guidance),
                seed=int(seed),
                count=int(count),
                progress=lambda done, total: progress((done, total), unit="steps"),
            )
        except ValueError as error:
            raise gr.Error(str(error)) from error

    return handle


def check_gradio() -> Any:
    """The module gradio. Raises ValueError when it is not installed."""
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}); install it with: pip install 'ldm[web]'") from error
