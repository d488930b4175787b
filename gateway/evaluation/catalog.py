"""Which scorers run live: what the folder ``scorers/`` holds and MLflow has built in, by the rules of ``gateway.toml``.

Both may change while the evaluator runs: `ScorerCatalog` looks once a second, and what is broken changes nothing.
"""

import ast
import asyncio
import hashlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import structlog
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import builtin_scorers
from mlflow.genai.scorers.base import Scorer
from mlflow.genai.scorers.builtin_scorers import BuiltInScorer
from pydantic import ValidationError

from gateway.errors import ConfigurationError
from gateway.evaluation.judge_models import asks_model, named_model, with_model
from gateway.evaluation.mistakes import Finding, explain_refusal, mistakes_of_scorers, mistakes_of_settings
from gateway.evaluation.scoring import LiveScorer
from gateway.plugins import load_modules
from gateway.reloading import LiveSettings, Stamp, stamp_of
from gateway.rules import ScorerRule
from gateway.settings import Settings, config_path
from gateway.toml_lines import place_of

log = structlog.get_logger(__name__)

_PACKAGE = "scorer_plugins"
_LOOK_S = 1.0  # somebody has just saved the file and watches

_Found = dict[str, LiveScorer]


def load_scorers(settings: Settings) -> list[LiveScorer]:
    """Return the scorers that run live.

    Judges are left out while no judge model is set: neither by their rule, nor by themselves, nor in the settings.

    Raises:
        ConfigurationError: a file cannot be imported, two scorers share a name, a rule names no scorer, or a scorer
            can never work; the message names the place and what to do.
    """
    live = [each for each in find_scorers(settings).values() if runs_live(each)]
    _heed(mistakes_of_scorers(live))
    return live


def load_for_start(settings: Settings) -> list[LiveScorer]:
    """Do what `load_scorers` does, and look at what is around the scorers too: judge models, their keys, stores.

    Raises:
        ConfigurationError: as `load_scorers` does, or a judge cannot be asked, or MLflow cannot do what it must.
    """
    live = load_scorers(settings)
    _heed(mistakes_of_settings(settings, live))
    return live


def _heed(findings: list[Finding]) -> None:
    if errors := [finding for finding in findings if finding.severity == "error"]:
        raise ConfigurationError("\n".join(map(str, errors)))
    for finding in findings:
        log.warning(finding.problem, place=finding.place, fix=finding.fix)


def runs_live(live: LiveScorer) -> bool:
    """Whether a scorer runs on live traffic: it is not switched off, and has a model if it needs one."""
    return live.rule.enabled and (live.model is not None or not asks_model(live.scorer))


def find_scorers(settings: Settings) -> _Found:
    """Return all scorers by name, those that do not run live included.

    Raises:
        ConfigurationError: as of `load_scorers`, but for scorers that can never work.
    """
    found = _in_folder(settings)
    problems = [*_apply_rules(found, settings), *_unknown_agents(settings)]
    if problems:
        raise ConfigurationError("\n".join(problems))
    return found


def find_scorer(settings: Settings, name: str, judge_model: str | None = None) -> LiveScorer:
    """Return one scorer, also one that does not run live: by its name, or MLflow's built-in of that class.

    Args:
        settings: with the rules.
        name: the scorer's, or a class's.
        judge_model: what it asks; ``None``: what it would ask live.

    Raises:
        ConfigurationError: there is none, it has no model to ask, or as of `find_scorers`.
    """
    found = find_scorers(settings)
    live = found.get(name) or next((each for each in found.values() if type(each.scorer).__name__ == name), None)
    if live is None:
        if name not in _builtins():
            raise ConfigurationError(_sentence(_no_such_scorer(name, found, settings)))
        live = _asking(LiveScorer(builtin(name), "builtin", ScorerRule(), place="MLflow"), settings.judge_model)
    if judge_model is not None:
        live = _asking(replace(live, rule=live.rule.model_copy(update={"judge_model": judge_model})), None)
    if live.model is None and asks_model(live.scorer):
        raise ConfigurationError(f"{live.name} asks a model, and none is set: set GATEWAY_JUDGE_MODEL, or name one.")
    return live


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def builtin(name: str, arguments: dict[str, Any] | None = None, called: str | None = None) -> Scorer:
    """Make MLflow's built-in scorer of a class, named ``called`` or as MLflow names it.

    Raises:
        ConfigurationError: there is none, or the arguments are not its own; the message has no place.
    """
    kind = _builtins().get(name)
    if kind is None:
        near = get_close_matches(name, _builtins(), n=1)
        raise ConfigurationError(
            f"MLflow has no built-in scorer {name}{f'; did you mean {near[0]}?' if near else '.'} It has "
            f"{', '.join(sorted(_builtins()))}."
        )
    given = dict(arguments or {})
    for own, instead in (("name", "the name of the table is its name"), ("model", "set judge_model instead")):
        if own in given:
            raise ConfigurationError(f"{name} takes no argument `{own}` here: {instead}.")
    known = sorted(set(kind.model_fields) - {"name", "model", "required_columns"})
    if unknown := sorted(set(given) - set(known)):
        raise ConfigurationError(f"{name} takes no argument {', '.join(unknown)}; it takes {', '.join(known)}.")
    try:
        return kind(**given, **({"name": called} if called else {}))
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigurationError(f"{name} cannot be made with these `arguments`: {said}.") from None
    except (MlflowException, TypeError) as error:
        raise ConfigurationError(f"{name} cannot be made with these `arguments`: {error}") from None


