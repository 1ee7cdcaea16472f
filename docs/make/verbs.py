"""The reference of commands: Markdown made from the parsers."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from typing import Any

from launch.__main__ import _parser as launch_parser
from launch.options import default_text
from ldm.cli.__main__ import VERBS

FOLDER = "reference/cli"


def parser_of(verb: str) -> Any:
    """The parser of `ldm VERB`; `launch` is that of `python -m launch`."""
    if verb == "launch":
        return launch_parser()
    module = importlib.import_module(f"ldm.cli.{verb}")
    return (module.parser if "parser" in vars(module) else module._parser)()


def below(parser: Any) -> dict[str, tuple[Any, str]]:
    """The verbs of a parser: each one's parser, and what is said of it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (one, said.get(name, "")) for name, one in action.choices.items()}
    return {}


def pages() -> dict[str, str]:
    """Markdown of every page, by its path."""
    lines = [
        "# Commands",
        "",
        "`ldm VERB --help` tells the same in a terminal.",
        "",
        "| verb | what it does |",
        "|---|---|",
    ]
    lines += [f"| [`ldm {verb}`]({verb}.md) | {_cell(what)} |" for verb, what in VERBS.items()]
    lines += ["| [`python -m launch`](launch.md) | start processes: on this machine, or through SLURM |", ""]
    made = {f"{FOLDER}/index.md": "\n".join(lines)}
    for verb in (*VERBS, "launch"):
        title = "python -m launch" if verb == "launch" else f"ldm {verb}"
        text = "\n".join([f"# `{title}`", "", *_page(parser_of(verb), 2)])
        made[f"{FOLDER}/{verb}.md"] = text + "\n"
    return made


def _page(parser: Any, level: int) -> list[str]:
    lines = [*_described(parser), "```text", _usage(parser), "```", ""]
    verbs = below(parser)
    for name, actions in groups(parser):
        head = {"positional arguments": "Arguments", "options": "Options", "optional arguments": "Options"}.get(
            name, name
        )
        lines += [f"**{head}**", "", "| | | default |", "|---|---|---|", *map(_row, actions), ""]
    for name, (one, said) in verbs.items():
        title = f"{parser.prog} {name}" if not one.prog.endswith(name) else one.prog
        lines += [f"{'#' * level} `{title}`", ""]
        inside = _page(one, level + 1)
        lines += [said[:1].upper() + said[1:] + ".", "", *inside] if said and not one.description else inside
    return lines


def groups(parser: Any) -> Iterator[tuple[str, list[Any]]]:
    """The options of a parser by their groups, without help and verbs."""
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if told(a)]
        if actions:
            yield group.title or "options", actions


def told(action: Any) -> bool:
    """Whether an argument stands in the tables."""
    return (
        not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) and action.help != argparse.SUPPRESS
    )


def _described(parser: Any) -> list[str]:
    """Description and epilog; indented lines are what is typed."""
    found = []
    for text in (parser.description, parser.epilog):
        for block in re.split(r"\n\s*\n", (text or "").strip("\n")):
            if not block.strip():
                continue
            code = all(line.startswith("  ") for line in block.splitlines())
            found += ["```text", block, "```", ""] if code else [_text(" ".join(block.split())), ""]
    return found


def _usage(parser: Any) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=86, max_help_position=24)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return formatter.format_help().strip()


def _row(action: Any) -> str:
    """One argument: its names, what it does, its default."""
    value = _value(action)
    if action.option_strings:
        names = "<br>".join(f"`{name}{' ' + value if value else ''}`" for name in action.option_strings)
    else:
        names = f"`{value or action.dest}`"
    shown = default_text(action)
    text = (action.help or "") % {**vars(action), "prog": ""} if action.help else ""
    text = re.sub(r"\s*\((?:default: )?" + re.escape(shown) + r"\)$", "", text) if shown else text
    choices = action.choices
    if choices is not None and action.metavar is not None:
        text += " One of " + ", ".join(map(str, choices)) + "."
    return f"| {_cell(names)} | {_cell(_text(text))} | {f'`{_cell(shown)}`' if shown else ''} |"


def _value(action: Any) -> str:
    """What an argument takes, as its help names it."""
    if action.nargs == 0:
        return ""
    metavar = action.metavar
    if metavar is None and action.choices is not None:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    if metavar is None:
        metavar = action.dest.upper() if action.option_strings else action.dest
    if isinstance(metavar, tuple):
        return " ".join(metavar)
    more = {"*": f"[{metavar} ...]", "+": f"{metavar} [{metavar} ...]", "?": f"[{metavar}]"}
    if isinstance(action.nargs, int):
        return " ".join([metavar] * action.nargs)
    return more.get(action.nargs, metavar)


def _text(text: str) -> str:
    """Words as Markdown shows them: nothing in them is HTML or emphasis, what is in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<>*_\[\]])", r"\\\1", p) for p in parts)


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text.replace("\n", " "))
