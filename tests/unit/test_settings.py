"""Settings: where they come from, which source wins, and what a mistake in one says."""

import os

import pytest

from gateway.errors import ConfigurationError
from gateway.rules import ScorerRule
from gateway.settings import Settings, load_settings, sibling_database


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    """No setting in the environment, and an empty working folder."""
    for name in list(os.environ):
        if name.startswith(("GATEWAY_", "OPENAI_")) or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def toml(monkeypatch, tmp_path):
    """Write a configuration file that `GATEWAY_CONFIG` names."""

    def write(text: str) -> None:
        path = tmp_path / "other.toml"
        path.write_text(text)
        monkeypatch.setenv("GATEWAY_CONFIG", str(path))

    return write


def problem() -> str:
    """What `load_settings` complains about, without the headline."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    return str(caught.value).partition("\n")[2] or str(caught.value)


def test_defaults():
    """Nothing has to be set."""
    settings = load_settings()
    assert settings.port == 8000
    assert settings.database_url is None
    assert settings.runs_own_mlflow


def test_file_in_the_working_folder(tmp_path):
    """`gateway.toml` in the working folder is read."""
    (tmp_path / "gateway.toml").write_text("port = 8100\n[scorers.a]\nshare = 0.5\n")
    settings = load_settings()
    assert settings.port == 8100
    assert settings.scorers == {"a": ScorerRule(share=0.5)}


def test_order_of_sources(monkeypatch, toml):
    """An argument wins over the environment, which wins over the file, which wins over the default."""
    toml("port = 8100\nmlflow_port = 5100\nmax_turns = 7\n")
    monkeypatch.setenv("GATEWAY_PORT", "8200")
    monkeypatch.setenv("GATEWAY_MLFLOW_PORT", "5200")
    settings = Settings(port=8300)
    assert (settings.port, settings.mlflow_port, settings.max_turns, settings.history_turns) == (8300, 5200, 7, 20)


def test_config_names_another_file(tmp_path, toml):
    """The file that `GATEWAY_CONFIG` names is read instead of the one in the working folder."""
    (tmp_path / "gateway.toml").write_text("port = 8100\n")
    toml("max_turns = 7\n")
    settings = load_settings()
    assert (settings.port, settings.max_turns) == (8000, 7)


def test_config_names_no_file(monkeypatch):
    """A `GATEWAY_CONFIG` that names no file is a mistake, not a default."""
    monkeypatch.setenv("GATEWAY_CONFIG", "missing.toml")
    assert problem() == "GATEWAY_CONFIG names missing.toml, and there is no such file."


def test_empty_variable_counts_as_unset(monkeypatch):
    """An empty environment variable means the default."""
    monkeypatch.setenv("GATEWAY_PORT", "")
    assert load_settings().port == 8000


@pytest.mark.parametrize("name", ["DATABASE_URL", "GATEWAY_DATABASE_URL"])
def test_database_url(monkeypatch, name):
    """The database is found under our own name and under the usual one."""
    monkeypatch.setenv(name, "postgresql://u:p@db/gateway")
    assert load_settings().database_url.get_secret_value() == "postgresql://u:p@db/gateway"


def test_own_database_url_wins(monkeypatch):
    """`GATEWAY_DATABASE_URL` wins over a `DATABASE_URL` that may be meant for something else."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://other/x")
    monkeypatch.setenv("GATEWAY_DATABASE_URL", "postgresql://ours/gateway")
    assert load_settings().database_url.get_secret_value() == "postgresql://ours/gateway"


def test_database_url_in_the_file(toml):
    """The file may name the database too."""
    toml('database_url = "postgresql://db/gateway"\n')
    assert load_settings().database_url.get_secret_value() == "postgresql://db/gateway"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_PORT", "0"),
        ("GATEWAY_PORT", "eighty"),
        ("GATEWAY_SAMPLE_RATE", "1.1"),
        ("GATEWAY_SAMPLE_RATE", "-0.1"),
        ("GATEWAY_LOG_LEVEL", "loud"),
        ("GATEWAY_RUN_TIMEOUT_S", "0"),
        ("GATEWAY_SECRET_KEY", "too short"),
        ("GATEWAY_MODEL_API", "assistants"),
        ("GATEWAY_WEB_WORKERS", "1.5"),
    ],
)
def test_bad_value(monkeypatch, name, value):
    """A bad value gives one line that names the setting as it is written, without a stack of details."""
    monkeypatch.setenv(name, value)
    text = problem()
    assert text.startswith(f"  {name}: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("pssst", "secret 1 of 1 has fewer than 16 characters"),
        ("  pssst              ", "secret 1 of 1 has fewer than 16 characters"),
        ("pssst, a long secret by itself", "secret 1 of 2 has fewer than 16 characters"),
        ("a long pssst by itself,pssst", "secret 2 of 2 has fewer than 16 characters"),
        ("a long pssst by itself,", "secret 2 of 2 is empty; there is a comma too many"),
        (",a long pssst by itself", "secret 1 of 2 is empty; there is a comma too many"),
        ("a long pssst by itself, ,another long pssst", "secret 2 of 3 is empty; there is a comma too many"),
    ],
)
def test_bad_secret(monkeypatch, value, expected):
    """What is wrong with which secret is said without the secret."""
    monkeypatch.setenv("GATEWAY_SECRET_KEY", value)
    assert problem() == f"  GATEWAY_SECRET_KEY: Value error, {expected}"


