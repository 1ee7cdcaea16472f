"""What `gpu.json` holds, checked before it is written: readers may rely on it."""

from __future__ import annotations

from typing import Any

VERSION = 1
STATUS = ("measured", "failed", "left out")
_NUMBER, _TEXT, _MAYBE, _NAME = (int, float), (str,), (int, float, type(None)), (str, type(None))
MACHINE: dict[str, tuple[type, ...]] = {
    "card": _TEXT, "memory_bytes": _NUMBER, "device": _TEXT, "driver": _NAME, "torch": _TEXT, "cuda": _NAME,
    "cudnn": _MAYBE, "capability": _NAME, "python": _TEXT, "cpu": _TEXT, "known_as": _NAME, "peak_of": _TEXT,
    "peak_tflops": _NUMBER, "measured_tflops": _NUMBER, "measured_gb_per_s": _NUMBER, "packages": (dict,),
}  # fmt: skip
TESTS: dict[str, tuple[type, ...]] = {
    "passed": (int,), "failed": (int,), "skipped": (int,), "failing": (list,), "left_out": (dict,), "ended": _TEXT,
    "seconds": _NUMBER,
}  # fmt: skip
ROW: dict[str, tuple[type, ...]] = {
    "family": _TEXT, "title": _TEXT, "side": _TEXT, "what": _TEXT, "mode": _TEXT, "layout": _TEXT, "status": _TEXT,
    "why": _TEXT,
}  # fmt: skip
FIGURES: dict[str, tuple[type, ...]] = {
    "batch": (int,), "pixels": (int,), "seconds": (dict,), "images_per_second": _NUMBER, "peak_gb": _MAYBE,
    "reserved_gb": _MAYBE, "tflop_per_image": _MAYBE, "mfu": _MAYBE, "planned": (dict, type(None)),
}  # fmt: skip
SCALED: dict[str, tuple[type, ...]] = {
    "side": _TEXT, "what": _TEXT, "batch": (int,), "seconds": _NUMBER, "images_per_second": _NUMBER, "peak_gb": _MAYBE,
}  # fmt: skip


def check(record: Any) -> None:
    """Raise ValueError naming the first part that is missing or of another kind."""
    _has(record, {"schema": (int,), "quick": (bool,), "made": _TEXT, "seconds": _NUMBER}, "gpu.json")
    _has(record, {"machine": (dict,), "tests": (dict,), "rows": (list,), "scaled": (list,)}, "gpu.json")
    if record["schema"] != VERSION:
        raise ValueError(f"gpu.json: schema {record['schema']} is not {VERSION}")
    _has(record["machine"], MACHINE, "machine")
    _has(record["tests"], TESTS, "tests")
    for i, row in enumerate(record["rows"]):
        _has(row, ROW, f"rows[{i}]")
        if row["status"] not in STATUS:
            raise ValueError(f"rows[{i}].status: {row['status']!r} is not one of {list(STATUS)}")
        if row["status"] == "measured":
            _has(row, {"apart": _NUMBER} if row["what"] == "same" else FIGURES, f"rows[{i}]")
        elif not row["why"]:
            raise ValueError(f"rows[{i}].why: a row that is {row['status']} says why")
    for i, one in enumerate(record["scaled"]):
        _has(one, SCALED, f"scaled[{i}]")


def _has(given: Any, keys: dict[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object, got {type(given).__name__}")
    for key, kinds in keys.items():
        if key not in given:
            raise ValueError(f"{where}: {key!r} is missing")
        value = given[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{where}.{key}: expected {names}, got {type(value).__name__}")
