"""The scorers of a whole conversation: what they flag, and above all what they leave alone."""

import pytest


@pytest.fixture
def value(traces, shipped_scorers):
    """Score one session: `value(name, (user, answer, *rounds), ...)` is True, False or None."""
    module = shipped_scorers("conversation")

    def score(name, *turns):
        # Newest first: no scorer may rely on the order in which it gets the traces.
        feedback = getattr(module, name).run(session=traces.conversation(*turns)[::-1])
        assert feedback is None or (feedback.name == name and feedback.rationale)
        return None if feedback is None else feedback.value

    return score


class TestNoRepeatedQuestion:
    @pytest.fixture
    def asked(self, value):
        """Score a conversation in which the user asks these questions and gets no useful answer."""
        return lambda *questions: value("no_repeated_question", *((question, "I see.") for question in questions))

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("Where is my order?", "Where is my order??"),
            ("When will my refund be paid out?", "I asked when is my refund going to be paid out"),
            ("Can I change my delivery address?", "can i change my delivery adress"),
            ("How much is 1,200 USD in EUR?", "Once more: how much is 1200 USD in EUR?"),
            ("What is the status of order A-1001?", "Please tell me the status of my order A-1001"),
            ("Please cancel my subscription", "Cancel my subscription now!"),
            ("Is <EMAIL:k3f9> subscribed?", "Again, is <EMAIL:k3f9> subscribed?"),
            ("My order has not arrived", "my order hasn't arrived"),
        ],
    )
    def test_repetition(self, asked, first, second):
        """The same question fails, in spite of filler, spelling, punctuation and another way to write a number."""
        assert asked(first, second) is False

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("Where is my order A-1001?", "Where is my order A-1002?"),
            ("What's 15% of 240?", "What's 15% of 250?"),
            ("Is <EMAIL:k3f9> subscribed?", "Is <EMAIL:zz27> subscribed?"),
            ("Any tables free on March 3?", "Any tables free on March 4?"),
            ("Any tables free at 7 pm?", "Any tables free at 8 pm?"),
            ("What's the weather in Paris?", "What's the weather in London?"),
            ("Flights from Paris to London?", "Flights from London to Paris?"),
            ("Convert 5 km to miles", "Convert 5 miles to km"),
            ("Where is my order?", "When is my order coming?"),
            ("How much is shipping to France?", "How much is express shipping to France?"),
            ("Can I return the shoes?", "How do I return the shoes?"),
            ("Tell me a joke about cats", "Tell me another joke about cats"),
            ("Can I pay by card?", "Can I not pay by card?"),
            ("Where is my order?", "Where is my order A-1001?"),
        ],
    )
    def test_other_question(self, asked, first, second):
        """A question with another number, date, code, place, direction or purpose is a new one."""
        assert asked(first, second) is True

    @pytest.mark.parametrize("said", ["ok", "Thanks!", "yes please", "ok thank you", "hello", "Yes, go ahead", "42"])
    def test_acknowledgement(self, asked, said):
        """What is no question may come as often as the user likes."""
        assert asked(said, "What are your opening hours?", said) is True

    def test_information_given_again(self, asked):
        """A piece of information that the user gives again is no question."""
        assert asked("My order number is A-1001.", "my order number is A-1001") is True

    def test_answer_to_the_assistant(self, value):
        """An answer to the assistant's request is no question, even the second time."""
        turns = [("12 Harbour Street, Leeds", "Could you give me your address?")] * 2
        assert value("no_repeated_question", ("I want to order", turns[0][1]), *turns) is True

    def test_run_that_failed(self, value):
        """Having to ask again because the run failed is asking again."""
        question = "What are your opening hours?"
        assert value("no_repeated_question", (question, None), (question, "9 to 5.")) is False

    def test_third_time(self, traces, value):
        """Who asks a third time was not served by what the tool gives each time; news makes it another matter."""
        question = "Is the pool open today?"

        def session(*states):
            calls = [traces.Call("pool_state", {}, {"state": state}) for state in states]
            return [(question, f"It is {call.result['state']}.", call) for call in calls]

        assert value("no_repeated_question", *session("open", "open", "open")) is False
        assert value("no_repeated_question", *session("open", "full", "shut")) is True

    def test_copied(self, value):
        """A message copied whole into the next one was not answered, though the assistant had asked something."""
        first = "Book the small room on Friday for Jo Bloggs"
        assert value("no_repeated_question", (first, "Which room?"), (f"{first}!", "I see.")) is False

    def test_one_turn(self, asked):
        """A single turn cannot repeat anything."""
        assert asked("Where is my order?") is None