def test_several_secrets(monkeypatch):
    """Secrets are separated by commas, and blanks around them do not count."""
    monkeypatch.setenv("GATEWAY_SECRET_KEY", " a newer secret of ours,\tan older secret of ours\n")
    assert load_settings().secret_key.get_secret_value() == "a newer secret of ours,an older secret of ours"


def test_bad_values_in_the_file(toml):
    """Each problem of a file has a line of its own, scorer rules named as their table."""
    toml("port = 0\n[scorers.tone]\nshare = 2\nshape = 1\n")
    lines = problem().splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "  GATEWAY_PORT",
        "  [scorers.tone] share",
        "  [scorers.tone] shape",
    ]


def test_unknown_key(toml):
    """A key that is no setting is refused by name: it is most likely misspelled."""
    toml("prot = 8100\n")
    text = problem()
    assert text.startswith("  GATEWAY_PROT: Extra inputs are not permitted (")
    assert text.endswith("other.toml, line 1)")


@pytest.mark.parametrize("text", ["port = ", "[scorers", "port 8100", "port = 1\nport = 2"])
def test_bad_toml(toml, text):
    """A file that is not TOML is named, with the place."""
    toml(text)
    with pytest.raises(ConfigurationError, match=r"other\.toml is not valid TOML: .*(line|end of)"):
        load_settings()


def test_toml_that_is_no_text(monkeypatch, tmp_path):
    """A file that is no text is named as well."""
    (tmp_path / "gateway.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"gateway\.toml is not valid TOML"):
        load_settings()


def test_model_without_key(monkeypatch):
    """A model without a key is refused, and the message says both ways out."""
    monkeypatch.setenv("GATEWAY_MODEL", "some-model")
    text = problem()
    assert "\n" not in text
    assert all(name in text for name in ("GATEWAY_MODEL", "OPENAI_API_KEY", "offline"))


def test_model_with_key(monkeypatch):
    """The model's key and address are read from the variables that the OpenAI clients read."""
    monkeypatch.setenv("GATEWAY_MODEL", "some-model")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1")
    settings = load_settings()
    assert settings.openai_api_key.get_secret_value() == "sk-x"
    assert settings.openai_base_url == "http://localhost:11434/v1"


def test_scorer_rules_in_the_environment(monkeypatch):
    """Rules can be given as JSON."""
    monkeypatch.setenv("GATEWAY_SCORERS", '{"a": {"enabled": false}}')
    assert load_settings().scorers == {"a": ScorerRule(enabled=False)}


def test_bad_json_in_the_environment(monkeypatch):
    """Rules that are not JSON are blamed on the variable, not on the file."""
    monkeypatch.setenv("GATEWAY_SCORERS", "{")
    text = problem()
    assert "GATEWAY_SCORERS" in text
    assert "TOML" not in text


def test_secrets_are_not_shown():
    """No secret shows in the settings' text."""
    secrets = {
        "database_url": "postgresql://u:hush-1@db/x",
        "secret_key": "hush-2-and-a-bit-more",
        "openai_api_key": "hush-3",
        "judge_api_key": "hush-4",
    }
    settings = Settings(**secrets)
    assert "hush" not in repr(settings)
    assert "hush" not in str(settings.model_dump())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "http://127.0.0.1:5000"),
        ({"mlflow_host": "0.0.0.0", "mlflow_port": 5100}, "http://127.0.0.1:5100"),
        ({"mlflow_host": "::"}, "http://[::1]:5000"),
        ({"mlflow_tracking_uri": "https://mlflow.example.com/"}, "https://mlflow.example.com"),
        ({"mlflow_tracking_uri": "postgresql://db/mlflow"}, None),
        ({"mlflow_tracking_uri": "postgresql://db/mlflow", "mlflow_url": "https://ui.example.com/"}, "https://ui.example.com"),
    ],
)  # fmt: skip
def test_mlflow_ui(given, expected):
    """MLflow's address is the one named, else that of an HTTP store, else our own server's as a client reaches it."""
    assert Settings(**given).mlflow_ui == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p%40@db:5432/gateway", "postgresql://u:p%40@db:5432/mlflow"),
        ("postgresql://db/gateway?sslmode=require&x=1", "postgresql://db/mlflow?sslmode=require&x=1"),
        ("postgresql://db", "postgresql://db/mlflow"),
        ("postgresql://[::1]:5432/gateway", "postgresql://[::1]:5432/mlflow"),
    ],
)
def test_sibling_database(url, expected):
    """A sibling database differs in its name alone."""
    assert sibling_database(url, "mlflow") == expected
