"""The scorers of one turn's tool calls: what they flag, and above all what they leave alone."""

import pytest

NUMBER = {"type": "number"}
PHONE = "<PHONE:ab3d>"


@pytest.fixture
def value(traces, shipped_scorers):
    """Score one turn: `value(name, user, answer, *rounds, tools=...)` is True, False or None."""
    modules = [shipped_scorers(stem) for stem in ("tool_calls", "results")]

    def score(name, *turn, **options):
        scorer = next(getattr(module, name) for module in modules if hasattr(module, name))
        feedback = scorer.run(trace=traces.trace(*turn, **options))
        assert feedback is None or (feedback.name == name and feedback.rationale)
        return None if feedback is None else feedback.value

    return score


@pytest.fixture
def uses(traces, value):
    """Score `answer_uses_tool_result` for one result and one answer."""

    def score(result, answer, user="Tell me, please.", arguments=None):
        return value("answer_uses_tool_result", user, answer, traces.Call("lookup", arguments or {}, result))

    return score


@pytest.fixture
def fits(traces, value):
    """Score `valid_tool_arguments` for one call of a tool with these properties."""

    def score(arguments, required=(), **properties):
        tools = [traces.tool("convert", required=required, **properties)]
        return value("valid_tool_arguments", "q", "a", traces.Call("convert", arguments, 1), tools=tools)

    return score


@pytest.mark.parametrize(
    "name", ["no_tool_errors", "valid_tool_arguments", "no_redundant_calls", "answer_uses_tool_result"]
)
def test_turn_without_tools(value, name):
    """A turn that called no tool is not judged."""
    assert value(name, "hi", "hello") is None


class TestNoToolErrors:
    def test_success(self, traces, value):
        """Calls that all worked pass."""
        assert value("no_tool_errors", "q", "a", traces.Call("x", {}, 1), traces.Call("y", {}, None)) is True

    def test_result_that_mentions_an_error(self, traces, value):
        """A result that talks about an error is no error."""
        assert value("no_tool_errors", "q", "a", traces.Call("search", {}, "Error 404 means not found")) is True

    def test_failure(self, traces, value):
        """One failed call among several fails, even if the retry worked."""
        calls = [traces.Call("x", {}, "failed", error="timeout"), traces.Call("x", {}, 1)]
        assert value("no_tool_errors", "q", "a", *calls) is False

    def test_rationale(self, traces, shipped_scorers):
        """The rationale names the tool and the exception's message."""
        trace = traces.trace("q", "a", traces.Call("pay", {}, "failed", error="card declined"))
        assert "pay: card declined" in shipped_scorers("tool_calls").no_tool_errors(trace=trace).rationale


