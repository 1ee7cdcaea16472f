"""`ldm doctor`: what people report, as facts, and what is said of it.

The texts are those of reports in public trackers; beside each, where it was read.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker

from ldm.cli.doctor.checks import diagnose, stops
from ldm.cli.doctor.children import IMPORTING, Answer
from ldm.cli.doctor.facts import EXTRAS, NEEDED, _driver, _imports, _torch, slurm
from ldm.cli.doctor.screen import WIDTH, text
from ldm.cli.doctor.versions import covered, encoded_cuda, fits, numbers, partner

GPU = {
    "name": "NVIDIA A100-SXM4-80GB", "memory_gb": 85.0, "free_gb": 84.0, "capability": [8, 0], "bf16": True,
    "error": None,
}  # fmt: skip
OF_130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def healthy(gpus: int = 0) -> dict[str, Any]:
    """The facts of a machine where nothing is wrong."""
    packages: dict[str, str | None] = dict.fromkeys(NEEDED, "9999.0") | dict.fromkeys(EXTRAS, "9.0")
    packages |= {"torch": "2.14.1+cu130", "torchvision": "0.29.1+cu130", "deepspeed": "0.19.8"}
    packages["xformers"] = "0.0.40" if gpus else None
    disk = {"writable": True, "error": None, "total_gb": 900.0, "free_gb": 500.0}
    kernels: dict[str, Any] = {"dtype": "bfloat16", "ldm": "sdpa"}
    kernels |= {name: {"runs": True, "ms": 0.1} for name in ("math", "flash", "efficient", "cudnn")}
    row = {"name": GPU["name"], "memory_gb": 85.9, "capability": "8.0"}
    return {
        "ldm": {"version": "0.1.0"},
        "python": {"version": "3.11.9", "environment": "venv", "platform": "Linux 6.8 x86_64", "libc": "glibc 2.39"},
        "cpu": {
            "name": "EPYC", "cores": 16, "usable": 16, "quota": None, "bf16": True, "memory_gb": 64.0,
            "available_gb": 60.0, "limit_gb": None, "load": 0.1,
        },
        "environment": {},
        "packages": packages,
        "torch": {
            "state": "ok", "error": None, "version": "2.14.1+cu130", "cuda_build": "13.0", "hip_build": None,
            "threads": 16, "gloo": True, "nccl": True, "warnings": [], "gpus": [dict(GPU) for _ in range(gpus)],
            "cuda": {"available": bool(gpus), "error": None, "architectures": OF_130 if gpus else []},
            "precision": {"cpu": {"auto": "bf16"}}, "import_seconds": 3.0, "cut_short": None,
        },
        "attention": {"cuda": kernels} if gpus else {},
        "driver": {
            "nvidia_smi": bool(gpus), "devices": gpus, "cards": gpus, "error": None, "gpus": [row] * gpus,
            "version": "580.65.06" if gpus else None, "cuda": "13.0" if gpus else None,
        },
        "imports": {name: {"ok": True, "error": None} for name in ("torchvision", "deepspeed", "open_clip")},
        "compiler": "/usr/bin/g++",
        "container": None,
        "slurm": None,
        "open_files": 65536,
        "hub": {"path": "~/.cache/huggingface/hub", "source": "", "offline": False, "token": False} | disk,
        "disks": [{"of": "runs", "path": "runs"} | disk, {"of": "temporary files", "path": "/tmp"} | disk],
        "shm": {"path": "/dev/shm"} | disk,
    }  # fmt: skip


def changed(facts: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The facts with values at paths: {"torch.cuda_build": None}; a number is a place in a list."""
    facts = copy.deepcopy(facts)
    for path, value in changes.items():
        *before, last = path.split(".")
        place: Any = facts
        for name in before:
            place = place[int(name)] if isinstance(place, list) else place[name]
        place[int(last) if isinstance(place, list) else last] = value
    return facts


