"""``gateway doctor``: the known mistakes, each with its place and what to do."""

import sys
from pathlib import Path

from cyclopts import App
from rich.text import Text

from gateway.commands.stored import need_mlflow, output, use_mlflow
from gateway.errors import ConfigurationError
from gateway.settings import load_settings

_COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


def register(app: App) -> None:
    """Add the command to the application."""
    app.command(doctor)


def doctor(*files: Path) -> None:
    """Look for known mistakes in scorers, rules, judge models, traces and datasets; exit code 1 if there is an error.

    Args:
        files: JSON Lines files of records to look at too; the golden.jsonl of each agent is.
    """
    settings = load_settings()
    need_mlflow()
    from gateway.evaluation.doctor import examine  # noqa: PLC0415 - takes seconds to import

    away = None
    try:
        use_mlflow(settings)
    except ConfigurationError as error:
        away = str(error)
    findings = examine(settings, files, away)
    console = output()
    for severity, colour in _COLOURS.items():  # the worst first
        for finding in (each for each in findings if each.severity == severity):
            console.print(Text.assemble((severity, colour), f" {finding.place}: {finding.problem}"), soft_wrap=True)
            if finding.fix:
                console.print(Text(f"  {finding.fix}"), soft_wrap=True)
    errors = sum(each.severity == "error" for each in findings)
    warnings = sum(each.severity == "warning" for each in findings)
    console.print(f"{errors} errors, {warnings} warnings")
    if errors:
        sys.exit(1)
