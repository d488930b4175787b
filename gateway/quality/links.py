"""Links into MLflow's UI."""

import time
from urllib.parse import quote, urlsplit

import httpx
import structlog

log = structlog.get_logger(__name__)

_LOOKUP_TIMEOUT_S = 2.0  # the page waits for it, and does without links rather than being slow
_RETRY_AFTER_S = 30.0  # while MLflow is away, most readers of the page shall not wait for it at all


class MlflowLinks:
    """Knows where MLflow's UI shows our traces. One a web process.

    The UI's addresses need the id of the experiment, which only MLflow knows: it is asked once, on the first need, and
    again after a while if it did not answer or has no such experiment yet.
    """

    def __init__(self, client: httpx.AsyncClient, mlflow_ui: str | None, experiment: str):
        """Make the links of one experiment.

        Args:
            client: asks MLflow's REST API for the experiment's id.
            mlflow_ui: base URL of MLflow's UI and REST API; ``None``: there are no links.
            experiment: name of the MLflow experiment that the traces go to.
        """
        self._client = client
        self._mlflow_ui = mlflow_ui.rstrip("/") if mlflow_ui else None
        self._experiment = experiment
        self._experiment_url: str | None = None
        self._retry_at = 0.0

    async def experiment_url(self) -> str | None:
        """Return the experiment's address in the UI; ``None`` while it is not known."""
        if self._mlflow_ui and self._experiment_url is None and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            experiment_id = await self._look_up(self._mlflow_ui)
            if experiment_id is not None:
                base = _without_credentials(self._mlflow_ui)
                self._experiment_url = f"{base}/#/experiments/{quote(experiment_id, safe='')}"
        return self._experiment_url

    async def _look_up(self, base: str) -> str | None:
        url = f"{base}/api/2.0/mlflow/experiments/get-by-name"
        parameters = {"experiment_name": self._experiment}
        try:
            response = await self._client.get(url, params=parameters, timeout=_LOOKUP_TIMEOUT_S)
            response.raise_for_status()
            return str(response.json()["experiment"]["experiment_id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            log.info("no links into MLflow for now", experiment=self._experiment, error=type(error).__name__)
            return None


def trace_url(experiment_url: str, trace_id: str) -> str:
    """Return the address at which MLflow's UI opens one trace."""
    return f"{experiment_url}/traces?selectedEvaluationId={quote(trace_id, safe='')}"


def conversation_url(experiment_url: str, session_id: str) -> str:
    """Return the address at which MLflow's UI shows all turns of one conversation."""
    return f"{experiment_url}/chat-sessions/{quote(session_id, safe='')}"


def _without_credentials(url: str) -> str:
    """Return ``url`` without user and password: they are for our own requests, not for a page."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
