"""Drawing with a model, planned: its parts on the meta device, and the settings with which it fits into a card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ldm.models.fit import tokens, told
from ldm.models.text import (
    QwenConfig,
    TextEncoder,
    TextPrecision,
    TextTower,
    check_text_precision,
    in_int8,
    text_bytes,
    text_dtype,
)
from ldm.pipeline.conditioning import PREPARED_BYTES
from ldm.plan.cards import Answer, Search, Setting, Tried, Way, card_of, find
from ldm.plan.drawing import Drawing, needs
from ldm.plan.hardware import GB
from ldm.plan.streaming import Streamed, halving
from ldm.plan.throughput import Cluster
from ldm.plan.trace import Trace, without_gradients
from ldm.precision import DTYPES
from ldm.recipes import planned_models
from ldm.sampling.registry import lookup


@dataclass(frozen=True, kw_only=True)
class How:
    """The options of `ldm sample` that change what drawing takes; None: as there. `size`: the side in pixels."""

    precision: str = "fp32"
    text_precision: TextPrecision | None = None
    size: int | None = None
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    slices: bool = False
    offload: bool = False
    places: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"--precision: {self.precision!r} is not one of {list(DTYPES)}")
        for name in ("count", "size", "steps", "places"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = {"places": "blocks-on-device"}.get(name, name)
                raise ValueError(f"--{option} must be at least 1, got {value}")
        if self.offload and self.places is not None:
            raise ValueError("--offload moves the network whole and --blocks-on-device by its blocks: give one of both")


class Model:
    """A model that is drawn with; what does not change with the placement of its parts is counted once."""

    def __init__(self, source: str) -> None:
        self.warnings: list[str] = []
        self.source = source
        self._base = planned_models.whole(source, "--sample", self.warnings)
        self._known: dict[Any, Any] = {}

    def of(self, how: How, cluster: Cluster) -> Tried:
        """What drawing takes on one device of a cluster."""
        if how.text_precision is not None:
            check_text_precision(how.text_precision, [one.config for one in self._base.text], "--text-precision")
        return needs(self._drawing(how, cluster), cluster, apart=how.offload, places=how.places)

    def least(self, how: How, cluster: Cluster) -> float:
        """Bytes without activations."""
        nothing = Trace(batch=1, ops=(), peak=0, peak_kept=0, gradients=0)
        text, vae = sum(text_bytes(one, _text(how)) for one in self._base.text), self._vae()
        bare = Drawing(
            network=self._network(how.precision)[1], text=text, vae=vae, encoding=nothing, calling=nothing,
            decoding=nothing, decodings=1, count=how.count, steps=1, calls=1, half=how.precision != "fp32",
        )  # fmt: skip
        return needs(bare, cluster, apart=how.offload, places=how.places).total

    def settings(self, how: How) -> list[Setting]:
        """What may be tried, in the order in which it is."""
        found = []
        if how.precision == "fp32":
            found.append(Setting(kind="precision", words=("--precision=bf16",)))
        if how.count > 1 and not how.slices:
            found.append(Setting(kind="slices", words=("--vae-slices",)))
        if how.places is None and not how.offload:
            found.append(Setting(kind="placement", words=("--offload",)))
        if how.text_precision != "int8" and any(in_int8("int8", one.config) for one in self._base.text):
            found.append(Setting(kind="text", words=("--text-precision=int8",), lossy=True))
        blocks = how.places or len(list(self._base.network.blocks()))
        found += [Setting(kind="placement", words=(f"--blocks-on-device={n}",)) for n in halving(blocks)]
        return found

    def alone(self, how: How, cluster: Cluster) -> Answer:
        """What drawing takes as it is asked for."""
        found = Way(settings=(), needs=self.of(how, cluster))
        limit = cluster.hardware.memory * GB * cluster.assumptions.usable
        return Answer(
            name=self._title(how), limit=limit, card=card_of(cluster), before=found.needs,
            way=found if found.needs.total <= limit else None, closest=found, warnings=tuple(self.warnings),
        )  # fmt: skip

    def answer(self, how: How, cluster: Cluster) -> Answer:
        """The options with which pictures can be drawn on a card."""
        limit = cluster.hardware.memory * GB * cluster.assumptions.usable
        with_words = lambda of: lambda words: of(_with(how, words), cluster)  # noqa: E731
        search = Search(with_words(self.of), with_words(self.least), limit)
        way, closest, other = find(search, self.settings(how))
        before = Tried(parts={"at least": self.least(how, cluster)}, minutes=None)
        return Answer(
            name=self._title(how), limit=limit, card=card_of(cluster),
            before=search.needs(()) if search.fits(()) else before, way=way, closest=closest, other=other,
            warnings=tuple(self.warnings),
        )  # fmt: skip

    # --- what is counted ----------------------------------------------------------------------------------------------
    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _title(self, how: How) -> str:
        return f"drawing {how.count} x {self._side(how)} px by {self.source}"

    def _side(self, how: How) -> int:
        return self._base.family.size if how.size is None else how.size

    def _vae(self) -> float:
        vae = self._base.codec.autoencoder
        return 4.0 * sum(p.numel() for p in vae.parameters())

    def _network(self, precision: str) -> tuple[Any, Streamed]:
        def made() -> tuple[Any, Streamed]:
            network = copy.deepcopy(self._base.network).to(DTYPES[precision])
            return network, Streamed.of(network, None)

        return self._once(("network", precision), made)

    def _drawing(self, how: How, cluster: Cluster) -> Drawing:
        gpu, family = not cluster.hardware.host, self._base.family
        side = planned_models.check_size(self._side(how), self._base.codec.factor, "--size")
        guidance = family.guidance if how.guidance is None else how.guidance
        rows = how.count * (2 if guidance != 1 and self._base.network.guidance_width is None else 1)
        at_once = 1 if how.slices else how.count
        return Drawing(
            network=self._network(how.precision)[1], text=sum(text_bytes(one, _text(how)) for one in self._base.text),
            vae=self._vae(),
            encoding=self._once(("text", _text(how), gpu), lambda: _encoding(self._base.text, _text(how), gpu)),
            calling=self._once(("call", how.precision, side, rows, gpu), lambda: self._calling(how, side, rows, gpu)),
            decoding=self._once(("decode", side, at_once, gpu), lambda: self._decoding(side, at_once, gpu)),
            decodings=how.count // at_once, count=how.count, steps=how.steps or family.steps,
            calls=lookup(family.sampler).cost, half=how.precision != "fp32",
        )  # fmt: skip

    def _calling(self, how: How, side: int, rows: int, gpu: bool) -> Trace:
        network, dtype = self._network(how.precision)[0], DTYPES[how.precision]
        configs = tuple(one.config for one in self._base.text)
        x = torch.empty(rows, network.in_channels, side, side, device="meta")
        # Text is of the encoders' type; what the network is told of sizes is float32.
        cond = {k: v.to(dtype) if k.startswith("text") else v for k, v in told(network, configs, rows).items()}
        count = sum(v.shape[1] for k, v in cond.items() if k.partition(".")[0] == "text")
        keeps = 0 < 4 * network.prepared_numbers(rows, count) <= PREPARED_BYTES

        def call() -> Any:
            ready = network.prepared(cond) if keeps else cond
            return network(x, torch.empty(rows, device="meta"), ready)

        return without_gradients(call, rows, precision=torch.float32, gpu=gpu)

    def _decoding(self, side: int, count: int, gpu: bool) -> Trace:
        z = torch.empty(count, self._base.codec.channels, side, side, device="meta")
        vae = self._base.codec.autoencoder
        return without_gradients(lambda: vae.decode(z), count, precision=torch.float32, gpu=gpu)


def _text(how: How) -> TextPrecision:
    return how.text_precision or how.precision  # type: ignore[return-value] (checked: fp32, bf16 or fp16)


def _with(how: How, words: tuple[str, ...]) -> How:
    """With options of `ldm sample` added, as they are written."""
    changes: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        key = {"--precision": "precision", "--text-precision": "text_precision", "--vae-slices": "slices",
               "--offload": "offload", "--blocks-on-device": "places"}[name]  # fmt: skip
        changes[key] = True if not value else int(value) if key == "places" else value
    if "places" in changes:
        changes["offload"] = False
    return replace(how, **changes)


def _encoding(text: Sequence[TextEncoder], precision: TextPrecision, gpu: bool) -> Trace:
    """Of one prompt as long as it may be, by the encoder that takes most."""
    found = [_encoded(one, precision, gpu) for one in text if next(one.parameters(), None) is not None]
    most = max(found, key=lambda t: t.peak)
    return replace(most, ops=tuple(op for one in found for op in one.ops))


def _encoded(encoder: TextEncoder, precision: TextPrecision, gpu: bool) -> Trace:
    own, count = copy.deepcopy(encoder), tokens(encoder.config)
    own = own.quantize_8bit() if in_int8(precision, own.config) else own.to(text_dtype(precision))
    if isinstance(own, TextTower):
        ids = torch.zeros(1, count, dtype=torch.int64, device="meta")
        return without_gradients(lambda: own.model(ids), 1, precision=torch.float32, gpu=gpu)
    states = torch.empty(1, count, encoder.table.embedding_dim, device="meta", dtype=text_dtype(precision))
    # Qwen3 would look into a mask of tokens, where there are no numbers; a whole one it takes as it is.
    seen = {"attention_mask": states.new_empty(1, 1, count, count)} if isinstance(own.config, QwenConfig) else {}
    call = lambda: own.model(inputs_embeds=states, **seen).last_hidden_state  # noqa: E731
    return without_gradients(call, 1, precision=torch.float32, gpu=gpu)
