"""The sections of the page, as HTML.

Bars are SVG shapes, since the page's policy rightly refuses ``style`` attributes.
"""

import math
from datetime import datetime

from gateway.quality.estimates import Estimate
from gateway.quality.funnel import render_ledger, words
from gateway.quality.markup import (
    NOTHING,
    Html,
    age_text,
    count_text,
    duration_text,
    fill,
    join,
    mean_text,
    percent_text,
    shortened,
    value_text,
)
from gateway.quality.rollups import (
    NEWEST_FAILURES,
    AgentRuns,
    FailedScore,
    Failure,
    Level,
    QualityReport,
    ScorerRollup,
    Window,
)
from gateway.tracing.ledger import State, Waiting

_LOST: tuple[State, ...] = ("redaction_blocked", "dropped", "failed")
_MAX_VALUE_CHARS = 120  # a page is for a look; the whole text is in the JSON and in MLflow
_MAX_RATIONALE_CHARS = 600  # as above
_MAX_REASONS = 3  # as above: those why something was not scored

_ScorerKey = tuple[str, Level, str, str]


def render_report(report: QualityReport, base_url: str) -> Html:
    """Return the content of the page.

    Args:
        report: the figures.
        base_url: address of the gateway as its reader reached it, with a trailing slash: for the curl hint.
    """
    return join(
        [
            _tiles(report),
            render_ledger(report, base_url),
            _scorers(report),
            _failures(report),
            fill(
                '<p class="soft small number">As of <time datetime="{at}">{clock} UTC</time>.</p>',
                at=report.generated_at.isoformat(),
                clock=f"{report.generated_at:%Y-%m-%d %H:%M:%S}",
            ),
        ]
    )


def render_unavailable(message: str) -> Html:
    """Return the content of the page when there are no figures."""
    return fill(
        '<section class="card" role="alert"><h2>No figures for now</h2><p>{message}</p></section>', message=message
    )


# --- the last hour at a glance ---


def _tiles(report: QualityReport) -> Html:
    ledger = report.hour.ledger
    runs: dict[State, int] = {count.state: count.runs for count in ledger.states}
    lost = sum(runs[state] for state in _LOST)
    detail = ", ".join(f"{count_text(runs[state])} {words(state)}" for state in _LOST if runs[state])
    return fill(
        '<dl class="tiles" aria-label="The last hour">{tiles}</dl>',
        tiles=join(
            [
                _tile("Runs served", count_text(ledger.total), "in the last hour"),
                _tile("Scored", percent_text(ledger.scored_share), "of these runs: what the figures below speak for"),
                _tile("On their way", count_text(runs["pending"]), _lag(report.waiting)),
                _tile("Lost", count_text(lost), detail or "nothing withheld, dropped or failed", alarming=lost > 0),
            ]
        ),
    )


def _lag(waiting: Waiting) -> str:
    if waiting.oldest_s is None:
        return "no trace waits for an evaluator"
    return f"the oldest has waited {duration_text(waiting.oldest_s)} for an evaluator"


def _tile(label: str, figure: str, detail: str, *, alarming: bool = False) -> Html:
    return fill(
        '<div class="tile{lost}"><dt>{label}</dt><dd class="figure number">{figure}</dd>'
        '<dd class="soft small">{detail}</dd></div>',
        lost=" lost" if alarming else "",
        label=label,
        figure=f"⚠ {figure}" if alarming else figure,
        detail=detail,
    )


# --- agents and scorers ---


def _scorers(report: QualityReport) -> Html:
    hour, day = _by_key(report.hour), _by_key(report.day)
    # What was there in the last hour was there in the last day too.
    agents = sorted({key[0] for key in day} | {runs.agent for runs in report.day.agents})
    bodies = [
        _agent_body(agent, [key for key in day if key[0] == agent], hour, day, report.day.agents) for agent in agents
    ]
    table = fill(
        '<table class="scorers"><thead><tr><th scope="col">Scorer</th><th scope="col" class="window">Last hour</th>'
        '<th scope="col" class="window">Last 24 hours</th></tr></thead>{bodies}</table>',
        bodies=join(bodies),
    )
    return fill(
        '<section class="card"><h2>How good the answers were</h2>'
        '<p class="soft small">Estimated for all of the traffic, from what was scored of it: kept failures weigh no '
        "more than they should. The true figure lies within the range below it 95 times out of 100; n<sub>eff</sub> "
        "is how many conversations of even weight would tell as much.</p>{hint}{table}</section>",
        hint=NOTHING if day else _no_scores_hint(report.day),
        table=table if bodies else NOTHING,
    )


