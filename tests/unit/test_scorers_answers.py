"""The scorers of one turn's answer, in itself and beside the results: what they flag, and what they leave alone."""

import pytest

NUMBER = {"type": "number"}
TEXT = {"type": "string"}


@pytest.fixture
def value(traces, shipped_scorers):
    """Score one turn: `value(name, user, answer, *rounds, tools=...)` is True, False or None."""
    modules = [shipped_scorers(stem) for stem in ("answers", "results", "tool_calls")]

    def score(name, *turn, **options):
        scorer = next(getattr(module, name) for module in modules if hasattr(module, name))
        feedback = scorer.run(trace=traces.trace(*turn, **options))
        assert feedback is None or (feedback.name == name and feedback.rationale)
        return None if feedback is None else feedback.value

    return score


class TestNoUngroundedValues:
    @pytest.fixture
    def grounded(self, traces, value):
        """Score one answer after one result."""

        def score(answer, result=None, user="Tell me, please.", arguments=None):
            calls = [] if result is None else [traces.Call("lookup", arguments or {}, result)]
            return value("no_ungrounded_values", user, answer, *calls)

        return score

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            ({"price": 36.0}, "It is 36.00 euros."),
            ({"price": 80, "off": 15}, "With 15% off that is 68."),
            ([{"fee": 12.5}, {"fee": 20}, {"fee": 7.5}], "Together the fees are 40.00, 13.33 on average."),
            ({"minutes": 150}, "It takes 2.5 hours."),
            ({"minutes": 95}, "It takes 1 h 35 min."),
            ({"visit": "2026-03-05"}, "Your visit is on 5 March."),
            ({"visit": "2026-03-05", "weeks": 2}, "The check-up is on 19 March 2026."),
            ({"opens": "08:30", "wait_minutes": 45}, "Come at 9:15 am."),
            ({"card": "4556-0000-1111-2233"}, "The card ends in 2233."),
            ([{"name": "a"}, {"name": "b"}, {"name": "c"}], "I found 3 of them."),
            ({"won": 12, "played": 48}, "You won 25% of them."),
            ({"total": 1187}, "That is 1187, so roughly 1200."),
            ({"phone": "+44 20 7946 0018"}, "Call +44 (20) 7946-0018."),
            ({"opens": "18:38"}, "It opens at 18h38."),
            ({"adult": 42.0, "child": 38.5, "room": 88, "taxi": 19, "guide": 61}, "3 x (42 + 38.50) = 241.50."),
            ({"sent": "2026-03-05", "rule": "It takes 5 business days."}, "It is there by 12 March."),
        ],
    )
    def test_derived(self, grounded, result, answer):
        """What follows from a result by plain arithmetic, or is written in another way, comes from somewhere."""
        assert grounded(answer, result) is True

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            ({"price": 36.0}, "It is 36.00 euros, and 4.17 of it tax."),
            ({"visit": "2026-03-05"}, "Your visit is on 17 April."),
            ({"room": "B-204"}, "Go to room C-318."),
            ({"name": "Dr Weiss"}, "Call Dr Weiss on +44 20 7946 0018."),
            ({"opens": "08:30"}, "They close at 18:45."),
            ({"mail": "<EMAIL:k3f9>"}, "Write to desk@example.com."),
        ],
    )
    def test_made_up(self, grounded, result, answer):
        """A number, date, time, identifier, telephone number or address from nowhere fails."""
        assert grounded(answer, result) is False

    @pytest.mark.parametrize(
        "answer",
        ["Open 24/7!", "In step 2, tap on it.", "Ids look like AB-1234.", "Use a form such as 2026-01-31."],
    )
    def test_no_claim(self, grounded, answer):
        """What counts a part of the text, or shows a form, claims nothing."""
        assert grounded(answer, {"x": "y"}) is not False

    def test_little_follows_where_it_is_not_meant(self, grounded):
        """A rule's days are not worked out from other numbers, a sum is not rounded, a past day is no sum."""
        rules = "Report it within 7 days. A pick-up costs 4.95."
        assert grounded("You have 14 days to report it.", [{"page_content": rules}]) is False
        assert grounded("You have 168 hours to report it.", [{"page_content": rules}]) is True
        assert grounded("Together it is 72.", {"one": 75.7, "other": 3.785}) is False
        assert grounded("It was picked up on 14 March.", {"booked": "2026-03-06", "days": 8}) is False
        assert grounded("It comes to about 9.30.", {"amount": 1500}) is False

    def test_user_and_nothing_stated(self, grounded):
        """What the user gave is known; an answer without values is not judged."""
        assert grounded("I have noted 17:45 for 6 people.", user="A table for 6 at 17:45") is True
        assert grounded("All good.") is None


