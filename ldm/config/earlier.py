"""Keys of configs by their earlier names, read as today's: old configs and old runs go on."""

from __future__ import annotations

from typing import Any

EARLIER = {"task.unet": "task.network"}
"""Earlier names of keys, and today's."""


def today_key(key: str) -> str:
    """A dotted key by today's names."""
    for old, new in EARLIER.items():
        if key == old or key.startswith((f"{old}.", f"{old}[")):
            return new + key[len(old) :]
    return key


def today(data: Any) -> tuple[Any, list[str]]:
    """The keys and values of a config by today's names, and the earlier names that it had.

    Raises ValueError where it says a key by both names.
    """
    if not isinstance(data, dict):
        return data, []
    found = []
    for old, new in EARLIER.items():
        (parent, name), now = old.rsplit(".", 1), new.rpartition(".")[2]
        holder = data.get(parent)
        if isinstance(holder, dict) and name in holder:
            if now in holder:
                raise ValueError(f"{old}: is called {new} now, and the config has both; leave one out")
            renamed = {now if key == name else key: value for key, value in holder.items()}
            if isinstance(renamed[now], dict):
                renamed[now] = {"kind": name} | renamed[now]  # the one kind that there was
            data = {key: renamed if key == parent else value for key, value in data.items()}
            found.append(old)
    return (_interpolated(data) if found else data), found


def _interpolated(value: Any) -> Any:
    """The same with `${...}` by today's names."""
    if isinstance(value, dict):
        return {key: _interpolated(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_interpolated(v) for v in value]
    if isinstance(value, str) and "${" in value:
        for old, new in EARLIER.items():
            value = value.replace("${" + old + "}", "${" + new + "}").replace("${" + old + ".", "${" + new + ".")
    return value