class TestNoInformationAskedTwice:
    @pytest.fixture
    def talk(self, value):
        """Score a conversation of alternating lines, the user's first."""

        def score(*lines):
            turns = [(lines[i], lines[i + 1] if i + 1 < len(lines) else "Done.") for i in range(0, len(lines), 2)]
            return value("no_information_asked_twice", *turns)

        return score

    @pytest.mark.parametrize(
        "request_",
        [
            "Could you please share your order number?",
            "What's your order number?",
            "Please provide the order ID so I can look it up.",
            "I need your order number to check that.",
            "Sure! May I have the order reference, please?",
            "Happy to help. Do you have the order number?",
            "And your order number?",
            "Let me know your order no and I will look.",
        ],
    )
    def test_order_number_given_before(self, talk, request_):
        """Asking for the order number that the user has just given fails, in each of the usual wordings."""
        assert talk("Where's my order A-1001?", request_) is False
        assert talk("Where's my order?", request_) is True

    @pytest.mark.parametrize(
        ("request_", "reply"),
        [
            ("What is your email address?", "<EMAIL:k3f9>"),
            ("Can I have your phone number?", "<PHONE:ab3d>"),
            ("Could you tell me your name?", "Jonas Weber"),
            ("What is your delivery address?", "12 Harbour Street, Leeds"),
            ("Which date would you like?", "next Friday"),
            ("How many people will come?", "four"),
            ("What size do you wear?", "medium"),
            ("What's your date of birth?", "3 May 1980"),
            ("Please provide your account number.", "it is 554433"),
        ],
    )
    def test_asked_again_after_the_answer(self, talk, request_, reply):
        """Each kind of information may be asked for until it is given, and not after."""
        assert talk("Hi, I need help", request_, reply, "Thank you.", "So?", request_) is False
        assert talk("Hi, I need help", request_, reply, "Thank you.", "So?", "One moment.") is True
        assert talk("Hi, I need help", request_, "Why do you need that?", request_) is True

    @pytest.mark.parametrize(
        "answer",
        [
            "I couldn't find A-1001. Could you double-check the order number?",
            "What is the order number of the other order?",
            "And what was your previous order number?",
            "Can you confirm that your order number is A-1001?",
            "Your order number is A-1001 and it has shipped.",
            "Would you like me to change the delivery address?",
            "You will find the order number in your e-mail.",
            "To look up that order, could you give me your e-mail?",
            "Is there anything else I can help with?",
        ],
    )
    def test_no_second_request(self, talk, answer):
        """Rejecting what was given, asking for a further one, confirming, and offering are no second request."""
        assert talk("Where's my order A-1001?", answer) is not False

    def test_two_of_a_kind(self, talk):
        """A return date is not a departure date, a billing address no delivery address."""
        dates = ["What is your departure date?", "3 June", "And what is your return date?", "10 June"]
        assert talk("Book a flight", *dates) is True
        addresses = ["What's your delivery address?", "12 Harbour St", "And what's your billing address?", "Same"]
        assert talk("Buy it", *addresses) is True

    def test_other_order(self, talk):
        """A user who turns to another order is rightly asked for its number."""
        lines = [
            "Where's order A-1001?",
            "On its way.",
            "I have a question on another order",
            "What's its order number?",
        ]
        assert talk(*lines) is True

    def test_half_an_answer(self, talk):
        """Of two things asked for at once, the one that was not given may be asked for again."""
        lines = ["A table please", "Which date, and how many people?", "4 people", "And which date would you like?"]
        assert talk(*lines) is True
        assert talk(*lines[:-1], "How many people?") is False

    @pytest.mark.parametrize("code", ["SKU K-1001", "flight LH123", "error code E500", "tracking number 1Z99931"])
    def test_other_code(self, talk, code):
        """Not each code is an order number."""
        assert talk(f"I have a problem with {code}", "What is your order number?") is True

    def test_volunteered_email(self, talk):
        """An e-mail address given unasked counts as given, redacted or not."""
        for address in ("<EMAIL:k3f9>", "jo@example.com"):
            assert talk(f"I am {address}, reset my password", "Please provide your email address.") is False

    @pytest.mark.parametrize(
        ("said", "request_", "reply"),
        [
            ("I want to stay 2 nights", "How many nights will you stay?", "two of them"),
            ("A loan of 12,000 at 4.5%", "What's the amount of the loan?", "12,000"),
            ("My cat Minka limps", "What is the matter with the animal?", "it limps, my cat limps"),
            ("Room 214 is cold", "Which room are you in?", "see above"),
            ("Is TX 550 late?", "Which train would that be?", "TX 550"),
        ],
    )
    def test_reply_shows_it(self, talk, said, request_, reply):
        """A reply that can only say it again, or says that it was said, shows that the question was needless."""
        assert talk(said, request_, reply) is False

    @pytest.mark.parametrize(
        ("said", "request_", "reply"),
        [
            ("Two rooms, 214 and 215", "Room 214 or room 215?", "214"),
            ("I was in Leeds and York", "Which one shall I look up?", "York"),
            ("A table on 3 June", "Until what day will you stay?", "10 June"),
            ("Is TX 550 late?", "I couldn't find it. Which train is it?", "TX 550"),
            ("Stay for 2 nights", "How old are you?", "22"),
        ],
    )
    def test_reply_shows_nothing(self, talk, said, request_, reply):
        """A choice, a new value and a second attempt at what was not found are no needless questions."""
        assert talk(said, request_, reply) is not False

    def test_nothing_asked(self, talk):
        """An assistant that asks for nothing is not judged."""
        assert talk("Hi", "Hello, how can I help?", "What's 2 + 2?", "4.") is None

    def test_run_that_failed(self, value):
        """A run without an answer is passed over."""
        ask = ("Hi", "What is your e-mail?")
        assert value("no_information_asked_twice", ask, ("<EMAIL:k3f9>", None), ("hello?", "All done.")) is True
        assert value("no_information_asked_twice", ("Hi", None)) is None


