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

from teacache_fx.policy import Evidence, PolicyState, StepReason, relative_l1, relative_move
from tests.simulation import INF, NAN, Step, falling, plain, reasons, run, tensors_of, timed

R = StepReason


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_distance_that_is_not_finite_is_computed_and_forgotten(bad: float) -> None:
    decisions = run(plain(), falling(0.1, bad, bad, 0.0, 0.1))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.NON_FINITE, R.NON_FINITE, R.SKIPPED, R.SKIPPED]
    assert float(decisions[-1].accumulated) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("time", [NAN, INF, -INF])
def test_a_timestep_that_is_not_finite_is_computed(time: float) -> None:
    decisions = run(plain(), timed(4.0, 3.0, time, 2.0))
    assert bool(decisions[2].should_compute)
    assert float(decisions[2].state.previous_timestep) == 3.0


def test_a_nan_timestep_does_not_hide_a_restart() -> None:
    found = reasons(run(plain(), timed(4.0, 3.0, NAN, 9.0, 8.0, 7.0)))
    assert found == [R.FIRST, R.SKIPPED, R.NON_FINITE, R.TRAJECTORY_RESTARTED, R.SKIPPED, R.SKIPPED]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_latents_that_are_not_finite_do_not_hide_a_jump(bad: float) -> None:
    steps = [Step(0.0, 9.0 - i, move) for i, move in enumerate([1.0, 0.1, bad, 0.1, 1.4, 0.1, 0.1])]
    assert reasons(run(plain(), steps))[4:] == [R.TRAJECTORY_RESTARTED, R.SKIPPED, R.SKIPPED]


@pytest.mark.parametrize("sign", [1, -1])
def test_an_increment_that_overflows_is_computed(sign: int) -> None:
    def overflow(rel: Tensor) -> Tensor:
        return torch.where(rel > 0.5, sign * 1e38 * rel * 1e38, rel)

    decisions = run(plain(rescale=overflow), falling(0.1, 1.0, 0.1, 0.1))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.NON_FINITE, R.SKIPPED, R.SKIPPED]
    assert float(decisions[2].accumulated) == sign * INF
    assert float(decisions[3].accumulated) == pytest.approx(0.1, abs=1e-6)


def test_negative_increments_count_down() -> None:
    decisions = run(plain(rescale=lambda rel: 0.2 - rel), falling(0.1, 0.4, 0.0, 0.0, 0.0))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.SKIPPED, R.SKIPPED, R.THRESHOLD, R.SKIPPED]
    compared = [float(decision.accumulated) for decision in decisions]
    assert compared == pytest.approx([0, 0.1, -0.1, 0.1, 0.3, 0.2], abs=1e-6)


def state_with(**fields: float) -> PolicyState:
    """A state in the middle of a falling trajectory, five steps in."""
    middle: dict[str, float] = {"step_index": 5, "previous_timestep": 500.0, "timestep_direction": -1.0} | fields
    initial = PolicyState.initial()
    tensors = {name: torch.tensor(value, dtype=getattr(initial, name).dtype) for name, value in middle.items()}
    return initial._replace(**tensors)


ORDER = [
    R.FIRST, R.TRAJECTORY_RESTARTED, R.CONDITIONING_CHANGED, R.NON_FINITE, R.WARMUP, R.FINAL, R.MAX_CONSECUTIVE_SKIPS,
    R.THRESHOLD, R.SKIPPED,
]  # fmt: skip


