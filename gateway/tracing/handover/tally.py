"""Counts of the runs that a web process served, apart from the rows that they become, so that a loss is seen.

One small file a process, mapped into memory: a header that says whose counts these are, then for each agent a few
numbers of 64 bits (`Counts`). Counting is a store into the mapping, which the kernel keeps
whatever becomes of the process, ``kill -9`` included. Nothing is written by us and nobody is waited for. (What the
kernel does ask for: once it has written the page back, every few seconds at most, the next store marks the page anew,
some microseconds.) A power failure may leave counts that are some seconds old: whoever settles them takes the
highest number that anything vouches for (`gateway.tracing.handover.settling`).

The process holds a lock on the file, which the kernel frees when it dies, however it dies: a file whose lock can be had
is one that a dead process left.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Self

import msgspec

SUFFIX = ".tally"
SPILL_SUFFIX = ".spill"
"""The spill file of a process stands beside its tally."""

_HEAD = struct.Struct("<4sI")  # marker, bytes of the header that follows
_MARKER = b"tly1"
_SLOT_BYTES = 8  # native unsigned 64-bit: read on the machine that wrote it


class Owner(msgspec.Struct, frozen=True):
    """Whose counts a tally has."""

    process_id: int
    """Id of the web process (table ``web_processes``)."""
    database: str
    """Which database it serves from (`settling.database_identity`): a home may see several."""
    host: str
    started_ns: int
    """When the process began to count, nanoseconds since the epoch."""
    agents: tuple[str, ...]


class Counts(NamedTuple):
    """Of one agent, since the process began."""

    begun: int
    """Runs that the process began to serve."""
    buffer_full: int
    """Those of them of which not even a row could be kept, since every buffer was full."""
    refused: int
    """Those of them whose row the database refused."""

    @property
    def dropped(self) -> int:
        """Those of which there is no row."""
        return self.buffer_full + self.refused


DROP_REASONS: tuple[Literal["buffer_full", "refused"], ...] = ("buffer_full", "refused")
"""Reasons in ``run_drops`` that a process counts itself; each is a field of `Counts`."""
_KINDS = len(Counts._fields)


class Tally:
    """The counts of one living process. All methods but `create` and `close` are for the event loop."""

    def __init__(self, owner: Owner, memory: mmap.mmap, offset: int, path: Path | None, descriptor: int | None):
        """Use `create`."""
        self.owner = owner
        self.path = path
        """The file; ``None`` where no file could be made: these counts die with the process."""
        self._descriptor = descriptor
        self._slots = memoryview(memory)[offset:].cast("Q")
        self._places = {agent: _KINDS * number for number, agent in enumerate(owner.agents)}

    @classmethod
    def create(cls, folder: Path, owner: Owner) -> Self:
        """Make the file, locked, so that nobody ever sees it otherwise.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{stem(owner.database, owner.process_id)}{SUFFIX}"
        draft = path.with_suffix(".new")
        content = _content(owner)
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, content)
            os.fsync(descriptor)
            memory = mmap.mmap(descriptor, len(content))
            draft.rename(path)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(owner, memory, _offset(content), path, descriptor)

    @classmethod
    def in_memory(cls, owner: Owner) -> Self:
        """Return counts without a file."""
        content = _content(owner)
        memory = mmap.mmap(-1, len(content))
        return cls(owner, memory, _offset(content), None, None)

    def begin(self, agent: str) -> None:
        """Count a run that begins."""
        self._slots[self._places[agent]] += 1

    def drop(self, agent: str, reason: Literal["buffer_full", "refused"]) -> None:
        """Count a run of which nothing can be kept."""
        self._slots[self._places[agent] + Counts._fields.index(reason)] += 1

    def counts(self) -> dict[str, Counts]:
        """Return the counts by agent."""
        return {agent: Counts(*self._slots[at : at + _KINDS]) for agent, at in self._places.items()}

    def close(self, *, delete: bool) -> None:
        """Let go of the file, and ``delete`` it if its counts are settled; counting on does no harm, and is lost."""
        if delete and self.path is not None:
            self.path.unlink(missing_ok=True)
        if self._descriptor is not None:
            # Said, not left to the closing: the mapping keeps a copy of the descriptor.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


class Left(NamedTuple):
    """What a dead process left, locked by us until `release`."""

    process_id: int
    path: Path
    owner: Owner | None
    """``None``: the file was never written back, or is damaged; its name still says whose it is."""
    counts: dict[str, Counts]
    """By agent; empty if they cannot be read."""
    descriptor: int

    @property
    def spill_path(self) -> Path:
        """Where its spill file is, if it has one."""
        return self.path.with_suffix(SPILL_SUFFIX)

    def release(self, *, delete: bool) -> None:
        """Let go of it; ``delete`` it first if it is settled."""
        if delete:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def find_left(folder: Path, database: str) -> Iterable[Left]:
    """Yield what dead processes left of that database in the folder, each locked: nobody else gets it meanwhile."""
    for path in sorted(folder.glob(f"{database}.*{SUFFIX}")):
        number = path.name.removeprefix(f"{database}.").removesuffix(SUFFIX)
        if number.isdecimal() and (left := _take(path, int(number))) is not None:
            yield left


def stem(database: str, process_id: int) -> str:
    """Return what the names of a process' files begin with."""
    return f"{database}.{process_id}"


def _take(path: Path, process_id: int) -> Left | None:
    """Lock a tally and read it; ``None`` if its process lives, or it is gone by now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its process may have ended in order, or another settled it, between the two lines above.
        is_there = path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino
        owner, counts = _parse(path.read_bytes()) if is_there else (None, {})
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    except BaseException:
        os.close(descriptor)
        raise
    if not is_there:
        os.close(descriptor)
        return None
    return Left(process_id, path, owner, counts, descriptor)


def _content(owner: Owner) -> bytes:
    """Return the file as it begins: header, padding, zeros."""
    header = msgspec.msgpack.encode(owner)
    head = _HEAD.pack(_MARKER, len(header)) + header
    padding = -len(head) % _SLOT_BYTES
    return head + bytes(padding + _SLOT_BYTES * _KINDS * len(owner.agents))


def _offset(content: bytes) -> int:
    """Return where the numbers begin."""
    end = _HEAD.size + int(_HEAD.unpack_from(content)[1])
    return end + -end % _SLOT_BYTES


def _parse(content: bytes) -> tuple[Owner | None, dict[str, Counts]]:
    if len(content) < _HEAD.size or content[: len(_MARKER)] != _MARKER:
        return None, {}
    length = _HEAD.unpack_from(content)[1]
    try:
        owner = msgspec.msgpack.decode(content[_HEAD.size : _HEAD.size + length], type=Owner)
        slots = memoryview(content)[_offset(content) :].cast("Q")
        return owner, {
            agent: Counts(*slots[_KINDS * number : _KINDS * (number + 1)]) for number, agent in enumerate(owner.agents)
        }
    except (msgspec.DecodeError, TypeError, IndexError):
        return None, {}
