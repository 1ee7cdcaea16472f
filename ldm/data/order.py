"""Who reads what when: a pure function of (shard sizes, seed, epoch, global batch).

The shards are permuted anew for each epoch and laid end to end into a line of N samples. The line is shuffled inside
windows by a keyed permutation (a Feistel network with cycle walking, so nothing is stored), and cut into L equal
lanes. Lane l feeds slots [l G/L, (l+1) G/L) of every global batch of G, so a batch mixes L far-apart places while
each lane reads a few shards at a time. Memory is O(shards); any position costs the same. Ranks divide slots and
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_U64 = NDArray[np.uint64]
_ROUNDS = 5
LANES = 64


def splitmix(x: _U64) -> _U64:
    """The splitmix64 finaliser: a bijection on 64 bits with good avalanche. Arrays wrap silently, as wanted."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(*values: int | Ints | _U64) -> _U64:
    """One 64-bit key from several integers or arrays of them (broadcast)."""
    state = np.zeros(1, np.uint64)
    for value in values:
        word = np.asarray(value).astype(np.int64).view(np.uint64) if not isinstance(value, int) else _word(value)
        state = splitmix(state ^ splitmix(np.atleast_1d(word)))
    return state


def _word(value: int) -> _U64:
    return np.array([value & 0xFFFFFFFFFFFFFFFF], np.uint64)


def permute(index: Ints, size: int, key: _U64) -> Ints:
    """Element-wise keyed permutation of [0, size): index (M,), key (M,) or (1,) -> (M,)."""
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    high = bits - low
    value = index.astype(np.uint64)
    todo = np.arange(len(value))
    while len(todo):  # at most half of the values leave [0, size) each time
        value[todo] = _feistel(value[todo], key[todo] if len(key) > 1 else key, low, high)
        todo = todo[value[todo] >= np.uint64(size)]
    return value.astype(np.int64)


def _feistel(value: _U64, key: _U64, low: int, high: int) -> _U64:
    """A permutation of [0, 2^(low+high)); the halves keep their widths, each is masked by a hash of the other."""
    a = value >> np.uint64(low)
    b = value & np.uint64((1 << low) - 1)
    for i in range(_ROUNDS):
        salt = key + np.uint64((i * 2 + 1) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF)
        a = a ^ (splitmix(b ^ salt) >> np.uint64(64 - high))
        b = b ^ (splitmix(a ^ ~salt) >> np.uint64(64 - low))
    return (a << np.uint64(low)) | b


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sequence of global batches over shards with the given numbers of samples.

    `last`: "drop" leaves out the fewer than `batch` samples at an epoch's end (others each epoch), "wrap" fills the
    last batch with samples from the epoch's own line. A shard with repeats r has each of its samples r times in an
    epoch. Sample ids count through the shards, or from each shard's entry in `starts`. `total` is an epoch's samples.
    """

    sizes: tuple[int, ...]
    repeats: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    batch: int
    seed: int = 0
    shuffle: bool = True
    window: int = 1 << 16
    last: Literal["drop", "wrap"] = "drop"
    total: int = field(init=False, compare=False)
    _sizes: Ints = field(init=False, repr=False, compare=False)
    _once: Ints = field(init=False, repr=False, compare=False)
    _starts: Ints = field(init=False, repr=False, compare=False)
    _epoch: dict[int, tuple[Ints, Ints]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        sizes = np.asarray(self.sizes, np.int64)
        repeated = sizes * np.asarray(self.repeats or 1, np.int64)
        object.__setattr__(self, "total", int(repeated.sum()))
        if self.total == 0:
            raise ValueError("the data set has no samples")
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the data set has {self.total} samples, fewer than the global batch {self.batch}: "
                "with last=drop an epoch would be empty; set last: wrap or a smaller batch"
            )
        object.__setattr__(self, "_sizes", repeated)
        object.__setattr__(self, "_once", sizes)
        starts = np.asarray(self.starts, np.int64) if self.starts else np.cumsum(sizes) - sizes
        object.__setattr__(self, "_starts", starts)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the same for every rank."""
        return self.total // self.batch if self.last == "drop" else -(-self.total // self.batch)

    @property
    def lanes(self) -> int:
        """How many places of the line are read at a time: the largest divisor of the batch up to LANES."""
        return next(n for n in range(min(LANES, self.batch), 0, -1) if self.batch % n == 0) if self.shuffle else 1

    def ids(self, step: int, slots: Sequence[int] | Ints) -> Ints:
        """Sample ids (M,) of the given slots in [0, batch) of the global batch at a step counted from 0."""
        epoch, step = divmod(step, self.steps_per_epoch)
        slot = np.asarray(slots, np.int64)
        assert slot.min(initial=0) >= 0
        assert slot.max(initial=0) < self.batch
        width = self.batch // self.lanes
        lane, offset = np.divmod(slot, width)
        line = (lane * (self.steps_per_epoch * width) + step * width + offset) % self.total
        return self.at(epoch, line)

    def at(self, epoch: int, line: Ints) -> Ints:
        """Sample ids at places [0, total) of an epoch's line."""
        if self.shuffle:
            line = self._shuffled(epoch, line)
        shards, ends = self._line(epoch)
        place = np.searchsorted(ends, line, side="right")
        shard = shards[place]
        return self._starts[shard] + (line - (ends[place] - self._sizes[shard])) % self._once[shard]

    def _shuffled(self, epoch: int, line: Ints) -> Ints:
        """The line shuffled inside its windows."""
        # The last window takes the remainder, so that no window is small enough for cycle walking to be slow.
        final = max(self.total // self.window - 1, 0)
        window = np.minimum(line // self.window, final)
        key = mix(self.seed, epoch, window)
        out = np.empty_like(line)
        for chosen, size in (
            (window < final, self.window),
            (window == final, self.total - final * self.window),
        ):
            if chosen.any():
                first = window[chosen] * self.window
                out[chosen] = first + permute(line[chosen] - first, size, key[chosen])
        return out

    def _line(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's permutation of shards and the running ends of their samples on the line."""
        known = self._epoch.get(epoch)
        if known is None:
            shards = np.arange(len(self.sizes))
            if self.shuffle:
                shards = np.argsort(mix(self.seed, epoch, -1, shards), kind="stable").astype(np.int64)
            known = (shards, np.cumsum(self._sizes[shards]))
            for old in list(self._epoch)[:-1]:  # threads near an epoch's end use two
                self._epoch.pop(old, None)
            self._epoch[epoch] = known
        return known


def clumping(order: Order, steps: Sequence[int]) -> float:
    """How badly an order mixes: the variance of batches' mean sample id over that of independent uniform draws.

    1 is a perfect shuffle, below 1 each batch spreads more evenly than chance, and the batch size is no shuffle.
    """
    everything = np.arange(order.batch)
    means = np.array([order.ids(step, everything).mean() for step in steps])
    middle = (order.total - 1) / 2
    return float(((means - middle) ** 2).mean() / (order.total**2 / 12 / order.batch))


def slots(batch: int, *, rank: int, world: int, accumulate: int, micro_step: int) -> Ints:
    """A micro-batch's slots: ranks take contiguous parts of the global batch, micro-batches parts of those."""
    parts = world * accumulate
    if batch % parts:
        raise ValueError(f"global batch {batch} is not divisible by world size {world} x accumulation {accumulate}")
    micro = batch // parts
    start = (rank * accumulate + micro_step) * micro
    return np.arange(start, start + micro)
