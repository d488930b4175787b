"""Real parts, shared by the session: a Postgres, an MLflow database in it. Each test gets a database of its own."""

import gc
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import structlog

from gateway.settings import Settings, sibling_database
from gateway.storage.database import create_database, migrate
from gateway.storage.embedded import EmbeddedPostgres

ROOT = Path(__file__).parent.parent

# Importing makes most of a million objects that stay: by default, the collector walks them again and again.
gc.set_threshold(50_000, 20, 50)

# Without this, structlog draws every stack trace with all its variables, which takes a second each.
structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])


_OF_JUDGES = ("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL", "OPENAI_API_BASE", "OPENAI_API_KEY", "OPENAI_BASE_URL")


@pytest.fixture(autouse=True)
def judges_of_one_test_alone() -> Iterator[None]:
    """What a test tells MLflow's judges is no other test's: an evaluator sets it for its whole process."""
    # Judges take the default model over when they are made, which is when their file is imported: also the one that
    # MLflow has where nobody has set any.
    for module in [name for name in sys.modules if name.startswith("scorer_plugins")]:
        del sys.modules[module]
    before = {name: os.environ.get(name) for name in _OF_JUDGES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's own environment out of the tests."""
    for name in list(os.environ):
        if name.startswith(("GATEWAY_", "OPENAI_", "MLFLOW_")) or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("GATEWAY_CONFIG", str(ROOT / "gateway.toml"))


@pytest.fixture(autouse=True)
def _mlflow_as_it_was() -> Iterator[None]:
    """Undo what a test, or an agent in it, has told MLflow for the whole process."""
    yield
    if (mlflow := sys.modules.get("mlflow")) is not None:
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Postgres whose database `gateway` is migrated: the template of the tests' databases."""
    postgres = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"))
    url = postgres.start()
    migrate(url)
    yield url
    postgres.stop()


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """A migrated, empty database of the test's own."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE gateway")
        yield sibling_database(postgres_url, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def make_settings(database_url: str, tmp_path: Path) -> Callable[..., Settings]:
    """Return settings on the test's database and home; keyword arguments override."""

    def make(**overrides: object) -> Settings:
        values: dict[str, object] = {
            "home": tmp_path / "home",
            "database_url": database_url,
            "agents_dir": ROOT / "agents",
            "scorers_dir": ROOT / "scorers",
            "secret_key": "a secret key for tests only",
            "trace_flush_s": 0.01,
        }
        return Settings(**(values | overrides))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def mlflow_uri(postgres_url: str) -> str:
    """A tracking URI of MLflow on a database of its own; each test takes an experiment of its own."""
    create_database(postgres_url, "mlflow")
    return sibling_database(postgres_url, "mlflow").replace("postgresql:", "postgresql+psycopg:", 1)
