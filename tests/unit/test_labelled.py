"""The labelled conversations: their form, their split, and the traces made of them."""

from collections import Counter
from itertools import product

import msgspec
import pytest

from ..labelled import loading
from ..labelled.loading import CONVERSATION_LABELS, DOMAINS, SPLITS, TRACE_LABELS, Conversation

EVERY = list(product(DOMAINS, SPLITS))


def both_splits() -> list[Conversation]:
    """Return all conversations."""
    return [conversation for domain, split in EVERY for conversation in loading.load(domain, split)]


def stated(conversation: Conversation) -> Counter[str]:
    """Return how often each label is true in a conversation and its turns."""
    labels = [conversation.labels, *(turn.labels for turn in conversation.turns)]
    return Counter(name for each in labels for name, there in msgspec.structs.asdict(each).items() if there)


def near_misses(conversation: Conversation) -> Counter[str]:
    """Return how often each label is nearly true in a conversation and its turns."""
    return Counter([*conversation.near_misses, *(name for turn in conversation.turns for name in turn.near_misses)])


@pytest.mark.parametrize(("domain", "split"), EVERY)
def test_each_split_of_a_domain_has_45_conversations_of_which_about_half_have_no_fault(domain, split):
    """A measurement needs enough of both kinds, and each conversation says which domain's tools it used."""
    conversations = loading.load(domain, split)
    assert len(conversations) >= 45
    assert 0.35 <= sum(each.has_fault for each in conversations) / len(conversations) <= 0.65
    assert {each.tools for each in conversations} == {domain}
    assert max(len(each.turns) for each in conversations) <= 10


@pytest.mark.parametrize("split", SPLITS)
def test_each_label_has_positives_and_near_misses_in_each_split(split):
    """No label is judged on a handful of cases, and each meets cases that only look like it."""
    conversations = [each for domain in DOMAINS for each in loading.load(domain, split)]
    positives, misses = sum(map(stated, conversations), Counter()), sum(map(near_misses, conversations), Counter())
    labels = [*TRACE_LABELS, *CONVERSATION_LABELS]
    assert {name: positives[name] for name in labels if positives[name] < 8} == {}
    assert {name: misses[name] for name in labels if misses[name] < 15} == {}


def test_no_conversation_is_in_both_splits():
    """Ids are unique over everything, and so is what was said."""
    ids = Counter(each.id for each in both_splits())
    texts = Counter(msgspec.json.encode(each.turns) for each in both_splits())
    assert max(ids.values()) == max(texts.values()) == 1


def test_every_call_is_of_a_tool_of_its_domain():
    """A rule that reads tool definitions finds one for each call."""
    known = {domain: {each["function"]["name"] for each in loading.tools(domain)} for domain in DOMAINS}
    called = {
        (each.tools, call.name) for each in both_splits() for turn in each.turns for s in turn.steps for call in s.calls
    }
    assert [(domain, name) for domain, name in called if name not in known[domain]] == []
    assert {domain: {name for at, name in called if at == domain} for domain in DOMAINS} == known


def test_invalid_arguments_are_labelled_where_a_call_does_not_fit_its_schema():
    """What can be told for certain, the labels must not get wrong."""
    wrong = [
        conversation.id
        for conversation in both_splits()
        for turn, trace in zip(conversation.turns, loading.traces(conversation), strict=True)
        if turn.labels.invalid_arguments
        != any(span.attributes.get("gateway.arguments_valid") is False for span in trace.data.spans)
    ]
    assert wrong == []


def test_traces_are_one_session_in_order_and_hold_what_was_said():
    """A turn with a failed search, one with documents and one with an answer alone come out as they do live."""
    turns = [
        {"user": "where is A-1", "steps": [{"calls": [{"name": "track_shipment", "arguments": {"order_id": "A-1"},
         "error": "no such order"}]}], "answer": "Not found."},
        {"user": "returns?", "steps": [{"calls": [{"name": "search_return_policy", "arguments": {"query": "returns"},
         "result": [{"page_content": "30 days", "metadata": {}}]}], "text": "Let me see."}], "answer": None,
         "error": {"type": "APITimeoutError", "message": "timed out"}},
    ]  # fmt: skip
    none = {"labels": dict.fromkeys(TRACE_LABELS, False), "near_misses": []}
    labels = {"labels": dict.fromkeys(CONVERSATION_LABELS, False), "near_misses": []}
    document = {"id": "x-1", "turns": [turn | none for turn in turns], "tools": "support", **labels}
    first, second = loading.traces(msgspec.convert(document, Conversation), noted=False)

    assert [(span.span_type, span.status.status_code.name) for span in first.data.spans] == [
        ("AGENT", "OK"), ("CHAT_MODEL", "OK"), ("TOOL", "ERROR"), ("CHAT_MODEL", "OK"),
    ]  # fmt: skip
    assert [span.span_type for span in second.data.spans] == ["AGENT", "CHAT_MODEL", "TOOL", "RETRIEVER"]
    assert first.data.spans[2].outputs == "Error: no such order"
    assert [each["role"] for each in second.data.spans[1].inputs["messages"]] == [
        "system", "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip
    assert first.data.spans[1].attributes["mlflow.chat.tools"] == list(loading.tools("support"))
    assert (first.info.state, second.info.state) == ("OK", "ERROR")
    assert first.info.request_time < second.info.request_time
    assert {each.info.trace_metadata["mlflow.trace.session"] for each in (first, second)} == {"x-1"}


@pytest.mark.parametrize(
    "spoilt",
    [
        {"labels": {}},
        {"near_misses": ["no_such_label"]},
        {"turns": []},
        {"remark": "nobody reads this"},
    ],
)
def test_what_is_not_in_the_format_is_refused(spoilt):
    """A label that is left out, or a word too many, is an error and not a silent false."""
    sound = msgspec.to_builtins(loading.load("math", "dev")[0])
    assert msgspec.convert(sound, Conversation).id == sound["id"]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(sound | spoilt, Conversation)
