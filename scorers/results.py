"""Whether an answer states what the tools returned, and nothing else. True is a pass; None: nothing to compare."""

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import scorer

from ._claims import acts, claimed_deeds, fulfils, only_looks, promises
from ._contradictions import contradiction_in
from ._endings import cut_of
from ._evidence import evidence_of_use, left_out
from ._grounds import earlier_facts, facts_of, unknown_values
from ._keyed import says_none
from ._trace import assistant_text, offered_tools, tool_calls


@scorer
def answer_uses_tool_result(trace: Trace) -> Feedback | None:
    """Pass if the final answer states something that the last successful tool calls returned.

    Sees: numbers (36.0 as 36, $1,200.00, 42 %, rounded, or spelled out up to twelve), dates and times in the usual
    forms, codes, addresses, redaction placeholders, names, and for texts the share of their words in the answer. What
    the user or the arguments had already said proves nothing and is left out, but for a number that the user named and
    the tool confirms. Of a list or object, one value is enough, or one that follows from it by one sum; but where the
    user names a key ("and the price?"), one of its values has to show.

    Cannot see: whether the answer is right as a whole, only that it drew on the result; values that take more than one
    sum or another time zone; a paraphrase but of common states; one of several questions left open; words in another
    language than the result's. Where the result leaves nothing to look for (true, "ok", an internal id, a status word
    that does not show), or where the answer has a wrong or made-up value in its place or is cut off, which other
    scorers judge, it is not applicable rather than failed.

    Of labelled turns that no rule was written by, 10 with the fault and 447 without: 4 missed, 4 false alarms.
    """
    is_used, rationale = evidence_of_use(trace)
    if is_used is None or (is_used is False and _says_its_own(trace)):
        return None
    key = left_out(trace) if is_used else None
    if key and not cut_of(trace) and not unknown_values(trace, assistant_text(trace) or "")[0]:
        return Feedback(value=False, rationale=f"The user asked for {key!r}, and the answer has none of it.")
    return Feedback(value=is_used, rationale=rationale)


def _says_its_own(trace: Trace) -> bool:
    """Return whether the answer has something else in the result's place, which is for other scorers to judge.

    A value that is made up or wrong, an end that is cut off, a deed after a look that only prepared it.
    """
    answer = assistant_text(trace) or ""
    if cut_of(trace) or unknown_values(trace, answer)[0]:
        return True
    # To say that there is none leaves out what there is.
    if not says_none(answer) and contradiction_in(trace, facts_of(trace), answer):
        return True
    tools = set(offered_tools(trace))
    deeds = [*claimed_deeds(answer, tools), *promises(answer)]
    return all(only_looks(call.name) for call in tool_calls(trace)) and any(
        any(acts(tool) and fulfils(tool, deed.verb, by_name=True) for tool in tools) for deed in deeds
    )


@scorer
def no_ungrounded_values(trace: Trace) -> Feedback | None:
    """Pass if each number, date, time, identifier and address in the answer comes from somewhere.

    It comes from the user, a tool's result or arguments, the instructions or an earlier turn (as the model's messages
    show them), or follows from those by plain arithmetic: a sum, difference, product, quotient, percentage, total or
    mean of a list, change of unit, rounding, days, business days or hours later; a sum that the answer writes out, or
    goes on from. Less follows where it would seldom be meant: a rule's number of days is not worked out from prices,
    the day on which something happened not from another day, nor two sums in a row from what a calculating tool gave.

    Cannot see: an invented value that happens to follow from others, which gets likelier the more numbers there are;
    numbers that are spelled out; names; a value that is there but belongs to something else. Round figures ("about
    500") and examples of a form ("such as A-1001") are not held against the answer. Common knowledge that no tool gave
    ("a year has 365 days") is taken for made up.

    Of labelled turns that no rule was written by, 19 with the fault and 438 without: 7 missed, 6 false alarms.
    """
    answer = assistant_text(trace)
    if not answer:
        return None
    unknown, stated = unknown_values(trace, answer)
    if not stated:
        return None
    if unknown:
        listed = ", ".join(dict.fromkeys(f"{each.kind} {each.written}" for each in unknown))
        return Feedback(value=False, rationale=f"No tool, user or earlier turn gave: {listed}")
    return Feedback(value=True, rationale=f"Each of {stated} values in the answer comes from somewhere.")


@scorer
def no_contradicted_result(trace: Trace) -> Feedback | None:
    """Pass if the answer states nothing that a tool's result contradicts.

    Sees: a number, date, time or identifier that comes from nowhere where a result has another one that the answer
    leaves out; a state ("shipped") where the result has one that excludes it ("cancelled"), or a yes where it has a no;
    another number of days than the rule that was looked up; another day for a deed, another amount as the refund,
    another currency; one thing's number said of another; more things than were listed, or none; a deed said to be done
    whose tool failed. In a turn without a call, values and fees are held against the latest results before.

    Cannot see: a value that follows from others by chance, a contradiction in prose, states outside of a list of common
    ones; of results of earlier turns anything but values and fees.

    Of labelled turns that no rule was written by, 15 with the fault and 442 without: 8 missed, 4 false alarms.
    """
    answer = assistant_text(trace)
    facts = facts_of(trace) if tool_calls(trace) else earlier_facts(trace)
    if not answer or not (facts or tool_calls(trace)):
        return None
    problem = contradiction_in(trace, facts, answer)
    if problem:
        return Feedback(value=False, rationale=problem)
    return Feedback(value=True, rationale=f"The answer contradicts none of {len(facts)} values returned.")
