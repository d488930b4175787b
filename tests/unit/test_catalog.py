"""Which scorers run live: files and built-ins, rules, judge models, what is refused, and changes while running."""

import asyncio
import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

import pytest
import structlog
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import (
    Fluency,
    Guidelines,
    KnowledgeRetention,
    RegexMatch,
    Safety,
    get_all_scorers,
    make_scorer_ensemble,
    scorer,
)
from mlflow.genai.scorers.base import Scorer, ScorerKind, flatten_scorers
from pydantic import PrivateAttr

from gateway.errors import ConfigurationError
from gateway.evaluation.catalog import ScorerCatalog, find_scorer, load_scorers
from gateway.evaluation.judge_models import asks_model, named_model, with_model
from gateway.evaluation.scoring import LiveScorer
from gateway.reloading import LiveSettings
from gateway.rules import ScorerRule
from gateway.settings import Settings, load_settings

PLAIN = "from mlflow.genai.scorers import scorer\n\n@scorer\ndef {name}(trace):\n    return True\n"
JUDGE = "from mlflow.genai.scorers import Safety, scorer\nsafety = Safety()\n"
MADE = """
    from mlflow.genai.judges import make_judge
    tone = make_judge(name="tone", instructions="Is {{ outputs }} polite?", feedback_value_type=bool)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project: a scorers folder, and no `gateway.toml` yet."""
    monkeypatch.delenv("GATEWAY_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorers").mkdir()
    return tmp_path


def write(project: Path, **files: str) -> None:
    """Write scorer files."""
    for name, text in files.items():
        (project / "scorers" / f"{name}.py").write_text(dedent(text))


