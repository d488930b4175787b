"""How the user fared in a conversation, by what was said. True is a pass; None where there is nothing to judge.

They go by wording, in English: no language model is asked. What they cannot see is said in each docstring.
"""

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import scorer

from ._asking import asked_again
from ._moods import frustration, may_be_frustrated
from ._questions import repeated, rephrased
from ._setbacks import Setbacks
from ._turns import turns_of, with_user


@scorer
def no_repeated_question(session: list[Trace]) -> Feedback | None:
    """Pass if the user never had to ask (nearly) the same question or make the same request again.

    Two questions are the same if one has all the words of the other and little more, spelling errors and filler aside;
    more may be added where the answer before did not help. A question with another number, date, code or other word is
    a different one, as is one for "another" or "more", and one that tools have answered: the user has a reason of their
    own. Asking again because a run failed counts. Messages of a single meaningful word ("thanks", "help") do not.

    So does a third time that found nothing new, and a message copied whole into a later one.

    Cannot see: a repetition in quite different words, or one that leaves out the number named the first time; a good
    answer from no tool, after which the user asks again for fun.

    Of labelled conversations that no rule was written by, 18 with the fault and 183 without: 5 missed, 0 false alarms.
    """
    turns = with_user(session)
    if len(turns) < 2:
        return None
    for before, text, _ in repeated(turns):
        return Feedback(value=False, rationale=f"Asked again: {before.strip()!r}, then {text.strip()!r}")
    return Feedback(value=True, rationale=f"No question came twice in {len(turns)} turns.")


@scorer
def no_rephrased_question(session: list[Trace]) -> Feedback | None:
    """Pass if the user never had to ask the same thing in other words because the answer did not help.

    Two messages ask the same if they share words that carry meaning or values, the second has no value of its own, and
    the answer between them did not help: the run failed, the answer declined, said nothing, or drew on no tool's
    result. "I asked", "that's not what I asked", "yes or no" right after the answer make less do, and so does a short
    message that comes back to a part of the question of which the answer said nothing. So do two messages that were
    answered alike from the same tool call.

    Cannot see: a question put in entirely other words, or an answer that is to the point but wrong. A repetition in
    the same words is another scorer's matter, as is a user who corrects a mistake of their own.

    Of labelled conversations that no rule was written by, 13 with the fault and 188 without: 8 missed, 4 false alarms.
    """
    turns = with_user(session)
    if len(turns) < 2:
        return None
    for before, after in rephrased(turns):
        first, second = (" ".join(turn.texts).strip() for turn in (before, after))
        return Feedback(value=False, rationale=f"Asked in other words: {first!r}, then {second!r}")
    return Feedback(value=True, rationale=f"No question came back in other words in {len(turns)} turns.")


@scorer
def no_information_asked_twice(session: list[Trace]) -> Feedback | None:
    """Pass if the assistant never asked for a piece of information that it was given or had asked for before.

    Knows order and other reference numbers, e-mail, phone, card, names, ages, addresses, dates, times, quantities and a
    few more by their English names. Given is what answered an earlier request, and what the user gave unasked where
    its form tells: an e-mail, a phone, card or order number, "Jo Bloggs, 34", a day, a percentage. Also sees the same
    question put again after the user has answered it, a question for what the user had named together with a number
    ("how many nights?" after "2 nights"), and, by the user's reply, a question that was needless: it says that it was
    said ("as above"), or consists of what the user had said before and the answer did not offer. Asking again is right
    when the assistant says that what it got did not work, asks for a further or another person's one, or the user has
    turned to another order or had not answered.

    Cannot see: requests in other words ("who am I talking to?"), or whether an answer fits a request that asked for
    several things at once, unless its form tells (a number, a date).

    Of labelled conversations that no rule was written by, 14 with the fault and 187 without: 5 missed, 1 false alarm.
    """
    again, has_asked = asked_again(turns_of(session))
    if again:
        place, what = again[0]
        return Feedback(value=False, rationale=f"Turn {place + 1} asks again: {what}")
    return Feedback(value=True, rationale="Nothing was asked for twice.") if has_asked else None


@scorer
def no_frustration(session: list[Trace]) -> Feedback | None:
    """Pass if the user shows no sign of frustration with the service.

    Sees: angry words, reproaches and reminders ("you're not listening", "for the third time"), shouting. After a turn
    that brought nothing, or asked for what it had been told, also milder ones ("just tell me", "it's in my message"),
    sighs, marks such as "??", "!!", "....." and words in capitals.

    Cannot see: irony, resignation without such words, anger in other languages. Anger at something else ("my landlord")
    is told apart only where the message sounds glad as well.

    Of labelled conversations that no rule was written by, 33 with the fault and 168 without: 15 missed, 1 false alarm.
    """
    turns = with_user(session)
    if not turns:
        return None
    vain = Setbacks(turns)
    for place, turn in enumerate(turns):
        if may_be_frustrated(turn) and (sign := frustration(turns, place, vain)):
            return Feedback(value=False, rationale=f"Sounds frustrated ({sign}): {turn.text.strip()!r}")
    return Feedback(value=True, rationale=f"No sign of frustration in {len(turns)} turns.")