def test_the_first_reason_that_holds_is_given() -> None:
    """All hold at once; then each in turn is taken away."""
    state: dict[str, float] = {"step_index": 0, "num_inference_steps": 6, "consecutive_skips": 2}
    policy: dict[str, Any] = {"num_warmup_steps": 9, "num_final_steps": 9, "max_consecutive_skips": 2}
    step, seen = Step(NAN, 600.0, move=1.4, content=3), []
    removals: list[tuple[dict[str, float], dict[str, Any], dict[str, Any]]] = [
        ({}, {}, {}),
        ({"step_index": 5}, {}, {}),
        ({}, {}, {"time": 400.0, "move": 0.1}),
        ({}, {}, {"content": 0}),
        ({}, {}, {"rel": 0.5}),
        ({}, {"num_warmup_steps": 5}, {}),
        ({}, {"num_final_steps": 0}, {}),
        ({}, {"max_consecutive_skips": 3}, {}),
        ({}, {}, {"rel": 0.0}),
    ]
    for state_fields, policy_fields, step_fields in removals:
        state, policy, step = state | state_fields, policy | policy_fields, step._replace(**step_fields)
        decision = plain(**policy).decide(*tensors_of(step), state_with(**state))
        seen += reasons([decision])
        assert bool(decision.should_compute) == (seen[-1] is not R.SKIPPED)
        assert int(decision.state.consecutive_skips) == (3 if seen[-1] is R.SKIPPED else 0)
    assert seen == ORDER
    assert [int(reason) for reason in seen[:-1]] == sorted(int(reason) for reason in seen[:-1])


@pytest.mark.parametrize(("time", "move"), [(600.0, 0.1), (400.0, 1.4)])
def test_either_sign_of_a_restart_precedes_the_conditioning(time: float, move: float) -> None:
    decision = plain().decide(*tensors_of(Step(0.0, time, move, content=3)), state_with())
    assert reasons([decision]) == [R.TRAJECTORY_RESTARTED]


def test_warmup_steps_are_computed() -> None:
    found = reasons(run(plain(num_warmup_steps=3), falling(0, 0, 0, 0)))
    assert found == [R.FIRST, R.WARMUP, R.WARMUP, R.SKIPPED, R.SKIPPED]


@pytest.mark.parametrize(("total", "tail"), [(6, [R.FINAL, R.FINAL]), (0, [R.SKIPPED, R.SKIPPED])])
def test_final_steps_are_computed_if_the_length_is_known(total: int, tail: list[StepReason]) -> None:
    found = reasons(run(plain(num_final_steps=2), falling(0, 0, 0, 0, 0), total))
    assert found == [R.FIRST, R.SKIPPED, R.SKIPPED, R.SKIPPED, *tail]


@pytest.mark.parametrize(("final", "tail"), [(0, R.SKIPPED), (1, R.FINAL)])
def test_a_generation_may_run_past_its_known_length(final: int, tail: StepReason) -> None:
    found = reasons(run(plain(num_final_steps=final), falling(0, 0, 0, 0), 3))  # a sampler of two calls per step
    assert found == [R.FIRST, R.SKIPPED, tail, tail, tail]


def test_final_steps_count_anew_in_each_generation() -> None:
    found = reasons(run(plain(num_final_steps=1), timed(3, 2, 1, 3, 2, 1), 3))
    assert found == [R.FIRST, R.SKIPPED, R.FINAL, R.TRAJECTORY_RESTARTED, R.SKIPPED, R.FINAL]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_skips_in_a_row_are_limited(limit: int) -> None:
    decisions = run(plain(max_consecutive_skips=limit), falling(*[0.0] * 8))
    cycle = [R.SKIPPED] * limit + [R.MAX_CONSECUTIVE_SKIPS]
    assert reasons(decisions) == [R.FIRST, *(cycle * 9)][:9]
    assert [int(decision.state.consecutive_skips) for decision in decisions[: limit + 2]] == [*range(limit + 1), 0]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_results_have_fixed_dtypes_and_the_shape_of_the_state(shape: tuple[int, ...]) -> None:
    state = PolicyState.initial(50, shape=shape)
    policy = plain(num_warmup_steps=1, num_final_steps=1, max_consecutive_skips=2, per_sample=bool(shape))
    for _ in range(2):
        numbers = torch.ones(shape, dtype=torch.int64)
        evidence = Evidence(torch.rand(shape), torch.rand(shape), numbers, numbers)
        decision = policy.decide(torch.rand(shape), evidence, state)
        kinds = {name: (field.dtype, tuple(field.shape)) for name, field in state._asdict().items()}
        state = decision.state
        assert {name: (field.dtype, tuple(field.shape)) for name, field in state._asdict().items()} == kinds
        found = {name: getattr(decision, name).dtype for name in ("should_compute", "reason", "rel_l1", "accumulated")}
        kind = torch.float32
        assert found == {"should_compute": torch.bool, "reason": torch.int64, "rel_l1": kind, "accumulated": kind}
        assert {tuple(result.shape) for result in decision[:-1]} == {shape}


