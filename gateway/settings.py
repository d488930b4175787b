"""Every setting, its unit, and why that default.

A setting is read from ``gateway.toml`` in the working folder (or the file that ``GATEWAY_CONFIG`` names) and
overridden by the environment variable ``GATEWAY_<NAME>``. ``docs/settings.md`` lists them; a test keeps it true.
"""

import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from gateway.dataset_rules import DatasetRules
from gateway.errors import ConfigurationError
from gateway.rules import AgentRule, JudgeModelRule, ScorerRule, TailRule
from gateway.toml_lines import told_where

ENV_PREFIX = "GATEWAY_"

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The price list that MLflow ships, not the newest from the web: where the web is away, the first trace would wait
    # for it through every retry.
    "MLFLOW_MODEL_CATALOG_URI": "",
    # The same of LiteLLM's, where that is installed.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Environment of the processes that run MLflow, unless set otherwise: it calls nobody by itself."""


_FIELD_NAMED = re.compile(r'field "(\w+)"')


class Settings(BaseSettings):
    """The gateway's settings; see the module's docstring for where they come from."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, populate_by_name=True, env_ignore_empty=True
    )

    # Where it runs
    host: str = "127.0.0.1"
    """Address that the web process binds. Loopback: nobody else gets in before there are keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port of the HTTP API. Amazon's AgentCore and SageMaker want 8080."""
    mlflow_host: str = "127.0.0.1"
    """Address that the MLflow server binds. Loopback: it has no keys, and whoever reaches it reads every trace."""
    mlflow_port: int = Field(default=5000, ge=1, le=65535)
    """TCP port of the MLflow server that `gateway serve` runs."""
    home: Path = Path(".gateway")
    """Folder of everything that is kept: Postgres data, MLflow artifacts, the secret key, logs."""
    web_workers: int = Field(default=1, ge=1, le=64)
    """Web processes that share the port. One serves a few hundred requests/s; more only on more cores."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""
    shutdown_grace_s: float = Field(default=15.0, gt=0)
    """Seconds that a process gets to finish its work before it is ended. Container runtimes commonly give 30."""

    # What it serves
    agents_dir: Path = Path("agents")
    """Folder of the agents, one sub-folder each."""
    scorers_dir: Path = Path("scorers")
    """Folder of the scorers, one file each."""
    default_agent: str | None = None
    """Agent that answers when a request names none. ``None``: the first by name."""
    model: str | None = None
    """Language model of the agents that name none themselves. ``None``: their offline model answers."""
    model_api: Literal["responses", "chat_completions"] = "responses"
    """API by which the model is called. Servers such as Ollama or llama.cpp want ``chat_completions``."""
    openai_api_key: SecretStr | None = Field(default=None, validation_alias="OPENAI_API_KEY")
    """Key for the model's API; read from ``OPENAI_API_KEY`` as the OpenAI clients do."""
    openai_base_url: str | None = Field(default=None, validation_alias="OPENAI_BASE_URL")
    """Base URL of the model's API; read from ``OPENAI_BASE_URL``. ``None``: OpenAI's."""
    run_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds that one run may take, waiting for the session's turn included."""
    max_turns: int = Field(default=10, ge=1)
    """Model calls that one run may make; the SDK's own default."""
    history_turns: int = Field(default=20, ge=0)
    """Earlier turns of the session that the model sees, whole turns only. 20 keeps a prompt's cost bounded."""

    session_policy: Literal["enqueue", "reject", "interrupt"] = "enqueue"
    """What a request does while another has its session's turn: wait in order, be refused (409), or end the other."""
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    """What becomes of a run whose client is gone: it stops at once, or it finishes and its turn is kept."""
    show_tool_calls: bool = True
    """Show the calls of the agent's own tools, and their results, in Responses; a request may say otherwise. Clients
    that run every call they see, as the Agents SDK does, want them hidden."""
    stream_keepalive_s: float = Field(default=15.0, gt=0)
    """Seconds of silence after which a stream sends a comment. Proxies commonly cut connections idle for 30 or 60."""

    # Who may call, and how much
    allow_anonymous: bool = False
    """Serve requests without an API key, also on an address that others can reach."""
    api_key: SecretStr | None = None
    """Key that `gateway demo` and the load test call the API with. ``None``: none is sent."""
    key_requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests a minute of one API key, over all web processes. ``None``: no limit; keys may have their own."""
    key_concurrency: int | None = Field(default=None, ge=1)
    """Requests of one API key at once, over all web processes. ``None``: no limit; keys may have their own."""
    max_concurrent_runs: int = Field(default=1000, ge=1)
    """Runs under way in one web process, waiting ones included; beyond it, 503. A run holds about 1 MB."""
    max_body_bytes: int = Field(default=10_000_000, ge=1000)
    """Bytes of a request's body; beyond it, 413. Room for some images."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a client may take to send the body; beyond it, 408. Slow senders must not pile up."""
    max_input_items: int = Field(default=1000, ge=1)
    """Items, messages or rows of one request. More takes a model's context several times over."""
    batch_concurrency: int = Field(default=8, ge=1)
    """Rows of one request that run at once: a batch must not take the whole process."""
    idempotency_hours: float = Field(default=24.0, gt=0)
    """Hours for which the answer to an ``Idempotency-Key`` is kept: what clients of payment APIs are used to."""

    # Where it keeps things
    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("GATEWAY_DATABASE_URL", "DATABASE_URL", "database_url")
    )
    """Postgres URL of the database ``gateway``. ``None``: the embedded Postgres."""
    database_pool_size: int = Field(default=10, ge=2)
    """Connections that one process keeps at the most. A run holds one for milliseconds, never while a model thinks."""
    secret_key: SecretStr | None = None
    """Key material for encryption and keyed hashes: one secret of 16 characters or more, or several with commas between
    them, of which the first writes and all read. ``None``: generated once in the home."""
    retention_days: float = Field(default=30.0, gt=0)
    """Days after its last use that a session is deleted, with its stored responses and paused runs."""

    # Tracing
    tracing: bool = True
    """Capture traces at all. Off, runs are served and counted (``sampled_out``), and nothing is captured."""
    sample_rate: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of sessions whose traces are kept; a session is kept or dropped whole. May change while running."""
    tail_rules: tuple[TailRule, ...] = ("error", "tool_error", "guardrail", "slow", "asked")
    """What keeps a conversation whatever the sampling says. May change while running."""
    tail_slow_s: float = Field(default=30.0, gt=0)
    """Seconds from which on a run counts as slow for the tail rules. May change while running."""
    hold_s: float = Field(default=300.0, ge=0)
    """Seconds after its last turn for which a conversation that is not sampled is held, in case a later turn meets a
    tail rule; 0: a rule keeps only the turns from its own on. As long as the quiet period that ends a conversation."""
    hold_max_bytes: int = Field(default=1_000_000_000, ge=0)
    """Bytes of traces held in Postgres at the most; beyond it, the oldest conversations are let go."""
    trace_flush_s: float = Field(default=0.05, gt=0)
    """Seconds between two hand-overs of finished traces to Postgres: with the hand-over itself, 100 ms is what a
    ``kill -9`` can lose."""
    trace_buffer_count: int = Field(default=10_000, ge=1)
    """Finished traces that wait in memory at the most; beyond it they go to the spill file."""
    trace_buffer_bytes: int = Field(default=100_000_000, ge=1)
    """Bytes of finished traces that wait in memory at the most; beyond it they go to the spill file."""
    spill_max_bytes: int = Field(default=1_000_000_000, ge=0)
    """Bytes of one web process' spill file in ``GATEWAY_HOME`` at the most; beyond it traces are dropped and counted.
    Some hours of a busy process without its database."""
    redact_patterns: dict[str, str] = Field(default_factory=dict)
    """What else is redacted: RE2 expressions by the kind that stands in the placeholder."""
    agents: dict[str, AgentRule] = Field(default_factory=dict)
    """Rules by agent name. May change while running."""

    # Evaluation
    mlflow_tracking_uri: str | None = None
    """MLflow that gets the traces: ``http(s)://`` or an SQL URL. ``None``: our own server's database ``mlflow``."""
    mlflow_url: str | None = None
    """Address of MLflow's UI, for links and the health check. ``None``: our own server."""
    mlflow_experiment: str = "agent-gateway"
    """MLflow experiment that the traces go to."""
    otlp_endpoint: str | None = None
    """URL that kept traces are sent to as well, by OTLP over HTTP (``http://host:4318/v1/traces``). ``None``: none."""
    otlp_headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Headers of these requests: a collector's key, for example."""
    ner: Literal["presidio"] | None = None
    """Find names of people and places too, in the evaluator, before anything reaches MLflow; wants the extra ``ner``.
    ``None``: patterns only."""
    ner_model: str = "en_core_web_sm"
    """Model of spaCy by which they are found: an installed package, or a folder."""
    quiet_period_s: float = Field(default=300.0, gt=0)
    """Seconds without a new turn after which a conversation counts as ended and is scored."""
    evaluator_batch: int = Field(default=50, ge=1, le=500)
    """Traces that an evaluator claims at once. MLflow's span writes get no cheaper beyond some 50."""
    evaluator_niceness: int = Field(default=10, ge=0, le=19)
    """How far an evaluator stands back for other processes of its machine, as of ``nice``; 0: not at all."""
    yield_at_cpu_pressure: float = Field(default=0.8, gt=0, le=1)
    """Share of time in which something on the machine waits for a processor, from which on evaluators yield. Linux."""
    yield_at_database_s: float = Field(default=0.25, gt=0)
    """Seconds that a small query takes, from which on evaluators yield."""
    shed_after_s: float = Field(default=60.0, gt=0)
    """Seconds that traces may wait while evaluators yield; if it takes longer, fewer of them are scored."""
    judge_model: str | None = None
    """Model of the LLM judges, in MLflow's form (``openai:/gpt-4o-mini``). ``None``: only scorers in plain code run."""
    judge_base_url: str | None = None
    """Base URL of the judges' API, for OpenAI-compatible servers. ``None``: OPENAI_BASE_URL, or the provider's own."""
    judge_api_key: SecretStr | None = None
    """Key for the judges' API. ``None``: the provider's usual environment variable."""
    judge_concurrency: int = Field(default=16, ge=1, le=64)
    """Scorings that one evaluator has under way at once, judges' above all."""
    judge_timeout_s: float = Field(default=180.0, gt=0)
    """Seconds that all judge calls of one scoring may take together, waiting for their turn included."""
    judge_call_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one attempt at a judge call may take; a judge's answer is short."""
    judge_calls: int = Field(default=40, ge=1)
    """Attempts that one scoring may make. A judge that reads a trace by tools makes up to 30."""
    judge_tokens: int = Field(default=400_000, ge=1)
    """Tokens that one scoring may use: three prompts that fill a usual context window."""
    judge_models: dict[str, JudgeModelRule] = Field(default_factory=dict)
    """Limits and prices by judge model."""
    judge_usd_per_hour: float | None = Field(default=None, ge=0)
    """US dollars that all judges together may spend in an hour. ``None``: no limit."""
    judge_usd_per_day: float | None = Field(default=None, ge=0)
    """US dollars that all judges together may spend in a day (UTC). ``None``: no limit."""
    judge_tokens_per_hour: int | None = Field(default=None, ge=0)
    """Tokens that all judges together may use in an hour. ``None``: no limit."""
    judge_tokens_per_day: int | None = Field(default=None, ge=0)
    """Tokens that all judges together may use in a day (UTC). ``None``: no limit."""
    scorer_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a scorer in plain code may take on one trace or conversation; the others take milliseconds."""
    datasets: DatasetRules = Field(default_factory=dict)
    """Rules by name of what goes into which MLflow dataset. May change while running."""
    scorers: dict[str, ScorerRule] = Field(default_factory=dict)
    """Rules by scorer name. A scorer that is not named runs with the defaults of `ScorerRule`. May change while
    running."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not a source here: one file is enough
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order of the sources: arguments, environment, ``gateway.toml``."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=config_path())
        return init_settings, env_settings, toml

    @field_validator("database_url")
    @classmethod
    def _one_form_of_url(cls, value: SecretStr | None) -> SecretStr | None:
        """Take the forms that hosts and other libraries give as the one that psycopg takes."""
        if value is None:
            return None
        scheme, separator, rest = value.get_secret_value().partition("://")
        if scheme not in {"postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"}:
            raise ValueError("the database is a Postgres: its URL begins with postgresql://")
        return SecretStr(f"postgresql{separator}{rest}")

    @field_validator("secret_key")
    @classmethod
    def _strong_secrets(cls, value: SecretStr | None) -> SecretStr | None:
        """Check each secret of the list; blanks around the commas do not count."""
        if value is None:
            return None
        secrets = [secret.strip() for secret in value.get_secret_value().split(",")]
        for number, secret in enumerate(secrets, start=1):
            if not secret:
                raise ValueError(f"secret {number} of {len(secrets)} is empty; there is a comma too many")
            if len(secret) < 16:
                raise ValueError(f"secret {number} of {len(secrets)} has fewer than 16 characters")
        return SecretStr(",".join(secrets))

    @model_validator(mode="after")
    def _model_needs_a_key(self) -> "Settings":
        if self.model and self.openai_api_key is None:
            raise ValueError(
                "GATEWAY_MODEL is set but OPENAI_API_KEY is not; set it (any text will do for a local server such as "
                "Ollama), or unset GATEWAY_MODEL to use the agents' offline models"
            )
        return self

    @property
    def runs_own_mlflow(self) -> bool:
        """Whether `gateway serve` runs the MLflow server itself."""
        return self.mlflow_tracking_uri is None

    @property
    def mlflow_ui(self) -> str | None:
        """Base URL of MLflow's UI without a trailing slash; ``None`` when MLflow is elsewhere and no URL is known."""
        if self.mlflow_url:
            return self.mlflow_url.rstrip("/")
        if self.mlflow_tracking_uri is None:
            return f"http://{reachable_host(self.mlflow_host)}:{self.mlflow_port}"
        is_http = self.mlflow_tracking_uri.startswith(("http://", "https://"))
        return self.mlflow_tracking_uri.rstrip("/") if is_http else None