@pytest.fixture
def loaded(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Write scorer files, and load them with some settings, anew each time."""

    def load(files: dict[str, str] | None = None, **settings: Any) -> dict[str, LiveScorer]:
        write(project, **(files or {}))
        for name in [name for name in sys.modules if name.startswith("scorer_plugins")]:
            del sys.modules[name]
        return {each.name: each for each in load_scorers(Settings(**settings))}

    return load


def refusal(load, *args: Any, **settings: Any) -> str:
    """Return what is said when it cannot be loaded."""
    with pytest.raises(ConfigurationError) as caught:
        load(*args, **settings)
    return str(caught.value)


def test_load(loaded) -> None:
    """Every scorer of every file runs live by default; a rule that says otherwise is followed."""
    files = {"one": PLAIN.format(name="a") + PLAIN.format(name="b"), "two": PLAIN.format(name="c")}
    found = loaded(files, scorers={"b": {"enabled": False}, "c": {"share": 0.5}})
    assert set(found) == {"a", "c"}
    assert found["a"].rule == ScorerRule()
    assert found["c"].rule.share == 0.5
    assert found["a"].version != found["c"].version
    assert found["c"].place == "scorers/two.py"


def test_judges_need_a_model(loaded) -> None:
    """Judges are left out without a judge model, whose name is part of their versions, and of no other's."""
    files = {"one": PLAIN.format(name="a"), "judges": JUDGE, "made": MADE}
    without, one, other = (loaded(files, judge_model=model) for model in (None, "openai:/one", "openai:/two"))
    assert set(without) == {"a"}
    assert set(one) == {"a", "safety", "tone"}
    assert one["safety"].is_judge
    assert not one["a"].is_judge
    assert [one[name].model for name in ("a", "safety", "tone")] == [None, "openai:/one", "openai:/one"]
    assert one["tone"].scorer.model == "openai:/one"
    assert one["safety"].version != other["safety"].version
    assert one["a"].version == other["a"].version == without["a"].version


def test_a_judge_model_of_its_own(loaded) -> None:
    """A rule's model comes before the scorer's own, and that before the common one."""
    files = {
        "made": MADE,
        "judges": "from mlflow.genai.scorers import Fluency, Safety\nf, s = Fluency(model='openai:/own'), Safety()\n",
    }
    rules = {"tone": {"judge_model": "openai:/ruled"}, "fluency": {}}
    found = loaded(files, judge_model="openai:/common", scorers=rules)
    assert {name: live.model for name, live in found.items()} == {
        "tone": "openai:/ruled", "fluency": "openai:/own", "safety": "openai:/common",
    }  # fmt: skip
    assert found["tone"].scorer.model == "openai:/ruled"
    assert set(loaded(files, scorers=rules)) == {"tone", "fluency"}
    assert loaded(files, scorers={"fluency": {"judge_model": "openai:/x"}})["fluency"].model == "openai:/x"


def test_version_follows_the_helpers(loaded) -> None:
    """A scorer's version follows its own file and the folder's helpers, not the other scorers."""
    before = loaded({"one": PLAIN.format(name="a"), "_shared": "X = 1\n"})["a"].version
    assert loaded({"two": PLAIN.format(name="b")})["a"].version == before
    assert loaded({"_shared": "X = 2\n"})["a"].version != before


def test_every_builtin_by_its_name(loaded) -> None:
    """Each of MLflow's built-ins that needs no arguments runs by the name of its class, without any file."""
    kinds = [type(each).__name__ for each in get_all_scorers()]
    assert len(kinds) >= 18
    found = loaded(judge_model="openai:/gpt-4o-mini", scorers={kind: {"share": 0.5} for kind in kinds})
    assert sorted(type(each.scorer).__name__ for each in found.values()) == sorted(kinds)
    assert all(each.rule.share == 0.5 for each in found.values())
    assert {each.name for each in found.values()} == {each.name for each in get_all_scorers()}
    judges = [each for each in found.values() if each.is_judge]
    assert {each.model for each in judges} == {"openai:/gpt-4o-mini"}
    assert len(judges) >= 16


def test_a_builtin_with_arguments(loaded, project: Path) -> None:
    """A rule can make a built-in by a name of its own, as often as wanted; its arguments are part of its version."""
    text = """
        judge_model = "openai:/gpt-4o-mini"
        [scorers.polite]
        builtin = "Guidelines"
        arguments = { guidelines = ["Be polite."] }
        [scorers.brief]
        builtin = "Guidelines"
        arguments = { guidelines = ["Be brief."] }
        [scorers.has_an_order]
        builtin = "RegexMatch"
        arguments = { pattern = "A-\\\\d+" }
    """
    (project / "gateway.toml").write_text(dedent(text))
    found = {each.name: each for each in load_scorers(load_settings())}
    assert set(found) == {"polite", "brief", "has_an_order"}
    assert found["polite"].scorer.guidelines == ["Be polite."]
    assert found["polite"].place == "gateway.toml, line 3"
    assert found["polite"].version != found["brief"].version
    assert not found["has_an_order"].is_judge
    assert found["has_an_order"].scorer.run(outputs="Order A-12.").value == "yes"


def test_the_builtin_that_the_folder_has(loaded) -> None:
    """A rule by the class of a built-in that a file makes is the rule for that one."""
    found = loaded({"judges": JUDGE}, judge_model="openai:/x", scorers={"Safety": {"share": 0.25}})
    assert [(each.name, each.rule.share, each.place) for each in found.values()] == [
        ("safety", 0.25, "scorers/judges.py")
    ]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"aa": {}}, r"\[scorers\.aa\]: there is no scorer aa; did you mean a\? scorers holds a, safety;"),
        ({"Saftey": {}}, r"there is no scorer Saftey; did you mean Safety\?"),
        ({"x": {"builtin": "Guideline"}}, r"no built-in scorer Guideline; did you mean Guidelines\?"),
        ({"x": {"builtin": "Guidelines"}}, r"`arguments`: guidelines: Field required"),
        ({"x": {"builtin": "Safety", "arguments": {"guideline": "x"}}}, r"takes no argument guideline; it takes"),
        ({"x": {"builtin": "Safety", "arguments": {"model": "x"}}}, r"set judge_model instead"),
        ({"x": {"builtin": "Safety", "arguments": {"name": "x"}}}, r"the name of the table is its name"),
        ({"a": {"arguments": {"x": 1}}}, r"a is made in scorers/one\.py, and takes no `arguments`"),
        ({"a": {"judge_model": "openai:/x"}}, r"a is plain code and asks no model"),
        ({"Safety": {}, "safety": {}}, r"\[scorers\.safety\]: \[scorers\.Safety\] is a rule for safety already"),
        ({"a": {"builtin": "Fluency"}}, r"scorers/one\.py has a scorer named a already; .*my_a"),
        ({"a": {"agents": ["maths"]}}, r"\[scorers\.a\]: there is no agent maths; did you mean math\?"),
    ],
)
def test_rules_that_are_refused(loaded, project: Path, rules: dict[str, Any], said: str) -> None:
    """A rule that can never be followed stops the start, with the nearest name where one is misspelled."""
    (project / "agents" / "math").mkdir(parents=True)
    (project / "agents" / "math" / "agent.py").touch()
    assert re.search(said, refusal(loaded, {"one": PLAIN.format(name="a"), "judges": JUDGE}, scorers=rules))


