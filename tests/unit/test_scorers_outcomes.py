"""The scorers of what came of a conversation: promises, errors, progress."""

import pytest


@pytest.fixture
def value(traces, shipped_scorers):
    """Score one session: `value(name, (user, answer, *rounds), ...)`, or `value.of(name, traces)`; None: not judged."""
    module = shipped_scorers("outcomes")

    def score_session(name, session):
        # Newest first: no scorer may rely on the order in which it gets the traces.
        feedback = getattr(module, name).run(session=session[::-1])
        assert feedback is None or (feedback.name == name and feedback.rationale)
        return None if feedback is None else feedback.value

    def score(name, *turns):
        return score_session(name, traces.conversation(*turns))

    score.of = score_session
    return score


class TestErrorsResolved:
    @pytest.fixture
    def outcomes(self, traces, value):
        """Score a conversation with one turn a call; "pay!" is a call of `pay` that failed."""

        def score(*calls):
            made = [traces.Call(c.rstrip("!"), {}, "x", error="boom" if c.endswith("!") else None) for c in calls]
            return value("errors_resolved", *(("q", "a", call) for call in made))

        return score

    @pytest.mark.parametrize("calls", [["pay!", "pay"], ["pay!", "search", "pay!", "pay"], ["a!", "b!", "b", "a"]])
    def test_resolved(self, outcomes, calls):
        """Each tool that failed worked later."""
        assert outcomes(*calls) is True

    @pytest.mark.parametrize("calls", [["pay!"], ["pay!", "search"], ["pay", "pay!"], ["pay!", "pay", "pay!"]])
    def test_open(self, outcomes, calls):
        """A tool whose last call failed leaves the error open, whatever other tools did."""
        assert outcomes(*calls) is False

    def test_no_error(self, outcomes):
        """Without an error there is nothing to resolve."""
        assert outcomes("pay", "search") is None

    def test_retry_within_a_turn(self, traces, value):
        """A retry that worked in the same turn resolves the error."""
        calls = [traces.Call("pay", {}, "failed", error="timeout"), traces.Call("pay", {}, "paid")]
        assert value("errors_resolved", ("q", "a", *calls)) is True

    @pytest.mark.parametrize(
        "answer",
        [
            "That failed. Please try again in an hour.",
            "It broke. You can call us instead.",
            "It broke. Which day suits you?",
        ],
    )
    def test_told_what_to_do(self, traces, value, answer):
        """An error is settled when the user is told what to do, or is asked at the end how to go on."""
        call = traces.Call("pay", {}, "x", error="timeout")
        assert value("errors_resolved", ("pay it", answer, call)) is True
        assert value("errors_resolved", ("pay it", "That failed, sorry.", call)) is False

    def test_explained(self, traces, value):
        """A reason that lies in what was asked settles it; that a service is down does not."""
        unknown = traces.Call("find_patient", {"id": 7}, "x", error="no patient has the id 7")
        assert value("errors_resolved", ("who is 7", "No patient has that id.", unknown)) is True
        down = traces.Call("find_patient", {"id": 7}, "x", error="the register does not answer")
        assert value("errors_resolved", ("who is 7", "The register does not answer.", down)) is False

    def test_run_that_failed(self, value):
        """A run that failed is settled by a later one that is answered."""
        assert value("errors_resolved", ("hi", None), ("hi", "Hello!")) is True
        assert value("errors_resolved", ("hi", "Hello!"), ("when do you open", None)) is False


class TestNoBrokenPromise:
    @pytest.fixture
    def keeps(self, traces, value):
        """Score one answer, after the given calls, of an agent that can look up, book and send."""
        tools = [traces.tool(name) for name in ("find_patient", "book_visit", "send_letter")]

        def score(answer, *calls):
            made = [traces.Call(name, {}, "ok") for name in calls]
            session = [traces.trace("please", answer, *made, tools=tools)]
            return value.of("no_broken_promise", session)

        return score

    @pytest.mark.parametrize(
        "answer",
        [
            "I've booked your visit for Monday.",
            "Your visit has been booked.",
            "I'll send you the letter right away.",
            "Someone from our team will call you back.",
            "I have updated your address.",
            "Booked for Monday!",
        ],
    )
    def test_broken(self, keeps, answer):
        """What is said to be done, or promised, without a call that does it, fails; looking it up does nothing."""
        assert keeps(answer) is False
        assert keeps(answer, "find_patient") is False

    @pytest.mark.parametrize(
        ("answer", "call"),
        [
            ("I've booked your visit for Monday.", "book_visit"),
            ("Your appointment has been scheduled.", "book_visit"),
            ("I'll send you the letter right away.", "send_letter"),
            ("I've checked: you are in our list.", "find_patient"),
        ],
    )
    def test_kept(self, keeps, answer, call):
        """A call of the tool that is named for it, or alike, keeps the promise."""
        assert keeps(answer, call) is True

    @pytest.mark.parametrize(
        "answer",
        [
            "Once you confirm, I'll book it.",
            "I'll explain: the visit takes an hour.",
            "Shall I book it? Then I will send the letter as well.",
            "I haven't booked anything yet.",
            "Visits are booked by phone as well.",
            "If it has been cancelled, you get a letter.",
        ],
    )
    def test_no_promise(self, keeps, answer):
        """Conditions, questions, denials, general statements and what is done by talking promise nothing."""
        assert keeps(answer) is not False


class TestMakesProgress:
    def test_standstill(self, value):
        """Turns that decline, repeat themselves or say nothing bring the user nothing."""
        turns = [("where is my parcel", "I'm sorry."), ("and?", "One moment please."), ("so where is it", "I'm sorry.")]
        assert value("makes_progress", *turns) is False

    def test_repeated_answer(self, traces, value):
        """The same error told twice gets nobody anywhere; a tool that works in the end does."""
        failed = traces.Call("track", {"id": 5}, "x", error="timeout")
        turns = [("where is 5", "Something went wrong.", failed), ("where is 5", "Something went wrong.", failed)]
        assert value("makes_progress", *turns) is False
        worked = traces.Call("track", {"id": 5}, {"place": "Leeds"})
        assert value("makes_progress", *turns, ("where is 5", "It is in Leeds.", worked)) is True

    def test_false_promise(self, traces, value):
        """A deed that no tool did brings nothing once the user comes back about it in vain."""
        tools = [traces.tool("send_letter")]

        def session(*lines):
            return [traces.trace(*line, tools=tools, index=place) for place, line in enumerate(lines)]

        first = ("please send the letter", "I've sent it.")
        assert value.of("makes_progress", session(first, ("nothing came", "I've sent it once more."))) is False
        assert value.of("makes_progress", session(first, ("great, thanks!", "You're welcome!"))) is True

    def test_needless_questions(self, traces, value):
        """Questions for what was said bring nothing; a tool that answers in the end makes up for them."""
        turns = [
            ("Is room 214 free on 3 June?", "Which room do you mean?"),
            ("214, as I wrote", "And on which day?"),
            ("3 June!! it's in my message", "I see."),
        ]
        assert value("makes_progress", *turns) is False
        call = traces.Call("is_free", {"room": 214}, {"free_from": "12:30"})
        assert value("makes_progress", *turns[:2], ("3 June", "It is free from 12:30.", call)) is True

    def test_progress(self, value):
        """Questions that get the user on, answers and small talk are progress; one turn is not judged."""
        turns = [
            ("a table", "For how many?"),
            ("four", "On which day?"),
            ("monday", "Noted, Monday for four."),
            ("bye", "Bye!"),
        ]
        assert value("makes_progress", *turns) is True
        assert value("makes_progress", turns[0]) is None
