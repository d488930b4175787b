"""MLflow's own online scoring, set up as its documentation says: a server with jobs, a gateway endpoint, a judge.

What it needs, as its sources have it: a server whose job execution is on (huey, SQL store), a judge whose model is an
endpoint of that server's gateway (``gateway:/...``), registered and started with a sample rate. Its scheduler wakes
once a minute, takes at most 500 traces of an experiment, and none that began less than five minutes ago: that last one
is ``MLFLOW_ONLINE_SCORING_DEFAULT_TRACE_COMPLETION_BUFFER_SECONDS``.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal

import mlflow
import psycopg
from comparison.processes import Child, NotStartedError, answers, free_port
from mlflow.entities import GatewayEndpointModelConfig, GatewayModelLinkageType
from mlflow.entities._job_status import JobStatus
from mlflow.exceptions import MlflowException
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import ScorerSamplingConfig, scorer
from mlflow.tracking._tracking_service.utils import _get_store

from gateway.settings import MLFLOW_DEFAULTS, sqlalchemy_url

from .served import INSTRUCTIONS, JUDGE, Served

EXPERIMENT = "agent-gateway"
_ENDPOINT = "load-test-judge"
_ALWAYS = ScorerSamplingConfig(sample_rate=1.0)
_FIRST_JOB_S = 240.0
_JOB_DONE = "SELECT 1 FROM jobs WHERE job_name = 'run_online_trace_scorer' AND status = %s"


@contextlib.contextmanager
def scoring_server(gateway: Served, cores: frozenset[int], buffer_s: int | None) -> Iterator[Child]:
    """Run an MLflow server with job execution on the gateway's MLflow database; clients of this process use it.

    Args:
        gateway: whose traces it is to score.
        cores: that its processes share.
        buffer_s: seconds for which it leaves a trace alone; ``None``: its own default.
    """
    port = free_port()
    environment = {
        **MLFLOW_DEFAULTS,
        "MLFLOW_BACKEND_STORE_URI": sqlalchemy_url(gateway.mlflow_database),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true",
        "MLFLOW_CRYPTO_KEK_PASSPHRASE": "the passphrase of a load test",
        # The judges' model is on this machine, without TLS.
        "MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES": "http,https",
        # Off by default: then a scorer in plain code is not even registered.
        "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS": "true",
    }
    if buffer_s is not None:
        environment["MLFLOW_ONLINE_SCORING_DEFAULT_TRACE_COMPLETION_BUFFER_SECONDS"] = str(buffer_s)
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(gateway.folder / "jobs-artifacts")]
    child = Child("mlflow-jobs", command, environment, gateway.folder, cores=cores)
    try:
        url = f"http://127.0.0.1:{port}"
        child.await_ready(lambda: answers(f"{url}/health"))
        mlflow.set_tracking_uri(url)
        yield child
    finally:
        child.stop()


def start_judge(judge_url: str) -> None:
    """Make the endpoint, and start the judge that asks it on every trace of the gateway's experiment."""
    store: Any = _get_store()
    secret = store.create_gateway_secret(
        "load-test", {"api_key": "scripted"}, provider="openai", auth_config={"api_base": judge_url}
    )
    model = store.create_gateway_model_definition("load-test", secret.secret_id, "openai", "scripted")
    primary = GatewayEndpointModelConfig(model.model_definition_id, GatewayModelLinkageType.PRIMARY, weight=1.0)
    # Without usage tracking: it would write a trace for each call.
    store.create_gateway_endpoint(_ENDPOINT, [primary], usage_tracking=False)
    judge = make_judge(
        name=JUDGE,
        instructions=INSTRUCTIONS,
        model=f"gateway:/{_ENDPOINT}",
        feedback_value_type=Literal["yes", "no"],
    )
    experiment_id = _experiment_id()
    judge.register(experiment_id=experiment_id).start(experiment_id=experiment_id, sampling_config=_ALWAYS)


def await_first_job(gateway: Served) -> None:
    """Wait until the scheduler has woken and a scoring job has ended, so that what follows meets a server at work.

    Raises:
        NotStartedError: that takes too long.
    """
    deadline = time.monotonic() + _FIRST_JOB_S
    with psycopg.connect(gateway.mlflow_database, autocommit=True) as connection:
        while connection.execute(_JOB_DONE, [JobStatus.SUCCEEDED.to_int()]).fetchone() is None:
            if time.monotonic() > deadline:
                raise NotStartedError(f"MLflow has scored nothing online within {_FIRST_JOB_S:g} s")
            time.sleep(0.5)


def refusal_of_code() -> str | None:
    """Return what MLflow says when a scorer in plain code is registered and started; ``None``: it takes it."""

    def says_something(outputs: Any) -> bool:
        return bool(outputs)

    experiment_id = _experiment_id()
    try:
        registered = scorer(says_something).register(experiment_id=experiment_id)
        registered.start(experiment_id=experiment_id, sampling_config=_ALWAYS)
    except MlflowException as error:
        return str(error).partition("\n")[0]
    return None


def _experiment_id() -> str:
    found = mlflow.get_experiment_by_name(EXPERIMENT)
    if found is None:
        raise ValueError(f"there is no experiment {EXPERIMENT}")
    return str(found.experiment_id)
