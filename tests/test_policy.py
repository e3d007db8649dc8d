"""The decision, step by step, against the algorithm written out on Python numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacache_fx.policy import Decision, PolicyState, StepReason
from tests.simulation import INF, NAN, Reference, Step, falling, plain, policy_for, reasons, run, timed

R = StepReason
NEAR_TIE = 1e-4
EXACT = [(1.0, 0.0), (2.0, -0.75, 0.0625), (-0.5, 0.0), (0.125,)]  # nothing is rounded: ties are decided exactly
FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


@st.composite
def references(draw: st.DrawFn, length: int, exact: bool) -> Reference:
    return Reference(
        draw(st.sampled_from([0.0625, 0.125, 0.25, 0.5, 1.0])),
        draw(st.sampled_from(EXACT)) if exact else FLUX,
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.sampled_from([0, 1, 3])),
        draw(st.sampled_from([0, max(1, length - 3), length])),
        draw(st.sampled_from([None, None, 1, 2])),
    )


@st.composite
def sequences(draw: st.DrawFn, length: int) -> list[Step]:
    """Steps that mostly go one way; timesteps repeat at times or jump back, latents jump, another prompt comes."""
    time, content, forth, steps = 1000.0, draw(st.integers(-2, 2)), draw(st.sampled_from([-20.0, 20.0])), []
    further = draw(st.integers(0, 2))
    for _ in range(length):
        rel = draw(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 24])) / 16
        rel = draw(st.sampled_from([rel] * 30 + [NAN, INF]))
        usual = st.integers(0, 12) if draw(st.integers(0, 5)) else st.integers(0, 96)
        move = draw(st.sampled_from([draw(usual) / 64] * 30 + [NAN, INF]))
        content = draw(st.sampled_from([content] * 12 + [content + 1, -content]))
        further = draw(st.sampled_from([further] * 8 + [further + 1, 0]))
        steps.append(Step(rel, draw(st.sampled_from([time] * 30 + [NAN, INF, -INF])), move, content, further))
        time += forth * draw(st.sampled_from([1, 1, 1, 1, 1, 0.5, 0, 0, -6]))
    return steps


@st.composite
def scenarios(draw: st.DrawFn, exact: bool) -> tuple[Reference, list[Step]]:
    length = draw(st.integers(1, 14))
    return draw(references(length, exact)), draw(sequences(length))


def finite(value: float) -> float:
    """A polynomial of infinity is infinite or NaN, depending on the order of its terms."""
    return value if math.isfinite(value) else NAN


def carried(state: PolicyState) -> list[float]:
    return [float(field) for field in state]


def expected(reference: Reference) -> list[float]:
    """Fields of `PolicyState`, in order."""
    counts = [reference.accumulated, reference.index, reference.skips]
    further = (-1 if reference.further_tells else 1) * (0 if reference.further is None else reference.further + 1)
    progress = [reference.time, reference.direction, *reference.moves]
    return [*counts, *progress, reference.content, further, reference.total]


def check(reference: Reference, steps: list[Step], tolerance: float) -> None:
    policy = policy_for(reference)
    twin = replace(reference)
    for step, decision in zip(steps, run(policy, steps, reference.total), strict=True):
        reason, compared = twin.step(step)
        if tolerance and abs(compared - twin.thresh) < NEAR_TIE * max(1, abs(compared)):
            return  # float32 may fall on the other side
        assert reasons([decision]) == [getattr(R, reason)]
        assert bool(decision.should_compute) == (reason != "SKIPPED")
        begins = reason in ("FIRST", "TRAJECTORY_RESTARTED", "CONDITIONING_CHANGED")
        assert float(decision.rel_l1) == pytest.approx(NAN if begins else step.rel, nan_ok=True, abs=0, rel=0)
        near: dict[str, Any] = {"rel": tolerance, "abs": tolerance / 10, "nan_ok": True}
        assert finite(float(decision.accumulated)) == pytest.approx(finite(compared), **near)
        assert carried(decision.state) == pytest.approx(expected(twin), **near)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(scenarios(exact=True))
def test_decides_exactly_as_the_reference(scenario: tuple[Reference, list[Step]]) -> None:
    check(*scenario, tolerance=0.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scenarios(exact=False))
def test_decides_as_the_reference_with_a_published_polynomial(scenario: tuple[Reference, list[Step]]) -> None:
    check(*scenario, tolerance=1e-4)


@pytest.mark.parametrize("reason", [reason.name for reason in R if reason is not R.SHAPE_CHANGED])
def test_the_scenarios_hold_every_reason(reason: str) -> None:
    def holds(scenario: tuple[Reference, list[Step]]) -> bool:
        reference, steps = scenario
        twin = replace(reference)
        found = [twin.step(step)[0] for step in steps]
        return reason in found

    find(scenarios(exact=True), holds, settings=settings(max_examples=1000, phases=[Phase.generate], derandomize=True))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Reference, list[list[Step]]]:
    length, size = draw(st.integers(1, 10)), draw(st.integers(1, 4))
    samples = [draw(sequences(length)) for _ in range(size)]
    return draw(references(length, exact=draw(st.booleans()))), [list(steps) for steps in zip(*samples, strict=True)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_a_batch_decides_exactly_as_its_samples_alone(batch: tuple[Reference, list[list[Step]]]) -> None:
    reference, steps = batch
    policy, alone = policy_for(reference, per_sample=True), policy_for(reference)
    together = run(policy, steps, reference.total)
    for number, sample in enumerate(zip(*steps, strict=True)):
        for one, all_ in zip(run(alone, sample, reference.total), together, strict=True):
            assert rows(all_, number) == pytest.approx(rows(one, None), rel=0, abs=0, nan_ok=True)


def rows(decision: Decision, number: int | None) -> list[float]:
    def of(value: Tensor) -> float:
        return float(value if number is None else value[number])

    *state, total = decision.state
    assert total.shape == ()
    return [*map(of, decision[:-1]), *map(of, state), float(total)]


def test_accumulates_until_the_threshold_and_starts_again() -> None:
    decisions = run(plain(), falling(0.1, 0.1, 0.1, 0.2, 0.3, 0.0))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.SKIPPED, R.THRESHOLD, R.SKIPPED, R.THRESHOLD, R.SKIPPED]
    compared = [float(decision.accumulated) for decision in decisions]
    assert compared == pytest.approx([0, 0.1, 0.2, 0.3, 0.2, 0.5, 0], abs=1e-6)
    kept = [float(decision.state.accumulated_rel_l1_distance) for decision in decisions]
    assert kept == pytest.approx([0, 0.1, 0.2, 0, 0.2, 0, 0], abs=1e-6)
    rel = [float(decision.rel_l1) for decision in decisions]
    assert math.isnan(rel[0])
    assert rel[1:] == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.3, 0.0], abs=1e-6)


def test_reaching_the_threshold_exactly_computes() -> None:
    assert reasons(run(plain(0.25), falling(0.125, 0.125)))[1:] == [R.SKIPPED, R.THRESHOLD]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("again", [1, -1])
def test_a_timestep_turned_back_starts_a_generation(sign: int, again: int) -> None:
    times = [sign * t for t in [3, 2, 1, 9, 9 + again, 9 + 2 * again, 9 - again]]  # again=1: then the other way
    decisions = run(plain(num_warmup_steps=2), timed(*times))
    fresh = [R.TRAJECTORY_RESTARTED, R.WARMUP, R.SKIPPED, R.TRAJECTORY_RESTARTED]
    assert reasons(decisions) == [R.FIRST, R.WARMUP, R.SKIPPED, *fresh]
    assert [int(decision.state.step_index) for decision in decisions] == [1, 2, 3, 1, 2, 3, 1]
    assert math.isnan(float(decisions[3].rel_l1))


@pytest.mark.parametrize("sign", [1, -1])
def test_repeated_and_upward_timesteps_do_not_restart(sign: int) -> None:
    times = [sign * t for t in [10, 10, 8, 8, 6, 6, 6, 4]]
    assert reasons(run(plain(), timed(*times))) == [R.FIRST] + [R.SKIPPED] * 7


@pytest.mark.parametrize(
    ("begin", "reason"),
    [
        (Step(0.125, 900.0), R.TRAJECTORY_RESTARTED),
        (Step(0.125, 500.0, move=1.4), R.TRAJECTORY_RESTARTED),
        (Step(0.125, 500.0, content=7), R.CONDITIONING_CHANGED),
    ],
)
def test_a_beginning_forgets_the_distance_and_the_moves(begin: Step, reason: StepReason) -> None:
    before = [Step(0.125, 700.0), Step(0.125, 600.0, move=0.05)]
    after = [Step(0.125, begin.time - 1, 0.8, begin.content), Step(0.125, begin.time - 2, 0.89, begin.content)]
    decisions = run(plain(num_final_steps=1), [*before, begin, *after], total=3)
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, reason, R.SKIPPED, R.FINAL]
    assert [float(decision.accumulated) for decision in decisions] == [0, 0.125, 0, 0.125, 0.25]


def test_the_same_conditioning_as_in_the_generation_before_last_is_another_one() -> None:
    steps = [Step(0.0, 1000.0 - i, content=content) for i, content in enumerate([5, 5, 6, 6, 5, 0, 0])]
    again = R.CONDITIONING_CHANGED
    assert reasons(run(plain(), steps)) == [R.FIRST, R.SKIPPED, again, R.SKIPPED, again, again, R.SKIPPED]


def test_a_second_timestep_may_change_with_the_first() -> None:
    steps = [Step(0.0, 1000.0 - 20 * i, further=900 - 20 * i) for i in range(5)]
    assert reasons(run(plain(), steps)) == [R.FIRST, *[R.SKIPPED] * 4]


def test_a_second_timestep_that_tells_branches_apart_is_conditioning() -> None:
    """Two branches take turns at each timestep; what seems to be a timestep is where their music begins."""
    steps = [Step(0.0, 1000.0 - 20 * i, further=further) for i in range(3) for further in (30, 0)]
    assert reasons(run(plain(), steps)) == [R.FIRST, *[R.CONDITIONING_CHANGED] * 5]


def test_one_sample_that_begins_anew_leaves_the_others_alone() -> None:
    smooth = [Step(0.0625, 1000.0 - i) for i in range(4)]
    upset = [*smooth[:2], Step(0.0625, 998.0, move=1.4), smooth[3]]
    decisions = run(plain(per_sample=True), [list(steps) for steps in zip(smooth, upset, smooth, strict=True)])
    restarted = R.TRAJECTORY_RESTARTED
    assert decisions[2].reason.tolist() == [R.SKIPPED, restarted, R.SKIPPED]
    assert decisions[3].accumulated.tolist() == [0.1875, 0.0625, 0.1875]
    assert decisions[3].state.step_index.tolist() == [4, 2, 4]
    assert torch.isnan(decisions[2].rel_l1).tolist() == [False, True, False]
