"""What came of a conversation: promises, errors, progress. True is a pass; None where there is nothing to judge."""

import re
from collections.abc import Collection

from mlflow.entities import Feedback, Span, Trace
from mlflow.genai.scorers import scorer

from ._asking import asked_again
from ._claims import Deed, claimed_deeds, denies, fulfils, only_looks, promises
from ._moods import frustration, may_be_frustrated, sounds_glad
from ._setbacks import Setbacks, explains
from ._speech import advises, is_small_talk
from ._trace import failure_of, has_failed, root_of, text_leaves, tool_rounds
from ._turns import Turn, turns_of, with_user
from ._words import plain, stem, words


@scorer
def no_broken_promise(session: list[Trace]) -> Feedback | None:
    """Pass if a tool call stands behind everything that the assistant says it has done or will do.

    Sees: "I've cancelled it", "your order has been cancelled", "you're booked" without a call up to then that worked
    and whose tool is named for that or at least does more than look; "I'll send it", "a colleague will call you"
    without such a call in the turn or later. What waits for the user ("once you confirm", a question in the same
    answer) and what is done by talking ("I'll explain") promises nothing.

    Cannot see: a promise in other words, one that is kept only in part, and whether the call did what was promised
    with the right arguments.

    Of labelled conversations that no rule was written by, 13 with the fault and 188 without: 3 missed, 2 false alarms.
    """
    broken, has_claimed = _broken(turns_of(session))
    if broken:
        place, problem = broken[0]
        return Feedback(value=False, rationale=f"Turn {place + 1}: {problem}")
    return Feedback(value=True, rationale="What was promised was done.") if has_claimed else None


def _broken(turns: list[Turn]) -> tuple[list[tuple[int, str]], bool]:
    """Return the turns with a claim or promise that no call stands behind, and whether there was any at all."""
    calls = [turn.working for turn in turns]
    broken: list[tuple[int, str]] = []
    told = ""
    has_claimed = False
    for place, turn in enumerate(turns):
        answer, tools = (turn.answer or "").replace("e-mail", "email"), turn.tools
        told += "\n" + "\n".join(text for call in calls[place] for _, text in text_leaves(call.outputs))
        until_now = [call for each in calls[: place + 1] for call in each]
        for deed in claimed_deeds(answer, tools):
            if deed.verb in _MISHAPS:
                continue
            has_claimed = True
            if not _is_done(deed, until_now, told, tools):
                broken.append((place, f"said to be done, but no tool call did it: {deed.text!r}"))
        later = [call for each in calls[place:] for call in each]
        for promise in promises(answer) if not turn.questions else ():
            if re.search(rf"{_IF_YOU_DO}\b[^.!?]* and {re.escape(promise.text)}", plain(answer)):
                continue
            has_claimed = True
            if not any(_keeps(call, promise) for call in later):
                broken.append((place, f"promised, but no tool call did it: {promise.text!r}"))
    return broken, has_claimed


