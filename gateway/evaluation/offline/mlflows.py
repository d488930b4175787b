"""The MLflow that a run is logged to: which experiment, where its artifacts lie, and whether it answers.

Offline runs have an experiment of their own, so that questions out of a file never stand among the traces of people.
"""

import os
import re
from pathlib import Path

import mlflow
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url

from gateway.errors import ConfigurationError
from gateway.evaluation.store import configure_mlflow
from gateway.settings import Settings

_SUFFIX = "-offline"
_BEHIND_SERVER = "mlflow-artifacts:/"
# Unlike the evaluator, which comes again, a command has this one chance; with MLflow's own seven retries, one that is
# not there would take minutes to be called so.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}


def experiment_name(settings: Settings) -> str:
    """Return the name of the experiment that offline runs go to unless told otherwise."""
    return settings.mlflow_experiment + _SUFFIX


def open_experiment(settings: Settings, uri: str, name: str) -> str:
    """Make MLflow at ``uri`` and this experiment the current ones, and return the experiment's id.

    Args:
        settings: the settings; artifacts of a database that is opened directly go to the home's ``mlartifacts``.
        uri: ``http(s)://`` or an SQL URL.
        name: the experiment, which is made if it is not there.

    Raises:
        ConfigurationError: MLflow is not there, is a file store, or keeps this experiment's artifacts elsewhere.
    """
    _check_kind(uri)
    is_server = uri.startswith(("http://", "https://"))
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    try:
        if not is_server:
            _connect(uri)  # before MLflow does: to be told the address is enough for it
        configure_mlflow(settings, uri)
        mlflow.set_tracking_uri(uri)
        client = MlflowClient()
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = None if is_server else _artifacts(settings.home, name)
            experiment = client.get_experiment(client.create_experiment(name, artifact_location=location))
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError, ImportError) as error:
        raise ConfigurationError(
            f"MLflow at {_shown(uri)} does not answer: {str(error).splitlines()[0]} "
            "Set GATEWAY_MLFLOW_TRACKING_URI to one that does, for example sqlite:///mlflow.db."
        ) from None
    if experiment.lifecycle_stage != "active":
        raise ConfigurationError(f"The experiment {name} was deleted in MLflow; restore it, or give another name.")
    if not is_server and str(experiment.artifact_location).startswith(_BEHIND_SERVER):
        raise ConfigurationError(
            f"The experiment {name} keeps its artifacts behind an MLflow server. Set GATEWAY_MLFLOW_TRACKING_URI to "
            "the server's address, or give another name by --experiment."
        )
    mlflow.set_experiment(experiment_id=experiment.experiment_id)
    return str(experiment.experiment_id)


def _check_kind(uri: str) -> None:
    """Refuse a file store: it can hold neither datasets nor the links between runs and traces."""
    if uri.startswith("file:") or "://" not in uri:
        raise ConfigurationError(
            f"GATEWAY_MLFLOW_TRACKING_URI is {uri}, a folder, and MLflow keeps no datasets there. Set it to a server's "
            "address, or to a database such as sqlite:///mlflow.db."
        )


def _connect(uri: str) -> None:
    """Raise if the database is not there: MLflow itself would try for minutes."""
    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _artifacts(home: Path, experiment: str) -> str:
    return (home / "mlartifacts" / re.sub(r"[^\w.-]", "_", experiment)).resolve().as_uri()


def _shown(uri: str) -> str:
    """Return the URI without its password."""
    try:
        return make_url(uri).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "the address that is set"
