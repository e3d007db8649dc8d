"""What TeaCache makes of one entry of the zoo: found, measured, or declined and why."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from teacache_fx import (
    Declined,
    DeclineReason,
    StepReason,
    TeaCacheBackend,
    TeaCacheConfig,
    apply_teacache_hook,
    rewrite,
)
from teacache_fx.plan import CachePlan
from teacache_fx.report import RewriteReport
from tests.both_branches import ALWAYS_SKIP, BothBranches, compare, measure
from tests.zoo import ZOO, Entry, assemble, move_latents

_ALWAYS_SKIP = TeaCacheConfig(rel_l1_thresh=ALWAYS_SKIP, coefficients=(1.0, 0.0))
WAYS = ("compile", "enable")
"""`torch.compile` with our backend, and the hook that `backend.enable` applies, which captures more."""


@dataclass(frozen=True)
class Row:
    """One entry.

    Attributes:
        name: of the entry.
        model: class name.
        way: the first of `WAYS` in which it is rewritten, or else the last.
        plan: what was found, or `None` if declined.
        declined: why it was declined, or `None`.
        branches: three steps with the cache, a declined model's included: it must run as if there were none.
        export: "yes", or why the rewritten model cannot be exported; empty if it was declined.
    """

    name: str
    model: str
    way: str
    plan: CachePlan | None
    declined: Declined | None
    branches: BothBranches
    export: str


def examine(name: str, is_exporting: bool = True) -> Row:
    """Tries the ways in turn, each on a new model, and exports another one, unless `is_exporting` says not to."""
    entry = ZOO[name]
    for way in WAYS:
        reports, branches = _try(entry, way)
        plan = next((report.plan for report in reports if report.plan is not None), None)
        if plan is not None:
            break
    declined = _reason(reports) if plan is None else None
    export = export_of(entry) if plan is not None and is_exporting else ""
    return Row(name, entry["class"].rsplit(".", 1)[1], way, plan, declined, branches, export)


def export_of(entry: Entry) -> str:
    """Whether torch.export takes the rewritten model and the cache is alive in it: "yes", or why not.

    Raises:
        AssertionError: it is exported, and does something else than the model.
    """
    model, inputs = _fresh(entry)
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph that it cannot export
            program = torch.export.export(rewrite(model, config=_ALWAYS_SKIP), (), inputs)
    except Declined as refusal:
        return f"no: {refusal.detail if refusal.reason is DeclineReason.NOT_EXPORTABLE else refusal.reason.value}"
    except Exception as error:  # whatever torch.export raises is the result
        cause = re.split(r"(?<=\w)\.\s|\n", str(error))[0].rstrip(".")
        return f"no: {type(error).__name__}: {cause}"
    module = program.module()
    plain, _ = assemble(entry)
    reasons = []

    def step(**inputs: Any) -> Any:
        output = module(**inputs)
        reasons.append(int(module.teacache.reason))  # type: ignore[union-attr, arg-type]
        return output

    branches = compare(plain, step, inputs, move_latents(entry, inputs))
    assert reasons == [StepReason.FIRST, StepReason.SKIPPED, StepReason.SKIPPED]
    check(branches)
    return "yes"


def check(branches: BothBranches) -> None:
    """What must hold of a model that is rewritten.

    Computed steps equal the model's to the bit, but for the last bit where what enters the blocks is laid out otherwise
    than its sizes say, as behind a transposed convolution: a branch takes it contiguous, and products round otherwise.
    """
    assert branches.computed_error <= 2e-7
    assert branches.reuse_error <= 1e-5
    assert branches.change > 1e-4, "the output does not follow the latents"


def _try(entry: Entry, way: str) -> tuple[list[RewriteReport], BothBranches]:
    plain, inputs = _fresh(entry)
    model, _ = assemble(entry)  # one of its own: the plain one builds tables that the compiled one must do without
    backend = TeaCacheBackend(rel_l1_thresh=ALWAYS_SKIP, coefficients=[1.0, 0.0], inner="eager", on_decline="ignore")
    cached: Any = model
    if way == "compile":
        cached = torch.compile(model, backend=backend)
    else:
        apply_teacache_hook(model, backend)
        with torch.no_grad():
            model(**inputs)  # finds out what breaks the graph; the next call captures what can be
        backend.reset_state()
        backend.reset_stats()
    return backend.reports, measure(plain, cached, backend, inputs, move_latents(entry, inputs))


def _reason(reports: list[RewriteReport]) -> Declined | None:
    """What the largest graph was declined for; of several, the largest that a graph break explains."""

    def weight(report: RewriteReport) -> tuple[bool, int]:
        assert report.declined is not None
        return report.declined.reason is DeclineReason.GRAPH_BREAK, report.num_nodes

    return max(reports, key=weight).declined


def _fresh(entry: Entry) -> tuple[nn.Module, dict[str, Any]]:
    torch._dynamo.reset()  # models of a class share what dynamo knows of their code
    return assemble(entry)
