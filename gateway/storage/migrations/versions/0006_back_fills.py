"""Scorings of what was served before."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "scorings",
        sa.Column(
            "back_fill",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="of what was served before; goes after all that is live",
        ),
    )
    _index_due_by("back_fill", "due_at")


def downgrade() -> None:
    _index_due_by("due_at")
    op.drop_column("scorings", "back_fill")


def _index_due_by(*columns: str) -> None:
    op.drop_index("ix_scorings_due", table_name="scorings")
    op.create_index("ix_scorings_due", "scorings", list(columns), postgresql_where=sa.text("state = 'pending'"))
