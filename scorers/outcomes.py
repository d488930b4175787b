"""What came of a conversation: promises, errors, progress. True is a pass; None where there is nothing to judge."""

import re
from collections.abc import Collection

from mlflow.entities import Feedback, Span, Trace
from mlflow.genai.scorers import scorer

from ._asking import asked_again
from ._claims import Deed, claimed_deeds, denies, fulfils, only_looks, promises
from ._help import failing_of, is_alike, working_calls
from ._questions import answered_alike, repeated, rephrased
from ._speech import advises, is_small_talk, questions
from ._trace import (
    assistant_text,
    failure_of,
    has_failed,
    in_order,
    may_pass,
    offered_tools,
    root_of,
    text_leaves,
    tool_rounds,
    user_texts,
)
from ._words import plain, words


@scorer
def no_broken_promise(session: list[Trace]) -> Feedback | None:
    """Pass if a tool call stands behind everything that the assistant says it has done or will do.

    Sees: "I've cancelled it", "your order has been cancelled", "you're booked" without a call up to then that worked
    and whose tool is named for that or at least does more than look; "I'll send it", "a colleague will call you"
    without such a call in the turn or later. What waits for the user ("once you confirm", a question in the same
    answer) and what is done by talking ("I'll explain") promises nothing.

    Cannot see: a promise in other words, one that is kept only in part, and whether the call did what was promised
    with the right arguments.

    Of labelled conversations that no rule was written by, 12 with the fault and 161 without: 3 missed, 2 false alarms.
    """
    broken, has_claimed = _broken(in_order(session))
    if broken:
        place, problem = broken[0]
        return Feedback(value=False, rationale=f"Turn {place + 1}: {problem}")
    return Feedback(value=True, rationale="What was promised was done.") if has_claimed else None


def _broken(turns: list[Trace]) -> tuple[list[tuple[int, str]], bool]:
    """Return the turns with a claim or promise that no call stands behind, and whether there was any at all."""
    calls = [working_calls(trace) for trace in turns]
    broken: list[tuple[int, str]] = []
    told = ""
    has_claimed = False
    for place, trace in enumerate(turns):
        answer, tools = assistant_text(trace) or "", set(offered_tools(trace))
        told += "\n" + "\n".join(text for call in calls[place] for _, text in text_leaves(call.outputs))
        until_now = [call for each in calls[: place + 1] for call in each]
        for deed in claimed_deeds(answer, tools):
            has_claimed = True
            if not _is_done(deed, until_now, told, tools):
                broken.append((place, f"said to be done, but no tool call did it: {deed.text!r}"))
        later = [call for each in calls[place:] for call in each]
        for promise in promises(answer) if not questions(answer) else ():
            has_claimed = True
            if not any(_keeps(call, promise) for call in later):
                broken.append((place, f"promised, but no tool call did it: {promise.text!r}"))
    return broken, has_claimed


def _is_done(deed: Deed, calls: list[Span], told: str, tools: Collection[str]) -> bool:
    named = [call for call in calls if fulfils(call.name, deed.verb, by_name=True)]
    if named:
        return not all(denies(call.outputs, deed.verb) for call in named)
    if deed.is_passive and deed.verb in words(told):
        return True
    if any(fulfils(tool, deed.verb, by_name=True) for tool in tools):
        return False  # there is a tool for it, and it was not called
    return any(fulfils(call.name, deed.verb) and not denies(call.outputs, deed.verb) for call in calls)


def _keeps(call: Span, promise: Deed) -> bool:
    if promise.verb == "later":
        return not only_looks(call.name)
    return fulfils(call.name, promise.verb)


@scorer
def errors_resolved(session: list[Trace]) -> Feedback | None:
    """Pass if nothing that failed in the conversation was left at that; None where nothing failed.

    A tool that failed is settled if a later call of it works; if an answer from then on tells the user what to do, or
    asks at the end how to go on; or if it explains why what was asked cannot be done (not: that something broke). A run
    that failed is settled if a later one is answered.

    Cannot see: whether the later call was for the same purpose, whether the advice is any good, a failure that the tool
    reported as an ordinary result.

    Of labelled conversations that no rule was written by, 12 with the fault and 161 without: 1 missed, 1 false alarm.
    """
    turns = in_order(session)
    again, _ = asked_again(turns)
    open_errors: dict[str, str] = {}
    has_failed_once = False
    for place, trace in enumerate(turns):
        for calls in tool_rounds(trace):
            worked = {call.name for call in calls if failure_of(call) is None}
            failed = {call.name: reason for call in calls if (reason := failure_of(call)) is not None}
            # Calls made at once are no second attempts of one another.
            open_errors = {name: reason for name, reason in open_errors.items() if name not in worked} | failed
            has_failed_once = has_failed_once or bool(failed)
        root = root_of(trace)
        if root is not None and has_failed(root):
            has_failed_once = True
            open_errors[_RUN] = "no answer"
        elif answer := assistant_text(trace):
            open_errors.pop(_RUN, None)
            open_errors = {name: why for name, why in open_errors.items() if not _is_explained(name, why, answer)}
            asks = questions(answer) and place == len(turns) - 1 and not again
            if advises(answer) or asks:
                open_errors.clear()
    if not has_failed_once:
        return None
    if open_errors:
        listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(open_errors.items()))
        return Feedback(value=False, rationale=f"Failed, and left at that: {listed}")
    return Feedback(value=True, rationale="What failed was settled.")


