"""The spill file: what is written comes back in order, whole, once, and whatever a crash or a disk did to it."""

import os
import stat
from pathlib import Path

import pytest

from gateway.crypto import Cipher, WrongKey
from gateway.tracing.handover.spill import Spill
from gateway.tracing.handover.storing import FinishedRun

CIPHER = Cipher(b"k" * 32)
MANY = 1_000
PLENTY = 1_000_000


def run(number: int, payload: bytes = b"payload") -> FinishedRun:
    """Return a run with that number."""
    return FinishedRun(
        trace_id=f"tr-{number:032x}",
        agent="math",
        agent_version="1",
        session_id=f"private-session-{number}",
        user_id=None,
        key_id="anonymous",
        process_id=1,
        failed=False,
        offline=True,
        started_ns=number,
        duration_ms=1.0,
        rate=1.0,
        drawn=True,
        rules=["slow"],
        state="pending",
        payload=payload,
    )


def spill(folder: Path, *, max_bytes: int = PLENTY, cipher: Cipher = CIPHER) -> Spill:
    """Open the spill file of that folder."""
    return Spill(folder / "x.spill", cipher, max_bytes=max_bytes)


def left_in(file: Spill) -> tuple[list[int], int]:
    """Take out everything, two runs at a time; return the runs' numbers, and the damaged places."""
    numbers: list[int] = []
    damaged = 0
    while file.waiting_bytes:
        batch = file.read(2, PLENTY)
        file.advance(batch)
        numbers += [each.started_ns for each in batch.runs]
        damaged += batch.damaged
    return numbers, damaged


def frame_ends(file: Spill, count: int) -> list[int]:
    """Return where each of that many whole frames ends."""
    return [file.read(number, PLENTY).end for number in range(1, count + 1)]


def test_what_is_written_comes_back_in_order(tmp_path: Path) -> None:
    """Runs come back equal and in order, while others are appended, and an empty file takes no space."""
    file = spill(tmp_path)
    assert file.append([run(1), run(2), run(3)]) == 3
    first = file.read(2, PLENTY)
    assert first.runs == [run(1), run(2)]
    assert file.read(2, PLENTY) == first
    file.advance(first)
    assert file.append([run(4)]) == 1
    assert file.waiting_runs == 2
    assert left_in(file) == ([3, 4], 0)
    assert (file.waiting_runs, file.waiting_bytes, file.path.stat().st_size) == (0, 0, 0)
    assert file.append([run(5)]) == 1
    assert left_in(file) == ([5], 0)


def test_a_batch_is_bounded_by_bytes(tmp_path: Path) -> None:
    """A read stops once it has the bytes that it may have, and gives one run however large it is."""
    file = spill(tmp_path)
    file.append([run(number, bytes(1000)) for number in range(4)])
    assert len(file.read(MANY, 1).runs) == 1
    assert len(file.read(MANY, file.waiting_bytes // 2 + 1).runs) == 3


def test_nothing_in_the_file_can_be_read_by_others(tmp_path: Path) -> None:
    """The file is its owner's only, and neither payloads nor ids are in it as they are."""
    file = spill(tmp_path)
    file.append([run(1)])
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    content = file.path.read_bytes()
    assert not [word for word in (b"private-session", b"payload", b"tr-0000") if word in content]


def test_a_full_file_takes_the_first_that_fit(tmp_path: Path) -> None:
    """Beyond its bound a file takes no more, says how many it took, and takes some again once it was emptied."""
    file = spill(tmp_path, max_bytes=3000)
    assert file.append([run(number, bytes(1000)) for number in range(4)]) == 2
    assert file.append([run(4, bytes(1000))]) == 0
    assert left_in(file) == ([0, 1], 0)
    assert file.append([run(5, bytes(1000))]) == 1


def test_a_folder_that_cannot_be_written_takes_nothing(tmp_path: Path) -> None:
    """Where there is no file to be had nothing is taken, and nothing is raised."""
    assert Spill(tmp_path / "missing" / "x.spill", CIPHER, max_bytes=PLENTY).append([run(1)]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_takes_nothing(tmp_path: Path) -> None:
    """A disk without space takes nothing, and what was there before stays whole."""
    file = spill(tmp_path)
    file.append([run(1)])
    good = file._descriptor
    file._descriptor = os.open("/dev/full", os.O_RDWR)
    assert file.append([run(2)]) == 0
    os.close(file._descriptor)
    file._descriptor = good
    assert left_in(file) == ([1], 0)


def test_every_cut_is_survived(tmp_path: Path) -> None:
    """Wherever a crash cut the file, the frames before it are there and the cut one is counted as damaged."""
    file = spill(tmp_path)
    file.append([run(1), run(2), run(3)])
    content = file.path.read_bytes()
    ends = [0, *frame_ends(file, 3)]
    for cut in range(1, len(content) + 1, 7):
        file.path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert left_in(spill(tmp_path)) == (list(range(1, whole + 1)), int(cut not in ends))


def test_a_damaged_frame_costs_no_other(tmp_path: Path) -> None:
    """A byte that changed, in a head or in a body, costs its frame only; zeros of a lost page cost what they hit."""
    file = spill(tmp_path)
    file.append([run(1), run(2), run(3)])
    content = file.path.read_bytes()
    first, second, _ = frame_ends(file, 3)
    for place in (first, first + 5, first + 9, first + 12, second - 1):
        spoilt = bytearray(content)
        spoilt[place] ^= 0xFF
        file.path.write_bytes(spoilt)
        assert left_in(spill(tmp_path)) == ([1, 3], 1), place
    file.path.write_bytes(bytes(second) + content[second:])
    assert left_in(spill(tmp_path)) == ([3], 1)
    file.path.write_bytes(bytes(len(content)))
    assert left_in(spill(tmp_path)) == ([], 1)


def test_a_marker_in_a_payload_is_no_frame(tmp_path: Path) -> None:
    """Garbage that begins like frames is passed over, however long it is."""
    file = spill(tmp_path)
    file.append([run(1)])
    good = file.path.read_bytes()
    file.path.write_bytes(b"\xf1run" * 50_000 + good)
    assert left_in(spill(tmp_path)) == ([1], 1)


def test_a_file_that_a_dead_process_left_is_read(tmp_path: Path) -> None:
    """Another process reads what was left; with another key it is told so, and the file stays as it is."""
    spill(tmp_path).append([run(1), run(2)])
    with pytest.raises(WrongKey):
        left_in(spill(tmp_path, cipher=Cipher(b"o" * 32)))
    found = spill(tmp_path)
    assert left_in(found) == ([1, 2], 0)
    found.close(delete=True)
    assert list(tmp_path.iterdir()) == []
