"""Writes the fault table: python -m tests.faults.table > docs/faults.md"""

from __future__ import annotations

from tests.faults import rows  # isort: skip
from tests.faults import more_rows  # isort: skip
from tests.faults.row import FAULTS

__all__ = ["FAULTS", "more_rows", "rows"]  # importing the rows adds them, in the order of the table

_HEAD = """\
# Ways to a wrong picture, and what stops them

Each row is a test (`tests/faults`) at a threshold so high that only the guard named makes a step be computed.
Each is run twice: with the guard, when every computed step equals the model to the bit and every skipped one belongs to
its own run; and with the guard taken out, when it must fail. The table is written by `make fault-table`.

| | what happens | what the cache does | guard |
|---|---|---|---|
"""


def render_table() -> str:
    """The page as it must stand in the docs."""
    rows = [f"| {row.point} | {row.situation} | {row.outcome} | {row.guard or '-'} |" for row in FAULTS]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(render_table(), end="")
