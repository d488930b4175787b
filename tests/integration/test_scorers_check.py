"""`gateway scorers` and `gateway doctor` on a real MLflow: what they print, and that they store nothing."""

import json
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import psycopg
import pytest
from cyclopts import App

from gateway.commands import doctor as doctor_command
from gateway.commands import scorers as scorers_command
from gateway.errors import ConfigurationError
from gateway.evaluation.export import kept_tags, to_mlflow
from gateway.evaluation.store import MlflowStore, configure_mlflow
from gateway.settings import load_settings
from gateway.testing import ScriptedOpenAI

from .evaluating import made

RULES = """
[scorers.no_tool_errors]
filter = { tools = ["refund"] }
[scorers.polite]
builtin = "Guidelines"
arguments = { guidelines = ["The answer gives the number."] }
judge_model = "openai:/scripted"
share = 0.25
[scorers.RetrievalGroundedness]
judge_model = "openai:/scripted"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str) -> str:
    """A project with some rules, on an experiment of its own, whose name it returns."""
    root = Path(__file__).parents[2]
    (tmp_path / "gateway.toml").write_text(RULES)
    experiment = f"check-{uuid.uuid4().hex[:8]}"
    for name, value in {
        "CONFIG": tmp_path / "gateway.toml",
        "HOME": tmp_path / "home",
        "SCORERS_DIR": root / "scorers",
        "AGENTS_DIR": root / "agents",
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLFLOW_EXPERIMENT": experiment,
    }.items():
        monkeypatch.setenv(f"GATEWAY_{name}", str(value))
    for name in ("MLFLOW_TRACKING_URI", "OPENAI_API_BASE", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "")  # so that what the commands set is taken back
    return experiment


@pytest.fixture
def stored(project: str, mlflow_uri: str) -> Callable[..., list[str]]:
    """Write turns of a session to MLflow as the evaluator does, and return their ids."""

    def store(*texts: str, session: str) -> list[str]:
        settings = load_settings()
        configure_mlflow(settings, mlflow_uri)
        kept = MlflowStore(mlflow_uri, settings.mlflow_experiment)
        turns = [made(session, text) for text in texts]
        kept.write_traces([to_mlflow(turn, kept.experiment_id, kept_tags(1.0, [])) for turn in turns])
        return [turn.trace_id for turn in turns]

    return store


@pytest.fixture
def gateway(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command, and return what it prints."""
    app = App()
    scorers_command.register(app)
    doctor_command.register(app)

    def run(*words: str, ends: int = 0) -> str:
        with nullcontext() if ends == 0 else pytest.raises(SystemExit, match=str(ends)):
            app(words, result_action="return_value")
        return capsys.readouterr().out

    return run


def assessments(uri: str) -> int:
    """Return how many assessments MLflow has."""
    with psycopg.connect(uri.replace("+psycopg", "", 1)) as connection:
        return int(connection.execute("SELECT count(*) FROM assessments").fetchone()[0])  # type: ignore[index]


def verdict(body: dict[str, Any]) -> str:
    """Play a judge that looks for this very turn in what it is asked."""
    asked = json.dumps(body["messages"])
    good = "12 + 30" in asked and "It is 42." in asked and "gives the number" in asked
    return json.dumps({"rationale": "I looked for 42.", "result": "yes" if good else "no"})