UNUSABLE = {"torch.cuda.available": False, "torch.cuda.architectures": [], "torch.gpus": [], "attention": {}}
CPU_BUILD = {"torch.version": "2.14.1+cpu", "torch.cuda_build": None} | UNUSABLE
TOO_OLD = (
    "RuntimeError: The NVIDIA driver on your system is too old (found version {}). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_CUDA_HOME = (
    "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)"
)
NO_MATCH = (
    "ImportError: /lib/flash_attn_2_cuda.cpython-310-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"
)
XFORMERS = (
    "WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:\n"
    "    PyTorch 2.2.0+cu121 with CUDA 1201 (you have {})\n    Python  3.10.13 (you have 3.10.12)\n"
)
V100 = {"name": "Tesla V100-SXM2-32GB", "capability": [7, 0], "bf16": False}
NUMPY = "A module that was compiled using NumPy 1.x cannot be run in"

CASES: dict[str, tuple[int, dict[str, Any], str, str, str]] = {
    # name: (GPUs, changed facts, level, key, part of the command)
    # open-mmlab/PIA 30: "you have 2.1.2+cpu", the card idle
    "torch for CPUs beside a GPU": (1, CPU_BUILD, "stops", "torch-cpu-build", "pip install --force-reinstall torch"),
    # the same under a driver of CUDA 12: the default wheels of today would not run there
    "torch for CPUs, older driver": (1, CPU_BUILD | {"driver.cuda": "12.4"}, "stops", "torch-cpu-build", "whl/cu126"),
    # lllyasviel/Fooocus 1313: found version 11040 beside a driver 470.86
    "driver of CUDA 11": (
        1, {"torch.cuda.error": TOO_OLD.format(11040), "driver.version": "470.86", "driver.cuda": "11.4"} | UNUSABLE,
        "stops", "driver-too-old", "update the driver to 580",
    ),
    "driver of CUDA 12 for a torch of 13": (
        1, {"torch.cuda.error": TOO_OLD.format(12040), "driver.version": "550.54"} | UNUSABLE,
        "stops", "driver-too-old", "torch<2.15",
    ),
    # iot-salzburg/gpu-jupyter 22, XZYW7 in zzzyuqing/DreamMat 14
    "container without --gpus": (
        0, {"container": "docker", "driver.cards": 1}, "stops", "container-without-gpu", "--gpus all",
    ),
    "no driver": (0, {"driver.cards": 1}, "stops", "driver-missing", "nvidia-driver"),
    # qixuema/envs 8, and many: after an unattended upgrade
    "driver and module apart": (
        1, {"driver.error": "Failed to initialize NVML: Driver/library version mismatch NVML library version: 570.124",
            "driver.gpus": []} | UNUSABLE,
        "stops", "driver-mismatch", "reboot",
    ),
    "hidden GPUs": (1, {"environment": {"CUDA_VISIBLE_DEVICES": ""}} | UNUSABLE, "stops", "gpu-hidden", "unset"),
    # Comfy-Org/ComfyUI 16438: cu130 begins at 7.5
    "V100 under wheels of CUDA 13": (
        1, {"torch.gpus": [GPU | V100]}, "stops", "no-kernel-image", "cu126",
    ),
    # TorchAL 4: an A100 under wheels up to 7.5
    "A100 under old wheels": (
        1, {"torch.cuda.architectures": ["sm_37", "sm_50", "sm_60", "sm_70", "sm_75"]},
        "stops", "no-kernel-image", "--upgrade",
    ),
    # vllm 946: Bfloat16 is only supported on GPUs with compute capability of at least 8.0
    "no bfloat16": (
        1, {"torch.gpus": [GPU | V100], "torch.cuda.architectures": ["sm_70"]}, "slows", "no-bf16", "precision=fp16",
    ),
    "a GPU that others hold": (1, {"torch.gpus.0.free_gb": 0.4}, "stops", "gpu-memory-taken", "nvidia-smi"),
    # deforum-stable-diffusion 377
    "xformers of another torch": (
        1, {"packages.xformers": "0.0.24", "imports": {"xformers.ops": {
            "ok": True, "said": XFORMERS.format("2.3.0+cu121")}}},
        "slows", "xformers", "pip install --upgrade --force-reinstall xformers",
    ),
    # open-mmlab/PIA 30, merolaika in xformers 982
    "xformers beside a torch for CPUs": (
        1, CPU_BUILD | {"packages.xformers": "0.0.24", "imports": {"xformers.ops": {
            "ok": True, "said": XFORMERS.format("2.2.0+cpu")}}},
        "slows", "xformers", "pip install --force-reinstall torch",
    ),
    # Dao-AILab/flash-attention 931
    "flash-attn of another torch": (
        1, {"imports": {"flash_attn": {"ok": False, "error": NO_MATCH}}}, "slows", "flash-attn", "pip uninstall",
    ),
    "a kernel that answers wrongly": (
        1, {"attention.cuda.flash": {"runs": False, "why": "wrong by 3.1e-01"}}, "stops", "kernel-wrong", "torch",
    ),
    # whittle-org/whittle 153, qualcomm/aimet 3984: the wheels bring the runtime, not nvcc
    "DeepSpeed without nvcc": (
        1, {"imports.deepspeed": {"ok": False, "error": NO_CUDA_HOME}}, "stops", "deepspeed-cuda-home", "CUDA_HOME=",
    ),
    "DeepSpeed that fails otherwise": (
        0, {"imports.deepspeed": {"ok": False, "error": "ImportError: cannot import name 'x' from 'torch'"}},
        "stops", "deepspeed", "--no-deps \"deepspeed>=0.19.8,<0.20\"",
    ),
    # vladmandic/sdnext 3531: torch 2.4.0+cu121 beside torchvision 0.20.1+cu124
    "torchvision of another torch": (
        0, {"torch.version": "2.4.0+cu121", "packages.torchvision": "0.20.1+cu124",
            "imports.torchvision": {"ok": False, "error": "RuntimeError: operator torchvision::nms does not exist"}},
        "stops", "torchvision", "torchvision==0.19.*",
    ),
    # xai4space/meteors 20
    "NumPy 2 under a torch for 1": (0, {"torch.warnings": [NUMPY]}, "stops", "numpy-2", "numpy<2"),
    "an import that waits for a lock": (
        0, {"imports.open_clip": {"ok": False, "error": "no end within 60 s"}}, "slows", "import-stuck", "open_clip",
    ),
    "a torch without its libraries": (
        0, {"torch.state": "broken", "torch.error": "OSError: libcudnn.so.9: cannot open shared object file"},
        "stops", "torch-libraries", "unset LD_LIBRARY_PATH",
    ),
    "an import without an end": (
        0, {"torch.state": "stuck", "torch.error": "no end within 60 s"}, "stops", "torch-stuck", "importtime",
    ),
    "nothing installed": (
        0, {"packages": {}, "torch": {"state": "missing"}}, "stops", "packages-missing", "pip install",
    ),
    "an older DeepSpeed": (
        0, {"packages.deepspeed": "0.17.6"}, "stops", "package-version", 'pip install "deepspeed>=0.19.8,<0.20"',
    ),
    "an older Python": (0, {"python.version": "3.9.2"}, "stops", "python", "venv"),
    # NVIDIA/nccl 342: docker gives 64 MB
    "shared memory of docker, two GPUs": (
        2, {"container": "docker", "shm.total_gb": 0.067, "shm.free_gb": 0.067}, "stops", "shm", "--shm-size",
    ),
    # pytorch 5040: Bus error of loader workers, which ldm has none of
    "shared memory of docker": (
        0, {"container": "docker", "shm.total_gb": 0.067, "shm.free_gb": 0.067}, "note", "shm", "--shm-size",
    ),
    # NVIDIA/nccl 525: the same in a pod
    "shared memory of a pod": (
        2, {"container": "kubernetes", "shm.total_gb": 0.067, "shm.free_gb": 0.067}, "stops", "shm", "emptyDir",
    ),
    "shared memory that is full": (2, {"shm.free_gb": 0.1}, "stops", "shm-full", "/dev/shm"),
    # pytorch/torchtitan 4038, Motphys/UniLab 686
    "threads for cores that a quota takes": (0, {"cpu.quota": 4.0}, "slows", "omp", "OMP_NUM_THREADS=4"),
    "more threads than cores": (
        0, {"environment": {"OMP_NUM_THREADS": "64"}, "torch.threads": 64}, "slows", "omp", "OMP_NUM_THREADS=16",
    ),
    "tasks of too many threads": (
        0, {"environment": {"OMP_NUM_THREADS": "8"}, "torch.threads": 8, "slurm": {"job": "7", "tasks_here": 4}},
        "slows", "omp", "OMP_NUM_THREADS=4",
    ),
    # NVIDIA/enroot 185: a container's hook sets it to 1
    "one thread": (0, {"environment": {"OMP_NUM_THREADS": "1"}, "torch.threads": 1}, "note", "omp-one", "=16"),
    "a full disk": (0, {"disks.0.free_gb": 0.3}, "stops", "disk-full", "du -x"),
    "a disk that is nearly full": (0, {"disks.0.free_gb": 9.0}, "slows", "disk-full", "du -x"),
    "a folder of others": (
        0, {"disks.0.writable": False, "disks.0.error": "Permission denied"}, "stops", "disk-permission", "out=",
    ),
    "a disk that does not answer": (
        0, {"disks": [], "hub": {"error": "no end within 10 s"}}, "stops", "disk-stuck", "df -h",
    ),
    # transformers 13472, bmaltais/kohya_ss 859
    "a cache of others": (
        0, {"hub.writable": False, "hub.error": "Permission denied"}, "slows", "hub-permission", "export HF_HOME=",
    ),
    "no network asked for": (0, {"hub.offline": True}, "note", "hub-offline", "unset"),
    # aws-samples/aws-do-eks 69: hosts whose name is no address of theirs
    "gloo without an address": (
        0, {"measured": {"all_reduce_gloo": {"ranks": 2, "error": "RuntimeError: Gloo connectFullMesh failed"}}},
        "stops", "gloo", "GLOO_SOCKET_IFNAME",
    ),
    # pytorch 165532: ulimit of 1024
    "few open files": (0, {"open_files": 1024}, "note", "open-files", "ulimit -n"),
    # kubeflow/trainer 2884
    "no compiler": (0, {"compiler": None}, "note", "compiler", "g++"),
    "a login node": (0, {"slurm": {"job": None}}, "note", "slurm-login", "srun"),
    "an allocation without its GPU": (
        1, {"slurm": {"job": "7", "gpus_here": 0}} | UNUSABLE, "stops", "slurm-no-gpu", "--gpus-per-node",
    ),
    "an allocation of one core": (
        2, {"slurm": {"job": "7", "gpus_here": 2, "cores_here": 1}, "cpu.usable": 1, "torch.threads": 1},
        "slows", "slurm-cores", "--cpus-per-task",
    ),
    "a group of little memory": (0, {"cpu.limit_gb": 2.0}, "slows", "memory-limit", "--memory"),
    "an extra that is missing": (0, {"packages.gradio": None}, "note", "extras", 'ldm[web]"'),
    "a disk as slow as a network": (
        0, {"measured": {"disk": {"write_gb_per_s": 0.02}}}, "slows", "disk-slow", "out=",
    ),
    "a CPU that emulates bfloat16": (
        0, {"measured": {"matrix_product_gflop_per_s": {"cpu": {"fp32": 200.0, "bf16": 20.0}}}},
        "note", "cpu-bf16", "precision=auto",
    ),
    "a machine that others use": (0, {"measured": {"disk": {}}, "cpu.load": 40.0}, "note", "busy", "top"),
}  # fmt: skip


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_nothing_is_said_of_a_healthy_machine(gpus: int) -> None:
    assert diagnose(healthy(gpus)) == []


