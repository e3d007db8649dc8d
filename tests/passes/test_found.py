"""What the matcher finds in models with odd traits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from teacache_fx import TeaCacheBackend, explain
from tests import odd_toys, toys


def _lists(model: nn.Module) -> list[str]:
    plan = explain(model, **toys.inputs()).plan
    assert plan is not None
    return [part.path for part in plan.stack.lists]


@pytest.mark.parametrize(
    ("make", "lists"),
    [
        (odd_toys.IdleModesDiT, ["blocks"]),
        (odd_toys.FoldedFramesDiT, ["blocks"]),
        (odd_toys.RefinedDiT, ["blocks"]),  # the refiner's output has another length than what leaves the blocks
    ],
)
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_block_lists(make: Callable[[], nn.Module], lists: list[str]) -> None:
    assert _lists(toys.make(make)) == lists


def test_a_timestep_per_frame() -> None:
    model, inputs = toys.make(odd_toys.FrameTimestepDiT), toys.inputs()
    inputs["timestep"] = inputs["timestep"][:, None, None].expand(-1, 1, 3).contiguous()
    backend = TeaCacheBackend(rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    plan = backend.reports[0].plan
    assert plan is not None
    assert "timestep" in plan.modulation.timestep
    assert backend.stats().num_skipped == 1