def _by_key(window: Window) -> dict[_ScorerKey, ScorerRollup]:
    return {(rollup.agent, rollup.level, rollup.scorer, rollup.name): rollup for rollup in window.scorers}


def _no_scores_hint(day: Window) -> Html:
    if day.ledger.total:
        return Html(
            '<div class="hint"><p>No scores in the last 24 hours, though there were runs. See at <a href="/health">'
            "/health</a> whether an evaluator is running (<code>gateway worker</code> starts one), and in "
            "<code>gateway.toml</code> which scorers are enabled.</p></div>"
        )
    return Html('<div class="hint"><p>No scores in the last 24 hours: there was nothing to score.</p></div>')


def _agent_body(
    agent: str,
    keys: list[_ScorerKey],
    hour: dict[_ScorerKey, ScorerRollup],
    day: dict[_ScorerKey, ScorerRollup],
    runs: list[AgentRuns],
) -> Html:
    rows = [
        fill(
            '<tr><th scope="row">{name} {level}{scorer}</th>'
            '<td data-window="Last hour">{hour}</td><td data-window="Last 24 hours">{day}</td></tr>',
            name=name,
            level=_level_label(level),
            scorer=NOTHING if scorer == name else fill('<div class="soft small">by {scorer}</div>', scorer=scorer),
            hour=_rollup(hour.get((agent, level, scorer, name))),
            day=_rollup(day.get((agent, level, scorer, name))),
        )
        for agent, level, scorer, name in keys
    ]
    return fill(
        '<tbody class="agent"><tr><th scope="rowgroup" colspan="3"><h3>{agent} {offline}</h3></th></tr>{rows}</tbody>',
        agent=agent,
        offline=_offline_label(next((entry for entry in runs if entry.agent == agent), None)),
        rows=join(rows) if rows else Html('<tr><td colspan="3" class="none">no scores</td></tr>'),
    )


def _offline_label(runs: AgentRuns | None) -> Html:
    if runs is None or not runs.offline_runs:
        return NOTHING
    if runs.offline_runs == runs.runs:
        return Html('<span class="label" title="A stand-in answered, not a language model">offline model</span>')
    return fill('<span class="label">offline model: {share} of the runs</span>', share=percent_text(runs.offline_share))


def _level_label(level: Level) -> Html:
    return Html('<span class="label plain">conversation</span>') if level == "conversation" else NOTHING


def _rollup(rollup: ScorerRollup | None) -> Html:
    if rollup is None:
        return Html('<span class="none">no scores</span>')
    lines = []
    if rollup.pass_share is not None:
        lines += [_share(rollup.pass_share), _verdicts(rollup)]
    if rollup.mean is not None and not (lines and rollup.mean.value is None):
        lines.append(_mean(rollup.mean))
    if rollup.no_verdict:
        lines.append(
            fill('<div class="soft small number">{n} without a verdict</div>', n=count_text(rollup.no_verdict))
        )
    if not rollup.scored:
        lines.append(Html('<div class="none">no scores</div>'))
    if rollup.scorer_failures:
        lines.append(
            fill('<div class="alert small number">⚠ scorer failed: {n}</div>', n=count_text(rollup.scorer_failures))
        )
    if rollup.not_scored:
        lines.append(_not_scored(rollup.not_scored))
    return join(lines)


def _share(estimate: Estimate) -> Html:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return _not_enough(estimate)
    return fill(
        '<div class="share"><b>{percent}</b>{bar}</div><div class="small number">{low} to {high} {n}</div>',
        percent=percent_text(estimate.value),
        bar=_bar(estimate.value, estimate.low, estimate.high),
        low=percent_text(estimate.low),
        high=percent_text(estimate.high),
        n=_effective_n(estimate),
    )