def test_the_initial_state_has_a_tensor_of_its_own_for_each_field() -> None:
    state = PolicyState.initial(7, shape=(2,))
    assert len({field.data_ptr() for field in state}) == len(state)
    assert [field.tolist() for field in state] == [[0, 0]] * 9 + [7]
    integers = {"step_index", "consecutive_skips", "conditioning", "further_times", "num_inference_steps"}
    assert {name for name, field in state._asdict().items() if field.dtype == torch.int64} == integers


def test_decides_without_writes_and_keeps_none_of_its_arguments() -> None:
    rel, evidence = tensors_of(Step(0.5, 400.0, 0.1, 3))
    given_ = [rel, *evidence, *state_with()]
    before = [tensor.clone() for tensor in given_]
    following = plain().decide(rel, evidence, PolicyState(*given_[5:])).state
    assert [float(tensor) for tensor in given_] == [float(tensor) for tensor in before]
    assert not {id(tensor) for tensor in following[:-1]} & set(map(id, given_))  # a graph must not return its inputs


def by_numpy(current: Tensor, previous: Tensor, moving: bool) -> float:
    now, before = current.double().numpy().ravel(), previous.double().numpy().ravel()
    kept = (now != before) if moving else np.ones(now.shape, bool)
    count = 1 if moving else now.size
    return float(np.abs(now - before)[kept].sum() / count / (np.abs(before)[kept].sum() / count + 1e-8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 4), st.sampled_from([1e-3, 1.0, 1e4]), st.booleans())
def test_distances_against_float64(seed: int, size: int, batch: int, scale: float, moving: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    current, previous = (torch.randn(batch, size, 2, generator=rng) * scale + 0.3 for _ in range(2))
    still = torch.rand(size, 2, generator=rng) < 0.4
    current = torch.where(still, previous, current)
    distance = relative_move if moving else relative_l1
    whole, rows = distance(current, previous), distance(current, previous, per_sample=True)
    assert (whole.dtype, whole.shape, rows.dtype, rows.shape) == (torch.float32, (), torch.float32, (batch,))
    assert float(whole) == pytest.approx(by_numpy(current, previous, moving), rel=1e-5)
    expected = [by_numpy(one, other, moving) for one, other in zip(current, previous, strict=True)]
    assert rows.tolist() == pytest.approx(expected, rel=1e-5)


def test_narrow_dtypes_are_compared_in_float32() -> None:
    previous = torch.full((1000,), 256.0, dtype=torch.bfloat16)
    current = previous.clone()
    current[0] += 2  # one bfloat16 step in one element: lost in a mean of bfloat16
    assert float(relative_l1(current, previous)) == pytest.approx(2 / 1000 / 256, rel=1e-4)
    assert float(relative_move(current, previous)) == pytest.approx(2 / 256, rel=1e-4)
    wide = torch.full((1000,), 60_000.0, dtype=torch.float16)
    for distance in (relative_l1, relative_move):
        assert float(distance(-wide, wide)) == 2  # the difference and the sum leave the range of float16


@pytest.mark.parametrize("distance", [relative_l1, relative_move])
def test_distances_to_zero_are_finite(distance: Any) -> None:
    assert float(distance(torch.zeros(3), torch.zeros(3))) == 0
    assert float(distance(torch.ones(3), torch.ones(3))) == 0
    assert float(distance(torch.ones(3), torch.zeros(3))) >= 1e8
    assert math.isfinite(float(distance(torch.full((3,), 1e20), torch.zeros(3))))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("distance", [relative_l1, relative_move])
def test_a_number_that_is_not_finite_shows_in_the_distance(distance: Any, bad: float) -> None:
    current = torch.ones(5)
    current[3] = bad
    assert not math.isfinite(float(distance(current, torch.ones(5))))