class TestValidToolArguments:
    @pytest.mark.parametrize("arguments", [{"amount": 3}, {"amount": 3.5}, {}])
    def test_fitting(self, fits, arguments):
        """Arguments that fit the schema pass."""
        assert fits(arguments, amount=NUMBER) is True

    @pytest.mark.parametrize(
        "arguments", [{"amount": "three"}, {"amount": None}, {"sum": 3}, {"amount": 3, "to": "EUR"}]
    )
    def test_not_fitting(self, fits, arguments):
        """A wrong type or an argument that the tool does not have fails."""
        assert fits(arguments, amount=NUMBER) is False

    def test_missing(self, fits):
        """A missing required argument fails."""
        assert fits({}, required=["amount"], amount=NUMBER) is False

    def test_unparsable(self, fits):
        """Arguments that are no JSON fail."""
        assert fits('{"amount": ', amount=NUMBER) is False

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "integer"},
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            {"enum": [1, 2]},
            {"type": "string", "pattern": "^[0-9]+$"},
        ],
    )
    def test_redacted_value(self, fits, schema):
        """A value that redaction replaced is not held against the model."""
        assert fits({"to": PHONE}, to=schema) is True

    def test_redacted_value_inside_a_choice(self, fits):
        """A placeholder within an object that may take one of several forms is forgiven as well."""
        contact = {"type": "object", "properties": {"phone": {"type": "integer"}}, "required": ["phone"]}
        choice = {"anyOf": [contact, {"type": "null"}]}
        assert fits({"to": {"phone": PHONE}}, to=choice) is True
        assert fits({"to": {"phone": "none"}}, to=choice) is False

    def test_fault_beside_a_redacted_value(self, fits):
        """A placeholder does not excuse the faults of the other arguments."""
        assert fits({"to": PHONE, "amount": "x"}, to={"type": "integer"}, amount=NUMBER) is False

    def test_tool_without_definition(self, traces, value):
        """A tool whose definition was not captured is not counted."""
        call = traces.Call("web_search", {"q": 1}, "x")
        assert value("valid_tool_arguments", "q", "a", call) is None
        assert value("valid_tool_arguments", "q", "a", call, tools=[traces.tool("web_search")]) is False

    @pytest.mark.parametrize("fits", [True, False])
    def test_what_was_found_before_redaction_counts(self, traces, value, fits):
        """Where the gateway has checked the arguments as they were, its finding counts, not how they look now."""
        call = traces.Call("convert", {"to": PHONE}, 1, fits=fits)
        tools = [traces.tool("convert", to={"type": "string", "maxLength": 3})]
        assert value("valid_tool_arguments", "q", "a", call, tools=tools) is fits
        assert value("valid_tool_arguments", "q", "a", call) is fits

    def test_made_up_tool(self, traces, shipped_scorers):
        """A call of a tool that was never offered, and so never ran, fails."""
        trace = traces.trace("q", None, traces.Call("fly_to_moon", {}, None), tools=[traces.tool("convert")])
        trace.data.spans = [span for span in trace.data.spans if span.span_type != "TOOL"]
        assert shipped_scorers("tool_calls").valid_tool_arguments.run(trace=trace).value is False

    @pytest.mark.parametrize("reference", ["#/$defs/Missing", "https://schemas.invalid/amount.json"])
    def test_broken_schema(self, fits, reference):
        """A schema that cannot be resolved blames nobody, and nothing is fetched."""
        assert fits({"amount": 1}, amount={"$ref": reference}) is True


class TestNoRedundantCalls:
    def test_repetition(self, traces, value):
        """The same call with the same result fails, whatever the order of its arguments."""
        calls = [traces.Call("search", {"a": 1, "b": 2}, ["x"]), traces.Call("search", {"b": 2, "a": 1}, ["x"])]
        assert value("no_redundant_calls", "q", "a", *calls) is False

    def test_parallel_repetition(self, traces, value):
        """Two equal calls in one round fail too."""
        assert value("no_redundant_calls", "q", "a", [traces.Call("now", {}, 1), traces.Call("now", {}, 1)]) is False

    def test_other_arguments(self, traces, value):
        """Other arguments are another question, even with an equal result."""
        calls = [traces.Call("weather", {"city": city}, "sunny") for city in ("Rome", "Bari")]
        assert value("no_redundant_calls", "q", "a", calls) is True

    def test_retry(self, traces, value):
        """A retry after an error is not redundant, nor is a second failure."""
        failed = traces.Call("pay", {"n": 1}, "failed", error="timeout")
        assert value("no_redundant_calls", "q", "a", failed, failed, traces.Call("pay", {"n": 1}, "paid")) is True

    def test_polling(self, traces, value):
        """Asking again for what has changed is not redundant."""
        calls = [traces.Call("job", {"id": 1}, state) for state in ("running", "finished")]
        assert value("no_redundant_calls", "q", "a", *calls) is True


