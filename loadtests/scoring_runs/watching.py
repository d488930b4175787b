"""Looks into MLflow's own tables for the scores of traces, by a connection of its own."""

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psycopg

POLL_S = 0.05
"""Between two looks: what is found was there for at most this long, and the query's own time."""
_SCORED = (
    "SELECT DISTINCT trace_id, name FROM assessments WHERE trace_id = ANY(%s) AND name = ANY(%s) AND error IS NULL"
)


@dataclass
class Waits:
    """How long scores of one name took from the end of the response until they were seen in MLflow."""

    seconds: list[float] = field(default_factory=list)
    """Of the traces that were scored, in no order."""
    traces: int = 0
    """All that were waited for."""

    @property
    def share(self) -> float:
        """Share of the traces that were scored."""
        return len(self.seconds) / max(self.traces, 1)

    def within(self, seconds: float) -> float:
        """Return the share of the traces that were scored within so many seconds."""
        return sum(each <= seconds for each in self.seconds) / max(self.traces, 1)

    def percentile(self, share: float) -> float:
        """Return how long this share of the scored traces did not exceed, in seconds; nan without any."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


class Watch:
    """Notes when the scores of traces are first seen. Use it as a context manager."""

    def __init__(self, mlflow_database: str, names: list[str]):
        """Take the URL of MLflow's database, and the names of the assessments that are waited for."""
        self._database = mlflow_database
        self._names = names
        self._ended: dict[str, float] = {}
        self._seen: dict[str, dict[str, float]] = {name: {} for name in names}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.longest_look_s = 0.0
        """The longest of the queries: with it, `POLL_S` is the resolution."""

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def ended(self, trace_id: str, at: float) -> None:
        """Say that a trace's response has ended, at that monotonic time in seconds."""
        self._ended[trace_id] = at

    def await_all(self, limit_s: float) -> None:
        """Wait until everything that has ended is scored, or so many seconds."""
        deadline = time.monotonic() + limit_s
        while self._open() and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(POLL_S)

    def waits(self, name: str) -> Waits:
        """Return what was seen of one of the names."""
        seen = self._seen[name]
        return Waits([seen[each] - ended for each, ended in self._ended.items() if each in seen], len(self._ended))

    def seen(self, name: str) -> list[float]:
        """Return the monotonic times in seconds at which scores of a name were seen, the first one first."""
        return sorted(self._seen[name].values())

    @property
    def trace_ids(self) -> list[str]:
        """All traces that have ended."""
        return list(self._ended)

    def _open(self) -> list[str]:
        ended = list(self._ended)
        return [each for each in ended if any(each not in self._seen[name] for name in self._names)]

    def _look(self) -> None:
        with psycopg.connect(self._database, autocommit=True) as connection:
            while not self._over.wait(POLL_S):
                began = time.monotonic()
                found = connection.execute(_SCORED, [self._open(), self._names]).fetchall()
                now = time.monotonic()
                self.longest_look_s = max(self.longest_look_s, now - began)
                for trace_id, name in found:
                    self._seen[name].setdefault(trace_id, now)
