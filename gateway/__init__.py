"""Agent Gateway: serves tool-calling agents over HTTP, and grades its own live traffic while it serves it.

The folders stand in the order of the journey of a request:

1. ``http``        decode one of the accepted bodies into one `RunRequest`, answer in the matching shape
2. ``runs``        take the session's turn, load its history, run the agent, commit the turn if it succeeded
3. ``tracing``     capture one span tree a run, sample, redact, hand over to the outbox without making anyone wait
4. ``evaluation``  the evaluator process: outbox to MLflow, scorers, conversations, datasets
5. ``quality``     what operations see: shares, means, failures, the ledger

Below them ``storage`` (Postgres: schema, migrations, the embedded server) and ``plugins`` (the folders ``agents/`` and
``scorers/``); at the bottom ``settings``, ``crypto``, ``logs`` and ``errors``. On top ``app`` puts the web process
together, ``supervisor`` runs all processes as watched children, ``demo`` is a client, ``cli`` is the command line.

Imports point one way, and import-linter holds it::

    cli -> demo, supervisor -> app -> http, quality -> evaluation -> runs -> tracing -> storage, plugins -> settings

The web process (``app``, ``http``, ``quality``) never imports ``gateway.evaluation`` nor MLflow; the evaluator never
imports ``gateway.http``. They meet in Postgres, and nowhere else.

The promise behind it all is the ledger: every run that was served ends in exactly one state, and the states add up
(`gateway.tracing.ledger`).
"""

from importlib.metadata import version

__version__ = version("agent-gateway")
