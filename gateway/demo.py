"""``gateway demo``: the whole journey in one command, seen from outside.

It starts ``gateway serve``, sends the sample conversations of the agents over HTTP as a client would, waits until
MLflow shows their scores and the dataset its rows, and prints what came of each. Everything it knows it has read over
HTTP, from the gateway and from MLflow.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gateway.errors import ConfigurationError
from gateway.settings import Settings
from gateway.storage.embedded import die_with_parent
from gateway.supervisor import addresses

_START_TIMEOUT_S = 180.0  # MLflow makes its tables on the first start; on a slow disk that takes a while
_SCORES_TIMEOUT_S = 120.0  # covers an evaluator that is killed on the way and starts again
_QUIET_PERIOD_S = "3"
_ANSWER_WIDTH = 60


class Sample(msgspec.Struct):
    """A line of an agent's ``samples.jsonl``."""

    name: str
    turns: list[str]
    expect: dict[str, bool]
    """Verdict by scorer, over the whole conversation: it failed if it failed on any turn."""


@dataclass
class Conversation:
    """A sample that was sent, and what is known of it by now."""

    agent: str
    sample: Sample
    offline: bool = True
    answers: list[str] = field(default_factory=list)
    trace_ids: list[str] = field(default_factory=list)
    verdicts: dict[str, list[Any]] = field(default_factory=dict)
    in_dataset: bool = False

    def passed(self, scorer: str) -> bool | None:
        """Return the verdict over all turns; ``None`` while there is none."""
        values = self.verdicts.get(scorer)
        return None if values is None else not any(value in (False, "no", "unresolved") for value in values)

    @property
    def missing(self) -> list[str]:
        """What is expected and not there yet, or not as expected; with a real model only that there are scores."""
        if not self.offline:
            return [] if self.verdicts else ["any score"]
        wrong = [name for name, verdict in self.sample.expect.items() if self.passed(name) is not verdict]
        should_be_collected = not all(self.sample.expect.values())
        return wrong + (["dataset row"] if should_be_collected and not self.in_dataset else [])


def run_demo(settings: Settings, *, leave: bool) -> int:
    """Run the demo and return its exit code: 0 when everything expected was there.

    Raises:
        ConfigurationError: the gateway did not start, or no agent has samples.
    """
    if settings.mlflow_ui is None:
        raise ConfigurationError("The demo reads the scores from MLflow: set GATEWAY_MLFLOW_URL to its address.")
    console = Console()
    conversations = _samples(settings.agents_dir)
    process = _start_gateway(settings)
    try:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit_s = settings.run_timeout_s + 10
        with httpx.Client(base_url=addresses(settings)["api"], timeout=limit_s, headers=headers) as client:
            _await_start(process, client, console, settings)
            _send(client, conversations, console)
            complete = _await_scores(conversations, settings, console)
        _print_result(conversations, settings, console, complete=complete)
        if leave:
            return 0 if complete else 1
        console.print("Serving until Ctrl-C.")
        return process.wait()
    except KeyboardInterrupt:
        return 130 if leave else 0
    finally:
        _stop(process)


def _samples(agents_dir: Path) -> list[Conversation]:
    found = [
        Conversation(path.parent.name, msgspec.json.decode(line, type=Sample))
        for path in sorted(agents_dir.glob("*/samples.jsonl"))
        for line in path.read_text().splitlines()
    ]
    if not found:
        raise ConfigurationError(f"No agent of {agents_dir} has a samples.jsonl, so there is nothing to show.")
    return found


def _start_gateway(settings: Settings) -> subprocess.Popen[bytes]:
    """Start ``gateway serve``; it stays in our process group, so that Ctrl-C reaches it as well."""
    environment = {"GATEWAY_QUIET_PERIOD_S": _QUIET_PERIOD_S, **os.environ}
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "serve.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--logs-to-files"],
            env=environment,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - this process has one thread
        )


