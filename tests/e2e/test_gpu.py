"""The same graph on a GPU: both branches, half precision, one state per device."""

from __future__ import annotations

import warnings

import pytest
import torch

from teacache_fx import StepReason, TeaCacheBackend
from tests import toys

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_both_branches(inner: str, dtype: torch.dtype) -> None:
    model = toys.make().to("cuda", dtype)
    inputs = {key: value.to("cuda", dtype) for key, value in toys.inputs().items()}
    backend = TeaCacheBackend(rel_l1_thresh=1e3, coefficients=[1.0, 0.0], inner=inner, on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        computed, reused, expected = compiled(**inputs), compiled(**inputs), model(**inputs)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for result in (computed, reused):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    steps = backend.stats().contexts[0].steps
    assert [step.reason for step in steps] == [StepReason.FIRST, StepReason.SKIPPED]


def test_the_python_side_never_waits_for_the_device() -> None:
    """All that waits in a step is the cond, for its predicate."""
    model = toys.make().to("cuda")
    inputs = {key: value.to("cuda") for key, value in toys.inputs().items()}
    backend = TeaCacheBackend(rel_l1_thresh=1e3, coefficients=[1.0, 0.0], inner="inductor", on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(**inputs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                compiled(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 1, [str(wait.message) for wait in waits]


def test_devices_have_states_of_their_own() -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = TeaCacheBackend(rel_l1_thresh=1e3, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(**inputs)
        model.to("cuda")
        moved = {key: value.to("cuda") for key, value in inputs.items()}
        assert torch.equal(compiled(**moved), model(**moved))
    assert [len(context.steps) for context in backend.stats().contexts] == [1, 1]
