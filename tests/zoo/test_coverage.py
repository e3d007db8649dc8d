"""Every entry of the zoo is rewritten correctly or declined, and stands in the coverage table as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacache_fx import DeclineReason
from tests.zoo import ZOO
from tests.zoo.coverage import Row, examine
from tests.zoo.table import entry_of, line_of, render_page

PAGE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
FEWEST_REWRITTEN = 60

# Models that no cache of this kind can serve.
UNSERVED = {
    "prior": DeclineReason.STALE_OUTPUT,
    "temporal": DeclineReason.NO_TIMESTEP,
    "transformer_2d+layer_norm": DeclineReason.NO_TIMESTEP,
    "transformer_2d+vq": DeclineReason.NO_LATENTS,
}
HAS_TOKEN_LATENTS = {"transformer_2d+vq"}  # integers, which cannot move a little


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore", "error::teacache_fx.TeaCacheWarning")  # torch and diffusers warn of themselves
def test_entry(name: str) -> None:
    row = examine(name)
    if row.plan is not None:
        assert name not in UNSERVED
        _check_rewritten(row)
    else:
        _check_declined(row)
    assert line_of(row) in _lines(PAGE), "run: make coverage-table"


def _check_rewritten(row: Row) -> None:
    assert row.branches.skipped == (False, True, True)
    assert row.branches.computed_error == 0
    assert row.branches.reuse_error <= 1e-5
    assert row.branches.change > 1e-4, "the output does not follow the latents"


def _check_declined(row: Row) -> None:
    assert row.declined is not None
    assert row.declined.reason is UNSERVED.get(row.name, row.declined.reason), row.declined
    assert row.branches.skipped == ()
    assert row.branches.computed_error == row.branches.reuse_error == 0
    assert row.branches.change > 1e-4 or row.name in HAS_TOKEN_LATENTS


def test_the_page_holds_each_entry_once_and_nothing_else() -> None:
    rewritten, declined = map(_lines, PAGE.split("## Declined"))
    assert sorted(map(entry_of, rewritten + declined)) == sorted(ZOO)
    assert len(rewritten) >= FEWEST_REWRITTEN
    assert set(UNSERVED) <= set(map(entry_of, declined))
    assert render_page(rewritten, declined) == PAGE, "run: make coverage-table"
