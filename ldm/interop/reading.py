"""Which program's file it is, and its config in ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config.written import parse_file
from ldm.interop import ai_toolkit, diffusers, kohya
from ldm.interop.kohya_data import HOLDING
from ldm.interop.sheet import Converted
from ldm.interop.words import Call, options, read_call

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

FORMS = (
    "kohya's .toml (arguments, or a data set's), ai-toolkit's .yaml or .json, a shell script or a list of options of "
    "diffusers' or kohya's scripts"
)


def convert(files: Sequence[Path], *, images: str | None = None, base: str | None = None) -> Converted:
    """The config of another trainer's file; two files are kohya's arguments and its data set.

    `images` (a folder) and `base` (a model) stand for theirs. Raises ValueError naming the file and what is wrong.
    """
    data: dict[str, Any] | None = None
    found: Call | dict[str, Any] | None = None
    home = files[0].parent
    for path in files:
        if not path.is_file():
            raise ValueError(f"--from: {str(path)!r}: no such file")
        read = _read(path)
        if isinstance(read, dict) and set(read) & set(HOLDING) and "config" not in read:
            data = read
        elif found is not None:
            raise ValueError(f"--from: {files[0].name} and {path.name} both hold arguments; give one of them")
        else:
            found, home = read, path.parent
    if found is None:
        found = {}
    if isinstance(found, dict) and found.get("job") is not None:
        return ai_toolkit.convert(found, images=images, base=base)
    call = found if isinstance(found, Call) else Call("", kohya.flattened(found), {})
    if call.script in kohya.SCRIPTS or not isinstance(found, Call) or _of_kohya(call):
        given = call.options
        if "config_file" in given:
            path = _beside(str(given["config_file"]), home, ".toml")
            given = kohya.flattened(_toml(path)) | {k: v for k, v in given.items() if k != "config_file"}
        if data is None and given.get("dataset_config"):
            data = _data(_beside(str(given["dataset_config"]), home, ".toml"))
        return kohya.convert(given, data, call.script, launcher=call.launcher, images=images, base=base)
    return diffusers.convert(call, images=images, base=base)


def _of_kohya(call: Call) -> bool:
    return not call.script and bool(
        {"network_module", "dataset_config", "optimizer_type", "output_name"} & set(call.options)
    )


def _read(path: Path) -> Call | dict[str, Any]:
    """A file's contents by its suffix, else by what they look like."""
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return _toml(path)
    if suffix in (".yaml", ".yml"):
        tree = parse_file(path)[0]
        if not isinstance(tree, dict) or "job" not in tree:
            raise ValueError(f"--from: {str(path)!r}: a YAML without the `job` of ai-toolkit's; allowed are {FORMS}")
        return tree
    text = path.read_bytes().decode("utf-8-sig", "replace")
    if suffix == ".json":
        tree = json.loads(text)
        if isinstance(tree, list):
            return Call("", options([str(word) for word in tree], path.name), {})
        if not isinstance(tree, dict):
            raise ValueError(
                f"--from: {str(path)!r}: neither keys and values nor a list of options; allowed are {FORMS}"
            )
        return tree
    if suffix == ".py" or "\0" in text:
        raise ValueError(f"--from: {str(path)!r}: a program, not settings; allowed are {FORMS}")
    return read_call(text, path.name)


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--from: {str(path)!r}: no such file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--from: {str(path)!r}: no TOML: {error}") from error


def _data(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".json" and path.is_file():
        return json.loads(path.read_text(encoding="utf-8-sig"))
    return _toml(path)


def _beside(name: str, home: Path, suffix: str) -> Path:
    """A file by its path from here, or from the file that names it."""
    path = Path(name)
    path = path if path.suffix else path.with_suffix(suffix)
    return path if path.is_file() else home / path
