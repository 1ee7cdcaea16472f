"""`ldm VERB ...`: dispatch to one module a verb, imported only when it is asked for."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from functools import partial

from launch.options import ended, near
from ldm import __version__

VERBS = {
    "demo": "train a small model on the embedded data, draw with it, and write a gallery page",
    "train": "train a model from a config file; the same command again resumes",
    "distill": "make a model that draws in 1 to 8 steps: LCM, TCD, DMD, progressive distillation",
    "finetune": "teach a model from a folder of pictures: DreamBooth, LoRA, ControlNet, edits and more",
    "sample": "draw pictures of prompts",
    "edit": "change pictures: img2img, inpaint, instruct, upscale, invert, prompt-to-prompt, attention maps",
    "data": "build, index, inspect and encode (cache) data sets",
    "convert": "turn one model format into another: diffusers, CompVis, LoRA, kohya",
    "export": "write a run's weights as a model folder, also while it trains",
    "plan": "tell memory, time and cost of a run before it is queued",
    "evaluate": "measure models and pictures: FID-like distances, retrieval, CLIP score, PSNR",
    "show": "draw how noise is added to a picture, or a page about a run",
    "studio": "pictures, training, watching, drawing and models on one page in the browser",
    "serve": "draw in a browser",
    "doctor": "what this machine and environment give, what is wrong, and the command that mends it",
}
_OTHERS = {
    "txt2img": "sample", "generate": "sample", "draw": "sample", "infer": "sample", "inference": "sample",
    "img2img": "edit", "inpaint": "edit", "upscale": "edit", "instruct": "edit", "fit": "train",
    "finetuning": "finetune", "dreambooth": "finetune",
    "lora": "finetune", "textual-inversion": "finetune", "eval": "evaluate", "test": "evaluate", "web": "serve",
    "ui": "studio", "gui": "studio", "webui": "studio", "prepare": "data", "encode": "data", "lcm": "distill",
    "diagnose": "doctor", "env": "doctor", "check": "doctor", "info": "doctor",
}  # fmt: skip
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)


def usage() -> str:
    """The help text."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    head = ["usage: ldm VERB [options]", "", "Distributed latent-diffusion training with text conditioning.", ""]
    more = "`ldm VERB --help` tells more. Several processes: python -m launch local --procs 2 -- ldm train ..."
    return "\n".join([*head, *lines, "", more])


def main(argv: list[str] | None = None) -> int:
    """Run a verb; users' mistakes end in one line on standard error and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    return ended(" ".join(["ldm", *argv[:1]]) if argv and argv[0] in VERBS else "ldm", partial(_main, argv))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        if argv[1:] and argv[1] in VERBS:
            return _main([argv[1], "--help"])
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb == "--completion":
        from ldm.cli import completion

        try:
            return completion.main(rest, VERBS)
        except ValueError as error:
            print(f"ldm: {error}", file=sys.stderr)
            return 2
    if verb not in VERBS:
        other = _OTHERS.get(verb.lower().replace("_", "-"))
        hint = f"; did you mean {other!r}?" if other else near(verb, VERBS)
        print(f"ldm: unknown verb {verb!r}; one of {', '.join(VERBS)}{hint}", file=sys.stderr)
        return 2
    # Pillow tells of broken EXIF and of large pictures without their names; what matters of both is said by us.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return importlib.import_module(f"ldm.cli.{verb}").main(rest)
    except (ValueError, FloatingPointError) as error:
        _say(verb, str(error))
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno in _DISK:
            _say(verb, f"{error.filename or 'the disk'}: {error.strerror}")
            return 74  # sysexits' EX_IOERR, as when a checkpoint cannot be written
        if error.filename is None and not isinstance(error, (FileExistsError, NotADirectoryError, PermissionError)):
            raise
        _say(verb, _about_file(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if (told := _explained(error)) is None:
            raise
        _say(verb, told)
        sys.stdout.flush()
        os._exit(1)  # what waits for the other ranks would wait for ever


def about(error: Exception) -> str | None:
    """What is said of an error that is no fault of the program; None of one that is."""
    if isinstance(error, OSError):
        return _about_file(error) if error.filename is not None or error.errno in _DISK else None
    return _explained(error)


def _about_file(error: OSError) -> str:
    if error.filename is None or error.errno is None:
        return str(error)
    name = os.fsdecode(error.filename)
    if error.errno == errno.EEXIST and not os.path.isdir(name):
        return f"{name!r}: there, and no folder" + (" but a link to nothing" if os.path.islink(name) else "")
    return f"{name!r}: {error.strerror}"


def _explained(error: BaseException) -> str | None:
    """A sentence for what is nobody's mistake and no fault of the program: ranks that are gone, memory that is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {(str(error).splitlines() or [''])[0]}"
    if str(error).startswith("Symlink loop"):
        return str(error)
    dist = sys.modules.get("ldm.dist")
    return None if dist is None else dist.lost(error)


def _say(verb: str, text: str) -> None:
    """One line, whatever the error's own text was broken into."""
    print(f"ldm {verb}: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
