"""`ldm --completion bash | zsh | fish | tcsh`: a script that completes verbs, options and files, by shtab."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from ldm.cli.options import Parser


def root(verbs: Mapping[str, str]) -> Parser:
    """One parser with the parsers of all verbs below it; `verbs`: what each does."""
    parser = Parser(prog="ldm")
    parser.add_argument("-V", "--version", action="store_true", help="the version")
    below = parser.add_subparsers(dest="verb")
    for verb, what in verbs.items():
        module = importlib.import_module(f"ldm.cli.{verb}")
        own = (module.parser if "parser" in vars(module) else module._parser)()
        below.choices[verb] = own  # type: ignore[index]
        below._choices_actions.append(below._ChoicesPseudoAction(verb, (), what))
    return parser


def main(words: Sequence[str], verbs: Mapping[str, str]) -> int:
    """Print the script of a shell. Raises ValueError for another shell, and without shtab."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError("--completion: needs shtab: pip install 'ldm[completion]'") from error
    shells = sorted(shtab.SUPPORTED_SHELLS)
    if len(words) != 1 or words[0] not in shells:
        raise ValueError(f"--completion: expected one of {', '.join(shells)}, got {' '.join(words) or 'nothing'}")
    parser = root(verbs)
    for one in _all(parser):
        for action in one._actions:
            if "FILE" in str(action.metavar) or "FOLDER" in str(action.metavar) or action.metavar in ("PATH", "CONFIG"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, shell=words[0]))
    return 0


def _all(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and all below it."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                found += _all(below)
    return found
