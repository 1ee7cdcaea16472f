"""A SLURM cluster of several nodes on one machine, out of Linux namespaces; for tests, and for trying things by hand.

    python tests/slurm/cluster.py            # starts one, opens a shell on its login host, ends with the shell

The controller's host is one set of namespaces (network, processes, mounts, host name); each node is a further set
inside of it: its own address on a bridge, its own processes, /dev/shm, uptime and local disk. The rest of the file
system is shared, as a cluster's network disk would be. Killing a node's first process is a crash of the node;
killing the controller host's first process ends everything. There is no route to the outside.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "ip", "unshare", "nsenter")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
SUBNET = "10.91.0"
_SPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

CONFIG = """\
ClusterName=test
SlurmctldHost=control({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
JobRequeue=1
MinJobAge=3600
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
KillWait=5
UnkillableStepTimeout=120
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""
# cred_expire: a requeued job waits that long and a second (120 s otherwise). The timeouts show faults in seconds.


def missing() -> str:
    """Why no cluster can be started here, or ""."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a SLURM cluster out of namespaces needs Linux and root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: {INSTALL}"
    probe = subprocess.run(["unshare", *_SPACES, "--time", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else ""


class Cluster:
    """`up()` to `down()`; the methods between act on one running cluster."""

    def __init__(self, nodes: int = 3, cpus: int = 4) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.local = self.root / "local"  # the same path on each node, another disk
        self._cpus = cpus
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._crashed: dict[str, float] = {}
        self._env = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_PATH}"}

    def up(self) -> None:
        """Start controller and nodes; RuntimeError with the end of the logs if they do not come up."""
        self._write_files()
        try:
            self._spawn(["unshare", *_SPACES, sys.executable, __file__, "head", str(self.root)], "head")
            until(lambda: (self.root / "head.ready").exists(), 20, "the controller did not start")
            for node in self.nodes:
                self._boot(node)
            until(lambda: self._in_service(self.nodes), 30, "the nodes did not come up")
        except RuntimeError as error:
            logs = "".join(p.read_text(errors="replace")[-2000:] for p in sorted(self.root.glob("*.log")))
            self.down()
            raise RuntimeError(f"{error}\n{logs}") from error

    def down(self) -> None:
        """End everything and remove the folder."""
        if "head" in self._hosts:
            self._hosts["head"].kill()  # --kill-child takes the first process inside along, and the kernel the rest
        for process in self._hosts.values():
            process.wait(timeout=20)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str, check: bool = True, timeout: float = 60, cwd: Path | None = None, **env: str) -> str:
        """Standard output of a command on the login host; RuntimeError with its standard error if it fails."""
        done = subprocess.run(
            [*self._enter(self._inside("head")), *command],
            capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**self._env, **env},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def on(self, node: str, *command: str, timeout: float = 60) -> str:
        """Standard output of a command on a node."""
        enter = [*self._enter(self._inside(node)), *command]
        return subprocess.run(enter, capture_output=True, text=True, timeout=timeout, check=True, env=self._env).stdout

    def crash(self, node: str) -> None:
        """All processes of the node die at once; peers see their connections close."""
        os.kill(self._inside(node), signal.SIGKILL)
        (self.root / f"{node}.pid").unlink()
        self._crashed[node] = time.monotonic()

    def power_off(self, node: str) -> None:
        """As a crash, but peers only see silence."""
        self.cut(node)
        self.crash(node)

    def boot(self, node: str) -> None:
        """Start a dead node again and wait until it is in service."""
        self._hosts[node].wait(timeout=20)
        # As a machine would take; SLURM tells a reboot by its second being later than that of the last sign of life.
        time.sleep(max(0.0, self._crashed[node] + 2.5 - time.monotonic()))
        self._boot(node)
        end = time.monotonic() + 120
        while not self._in_service([node]):
            if self._state(node).startswith("down"):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # an operator would
            if time.monotonic() > end:
                raise RuntimeError(f"{node} did not come back: {self._state(node)}")
            time.sleep(0.2)

    def cut(self, node: str) -> None:
        """Pull the network cable; the node's processes live on."""
        self.run("ip", "link", "set", f"to-{node}", "down")

    def heal(self, node: str) -> None:
        """Plug the cable in again and wait until the node is in service."""
        self.run("ip", "link", "set", f"to-{node}", "up")
        until(lambda: self._in_service([node]), 90, f"{node} did not come back")

    def stop_controller(self) -> None:
        """slurmctld dies without saving anything; the jobs go on."""
        self.run("sh", "-c", f"kill -9 $(cat {self.root}/slurmctld.pid)")

    def start_controller(self) -> None:
        self.run("slurmctld", "-f", str(self.root / "slurm.conf"))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ...; "" while the controller does not answer."""
        fields = self.details(job)
        return fields.get("JobState", "")

    def details(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells."""
        text = self.run("scontrol", "-o", "show", "job", job, check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 60) -> str:
        """Until the job is in one of the states; that state. RuntimeError when it takes too long."""
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.state(job)
            return seen in states

        until(reached, timeout, lambda: f"job {job} is {seen or 'unknown'}, not {' or '.join(states)}")
        return seen

    def idle(self) -> None:
        """Cancel all jobs, bring every node back into service."""
        self.run("scancel", "-u", "root", check=False)
        self.run("scancel", "--signal=KILL", "-u", "root", check=False)
        for node in self.nodes:
            self.run("ip", "link", "set", f"to-{node}", "up", check=False)
            if not (self.root / f"{node}.pid").exists():
                self.boot(node)
        until(self._is_idle, 120, lambda: f"not idle: {self.run('sinfo', '-h', '-N', '-o', '%N %T %E')}")
        until(self._starts_steps, 60, lambda: f"srun does not reach every one of {self.nodes}")

    def _starts_steps(self) -> bool:
        """Whether a step starts on every node: a node that has just come back may be idle and not yet reached."""
        nodes = str(len(self.nodes))
        told = self.run("srun", "-p", "main", "-N", nodes, "-t", "1", "--immediate=10", "hostname", check=False)
        return len(told.split()) == len(self.nodes)

    def _is_idle(self) -> bool:
        """Whether all nodes are; those that SLURM gave up on (a process was slow to die) are taken back."""
        for node in self.nodes:
            if self._state(node).startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return self._in_service(self.nodes, ("idle",))

    def _write_files(self) -> None:
        for folder in ("state", "disks", "local"):
            (self.root / folder).mkdir()
        nodes = "\n".join(
            f"NodeName={n} NodeAddr={SUBNET}.{i + 11} CPUs={self._cpus} RealMemory=8000"
            for i, n in enumerate(self.nodes)
        )
        (self.root / "slurm.conf").write_text(CONFIG.format(root=self.root, nodes=nodes, subnet=SUBNET))
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n")
        hosts = {"control": 1, **{n: i + 11 for i, n in enumerate(self.nodes)}}
        lines = ["127.0.0.1 localhost", *(f"{p}{SUBNET}.{k} {h}" for h, k in hosts.items() for p in ("", "::ffff:"))]
        (self.root / "hosts").write_text("\n".join(lines) + "\n")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _boot(self, node: str) -> None:
        head = self._inside("head")
        uptime = int(float(Path("/proc/uptime").read_text().split()[0]))  # its own: SLURM sees the reboot by it
        inner = ["unshare", *_SPACES, "--time", "--boottime", f"-{uptime}", sys.executable, __file__, "node"]
        inside = self._spawn([*self._enter(head), *inner, str(self.root), node, str(self.nodes.index(node) + 11)], node)
        network = ["nsenter", "-t", str(head), "-n", "--", "ip", "link"]  # only: process numbers are ours
        subprocess.run([*network, "del", f"to-{node}"], capture_output=True)
        plug = [*network, "add", f"to-{node}", "type", "veth", "peer", "name", "eth0", "netns", str(inside)]
        subprocess.run(plug, check=True)
        subprocess.run([*network, "set", f"to-{node}", "master", "bridge0", "up"], check=True)

    def _spawn(self, command: Sequence[str], name: str) -> int:
        """Start a host; its first process, by our own process numbers."""
        with (self.root / f"{name}.log").open("ab") as log:
            self._hosts[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        pid = _first_process(self._hosts[name].pid, __file__)
        (self.root / f"{name}.pid").write_text(str(pid))
        return pid

    def _inside(self, name: str) -> int:
        """The first process of a host, by our own process numbers."""
        path = self.root / f"{name}.pid"
        if not path.exists():
            raise RuntimeError(f"{name} is not running")
        return int(path.read_text())

    def _enter(self, pid: int) -> list[str]:
        return ["nsenter", "-t", str(pid), "-n", "-u", "-i", "-m", "-p", "-T", f"--wd={os.getcwd()}", "--"]

    def _state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T", check=False).split("\n")[0]

    def _in_service(
        self, nodes: Sequence[str], states: Sequence[str] = ("idle", "mixed", "allocated", "completing")
    ) -> bool:
        listed = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        found = dict(line.split() for line in listed)
        return all(found.get(node) in states for node in nodes)  # "idle*" is a node that does not answer


def until(ready: Callable[[], bool], timeout: float, message: str | Callable[[], str]) -> None:
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(message if isinstance(message, str) else message())
        time.sleep(0.1)


def _sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


def _first_process(of: int, script: str) -> int:
    """The process number, as seen here, of the Python inside that the chain of unshare and nsenter started."""
    end = time.monotonic() + 20
    pid = of
    while time.monotonic() < end:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if script.encode() in words and words[0] == sys.executable.encode():
                return pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            raise RuntimeError(f"process {of} ended early") from None
        pid = int(children[0]) if children else pid
        time.sleep(0.01)
    raise RuntimeError(f"process {of} did not start {script}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _head(root: Path) -> None:
    _sh(f"hostname control; mount --bind {root}/hosts /etc/hosts; ip link set lo up")
    _sh(f"ip link add bridge0 type bridge; ip addr add {SUBNET}.1/24 dev bridge0; ip link set bridge0 up")
    munge = f"--socket={root}/munge.socket --key-file={root}/munge.key --pid-file={root}/munged.pid"
    _sh(f"munged --force {munge} --log-file={root}/munged.log --seed-file={root}/munged.seed")
    _sh(f"slurmctld -f {root}/slurm.conf")
    (root / "head.ready").touch()
    _reap()


def _node(root: Path, name: str, number: str) -> None:
    disk = root / "disks" / name
    disk.mkdir(exist_ok=True)
    _sh(f"hostname {name}; mount --bind {disk} {root}/local; mount -t tmpfs tmpfs /dev/shm")
    _sh("ip link set lo up")
    while subprocess.run(["ip", "link", "show", "eth0"], capture_output=True).returncode:
        time.sleep(0.02)  # the other side plugs the cable in
    _sh(f"ip addr add {SUBNET}.{number}/24 dev eth0; ip link set eth0 up; slurmd -f {root}/slurm.conf -N {name}")
    _reap()


def _reap() -> None:
    """What a first process does: collect orphans, forever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


def _shell() -> None:
    cluster = Cluster()
    cluster.up()
    try:
        sys.stderr.write(f"SLURM cluster of {', '.join(cluster.nodes)}; logs in {cluster.root}; ends with this shell\n")
        subprocess.run([*cluster._enter(cluster._inside("head")), os.environ.get("SHELL", "bash")], env=cluster._env)
    finally:
        cluster.down()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["head", root]:
            _head(Path(root))
        case ["node", root, name, number]:
            _node(Path(root), name, number)
        case []:
            _shell()
        case _:
            sys.exit(__doc__)
