"""What an answer is like in itself: declined, empty, cut short. True is a pass."""

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import scorer

from ._endings import cut_of
from ._help import emptiness_of, refusal_in
from ._trace import assistant_text, has_failed, root_of


@scorer
def no_refusal(trace: Trace) -> Feedback | None:
    """Pass if the answer does not decline what the agent could have done.

    Sees: the usual ways to decline in English ("I can't help with that", "please contact our support team"). What a
    tool decided or could not do, told after the call, is no refusal, nor is asking for what is needed first, declining
    what none of the tools on offer has to do with, or only a part of what was asked. Who declines all of it without a
    look, though the user named a thing that a tool looks up, refuses.

    Cannot see: a refusal without such words ("You could ask your bank."), in another language, or behind an excuse
    that only sounds like a rule.

    Of labelled turns that no rule was written by, 19 with the fault and 438 without: 7 missed, 2 false alarms.
    """
    answer = assistant_text(trace)
    if not answer or not answer.strip():
        return None
    declining, excuse = refusal_in(trace)
    if declining is None:
        return Feedback(value=True, rationale="The answer declines nothing.")
    if excuse:
        return Feedback(value=True, rationale=f"{declining!r} is no refusal: {excuse}.")
    return Feedback(value=False, rationale=f"The answer declines: {declining!r}")


@scorer
def no_empty_answer(trace: Trace) -> Feedback | None:
    """Pass if the answer says something; a run that failed says nothing.

    Sees: no text, marks only, placeholders of programs ("null"), phrases that only keep the talk going ("Great
    question! Let me check that for you."), praise ("What a lovely idea!") or only say sorry where the user wanted or
    objected to something, asking to wait where nothing runs on, and an answer that only notes what the user said.
    "Done." after a tool call says enough, as does a greeting that is greeted back or a smiley for "ok, thanks". Not
    applicable to a run that is paused or shows no output.

    Cannot see: talk that is beside the point, and filler in other words than the usual ones.

    Of labelled turns that no rule was written by, 27 with the fault and 430 without: 19 missed, 4 false alarms.
    """
    answer = assistant_text(trace)
    root = root_of(trace)
    if root is None or (answer is None and root.outputs is None and not has_failed(root)):
        return None
    problem = emptiness_of(trace)
    if problem:
        return Feedback(value=False, rationale=f"The answer is {problem}")
    return Feedback(value=True, rationale=f"The answer has {len((answer or '').split())} words.")


@scorer
def no_truncated_answer(trace: Trace) -> Feedback | None:
    """Pass if the answer is not cut short.

    Sees: a model that says it stopped for length; a last word that cannot end a sentence ("the", "because"), a last
    mark that cannot ("," or ":"), a bracket, quotation or code block left open, a last word or number that is the
    beginning of one that the results or the question hold, a last sentence or point of a list that has no end where the
    others have one, a last point that is empty.

    Cannot see: an answer that was cut between two sentences, or after a word that could have been the last.

    Of labelled turns that no rule was written by, 11 with the fault and 446 without: 2 missed, 0 false alarms.
    """
    answer = assistant_text(trace)
    if not answer or not answer.strip():
        return None
    problem = cut_of(trace)
    if problem:
        return Feedback(value=False, rationale=f"{problem}: {answer.strip()[-60:]!r}")
    return Feedback(value=True, rationale="The answer comes to an end.")