def test_all_mistakes_are_told_at_once_with_their_lines(project: Path) -> None:
    """Each mistake is a line, which begins with the place in the file."""
    write(project, one=PLAIN.format(name="a"))
    (project / "gateway.toml").write_text("[scorers.a]\njudge_model = 'openai:/x'\n\n[scorers.b]\n[scorers.c]\n")
    lines = refusal(load_scorers, load_settings()).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "gateway.toml, line 4", "gateway.toml, line 5", "gateway.toml, line 1",
    ]  # fmt: skip


def test_rule_for_a_judge_without_a_model(loaded) -> None:
    """A rule for a judge may stay while no judge model is set."""
    assert set(loaded({"judges": JUDGE}, scorers={"safety": {"share": 0.1}})) == set()


def test_two_scorers_of_one_name(loaded) -> None:
    """Two scorers of one name are refused, with both files."""
    said = refusal(loaded, {"one": PLAIN.format(name="a"), "two": PLAIN.format(name="a")})
    assert said.startswith("scorers/two.py: another file has a scorer named a already (scorers/one.py)")


def test_scorer_that_another_file_imports(loaded) -> None:
    """A scorer that a second file imports is still one scorer, with its own file's version."""
    alone = loaded({"one": PLAIN.format(name="a")})["a"].version
    for other in ("zebra", "also"):  # it makes no difference which of them is read first
        found = loaded({other: "from .one import a\n" + PLAIN.format(name=f"b_{other}")})
        assert (found["a"].version, found["a"].place) == (alone, "scorers/one.py")
    assert set(found) == {"a", "b_zebra", "b_also"}


def test_no_folder(tmp_path: Path) -> None:
    """A missing folder is named, with the ways out."""
    with pytest.raises(ConfigurationError, match=r"no scorers folder .*GATEWAY_SCORERS_DIR"):
        load_scorers(Settings(scorers_dir=tmp_path / "nowhere"))


def test_a_file_that_fails_names_its_line(loaded) -> None:
    """A file that cannot be imported is told with the line at which it failed."""
    said = refusal(loaded, {"one": PLAIN.format(name="a") + "\n\nprint(1 / 0)\n"})
    assert "scorers/one.py cannot be imported: ZeroDivisionError: division by zero (" in said
    assert said.endswith("scorers/one.py, line 8)")


@pytest.mark.parametrize(
    ("template", "advice"),
    [
        ("Is {question} answered?", "Variables stand in double braces: {{ inputs }}, not {question}."),
        ("Is {{ question }} answered by {{ outputs }}?", "For question: Write {{ inputs }} in its place"),
        ("Is {{ inputs.question }} answered?", "MLflow takes no {{ inputs.question }}"),
    ],
)
def test_a_template_that_mlflow_refuses(loaded, template: str, advice: str) -> None:
    """MLflow's refusal of a judge's template is told with its line, and with what to write."""
    said = refusal(loaded, {"made": MADE.replace("Is {{ outputs }} polite?", template)})
    assert "scorers/made.py, line 3)" in said
    assert advice in said


def test_a_template_in_single_braces(loaded) -> None:
    """A variable in single braces beside one in double braces, which MLflow takes, stops the start with its line."""
    files = {"made": MADE.replace("Is {{ outputs }}", "To {question}, is {{ outputs }}")}
    said = refusal(loaded, files, judge_model="openai:/x")
    assert said.startswith("scorers/made.py, line 3: the template has {question}, which nothing replaces")
    assert "Write {{ inputs }} in its place" in said
    assert loaded(files) == {}  # without a model it does not run, and harms nobody


