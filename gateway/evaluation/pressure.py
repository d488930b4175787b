"""Serving comes first: while the machine or the database is pressed, the evaluator yields, and at last leaves out.

Two signs are looked at each second. The share of time that something on this machine waited for a processor is what
Linux calls pressure (PSI: https://docs.kernel.org/accounting/psi.html); unlike the load it tells a machine that is busy
from one on which somebody waits. How long the database takes for a small query tells of those that share nothing with
the web processes but that.

Under pressure the evaluator pauses after each batch and begins one scoring at a time. If traces then wait for longer
than they may, it scores fewer of them: the share of each scorer falls, by the same draw, so that estimates stay right
(`gateway.evaluation.selection`); what is left out is told by its skips and, in the ledger, by the reason ``pressure``.
All traces are stored all the same.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from gateway.settings import Settings
from gateway.storage.database import Pool

log = structlog.get_logger(__name__)

_LOOK_S = 1.0
_EASED = 0.8  # of a bound: below it the pressure is over, so that it does not come and go with every look
_FACTOR = 0.9  # of the share, a look: it halves in some seven seconds, and doubles as fast
_LEAST = 1 / 64  # some scores go on: without any, quality would look as if nobody had called
_REST = 4.0  # seconds of pause for each of work
_LONGEST_PAUSE_S = 2.0
_PSI = (Path("/sys/fs/cgroup/cpu.pressure"), Path("/proc/pressure/cpu"))
_LAG = "SELECT coalesce(extract(epoch FROM now() - min(created_at)), 0) FROM outbox WHERE NOT held"


class Seen(NamedTuple):
    """The signs, once."""

    cpu: float | None
    """Share of the last 10 s, 0 to 1, in which something waited for a processor; ``None``: this system does not say."""
    database_s: float
    """Seconds that a small query took."""
    lag_s: float
    """Seconds for which the oldest trace has waited for an evaluator."""


class Pressure:
    """What an evaluator may do now. One an evaluator; `run` keeps it up to date."""

    def __init__(self, settings: Settings, pool: Pool, cpu: Callable[[], float | None] | None = None):
        """Take the parts; ``cpu`` tells the first sign, ``None``: the system does."""
        self._settings = settings
        self._pool = pool
        self._cpu = cpu or cpu_pressure
        self.is_high = False
        self.share = 1.0
        """By which the shares of all scorers are multiplied now, 0 to 1."""

    async def run(self) -> None:
        """Look each second until cancelled."""
        while True:
            try:
                self.heed(await self.look())
            except Exception as error:  # noqa: BLE001 - the database is away, most likely: then nothing can be done
                log.info("the pressure on the database cannot be told", error=repr(error))
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> Seen:
        """Return the signs as they are now."""
        async with self._pool.connection() as connection:
            began = time.monotonic()
            cursor = await connection.execute(_LAG)
            row: Any = await cursor.fetchone()
            database_s = time.monotonic() - began
        return Seen(self._cpu(), database_s, float(row[0]))

    def heed(self, seen: Seen) -> None:
        """Follow the signs: the state is a function of them and of the state before."""
        settings = self._settings
        was_high, eased = self.is_high, _EASED if self.is_high else 1.0
        self.is_high = (
            seen.cpu is not None and seen.cpu >= settings.yield_at_cpu_pressure * eased
        ) or seen.database_s >= settings.yield_at_database_s * eased
        if self.is_high and seen.lag_s > settings.shed_after_s:
            self.share = max(_LEAST, self.share * _FACTOR)
        else:
            self.share = min(1.0, self.share / _FACTOR)
        if self.is_high != was_high:
            log.warning("the evaluator yields" if self.is_high else "the evaluator goes on as usual", **seen._asdict())

    async def give_way(self, worked_s: float) -> None:
        """Pause after so many seconds of work, if there is pressure."""
        if self.is_high:
            await asyncio.sleep(min(worked_s * _REST, _LONGEST_PAUSE_S))


def cpu_pressure() -> float | None:
    """Return the share of the last 10 s, 0 to 1, in which something waited for a processor, here or in our container.

    ``None``: the system does not say (it is not Linux, or does without PSI).
    """
    for path in _PSI:
        try:
            first = path.read_text().split("\n", 1)[0]
        except OSError:
            continue
        fields = dict(field.partition("=")[::2] for field in first.split()[1:])
        return float(fields["avg10"]) / 100
    return None
