"""Near-duplicates: what is one more of the same, and what is a case of its own."""

import itertools
from collections.abc import Sequence

import pytest

from gateway.evaluation.datasets.rules import DEFAULTS
from gateway.evaluation.datasets.similarity import Signature, signature, similarity

SAME = [
    ("Where is my parcel for order A-1004?", "where is my parcel for order A-1004??!"),
    ("What is the status of order A-1001?", "Hello, what is the status of order A-1001?"),
    ("Refund A-1003 please, write to me at <EMAIL:aaaa>.", "Refund A-1003 please, write to me at <EMAIL:k3f7>"),
    ("Can you list my orders?", "can you list my orders please"),
    (
        "My package was supposed to arrive last Tuesday but the tracking page still shows that it is in the warehouse "
        "in Leipzig, and nobody answers the phone. Can you find out where it is and when I will get it?",
        "My package was supposed to arrive last Tuesday but the tracking page still says that it is in the warehouse "
        "in Leipzig and nobody answers the phone. Can you find out where it is and when I will get it?",
    ),
    ("我的订单什么时候到货", "我的订单什么时候到货？"),  # noqa: RUF001 - as people there write it
]
OTHER = [
    ("What is the status of order A-1001?", "What is the status of order A-1002?"),
    ("12 + 30", "12 + 31"),
    ("Convert 120 euros to dollars at today's rate", "Convert 120 dollars to euros at today's rate"),
    ("Book a table for two on Friday at 7 pm", "Book a table for four on Friday at 7 pm"),
    ("Please cancel my subscription", "Please renew my subscription"),
    ("Does the policy cover a broken lid?", "Does the policy cover a lost lid?"),
    ("我的订单什么时候到货", "我的订单可以取消吗"),
]


def asked(*texts: str, tools: Sequence[str] = ()) -> Signature:
    """Return the signature of a conversation in which the user said these; the agent answers each but the last."""
    messages = [{"role": "user", "content": texts[0]}]
    for text in texts[1:]:
        messages += [{"role": "assistant", "content": "Let me see."}, {"role": "user", "content": text}]
    return Signature.decode(signature({"messages": messages}, tools).encode())


def is_similar(one: Signature, other: Signature) -> bool:
    """Whether the default would leave one of them out."""
    assert similarity(one, other) == similarity(other, one)
    return similarity(one, other) >= (DEFAULTS.similar_at_least or 2)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_in_other_dress_is_similar(one: str, other: str) -> None:
    """Case, punctuation, a word more, and the placeholder of another session make no new case."""
    assert is_similar(asked(one), asked(other))


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_another_number_order_or_word_is_another_case(one: str, other: str) -> None:
    """Short questions that differ in what matters stay apart."""
    assert not is_similar(asked(one), asked(other))


def test_growing_history_does_not_hide_a_repetition() -> None:
    """A question asked again in later turns, long or short, is similar to itself, though all inputs differ."""
    for question in ("Where is my parcel for order A-1004?", "Track A-1016"):
        turns = [asked(*([question] * turns)) for turns in (1, 2, 3)]
        assert len({each.inputs for each in turns}) == 3
        assert all(is_similar(one, other) for one, other in itertools.combinations(turns, 2))


def test_a_short_follow_up_means_what_was_asked_before_it() -> None:
    """The same few words after another question are another case, and after the same one they are not."""
    yes = asked("Cancel order A-1004, it takes too long", "Yes please")
    assert not is_similar(yes, asked("Send me the return policy, would you", "Yes please"))
    assert not is_similar(yes, asked("Cancel order A-1004, it takes too long", "No, keep it"))
    assert is_similar(yes, asked("Cancel order A-1004, it takes too long!", "yes, please"))


def test_other_tools_make_another_case() -> None:
    """The same question that was answered by other tools went wrong in another way."""
    question = "Where is my parcel for order A-1004?"
    assert not is_similar(asked(question, tools=["track_shipment"]), asked(question, tools=["get_order"]))
    assert is_similar(asked(question, tools=["b", "a"]), asked(question, tools=["a", "b"]))


def test_a_signature_stays_small_and_good_for_long_texts() -> None:
    """Of a very long text a fixed size is kept, and the similarity told by it is near the true one."""
    words = [f"word{number}" for number in range(2000)]
    one, other = asked(" ".join(words)), asked(" ".join(words[:1800]))
    assert len(one.encode()) < 1000
    assert similarity(one, other) == pytest.approx(0.9, abs=0.1)
    assert similarity(one, asked(" ".join(reversed(words[:40])))) < 0.3


@pytest.mark.parametrize("inputs", [{}, {"messages": []}, {"messages": [{"role": "user"}]}, {"question": "Why?"}])
def test_anything_has_a_signature(inputs: dict[str, object]) -> None:
    """Rows without a word of a user are compared as well."""
    made = signature(inputs, [])
    assert similarity(made, made) == 1.0
