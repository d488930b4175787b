"""Mistakes that keep scorers from working, each with its place and what to do: what can be seen without any data.

At the start an error stops the evaluator, since what it says can never work; a warning is logged. ``gateway doctor``
shows both, with what only the data tells (`gateway.evaluation.doctor`).
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow.genai.judges.instructions_judge import InstructionsJudge
from mlflow.genai.scorers.base import Scorer, flatten_scorers

from gateway.evaluation.judge_models import keys_that_litellm_misses, what_cannot_be_bounded, what_model_lacks
from gateway.evaluation.judging.prices import Prices
from gateway.evaluation.scoring import LiveScorer
from gateway.settings import Settings, config_path
from gateway.toml_lines import place_of

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One mistake."""

    severity: Severity
    """``error``: it can never work. ``warning``: it works, and most likely not as meant. ``note``: not looked at."""
    place: str
    """File and line, setting, dataset or scorer."""
    problem: str
    """A sentence."""
    fix: str
    """What to do: a sentence."""

    def __str__(self) -> str:
        """Return it as one line."""
        return f"{self.place}: {self.problem} {self.fix}"


_VARIABLES = {
    "inputs": ("input", "question", "query", "request", "prompt", "message", "messages"),
    "outputs": ("output", "answer", "response", "completion", "reply"),
    "expectations": ("expectation", "expected_response", "expected_answer", "expected_facts", "ground_truth", "rubric"),
    "trace": ("context", "retrieved_context", "tool_calls", "spans"),
    "conversation": ("history", "session", "chat_history"),
}
"""The variables that a judge's template can have, and the words that people write for them."""
_MEANT = {word: variable for variable, words in _VARIABLES.items() for word in (variable, *words)}
_SINGLE = re.compile(r"(?<![{$])\{\s*([A-Za-z_][\w.]*)\s*\}(?!\})")
_ANY = re.compile(r"\{+\s*([A-Za-z_][\w.]*)\s*\}+")
_REFUSED = ("must contain at least one variable", "contains unsupported variables")
_IN_FRONT = (
    "Put a server that speaks OpenAI's API before the provider (LiteLLM's proxy is one), name it in "
    "GATEWAY_JUDGE_BASE_URL, and write openai:/name."
)
_S3_ENDPOINTS = ("MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def mistakes_of_scorers(scorers: Iterable[LiveScorer]) -> list[Finding]:
    """Return what is wrong with how scorers were written."""
    return [
        finding
        for live in scorers
        for part in flatten_scorers([live.scorer])
        for finding in (*_of_template(live, part), *_of_value_type(live, part))
    ]


def mistakes_of_settings(
    settings: Settings, scorers: Iterable[LiveScorer], environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Return what is wrong around the scorers: judge models that cannot be asked, stores that cannot do what they must.

    Args:
        settings: those of the evaluator.
        scorers: those that run live.
        environment: variables that MLflow will see.
    """
    scorers = list(scorers)
    findings = [*_of_models(settings, scorers, environment), *_of_datasets(settings, scorers)]
    if is_file_store(settings.mlflow_tracking_uri):
        findings.append(_file_store(str(settings.mlflow_tracking_uri)))
    findings += of_artifacts(
        environment.get("MLFLOW_ARTIFACTS_DESTINATION"), environment, "MLFLOW_ARTIFACTS_DESTINATION"
    )
    return findings


def _of_template(live: LiveScorer, part: Scorer) -> Iterable[Finding]:
    """Find variables in single braces: MLflow replaces those in double ones alone, and the judge reads the braces."""
    is_template = isinstance(part, InstructionsJudge)
    guidelines = getattr(part, "guidelines", ())
    texts = [part.instructions] if is_template else [guidelines] if isinstance(guidelines, str) else guidelines
    pattern = _SINGLE if is_template else _ANY
    for found in {match.group(0): match for text in texts for match in pattern.finditer(text)}.values():
        place = _place(live, found.group(0))
        if not is_template:
            problem = f"the guideline has {found.group(0)}, which nothing replaces: the judge reads it as it is."
            fix = "Write the guideline without variables: MLflow shows question and answer to the judge by itself."
            yield Finding("warning", place, problem, fix)
            continue
        problem = f"the template has {found.group(0)}, which nothing replaces: the judge reads the braces."
        yield Finding("error" if _meant(found.group(1)) else "warning", place, problem, _instead(found.group(1)))


def _meant(word: str) -> str | None:
    """Return the variable that a word in braces stands for; ``None`` if it may be anything."""
    first, *rest = word.split(".")
    return _MEANT.get(first) if not rest or first in _VARIABLES else None


def _instead(word: str) -> str:
    variable = _meant(word)
    if variable is None:
        return "Write what is meant, or double braces around one of " + ", ".join(
            f"{{{{ {each} }}}}" for each in _VARIABLES
        )
    field = word.rpartition(".")[2]
    whole = f" (the whole of them: MLflow takes no {{{{ {variable}.{field} }}}})" if field != variable else ""
    return f"Write {{{{ {variable} }}}} in its place{whole}."


def explain_refusal(error: BaseException) -> str:
    """Return what to do about a template that MLflow refuses, to go on from its message; empty for other errors."""
    said = str(error)
    if not any(text in said for text in _REFUSED):
        return ""
    words = sorted(word for word in re.findall(r"'([\w.]+)'", said.partition("Only the following")[0]) if _meant(word))
    advice = " ".join(f"For {word}: {_instead(word)}" for word in words)
    return f" {advice or 'Variables stand in double braces: {{ inputs }}, not {question}.'}"


def _of_value_type(live: LiveScorer, part: Scorer) -> Iterable[Finding]:
    """Find judges that may answer with any text."""
    if type(part) is InstructionsJudge and part.feedback_value_type is str and part.pass_if is None:
        yield Finding(
            "warning",
            _place(live, "make_judge"),
            f"{part.name} has feedback_value_type=str, also where none is given: its judge may answer with any text, "
            "from which no verdict and no share can come.",
            'Say what it may answer: feedback_value_type=Literal["yes", "no"], Literal["1", "2", "3"], bool or int.',
        )


def _place(live: LiveScorer, text: str) -> str:
    """Return where a scorer is, with the line that has the text if it is in a file."""
    path = Path(live.place)
    lines = path.read_text().splitlines() if path.suffix == ".py" and path.is_file() else []
    named = next((number for number, line in enumerate(lines, 1) if live.name in line), 1)
    found = next((number for number, line in enumerate(lines, 1) if text in line and number >= named), None)
    found = found or next((number for number, line in enumerate(lines, 1) if text in line), None)
    return f"{live.place}, line {found}" if found else live.place or live.name


def _of_models(settings: Settings, scorers: list[LiveScorer], environment: Mapping[str, str]) -> Iterable[Finding]:
    seen = dict(environment)
    if settings.judge_api_key:
        seen["OPENAI_API_KEY"] = settings.judge_api_key.get_secret_value()
    asked: dict[str, list[LiveScorer]] = {}
    for live in scorers:
        if live.model:
            asked.setdefault(live.model, []).append(live)
    for model, judges in asked.items():
        names = ", ".join(live.name for live in judges)
        place = judges[0].place if judges[0].rule.judge_model else "GATEWAY_JUDGE_MODEL"
        if lacks := what_model_lacks(model, seen):
            yield Finding("error", place, f"{names} cannot ask {model}.", lacks)
            continue
        if keys := keys_that_litellm_misses(model, seen):
            problem = (
                f"LiteLLM, by which {names} asks {model}, wants {' and '.join(keys)}, and finds nothing of the kind."
            )
            yield Finding(
                "warning", place, problem, "Set it in the evaluator's environment, unless this host is known."
            )
        yield from _of_limits(settings, model, judges, place)


def _of_limits(settings: Settings, model: str, judges: list[LiveScorer], place: str) -> Iterable[Finding]:
    """Find judges whose calls no limit reaches, and a budget in money that does not count a model."""
    past = {live.name: said for live in judges if (said := what_cannot_be_bounded(live.scorer, model))}
    if past:
        problem = (
            f"{', '.join(past)}: {next(iter(past.values()))} No limit holds for its calls, and no budget counts them."
        )
        yield Finding("warning", place, problem, _IN_FRONT)
    has_budget = settings.judge_usd_per_hour is not None or settings.judge_usd_per_day is not None
    if not has_budget or len(past) == len(judges):
        return
    rule = settings.judge_models.get(model)
    if (rule is None or rule.input_usd is None) and Prices({}).of(model) is None:
        yield Finding(
            "warning",
            "GATEWAY_JUDGE_USD_PER_HOUR" if settings.judge_usd_per_hour is not None else "GATEWAY_JUDGE_USD_PER_DAY",
            f"the price of {model} is unknown: the budget in US dollars does not count what it costs.",
            f'Give its price in gateway.toml, as [judge_models."{model}"] with input_usd and output_usd for a million '
            "tokens, or set a budget in tokens, GATEWAY_JUDGE_TOKENS_PER_HOUR or GATEWAY_JUDGE_TOKENS_PER_DAY.",
        )


def _of_datasets(settings: Settings, scorers: list[LiveScorer]) -> Iterable[Finding]:
    """Find rules for what is not there. A scorer may name its scores as it likes, so it is no more than a warning."""
    known = {
        "scorers": sorted(live.name for live in scorers),
        "agents": sorted(path.parent.name for path in settings.agents_dir.glob("*/agent.py")),
    }
    for name, rule in settings.datasets.items():
        for key, named in (("scorers", rule.scorers), ("agents", rule.agents)):
            if unknown := sorted(set(named or ()) - set(known[key])):
                yield Finding(
                    "warning",
                    place_of(config_path(), "datasets", name, key) or f"[datasets.{name}]",
                    f"{key} names {', '.join(unknown)}, and nothing of that name runs live.",
                    f"There are {', '.join(known[key]) or 'none'}.",
                )


def is_file_store(uri: str | None) -> bool:
    """Whether a tracking URI is a folder, as ``./mlruns``."""
    return uri is not None and uri != "databricks" and (uri.startswith("file:") or "://" not in uri)


def _file_store(uri: str) -> Finding:
    return Finding(
        "error",
        "GATEWAY_MLFLOW_TRACKING_URI",
        f"{uri} is a file store, which has neither datasets nor a place for the spans of traces.",
        "Name a database, as sqlite:///mlflow.db or postgresql://host/mlflow, or a server on one, as http://host:5000; "
        "or leave it unset for MLflow beside the gateway's own database.",
    )


def of_artifacts(location: str | None, environment: Mapping[str, str], place: str) -> list[Finding]:
    """Find a store like S3 with no address: the bucket would be looked for at Amazon.

    Amazon's own needs none; a region or a profile of theirs says that it is meant.
    """
    if not (location or "").startswith("s3:") or any(environment.get(name) for name in _S3_ENDPOINTS):
        return []
    is_amazons = any(environment.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"))
    if is_amazons:
        return []
    return [
        Finding(
            "warning",
            place,
            f"artifacts go to {location}, and no endpoint is set: the bucket is looked for at Amazon.",
            "For MinIO, R2, Ceph and the like set MLFLOW_S3_ENDPOINT_URL, as http://minio:9000, where MLflow's server "
            "and its clients run; for Amazon's own set AWS_REGION.",
        )
    ]