_RUN = "the run"
_OF_ERRORS = frozenset({"whil", "erro", "fail", "inpu", "inva", "vali", "numb", "valu", "requ", "tool", "prob", "curr"})


def _is_explained(tool: str, reason: str, answer: str) -> bool:
    """Return whether the answer gives the reason, and it lies in what was asked for and not in a service."""
    if may_pass(reason) or any(claimed_deeds(answer, ["book_or_send"])):
        return False
    # "division" and "divide" have their beginning in common.
    common = {word[:4] for word in words(reason.replace(f"tool {tool}", ""))} & {word[:4] for word in words(answer)}
    return len(common - _OF_ERRORS) > 1


@scorer
def makes_progress(session: list[Trace]) -> Feedback | None:
    """Pass unless the conversation ends after two turns or more in which the user got no nearer to what they want.

    A turn gets nowhere if its answer declines, says nothing, repeats an earlier one, ignores what the tools returned,
    leaves an error at that, asks for what it has, claims what no tool did, or if the user has to ask again. Small talk
    counts for neither; what the tools answer begins the count anew.

    Cannot see: answers that are to the point but wrong, or that help with something else than what was asked.

    Of labelled conversations that no rule was written by, 26 with the fault and 147 without: 12 missed, 9 false alarms.
    """
    turns = [trace for trace in in_order(session) if user_texts(trace)]
    if len(turns) < 2:
        return None
    again = {id(before) for before, _ in rephrased(turns)} | {id(before) for *_, before in repeated(turns)}
    asked = {place for place, _ in asked_again(turns)[0]}
    broken = {place for place, _ in _broken(turns)[0]}
    stalled: list[str] = []
    for place, trace in enumerate(turns):
        if place and place not in asked and all(is_small_talk(text) for text in user_texts(trace)):
            continue
        reason = _stall(trace, turns[:place]) or ("had to ask again" if id(trace) in again else None)
        reason = reason or ("asked for what it had" if place in asked else None)
        if not reason and any(answered_alike(turn, trace) for turn in turns[:place] if id(turn) in again):
            reason = "the same as before"
        if not reason and place in broken and not _is_content(turns[place + 1 : place + 2]):
            reason = "only said to be done"
        if reason:
            stalled.append(f"{place + 1} ({reason})")
        elif working_calls(trace) or not offered_tools(trace):
            stalled = []
    if len(stalled) > 1:
        return Feedback(value=False, rationale=f"These turns brought the user nothing: {', '.join(stalled)}")
    return Feedback(value=True, rationale=f"{len(turns)} turns got somewhere.")


_TROUBLE = re.compile(
    r"(?<!no )(?<!any )\b(?:failed|error|problem|trouble|issue|went wrong|not work|didn't work|unsuccessful"
    r"|could not|couldn't)\b"
)


def _is_content(following: list[Trace]) -> bool:
    """Return whether the user's next message sounds content."""
    texts = [plain(text) for trace in following for text in user_texts(trace)]
    return any(
        re.search(r"\b(?:thanks?|thx|great|cool|perfect|amazing|nice|good|lovely|super)\b", text) for text in texts
    )


def _stall(trace: Trace, before: list[Trace]) -> str | None:
    """Return why the turn got the user no nearer to what they want, None if it did."""
    if reason := failing_of(trace):
        return reason
    answer = assistant_text(trace) or ""
    if working_calls(trace):
        return None
    if _TROUBLE.search(plain(answer)) and not advises(answer) and not questions(answer):
        return "an error"
    if any(is_alike(answer, earlier) for turn in before if (earlier := assistant_text(turn))):
        return "said before"
    return None