def config_path() -> Path:
    """Return the path of ``gateway.toml``, or of what ``GATEWAY_CONFIG`` names."""
    return Path(os.environ.get("GATEWAY_CONFIG", "gateway.toml"))


def load_settings() -> Settings:
    """Read the settings; raise `ConfigurationError` with one line a problem, each naming the setting."""
    path = config_path()
    if "GATEWAY_CONFIG" in os.environ and not path.is_file():
        raise ConfigurationError(f"GATEWAY_CONFIG names {path}, and there is no such file.")
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"  {_setting_name(each['loc'])}: {each['msg']}{told_where(path, each['loc'], each['input'])}"
            for each in error.errors()
        ]
        raise ConfigurationError(
            "The settings are not valid (environment, then " + str(path) + "):\n" + "\n".join(problems)
        ) from None
    except SettingsError as error:  # one of the tables and lists among the settings, as an environment variable
        name = _FIELD_NAMED.search(str(error))
        raise ConfigurationError(
            f"{ENV_PREFIX}{name.group(1).upper() if name else 'SCORERS'} is not valid JSON: {error.__cause__}"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from None


def _setting_name(location: tuple[int | str, ...]) -> str:
    """Name a setting as the person wrote it: ``GATEWAY_PORT``, or ``[scorers.x] share`` for a table's key."""
    if not location:
        return "settings"
    first, *rest = [str(part) for part in location]
    if rest and first in {"scorers", "agents"}:
        return f"[{first}.{rest[0]}] {' '.join(rest[1:])}".rstrip()
    return first if first.isupper() else f"{ENV_PREFIX}{first.upper()}"


def reachable_host(host: str) -> str:
    """Return the address by which a local client reaches a server bound to ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - translated, not bound


def sqlalchemy_url(url: str) -> str:
    """Return a Postgres URL as SQLAlchemy, and so MLflow, takes it for psycopg 3; other URLs as they are."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in {"postgres", "postgresql"} else url


def unknown_settings() -> list[str]:
    """Return the variables of the environment that look like settings and are none, in order of name."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | {"GATEWAY_CONFIG"}
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def sibling_database(url: str, name: str) -> str:
    """Return ``url`` with its database replaced by ``name``; its query string stays."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
