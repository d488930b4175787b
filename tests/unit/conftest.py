"""Fixtures of the unit tests: nothing here opens a socket or a file."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
SCORERS_DIR = HERE.parents[1] / "scorers"


def _load_below(package: str, folder: Path, stem: str) -> ModuleType:
    """Import `folder/stem.py` as a member of a package that exists in memory only: its siblings can be imported."""
    if package not in sys.modules:
        parent = ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    return importlib.import_module(f"{package}.{stem}")


@pytest.fixture(scope="session")
def traces() -> ModuleType:
    """The builder of in-memory MLflow traces, `tests/unit/traces.py`."""
    return _load_below("unit_test_helpers", HERE, "traces")


@pytest.fixture(scope="session")
def shipped_scorers():
    """Load a file of `scorers/` by its name, as the evaluator does."""
    return lambda stem: _load_below("shipped_scorers", SCORERS_DIR, stem)