def test_any_text_is_warned_of(loaded) -> None:
    """A judge whose value may be any text runs, with a warning that says what to write."""
    files = {"made": MADE.replace(", feedback_value_type=bool", "")}
    with structlog.testing.capture_logs() as logs:
        assert set(loaded(files, judge_model="openai:/x")) == {"tone"}
    [warning] = [each for each in logs if each["log_level"] == "warning"]
    assert warning["place"] == "scorers/made.py, line 3"
    assert "feedback_value_type=str" in warning["event"]
    assert 'Literal["yes", "no"]' in warning["fix"]


def test_find_one(project: Path) -> None:
    """One scorer is found by its name, by its class, or among the built-ins, also where it is switched off."""
    write(project, one=PLAIN.format(name="a"))
    rules = {"a": {"enabled": False}, "polite": {"builtin": "Guidelines", "arguments": {"guidelines": "Be polite."}}}
    settings = Settings(judge_model="openai:/x", scorers=rules)
    assert find_scorer(settings, "a").name == "a"
    assert find_scorer(settings, "Guidelines").name == "polite"
    assert find_scorer(settings, "Safety").model == "openai:/x"
    assert find_scorer(settings, "polite", "openai:/y").model == "openai:/y"
    with pytest.raises(ConfigurationError, match=r"There is no scorer polit; did you mean polite\?"):
        find_scorer(settings, "polit")
    with pytest.raises(ConfigurationError, match="safety asks a model, and none is set"):
        find_scorer(Settings(), "Safety")


@scorer
def _plain(trace):
    return True


class _OfLibrary(Scorer):
    """A scorer as MLflow wraps those of other libraries."""

    _model: str | None = PrivateAttr(default=None)

    @property
    def kind(self) -> ScorerKind:
        return ScorerKind.THIRD_PARTY

    def __call__(self, *, outputs: Any = None) -> bool:
        return True


@pytest.mark.parametrize(
    "judge",
    [
        Safety(),
        Fluency(model="openai:/own"),
        Guidelines(guidelines="Be polite."),
        KnowledgeRetention(),
        make_judge(name="tone", instructions="{{ outputs }}?", feedback_value_type=Literal["yes", "no"]),
        make_judge(name="long", instructions="{{ conversation }}?", feedback_value_type=bool),
        make_scorer_ensemble(name="both", scorers=[Safety(), Fluency()], ensemble_fn="majority_vote"),
    ],
    ids=lambda judge: judge.name,
)
def test_a_copy_with_another_model(judge) -> None:
    """A copy asks the other model, in every part of it, and the judge itself asks what it did."""
    before = [named_model(part) for part in flatten_scorers([judge])]
    copy = with_model(judge, "anthropic:/other")
    parts = flatten_scorers([copy])
    assert [named_model(part) for part in parts] == ["anthropic:/other"] * len(parts)
    assert [named_model(part) for part in flatten_scorers([judge])] == before
    assert (copy.name, copy.is_session_level_scorer) == (judge.name, judge.is_session_level_scorer)
    inner = getattr(copy, "last_turn_scorer", copy)
    if hasattr(inner, "_get_judge"):
        assert inner._get_judge().model == "anthropic:/other"


def test_what_asks_no_model() -> None:
    """A function asks no model, and neither do the built-ins that only look at the text."""
    assert not asks_model(_plain)
    assert not asks_model(RegexMatch(pattern="x"))
    assert asks_model(Safety())
    with pytest.raises(ConfigurationError, match="takes no judge model"):
        with_model(_plain, "openai:/x")


def test_a_scorer_of_another_library() -> None:
    """Made with a model, it asks that one and takes no other; made without, it is plain code."""
    asking, plain = _OfLibrary(name="faithful"), _OfLibrary(name="exact")
    asking._model = "openai:/own"
    assert (asks_model(asking), named_model(asking)) == (True, "openai:/own")
    assert (asks_model(plain), named_model(plain)) == (False, None)
    with pytest.raises(ConfigurationError, match="name the model where it is made"):
        with_model(asking, "openai:/x")


@pytest.fixture
def catalog(project: Path) -> ScorerCatalog:
    """A catalog of one scorer, `a`, with a rule."""
    write(project, one=PLAIN.format(name="a"))
    (project / "gateway.toml").write_text("[scorers.a]\nshare = 0.5\n")
    return ScorerCatalog(LiveSettings(load_settings()))


