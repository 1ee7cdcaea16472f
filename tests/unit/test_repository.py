"""The repository's own promises: sizes, no machine's paths, a true file tree, configs that load, a quick help."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("ldm", "launch", "bench", "examples", "tests")
MAX_FILE, MAX_FUNCTION = 450, 60
EXEMPT: set[str] = set()
"""Visible debt: "path" for a file, "path:function" for a function."""

MACHINE_PATH = re.compile(r"(?<![\w/.}])/(?:home|Users|root|work|tmp/[a-z]|scratch|data\d*|mnt)/[\w.-]+")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".cfg", ".sh", ".sbatch", ".json", ".txt", ""}


def tracked() -> list[Path]:
    """Files of the repository; outside a clone, the files of its folders."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    return [p for top in (*CODE, "configs", "docs") for p in (ROOT / top).rglob("*") if p.is_file()]


def python_files() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in CODE]


def functions(tree: ast.Module) -> list[tuple[str, int]]:
    """Every function with its number of lines, from its first decorator to its end."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.append((node.name, (node.end_lineno or first) - first + 1))
    return found


def test_files_and_functions_are_short() -> None:
    long: dict[str, int] = {}
    for path in python_files():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if (lines := text.count("\n")) > MAX_FILE:
            long[name] = lines
        long |= {f"{name}:{f}": lines for f, lines in functions(ast.parse(text)) if lines > MAX_FUNCTION}
    assert {k: v for k, v in long.items() if k not in EXEMPT} == {}
    assert set(long) >= EXEMPT, "an exemption is no longer needed"


def test_no_paths_of_one_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix in TEXT and path != Path(__file__) and path.stat().st_size < 1_000_000:
            text = path.read_text(errors="replace")
            found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in MACHINE_PATH.finditer(text)]
    assert found == []


def test_nothing_is_unpickled() -> None:
    """Weights from strangers must not be able to run code: no pickle, and `torch.load` only with weights_only=True."""
    found = []
    for path in python_files():
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and {a.name for a in node.names} != {"UnpicklingError"}:
                names.append(node.module or "")
            found += [f"{where} imports {n}" for n in names if n.split(".")[0] in {"pickle", "dill", "cloudpickle"}]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                found += [] if safe else [f"{where} torch.load without weights_only=True"]
    assert found == []


def file_tree(text: str) -> list[str]:
    """Paths named by a file tree: the fenced block that begins with `ldm/`, indented by two spaces a level."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    paths: list[str] = []
    for block in (b for b in blocks if re.match(r"ldm/(\s|$)", b)):
        parents: list[str] = []
        for line in block.splitlines():
            indent = (len(line) - len(line.lstrip(" "))) // 2
            parents = parents[:indent]
            entries = []
            for word in line.split():  # several names may share a line; the first word that is no path begins the text
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.\w+)", word):
                    break
                entries.append(word)
            paths += ["".join(parents) + e for e in entries]
            if entries and entries[-1].endswith("/"):
                parents.append(entries[-1])
    return paths


def test_the_tree_is_read_as_meant() -> None:
    text = "# x\n```\nldm/\n  rng.py   noise.\n  data/    e.g. it\n    order.py shards.py  who\nlaunch/  starts\n```\n"
    files = ["ldm/rng.py", "ldm/data/", "ldm/data/order.py", "ldm/data/shards.py"]
    assert file_tree(text) == ["ldm/", *files, "launch/"]


def test_the_tree_is_true() -> None:
    """docs/inside.md's, of the whole repository."""
    named = file_tree((ROOT / "docs" / "inside.md").read_text())
    assert named
    assert [p for p in named if not (ROOT / p).exists()] == []
    rooms = {f"ldm/{p.name}/" for p in (ROOT / "ldm").iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    shown = {p for p in named if p.count("/") == 2 and p.endswith("/")}
    assert rooms - shown == set(), "rooms that the tree leaves out"


def runs() -> list[Path]:
    return sorted(p for folder in ("train", "finetune", "distill") for p in (ROOT / "configs" / folder).rglob("*.yaml"))


def test_every_config_says_what_it_costs() -> None:
    """The first line of a complete run is a comment; every YAML parses with its bases."""
    from ldm.config import load

    for path in (ROOT / "configs").rglob("*.yaml"):
        assert path.read_text().startswith("# "), f"{path.name}: first comment missing"
        if path not in runs():
            assert load._read_file(path, depth=0)[0] is not None


@pytest.mark.parametrize("path", runs(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_run_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pytest.importorskip("ldm.config.schema")
    from ldm.config import load

    monkeypatch.chdir(ROOT)
    run = schema.load_run(path, [])
    again = load.decode(type(run), load.encode(run))
    assert again == run, "a resolved config must decode into the same run"


def test_help_is_quick() -> None:
    """`ldm --help` starts without the heavy imports; they are seconds, it is to take under one."""
    if not (ROOT / "ldm" / "cli" / "__main__.py").is_file():
        pytest.skip("no command line yet")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ldm.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "train" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    heavy = {
        "torch",
        "torchvision",
        "deepspeed",
        "open_clip",
        "timm",
        "transformers",
        "matplotlib",
        "omegaconf",
        "numpy",
    }
    assert loaded & heavy == set()


def test_only_models_and_checkpoints_name_the_unet_where_any_network_would_do() -> None:
    """What trains, draws or plans networks knows `ldm.models.network` and builds them by their settings."""
    named = set()
    for path in python_files():
        own = path.relative_to(ROOT).as_posix()
        if own.startswith("ldm/") and not own.startswith(("ldm/models/", "ldm/checkpoint/")):
            imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
            if any((n.module or "") == "ldm.models.unet" for n in imports):
                named.add(own)
    assert named == set()


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules among `names` that a file imports, anywhere in it, for its types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & names


def test_no_two_modules_import_each_other() -> None:
    """Not by way of others either. A package's `__init__` that gathers its own modules' names is not among them."""
    modules = {}
    for path in python_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            modules[".".join(parts)] = path
    left = {name: imported(path, set(modules)) - {name} for name, path in modules.items()}
    while ends := {name for name, own in left.items() if not own}:
        left = {name: own - ends for name, own in left.items() if name not in ends}
    while starts := set(left) - set().union(*left.values()) if left else set():
        left = {name: own for name, own in left.items() if name not in starts}
    assert left == {}, "circles"