def _builtins() -> dict[str, type[BuiltInScorer]]:
    kinds = builtin_scorers._get_all_concrete_builtin_scorers()  # noqa: SLF001 - the public one makes them all
    return {kind.__name__: kind for kind in kinds}


def _in_folder(settings: Settings) -> _Found:
    """Return the scorers of the folder, each with the default rule."""
    folder = settings.scorers_dir
    if not folder.is_dir():
        raise ConfigurationError(
            f"There is no scorers folder {folder}. Make one with `gateway init`, or set GATEWAY_SCORERS_DIR."
        )
    found: _Found = {}
    for path, scorer in _exposed(folder):
        name = str(scorer.name)
        if name in found and found[name].scorer is not scorer:
            raise ConfigurationError(
                f"{path}: another file has a scorer named {name} already ({found[name].place}); rename one."
            )
        if name not in found:
            found[name] = LiveScorer(scorer, _version(path), ScorerRule(), place=str(path))
    return found


def _exposed(folder: Path) -> list[tuple[Path, Scorer]]:
    """Return the scorers of each file, those last that it has imported: they belong to the file that made them."""
    made: list[tuple[Path, Scorer]] = []
    imported: list[tuple[Path, Scorer]] = []
    for module in _modules(folder):
        path = folder / Path(module.__file__ or "").name
        names = _imports(path)
        for name, value in vars(module).items():
            if isinstance(value, Scorer):
                (imported if name in names else made).append((path, value))
    return made + imported