class TestNoRephrasedQuestion:
    @pytest.mark.parametrize(
        ("first", "answer", "second"),
        [
            ("How do I renew my library card?", "I'm sorry.", "What must I do so that my library card is renewed?"),
            (
                "Can I bring my dog to the clinic?",
                "I can't help with that.",
                "Are dogs allowed in the clinic, yes or no",
            ),
        ],
    )
    def test_other_words(self, value, first, answer, second):
        """The same question in other words after an answer that did not help fails."""
        turns = ((first, answer), (second, "I see."))
        assert value("no_rephrased_question", *turns) is False

    @pytest.mark.parametrize(
        ("first", "answer", "second"),
        [
            ("How do I renew my card?", "At the desk, with your passport.", "And how do I renew my son's card?"),
            ("Is Dr Weiss in on Monday?", "Yes, from nine.", "Is Dr Weiss in on Tuesday?"),
            ("Table for two", "For which day?", "Sorry, I meant a table for three"),
            ("How do I renew my card?", "I'm sorry.", "ok"),
        ],
    )
    def test_next_question(self, value, first, answer, second):
        """A follow-up, another value, a correction and a thank-you are no rephrasing."""
        assert value("no_rephrased_question", (first, answer), (second, "I see.")) is True

    def test_part_of_the_question(self, value):
        """Who comes back to a part of the question that the answer left out asks again; of what it said they go on."""
        asked = "Is the 8:15 on time, and from which platform?"
        assert value("no_rephrased_question", (asked, "It is on time."), ("platform?", "I see.")) is False
        assert value("no_rephrased_question", (asked, "Platform 4, on time."), ("platform?", "4.")) is True

    def test_not_what_was_asked(self, value):
        """Who says that it was no answer has asked before, whatever the words."""
        turns = (
            ("May I bring my dog?", "We love all animals."),
            ("That's not what I asked. Are pets allowed?", "Yes."),
        )
        assert value("no_rephrased_question", *turns) is False

    def test_tries_again(self, traces, value):
        """To have it tried once more is to ask in no other words."""
        call = traces.Call("weigh", {"of": "parcel 77"}, "x", error="timeout")
        turns = (("what does parcel 77 weigh", "That failed.", call), ("can you try again", "It failed again.", call))
        assert value("no_rephrased_question", *turns) is True

    def test_same_call_same_answer(self, traces, value):
        """Two messages that got the same number out of the same call asked the same, or were taken for it."""
        call = traces.Call("sum_of", {"of": "bills"}, 120)
        turns = (
            ("what do I owe in all", "120.", call),
            ("without the one I paid already, how much", "It is 120.", call),
        )
        assert value("no_rephrased_question", *turns) is False