def _bar(share: float, low: float, high: float) -> Html:
    """Return the share as a bar, with its interval as a line across."""
    return fill(
        '<svg aria-hidden="true"><rect class="bar" width="{share}%" height="100%"/>'
        '<rect class="gap" x="{share}%" width="100%" height="100%"/>'
        '<line class="range" x1="{low}%" x2="{high}%" y1="50%" y2="50%"/></svg>',
        share=f"{100 * share:.2f}",
        low=f"{100 * low:.2f}",
        high=f"{100 * high:.2f}",
    )


def _mean(estimate: Estimate) -> Html:
    if estimate.value is None:
        return _not_enough(estimate)
    interval = "all values alike"
    if estimate.low is not None and estimate.high is not None:
        interval = f"{mean_text(estimate.low)} to {mean_text(estimate.high)}"
    return fill(
        '<div class="number">mean <b>{mean}</b></div><div class="small number">{interval} {n}</div>',
        mean=mean_text(estimate.value),
        interval=interval,
        n=_effective_n(estimate),
    )


def _not_enough(estimate: Estimate) -> Html:
    # Rounded down: 29.9 is not 30.
    return fill(
        '<div><b>not enough data</b></div><div class="small number">{n}, at least {needed} needed</div>',
        n=_effective_n(estimate),
        needed=estimate.needed_n,
    )


def _effective_n(estimate: Estimate) -> Html:
    n = count_text(math.floor(estimate.effective_n))
    return fill('<span class="soft effective">n<sub>eff</sub> {n}</span>', n=n)


def _verdicts(rollup: ScorerRollup) -> Html:
    return fill(
        '<div class="soft small number">{passed} passed, {failed} failed</div>',
        passed=count_text(rollup.passed),
        failed=count_text(rollup.failed),
    )


def _not_scored(reasons: dict[str, int]) -> Html:
    shown = [f"{why} {count_text(count)}" for why, count in list(reasons.items())[:_MAX_REASONS]]
    if len(reasons) > _MAX_REASONS:
        shown.append(f"other reasons {count_text(sum(list(reasons.values())[_MAX_REASONS:]))}")
    return fill('<div class="soft small number">not scored: {why}</div>', why=", ".join(shown))


# --- the newest failures ---


def _failures(report: QualityReport) -> Html:
    if report.failures:
        items = [_failure(failure, report.generated_at) for failure in report.failures]
        content = fill('<ol class="failures">{items}</ol>', items=join(items))
    else:
        content = Html('<div class="hint"><p>None in the last 24 hours.</p></div>')
    return fill(
        '<section class="card"><h2>Newest failures</h2>'
        '<p class="soft small">What a scorer did not let pass in the last 24 hours, the newest {limit}. {links}</p>'
        "{content}</section>",
        limit=NEWEST_FAILURES,
        links="An id leads to MLflow." if report.mlflow_url else "",
        content=content,
    )


def _failure(failure: Failure, now: datetime) -> Html:
    return fill(
        '<li><div class="subject"><h3>{agent}</h3>{level}{offline}{subject}'
        '<time class="soft small number" datetime="{at}">{ago}</time></div><dl>{scores}</dl></li>',
        agent=failure.agent,
        level=_level_label(failure.level),
        offline=Html('<span class="label">offline model</span>') if failure.offline else NOTHING,
        subject=_subject(failure),
        at=failure.failed_at.isoformat(),
        ago=age_text((now - failure.failed_at).total_seconds()),
        scores=join(_failed_score(score) for score in failure.scores),
    )


def _subject(failure: Failure) -> Html:
    """Return the id of the failed trace or conversation, as a link into MLflow if there is one."""
    conversation = failure.level == "conversation" and failure.session_id is not None
    text = failure.session_id if conversation else failure.trace_id
    if failure.mlflow_url is None:
        return fill('<span class="id">{text}</span>', text=text)
    return fill(
        '<a class="id" id="{level}-{text}" href="{url}" target="_blank" rel="noopener">{text}</a>',
        level=failure.level,
        text=text,
        url=failure.mlflow_url,
    )


def _failed_score(score: FailedScore) -> Html:
    value = "" if score.value is False else f" = {shortened(value_text(score.value), _MAX_VALUE_CHARS)}"
    return fill(
        "<dt>{name}{value}</dt><dd{none}>{rationale}</dd>",
        name=score.name,
        value=value,
        none=NOTHING if score.rationale else Html(' class="none"'),
        rationale=shortened(score.rationale, _MAX_RATIONALE_CHARS) if score.rationale else "no rationale given",
    )
