"""Loads the plug-in folders ``agents/`` and ``scorers/`` by path.

The SDK's import name is ``agents``, so our folder of that name must never become a package that could shadow it: each
agent's folder is loaded as ``agent_plugins.<name>``, each scorer file as ``scorer_plugins.<name>``. Relative imports
inside a folder work.
"""

import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents import Agent, Model

from gateway.errors import ConfigurationError

_VERSION_DIGITS = 12


@dataclass(frozen=True)
class AgentPlugin:
    """One folder of ``agents/``."""

    name: str
    """Name of the folder: what a request calls the agent by."""
    agent: Agent[Any]
    offline_model: Model | None
    """Model from ``offline.py``; ``None`` if the folder has none."""
    version: str
    """First digits of the SHA-256 of the folder's files."""
    folder: Path
    created_at: int
    """When its ``agent.py`` was last written, seconds since the epoch."""


def load_agents(folder: Path) -> dict[str, AgentPlugin]:
    """Return the agents of ``folder`` by name, in order of name.

    Raises:
        ConfigurationError: the folder is missing or empty, or an agent cannot be loaded; the message names the file.
    """
    if not folder.is_dir():
        raise ConfigurationError(
            f"There is no agents folder {folder}. Make one with `gateway init`, or set GATEWAY_AGENTS_DIR."
        )
    if (folder / "__init__.py").exists():
        raise ConfigurationError(f"{folder / '__init__.py'} would shadow the SDK's package `agents`; remove it.")
    found = [path for path in sorted(folder.iterdir()) if (path / "agent.py").is_file()]
    if not found:
        raise ConfigurationError(f"{folder} holds no agent: an agent is a folder with an agent.py that sets `agent`.")
    return {path.name: _load_agent(path) for path in found}


def load_modules(folder: Path, package: str) -> Iterator[types.ModuleType]:
    """Yield the modules of the Python files of ``folder`` in order of name; files starting with ``_`` are helpers.

    Raises:
        ConfigurationError: a file cannot be imported; the message names it.
    """
    _make_package(package, folder)
    for path in sorted(folder.glob("[!_]*.py")):
        yield _load(f"{package}.{path.stem}", path)


def folder_version(folder: Path) -> str:
    """Return the first digits of the SHA-256 over names and contents of the folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in place.parts):
            content = path.read_bytes()
            digest.update(f"{place.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:_VERSION_DIGITS]


def _load_agent(folder: Path) -> AgentPlugin:
    if not folder.name.isidentifier():
        raise ConfigurationError(f"{folder}: an agent's folder must be named like a Python variable.")
    package = f"agent_plugins.{folder.name}"
    _make_package("agent_plugins", folder.parent)
    _make_package(package, folder)
    agent = getattr(_load(f"{package}.agent", folder / "agent.py"), "agent", None)
    if not isinstance(agent, Agent):
        raise ConfigurationError(f"{folder / 'agent.py'} must set `agent` to an Agent of the OpenAI Agents SDK.")
    offline_model = None
    if (folder / "offline.py").is_file():
        offline_model = getattr(_load(f"{package}.offline", folder / "offline.py"), "model", None)
        if not isinstance(offline_model, Model):
            raise ConfigurationError(f"{folder / 'offline.py'} must set `model` to a Model of the OpenAI Agents SDK.")
    written_at = int((folder / "agent.py").stat().st_mtime)
    return AgentPlugin(folder.name, agent, offline_model, folder_version(folder), folder, written_at)


def _make_package(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _load(name: str, path: Path) -> types.ModuleType:
    """Import ``path`` as ``name``; a sibling that imported it before gets the very same module."""
    if (loaded := sys.modules.get(name)) is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself must not end the gateway without a word
        sys.modules.pop(name, None)
        raise ConfigurationError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