class TestNoContradictedResult:
    @pytest.fixture
    def agrees(self, traces, value):
        """Score one answer after one call."""

        def score(answer, result=None, name="lookup", error=None):
            call = traces.Call(name, {}, result, error=error)
            return value("no_contradicted_result", "Tell me, please.", answer, call, tools=[traces.tool(name)])

        return score

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            (36.0, "That makes 39.5."),
            ({"total": 49.9, "currency": "EUR"}, "The total is 59.35 EUR."),
            ({"status": "cancelled"}, "Good news: it was delivered."),
            ({"decision": "rejected"}, "Your application is approved."),
            ({"in_stock": False}, "Yes, it is in stock."),
            ({"fee_eur": 12.0}, "There is no fee."),
            ([{"id": "a", "price": 30}, {"id": "b", "price": 20}], "The cheapest one costs 30."),
            ({"delay_minutes": 12}, "It is on time."),
            ({"renewed": True}, "It hasn't been renewed yet."),
            ({"collected": "2026-03-06", "days": 8}, "It was collected on 14 March."),
            ({"paid": 118.0, "fee": 23.6, "refund": 94.4}, "You get the 118 back."),
            ({"price": 64.5, "currency": "USD"}, "It costs 64.50 euros."),
            ([{"name": "Elm House", "rent": 940}, {"name": "Oak House", "rent": 720}], "Elm House costs 720."),
            ([{"page_content": "Report a leak within 7 days of moving in."}], "Report a leak within 14 days."),
            ([{"seat": "12 aisle"}], "You have a window seat."),
        ],
    )
    def test_contradiction(self, agrees, result, answer):
        """Another value, an opposite state, a fee denied, or the wrong extreme fails."""
        assert agrees(answer, result) is False

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            (36.0, "That makes 36."),
            ({"status": "processing"}, "Once it has shipped it takes a while."),
            ({"status": "shipped"}, "It is on its way and will be delivered soon."),
            ({"decision": "rejected"}, "It was not approved, I am sorry."),
            ({"in_stock": False}, "It is not in stock."),
            ({"fee_eur": 0}, "There is no fee."),
            ([{"id": "a", "price": 30}, {"id": "b", "price": 20}], "The cheapest one costs 20, the other 30."),
            ([{"status": "shipped"}, {"status": "cancelled"}], "One is shipped, the other cancelled."),
            ({"delay_minutes": 12}, "It is 12 minutes late."),
            ({"renewed": False}, "It hasn't been renewed yet."),
            ({"collected": "2026-03-06"}, "It was collected on 6 March."),
            ({"paid": 118.0, "fee": 23.6, "refund": 94.4}, "Of 118 you get 94.40 back."),
            ([{"name": "Elm House", "rent": 940}, {"name": "Oak House", "rent": 720}], "Elm House costs 940."),
            ({"refunded": False}, "We can offer a refund."),
        ],
    )
    def test_agreement(self, agrees, result, answer):
        """The same value or state, one that is yet to come, and a denial of the opposite pass."""
        assert agrees(answer, result) is True

    def test_lists(self, traces, value):
        """The answer counts more than were listed, or says that there are none."""
        tools = [traces.tool("find_flats", town=TEXT)]
        found = traces.Call("find_flats", {"town": "Ghent"}, {"flats": [{"flat": "F-12"}, {"flat": "F-15"}]})

        def agrees(answer):
            return value("no_contradicted_result", "Any flats in Ghent?", answer, found, tools=tools)

        assert agrees("There are 3 flats.") is False
        assert agrees("Sorry, there are no flats available in Ghent.") is False
        assert agrees("There are no flats with a garden in Ghent.") is True
        assert agrees("There are 2 flats.") is True

    def test_deed_that_failed(self, agrees):
        """A deed that the tool refused, or failed at, is not done."""
        assert agrees("I've cancelled your visit.", error="timeout", name="cancel_visit") is False
        assert agrees("I've cancelled your visit.", {"decision": "refused"}, name="cancel_visit") is False
        assert agrees("I couldn't cancel your visit.", error="timeout", name="cancel_visit") is True
        assert agrees("I've cancelled your visit.", {"state": "cancelled"}, name="cancel_visit") is True


