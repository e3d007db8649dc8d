"""The decision, step by step, against the algorithm written out on Python floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacache_fx.config import Accumulation, ResolvedConfig, TeaCacheConfig
from teacache_fx.policy import Decision, Policy, PolicyState, StepReason
from teacache_fx.rewrite import policy_of
from teacache_fx.state import TeaCacheState

R = StepReason
NAN, INF = math.nan, math.inf
NEAR_TIE = 1e-4
FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
POLYNOMIALS = [(1.0, 0.0), FLUX, (2.0, -0.8, 0.05), (-0.5, 0.0), (0.15,)]


@dataclasses.dataclass
class Reference:
    """The algorithm on Python floats, of one context. It knows nothing of the package."""

    thresh: float
    coefficients: Sequence[float]
    signed: bool = False
    warmup: int = 0
    final: int = 0
    total: int | None = None
    limit: int | None = None
    accumulated: float = 0.0
    index: int = 0
    skips: int = 0
    direction: int = 0
    previous: tuple[list[float], float] | None = None

    def step(self, values: list[float], time: float) -> tuple[bool, float]:
        """Whether to compute, and the accumulated distance that was compared."""
        rel, new = NAN, self.previous is None
        if self.previous is not None:
            before, time_before = self.previous
            distance = sum(abs(a - b) for a, b in zip(values, before, strict=True)) / len(values)
            rel = distance / (sum(map(abs, before)) / len(before) + 1e-8)
            moved = (time > time_before) - (time < time_before)
            new = moved * self.direction < 0
            self.direction = moved or self.direction
        self.previous = (values, time)
        if new:
            self.accumulated, self.index, self.skips, self.direction = 0.0, 0, 0, 0
        else:
            rescaled = sum(c * rel**power for power, c in enumerate(reversed(self.coefficients)))
            self.accumulated += rescaled if self.signed else abs(rescaled)
        compared = self.accumulated
        in_final = self.total is not None and self.final > 0 and self.total - self.final <= self.index
        spent = self.limit is not None and self.skips >= self.limit
        compute = new or self.index < self.warmup or in_final or spent or compared >= self.thresh
        self.index += 1
        self.skips = 0 if compute else self.skips + 1
        self.accumulated = 0.0 if compute else compared
        return compute, compared


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Reference, list[tuple[list[float], float]]]:
    """Settings, and steps that drift by sixteenths; timesteps mostly move one way, repeat at times, or jump back."""
    length = draw(st.integers(1, 14))
    small = st.sampled_from([0, 0, 0, 1, -1, 2, -3, 8])
    values, time, forth, steps = [1.0, -2.0, 0.5, 3.0], 1000.0, draw(st.sampled_from([-20.0, 20.0])), []
    for _ in range(length):
        steps.append((values, time))
        values = [value + draw(small) / 16 for value in values]
        time += forth * draw(st.sampled_from([1, 1, 1, 1, 1, 0.5, 0, 0, -6]))
    reference = Reference(
        draw(st.sampled_from([0.05, 0.15, 0.3, 0.6, 1.0])),
        draw(st.sampled_from(POLYNOMIALS)),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.sampled_from([0, 1, 3])),
        draw(st.sampled_from([None, max(1, length - 3), length, length + 5])),
        draw(st.sampled_from([None, None, 1, 2])),
    )
    return reference, steps


def policy_for(reference: Reference) -> Policy:
    """The package's policy under the settings of the reference, built as the rewriting does."""
    accumulation: Accumulation = "signed" if reference.signed else "abs"
    config = TeaCacheConfig(
        rel_l1_thresh=reference.thresh,
        accumulation=accumulation,
        num_warmup_steps=reference.warmup,
        num_final_steps=reference.final,
        max_consecutive_skips=reference.limit,
    )
    return policy_of(ResolvedConfig(config, tuple(reference.coefficients), ""))


def run(policy: Policy, values: Sequence[Any], times: Sequence[Any], total: int = 0) -> list[Decision]:
    """Decides step after step; what is compared with is the step before."""
    state, previous, decisions = PolicyState.initial(total), torch.zeros(()), []
    for value, time in zip(values, times, strict=True):
        current = torch.as_tensor(value, dtype=torch.float32)
        decisions.append(policy.decide(current, previous, torch.as_tensor(time), state))
        state, previous = decisions[-1].state, current
    return decisions


def reasons(decisions: list[Decision]) -> list[StepReason]:
    return [StepReason(int(decision.reason)) for decision in decisions]


def plain(thresh: float = 0.25, rescale: Callable[[Tensor], Tensor] = lambda rel: rel, **fields: Any) -> Policy:
    return Policy(thresh, rescale, **fields)


def ramp(*changes: float) -> list[float]:
    """Values that change by these relative amounts, the first being 1."""
    return [float(value) for value in np.cumprod([1.0, *(1 + change for change in changes)])]


