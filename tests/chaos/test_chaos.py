"""The short form of `make chaos`: three kills, a damaged checkpoint, a full and a read-only disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.disks import Disk, full, read_only
from tests.chaos.kills import kill_often

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


def test_what_survives_kills_and_damage_is_the_undisturbed_run(root: Path) -> None:
    table = kill_often(root, 3, seed=4, damaging=0.7)
    print(table.text())
    assert table.kills == 3
    assert table.resumes >= 2
    assert table.curve_equal
    assert table.weights_equal
    assert table.wrongly_read == 0
    assert table.peers_that_hung == 0
    assert table.truncated + table.flipped >= 1
    assert table.damaged_skipped == table.truncated + table.flipped - table.harmless


@pytest.mark.slow
@pytest.mark.parametrize("disk", [full, read_only])
def test_a_disk_that_fails_costs_no_older_checkpoint(root: Path, disk: Callable[[Path], Disk]) -> None:
    found = disk(root)
    if found.skipped:
        pytest.skip(found.skipped)
    assert 0 not in found.codes
    assert found.whole > 0
    assert found.lost_checkpoints == 0
    assert found.curve_equal
