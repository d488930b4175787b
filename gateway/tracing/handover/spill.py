"""Finished runs on disk: where they wait when the database is away.

One file a web process, in a folder that is for its owner only. It is append-only: frames of a marker, the length of
what follows, its checksum, and a run (`FinishedRun`) as encrypted msgpack. Frames are not synced one by one: what was
written survives the death of the process at any point, ``kill -9`` included, since the kernel has it; a power failure
or a crash of the kernel may take what it had not written back, some seconds' worth. The ledger counts what is missing.

What a crash cut short, or a disk spoiled, is passed over up to the next marker whose frame is whole. What was read is
not marked in the file: who reads after a crash begins at the front again, and storing a run twice changes nothing.

No method is for the event loop: they all may wait for the disk. An object belongs to one thread at a time.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from gateway.crypto import Cipher, DamagedData, WrongKey
from gateway.tracing.handover.storing import FinishedRun

log = structlog.get_logger(__name__)

_MARKER = b"\xf1run"  # not valid UTF-8, so that no text looks like it
_HEAD = struct.Struct("<4sII")  # marker, bytes of the body, CRC-32 of the body
_SCAN_BYTES = 1 << 20
_CONTEXT = "spill"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FinishedRun)


class Batch(NamedTuple):
    """What `Spill.read` found."""

    runs: list[FinishedRun]
    end: int
    """Where in the file they end: for `Spill.advance`, once they are stored."""
    damaged: int
    """Damaged places that were passed over; each is one frame or more."""


class Spill:
    """The spill file of one web process; made when first written to, deleted when empty."""

    def __init__(self, path: Path, cipher: Cipher, *, max_bytes: int):
        """Take the file's path, and the bytes that it may have at the most.

        A file that is there already is what a dead process left: `read` it; nothing shall be appended to it.
        """
        self.path = path
        self._cipher = cipher
        self._max_bytes = max_bytes
        self._descriptor: int | None = None
        self._position = 0
        self._size = 0
        self.waiting_runs = 0
        """Runs that were appended and are not stored yet. Unknown, and 0, for a file that another process wrote."""
        self._complained = False
        if path.exists():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._size = os.fstat(self._descriptor).st_size

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the file that are not stored yet."""
        return self._size - self._position

    def append(self, runs: Sequence[FinishedRun]) -> int:
        """Write as many of the runs as there is room for, and return how many: the first ones. Raises nothing.

        Fewer than were given: the file is as large as it may get, the disk is full, or the folder cannot be written.
        """
        frames: list[bytes] = []
        size = self._size
        for run in runs:
            body = self._cipher.encrypt(_encoder.encode(run), _CONTEXT)
            if size + _HEAD.size + len(body) > self._max_bytes:
                break
            frames.append(_HEAD.pack(_MARKER, len(body), zlib.crc32(body)) + body)
            size += len(frames[-1])
        if not frames:
            return 0
        try:
            self._write(b"".join(frames))
        except OSError as error:
            if not self._complained:
                log.error("the spill file cannot be written", path=str(self.path), error=repr(error))
            self._complained = True
            return 0
        self._complained = False
        self._size = size
        self.waiting_runs += len(frames)
        return len(frames)

    def read(self, max_runs: int, max_bytes: int) -> Batch:
        """Return the next runs that wait, the oldest first; nothing is taken out before `advance`.

        Args:
            max_runs: at the most.
            max_bytes: of frames, roughly; one run is returned however large it is.

        Raises:
            WrongKey: the file was written with a secret that is not among ours any more.
            OSError: the disk does not give the file back.
        """
        runs: list[FinishedRun] = []
        end = self._position
        damaged = 0
        for stop, body in self._frames(self._position):
            run = None if body is None else self._decode(body)
            if run is None:
                damaged += 1
            else:
                runs.append(run)
            end = stop
            if len(runs) >= max_runs or (runs and end - self._position >= max_bytes):
                break
        return Batch(runs, end, damaged)

    def advance(self, batch: Batch) -> None:
        """Take out what `read` returned: it is stored. An empty file is cut to nothing."""
        self._position = batch.end
        self.waiting_runs = max(0, self.waiting_runs - len(batch.runs) - batch.damaged)
        if self._position >= self._size and self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self._position = self._size = self.waiting_runs = 0

    def sync(self) -> None:
        """Have the disk keep what was written, power failure or not."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self, *, delete: bool) -> None:
        """Close the file; ``delete`` it as well if everything in it is stored."""
        if self._descriptor is None:
            return  # there is no file
        os.close(self._descriptor)
        self._descriptor = None
        if delete:
            self.path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        """Append all of it or nothing."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        view, at = memoryview(data), self._size
        try:
            while view:
                written = os.pwrite(self._descriptor, view, at)
                view, at = view[written:], at + written
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise

    def _frames(self, at: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield end and body of each frame from ``at`` on; ``None`` for a damaged place, up to the next whole frame."""
        while at < self._size:
            body = self._body(at)
            if body is not None:
                end = at + _HEAD.size + len(body)
                yield end, body
            else:
                end = self._next_frame(at + 1)
                yield end, None
            at = end

    def _body(self, at: int) -> bytes | None:
        """Return the body of the frame that begins at ``at``; ``None`` if there is no whole one."""
        assert self._descriptor is not None  # noqa: S101 - a file with bytes is open
        head = os.pread(self._descriptor, _HEAD.size, at)
        if len(head) < _HEAD.size:
            return None
        marker, length, checksum = _HEAD.unpack(head)
        if marker != _MARKER or at + _HEAD.size + length > self._size:
            return None
        body = os.pread(self._descriptor, length, at + _HEAD.size)
        return body if len(body) == length and zlib.crc32(body) == checksum else None

    def _next_frame(self, at: int) -> int:
        """Return where the first whole frame from ``at`` on begins; the file's end if there is none."""
        assert self._descriptor is not None  # noqa: S101 - as above
        while at < self._size:
            chunk = os.pread(self._descriptor, _SCAN_BYTES, at)
            found = chunk.find(_MARKER)
            if found < 0:
                at += max(1, len(chunk) - len(_MARKER) + 1)  # a marker may lie across two chunks
            elif self._body(at + found) is not None:
                return at + found
            else:
                at += found + 1
        return self._size

    def _decode(self, body: bytes) -> FinishedRun | None:
        try:
            return _decoder.decode(self._cipher.decrypt(body, _CONTEXT))
        except WrongKey:
            raise
        except (DamagedData, msgspec.DecodeError) as error:
            log.error("a run in the spill file cannot be read", path=str(self.path), error=type(error).__name__)
            return None