def names(catalog: ScorerCatalog) -> list[str]:
    return sorted(each.name for each in catalog.now)


def test_rules_change_while_running(catalog: ScorerCatalog, project: Path) -> None:
    """A rule that was written anew counts from the next look on, with the very scorers that there are."""
    [before] = catalog.now
    assert not catalog.refresh()
    (project / "gateway.toml").write_text("[scorers.a]\nshare = 0.25\nfilter = { status = 'error' }\n")
    assert catalog.refresh()
    [now] = catalog.now
    assert (now.rule.share, now.rule.filter.status) == (0.25, "error")
    assert now.scorer is before.scorer
    (project / "gateway.toml").write_text("[scorers.a]\nenabled = false\n[scorers.PIIDetection]\n")
    assert catalog.refresh()
    assert names(catalog) == ["pii_detection"]


def test_files_change_while_running(catalog: ScorerCatalog, project: Path) -> None:
    """A file that was written anew is what runs, even twice within a second, and a new file's scorers come along."""
    versions = {catalog.now[0].version}
    for value in ("1.25", "2.25", "3.25"):  # of one length: to Python the compiled files look alike
        write(project, one=PLAIN.format(name="a").replace("True", value))
        assert catalog.refresh()
        assert catalog.now[0].scorer.run(trace=None) == float(value)
        versions.add(catalog.now[0].version)
    assert len(versions) == 4
    write(project, two="from ._shared import b\n", _shared=PLAIN.format(name="b"))
    assert catalog.refresh()
    assert names(catalog) == ["a", "b"]
    write(project, _shared=PLAIN.format(name="c").replace("def c", "def b").replace("True", "7"))
    assert catalog.refresh()
    assert {each.name: each.scorer.run(trace=None) for each in catalog.now}["b"] == 7
    (project / "scorers" / "two.py").unlink()
    assert catalog.refresh()
    assert names(catalog) == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("scorers/two.py", "def broken(:\n", "two.py, line 1"),
        ("scorers/two.py", PLAIN.format(name="a"), "another file has a scorer named a"),
        ("gateway.toml", "[scorers.b]\n", "gateway.toml, line 1: [scorers.b]"),
        ("gateway.toml", "[scorers.a]\n\nshare = 7\n", "gateway.toml, line 3"),
        ("gateway.toml", "[scorers.a\n", "line 1"),
        ("gateway.toml", "[scorers.Safety]\njudge_model = 'opnai:/x'\n", "gateway.toml, line 1: safety cannot ask"),
    ],
)
def test_a_broken_change_changes_nothing(
    catalog: ScorerCatalog, project: Path, name: str, text: str, said: str
) -> None:
    """What is broken is logged once with its place, and the list before stays until it is right again."""
    before = catalog.now
    (project / name).write_text(text)
    with structlog.testing.capture_logs() as logs:
        assert not catalog.refresh()
        assert not catalog.refresh()
    assert catalog.now is before
    [error] = [each for each in logs if each["log_level"] == "error"]
    assert said in error["problem"].replace("(two.py", "two.py")
    assert before[0].scorer.run(trace=None) is True
    if name == "gateway.toml":
        (project / name).write_text("[scorers.a]\nshare = 0.125\n")
    else:
        (project / name).write_text(PLAIN.format(name="b"))
    assert catalog.refresh()
    assert "a" in names(catalog)


def test_other_settings_stay(catalog: ScorerCatalog, project: Path) -> None:
    """What else is written anew, as the judge model, waits for a restart."""
    (project / "gateway.toml").write_text('judge_model = "openai:/x"\n[scorers.Safety]\n')
    assert catalog.refresh()
    assert names(catalog) == ["a"]


async def test_watch(catalog: ScorerCatalog, project: Path) -> None:
    """Watching, a change is there within some seconds, without anybody asking."""
    watching = asyncio.create_task(catalog.watch())
    (project / "gateway.toml").write_text("[scorers.a]\nshare = 0.25\n")
    async with asyncio.timeout(30):
        while catalog.now[0].rule.share != 0.25:  # noqa: ASYNC110 - it is a list that changes, and no event
            await asyncio.sleep(0.02)
    watching.cancel()