@pytest.mark.parametrize("case", CASES)
def test_what_people_report(case: str) -> None:
    gpus, changes, level, key, mend = CASES[case]
    facts = changed(healthy(gpus), changes)
    found = {f.key: f for f in diagnose(facts)}
    assert key in found, list(found)
    assert (found[key].level, mend in found[key].mend) == (level, True), found[key]
    assert stops(list(found.values())) == any(f.level == "stops" for f in found.values())
    told = text(changed(healthy(gpus), {}) | facts, list(found.values())) if facts["torch"].get("version") else ""
    assert all(len(line) <= WIDTH or " " not in line.strip() or line.lstrip()[0] in "$-" for line in told.splitlines())


def test_facts_that_are_missing_break_no_check() -> None:
    """A trial may end before it says anything: every section, and every value of a section, may not be there."""
    facts = healthy(1)
    for lost, section in facts.items():
        diagnose({k: v for k, v in facts.items() if k != lost})
        for name in section if isinstance(section, dict) else ():
            diagnose(facts | {lost: {k: v for k, v in section.items() if k != name}})


def test_packages_are_those_of_the_project() -> None:
    """What is asked of packages is what pyproject.toml asks, and each extra that a user may want is told."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    named = re.findall(r'"([A-Za-z][\w-]*)([<>=!][^";]*)?(?:; ([^"]*))?"', block[1])
    assert {name: asked for name, asked, when in named if not when or Marker(when).evaluate()} == NEEDED
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)
    assert extras is not None
    offered = dict(re.findall(r"^(\w+) = \[(.*?)\]$", extras[1], re.MULTILINE))
    own = {"test", "ci", "dev", "docs"}
    assert {extra for extra, _ in EXTRAS.values()} == set(offered) - own
    assert all(f'"{name}' in offered[extra] for name, (extra, _) in EXTRAS.items())


def test_levels_are_sorted() -> None:
    facts = changed(healthy(), {"open_files": 64, "disks.0.free_gb": 0.1, "cpu.quota": 2.0})
    assert [f.level for f in diagnose(facts)] == ["stops", "slows", "note"]


# --- what children say, read ----------------------------------------------------------------------------------------
PAGE = """Tue Jun  2 10:11:12 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
"""
ROWS = "NVIDIA A100-SXM4-80GB, 81920, 550.54.15, 8.0\nTesla V100-SXM2-32GB, 32768, 550.54.15, 7.0\n"


def answer(log: str = "", values: dict[str, Any] | None = None, ended: str = "") -> Answer:
    return Answer(values or {}, ended, log, 1.0)


def test_nvidia_smi_is_read() -> None:
    found = _driver("/usr/bin/nvidia-smi", [answer(PAGE), answer(ROWS)])
    assert (found["version"], found["cuda"], found["error"]) == ("550.54.15", "12.4", None)
    assert found["gpus"][0] == {"name": "NVIDIA A100-SXM4-80GB", "memory_gb": 85.9, "capability": "8.0"}
    failed = _driver(
        "/usr/bin/nvidia-smi", [answer("Failed to initialize NVML: Driver/library version mismatch\n", ended="x")] * 2
    )
    assert failed["error"] == "Failed to initialize NVML: Driver/library version mismatch"
    assert failed["gpus"] == []
    assert _driver("/usr/bin/nvidia-smi", [answer(ended="no end within 20 s")] * 2)["error"] == "no end within 20 s"


def test_a_torch_that_fails_is_told_from_one_that_is_missing_or_hangs() -> None:
    assert _torch(answer(), None)["state"] == "missing"
    broken = _torch(answer(values={"torch": {"error": "OSError: libcudnn.so.9: cannot open"}}), "2.14.1")
    assert (broken["state"], broken["version"]) == ("broken", "2.14.1")
    assert _torch(answer(ended="died of SIGILL"), "2.14.1")["error"] == "died of SIGILL"
    assert _torch(answer(ended="no end within 60 s"), "2.14.1")["state"] == "stuck"
    late = _torch(answer(values={"torch": {"version": "2.14.1"}}, ended="no end within 60 s"), "2.14.1")
    assert (late["state"], late["cut_short"]) == ("ok", "no end within 60 s")
    warned = f"/x/torch/nn.py:1: UserWarning: Failed to initialize NumPy\n{NUMPY}\nNumPy 2.0.0 as it may crash.\n"
    assert _torch(answer(warned, {"torch": {"version": "2.2.0"}}), "2.2.0")["warnings"][1] == NUMPY


def test_an_import_that_dies_is_the_one_that_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    log = f"{IMPORTING}a\n{XFORMERS}{IMPORTING}b\nFatal\n"
    first = answer(log, {"a": {"ok": True, "error": None}}, "died of SIGSEGV")
    asked: list[tuple[str, ...]] = []

    def ask(questions: Any) -> list[Answer]:
        asked.append(questions[0].command[-1:])
        return [answer(values={"c": {"ok": True, "error": None}})]

    monkeypatch.setattr("ldm.cli.doctor.facts.ask", ask)
    found = _imports(["a", "b", "c"], first, 5.0)
    assert found["a"]["said"] == XFORMERS
    assert found["b"] == {"ok": False, "error": "died of SIGSEGV", "said": "Fatal\n"}
    assert found["c"]["ok"]
    assert asked == [("c",)]


def test_an_allocation_is_read() -> None:
    env = {
        "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-2,7]", "SLURM_NTASKS": "24", "SLURM_CPUS_ON_NODE": "64",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_MEM_PER_NODE": "512000", "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip
    found = slurm(env)
    assert found is not None
    assert (found["nodes"], found["gpus_here"], found["cores_here"]) == (["n1", "n2", "n7"], 8, 64)
    assert found["memory_gb"] == 536.9
    assert slurm({"SLURM_JOB_ID": "1", "SLURM_JOB_GPUS": "0,3"})["gpus_here"] == 2  # type: ignore[index]


# --- versions -------------------------------------------------------------------------------------------------------
def test_versions() -> None:
    assert numbers("2.14.1+cu130") == (2, 14, 1)
    assert fits("0.19.8", ">=0.19.8,<0.20")
    assert not fits("0.20", ">=0.19.8,<0.20")
    assert not fits("5.24.0", ">=4.50,!=5.24.0")
    assert fits("2.10.0", ">=2.4"), "numbers, not words"
    assert encoded_cuda(12040) == (12, 4)
    assert encoded_cuda(11080) == (11, 8)
    assert [partner(v) for v in ("2.0.1", "2.4.0", "2.14.1+cu130", "1.13")] == ["0.15", "0.19", "0.29", ""]


@pytest.mark.parametrize(
    ("capability", "architectures", "right"),
    [
        ((8, 6), ["sm_80"], True),  # a later minor
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),  # another major needs what can be translated
        ((9, 0), ["sm_80", "compute_80"], True),
        ((7, 0), OF_130, False),
        ((12, 0), OF_130, True),
        ((12, 1), OF_130, True),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90a", "compute_90a"], False),  # code of one chip alone
    ],
)
def test_code_for_a_card(capability: tuple[int, int], architectures: list[str], right: bool) -> None:
    """As NVIDIA's guide to compatibility has it."""
    assert covered(capability, architectures) is right
