"""The manners of a command line: options, their numbers and paths, near names, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

CLOSED = 141
"""Exit code after the reader of our output went away, as a shell shows SIGPIPE."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell shows SIGINT."""
FULL = 74
"""Exit code after output that could not be written (EX_IOERR)."""
_OPTION = re.compile(r"--?[A-Za-z]")


class Help(argparse.HelpFormatter):
    """Help that tells every default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, shown = action.help or "", default_text(action)
        if not shown or (not action.option_strings and action.nargs != "?"):
            return text
        escaped = shown.replace("%", "%%")
        if text.endswith(f"({escaped})"):
            return f"{text[: -len(escaped) - 2]}(default: {escaped})"
        return text if f"default: {escaped}" in text else f"{text} (default: {escaped})".lstrip()


class RawHelp(Help, argparse.RawDescriptionHelpFormatter):
    """The same, with description and epilog as they are written."""


def default_text(action: argparse.Action) -> str:
    """An option's default as a user would write it; "" for a flag and for none."""
    value = action.default
    if value is None or isinstance(value, bool) or value == argparse.SUPPRESS:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value) if str(value) else '""'


class Parser(argparse.ArgumentParser):
    """Options whose numbers are finite, whose paths may begin with ~, and whose mistakes are one line with code 2.

    `aliases`: names that other programs have for an option, to be hinted at: {"cfg-scale": ("guidance",)}.
    """

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, *args: Any, **options: Any) -> None:
        chosen = options.get("formatter_class", Help)
        options["formatter_class"] = chosen if issubclass(chosen, Help) else Help
        super().__init__(*args, **options)
        self._given: list[str] = []
        for kind, read in ((None, home), (str, home), (int, integer), (float, number), (Path, path)):
            self.register("type", kind, read)

    def _add_action(self, action: Any) -> Any:
        if action.help is None and default_text(action):
            action.help = f"(default: {default_text(action)})".replace("%", "%%")
        return super()._add_action(action)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown option is refused here, where the known ones are known."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if _OPTION.match(word):
                name = word.split("=", 1)[0]
                self.error(f"there is no option {name}{self._near(name)}")
        return found, rest

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a word too many is named."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"{rest[0]!r} is one word too many")
        return found

    def error(self, message: str) -> NoReturn:
        """One line on standard error, and exit code 2."""
        text = message.replace("\n", " ")
        if text.startswith(("the following arguments are required", "unrecognized arguments")):
            text = self._misspelt() or text + self._choices()  # which tells more
        self.exit(2, f"{self.prog}: {text}; `{self.prog} --help` tells more\n")

    def _choices(self) -> str:
        verbs = [name for a in self._actions if isinstance(a, argparse._SubParsersAction) for name in a.choices]
        return f", one of {', '.join(verbs)}" if verbs else ""

    def _misspelt(self) -> str:
        """What is to be said of the first given option that there is not."""
        parser: Parser = self
        for word in self._given:
            below = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
            if below and word in below[0]:
                parser = below[0][word]
            name = word.split("=", 1)[0]
            known = [o for action in parser._actions for o in action.option_strings]
            if _OPTION.match(word) and not any(o.startswith(name) for o in known):
                return f"there is no option {name}{parser._near(name)}"
        return ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(names)}{near(str(value), names)}")

    def _near(self, name: str) -> str:
        known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
        bare = name.lstrip("-").replace("_", "-")
        for other in (bare, *self.aliases.get(bare, ()), *self.aliases.get(bare.lower(), ())):
            if f"--{other}" in known:
                return f"; did you mean --{other}?"
            if not other.startswith("-") and " " in other:
                return f"; {other}"
        return near(f"--{bare}", known, quote=False)


def near(word: str, known: Iterable[str], *, quote: bool = True) -> str:
    """`; did you mean X?` for the nearest known name, or ""."""
    by_fold = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), by_fold, n=1)
    if not found:
        return ""
    name = by_fold[found[0]]
    return f"; did you mean {name!r}?" if quote else f"; did you mean {name}?"


def integer(text: str) -> int:
    """A whole number: 1000, 1_000 or 1e3."""
    with contextlib.suppress(ValueError):
        return int(text)
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d{1,3}", text) and (value := float(text)).is_integer():
        return int(value)
    raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def path(text: str | Path) -> Path:
    """A path; ~ is the home folder."""
    if not str(text):
        raise argparse.ArgumentTypeError("expected a path, got an empty word")
    try:
        return Path(expanded(str(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def home(text: str) -> str:
    """A word; one that begins with ~/ is a path in the home folder."""
    if not text.startswith("~/"):
        return text
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def expanded(text: str) -> str:
    """The path with ~ and ~user replaced; a name that only begins with ~, and is no user's, stays.

    Raises ValueError where there is no home folder: nobody wants a folder called ~.
    """
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found == text and text.split("/", 1)[0] == "~":
        raise ValueError(f"{text!r}: ~ is the home folder, but HOME is not set and this user has none")
    return found


# --- how a command ends -------------------------------------------------------------------------------------------
def ended(prog: str, run: Callable[[], int]) -> int:
    """Run a command to its exit code: quiet when its reader goes away, one line and 130 after Ctrl-C.

    The second Ctrl-C, or one while modules are being loaded, ends at once.
    """
    _streams()
    restore = _listen(prog)
    try:
        code = run()
        _flush()
        return code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") in ("", "0"):
            _say(prog, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_gone():
            raise
        return CLOSED
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _say(prog, f"standard output: {error.strerror}")
        return FULL
    finally:
        restore()
        _settle()


def _streams() -> None:
    """Standard streams that are there, and that print every character in some way."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = sys.__dict__[name]
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _listen(prog: str) -> Callable[[], None]:
    """Ctrl-C as KeyboardInterrupt once; the returned call restores the handler."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as under nohup, or somebody else's
        return lambda: None
    own, asked = os.getpid(), False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if os.getpid() != own:
            os._exit(INTERRUPTED)  # a worker: its parent tells
        if asked or _importing(frame):
            _say(prog, "interrupted")
            os._exit(INTERRUPTED)
        asked = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    return lambda: None if signal.getsignal(signal.SIGINT) is not handle else _restore(before)


def _restore(handler: Any) -> None:
    signal.signal(signal.SIGINT, handler)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being loaded: an exception may vanish in there, or come out as another one."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _say(prog: str, text: str) -> None:
    with contextlib.suppress(OSError):
        end = "\n" if os.isatty(2) else ""  # the terminal has shown ^C, perhaps behind a bar
        os.write(2, f"{end}{prog}: {text}\n".encode(errors="backslashreplace"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _reader_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _settle() -> None:
    """What cannot be written goes nowhere, so that the interpreter's end says nothing of it."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
