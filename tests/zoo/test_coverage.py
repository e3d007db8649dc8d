"""Every entry of the zoo is rewritten correctly or declined, and stands in the coverage table as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest

from teacache_fx import DeclineReason
from tests.zoo import ZOO
from tests.zoo.coverage import Row, check, examine, export_of
from tests.zoo.table import entry_of, line_of, render_page

PAGE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
FEWEST_REWRITTEN = 80

# Models that no cache of this kind can serve.
UNSERVED = {
    "prior": DeclineReason.STALE_OUTPUT,
    "temporal": DeclineReason.NO_TIMESTEP,
    "transformer_2d+layer_norm": DeclineReason.NO_TIMESTEP,
    "transformer_2d+vq": DeclineReason.NO_LATENTS,
}
# Large graphs; what is special about them, others have too.
SLOW = {
    "bria_fibo2", "hunyuan_image", "kandinsky5", "lumina2", "ltx2", "ltx2+2.3", "nucleusmoe_image", "qwenimage21",
    "rfd4_proteina", "rfd4_proteina+recycle", "sana_wm", "sd3+3.5", "stable_audio3+diff",
}  # fmt: skip
# Those that are exported in each run, and what becomes of them.
EXPORTED = {
    "anyflow_far": "no: flex_attention", "cogvideox": "yes", "cosmos3+sound": "yes", "dit": "yes", "flux": "yes",
    "framepack": "yes", "hidream": "no: RuntimeError", "hunyuan_dit": "yes", "kandinsky6": "yes", "latte": "yes",
    "wan": "yes",
}  # fmt: skip
TRANSPOSED = {"ace_step"}  # whose tokens are a transposed view of a convolution's result
HAS_TOKEN_LATENTS = {"transformer_2d+vq"}  # integers, which cannot move a little


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


def _marked(names: Iterable[str], slow: Container[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("name", _marked(ZOO, SLOW))
@pytest.mark.filterwarnings("ignore", "error::teacache_fx.TeaCacheWarning")  # torch and diffusers warn of themselves
def test_entry(name: str) -> None:
    row = examine(name, is_exporting=False)
    if row.plan is not None:
        assert name not in UNSERVED
        _check_rewritten(row)
    else:
        _check_declined(row)
    (line,) = (line for line in _lines(PAGE) if entry_of(line) == name)
    exported = line.rpartition(" | ")[2].removesuffix(" |")
    assert line_of(dataclasses.replace(row, export=exported)) == line, "run: make coverage-table"


@pytest.mark.parametrize("name", _marked(ZOO, ZOO.keys() - EXPORTED.keys()))
@pytest.mark.filterwarnings("ignore")  # torch and diffusers warn of themselves
def test_exported(name: str) -> None:
    (line,) = (line for line in _lines(PAGE) if entry_of(line) == name)
    if name not in UNSERVED:
        exported = export_of(ZOO[name])
        assert line.endswith(f" | {exported} |"), "run: make coverage-table"
        assert exported.startswith(EXPORTED.get(name, ""))


def _check_rewritten(row: Row) -> None:
    assert row.branches.skipped == (False, True, True)
    check(row.branches)
    assert row.branches.computed_error == 0 or row.name in TRANSPOSED


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
