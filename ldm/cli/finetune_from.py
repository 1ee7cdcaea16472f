"""`ldm finetune --from FILE`: another trainer's settings become a config for `ldm train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import Parser, is_override

if TYPE_CHECKING:
    from ldm.interop.sheet import Converted


def add(parser: Parser) -> None:
    """The options, which `ldm finetune --help` lists too."""
    group = parser.add_argument_group("instead of a method", "the settings of kohya, diffusers or ai-toolkit")
    group.add_argument("--from", dest="files", type=Path, action="append", default=[], metavar="FILE",
                       help="kohya's .toml, a shell script with diffusers' or kohya's call, ai-toolkit's .yaml; "
                       "kohya's arguments and its data set may be two files")  # fmt: skip
    group.add_argument("--write", type=Path, metavar="CONFIG", help="write the config there (default: print it)")
    group.add_argument("--lenient", action="store_true",
                       help="leave out what cannot be honoured although the result depends on it")  # fmt: skip
    group.add_argument("--images", type=Path, metavar="FOLDER", help="the pictures, instead of theirs")
    group.add_argument("--base", metavar="MODEL", help="the model to start from, instead of theirs")
    group.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value",
                       help="any key of the config; --set may be left out")  # fmt: skip


def asked(argv: list[str]) -> bool:
    """Whether a command is of this kind."""
    return any(word == "--from" or word.startswith("--from=") for word in argv)


def main(argv: list[str]) -> int:
    """Print or write the config; ValueError for what cannot be honoured and for users' mistakes."""
    parser = Parser(
        prog="ldm finetune", description="Read another trainer's settings and print them as a config for `ldm train`."
    )
    add(parser)
    args, words = parser.parse_known_args(argv)
    words = [*args.overrides, *words]
    if wrong := [w for w in words if not is_override(w)]:
        raise ValueError(f"override {wrong[0]!r}: expected key=value, such as train.steps=100")

    from ldm.config.load import read
    from ldm.config.schema import load_run
    from ldm.interop.reading import convert

    base = args.base or next((w.partition("=")[2] for w in words if w.startswith("task.base=")), None)
    files = [Path(file) for file in args.files]
    converted = convert(files, images=None if args.images is None else str(args.images), base=base)
    _refuse(converted, files[0], args.lenient)
    tree = dict(converted.tree)
    for word in words:
        _override(tree, word, read({}, [word]))
    try:
        load_run(tree)
    except ValueError as error:
        raise ValueError(f"{files[0].name}, as a config of ours: {error}") from error
    text = _page(converted, files, tree, args.write or Path("CONFIG"))
    if args.write is None:
        print(text, end="")
    else:
        if args.write.exists():
            raise ValueError(f"--write: {str(args.write)!r} is there already; choose another name or remove it")
        args.write.write_text(text, encoding="utf-8")
    _said(converted, args.write)
    return 0


def _refuse(converted: Converted, file: Path, lenient: bool) -> None:
    """Raise ValueError naming all that changes the result and is not honoured."""
    rows = converted.refused
    if not rows or lenient:
        return
    told = "; ".join(f"{row.key}={row.value}: {row.note}" for row in rows)
    many = "a setting changes" if len(rows) == 1 else f"{len(rows)} settings change"
    raise ValueError(f"{file.name} ({converted.program}): {many} the result and cannot be honoured: {told}. --lenient "
                     "leaves them out")  # fmt: skip


def _override(tree: dict[str, Any], word: str, value: Any) -> None:
    """Set the key of `key=value` in the printed config; `value` is the override alone, as a tree."""
    *above, last = word.partition("=")[0].split(".")
    for name in above:
        value = value[name]
        inner = tree.get(name)
        tree[name] = tree = dict(inner) if isinstance(inner, dict) else {}
    tree[last] = value[last]


def _page(converted: Converted, files: list[Path], tree: dict[str, Any], config: Path) -> str:
    """The config as YAML, with what became of each key and the commands as comments before it."""
    from omegaconf import OmegaConf

    from ldm.interop.sheet import table

    lines = [f"From {', '.join(f.name for f in files)} ({converted.program}).", "", *table(converted), ""]
    lines += ["Run:", *(f"  {c}" for c in converted.before), f"  ldm train {config}"]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return head + OmegaConf.to_yaml(OmegaConf.create(tree))


def _said(converted: Converted, written: Path | None) -> None:
    """A line on standard error, and what to run."""
    count = converted.count
    print(
        f"{converted.program}: {count('kept')} keys kept, {count('near')} nearly, {count('left out')} left out, "
        f"{count('refused')} refused" + (" and left out" if count("refused") else ""),
        file=sys.stderr,
    )
    if written is not None:
        print("\n".join(["run:", *(f"  {c}" for c in converted.before), f"  ldm train {written}"]), file=sys.stderr)