class TestAnswerUsesToolResult:
    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            (36.0, "That makes 36."),
            (36, "It is 36.00 euros."),
            (1200.0, "You get $1,200.00 back."),
            ("1,200.00 USD", "It comes to 1200 dollars."),
            (1200.5, "Das macht 1.200,50 €."),
            (0.425, "The share is 42.5%."),
            ({"share": 17}, "About 17 % of them."),
            (3.14159265, "Pi is roughly 3.14."),
            (1234567, "Around 1.23 million people."),
            (3, "There are three of them."),
            (-8, "It is minus 8 outside."),
            (62, "The room is 62EUR."),
            ("62eur", "The room is 62 euros."),
            (5, "It is 5 m wide."),
        ],
    )
    def test_number(self, uses, result, answer):
        """A number counts as stated in whatever way it is written."""
        assert uses(result, answer) is True

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            (36.0, "I cannot calculate that."),
            (0.92, "It is 1."),
            (7, "1. Open the app\n2. Tap on it\n7. Done"),
        ],
    )
    def test_other_number(self, uses, result, answer):
        """No number of the result's fails."""
        assert uses(result, answer) is False

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            (36.0, "That makes 37."),
            ({"amount": 1198.27, "currency": "EUR"}, "It is 1,150.00 EUR."),
            ({"starts": "19:30"}, "Doors open at 8:30 pm."),
            ({"tracking": "1Z-99-AX"}, "Your tracking code is 1Z-99-AY."),
            ({"phase": "review", "left": 12}, "There is one more thing to tell, and the"),
        ],
    )
    def test_wrong_value_in_its_place(self, uses, result, answer):
        """A value that is made up or wrong in the result's place, or an end that is cut, is for other scorers."""
        assert uses(result, answer) is None

    def test_key_that_was_asked_for(self, traces, value):
        """Where the user names a key, one of its values has to show."""
        found = traces.Call("search_flats", {"town": "Ghent"}, [{"flat": "F-12", "rent": 940, "rooms": 3}])
        asked = "What is the rent of the flat in Ghent?"
        assert value("answer_uses_tool_result", asked, "F-12 has 3 rooms.", found) is False
        assert value("answer_uses_tool_result", asked, "F-12 has 3 rooms, for 940.", found) is True

    @pytest.mark.parametrize(
        "answer",
        [
            "March 14, 2025",
            "14 March",
            "the 14th of March",
            "14.03.2025",
            "3/14/25",
            "2025-03-14",
            "Friday",
            "tomorrow",
        ],
    )
    def test_date(self, uses, answer):
        """A date counts in the usual forms, as its weekday, or relative to today."""
        assert uses({"eta": "2025-03-14T18:00:00Z"}, f"It arrives on {answer}.") is True

    def test_other_date(self, uses):
        """Another date fails, even in the same year."""
        assert uses({"eta": "2025-03-14"}, "It arrives on March 15, 2025.") is False

    def test_time(self, uses):
        """A time of the 24-hour clock counts on the 12-hour clock."""
        assert uses({"starts": "19:30"}, "Doors open at 7:30 pm.") is True

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            ({"tracking": "1Z-99-AX"}, "Your tracking code is 1Z-99-AX."),
            ({"contact": "<EMAIL:k3f9>"}, "Write to <EMAIL:k3f9>."),
            ("Paris", "The capital is **Paris**."),
            ({"id": 5, "name": "Casa Azul"}, "I suggest Casa Azul."),
            ({"status": "shipped"}, "The shipment has left."),
            ('{"status": "cancelled"}', "It was canceled."),
            ([{"sku": "K-1", "price": 10}, {"sku": "K-2", "price": 20}], "The cheapest one is 10."),
            ("Berlin: light rain, 4 °C", "Expect light rain."),
            ({"status": "in_transit"}, "It is on its way."),
            ({"delay_minutes": 0}, "It is on time."),
            ({"deposit": "none", "term": "1 year"}, "You pay no deposit."),
        ],
    )
    def test_text(self, uses, result, answer):
        """A code, placeholder, name or word of the result counts; of a list or object one value is enough."""
        assert uses(result, answer) is True

    @pytest.mark.parametrize(
        ("result", "answer"),
        [("Paris", "The capital is Lyon."), ({"desk": "North Hall"}, "Ask at the entrance.")],
    )
    def test_other_text(self, uses, result, answer):
        """Another name or code fails."""
        assert uses(result, answer) is False

    @pytest.mark.parametrize(
        ("result", "answer"),
        [
            (None, "Nothing there."),
            ([], "Nothing there."),
            ("", "Nothing there."),
            ({"results": []}, "Nothing there."),
            (True, "Yes, it does."),
            ("ok", "All set."),
            ({"success": True, "error": None}, "All set."),
            ({"status": "sent", "message_id": "msg-8f7a"}, "I have e-mailed it."),
            ({"status": "Delivered"}, "It is with you already."),
            ({"balance": 0}, "You owe nothing."),
            ("No results found", "I am afraid there is none."),
        ],
    )
    def test_nothing_to_look_for(self, uses, result, answer):
        """A result without a value that has to show is not judged."""
        assert uses(result, answer) is None

    def test_echo(self, uses):
        """What the user or the arguments had said proves nothing."""
        result, arguments = {"order_id": "A-1001", "total": 36}, {"order_id": "A-1001"}
        assert uses(result, "I cannot see A-1001.", "Where is A-1001?", arguments) is False
        assert uses(result, "A-1001 costs 36.", "Where is A-1001?", arguments) is True
        assert uses({"order_id": "A-1001"}, "A-1001 is there.", "Where is A-1001?", arguments) is None

    def test_chain(self, traces, value):
        """Of a chain only the last result has to show, and an earlier one does not stand in for it."""
        calls = [traces.Call("multiply", {"a": 6, "b": 7}, 42), traces.Call("add", {"a": 42, "b": 8}, 50)]
        assert value("answer_uses_tool_result", "6 * 7 + 8?", "That is 50.", *calls) is True
        assert value("answer_uses_tool_result", "6 * 7 + 8?", "That is 42.", *calls) is False

    def test_action_after_a_lookup(self, traces, value):
        """An acknowledgement at the end leaves it to the result before."""
        calls = [traces.Call("balance", {}, {"eur": 91.5}), traces.Call("send_mail", {}, "ok")]
        assert value("answer_uses_tool_result", "q", "I mailed you: 91.50.", *calls) is True
        assert value("answer_uses_tool_result", "q", "I mailed it to you.", *calls) is None

    def test_parallel_calls(self, traces, value):
        """Of several results of the last round one is enough."""
        calls = [traces.Call("price", {"of": "a"}, 17.5), traces.Call("price", {"of": "b"}, 23.0)]
        assert value("answer_uses_tool_result", "q", "The first is cheaper, at 17.50.", calls) is True

    def test_failed_call(self, traces, value):
        """What the model was told of a failure is no result."""
        assert value("answer_uses_tool_result", "q", "Sorry.", traces.Call("x", {}, "Error 17", error="boom")) is None

    def test_run_without_answer(self, traces, value):
        """A run that failed has no answer to judge."""
        assert value("answer_uses_tool_result", "q", None, traces.Call("x", {}, 42)) is None

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("Wash it cold on a gentle cycle and leave out the softener, which clogs the membrane.", True),
            ("You have 30 days to send it back.", True),
            ("Our colleagues in the shop will gladly advise you.", False),
        ],
    )
    def test_retrieval(self, traces, value, answer, expected):
        """For retrieved texts, a share of their words or one value of them has to be in the answer."""
        texts = [
            "Machine wash cold on a gentle cycle. Fabric softener clogs the membrane; tumble dry on low heat.",
            "Unworn garments can be returned within 30 days of purchase in their original packaging.",
        ]
        documents = [{"page_content": text, "metadata": {"doc_id": "care"}} for text in texts]
        call = traces.Call("search_docs", {"query": "jacket"}, documents, documents=texts)
        assert value("answer_uses_tool_result", "How do I care for the jacket?", answer, call) is expected
