"""The job queue: Procrastinate on the database that is there anyway.

The web process only wakes the evaluator; it knows the names below and nothing of the code behind them. There are three
queues, so that neither a judge that takes its time nor an outbox that never gets empty holds up what is behind it.
"""

from typing import NamedTuple

from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import AlreadyEnqueued

from gateway.storage.database import Pool

TRACES_QUEUE = "traces"
JUDGING_QUEUE = "judging"
ERASING_QUEUE = "erasing"


class Job(NamedTuple):
    """A kind of job: the name of its task, and its queue."""

    task: str
    queue: str


DRAIN_OUTBOX = Job("drain_outbox", TRACES_QUEUE)
SCORE_CONVERSATION = Job("score_conversation", JUDGING_QUEUE)
ERASE = Job("erase", ERASING_QUEUE)


async def open_queue(pool: Pool) -> App:
    """Return an app that defers through ``pool``; the pool stays the caller's to close."""
    app = App(connector=PsycopgConnector())
    await app.open_async(pool)
    return app


async def enqueue_once(app: App, job: Job, subject: str = "", **arguments: str) -> bool:
    """Defer a job unless one of its kind and subject is waiting already; return whether it was deferred.

    A job that is running does not count as waiting: what arrived after it looked gets a job of its own. Jobs that have
    a subject run one at a time for it.
    """
    key = f"{job.task}:{subject}"
    lock = key if subject else None
    # A look first: what the constraint refuses is an error in Postgres' log, and most calls come while a job waits.
    waiting = "SELECT count(*) AS jobs FROM procrastinate_jobs WHERE queueing_lock = %(key)s AND status = 'todo'"
    if (await app.connector.execute_query_one_async(waiting, key=key))["jobs"]:
        return False
    try:
        await app.configure_task(job.task, queue=job.queue, queueing_lock=key, lock=lock).defer_async(**arguments)
    except AlreadyEnqueued:
        return False
    return True
