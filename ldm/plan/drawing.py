"""Drawing: what a model takes that draws pictures, and how long."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ldm.plan.cards import Tried
from ldm.plan.hardware import GB
from ldm.plan.streaming import Streamed, waited
from ldm.plan.throughput import Cluster, kernels
from ldm.plan.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A model that draws `count` pictures at once, in `steps` of `calls` calls of the network.

    `text` and `vae`: bytes of the encoders and of the autoencoder. `encoding`, `calling` and `decoding`: what one
    prompt, a call of the network and the decoder compute and hold beside weights. `half`: the network's products are.
    """

    network: Streamed
    text: float
    vae: float
    encoding: Trace
    calling: Trace
    decoding: Trace
    decodings: int
    count: int
    steps: int
    calls: float
    half: bool


def needs(drawing: Drawing, cluster: Cluster, *, apart: bool, places: int | None) -> Tried:
    """Bytes at the fullest moment, minutes of a thousand of the sampler's steps, and `picture`: seconds of one picture.

    `apart`: each part is on the device only while it is used, as it is with `places` of the network's blocks.
    """
    network = replace(drawing.network, places=places)
    together = not apart and places is None
    moments = [
        ("text", drawing.text, drawing.encoding.peak),
        ("network", network.held, drawing.calling.peak),
        ("vae", drawing.vae, drawing.decoding.peak),
    ]
    everything = sum(held for _, held, _ in moments)
    if together:
        parts = {name: held for name, held, _ in moments}
        parts |= {"activations": float(max(peak for *_, peak in moments)), "host": 0.0}
    else:
        name, held, peak = max(moments, key=lambda m: m[1] + m[2])
        resting = everything if places is None else everything - network.held + network.host
        parts = {name: held, "activations": float(peak), "host": resting}
    step, once = _times(drawing, network, cluster, moved=0.0 if together else 2 * _moved(drawing, network))
    return Tried(parts=parts, minutes=1000 * step / 60, picture=(drawing.steps * step + once) / drawing.count)


def _moved(drawing: Drawing, network: Streamed) -> float:
    """Bytes that come to the device for a batch, beside the blocks of each call."""
    return drawing.text + drawing.vae + (network.total if not network.moving else 0.0)


def _times(drawing: Drawing, network: Streamed, cluster: Cluster, moved: float) -> tuple[float, float]:
    """Seconds of a step, and of what is done once a batch."""
    slot = cluster.hardware.pcie * GB * cluster.assumptions.pcie
    call = _seconds(drawing.calling, cluster, drawing.half)
    call += waited(network.moved(backward=False), slot, call, network.ahead)
    once = _seconds(drawing.encoding, cluster, drawing.half)
    once += drawing.decodings * _seconds(drawing.decoding, cluster, half=False)
    return drawing.calls * call, once + moved / slot


def _seconds(counted: Trace, cluster: Cluster, half: bool) -> float:
    return kernels([(op, op) for op in counted.ops], 1, 1, 2, cluster, half)
