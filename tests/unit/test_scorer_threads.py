"""Threads that can be given up: real threads that hang at gates."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from mlflow.genai.scorers import scorer

from gateway.evaluation.scoring import Failed, LiveScorer, Scored, run_trace_scorer
from gateway.evaluation.threads import GivenUp, ScorerThreads
from gateway.rules import ScorerRule

LONG_S = 60.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What holds the calls that hang; open at the end, so that no thread stays behind."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def threads() -> Iterator[ScorerThreads]:
    """Threads with tight bounds."""
    threads = ScorerThreads(most_stuck=3, most_stuck_each=2)
    yield threads
    threads.close()


def until(so: Callable[[], bool]) -> None:
    """Wait until it is so: what a thread does after it was given up tells nobody."""
    end = time.monotonic() + LONG_S
    while not so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_results_and_errors(threads) -> None:
    """A call gives what it returns or raises, a TimeoutError of its own too, and one thread serves call after call."""
    assert threads.run("a", lambda: 42, LONG_S) == 42
    with pytest.raises(TimeoutError, match="my own"):
        threads.run("a", lambda: (_ for _ in ()).throw(TimeoutError("my own")), LONG_S)
    assert [threads.run("a", threading.get_ident, LONG_S) for _ in range(20)]
    assert threads.statistics().threads == 1
    assert threads.statistics().timed_out == 0


def test_a_call_that_hangs(threads, gate) -> None:
    """It is given up at its deadline, others go on in another thread, and its late result is thrown away."""
    with pytest.raises(GivenUp, match=r"no answer within 0\.05 s"):
        threads.run("slow", gate.wait, 0.05)
    assert threads.run("quick", lambda: "here", LONG_S) == "here"
    assert (threads.statistics().stuck, threads.statistics().threads) == (1, 2)
    gate.set()
    until(lambda: threads.statistics().stuck == 0)
    assert threads.statistics().came_back_late == 1
    assert threads.run("slow", lambda: "again", LONG_S) == "again"
    assert threads.statistics().threads == 2


def test_a_scorer_that_always_hangs_is_not_called_again(threads, gate) -> None:
    """After two calls that hang it costs no more time, the others are called, and it is again when one came back."""
    for _ in range(2):
        with pytest.raises(GivenUp):
            threads.run("bad", gate.wait, 0.01)
    begun = threading.Event()
    with pytest.raises(GivenUp, match="not called: 2 of its earlier calls"):
        threads.run("bad", begun.set, LONG_S)
    assert not begun.is_set()
    assert threads.statistics().refused == 1
    assert threads.run("good", lambda: 1, LONG_S) == 1
    with pytest.raises(GivenUp):
        threads.run("other", gate.wait, 0.01)
    with pytest.raises(GivenUp, match="3 of all scorers hang still"):
        threads.run("good", lambda: 1, LONG_S)
    gate.set()
    until(lambda: threads.statistics().stuck == 0)
    assert threads.run("bad", lambda: 1, LONG_S) == 1


async def test_without_blocking_the_event_loop(threads, gate) -> None:
    """Many calls wait at once beside each other; one that is cancelled is given up."""
    assert await asyncio.gather(*(threads.wait("a", lambda n=n: n, LONG_S) for n in range(8))) == list(range(8))
    with pytest.raises(ZeroDivisionError):
        await threads.wait("a", lambda: 1 / 0, LONG_S)
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        loop.call_soon_threadsafe(began.set)
        gate.wait()

    waiting = asyncio.create_task(threads.wait("b", hang, LONG_S))
    await began.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert threads.statistics().stuck == 1
    with pytest.raises(GivenUp):
        await threads.wait("c", gate.wait, 0.01)


def test_a_scorer_that_hangs_is_a_visible_failure(traces, threads, gate) -> None:
    """Its outcome is a failed score at the deadline, its own if that is shorter; others score the same trace."""

    @scorer(timeout=0.05)
    def hangs(trace):
        gate.wait()

    @scorer
    def here(trace):
        return threading.active_count() > 0

    turn = traces.trace("1 + 1?", "2")
    outcome = run_trace_scorer(LiveScorer(hangs, "v1", ScorerRule()), turn, "math", threads=threads, deadline_s=LONG_S)
    assert isinstance(outcome, Failed)
    assert (outcome.kind, outcome.error, outcome.may_pass) == ("timeout", "Timeout: no answer within 0.05 s", True)
    assert outcome.scores[0].assessment().error is not None
    other = run_trace_scorer(LiveScorer(here, "v1", ScorerRule()), turn, "math", threads=threads, deadline_s=LONG_S)
    assert isinstance(other, Scored)
    # MLflow's own thread for the deadline is not made: there would be a thread that hangs and is in no count.
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("MlflowScorer")]
