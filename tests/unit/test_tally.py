"""The counters of a web process: they outlive it, however it ends, and nobody takes those of a living one."""

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.tracing.handover.tally import Counts, Owner, Tally, find_left

OWNER = Owner(process_id=7, database="77-1", host="here", started_ns=5, agents=("math", "support"))

COUNTING = """
import sys
from pathlib import Path
from gateway.tracing.handover.tally import Owner, Tally

tally = Tally.create(Path(sys.argv[1]), Owner(7, "77-1", "here", 5, ("math", "support")))
print("ready", flush=True)
while True:
    tally.begin("math")
    print("begun", flush=True)
"""


def test_counts_by_agent(tmp_path: Path) -> None:
    """Each agent has counts of its own, of runs begun and of runs dropped by reason."""
    tally = Tally.create(tmp_path / "web", OWNER)
    for _ in range(3):
        tally.begin("math")
    tally.begin("support")
    tally.drop("math", "buffer_full")
    tally.drop("support", "refused")
    assert tally.counts() == {"math": Counts(3, 1, 0), "support": Counts(1, 0, 1)}
    assert [each.dropped for each in tally.counts().values()] == [1, 1]


def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """The folder has mode 0700, the file 0600."""
    tally = Tally.create(tmp_path / "home" / "web", OWNER)
    assert tally.path is not None
    assert stat.S_IMODE(tally.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(tally.path.parent.stat().st_mode) == 0o700


def test_counts_outlive_a_kill(tmp_path: Path) -> None:
    """After a kill -9 in the middle of counting every run is there that was begun, and the file can be had."""
    command = [sys.executable, "-c", COUNTING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(100):
            process.stdout.readline()
        assert list(find_left(tmp_path, "77-1")) == []
        process.send_signal(signal.SIGKILL)
        begun = 100 + len([line for line in process.stdout.read().splitlines() if line == "begun"])
    (left,) = find_left(tmp_path, "77-1")
    assert left.owner == OWNER
    assert left.counts["math"].begun - begun in {0, 1}  # the last may not have been said
    assert left.counts["support"] == Counts(0, 0, 0)
    left.release(delete=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_is_one_finders_only(tmp_path: Path) -> None:
    """While one has what a dead process left nobody else gets it; when it is let go the next one does."""
    tally = Tally.create(tmp_path, OWNER)
    tally.begin("math")
    assert list(find_left(tmp_path, "77-1")) == []
    tally.close(delete=False)
    (left,) = find_left(tmp_path, "77-1")
    assert list(find_left(tmp_path, "77-1")) == []
    left.release(delete=False)
    (left,) = find_left(tmp_path, "77-1")
    assert left.counts["math"] == Counts(1, 0, 0)
    left.release(delete=True)
    assert list(find_left(tmp_path, "77-1")) == []


def test_a_process_that_ended_in_order_leaves_nothing(tmp_path: Path) -> None:
    """Settled counts are deleted, and counting on afterwards does no harm."""
    tally = Tally.create(tmp_path, OWNER)
    tally.close(delete=True)
    tally.begin("math")
    assert list(tmp_path.iterdir()) == []


def test_another_databases_counts_are_left_alone(tmp_path: Path) -> None:
    """A home that is pointed at another database keeps what belongs to the first, also if its name begins alike."""
    Tally.create(tmp_path, OWNER).close(delete=False)
    assert list(find_left(tmp_path, "77-2")) == []
    assert list(find_left(tmp_path, "77")) == []
    (left,) = find_left(tmp_path, "77-1")
    left.release(delete=False)


def test_a_file_that_cannot_be_read_is_still_somebodys(tmp_path: Path) -> None:
    """Of a file that was never written back, or is cut short, the name says whose it is, and the counts are unknown."""
    tally = Tally.create(tmp_path, OWNER)
    tally.close(delete=False)
    assert tally.path is not None
    content = tally.path.read_bytes()
    for spoilt in (b"", bytes(len(content)), content[:20], content[:-8]):
        tally.path.write_bytes(spoilt)
        (left,) = find_left(tmp_path, "77-1")
        left.release(delete=False)
        assert (left.process_id, left.owner, left.counts) == (7, None, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_leaves_nothing_open(tmp_path: Path) -> None:
    """Where the file cannot be written it is said, and its descriptor is free again."""
    (tmp_path / "77-1.7.new").symlink_to("/dev/full")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space"):
        Tally.create(tmp_path, OWNER)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_counts_without_a_disk(tmp_path: Path) -> None:
    """Where no file can be made a process counts all the same."""
    tally = Tally.in_memory(OWNER)
    tally.begin("math")
    assert tally.counts()["math"] == Counts(1, 0, 0)
    tally.close(delete=True)