def _await_start(process: subprocess.Popen[bytes], client: httpx.Client, console: Console, settings: Settings) -> None:
    """Wait until every part is well."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    with console.status("Starting Postgres, MLflow, web and evaluator …") as status:
        while True:
            if process.poll() is not None:
                raise ConfigurationError((settings.home / "serve.log").read_text().rpartition("gateway: ")[2].strip())
            try:
                health = client.get("/health", timeout=5).json()
            except (httpx.HTTPError, json.JSONDecodeError):
                health = {"status": "starting", "degraded": ["web"]}
            if health["status"] == "ok":
                return
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"The gateway did not become ready in {_START_TIMEOUT_S:.0f} s ({', '.join(health['degraded'])}); "
                    f"see the logs in {settings.home / 'logs'}."
                )
            status.update(f"Starting; still waiting for {', '.join(health['degraded'])} …")
            time.sleep(0.3)


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _send(client: httpx.Client, conversations: list[Conversation], console: Console) -> None:
    """Send every conversation, a turn at a time, as a chat client would."""
    turns = sum(len(conversation.sample.turns) for conversation in conversations)
    with _progress(console) as progress:
        task = progress.add_task("Sending conversations", total=turns)
        for conversation in conversations:
            session_id = None
            for text in conversation.sample.turns:
                body = {"agent": conversation.agent, "messages": [{"role": "user", "content": text}], "user": "demo"}
                answer = client.post("/invocations", json=body | ({"session_id": session_id} if session_id else {}))
                if answer.status_code == httpx.codes.UNAUTHORIZED:
                    raise ConfigurationError("There are API keys: set GATEWAY_API_KEY to one of them for the demo.")
                if answer.status_code != httpx.codes.OK:
                    raise ConfigurationError(f"{conversation.agent} answered {answer.status_code}: {answer.text}")
                result = answer.json()
                session_id = result["session_id"]
                conversation.offline = result["offline"]
                conversation.answers.append(result["choices"][0]["message"]["content"])
                conversation.trace_ids.append(result["trace_id"])
                progress.advance(task)


def _await_scores(conversations: list[Conversation], settings: Settings, console: Console) -> bool:
    """Read MLflow until everything expected is there; return whether it came in time."""
    deadline = time.monotonic() + _SCORES_TIMEOUT_S
    with _progress(console) as progress, httpx.Client(base_url=str(settings.mlflow_ui), timeout=10) as mlflow:
        task = progress.add_task("Waiting for scores", total=len(conversations))
        while True:
            with contextlib.suppress(httpx.HTTPError):  # one slow answer is no reason to give up
                collected = _collected(mlflow)
                own = {trace_id for each in conversations for trace_id in each.trace_ids}
                if collected - own:  # rows of an earlier start on this home, beside which like ones are left out
                    collected |= own
                for conversation in (each for each in conversations if each.missing):
                    _read(mlflow, conversation, collected)
            waiting = [each for each in conversations if each.missing]
            progress.update(task, completed=len(conversations) - len(waiting))
            if not waiting or time.monotonic() > deadline:
                return not waiting
            time.sleep(0.5)


def _read(mlflow: httpx.Client, conversation: Conversation, collected: set[str]) -> None:
    """Read the conversation's assessments, the valid ones: a later score overrides an earlier one."""
    verdicts: dict[str, list[Any]] = {}
    for trace_id in conversation.trace_ids:
        answer = mlflow.get(f"/api/3.0/mlflow/traces/{trace_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            continue
        answer.raise_for_status()
        for assessment in answer.json()["trace"]["trace_info"].get("assessments", []):
            if assessment.get("valid", True) and "feedback" in assessment:
                verdicts.setdefault(assessment["assessment_name"], []).append(assessment["feedback"].get("value"))
    conversation.verdicts = verdicts
    conversation.in_dataset = bool(collected & set(conversation.trace_ids))


def _collected(mlflow: httpx.Client) -> set[str]:
    """Return the ids of the traces that the dataset's rows name."""
    query = {"filter_string": "name = 'regressions'", "max_results": 1}
    found = mlflow.post("/api/3.0/mlflow/datasets/search", json=query).raise_for_status().json().get("datasets", [])
    if not found:
        return set()
    trace_ids: set[str] = set()
    page = ""
    while True:
        address = f"/api/3.0/mlflow/datasets/{found[0]['dataset_id']}/records"
        answer = mlflow.get(address, params={"page_token": page} if page else {}).raise_for_status().json()
        for record in json.loads(answer.get("records", "[]")):
            names = (tag for tag in record.get("tags", {}) if tag.startswith("from."))
            trace_ids.update(name.removeprefix("from.") for name in names)
        page = answer.get("next_page_token", "")
        if not page:
            return trace_ids


def _print_result(conversations: list[Conversation], settings: Settings, console: Console, *, complete: bool) -> None:
    table = Table(title="Sample conversations", show_lines=True, title_justify="left")
    table.add_column("conversation", ratio=3)
    table.add_column("last answer", ratio=3)
    table.add_column("scores", no_wrap=True)
    table.add_column("in dataset")
    for conversation in conversations:
        answer = Text(textwrap.shorten(conversation.answers[-1], _ANSWER_WIDTH, placeholder=" …"))
        title = Text.assemble((conversation.agent, "bold"), " ", conversation.sample.name)
        collected = "yes" if conversation.in_dataset else "no"
        table.add_row(title, answer, _scores(conversation), collected)
    console.print(table)
    if any(conversation.offline for conversation in conversations):
        console.print("The agents' offline models answered. Set OPENAI_API_KEY and GATEWAY_MODEL for a real one.")
    for name, address in addresses(settings).items():
        console.print(f"  {name:<10} {address}", highlight=False)
    if not complete:
        for conversation in (each for each in conversations if each.missing):
            name, missing = conversation.sample.name, ", ".join(conversation.missing)
            console.print(Text.assemble(("missing:", "bold red"), f" {name}: {missing}"))


def _scores(conversation: Conversation) -> Text:
    text = Text()
    for name in sorted(conversation.verdicts):
        mark, style = ("✓", "green") if conversation.passed(name) else ("✗", "bold red")
        text.append(f"{mark} {name}\n", style)
    text.rstrip()
    return text


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the gateway in its own order; Ctrl-C has told it already."""
    if process.poll() is None:
        process.terminate()
    while True:
        try:
            process.wait()
        except KeyboardInterrupt:
            continue  # it is stopping: a second Ctrl-C must not leave it behind
        return
