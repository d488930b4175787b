"""Looks in MLflow for what happens there after a trace was scored: people's feedback and expectations, and tags.

Nobody tells us of these, so MLflow is looked through from time to time, by one evaluator at once. An SQL store that is
opened directly is asked for what was said since the last look. Over REST nothing can be asked by time: there the names
that rules give are searched for, without names the newest traces are read, and so are those of the newest rows.

Only traces of ours are taken: what others log to the same experiment, nobody has redacted.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from mlflow.entities import TraceInfo
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.store.tracking.dbmodels.models import SqlAssessments
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from gateway.evaluation.datasets import rows
from gateway.evaluation.datasets.conversion import HUMAN, Said, said_of
from gateway.evaluation.datasets.rows import Connection, Wanted
from gateway.evaluation.datasets.rules import Rules, Verdict, dataset_of, reasons, verdict_of
from gateway.evaluation.store import MlflowStore
from gateway.storage.database import Pool

_SAID = "feedback"
# Whoever writes an assessment gives it its time: clocks differ, and a transaction takes a while.
_OVERLAP = timedelta(minutes=5)
_FIRST_LOOK = timedelta(days=7)  # how far the very first look goes back
_PAGE = 100
_PAGES = 20  # of a search in one look; the newest come first
_AT_ONCE = 200
_MOST = 20_000  # assessments that one look takes up; the next look goes on where it ended


class MlflowNews:
    """Notes what people and tags in MLflow put into datasets."""

    def __init__(self, pool: Pool, store: MlflowStore, rules: Callable[[], Rules]):
        """Take the parts; ``rules`` gives those that count now."""
        self._pool = pool
        self._store = store
        self._rules = rules

    async def look(self) -> None:
        """Look once, unless another evaluator is at it. Raises whatever MLflow does while it is away."""
        async with self._pool.connection() as connection, connection.transaction():
            if await rows.try_lock(connection, "/news"):  # no dataset's name has a slash
                await self._look_for_tags()
                await self._look_for_people(connection)

    async def _look_for_tags(self) -> None:
        for name, rule in self._rules().items():
            if rule.source != "tags":
                continue
            dataset = dataset_of(name, rule)
            provenance = {"tags": dict(rule.tags)}
            pages = _newest(self._store, " AND ".join(f"tags.`{key}` = '{value}'" for key, value in rule.tags.items()))
            while infos := await asyncio.to_thread(next, pages, None):
                wanted = [
                    Wanted(dataset, info.trace_id, name, rule.whole_session, {}, provenance)
                    for info in infos
                    if (agent := _agent(info)) and (rule.agents is None or agent in rule.agents)
                ]
                if wanted and not await self._note_new(dataset, wanted):
                    break

    async def _note_new(self, dataset: str, wanted: Sequence[Wanted]) -> bool:
        """Note those that are not known; return whether there were any."""
        async with self._pool.connection() as connection, connection.transaction():
            await rows.beside_no_erasure(connection)
            known = await rows.among(connection, dataset, [each.trace_id for each in wanted])
            new = [each for each in wanted if each.trace_id not in known]
            await rows.note(connection, new)
        return bool(new)

    async def _look_for_people(self, connection: Connection) -> None:
        before = await rows.seen_until(connection, _SAID)
        since = before - _OVERLAP if before else datetime.now(UTC) - _FIRST_LOOK
        trace_ids, until = await asyncio.to_thread(self._spoken_of, since)
        if not isinstance(_tracking(self._store), SqlAlchemyStore):
            trace_ids += await rows.newest_taken(connection, _AT_ONCE)
        await self.take_up(list(dict.fromkeys(trace_ids)))
        await rows.mark_seen(connection, _SAID, max(until, before or until))

    async def take_up(self, trace_ids: Sequence[str]) -> int:
        """Note what people said of these traces; return how many of them they said anything of.

        Rows that are in a dataset already are merged again where there is something new, whichever rule they came by.
        """
        spoken_of = 0
        for start in range(0, len(trace_ids), _AT_ONCE):
            some = list(trace_ids[start : start + _AT_ONCE])
            infos = await asyncio.to_thread(_tracking(self._store).batch_get_trace_infos, some)
            said = {info.trace_id: (info, said_of(info)) for info in infos if _agent(info)}
            said = {trace_id: (info, each) for trace_id, (info, each) in said.items() if each}
            wanted = [each for info, heard in said.values() for each in self._wanted(info, heard)]
            times = [(trace_id, max(each.said_at for each in heard)) for trace_id, (_, heard) in said.items()]
            async with self._pool.connection() as connection, connection.transaction():
                await rows.beside_no_erasure(connection)
                await rows.note(connection, wanted)
                await rows.merge_annotated(connection, times)
            spoken_of += len(said)
        return spoken_of

    def _wanted(self, info: TraceInfo, said: Sequence[Said]) -> Iterator[Wanted]:
        verdicts = [
            Verdict(
                each.name, "", each.value, None if each.is_expectation else verdict_of(each.value), each.is_expectation
            )
            for each in said
            if each.source_type == HUMAN
        ]
        for name, rule in self._rules().items():
            if rule.source == "feedback" and (met := reasons(rule, _agent(info), verdicts)):
                # No more than that: what they said comes with the record, redacted.
                provenance = {name: {"source": HUMAN, "said": len(met)}}
                yield Wanted(dataset_of(name, rule), info.trace_id, name, rule.whole_session, {}, provenance)

    def _spoken_of(self, since: datetime) -> tuple[list[str], datetime]:
        """Return traces that people may have said something of since then, and until when that is all. Blocks."""
        store, now = _tracking(self._store), datetime.now(UTC)
        if isinstance(store, SqlAlchemyStore):
            return _said_since(store, since, now)
        named = [rule.names for rule in self._rules().values() if rule.source == "feedback"]
        if not named:
            return [], now
        searches: Iterable[str | None] = [None]
        if all(names is not None for names in named):
            names = sorted({name for each in named for name in each or ()})
            searches = [f"{kind}.`{name}` IS NOT NULL" for name in names for kind in ("feedback", "expectation")]
        found = [info.trace_id for search in searches for page in _newest(self._store, search) for info in page]
        return list(dict.fromkeys(found)), now


def _said_since(store: SqlAlchemyStore, since: datetime, now: datetime) -> tuple[list[str], datetime]:
    """Ask MLflow's own table, which has an index on the time; its search has none."""
    with store.ManagedSessionMaker() as session:
        found = (
            session.query(SqlAssessments.trace_id, SqlAssessments.last_updated_timestamp)
            .filter(
                SqlAssessments.last_updated_timestamp > int(since.timestamp() * 1000),
                SqlAssessments.source_type == HUMAN,
            )
            .order_by(SqlAssessments.last_updated_timestamp)
            .limit(_MOST)
            .all()
        )
    until = datetime.fromtimestamp(found[-1][1] / 1000, UTC) if len(found) == _MOST else now
    return list(dict.fromkeys(str(trace_id) for trace_id, _ in found)), until


def _newest(store: MlflowStore, search: str | None) -> Iterator[list[TraceInfo]]:
    """Yield what a search finds by the page, newest traces first. Blocks."""
    token: str | None = None
    for _ in range(_PAGES):
        infos, token = _tracking(store).search_traces(
            locations=[store.experiment_id],
            filter_string=search,
            max_results=_PAGE,
            order_by=["timestamp_ms DESC"],
            page_token=token,
        )
        yield infos
        if not token:
            return


def _agent(info: TraceInfo) -> str:
    """Return the agent that answered; empty where the trace is none of ours."""
    return str(info.trace_metadata.get("gateway.agent", ""))


def _tracking(store: MlflowStore) -> AbstractStore:
    return store._store  # noqa: SLF001 - what it does for datasets alone is not its matter
