"""The ledger on the page."""

from gateway.quality.markup import NOTHING, Html, count_text, fill, join, percent_text
from gateway.quality.rollups import QualityReport
from gateway.tracing.balance import Check
from gateway.tracing.ledger import MEANING, Ledger, State, StateCount

_LABEL_FITS = 0.12  # share of the bar that has room for "12 %", on a phone too
_NAME_FITS = 0.4  # share of the bar that has room for the state's name as well

STATE_COLOURS = Html(
    "\n".join(f".{state} {{ fill: var(--{state}); background: var(--{state}); }}" for state in MEANING)
)
"""Style rules: each state's colour, in the bars (fill) and in the table (background)."""


def words(state: State) -> str:
    """Return a state as it is shown."""
    return state.replace("_", " ")


def render_ledger(report: QualityReport, base_url: str) -> Html:
    """Return the section, with the command that sends a run (to ``base_url``) if there was none."""
    hour, day = report.hour.ledger, report.day.ledger
    rows = [_state_row(*counts, hour, day) for counts in zip(hour.states, day.states, strict=True)]
    return fill(
        '<section class="card"><h2>What became of the runs</h2>'
        '<p class="soft small">Every run served is in exactly one state.</p>'
        "{check}{hint}{hour_bar}{day_bar}"
        '<table><thead><tr><th scope="col">State</th><th scope="col" class="count">Last hour</th>'
        '<th scope="col" class="count">Last 24 hours</th></tr></thead><tbody>{rows}'
        '<tr><th scope="row">Total</th><td class="count"><b>{hour_total}</b></td>'
        '<td class="count"><b>{day_total}</b></td></tr>{kept}</tbody></table></section>',
        check=_check(report.check),
        hint=NOTHING if hour.total else _no_runs_hint(base_url),
        hour_bar=_stacked_bar("Last hour", hour),
        day_bar=_stacked_bar("Last 24 hours", day),
        rows=join(rows),
        hour_total=count_text(hour.total),
        day_total=count_text(day.total),
        kept=_kept(hour, day),
    )


def _check(check: Check) -> Html:
    return fill(
        '<p class="{look} number">{sign} {says}</p>',
        look="soft small" if check.adds_up else "small alert",
        sign="✓" if check.adds_up else "⚠",
        says=check.says,
    )


def _kept(hour: Ledger, day: Ledger) -> Html:
    if not day.kept_because:
        return NOTHING
    return fill(
        '<tr><th scope="row">Kept because of <span class="soft small meaning">the sampling, or rules that the '
        'conversation met; each counts</span></th><td class="count">{hour}</td>'
        '<td class="count">{day}</td></tr>',
        hour=_counts(hour.kept_because),
        day=_counts(day.kept_because),
    )


def _counts(counts: dict[str, int]) -> Html:
    return join(
        fill('<div class="soft small">{name} {n}</div>', name=name.replace("_", " "), n=count_text(count))
        for name, count in counts.items()
    )


def _no_runs_hint(base_url: str) -> Html:
    return fill(
        '<div class="hint"><p>No runs in the last hour. Send one:</p><pre><code>{command}</code></pre></div>',
        command=f"curl {base_url}invocations -H 'Content-Type: application/json' "
        """-d '{"input": "What is 17 * 23?"}'""",
    )


def _stacked_bar(label: str, ledger: Ledger) -> Html:
    if not ledger.total:
        return NOTHING
    segments, start = [], 0.0
    for count in ledger.states:
        if count.runs:
            segments.append(_segment(count, start))
            start += count.share or 0.0
    spoken = ", ".join(f"{words(count.state)} {percent_text(count.share)}" for count in ledger.states if count.runs)
    return fill(
        '<figure class="stack"><figcaption><span>{label}</span><span class="number">{total} runs</span></figcaption>'
        '<svg role="img" aria-label="{spoken}">{segments}</svg></figure>',
        label=label,
        total=count_text(ledger.total),
        spoken=f"{label}: {spoken}",
        segments=join(segments),
    )


def _segment(count: StateCount, start: float) -> Html:
    share = count.share or 0.0
    text = ""
    if share >= _LABEL_FITS:
        text = f"{words(count.state)} {percent_text(share)}" if share >= _NAME_FITS else percent_text(share)
    return fill(
        '<svg x="{x}%" width="{width}%" height="100%"><title>{title}</title>'
        '<rect class="{state} edge" width="100%" height="100%"/>'
        '<text x="50%" y="50%" text-anchor="middle" dominant-baseline="central">{text}</text></svg>',
        x=f"{100 * start:.3f}",
        width=f"{100 * share:.3f}",
        title=f"{words(count.state)}: {count_text(count.runs)}",
        state=count.state,
        text=text,
    )


def _state_row(hour: StateCount, day: StateCount, *ledgers: Ledger) -> Html:
    return fill(
        '<tr><th scope="row"><svg class="swatch {state}" aria-hidden="true"></svg>{name}'
        ' <span class="soft small meaning">{meaning}</span></th>{cells}</tr>',
        state=hour.state,
        name=words(hour.state),
        meaning=hour.meaning,
        cells=join(_state_cell(count, ledger) for count, ledger in zip((hour, day), ledgers, strict=True)),
    )


def _state_cell(count: StateCount, ledger: Ledger) -> Html:
    if not count.runs:
        return Html('<td class="count none">0</td>')
    return fill(
        '<td class="count">{runs} <span class="soft of">{share}</span>{reasons}</td>',
        runs=count_text(count.runs),
        share=percent_text(count.share),
        reasons=_counts(ledger.reasons(count)),
    )
