"""Each sample of a batch by itself, or all of them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teacache_fx import Declined, DeclineReason, StepReason, TeaCacheBackend
from tests import toys

SPEEDS = torch.tensor([0.002, 0.03, 0.05]).view(3, 1, 1)


def _steps(count: int = 8) -> list[dict[str, Tensor]]:
    inputs = toys.inputs(batch=3)
    drift = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    start, time = inputs["hidden_states"], inputs["timestep"]
    return [{**inputs, "hidden_states": start + i * SPEEDS * drift, "timestep": time - 0.1 * i} for i in range(count)]


def _row(inputs: dict[str, Tensor], row: int, prompt: Tensor) -> dict[str, Tensor]:
    alone = {name: value[row : row + 1].clone() for name, value in inputs.items()}
    return {**alone, "encoder_hidden_states": prompt}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_each_sample_is_as_if_alone(inner: str) -> None:
    model, steps = toys.make(), _steps()
    options: dict[str, Any] = {"rel_l1_thresh": 0.08, "coefficients": [1.0, 0.0], "inner": inner, "on_decline": "raise"}
    together = TeaCacheBackend(granularity="sample", **options)
    compiled = torch.compile(model, backend=together, fullgraph=True, dynamic=False)
    with torch.no_grad():
        outputs = [compiled(**inputs) for inputs in steps]
    reasons = [step.sample_reasons for step in together.stats().contexts[0].steps]
    assert any(len(set(row)) > 1 for row in reasons), "the samples must disagree"
    assert together.stats().num_in_vain > 0
    for row in range(3):
        alone = TeaCacheBackend(**options)
        single = torch.compile(model, backend=alone, fullgraph=True, dynamic=False)
        prompt = steps[0]["encoder_hidden_states"][row : row + 1].clone()
        with torch.no_grad():
            for inputs, output in zip(steps, outputs, strict=True):
                expected = single(**_row(inputs, row, prompt))
                torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-5, atol=1e-6)
        assert [step.reason for step in alone.stats().contexts[0].steps] == [sample[row] for sample in reasons]


def test_one_sample_of_nan_leaves_the_others_alone() -> None:
    model, steps = toys.make(), _steps(4)
    backend = TeaCacheBackend(
        rel_l1_thresh=1e30, coefficients=[1.0, 0.0], inner="eager", on_decline="raise", granularity="sample"
    )
    compiled = torch.compile(model, backend=backend)
    steps[2]["hidden_states"] = steps[2]["hidden_states"].clone()
    steps[2]["hidden_states"][1] = torch.nan
    with torch.no_grad():
        outputs = [compiled(**inputs) for inputs in steps]
    assert [int(output.isnan().any(-1).any(-1).sum()) for output in outputs] == [0, 0, 1, 0]
    reasons = [step.sample_reasons for step in backend.stats().contexts[0].steps]
    skipped, first, broken = StepReason.SKIPPED, StepReason.FIRST, StepReason.NON_FINITE
    assert reasons[:3] == [(first,) * 3, (skipped,) * 3, (skipped, broken, skipped)]
    assert reasons[3][0] == reasons[3][2] == skipped
    assert reasons[3][1] is not skipped


def test_dynamic_batches() -> None:
    model = toys.make()
    backend = TeaCacheBackend(
        rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner="inductor", on_decline="raise", granularity="sample"
    )
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        for batch in (2, 3, 4):
            inputs = toys.inputs(batch=batch)
            torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    assert [len(context.steps[0].sample_reasons) for context in backend.stats().contexts] == [2, 3, 4]
    assert backend.stats().num_skipped == 3


class FoldedDiT(toys.ToyDiT):
    """Its blocks see the whole batch as one sequence."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        folded = super().run_blocks(hidden_states.flatten(0, 1)[None], text[:1], temb[:1])
        return folded.reshape(hidden_states.shape)


def test_declined_where_the_batch_is_not_in_front() -> None:
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise", granularity="sample")
    with torch.no_grad(), pytest.raises(Declined) as caught:
        torch.compile(toys.make(FoldedDiT), backend=backend)(**toys.inputs())
    assert caught.value.reason is DeclineReason.NO_SAMPLE_DIMENSION
    assert "granularity='sample' needs the 2 samples first" in str(caught.value)


def test_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="granularity must be 'batch' or 'sample', got 'row'"):
        TeaCacheBackend(granularity="row")