class TestNoRefusal:
    @pytest.fixture
    def willing(self, traces, value):
        """Score an answer of an agent that can book visits, list invoices, and add numbers."""
        tools = [
            traces.tool("book_visit", day=TEXT),
            traces.tool("list_invoices", patient=TEXT),
            traces.tool("add", a=NUMBER, b=NUMBER),
        ]
        return lambda user, answer, *calls: value("no_refusal", user, answer, *calls, tools=tools)

    @pytest.mark.parametrize(
        ("user", "answer"),
        [
            ("Book a visit on Monday", "I'm sorry, I can't book visits."),
            ("Book a visit on Monday", "I can't help with that."),
            ("I need a visit on 3 May", "Unfortunately I'm not able to schedule visits for you."),
            ("List my invoices", "For privacy reasons, I cannot show invoices."),
            ("12 + 30?", "As an assistant I am unable to do arithmetic."),
            ("How much is half of a third?", "I can't work with fractions."),
        ],
    )
    def test_refusal(self, willing, user, answer):
        """Declining what a tool on offer does fails."""
        assert willing(user, answer) is False

    @pytest.mark.parametrize(
        ("user", "answer"),
        [
            ("Write me a poem", "I can't write poems, I'm afraid."),
            ("Book a visit", "I can't book it until you tell me the day."),
            ("Can you see my invoice?", "I couldn't find any invoice under that name."),
            ("Book a visit", "You can't go wrong with Monday. Shall I book it?"),
            ("Is it going to hurt?", "I can't promise that it won't."),
            ("Book a visit", "Booked for Monday."),
            ("Plot 3x + 2", "Drawing isn't something I can do, but I can work out points of it."),
        ],
    )
    def test_no_refusal(self, willing, user, answer):
        """Declining what no tool does, asking first, finding nothing and promising nothing are no refusals."""
        assert willing(user, answer) is True

    def test_nothing_looked_up(self, traces, value):
        """Declining everything about a thing that the user named, and a tool looks up, fails."""
        tools = [traces.tool("get_parcel", parcel_id=TEXT)]
        answer = "I'm sorry, but I can't share that."
        assert value("no_refusal", "Who sent P-1044?", answer, tools=tools) is False

    def test_decision_of_a_tool(self, traces, willing):
        """What a tool has decided or failed at is told, not refused."""
        refused = traces.Call("book_visit", {"day": "Sunday"}, {"booked": False, "why": "closed on Sundays"})
        assert willing("Book a visit on Sunday", "I can't book it, we're closed on Sundays.", refused) is True
        failed = traces.Call("book_visit", {"day": "Sunday"}, "Error", error="timeout")
        assert willing("Book a visit", "I can't book it right now, please try later.", failed) is True


class TestNoEmptyAnswer:
    @pytest.mark.parametrize(
        "answer",
        [
            "",
            "  \n",
            "...",
            "null",
            "Sure!",
            "Great question!",
            "Let me check that for you. One moment please.",
            "I'm sorry.",
            "What a great question to ask!",
            "I hope you have a nice day!",
        ],
    )
    def test_nothing_said(self, value, answer):
        """No text, marks, a program's placeholder and mere filler say nothing."""
        assert value("no_empty_answer", "When do you open?", answer) is False

    @pytest.mark.parametrize(
        ("user", "answer"),
        [
            ("When do you open?", "At nine."),
            ("Are you open?", "Yes."),
            ("Hello", "Hello! How can I help you?"),
            ("Thanks!", "You're welcome!"),
            ("ok", "\U0001f44d"),
            ("What is 6 * 7?", "42"),
            ("I'd like a table", "Sure! For how many people?"),
        ],
    )
    def test_something_said(self, value, user, answer):
        """Short answers, greetings greeted back and questions say something."""
        assert value("no_empty_answer", user, answer) is True

    def test_waiting(self, value):
        """To be told to wait says nothing, whatever was said before: nothing runs on between two messages."""
        assert value("no_empty_answer", "ok", "Just a moment, I'm working on it.") is False

    def test_action_reported(self, traces, value):
        """A bare "Done" is enough after an action."""
        assert value("no_empty_answer", "Please close it", "Done!", traces.Call("close", {}, "ok")) is True

    def test_run_that_failed(self, value):
        """A run that failed has said nothing."""
        assert value("no_empty_answer", "When do you open?", None) is False


