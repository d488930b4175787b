"""The report: as tables on the terminal, and as Markdown and JSON in a folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from .contest import Plan, Sample, Summary, summaries
from .contestants import BARE, CONTESTANTS, EVALUATOR_NICENESS, ModelKind
from .figures import Figure
from .machine import Machine
from .profiling import Profile

_TOP_FUNCTIONS = 25
_DISTURBED = 0.1  # of the serving core's time
_BUSY = 0.5  # load average of a machine that does next to nothing
_HEAD = (
    "contestant",
    "requests/s",
    "of the bare loop",
    "p50 ms",
    "p99 ms",
    "CPU ms a request",
    "peak MB",
    "traces stored",
    "drained after",
    "core disturbed",
)


@dataclass
class Report:
    """Everything that one comparison found."""

    machine: Machine
    plan: Plan
    begun: datetime
    samples: list[Sample] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def write(self, folder: Path) -> list[Path]:
        """Write the report, named by the time at which it was begun; return the files."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / self.begun.strftime("%Y-%m-%d-%H%M")
        markdown, data = stem.with_suffix(".md"), stem.with_suffix(".json")
        markdown.write_text(self.markdown())
        data.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        return [markdown, data]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "begun": self.begun.isoformat(timespec="seconds"),
            "machine": self.machine.as_json(),
            "plan": asdict(self.plan),
            "figures": [asdict(figure) | {"met": figure.met} for figure in self.figures],
            "medians": [summary.as_json() for summary in summaries(self.samples).values()],
            "samples": [asdict(sample) for sample in self.samples],
            "problems": self.problems,
            "profiles": [asdict(profile) for profile in self.profiles],
        }

    def markdown(self) -> str:
        """Return it as Markdown."""
        parts = [f"# Comparison of {self.begun:%d %B %Y, %H:%M}", _machine(self.machine), _method(self.plan)]
        if doubt := self._doubt():
            parts.append(f"**{doubt}**")
        if self.figures:
            parts += ["## Targets", figure_table(self.figures)]
            parts += [_details(figure) for figure in self.figures if figure.details]
        if self.problems:
            parts += ["## Not measured", "\n".join(f"- {problem}" for problem in self.problems)]
        found = summaries(self.samples)
        for model in sorted({model for model, _ in found}, key=lambda model: model == "http"):
            parts += [f"## Side by side, model {_MODELS[model]}", contest_table(model, found)]
        parts += [_profile(profile) for profile in self.profiles]
        return "\n\n".join(parts) + "\n"

    def _doubt(self) -> str | None:
        """Return why the figures are not to be relied on; ``None`` if nothing speaks against them."""
        worst = max((sample.disturbed_share for sample in self.samples), default=0.0)
        busy = self.machine.load_average[0]
        if worst <= _DISTURBED and busy <= _BUSY:
            return None
        return (
            f"The machine was not quiet: load average {busy:.1f} at the start, the serving core disturbed for up to "
            f"{worst:.0%} of the time. Requests/s and latencies are not to be relied on."
        )


_MODELS: dict[ModelKind, str] = {"in-process": "in the process", "http": "behind HTTP"}


def figure_table(figures: list[Figure]) -> str:
    """Return the figures beside their targets."""
    rows = [
        (
            figure.name,
            f"{figure.value:.2f} {figure.unit}".strip(),
            f"{figure.bound} {figure.target:g} {figure.unit}".strip(),
            "met" if figure.met else "**not met**",
        )
        for figure in figures
    ]
    return table(("figure", "measured", "target", ""), rows)


def contest_table(model: ModelKind, found: dict[tuple[ModelKind, str], Summary]) -> str:
    """Return the medians of all contestants with one model."""
    bare = found.get((model, BARE.name))
    rows = [_row(found[model, name], bare) for name in CONTESTANTS if (model, name) in found]
    return table(_HEAD, rows)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(summary: Summary, bare: Summary | None) -> tuple[str, ...]:
    title = CONTESTANTS[summary.contestant].title
    return (
        f"{title} ({summary.failures} FAILURES)" if summary.failures else title,
        f"{summary.requests_per_s:.1f}",
        f"{summary.requests_per_s / bare.requests_per_s:.2f}" if bare else "-",
        f"{summary.p50_ms:.1f}",
        f"{summary.p99_ms:.1f}",
        f"{summary.cpu_ms:.2f}",
        f"{summary.peak_rss_mb:.0f}",
        "-" if summary.stored_share is None else f"{summary.stored_share:.1%} of {summary.requests}",
        "-" if summary.drain_s is None else f"{summary.drain_s:.1f} s",
        f"{summary.disturbed_share:.0%}",
    )


def _machine(machine: Machine) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
    load = ", ".join(f"{each:.2f}" for each in machine.load_average)
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:g} GB; {machine.system}; Python {machine.python}; "
        f"{packages}.\nLoad average when it began (1, 5, 15 minutes): {load}."
        f"\nThe process that serves has core {_list(machine.serving_cores)}; clients, Postgres, MLflow server, "
        f"evaluator (niceness {EVALUATOR_NICENESS}) and model server share core {_list(machine.other_cores)}."
    )


def _method(plan: Plan) -> str:
    return (
        f"{plan.rounds} rounds of {plan.seconds:g} s each, after {plan.warm_up_s:g} s of warm-up that is not counted; "
        f"{plan.connections} connections. Medians of the rounds; traces stored are of all rounds together, waited for "
        f"up to {plan.drain_limit_s:g} s after each. The core is disturbed for the share of the time that it worked "
        "for anyone else: requests/s and latencies suffer most from it, processor time a request less, ratios least."
    )


def _details(figure: Figure) -> str:
    lines = "\n".join(f"- {line}" for line in figure.details)
    return f"{figure.name}:\n\n{lines}"


def _profile(profile: Profile) -> str:
    title = f"## Where the time goes: {CONTESTANTS[profile.contestant].title}, model {_MODELS[profile.model]}"
    note = f"{profile.requests} requests, {profile.cpu_ms:.2f} ms CPU a request while it was sampled."
    parts = [title, note]
    for heading, counts in (
        ("own time by package", profile.packages),
        ("own time by function", profile.functions),
        ("for whom it was spent", profile.behalf),
        ("with all that it calls", profile.inclusive),
    ):
        rows = [(f"`{name}`", f"{ms:.3f}", f"{ms / profile.cpu_ms:.1%}") for name, ms in counts[:_TOP_FUNCTIONS]]
        parts.append(table((heading, "ms a request", "share"), rows))
    return "\n\n".join(parts)


def _list(cores: list[int]) -> str:
    return ", ".join(map(str, cores))
