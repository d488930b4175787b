"""Names are found by a real Presidio on a real spaCy pipeline, and replaced in the session's scope."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.errors import ConfigurationError
from gateway.evaluation.entities import EntityRedactor, redact_score
from gateway.evaluation.scoring import Score
from gateway.tracing.redaction.redactor import Redactor, Unredactable
from gateway.tracing.spans import Span, SpanError, Trace

PATTERNS = [
    {"label": "PERSON", "pattern": "Ann Lee"},
    {"label": "PERSON", "pattern": "get_Ann"},
    {"label": "GPE", "pattern": "Paris"},
    {"label": "NORP", "pattern": "Quaker"},
    {"label": "ORG", "pattern": "Acme"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a spaCy pipeline that knows a handful of names."""
    pytest.importorskip("presidio_analyzer", reason="the extra `ner` (250 MB) is not installed")
    spacy = pytest.importorskip("spacy", reason="the extra `ner` (250 MB) is not installed")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns(PATTERNS)
    folder = tmp_path_factory.mktemp("model") / "names"
    pipeline.to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(b"k" * 32)


@pytest.fixture(scope="module")
def entities(model: str, redactor: Redactor) -> EntityRedactor:
    return EntityRedactor(SimpleNamespace(ner_model=model), redactor)


def make_trace(session: str, **fields: Any) -> Trace:
    span = Span("0" * 16, None, "get_Ann", "TOOL", 1, 2, **fields)
    trace = Trace("tr-1", "support", "v1", session, None, True, 1, 2, spans=[span])
    trace.error = SpanError("LookupError", "no Ann Lee here")
    return trace


def test_names_become_placeholders_of_the_session(entities: EntityRedactor, redactor: Redactor) -> None:
    """People, places and groups go, organizations stay; one name reads the same in all texts of a session."""
    text = "Ann Lee, a Quaker of Paris, bought from Acme; Ann Lee again."
    trace = entities.trace(make_trace("s-1", inputs={"messages": [{"role": "user", "content": text}]}))
    other = entities.trace(make_trace("s-2", inputs=text))

    person = redactor.placeholder("PERSON", "ann lee", "s-1")
    content = trace.spans[0].inputs["messages"][0]["content"]
    assert content.count(person) == 2
    assert content.startswith(f"{person}, a <GROUP:")
    assert content.endswith(f"bought from Acme; {person} again.")
    assert "Paris" not in content
    assert person not in other.spans[0].inputs
    assert trace.error is not None
    assert trace.error.message == f"no {person} here"


def test_what_stays(entities: EntityRedactor) -> None:
    """Span names, keys of JSON, also within strings, tool definitions and placeholders stay; JSON stays JSON."""
    tools = [{"function": {"name": "x", "description": "for Ann Lee"}}]
    inner = json.dumps({"Paris": ["Ann Lee", 1]})
    trace = entities.trace(
        make_trace("s-1", inputs={"Paris": inner}, outputs="<EMAIL:abcd> 1", attributes={"mlflow.chat.tools": tools})
    )
    span = trace.spans[0]
    assert span.name == "get_Ann"
    assert span.outputs == "<EMAIL:abcd> 1"
    assert span.attributes == {"mlflow.chat.tools": tools}
    (name, number) = json.loads(span.inputs["Paris"])["Paris"]
    assert (name[:8], number) == ("<PERSON:", 1)
    before = json.dumps(span.inputs)
    assert json.dumps(entities.trace(trace).spans[0].inputs) == before


def test_long_text_in_chunks(entities: EntityRedactor) -> None:
    """A text of many chunks is searched to its end, also where a cut runs through a name."""
    text = "Ann Lee " * 6_000
    redacted = entities.value(text, "s")
    assert "Ann" not in redacted
    assert redacted.count("<PERSON:") == 6_000
    solid = "x" * 19_996 + " " + "Ann Lee" + " " + "y" * 50_000
    assert "Ann Lee" not in entities.value(solid, "s")


def test_fails_closed(entities: EntityRedactor) -> None:
    """What is nested in itself, or is no JSON, is refused as a whole, and the message holds none of it."""
    cyclic: list[Any] = ["Ann Lee"]
    cyclic.append(cyclic)
    for value in (cyclic, {"a": object()}):
        with pytest.raises(Unredactable) as raised:
            entities.value(value, "s")
        assert "Ann" not in str(raised.value)


@pytest.mark.parametrize(("given", "says"), [("", "GATEWAY_NER_MODEL"), ("no_such_model", "spacy download")])
def test_what_is_missing_is_said(model: str, redactor: Redactor, given: str, says: str) -> None:
    """A missing setting or model ends the start with what to do; nothing is downloaded."""
    with pytest.raises(ConfigurationError, match=says):
        EntityRedactor(SimpleNamespace(ner_model=given), redactor)


def test_scores_are_redacted_in_the_scope_of_the_session(redactor: Redactor) -> None:
    """What a judge wrote is redacted as the trace was, in text, value and metadata; verdicts and ids stay."""
    score = Score(
        "id", "tr-1", None, "support", "judge", "v1", "quality", "mail ann@example.com", True,
        "ann@example.com was told", "no bob@example.com", "LLM_JUDGE", "gpt", details={"about": "ann@example.com"},
    )  # fmt: skip
    redacted = redact_score(score, "s-1", redactor.value)
    email = redactor.text("ann@example.com", "s-1")
    assert (redacted.value, redacted.rationale, redacted.details) == (
        f"mail {email}",
        f"{email} was told",
        {"about": email},
    )
    assert "bob@" not in str(redacted.error)
    assert (redacted.score_id, redacted.passed, redacted.source_id) == ("id", True, "gpt")
