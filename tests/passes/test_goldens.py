"""What each pass finds and edits on toy models, as text. A change here is a change of behaviour: read the diff."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import fx, nn

from teacache_fx.passes import PIPELINE
from teacache_fx.pipeline import Pipeline
from teacache_fx.plan import CachePlan
from teacache_fx.render import render
from teacache_fx.report import RewriteReport
from tests import toys
from tests.conftest import GOLDENS
from tests.passes.capture import CONFIG, on_capture

TOYS: dict[str, type[nn.Module]] = {
    "toy_dit": toys.ToyDiT,
    "sliced_joint_dit": toys.SlicedJointDiT,
    "rotary_in_place_dit": toys.RotaryInPlaceDiT,
}
EDITING = ("insert-cond", "cleanup")


@dataclass
class Run:
    """One run of the pipeline.

    Attributes:
        report: without timings, which differ between runs.
        stages: text of the graph before the first pass and after each, by name of the pass.
        sizes: number of nodes likewise.
        plan: the facts found.
    """

    stages: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    report: str = ""
    plan: CachePlan | None = None

    def see(self, name: str, gm: fx.GraphModule) -> None:
        """Keeps a stage."""
        self.stages[name] = render(gm)
        self.sizes[name] = len(gm.graph.nodes)


def _run(gm: fx.GraphModule) -> Run:
    run = Run()
    run.see("capture", gm)
    pipeline = Pipeline(gm, observer=run.see)
    run.plan = pipeline.analyse()
    pipeline.rewrite(CONFIG)
    run.report = str(RewriteReport("Toy", len(gm.graph.nodes), run.plan, config=CONFIG)) + "\n"
    assert render(gm) == run.stages["capture"], "the caller's graph was touched"
    return run


def _run_toy(kind: type[nn.Module], num_blocks: int = 2) -> Run:
    (run,) = on_capture(toys.make(kind, num_blocks=num_blocks), toys.inputs(), _run)
    assert isinstance(run, Run)
    return run


@pytest.mark.parametrize("name", TOYS)
def test_plan_and_edits(name: str, golden: Callable[[str, str], None]) -> None:
    if name == "rotary_in_place_dit" and torch.__version__ < "2.13":
        pytest.skip("new nodes get other numbers before torch 2.13")
    run = _run_toy(TOYS[name])
    golden(f"{name}.plan", run.report)
    before = run.stages["capture"]
    for stage in EDITING:
        after = run.stages[stage]
        golden(f"{name}.{stage}", "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), n=0)))
        before = after


@pytest.mark.parametrize("name", TOYS)
def test_analysis_edits_nothing(name: str) -> None:
    run = _run_toy(TOYS[name])
    for step in PIPELINE:
        if step.name not in EDITING:
            assert run.stages[step.name] == run.stages["capture"]


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_plan_grows_with_the_blocks_alone(num_blocks: int) -> None:
    small, large = _run_toy(toys.ToyDiT, 2), _run_toy(toys.ToyDiT, num_blocks)
    assert small.plan is not None
    assert large.plan is not None
    assert large.plan.stack.num_blocks == num_blocks
    assert large.plan.partition.prologue == small.plan.partition.prologue
    assert len(large.plan.partition.epilogue) == len(small.plan.partition.epilogue)
    assert large.sizes["cleanup"] == small.sizes["cleanup"] + (num_blocks - 2) * 12  # parameters of a block
    batch, tokens, words, width = 2, 8, 3, toys.WIDTH  # of `toys.inputs()`
    projections = 6 * width + tokens * (3 + 1 + 2 + 2) * width + words * width
    of_block = 2 * batch * projections * width + 4 * batch * tokens * (tokens + words) * width
    assert large.plan.costs.blocks.flops == small.plan.costs.blocks.flops + (num_blocks - 2) * of_block
    assert large.plan.costs.prologue == small.plan.costs.prologue
    assert large.plan.costs.epilogue == small.plan.costs.epilogue


def test_no_golden_is_unused() -> None:
    expected = {f"{name}.{part}.txt" for name in TOYS for part in ("plan", *EDITING)}
    assert {path.name for path in GOLDENS.iterdir()} == expected


def test_text_is_the_same_for_another_capture() -> None:
    first = _run_toy(toys.ToyDiT)
    torch._dynamo.reset()
    assert _run_toy(toys.ToyDiT).stages == first.stages
