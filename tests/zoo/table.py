"""Writes the coverage table: python -m tests.zoo.table > docs/coverage.md"""

from __future__ import annotations

import logging
import warnings

import torch

from teacache_fx.plan import CachePlan
from tests.zoo import ZOO
from tests.zoo.coverage import Row, examine

_HEAD = """\
# Which models are rewritten

Tiny, randomly drawn configurations of diffusers' transformers (`tests/zoo`), of the diffusers and torch versions in
`constraints.txt`. No code of this package knows any of them. The table is written by `make coverage-table`; tests
compare its lines with what is found now: at each commit, but for those of the largest graphs and for most exports,
which `make test-all` compares each week.

{rewritten} of {total} rewritten.

## Rewritten

Verified for each line (`tests/zoo/test_coverage.py`), with both branches forced: a computed step equals the unmodified
model to the bit (`ace_step`, whose tokens are laid out transposed, but for the last bit); a step that reuses the
residual on the same inputs equals it within 1e-5 of the largest value; one that reuses it on latents moved by 1.5%
moves with them, so nothing stale is returned.

- captured by: `compile` is `torch.compile(model, backend=TeaCacheBackend(...))`; `enable` stands where that does not
  suffice, and `backend.enable(pipeline)` or `apply_teacache_hook(model)`, which capture more, do.
- blocks: the lists of repeated blocks that a skipped step leaves out, and how many blocks of each.
- modulated input: the value by which steps are compared, by its name in the captured graph; the block that it is found
  in; the modulation pattern that confirms it, "unnamed" where none of the known ones does.
- live outputs: what is used after the blocks, minus what entered them; the residual that is kept.
- skipped step: its share of a computed step's FLOPs. At these tiny sizes the layers around the blocks weigh far more
  than in the real models. "of the last part": the capture breaks before the blocks, and what is before the break, which
  every step pays, is not counted.
- `torch.export`: "yes" if `torch.export.export(teacache_fx.rewrite(model), (), inputs)` works and the exported program
  passes the same three checks, each step deciding as expected.

| entry | model | captured by | blocks | modulated input | live outputs | skipped step | `torch.export` |
|---|---|---|---|---|---|---|---|
"""

_DECLINED = """
## Declined

Such a model runs as if there were no cache; that is verified likewise. The reason is that of the largest captured graph
under `enable`, or of the largest one that a graph break has cut off.

| entry | model | reason |
|---|---|---|
"""


def line_of(row: Row) -> str:
    """The row as a line of its table."""
    cells = (*_facts(row, row.plan), row.export) if row.plan is not None else (_refusal(row),)
    cells = (f"`{row.name}`", row.model, *cells)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render_page(rewritten: list[str], declined: list[str]) -> str:
    """The page as it must stand in the docs, from the lines of its two tables."""
    head = _HEAD.format(rewritten=len(rewritten), total=len(rewritten) + len(declined))
    tables = ["\n".join(sorted(lines, key=entry_of)) + "\n" for lines in (rewritten, declined)]
    return head + tables[0] + _DECLINED + tables[1]


def entry_of(line: str) -> str:
    """Name of the entry that a line is about."""
    return line.split("`")[1]


def _facts(row: Row, plan: CachePlan) -> tuple[str, ...]:
    share = f"{plan.costs.skipped_share:.1%}{' of the last part' if plan.is_fragment else ''}"
    modulation = plan.modulation
    return (
        f"`{row.way}`",
        ", ".join(f"{part.num_blocks} `{part.path or 'repeated operations'}`" for part in plan.stack.lists),
        f"`{modulation.modulated_input}` in `{modulation.block}`: {modulation.pattern}",
        ", ".join(f"`{live.value}` - `{live.base}`" for live in plan.stack.live_outputs),
        share,
    )


def _refusal(row: Row) -> str:
    assert row.declined is not None
    return f"{row.declined.reason.value}: {row.declined.detail}"


def _print_page() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # deprecations within diffusers and torch
    logging.disable(logging.CRITICAL)  # of graph breaks
    rows = [examine(name) for name in ZOO]
    rewritten = [line_of(row) for row in rows if row.plan is not None]
    print(render_page(rewritten, [line_of(row) for row in rows if row.plan is None]), end="")


if __name__ == "__main__":
    _print_page()
