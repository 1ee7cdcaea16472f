"""What is wrong with a sample."""

from __future__ import annotations


class BadSample(ValueError):
    """A sample that cannot be used; `reason` is a short word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.reason, self.detail)
