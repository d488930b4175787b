"""``gateway ledger``: the ledger as people read it in a terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.quality.ledger import LedgerReport
from gateway.quality.markup import count_text, percent_text
from gateway.tracing.ledger import Funnel, Ledger


def print_ledger(report: LedgerReport, console: Console) -> None:
    """Print the funnel, what it is like by agent, what waits, and the check."""
    console.print(Text(f"Runs that started since {report.since:%Y-%m-%d %H:%M:%S} UTC", style="bold"))
    console.print(_funnel(report.ledger))
    if report.agents:
        console.print(_agents(report))
    for line in _lines(report):
        console.print(Text(line), soft_wrap=True)
    check = report.check
    console.print(Text(check.says, style="green" if check.adds_up else "bold red"), soft_wrap=True)


def _funnel(ledger: Ledger) -> Table:
    table = Table("state", "what it means", "reasons")
    table.add_column("runs", justify="right")
    table.add_column("share", justify="right")
    for state in ledger.states:
        given = [Text(cell) for cell in (state.state, state.meaning, _counts(ledger.reasons(state)))]
        table.add_row(*given, count_text(state.runs), percent_text(state.share), style=None if state.runs else "dim")
    table.add_section()
    table.add_row("total", "", "", count_text(ledger.total), "")
    return table


def _agents(report: LedgerReport) -> Table:
    table = Table("agent", "states")
    table.add_column("runs", justify="right")
    table.add_column("scored", justify="right")
    for agent in report.agents:
        table.add_row(Text(agent.agent), _states(agent), count_text(agent.total), percent_text(agent.scored_share))
    return table


def _states(funnel: Funnel) -> str:
    return _counts({state.state: state.runs for state in funnel.states if state.runs})


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count_text(count)}" for name, count in counts.items())


def _lines(report: LedgerReport) -> Iterator[str]:
    if report.ledger.kept_because:
        yield f"Kept because of: {_counts(report.ledger.kept_because)}."
    waiting = report.waiting
    if waiting.traces:
        yield f"In the outbox now: {count_text(waiting.traces)}, the oldest for {waiting.oldest_s or 0:.0f} s."
    if waiting.held:
        yield f"Held now: {count_text(waiting.held)}, {waiting.held_bytes / 1e6:.1f} MB."
    for swept in report.swept:
        why = f" ({swept.reason})" if swept.reason else ""
        at = f"{swept.last_at:%Y-%m-%d %H:%M:%S}"
        yield f"Swept: {count_text(swept.runs)} to {swept.state}{why}, last at {at} UTC."