class TestNoTruncatedAnswer:
    @pytest.mark.parametrize(
        "answer",
        [
            "The visit is on Monday, and you should bring your",
            "You need three things:",
            "We are open on Monday, Tuesday,",
            "It costs 20 euros (or 25 with the",
            "```python\nprint(1)",
            "1. Open the app.\n2. Tap on the",
            "The nurse will see you in the laborat",
            "Please bring:\n1. your card,\n2.",
            "The desk is on the left. Somebody there gives",
            "The floors are 1, 2, 30",
        ],
    )
    def test_cut(self, traces, value, answer):
        """An end that ends nothing, something left open, and half a word fail."""
        call = traces.Call("where", {}, "in the laboratory, second floor, door 304")
        assert value("no_truncated_answer", "Where is it?", answer, call) is False

    @pytest.mark.parametrize(
        "answer",
        [
            "42", "Paris", "On Monday at 9 am", "* one\n* two\n* three", "See you soon :)", "It is free!", "a) yes",
            "Your visit is confirmed \U0001f389", "It's in room B-204", 'He said "yes"', "I am, as far as I can",
            "It costs 28,90 \u20ac",
        ],
    )  # fmt: skip
    def test_whole(self, value, answer):
        """Bare values, lists, smileys and a missing full stop are no cut."""
        assert value("no_truncated_answer", "Where is it?", answer) is True

    def test_stopped_by_the_model(self, traces, shipped_scorers):
        """What the model itself says about its end counts, whatever the text looks like."""
        trace = traces.trace("q", "All is well.")
        last = trace.data.spans[-1]
        outputs = (
            '{"choices": [{"finish_reason": "length", "message": {"role": "assistant", "content": "All is well."}}]}'
        )
        last._span._attributes = dict(last._span._attributes) | {"mlflow.spanOutputs": outputs}
        assert shipped_scorers("answers").no_truncated_answer.run(trace=trace).value is False


SCORERS = {
    "tool_calls": ("no_tool_errors", "valid_tool_arguments", "no_redundant_calls"),
    "results": ("answer_uses_tool_result", "no_ungrounded_values", "no_contradicted_result"),
    "answers": ("no_refusal", "no_empty_answer", "no_truncated_answer"),
}
OF_SESSIONS = {
    "conversation": (
        "no_repeated_question",
        "no_rephrased_question",
        "no_frustration",
        "no_information_asked_twice",
    ),
    "outcomes": ("no_broken_promise", "errors_resolved", "makes_progress"),
}


def odd_traces(traces):
    """Return traces whose parts have unexpected forms."""
    odd = [
        traces.Call("x", None, {"a": [None, {"b": "[broken"}, "2025-99-99", "1e999", f"0.{'1' * 400}"], "error": [[]]}),
        traces.Call("x", [1], 10**400),
        traces.Call("x", "{broken", ["a", {"1": {"2": [True, 3.5]}}], error=""),
    ]
    offered = [{"type": "web_search"}, {"function": {"name": "x", "parameters": {"properties": {"a": True}}}}]
    yield traces.trace("", "9" * 400, *odd, tools=offered)
    yield traces.trace("?" * 50, "I can't (", *odd[::-1], tools=offered)
    yield traces.trace("\ud83d 31.02.2026 99:99", "on 31.02.2026 at 99:99 and 0/0", *odd)
    bare = traces.trace("hello", "hello")
    bare.data.spans = []
    yield bare
    rootless = traces.trace("hello", "hello", odd[0])
    rootless.data.spans = rootless.data.spans[1:]
    yield rootless


def test_whatever_the_trace(traces, shipped_scorers):
    """No scorer raises on traces whose parts have unexpected forms, alone or as a session."""
    for stem, names in SCORERS.items():
        for name in names:
            for trace in odd_traces(traces):
                getattr(shipped_scorers(stem), name).run(trace=trace)
    for stem, names in OF_SESSIONS.items():
        for name in names:
            scorer = getattr(shipped_scorers(stem), name)
            scorer.run(session=list(odd_traces(traces)))
            scorer.run(session=[])
