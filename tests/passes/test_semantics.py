"""Both branches of rewritten toys against the model itself: in-place writes, views, several outputs, any sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from teacache_fx import TeaCacheBackend
from tests import odd_toys, toys

TRAITS = [
    toys.ToyDiT,
    toys.SlicedJointDiT,
    toys.RotaryInPlaceDiT,
    toys.EpilogueInPlaceDiT,
    toys.MutatesLatentsDiT,
    toys.TwoStreamDiT,
    toys.TransposedDiT,
    toys.OverwritingDiT,
    toys.AccumulatingDiT,
    toys.LateWriteDiT,
    partial(toys.LearnedQueryDiT, position=0),
]
ODD = [odd_toys.IdleModesDiT, odd_toys.FoldedFramesDiT, odd_toys.RefinedDiT]


def _clone(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A call may write to its latents; the conditioning stays the same object."""
    return {**inputs, "hidden_states": inputs["hidden_states"].clone()}


class ResidualReference:
    """What a skipped step must give: the model's own blocks replaced by what they added when they last ran."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.added: list[Tensor] = []
        self.reuse = False
        blocks = list(model.get_submodule("blocks").children())
        blocks[0].register_forward_pre_hook(self._enter)
        blocks[-1].register_forward_hook(self._leave)

    def _enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.entered = [args[0].clone(), args[1].clone()]

    def _leave(self, _: nn.Module, __: tuple[Tensor, ...], output: Any) -> Any:
        outputs = list(output) if isinstance(output, tuple) else [output]
        if not self.reuse:
            self.added = [out - entered for out, entered in zip(outputs, self.entered, strict=False)]
            return output
        reused = [entered + added for entered, added in zip(self.entered, self.added, strict=False)]
        return tuple(reused) if isinstance(output, tuple) else reused[0]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kind", [*TRAITS, *ODD])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_skipped_step_is_input_plus_residual(kind: Callable[..., nn.Module], inner: str) -> None:
    model, inputs = toys.make(kind), toys.inputs(tokens=8, words=8)
    later = {**inputs, "hidden_states": inputs["hidden_states"] * 1.3, "timestep": inputs["timestep"] - 50}
    backend = TeaCacheBackend(rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner=inner, on_decline="raise")
    compiled = torch.compile(toys.make(kind), backend=backend, fullgraph=True)
    reference = ResidualReference(model)
    with torch.no_grad():
        passed, expected_passed = _clone(inputs), _clone(inputs)
        computed, expected = compiled(**passed), model(**expected_passed)
        reference.reuse = True
        skipped, expected_skipped = compiled(**_clone(later)), model(**_clone(later))
    assert backend.stats().num_skipped == 1
    if inner == "eager":
        assert torch.equal(computed, expected)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(skipped, expected_skipped, rtol=1e-5, atol=1e-5)
    assert torch.equal(passed["hidden_states"], expected_passed["hidden_states"]), "writes to inputs must be kept"


def test_two_streams_keep_two_residuals() -> None:
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    with torch.no_grad():
        torch.compile(toys.make(toys.TwoStreamDiT), backend=backend)(**toys.inputs(tokens=8, words=8))
    plan = backend.reports[0].plan
    assert plan is not None
    assert [live.base for live in plan.stack.live_outputs] == ["linear_2", "text"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(TRAITS),
    num_blocks=st.integers(2, 4),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    words=st.integers(1, 9),
)
def test_forced_to_compute_it_is_the_model(
    kind: Callable[..., nn.Module], num_blocks: int, batch: int, tokens: int, words: int
) -> None:
    torch._dynamo.reset()
    model, inputs = toys.make(kind, num_blocks=num_blocks), toys.inputs(batch, tokens, words)
    backend = TeaCacheBackend(rel_l1_thresh=1e-9, coefficients=[1.0], inner="eager", on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for index in range(3):
            step = {**inputs, "timestep": inputs["timestep"] - index}
            assert torch.equal(compiled(**_clone(step)), model(**_clone(step)))
    assert backend.stats().num_skipped == 0
