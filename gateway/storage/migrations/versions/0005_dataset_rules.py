"""What rules put into datasets, from where, and what was left out."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_SCORERS = "scorer name to value, of the scores that put it there"
_SCORERS_BEFORE = "scorer name to value, of the scorers that failed it"


def _columns() -> list[sa.Column[object]]:
    jsonb = postgresql.JSONB(astext_type=sa.Text())
    return [
        sa.Column("rule", sa.Text(), nullable=True, comment="that put it there; NULL: an earlier version did"),
        sa.Column("agent", sa.Text(), nullable=True),
        sa.Column(
            "provenance", jsonb, server_default="{}", nullable=False, comment="reason's name to where it came from"
        ),
        sa.Column(
            "whole_session",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="its other turns too",
        ),
        sa.Column("session_of", sa.Text(), nullable=True, comment="trace whose whole session it is part of"),
        sa.Column("signature", sa.LargeBinary(), nullable=True, comment="what its similarity is told by"),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("annotated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("skipped", sa.Text(), nullable=True, comment="why it was left out; NULL: it was not, or waits"),
        sa.Column("similar_to", sa.Text(), nullable=True, comment="trace of the row that it is like"),
    ]


def upgrade() -> None:
    for column in _columns():
        op.add_column("dataset_rows", column)
    op.execute("UPDATE dataset_rows SET taken_at = merged_at")
    op.alter_column(
        "dataset_rows", "scorers", existing_type=postgresql.JSONB(), existing_nullable=False, comment=_SCORERS
    )
    op.create_index("ix_dataset_rows_trace_id", "dataset_rows", ["trace_id"])
    op.create_index("ix_dataset_rows_taken_at", "dataset_rows", ["dataset", "taken_at"])
    op.create_index(
        "ix_dataset_rows_waiting", "dataset_rows", ["dataset"], postgresql_where=sa.text("merged_at IS NULL")
    )
    op.create_index(
        "ix_dataset_rows_similar_to",
        "dataset_rows",
        ["similar_to"],
        postgresql_where=sa.text("similar_to IS NOT NULL"),
    )
    op.create_table(
        "dataset_marks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("seen_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_dataset_marks")),
    )


def downgrade() -> None:
    op.drop_table("dataset_marks")
    for index in ("similar_to", "waiting", "taken_at", "trace_id"):
        op.drop_index(f"ix_dataset_rows_{index}", table_name="dataset_rows")
    op.alter_column(
        "dataset_rows", "scorers", existing_type=postgresql.JSONB(), existing_nullable=False, comment=_SCORERS_BEFORE
    )
    for column in reversed(_columns()):
        op.drop_column("dataset_rows", column.name)