class TestNoFrustration:
    @pytest.mark.parametrize(
        "text",
        [
            "This is useless",
            "I already told you my name",
            "for the third time, room 12",
            "let me speak to a manager",
            "WHY IS NOBODY ANSWERING ME",
            "hello????",
            "you're not listening",
            "\U0001f621",
        ],
    )
    def test_signs(self, value, text):
        """Angry words, reminders of what was said, and shouting fail."""
        assert value("no_frustration", ("hi", "Hello!"), (text, "I see.")) is False

    @pytest.mark.parametrize(
        "text",
        [
            "I can't believe it, that's amazing!!!",
            "Great, thanks!!",
            "Is the NHS form in PDF?",
            "really?? wow",
            "My boss wants it by noon.",
            "Could you repeat that, please?",
            "thank god, it worked",
            "So you can't ship to Norway?",
            "Why don't you ship to Norway?",
            "Just give me the cheapest one",
            "I was told it takes 5 days",
            "I already did a return last year, is it the same?",
            "Do you keep my data?",
            "Sorry if this is a stupid question: who pays?",
            "THE BIG ONE!!",
        ],
    )
    def test_no_signs(self, value, text):
        """Joy, abbreviations and plain requests pass."""
        assert value("no_frustration", ("hi", "Hello!"), (text, "I see.")) is True

    @pytest.mark.parametrize(
        "text", ["really??", "just tell me the price", "it's in my message", "*sighs*", "eighty!!"]
    )
    def test_after_a_turn_in_vain(self, value, text):
        """What can be meant well is a sign after a turn that brought nothing, and none after one that helped."""
        assert value("no_frustration", ("What does the room cost?", "I'm sorry."), (text, "I see.")) is False
        assert value("no_frustration", ("hi", "Hello!"), (text, "I see.")) is True

    def test_capitals_throughout(self, value):
        """Who writes everything in capitals does not shout; who falls into them does."""
        shouted = ("NOW WHAT ABOUT THE OTHER FOUR", "24.")
        assert value("no_frustration", ("HOW MUCH IS THAT", "20."), shouted) is True
        assert value("no_frustration", ("how much is that", "20."), shouted) is False
