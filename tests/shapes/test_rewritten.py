"""Models as people outside diffusers write them: each is rewritten, and both of its branches are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from teacache_fx import TeaCacheBackend
from tests.both_branches import ALWAYS_SKIP, measure
from tests.shapes import containers, functional, interfaces, layouts, modalities
from tests.shapes.parts import Expected

CASES: dict[str, Expected] = {
    **containers.CASES,
    **functional.CASES,
    **interfaces.CASES,
    **layouts.CASES,
    **modalities.CASES,
}


def _make(expected: Expected) -> nn.Module:
    torch.manual_seed(0)
    return expected.make().eval().requires_grad_(False)


def _moved(expected: Expected, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same step with other latents; all else is the very same object, as the prompt of a pipeline is."""
    noise = torch.randn(inputs[expected.latents].shape, generator=torch.Generator().manual_seed(5))
    return {**inputs, expected.latents: inputs[expected.latents] + 0.01 * noise}


def _caller(model: Callable[..., Any], expected: Expected) -> Callable[..., Any]:
    return lambda **inputs: expected.call(model, inputs)


@pytest.mark.parametrize("name", CASES)
def test_is_rewritten(name: str) -> None:
    expected = CASES[name]
    model, inputs = _make(expected), expected.inputs()
    backend = TeaCacheBackend(rel_l1_thresh=ALWAYS_SKIP, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    both = measure(_caller(model, expected), _caller(compiled, expected), backend, inputs, _moved(expected, inputs))
    (report,) = backend.reports
    plan = report.plan
    assert plan is not None
    found = {
        "skipped": both.skipped,
        "blocks": plan.stack.num_blocks,
        "pattern": plan.modulation.pattern,
        "live": tuple(tuple(map(int, live.shape)) for live in plan.stack.live_outputs),
        "timestep": plan.modulation.timestep,
    }
    assert found == {
        "skipped": (False, True, True),
        "blocks": expected.blocks,
        "pattern": expected.pattern,
        "live": expected.live,
        "timestep": expected.timestep_input,
    }
    assert both.computed_error == 0
    assert both.reuse_error <= 1e-5
    assert both.change > 1e-4
    assert plan.costs.skipped_share <= expected.share
