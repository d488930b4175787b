"""When an evaluator yields, and when it leaves things out."""

import pytest
from mlflow.genai.scorers import scorer

from gateway.evaluation import pressure
from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.pressure import Pressure, Seen, cpu_pressure
from gateway.evaluation.scoring import LiveScorer
from gateway.evaluation.selection import PRESSURE, Room, select
from gateway.rules import ScorerRule
from gateway.settings import Settings
from gateway.storage.database import open_pool

CALM = Seen(cpu=0.1, database_s=0.001, lag_s=0.0)
LATE = 1_000.0


@pytest.fixture
def state() -> Pressure:
    """The state of an evaluator that nothing presses; nothing is looked at."""
    return Pressure(Settings(), open_pool("postgresql://nowhere", max_size=1, name="unused"))


@pytest.mark.parametrize("seen", [CALM._replace(cpu=0.8), CALM._replace(database_s=0.25)])
def test_it_yields_from_a_bound_on_and_until_well_below_it(state: Pressure, seen: Seen) -> None:
    """Either sign is enough, and a sign that wavers about its bound does not make it waver."""
    state.heed(CALM)
    assert not state.is_high
    state.heed(seen)
    assert state.is_high
    state.heed(Seen(0.65, 0.21, 0.0))
    assert state.is_high
    state.heed(Seen(0.63, 0.19, 0.0))
    assert not state.is_high


def test_it_leaves_out_only_when_what_waits_is_late(state: Pressure) -> None:
    """The share falls by steps while there is pressure and traces are late, never to nothing, and comes back."""
    state.heed(CALM._replace(lag_s=LATE))
    state.heed(CALM._replace(cpu=0.9))
    assert state.share == 1.0
    for _ in range(7):
        state.heed(Seen(0.9, 0.001, LATE))
    assert state.share == pytest.approx(0.9**7)
    for _ in range(100):
        state.heed(Seen(0.9, 0.001, LATE))
    assert state.share == 1 / 64
    for _ in range(100):
        state.heed(CALM)
    assert state.share == 1.0


def test_what_is_left_out_is_drawn_and_told(traces) -> None:
    """Under pressure each scorer keeps that part of its subjects that it would draw at the lower share."""
    live = LiveScorer(scorer(lambda: True, name="short"), "v1", ScorerRule(share=0.8))
    subjects = [f"tr-{number}" for number in range(4_000)]
    key, facts = b"k" * 32, TraceFacts([traces.trace("1 + 1?", "2")])
    before = {each for each in subjects if select([live], key, facts, each).in_code}
    pressed = {each: select([live], key, facts, each, Room(pressure=0.25)) for each in subjects}
    after = {each for each, selection in pressed.items() if selection.in_code}
    assert after < before
    assert len(after) / len(subjects) == pytest.approx(0.2, abs=0.02)
    assert {selection.in_code[0].probability for selection in pressed.values() if selection.in_code} == {0.8 * 0.25}
    told = {each for each, selection in pressed.items() if selection.skips == {live.name: PRESSURE}}
    assert told == before - after


def test_the_systems_own_figure(tmp_path, monkeypatch) -> None:
    """The share of waiting is read as Linux writes it; a system without it has none."""
    there = tmp_path / "cpu.pressure"
    monkeypatch.setattr(pressure, "_PSI", (tmp_path / "none", there))
    assert cpu_pressure() is None
    there.write_text("some avg10=41.25 avg60=1.00 avg300=0.10 total=123\nfull avg10=0.00 avg60=0 avg300=0 total=0\n")
    assert cpu_pressure() == 0.4125
