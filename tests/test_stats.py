"""The statistics: read from real states, and printed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from teacache_fx.policy import Policy, PolicyState, StepReason
from teacache_fx.state import TeaCacheState
from teacache_fx.stats import CacheStats, ContextStats, StepStats, collect

R = StepReason
NAN = math.nan


def state_of(
    label: str, reasons: Sequence[StepReason], rel_l1: float = 0.5, accumulated: float = 0.25
) -> TeaCacheState:
    """A state whose steps went like this."""
    state = TeaCacheState(label)
    for reason in reasons:
        inputs = state.inputs(lambda: [torch.zeros(2), torch.zeros(2)], 0)
        distance = NAN if reason in (R.FIRST, R.TRAJECTORY_RESTARTED) else rel_l1
        record = [torch.tensor(int(reason)), torch.tensor(distance), torch.tensor(accumulated)]
        state.advance([*inputs[:-1], *record])
    return state


def positions(context: ContextStats) -> list[tuple[int, int]]:
    return [(step.generation, step.step_index) for step in context.steps]


def test_collects_what_the_policy_decided() -> None:
    state, policy = TeaCacheState("cond"), Policy(0.25, torch.abs)
    values, times = [1.0, 1.125, 1.265625, 1.265625, 1.0], [900, 800, 700, 600, 900]
    for value, time in zip(values, times, strict=True):
        previous, _, *scalars = state.inputs(lambda: [torch.zeros(2), torch.zeros(2)], 0)
        current = torch.full((2,), value)
        decision = policy.decide(current, previous, torch.tensor(time), PolicyState(*scalars))
        record = [decision.reason, decision.rel_l1, decision.accumulated]
        state.advance([current, torch.zeros(2), *decision.state[:-1], *record])
    (context,) = collect("Toy", [state])
    assert (context.model, context.name, len(context.steps)) == ("Toy", "cond", 5)
    first, *middle, restarted = context.steps
    assert middle == [
        StepStats(0, 1, R.SKIPPED, 0.125, 0.125),
        StepStats(0, 2, R.THRESHOLD, 0.125, 0.25),
        StepStats(0, 3, R.SKIPPED, 0.0, 0.0),
    ]
    assert [(step.generation, step.step_index) for step in (first, restarted)] == [(0, 0), (1, 0)]
    assert [step.reason for step in (first, restarted)] == [R.FIRST, R.TRAJECTORY_RESTARTED]
    assert all(math.isnan(step.rel_l1) and step.accumulated == 0 for step in (first, restarted))
    assert [step.skipped for step in context.steps] == [False, True, False, True, False]
    assert context.hit_rate == 0.4


def test_the_numbers_are_plain() -> None:
    step = collect("Toy", [state_of("cond", [R.FIRST])])[0].steps[0]
    types = [type(value) for value in (step.generation, step.step_index, step.reason, step.rel_l1, step.accumulated)]
    assert types == [int, int, StepReason, float, float]


def test_generations_are_counted() -> None:
    reasons = [R.FIRST, R.SKIPPED, R.THRESHOLD, R.TRAJECTORY_RESTARTED, R.WARMUP, R.FIRST, R.FIRST, R.FINAL]
    (context,) = collect("Toy", [state_of("cond", reasons)])
    assert positions(context) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1)]


def test_a_reset_starts_a_generation_and_keeps_the_steps() -> None:
    state = state_of("cond", [R.FIRST, R.SKIPPED])
    steps = list(state.records)
    state.reset()
    state.records.extend(steps)
    assert positions(collect("Toy", [state])[0]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_counts_from_zero_where_the_beginning_is_lost() -> None:
    (context,) = collect("Toy", [state_of("cond", [R.SKIPPED, R.NON_FINITE, R.FIRST])])
    assert positions(context) == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("reason", [reason for reason in StepReason if reason is not R.SKIPPED])
def test_every_other_reason_is_a_computed_step(reason: StepReason) -> None:
    stats = CacheStats(tuple(collect("Toy", [state_of("cond", [reason])])))
    assert (stats.num_steps, stats.num_skipped) == (1, 0)
    assert f"computed ({reason.name.lower().replace('_', ' ')})" in str(stats)


def test_hit_rates_weigh_contexts_by_their_steps() -> None:
    states = [
        state_of("cond", [R.FIRST, R.SKIPPED, R.SKIPPED, R.SKIPPED]),
        state_of("uncond", [R.FIRST, R.THRESHOLD]),
        state_of("idle", []),
    ]
    stats = CacheStats(tuple(collect("Toy", states)))
    assert [context.name for context in stats.contexts] == ["cond", "uncond", "idle"]
    assert [context.hit_rate for context in stats.contexts] == [0.75, 0, 0]
    assert (stats.num_steps, stats.num_skipped, stats.hit_rate) == (6, 3, 0.5)


def test_no_steps_at_all() -> None:
    assert collect("Toy", []) == []
    stats = CacheStats(())
    assert (stats.num_steps, stats.num_skipped, stats.hit_rate) == (0, 0, 0)
    assert str(stats) == "TeaCache: no step has run"


def test_a_context_without_steps_is_printed() -> None:
    stats = CacheStats(tuple(collect("Toy", [state_of("cond", [])])))
    assert stats.hit_rate == 0
    assert str(stats).splitlines()[:2] == ["TeaCache: 0 of 0 steps skipped (0%)", "Toy, cond: hit rate 0%"]


def test_the_table() -> None:
    states = [state_of("cond", [R.FIRST, R.SKIPPED, R.MAX_CONSECUTIVE_SKIPS]), state_of("uncond", [R.FIRST])]
    assert str(CacheStats(tuple(collect("Toy", states)))).splitlines() == [
        "TeaCache: 1 of 4 steps skipped (25%)",
        "Toy, cond: hit rate 33%",
        "  generation  step  decision                            rel_l1 accumulated",
        "           0     0  computed (first)                         -     0.25000",
        "           0     1  skipped                            0.50000     0.25000",
        "           0     2  computed (max consecutive skips)   0.50000     0.25000",
        "Toy, uncond: hit rate 0%",
        "  generation  step  decision                            rel_l1 accumulated",
        "           0     0  computed (first)                         -     0.25000",
    ]


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_printed(value: float) -> None:
    (context,) = collect("Toy", [state_of("cond", [R.FIRST, R.NON_FINITE], value, value)])
    line = str(CacheStats((context,))).splitlines()[-1].split()
    assert line == ["0", "1", "computed", "(non", "finite)", "-" if math.isnan(value) else f"{value}", f"{value}"]
