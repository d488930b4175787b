"""``gateway scores``: what scorers have failed at for good, and to have that tried again."""

from datetime import UTC
from typing import Annotated, Any

import psycopg
from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from gateway.commands.stored import in_database, output, time_of
from gateway.settings import load_settings
from gateway.storage.scorings import Failure, failures, retry

scores = App(name="scores", help="Look at scorings that have failed for good, and have them tried again.")

_MOST = 200


def register(app: App) -> None:
    """Add the commands to the application."""
    app.command(scores)


@scores.command
def failed(*, scorer: str | None = None, since: Annotated[str | None, Parameter(negative="")] = None) -> None:
    """List what scorers have failed at after all attempts, the newest first.

    Args:
        scorer: Of this scorer alone.
        since: A time (2026-01-31T08:00:00Z) or how long ago (90s, 15m, 24h, 7d); all of it if left out.
    """
    begin = None if since is None else time_of("--since", since)

    async def read(connection: psycopg.AsyncConnection[Any]) -> list[Failure]:
        return await failures(connection, scorer, begin, _MOST)

    found = in_database(load_settings(), read)
    if not found:
        output().print("Nothing has failed.")
        return
    table = Table("scorer", "trace or session", "turns", "agent", "attempts", "when (UTC)", "why")
    for each in found:
        when = f"{each.updated_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
        cells = [each.scorer, each.subject, str(each.turns or ""), each.agent, str(each.attempts), when]
        table.add_row(*map(Text, cells), Text(each.reason or ""))
    output().print(table)
    if len(found) == _MOST:
        output().print(f"The newest {_MOST} are shown; there may be more.")


@scores.command(name="retry")
def retry_(*, scorer: str | None = None, since: Annotated[str | None, Parameter(negative="")] = None) -> None:
    """Have what has failed tried again, by the evaluators that run or will; a verdict takes the failure's place.

    Args:
        scorer: Of this scorer alone.
        since: A time (2026-01-31T08:00:00Z) or how long ago (90s, 15m, 24h, 7d); all of it if left out.
    """
    begin = None if since is None else time_of("--since", since)

    async def again(connection: psycopg.AsyncConnection[Any]) -> int:
        return await retry(connection, scorer, begin)

    count = in_database(load_settings(), again)
    output().print(f"{count} scorings are tried again." if count else "Nothing has failed.")
