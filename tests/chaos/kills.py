"""Kill a training at random moments, damage its checkpoints, and compare what survives with a run that had peace."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.training import LIMIT, Training, config

COMPARED = ("loss", "grad_norm", "lr")


@dataclass
class Table:
    """What happened. `lost` are steps trained twice; `harmless` bits flipped where nothing depends on them.

    Each kill counts once: while a checkpoint was being written, else before the first step of a start, else in a step.
    """

    kills: int = 0
    while_writing: int = 0
    in_a_step: int = 0
    while_starting: int = 0
    one_rank: int = 0
    all_ranks: int = 0
    peers_that_hung: int = 0
    resumes: int = 0
    lost: int = 0
    most_lost: int = 0
    truncated: int = 0
    flipped: int = 0
    harmless: int = 0
    damaged_skipped: int = 0
    wrongly_read: int = 0
    steps: int = 0
    curve_equal: bool = False
    weights_equal: bool = False
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """For a terminal."""
        names = {"lost": "steps lost", "most_lost": "most steps lost at once", "seconds": "seconds"}
        rows = [(names.get(k, k.replace("_", " ")), v) for k, v in self.record().items()]
        return "\n".join(f"{name:<26}{value:>10.0f}" if isinstance(value, float) else f"{name:<26}{value!s:>10}"
                         for name, value in rows)  # fmt: skip


def damage(folder: Path, chance: random.Random) -> str:
    """Truncate a file of a checkpoint, or flip one bit of it; which of both."""
    path = chance.choice(sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size > 0))
    if chance.random() < 0.5:
        with path.open("r+b") as file:
            file.truncate(chance.randrange(path.stat().st_size))
        return "truncated"
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return "flipped"


def kill_often(root: Path, kills: int, seed: int = 0, *, damaging: float = 0.25) -> Table:
    """The whole experiment below `root`; AssertionError if a start ends in a way that it should not."""
    began, chance, table = time.monotonic(), random.Random(seed), Table()
    table.steps = 8 + 3 * kills
    path = config(root, table.steps)
    calm = Training(path, root / "calm", root / "scratch" / "calm")
    calm.start()
    assert calm.wait() == [0, 0], calm.said()
    run = Training(path, root / "killed", root / "scratch" / "killed")
    before, damaged, expected = 0, 0, 0
    while table.kills < kills:
        run.start()
        moment = chance.choices(("running", "writing", "starting"), (9, 9, 2))[0]
        _wait_for(run, moment, before, chance)
        if run.ended():
            raise AssertionError(f"ended by itself: {run.wait()}\n{run.said()[-3000:]}")
        at = "writing" if run.writing() else "starting" if "resuming from" not in run.said() else "step"
        at = "step" if at == "starting" and run.step() > before else at
        victims = chance.choice(((0,), (1,), (0, 1)))
        table.peers_that_hung += not run.kill(victims)
        table.kills += 1
        table.one_rank += len(victims) == 1
        table.all_ranks += len(victims) == 2
        table.while_writing += at == "writing"
        table.in_a_step += at == "step"
        table.while_starting += at == "starting"
        print(f"kill {table.kills}: {at}, rank {victims}, step {run.step()}, after {time.monotonic() - began:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        _account(run, table, before, damaged, expected)
        before, damaged, expected = run.step(), 0, (run.whole() or [0])[-1]
        if chance.random() < damaging and len(run.whole()) > 1:
            victim = run.whole()[-1]
            how = damage(run.checkpoints / f"step-{victim}", chance)
            table.truncated += how == "truncated"
            table.flipped += how == "flipped"
            damaged, expected = int(victim not in run.whole()), run.whole()[-1]
            table.harmless += not damaged  # in the white space of a listing, say; every tensor's file has its hash
    run.start()
    codes = run.wait()
    assert codes == [0, 0], run.said()[-3000:]
    _account(run, table, before, damaged, expected)
    ours, theirs = run.rows(), calm.rows()
    table.curve_equal = [[r["step"], *(r[k] for k in COMPARED)] for r in ours] == [
        [r["step"], *(r[k] for k in COMPARED)] for r in theirs
    ] and len(theirs) == table.steps
    names = [
        sorted(p.relative_to(t.out) for p in (t.out / "export" / "unet").rglob("*.safetensors")) for t in (calm, run)
    ]
    table.weights_equal = bool(names[0]) and names[0] == names[1] and all(
        (calm.out / name).read_bytes() == (run.out / name).read_bytes() for name in names[0]
    )  # fmt: skip
    table.seconds = time.monotonic() - began
    return table


def _wait_for(run: Training, moment: str, before: int, chance: random.Random) -> None:
    """The moment to kill at."""
    if moment == "starting":
        time.sleep(chance.uniform(0, 1.5))
        return
    target, end = before + chance.randint(1, 4), time.monotonic() + LIMIT
    while run.step() < target and not run.ended() and time.monotonic() < end:
        time.sleep(0.002)
    if moment == "writing":
        while not run.writing() and not run.ended() and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.004))
    else:
        time.sleep(chance.uniform(0, 0.03))


def _account(run: Training, table: Table, before: int, damaged: int, expected: int) -> None:
    """Compare where the start went on from with the newest whole checkpoint that was there."""
    if "resuming from" not in run.said():
        return
    table.resumes += 1
    table.damaged_skipped += run.said().count("is damaged") > 0 and damaged
    table.wrongly_read += run.resumed() != expected
    lost = max(0, before - run.resumed())
    table.lost += lost
    table.most_lost = max(table.most_lost, lost)