# What befell the assistant, or is said in play: nobody does it with a tool.
_MISHAPS = frozenset(stem(word) for word in ("mixed", "passed", "failed", "mistyped", "swapped"))
# "Write to me tomorrow and I'll look" waits for the user as much as "if you write to me".
_IF_YOU_DO = r"(?:^|[.!?,] |\bjust |\bplease )(?:write|tell|send|give|ask|call|come|say|share|drop|reply)"


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

    Of labelled conversations that no rule was written by, 11 with the fault and 190 without: 1 missed, 0 false alarms.
    """
    turns = turns_of(session)
    again, _ = asked_again(turns)
    open_errors: dict[str, str] = {}
    has_failed_once = False
    for place, turn in enumerate(turns):
        for calls in tool_rounds(turn.trace):
            worked = {call.name for call in calls if failure_of(call) is None}
            failed = {call.name: reason for call in calls if (reason := failure_of(call)) is not None}
            # Calls made at once are no second attempts of one another.
            open_errors = {name: reason for name, reason in open_errors.items() if name not in worked} | failed
            has_failed_once = has_failed_once or bool(failed)
        root = root_of(turn.trace)
        if root is not None and has_failed(root):
            has_failed_once = True
            open_errors[_RUN] = "no answer"
        elif answer := turn.answer:
            open_errors.pop(_RUN, None)
            open_errors = {name: why for name, why in open_errors.items() if not _is_explained(name, why, answer)}
            asks = turn.questions and place == len(turns) - 1 and not again
            if advises(answer) or asks:
                open_errors.clear()
    if not has_failed_once:
        return None
    if open_errors:
        listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(open_errors.items()))
        return Feedback(value=False, rationale=f"Failed, and left at that: {listed}")
    return Feedback(value=True, rationale="What failed was settled.")


_RUN = "the run"


def _is_explained(tool: str, reason: str, answer: str) -> bool:
    """Return whether the answer gives the reason, and claims no deed instead."""
    return not any(claimed_deeds(answer, ["book_or_send"])) and explains(answer, reason.replace(f"tool {tool}", ""))


@scorer
def makes_progress(session: list[Trace]) -> Feedback | None:
    """Pass unless the conversation ends after two turns or more in which the user got no nearer to what they want.

    A turn gets nowhere if its answer declines, says nothing, repeats an earlier one, ignores what the tools returned,
    leaves an error at that, asks for what it has, or if the user has to ask again or complains of it; if it claims what
    no tool did, once the user comes back about it. Small talk counts for neither; what the tools answer begins the
    count anew.

    Cannot see: answers that are to the point but wrong, or that help with something else than what was asked.

    Of labelled conversations that no rule was written by, 32 with the fault and 169 without: 18 missed, 1 false alarm.
    """
    turns = with_user(session)
    if len(turns) < 2:
        return None
    setbacks = Setbacks(turns)
    broken = {place for place, _ in _broken(turns)[0]}
    stalled: list[str] = []
    # From the end on: what lies before a turn that tools have answered is made good.
    for place in reversed(range(len(turns))):
        turn = turns[place]
        reason = setbacks.reason(place)
        if place and reason != "asked for what it had" and _wants_nothing(turn):
            continue
        if not reason and _is_broken_in_vain(turns, place, broken):
            reason = "only said to be done"
        if not reason and _is_complained_of(turns, place, setbacks):
            reason = "the user complains"
        if reason:
            stalled.insert(0, f"{place + 1} ({reason})")
        elif turn.working or not turn.tools:
            break
    if len(stalled) > 1:
        return Feedback(value=False, rationale=f"These turns brought the user nothing: {', '.join(stalled)}")
    return Feedback(value=True, rationale=f"{len(turns)} turns got somewhere.")


_NODS = re.compile(
    r"(?:i know|will do|makes sense|thought so|all good|got it|i see|good to know|fine by me)\b[^?]*|[^\w?]*"
)


def _wants_nothing(turn: Turn) -> bool:
    """Return whether the user only greets, thanks, or takes note."""
    if "?" in turn.text:
        return not turn.wants
    return all(is_small_talk(text) for text in turn.texts) or bool(_NODS.fullmatch(turn.spoken) and not turn.wants)


_IN_VAIN = re.compile(r"\b(?:not|no|nothing|never|nobody|none|still|again|really|yet|where|when)\b|n't\b|\?")


def _is_complained_of(turns: list[Turn], place: int, setbacks: Setbacks) -> bool:
    """Return whether the user's next message sounds frustrated, and tools had not served them."""
    if place + 1 == len(turns) or not may_be_frustrated(turns[place + 1]) or turns[place].has_served:
        return False
    return frustration(turns, place + 1, setbacks) is not None


def _is_broken_in_vain(turns: list[Turn], place: int, broken: Collection[int]) -> bool:
    """Return whether the user came back about what was only said to be done, or had before and was told so again."""
    if place not in broken:
        return False
    return _come_back(turns[place + 1 : place + 2]) or (place > 0 and _is_broken_in_vain(turns, place - 1, broken))


def _come_back(following: list[Turn]) -> bool:
    """Return whether the user comes back about what was said to be done."""
    return any(
        _IN_VAIN.search(turn.spoken) and not sounds_glad(turn.spoken) and not is_small_talk(turn.text)
        for turn in following
    )
