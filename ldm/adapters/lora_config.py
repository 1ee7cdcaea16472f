"""What a LoRA and its kin are configured with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Algo = Literal["lora", "loha", "lokr", "oft"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Corrections of rank `rank`, scaled by `alpha` / rank (no alpha: by 1), with `rslora` by `alpha` / sqrt(rank).

    `targets`: groups (attention, feed_forward, projection, convolution, time) or ends of layer names ("attn2.to_k");
    None is what the family's community corrects (`usual_targets`). `text` adapts the CLIP towers' layers of the same
    groups too, of attention for None. `dora` trains each output's magnitude beside the direction.

    `include` and `exclude`: regular expressions, found anywhere in a layer's name; of the targets those stay that one
    of `include` fits (all for none) and none of `exclude`. `rank_pattern`, `alpha_pattern`: such expressions and the
    rank and alpha of these layers, the first that fits.

    `algo`: what corrects, as LyCORIS calls it: "lora", "loha" (Hadamard product), "lokr" (Kronecker product; `factor`
    is the size of its small side, -1 the most even; `decompose_both` and `full_matrix` as there), or "oft" (outputs
    turned in blocks of `rank`; `constraint` bounds the turning, 0: no bound).

    `dropout` is of the layer's input, `rank_dropout` of ranks (of LoHa and LoKr: of outputs, of OFT: of blocks),
    `module_dropout` of whole corrections. `max_norm` bounds each correction's norm (0: no bound).
    `start`: a file or folder of such corrections to go on from.
    """

    kind: Literal["lora"] = "lora"
    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    text: bool = False
    dora: bool = False
    rslora: bool = False
    algo: Algo = "lora"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    max_norm: float = 0.0
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    constraint: float = 0.0
    start: str | None = None

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank} | {f"rank_pattern {k!r}": v for k, v in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if rank < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}")
        alphas = {"alpha": self.alpha} | {f"alpha_pattern {k!r}": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if alpha is not None and not alpha > 0:
                raise ValueError(f"{name} must be above 0, got {alpha}")
        for name in ("dropout", "rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.targets is not None and not self.targets:
            raise ValueError("targets must not be empty")
        for name in ("max_norm", "constraint"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 (0 is no bound), got {getattr(self, name)}")
        if self.factor < 1 and self.factor != -1:
            raise ValueError(f"factor must be at least 1, or -1 for the most even split, got {self.factor}")
        for pattern in (*self.include, *self.exclude, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r}: no regular expression: {error}") from None
        self._check_algo()

    def _check_algo(self) -> None:
        """Raise ValueError for settings of another algorithm."""
        for name, default, of in (
            ("factor", -1, "lokr"),
            ("decompose_both", False, "lokr"),
            ("full_matrix", False, "lokr"),
            ("constraint", 0.0, "oft"),
        ):
            if self.algo != of and getattr(self, name) != default:
                raise ValueError(f"{name}: is of algo {of}, got algo {self.algo}; leave it out")
        if self.algo != "oft":
            return
        for name, default in (
            ("alpha", None),
            ("alpha_pattern", {}),
            ("dora", False),
            ("rslora", False),
            ("dropout", 0.0),
            ("max_norm", 0.0),
        ):
            if getattr(self, name) != default:
                raise ValueError(f"{name}: a rotation has none; leave it out with algo oft")

    @property
    def effective_alpha(self) -> float:
        """The alpha that, divided by the rank, gives the scale; of layers that no pattern names."""
        return self._alpha(self.rank, self.alpha)

    def rank_of(self, name: str) -> int:
        """The rank of a layer."""
        return int(_first(self.rank_pattern, name, self.rank) or self.rank)

    def alpha_of(self, name: str) -> float:
        """As `effective_alpha`, of a layer."""
        alpha = _first(self.alpha_pattern, name, self.alpha)
        return self._alpha(self.rank_of(name), None if alpha is None else float(alpha))

    def _alpha(self, rank: int, alpha: float | None) -> float:
        own = float(rank if alpha is None else alpha)
        return own * math.sqrt(rank) if self.rslora else own

    def wants(self, name: str) -> bool:
        """Whether `include` and `exclude` leave this layer."""
        if self.include and not any(re.search(p, name) for p in self.include):
            return False
        return not any(re.search(p, name) for p in self.exclude)


def _first(patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), default)
