"""Cases of the decision that sequences seldom reach: numbers that are not finite, priorities, dtypes and shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacache_fx.policy import Policy, PolicyState, StepReason, relative_l1
from tests.test_policy import INF, NAN, R, falling, plain, ramp, reasons, run


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_step_that_is_not_finite_is_computed_and_so_is_the_next(bad: float) -> None:
    values = [[1.0, 1.0], [1.0, 1.0], [bad, 1.0], [1.0, 1.0], [1.0, 1.0], [1.1, 1.1]]
    decisions = run(plain(), values, falling(6))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.NON_FINITE, R.NON_FINITE, R.SKIPPED, R.SKIPPED]
    assert float(decisions[-1].accumulated) == pytest.approx(0.1, abs=1e-6)


def test_nan_does_not_reach_the_next_generation() -> None:
    decisions = run(plain(), [1.0, 1.0, NAN, 1.0, 1.1, 1.1], [3, 2, 1, 9, 8, 7])
    expected = [R.FIRST, R.SKIPPED, R.NON_FINITE, R.TRAJECTORY_RESTARTED, R.SKIPPED, R.SKIPPED]
    assert reasons(decisions) == expected
    assert [float(decision.accumulated) for decision in decisions[3:]] == pytest.approx([0, 0.1, 0.1], abs=1e-6)


def test_the_first_step_ignores_what_the_state_tensors_hold() -> None:
    decision = plain().decide(torch.ones(2), torch.full((2,), NAN), torch.tensor(1.0), PolicyState.initial())
    assert reasons([decision]) == [R.FIRST]
    assert (float(decision.accumulated), float(decision.state.accumulated_rel_l1_distance)) == (0, 0)


def test_a_generation_that_begins_with_nan_recovers() -> None:
    assert reasons(run(plain(), [NAN, 1.0, 1.0], falling(3))) == [R.FIRST, R.NON_FINITE, R.SKIPPED]


@pytest.mark.parametrize("time", [NAN, INF, -INF])
def test_a_timestep_that_is_not_finite_is_computed(time: float) -> None:
    decisions = run(plain(), [1.0] * 4, [4.0, 3.0, time, 1.0])
    assert bool(decisions[2].should_compute)
    assert [int(decision.state.step_index) for decision in decisions[:2]] == [1, 2]


def test_a_nan_timestep_does_not_hide_a_restart() -> None:
    decisions = run(plain(), [1.0] * 6, [4.0, 3.0, NAN, 9.0, 8.0, 7.0])
    assert reasons(decisions)[3] is R.TRAJECTORY_RESTARTED


@pytest.mark.parametrize("sign", [1, -1])
def test_an_increment_that_overflows_is_computed(sign: int) -> None:
    def overflow(rel: Tensor) -> Tensor:
        return torch.where(rel > 0.5, sign * 1e38 * rel * 1e38, rel)

    decisions = run(plain(rescale=overflow), ramp(0.1, 1.0, 0.1, 0.1), falling(5))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.NON_FINITE, R.SKIPPED, R.SKIPPED]
    assert float(decisions[2].accumulated) == sign * INF
    assert float(decisions[3].accumulated) == pytest.approx(0.1, abs=1e-6)


def test_negative_increments_count_down() -> None:
    decisions = run(plain(rescale=lambda rel: 0.2 - rel), ramp(0.1, 0.4, 0.0, 0.0, 0.0), falling(6))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.SKIPPED, R.SKIPPED, R.THRESHOLD, R.SKIPPED]
    compared = [float(decision.accumulated) for decision in decisions]
    assert compared == pytest.approx([0, 0.1, -0.1, 0.1, 0.3, 0.2], abs=1e-6)


def state_with(**fields: float) -> PolicyState:
    """A state in the middle of a falling trajectory, five steps in."""
    middle: dict[str, float] = {"step_index": 5, "previous_timestep": 500.0, "timestep_direction": -1.0} | fields
    initial = PolicyState.initial()
    tensors = {name: torch.tensor(value, dtype=getattr(initial, name).dtype) for name, value in middle.items()}
    return initial._replace(**tensors)


def test_the_first_reason_that_holds_is_given() -> None:
    """All hold at once; then each in turn is taken away."""
    state: dict[str, float] = {"step_index": 0, "num_inference_steps": 6, "consecutive_skips": 2}
    policy: dict[str, Any] = {"num_warmup_steps": 9, "num_final_steps": 9, "max_consecutive_skips": 2}
    change, time, seen = NAN, 600.0, []
    removals: list[tuple[dict[str, float], dict[str, Any], float, float]] = [
        ({}, {}, change, time),
        ({"step_index": 5}, {}, change, time),
        ({}, {}, change, 400.0),
        ({}, {}, 1.5, 400.0),
        ({}, {"num_warmup_steps": 5}, 1.5, 400.0),
        ({}, {"num_final_steps": 0}, 1.5, 400.0),
        ({}, {"max_consecutive_skips": 3}, 1.5, 400.0),
        ({}, {}, 1.0, 400.0),
    ]
    for state_fields, policy_fields, change, time in removals:
        state |= state_fields
        policy |= policy_fields
        decision = plain(**policy).decide(
            torch.tensor([change]), torch.ones(1), torch.tensor(time), state_with(**state)
        )
        seen += reasons([decision])
        assert bool(decision.should_compute) == (seen[-1] is not R.SKIPPED)
        assert int(decision.state.consecutive_skips) == (3 if seen[-1] is R.SKIPPED else 0)
    order = [R.FIRST, R.TRAJECTORY_RESTARTED, R.NON_FINITE, R.WARMUP, R.FINAL, R.MAX_CONSECUTIVE_SKIPS, R.THRESHOLD]
    assert seen == [*order, R.SKIPPED]
    assert [int(reason) for reason in StepReason] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_warmup_steps_are_computed() -> None:
    found = reasons(run(plain(num_warmup_steps=3), [1.0] * 5, falling(5)))
    assert found == [R.FIRST, R.WARMUP, R.WARMUP, R.SKIPPED, R.SKIPPED]


@pytest.mark.parametrize(("total", "tail"), [(6, [R.FINAL, R.FINAL]), (0, [R.SKIPPED, R.SKIPPED])])
def test_final_steps_are_computed_if_the_length_is_known(total: int, tail: list[StepReason]) -> None:
    found = reasons(run(plain(num_final_steps=2), [1.0] * 6, falling(6), total))
    assert found == [R.FIRST, R.SKIPPED, R.SKIPPED, R.SKIPPED, *tail]


@pytest.mark.parametrize(("final", "tail"), [(0, R.SKIPPED), (1, R.FINAL)])
def test_a_generation_may_run_past_its_known_length(final: int, tail: StepReason) -> None:
    found = reasons(run(plain(num_final_steps=final), [1.0] * 5, falling(5), 3))  # a sampler of two calls per step
    assert found == [R.FIRST, R.SKIPPED, tail, tail, tail]


def test_final_steps_count_anew_in_each_generation() -> None:
    found = reasons(run(plain(num_final_steps=1), [1.0] * 6, [3, 2, 1, 3, 2, 1], 3))
    assert found == [R.FIRST, R.SKIPPED, R.FINAL, R.TRAJECTORY_RESTARTED, R.SKIPPED, R.FINAL]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_skips_in_a_row_are_limited(limit: int) -> None:
    decisions = run(plain(max_consecutive_skips=limit), [1.0] * 9, falling(9))
    cycle = [R.SKIPPED] * limit + [R.MAX_CONSECUTIVE_SKIPS]
    assert reasons(decisions) == [R.FIRST, *(cycle * 9)][:9]
    assert [int(decision.state.consecutive_skips) for decision in decisions[: limit + 2]] == [*range(limit + 1), 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (2, 5, 3)])
@pytest.mark.parametrize("time", [3, 3.0, True, [3, 3], [[3.0], [4.0]]])
def test_results_are_scalars_of_fixed_dtypes(dtype: torch.dtype, shape: tuple[int, ...], time: Any) -> None:
    state = PolicyState.initial(50)
    for _ in range(2):
        tensors = torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype)
        decision = plain(num_final_steps=1, max_consecutive_skips=2).decide(*tensors, torch.tensor(time), state)
        state = decision.state
        results = {**decision._asdict(), **state._asdict()}
        del results["state"]
        assert {name: result.dtype for name, result in results.items()} == {
            "should_compute": torch.bool,
            "reason": torch.int64,
            "rel_l1": torch.float32,
            "accumulated": torch.float32,
            "accumulated_rel_l1_distance": torch.float32,
            "step_index": torch.int64,
            "consecutive_skips": torch.int64,
            "previous_timestep": torch.float32,
            "timestep_direction": torch.float32,
            "num_inference_steps": torch.int64,
        }
        assert {result.shape for result in results.values()} == {torch.Size([])}
    assert float(state.previous_timestep) == float(np.mean(time))


def test_the_initial_state_has_a_tensor_of_its_own_for_each_field() -> None:
    state = PolicyState.initial(7)
    assert len({field.data_ptr() for field in state}) == len(state)
    assert [float(field) for field in state] == [0, 0, 0, 0, 0, 7]


def test_narrow_dtypes_are_compared_in_float32() -> None:
    previous = torch.full((1000,), 256.0, dtype=torch.bfloat16)
    current = previous.clone()
    current[0] += 2  # one bfloat16 step in one element: lost in a mean of bfloat16
    expected = 2 / 1000 / 256
    assert float(relative_l1(current, previous)) == pytest.approx(expected, rel=1e-4)
    assert float(plain().decide(current, previous, torch.tensor(1.0), state_with()).rel_l1) == pytest.approx(
        expected, rel=1e-4
    )
    wide = torch.full((1000,), 60_000.0, dtype=torch.float16)
    assert float(relative_l1(-wide, wide)) == 2  # the difference and the sum leave the range of float16


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 300), st.sampled_from([1e-3, 1.0, 1e4]))
def test_relative_l1_against_float64(seed: int, size: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    current, previous = (rng.normal(0.3, scale, size).astype(np.float32) for _ in range(2))
    wide, before = current.astype(np.float64), previous.astype(np.float64)
    expected = np.abs(wide - before).mean() / (np.abs(before).mean() + 1e-8)
    result = relative_l1(torch.from_numpy(current), torch.from_numpy(previous))
    assert (result.dtype, result.shape) == (torch.float32, ())
    assert float(result) == pytest.approx(expected, rel=1e-5)


def test_relative_l1_to_zero_is_finite() -> None:
    assert float(relative_l1(torch.zeros(3), torch.zeros(3))) == 0
    assert float(relative_l1(torch.ones(3), torch.zeros(3))) == pytest.approx(1e8)
    assert math.isfinite(float(relative_l1(torch.full((3,), 1e20), torch.zeros(3))))


def test_decides_without_gradients_or_writes() -> None:
    current, previous = torch.ones(3), torch.full((3,), 0.5)
    state = state_with()
    before = [field.clone() for field in state]
    Policy(0.2, torch.Tensor.abs).decide(current, previous, torch.tensor(400.0), state)
    assert [float(field) for field in state] == [float(field) for field in before]
    assert (current.tolist(), previous.tolist()) == ([1.0] * 3, [0.5] * 3)