def test_a_judge_on_a_trace(
    gateway, stored, mlflow_uri: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge says what it says of a stored trace, at what cost; that is in the book, and nothing else is stored."""
    [trace_id] = stored("12 + 30", session="s-1")
    before = assessments(mlflow_uri)
    with ScriptedOpenAI(verdict) as judge:
        monkeypatch.setenv("GATEWAY_JUDGE_BASE_URL", judge.url)
        monkeypatch.setenv("GATEWAY_JUDGE_API_KEY", "sk-test")
        monkeypatch.setenv("GATEWAY_DATABASE_URL", database_url)
        text = gateway("scorers", "check", "polite", "--trace", trace_id)
        monkeypatch.delenv("GATEWAY_DATABASE_URL")
        other = gateway("scorers", "check", "polite", "--trace", trace_id, "--judge-model", "openai:/other")
    assert [body["model"] for body in judge.requests] == ["scripted", "other"]
    for line in ("'yes'", "passed", "I looked for 42.", "10 tokens in, 5 tokens out", "gateway.toml, line 4"):
        assert line in text
    assert "yes, a share of 0.25" in text
    assert " s\n" in text
    assert "passed" in other
    assert "Note: The gateway's database is not there" in other
    assert "Note" not in text
    with psycopg.connect(database_url) as connection:
        book = connection.execute("SELECT model, calls, input_tokens, output_tokens FROM judge_spending").fetchall()
    assert book == [("openai:/scripted", 1, 10, 5)]
    assert assessments(mlflow_uri) == before


def test_plain_code_on_a_trace_and_a_session(gateway, stored) -> None:
    """Plain code runs on a trace or a whole session; what does not apply, or is not for it live, is said."""
    session = f"s-{uuid.uuid4().hex[:6]} of 'me'"
    [first, *_] = stored("12 + 30", "and once more, 12 + 30", session=session)
    text = gateway("scorers", "check", "no_tool_errors", "--trace", first)
    assert "not applicable" in text
    assert "not on this one: tool" in text
    text = gateway("scorers", "check", "no_repeated_question", "--session", session)
    assert "no_repeated_question" in text
    assert "verdict" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no_tool_errors",), "Give either --trace"),
        (("no_tool_errors", "--session", "s-none"), "scores single traces: give --trace"),
        (("no_repeated_question", "--trace", "tr-1"), "scores conversations: give --session"),
        (("no_tool_errors", "--trace", "tr-nowhere"), "MLflow has no trace tr-nowhere"),
        (("no_repeated_question", "--session", "s-none"), "has no traces of a session s-none"),
        (("no_tool_eror", "--trace", "tr-1"), "did you mean no_tool_errors"),
        (("Safety", "--trace", "tr-1"), "asks a model, and none is set"),
        (("Safety", "--trace", "tr-1", "--judge-model", "opnai:/x"), "did you mean openai:/x"),
        (("polite", "--trace", "tr-1"), "OPENAI_API_KEY is not set"),
    ],
)
def test_what_cannot_be_checked(gateway, project: str, words: tuple[str, ...], said: str) -> None:
    """What cannot be checked is told in one message, with what to do."""
    with pytest.raises(ConfigurationError, match=said):
        gateway("scorers", "check", *words)


def test_list(gateway, project: str) -> None:
    """The list has every scorer with its rule, and why it does not run."""
    lines = {line.split()[1]: line for line in gateway("scorers", "list").splitlines() if line.startswith("│")}
    assert "calls refund" in lines["no_tool_errors"]
    assert "no: no judge model" in lines["user_frustration"]
    assert all(part in lines["polite"] for part in ("yes", "0.25", "openai:/scripted", "gateway.toml, line 4"))


def test_doctor(gateway, stored, tmp_path: Path, mlflow_uri: str) -> None:
    """The doctor tells errors before warnings, on rules, traces, datasets and files, and ends with 1 for an error."""
    stored("12 + 30", session="s-2")
    dataset = mlflow.genai.datasets.create_dataset(
        name=f"rows-{uuid.uuid4().hex[:6]}",
        experiment_id=mlflow.get_experiment_by_name(load_settings().mlflow_experiment).experiment_id,
    )
    dataset.merge_records([{"inputs": {"question": "1 + 1?"}}])
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?"}\n')
    text = gateway("doctor", str(tmp_path / "rows.jsonl"), ends=1)
    for said in (
        "cannot ask openai:/scripted",
        "none of the latest 1 traces has a RETRIEVER span",
        "gateway.toml, line 3: no_tool_errors is for runs that called refund, and none of the latest 1 did",
        f"dataset {dataset.name}, record dr-",
        "has no chat messages in `inputs`",
        "rows.jsonl, line 1: 1 of 1 records has no `inputs`",
    ):
        assert said in text, text
    assert text.rindex("\nerror ") < text.index("\nwarning ")
    assert "golden.jsonl" not in text


def test_doctor_finds_nothing(gateway, stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is well it says so, and ends with 0; an experiment without traces is noted."""
    (tmp_path / "gateway.toml").write_text("")
    assert "note MLflow: there are no traces" in gateway("doctor")
    stored("12 + 30", session="s-3")
    assert gateway("doctor") == "0 errors, 0 warnings\n"


def test_doctor_without_mlflow(gateway, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLflow that is away is an error like any other."""
    (tmp_path / "gateway.toml").write_text("")
    monkeypatch.setenv("GATEWAY_MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert "error MLflow: it cannot be asked" in gateway("doctor", ends=1)
    monkeypatch.delenv("GATEWAY_MLFLOW_TRACKING_URI")
    assert "it cannot be asked. No database: the embedded Postgres" in gateway("doctor", ends=1)
