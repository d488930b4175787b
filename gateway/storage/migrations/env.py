"""Alembic's entry point. The connection comes from `gateway.storage.database.migrate`."""

from alembic import context

from gateway.storage.schema import metadata

OURS = frozenset(metadata.tables)


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Leave Procrastinate's tables, which live in the same database, to Procrastinate."""
    return kind != "table" or name in OURS


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    include_name=_is_ours,
    compare_server_default=False,
)
with context.begin_transaction():
    context.run_migrations()
