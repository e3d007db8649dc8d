"""Every row of the fault table holds, fails without its guard, and stands in the docs as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.guards import GUARDS
from tests.faults.row import Fault
from tests.faults.table import FAULTS, render_table

TABLE = Path(__file__).parents[2] / "docs" / "faults.md"
GUARDED = [fault for fault in FAULTS if fault.guard is not None]


def _name(fault: Fault) -> str:
    return fault.situation


@pytest.mark.parametrize("fault", FAULTS, ids=_name)
def test_no_wrong_picture(fault: Fault) -> None:
    fault.check()


@pytest.mark.parametrize("fault", GUARDED, ids=_name)
def test_the_guard_is_needed(fault: Fault) -> None:
    assert fault.guard is not None
    with GUARDS[fault.guard](), pytest.raises((AssertionError, RuntimeError)):
        fault.check()


def test_every_guard_has_a_row() -> None:
    assert {fault.guard for fault in GUARDED} == set(GUARDS)


def test_the_table_in_the_docs_is_current() -> None:
    assert TABLE.read_text(encoding="utf-8") == render_table(), "run: make fault-table"
