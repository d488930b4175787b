"""Merges what waits in ``dataset_rows`` into MLflow's datasets, and takes out what was forgotten.

Two merges at once can lose a batch in MLflow, so one evaluator at a time changes a dataset, and a row waits until
its merge is known to have worked: whoever else writes to the dataset costs us another attempt, never a row.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from gateway.errors import ConfigurationError
from gateway.evaluation.datasets import rows
from gateway.evaluation.datasets.choosing import Choice, Chosen, LeftOut
from gateway.evaluation.datasets.conversion import HUMAN, as_human, origins, without
from gateway.evaluation.datasets.looking import MlflowNews
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.store import MlflowStore, is_away
from gateway.storage.database import Pool
from gateway.tracing.redaction.redactor import Redactor

log = structlog.get_logger(__name__)

_BATCH = 100
_LOOK_EVERY_S = 30.0  # people take their time to say something; the look itself is one short query
_UNSUPPORTED = "FEATURE_DISABLED"
_OF_FILES = ("not supported with FileStore", "filesystem tracking backend")
_CONFLICTS = ("duplicate key", "unique constraint")


class DatasetFeeder:
    """Feeds the datasets."""

    def __init__(
        self,
        pool: Pool,
        store: MlflowStore,
        redactor: Redactor | None = None,
        rules: Callable[[], Rules] = dict,
    ):
        """Take the parts.

        Args:
            pool: connections to the database.
            store: MLflow.
            redactor: for what people write in MLflow; ``None``: that stays out of the datasets.
            rules: gives the rules that count now.
        """
        self._pool = pool
        self._store = store
        self._redactor = redactor
        self._rules = rules
        self._news = MlflowNews(pool, store, rules)
        self._looked_at = -_LOOK_EVERY_S
        self._complained: set[str] = set()

    async def merge_waiting(self) -> None:
        """Merge everything that waits, a dataset at a time; now and then, look what people said in MLflow before."""
        if self._redactor is not None and time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            await self._look()
        async with self._pool.connection() as connection:
            waiting = await rows.waiting_datasets(connection)
        for dataset in waiting:
            try:
                while await self._merge(dataset):
                    pass
            except Exception as error:  # noqa: BLE001 - whatever it is, the other datasets are fed
                self._complain(dataset, error)

    async def look(self) -> None:
        """Look now what people said in MLflow, and which tags are there. Raises whatever MLflow does."""
        await self._news.look()

    async def annotate(self, dataset: str) -> int:
        """Bring what people said of a dataset's traces into its rows; return of how many traces they said anything.

        Raises:
            ConfigurationError: MLflow keeps its data in files, which have no datasets.
        """
        async with self._pool.connection() as connection:
            taken = await rows.taken(connection, dataset)
        try:
            spoken_of = await self._news.take_up(taken)
            await self.merge_all(dataset)
        except Exception as error:
            if problem := unsupported(error):
                raise problem from None
            raise
        return spoken_of

    async def merge_all(self, dataset: str) -> None:
        """Merge all that waits for one dataset, behind whoever is at it. Raises whatever MLflow does."""
        while await self._merge(dataset, patient=True):
            pass

    async def _look(self) -> None:
        try:
            await self._news.look()
        except Exception as error:  # noqa: BLE001 - what waits is merged all the same
            self._complain("", error)

    def _complain(self, dataset: str, error: Exception) -> None:
        problem = unsupported(error)
        if problem is None:
            log.error("a dataset could not be fed; its rows wait", dataset=dataset, exc_info=error)
        elif dataset not in self._complained:  # once: it comes back twice a second until somebody has changed it
            self._complained.add(dataset)
            log.error("datasets cannot be fed; their rows wait", dataset=dataset, problem=str(problem))

    async def _merge(self, dataset: str, *, patient: bool = False) -> bool:
        """Merge one batch; return whether there may be more."""
        async with self._pool.connection() as connection, connection.transaction():
            if patient:
                await rows.lock(connection, dataset)
            elif not await rows.try_lock(connection, dataset):
                return False  # another evaluator is at it
            waiting = {row.trace_id: row for row in await rows.waiting(connection, dataset, _BATCH)}
            if not waiting:
                return False
            traces = await asyncio.to_thread(self._store.read_traces, list(waiting))
            if gone := sorted(waiting.keys() - {trace.info.trace_id for trace in traces}):
                log.warning("traces of a dataset are not in MLflow any more", dataset=dataset, trace_ids=gone)
                await rows.drop(connection, dataset, gone)
            choice = Choice(connection, dataset, self._rules(), self._redactor)
            chosen = await choice.of([(waiting[trace.info.trace_id], trace) for trace in traces])
            merged, refused = await self._write(dataset, chosen)
            # Only now: while MLflow takes its time, nobody who has scores to note waits for these rows.
            await rows.mark_taken(
                connection, dataset, [(each.row, each.signature, each.annotated_at) for each in merged]
            )
            await rows.mark_skipped(connection, dataset, [*choice.left_out, *refused])
            await rows.drop(connection, dataset, choice.unmeant)
            sessions = [each.row for each in merged if each.row.whole_session and not each.row.is_taken]
            for row in sessions:
                await rows.add_session(connection, dataset, row)
            log.info("fed a dataset", dataset=dataset, merged=len(merged), left_out=len(choice.left_out) + len(refused))
            return len(waiting) == _BATCH or bool(sessions)

    async def _write(self, dataset: str, chosen: list[Chosen]) -> tuple[list[Chosen], list[LeftOut]]:
        """Merge a batch; if MLflow refuses it, one by one. Returns what is merged, and what is refused."""
        if not chosen:
            return [], []
        try:
            await asyncio.to_thread(self._put, dataset, chosen)
        except Exception as error:
            if is_away(error) or unsupported(error):
                raise
            log.warning("a batch was refused by MLflow; trying its rows one by one", dataset=dataset, error=str(error))
        else:
            return chosen, []
        merged, refused = [], []
        for each in chosen:
            try:
                await asyncio.to_thread(self._put, dataset, [each])
            except Exception as error:
                if is_away(error):
                    raise
                if _is_conflict(error):
                    continue  # somebody else wrote an equal row at this very moment: it waits for the next time
                log.error("a row was refused by MLflow", dataset=dataset, trace_id=each.row.trace_id, error=str(error))
                refused.append(LeftOut(each.row, rows.REFUSED, None))
            else:
                merged.append(each)
        return merged, refused

    def _put(self, dataset: str, chosen: Sequence[Chosen]) -> None:
        """Merge records. Those of which a person says from now on what is expected are replaced. Blocks."""
        plain = [each.record for each in chosen if not _turns_human(each)]
        if plain:
            self._store.merge_records(dataset, plain)
        turned = [each.record for each in chosen if _turns_human(each)]
        if not turned:
            return
        self._store.merge_records(dataset, turned)
        dataset_id = self._store.dataset_id(dataset)
        by_inputs = {_key(each["inputs"]): each for each in turned}
        found = self._store.records(dataset_id) if dataset_id else []
        before = [each for each in found if _key(each.inputs) in by_inputs and _source_type(each) != HUMAN]
        if dataset_id and before:
            after = [as_human(each, by_inputs[_key(each.inputs)]) for each in before]
            self._store.replace_records(dataset_id, before, after)

    async def forget(self, trace_ids: Sequence[str]) -> int:
        """Take out what came from these traces; return how many records are gone.

        A record that other traces gave as well stays, as if they alone had given it. In MLflow it is a new one: should
        we crash in between, the traces give it again, but what people wrote into it is lost.
        """
        async with self._pool.connection() as connection:
            noted = await rows.datasets_of(connection, trace_ids)
        known = await asyncio.to_thread(self._datasets)
        gone = set(trace_ids)
        if known is None:
            async with self._pool.connection() as connection:
                for dataset in noted:
                    await rows.forget(connection, dataset, trace_ids)
            return 0
        return sum([await self._forget(name, known.get(name), gone) for name in sorted(noted | known.keys())])

    def _datasets(self) -> dict[str, str] | None:
        """Return the datasets' ids by name; ``None`` where MLflow has no datasets, so that nothing can be in one."""
        try:
            return self._store.datasets()
        except Exception as error:
            if unsupported(error):
                return None
            raise

    async def _forget(self, dataset: str, dataset_id: str | None, gone: set[str]) -> int:
        async with self._pool.connection() as connection, connection.transaction():
            await rows.lock(connection, dataset)
            dataset_id = dataset_id or await asyncio.to_thread(self._store.dataset_id, dataset)
            records = await asyncio.to_thread(self._store.records, dataset_id) if dataset_id else []
            theirs = [each for each in records if origins(each) & gone]
            shared = [each for each in theirs if origins(each) - gone]
            if dataset_id and theirs:
                others = {trace_id for each in shared for trace_id in origins(each) - gone}
                async with self._pool.connection() as aside:  # so that it counts before anything is deleted
                    await rows.merge_again(aside, dataset, list(others))
                kept = [without(each, gone) for each in shared]
                await asyncio.to_thread(self._store.replace_records, dataset_id, theirs, kept)
            await rows.forget(connection, dataset, list(gone))
            return len(theirs) - len(shared)


def unsupported(error: BaseException) -> ConfigurationError | None:
    """Return what to tell a person whose MLflow has no datasets; ``None`` if the error is about something else."""
    if getattr(error, "error_code", None) != _UNSUPPORTED and not any(sign in str(error) for sign in _OF_FILES):
        return None
    return ConfigurationError(
        "This MLflow keeps its data in files, and has no datasets there. Start its server with "
        "`--backend-store-uri sqlite:///mlflow.db` (or a Postgres), or unset GATEWAY_MLFLOW_TRACKING_URI to use the "
        "gateway's own."
    )


def _turns_human(chosen: Chosen) -> bool:
    return bool(chosen.row.is_taken and chosen.record["source"]["source_type"] == HUMAN)


def _source_type(record: Any) -> str | None:
    return None if record.source is None else str(record.source.source_type.value)


def _key(inputs: Any) -> str:
    return repr(sorted(inputs.items())) if isinstance(inputs, dict) else repr(inputs)


def _is_conflict(error: BaseException) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _CONFLICTS)