def _imports(path: Path) -> set[str]:
    nodes = ast.parse(path.read_bytes()).body
    return {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def _modules(folder: Path) -> Iterator[ModuleType]:
    absolute = folder.absolute()  # as Python has it, which keeps a module from being imported once more
    try:
        yield from load_modules(absolute, _PACKAGE)
    except ConfigurationError as error:
        if error.__cause__ is None:
            raise
        line = _line_in(absolute, error.__cause__)
        said = f"{error}{line}{explain_refusal(error.__cause__)}"
        raise ConfigurationError(said.replace(str(absolute), str(folder))) from error.__cause__


def _line_in(folder: Path, error: BaseException) -> str:
    """Return the line of the folder's files where an error arose, as " (scorers/x.py, line 3)"; nothing if in none."""
    if isinstance(error, SyntaxError):
        return ""  # says so itself
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _apply_rules(found: _Found, settings: Settings) -> list[str]:
    """Give each scorer its rule and its model, and make the built-ins that rules ask for; return what is wrong."""
    problems: list[str] = []
    ruled: dict[str, str] = {}
    for key, rule in settings.scorers.items():
        try:
            made = _ruled(found, key, rule, settings)
        except ConfigurationError as error:
            problems.append(_told(error, key))
            continue
        found[made.name] = made
        if (other := ruled.setdefault(made.name, key)) != key:
            problems.append(_told(f"[scorers.{other}] is a rule for {made.name} already; keep one of them.", key))
    for name, live in found.items():
        try:
            found[name] = _asking(live, settings.judge_model)
        except ConfigurationError as error:
            problems.append(_told(error, ruled.get(name, name)))
    return problems


def _ruled(found: _Found, key: str, rule: ScorerRule, settings: Settings) -> LiveScorer:
    """Return the scorer that a rule is for, with the rule."""
    kind = rule.builtin or key
    if rule.builtin is None and key in found:
        if rule.arguments:
            raise ConfigurationError(f"{key} is made in {found[key].place}, and takes no `arguments` from here.")
        return replace(found[key], rule=rule)
    if rule.builtin is None and key not in _builtins():
        raise ConfigurationError(_no_such_scorer(key, found, settings))
    scorer = builtin(kind, rule.arguments, called=key if rule.builtin else None)
    there = found.get(str(scorer.name))
    if there is None:
        made = json.dumps([kind, rule.arguments], sort_keys=True)
        place = place_of(config_path(), "scorers", key) or "the settings"
        return LiveScorer(scorer, hashlib.sha256(made.encode()).hexdigest()[:12], rule, place=place)
    if type(there.scorer) is type(scorer) and not rule.arguments:
        return replace(there, rule=rule)  # the very scorer that the rule means
    raise ConfigurationError(
        f"{there.place} has a scorer named {scorer.name} already; give this one another name, as "
        f'[scorers.my_{scorer.name}] with builtin = "{kind}".'
    )


def _no_such_scorer(key: str, found: _Found, settings: Settings) -> str:
    near = get_close_matches(key, [*found, *_builtins()], n=1)
    return (
        f"there is no scorer {key}{f'; did you mean {near[0]}?' if near else '.'} {settings.scorers_dir} holds "
        f"{', '.join(sorted(found)) or 'none'}; MLflow's built-ins go by the names of their classes, as Safety."
    )


def _asking(live: LiveScorer, default: str | None) -> LiveScorer:
    """Return a scorer with the model that it asks, which decides its version too; plain code as it is."""
    if not asks_model(live.scorer):
        if live.rule.judge_model:
            raise ConfigurationError(f"{live.name} is plain code and asks no model: leave `judge_model` out.")
        return live
    model = live.rule.judge_model or named_model(live.scorer) or default
    if model is None:
        return live
    scorer = live.scorer
    if live.rule.judge_model or not named_model(scorer):
        scorer = with_model(scorer, model)
    version = hashlib.sha256(f"{live.version}\0{model}".encode()).hexdigest()[:12]
    return replace(live, scorer=scorer, version=version, model=model)


def _told(error: ConfigurationError | str, key: str) -> str:
    place = place_of(config_path(), "scorers", key)
    return f"{f'{place}: ' if place else ''}[scorers.{key}]: {error}"


def _unknown_agents(settings: Settings) -> Iterator[str]:
    """Complain of rules for agents that are not there, where the agents are: they would never score anything."""
    if not settings.agents_dir.is_dir():
        return
    known = sorted(path.parent.name for path in settings.agents_dir.glob("*/agent.py"))
    for key, rule in settings.scorers.items():
        for agent in sorted(set(rule.agents or ()) - set(known)):
            near = get_close_matches(agent, known, n=1)
            place = place_of(config_path(), "scorers", key, "agents")
            yield (
                f"{f'{place}: ' if place else ''}[scorers.{key}]: there is no agent {agent}"
                f"{f'; did you mean {near[0]}?' if near else '.'} {settings.agents_dir} holds {', '.join(known)}."
            )


def _version(path: Path) -> str:
    """Return a hash of a file and of the folder's helpers."""
    digest = hashlib.sha256()
    for each in (path, *sorted(path.parent.glob("_*.py"))):
        digest.update(each.read_bytes())
    return digest.hexdigest()[:12]


class ScorerCatalog:
    """The scorers that run live, as they are now. One an evaluator."""

    def __init__(self, settings: LiveSettings):
        """Load them; raise `ConfigurationError` as `load_for_start` does: at the start, what is broken stops it.

        What MLflow reads from the environment must be set before (`gateway.evaluation.store.configure_mlflow`).
        """
        self._settings = settings
        self._at_start = settings.now
        self._rules, self._files = settings.now.scorers, self._stamps()
        self._imported = self._files
        self.now: list[LiveScorer] = load_for_start(settings.now)
        """The newest list in which nothing was broken. Take it once for each piece of work."""

    async def watch(self) -> None:
        """Look at the rules and at the files each second until cancelled, off the event loop."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> bool:
        """Load the scorers again if rules or files have changed since the last look; return whether they are new.

        Blocks. What is broken is logged with its place, and the list before stays until it is right again.
        """
        self._settings.refresh()
        rules, files = self._settings.now.scorers, self._stamps()
        if (rules, files) == (self._rules, self._files):
            return False
        self._rules, self._files = rules, files
        # Of the settings only the rules may change while running; the rest is as at the start.
        settings = self._at_start.model_copy(update={"scorers": rules})
        try:
            with nullcontext() if files == self._imported else _imported_anew(self._at_start.scorers_dir):
                now = load_for_start(settings)
        except (ConfigurationError, OSError) as error:
            log.error("the scorers were changed and are not valid; the ones before stay", problem=str(error))
            return False
        self._imported = files
        log.info("the scorers were loaded again", **_changes(self.now, now))
        self.now = now
        return True

    def _stamps(self) -> dict[Path, Stamp | None]:
        return {path: stamp_of(path) for path in self._at_start.scorers_dir.glob("*.py")}


@contextmanager
def _imported_anew(folder: Path) -> Iterator[None]:
    """Let the folder's modules be imported anew; if that fails, the ones before are what is imported."""
    before = {name: module for name, module in list(sys.modules.items()) if _is_plugin(name)}
    for name in before:
        del sys.modules[name]
    for path in folder.glob("*.py"):
        # Compiled code is told from older one by whole seconds and size: of two saves in a second, it may be the first.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        for name in [name for name in list(sys.modules) if _is_plugin(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        raise


def _is_plugin(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")


def _changes(before: list[LiveScorer], now: list[LiveScorer]) -> dict[str, list[str]]:
    """Return the names of the scorers that came, went, and are others than before."""
    old, new = ({each.name: (each.version, each.rule) for each in scorers} for scorers in (before, now))
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
    }