def falling(count: int) -> list[float]:
    return [1000.0 - 20 * i for i in range(count)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(scenarios())
def test_decides_as_the_reference(scenario: tuple[Reference, list[tuple[list[float], float]]]) -> None:
    reference, steps = scenario
    policy, state = policy_for(reference), PolicyState.initial(reference.total or 0)
    previous = torch.zeros(4)
    for values, time in steps:
        current = torch.tensor(values)
        compute, compared = reference.step(values, time)
        if abs(compared - reference.thresh) < NEAR_TIE * max(1, abs(compared)):
            return  # float32 may fall on the other side
        decision = policy.decide(current, previous, torch.tensor([time]), state)
        assert bool(decision.should_compute) == compute
        assert (reasons([decision]) == [R.SKIPPED]) == (not compute)
        assert float(decision.accumulated) == pytest.approx(compared, rel=1e-4, abs=1e-5)
        state, previous = decision.state, current
        assert float(state.accumulated_rel_l1_distance) == pytest.approx(reference.accumulated, rel=1e-4, abs=1e-5)
        assert (int(state.step_index), int(state.consecutive_skips)) == (reference.index, reference.skips)
        assert (float(state.previous_timestep), int(state.timestep_direction)) == (time, reference.direction)
        assert int(state.num_inference_steps) == (reference.total or 0)


@pytest.mark.parametrize("signed", [False, True])
def test_the_scenarios_hold_skips_and_computes(signed: bool) -> None:
    def mixed(scenario: tuple[Reference, list[tuple[list[float], float]]]) -> bool:
        reference, steps = scenario
        computes = [reference.step(*step)[0] for step in steps]
        return reference.signed == signed and any(computes[1:]) and computes.count(False) >= 2

    find(scenarios(), mixed, settings=settings(max_examples=1000, phases=[Phase.generate], derandomize=True))


def test_accumulates_until_the_threshold_and_starts_again() -> None:
    decisions = run(plain(), ramp(0.1, 0.1, 0.1, 0.2, 0.3, 0.0), falling(7))
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.SKIPPED, R.THRESHOLD, R.SKIPPED, R.THRESHOLD, R.SKIPPED]
    compared = [float(decision.accumulated) for decision in decisions]
    assert compared == pytest.approx([0, 0.1, 0.2, 0.3, 0.2, 0.5, 0], abs=1e-6)
    kept = [float(decision.state.accumulated_rel_l1_distance) for decision in decisions]
    assert kept == pytest.approx([0, 0.1, 0.2, 0, 0.2, 0, 0], abs=1e-6)
    rel = [float(decision.rel_l1) for decision in decisions]
    assert math.isnan(rel[0])
    assert rel[1:] == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.3, 0.0], abs=1e-6)


def test_reaching_the_threshold_exactly_computes() -> None:
    assert reasons(run(plain(0.25), [1.0, 1.125, 1.265625], falling(3)))[1:] == [R.SKIPPED, R.THRESHOLD]


def test_compares_with_the_step_before_even_if_it_was_skipped() -> None:
    state, policy = TeaCacheState("drift"), plain(10.0)
    rel = []
    for value, time in zip([1.0, 1.5, 2.25, 1.125], falling(4), strict=True):
        previous, _, *scalars = state.inputs(lambda: [torch.zeros(2), torch.zeros(2)], 0)
        current = torch.full((2,), value)
        decision = policy.decide(current, previous, torch.tensor(time), PolicyState(*scalars))
        record = [decision.reason, decision.rel_l1, decision.accumulated]
        state.advance([current, torch.zeros(2), *decision.state[:-1], *record])
        rel.append(float(decision.rel_l1))
    assert rel[1:] == [0.5, 0.5, 0.5]  # with the last computed step as base they were 0.5, 1.25 and 0.125
    assert [int(reason) for reason, *_ in state.records] == [R.FIRST, R.SKIPPED, R.SKIPPED, R.SKIPPED]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("again", [1, -1])
def test_a_timestep_turned_back_starts_a_generation(sign: int, again: int) -> None:
    times = [sign * t for t in [3, 2, 1, 9, 9 + again, 9 + 2 * again, 9 - again]]  # again=1: then the other way
    decisions = run(plain(num_warmup_steps=2), [1.0] * 7, times)
    fresh = [R.TRAJECTORY_RESTARTED, R.WARMUP, R.SKIPPED, R.TRAJECTORY_RESTARTED]
    assert reasons(decisions) == [R.FIRST, R.WARMUP, R.SKIPPED, *fresh]
    assert [int(decision.state.step_index) for decision in decisions] == [1, 2, 3, 1, 2, 3, 1]
    assert math.isnan(float(decisions[3].rel_l1))


def test_a_restart_forgets_the_distance_of_the_generation_before() -> None:
    decisions = run(plain(), [1.0, 1.2, 1.2, 1.2], [2, 1, 9, 8])
    assert reasons(decisions) == [R.FIRST, R.SKIPPED, R.TRAJECTORY_RESTARTED, R.SKIPPED]
    assert [float(decision.accumulated) for decision in decisions[2:]] == [0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_repeated_timesteps_do_not_restart(sign: int) -> None:
    times = [sign * t for t in [10, 10, 8, 8, 6, 6, 6, 4]]
    assert reasons(run(plain(), [1.0] * 8, times)) == [R.FIRST] + [R.SKIPPED] * 7
