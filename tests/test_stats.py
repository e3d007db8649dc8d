"""The statistics: read from real states, and printed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from teacache_fx.policy import Evidence, Policy, PolicyState, StepReason, relative_l1
from teacache_fx.state import Memory, TeaCacheState
from teacache_fx.stats import CacheStats, ContextStats, StepStats, collect

R = StepReason
NAN = math.nan


def memory() -> Memory:
    """Before the first step, with one residual."""
    return Memory((torch.zeros(2), torch.zeros(2), torch.zeros(2)), PolicyState.initial())


def state_of(
    label: str, reasons: Sequence[StepReason | list[StepReason]], rel_l1: float = 0.5, accumulated: float = 0.25
) -> TeaCacheState:
    """A state whose steps went like this."""
    state = TeaCacheState(label)
    for reason in reasons:
        inputs = state.inputs(memory, 0)
        distance = NAN if reason in (R.FIRST, R.TRAJECTORY_RESTARTED) else rel_l1
        record = [torch.tensor(reason), torch.tensor(distance), torch.tensor(accumulated)]
        state.advance(inputs, [*inputs[:-1], *record])
    return state


def positions(context: ContextStats) -> list[tuple[int, int]]:
    return [(step.generation, step.step_index) for step in context.steps]


def test_collects_what_the_policy_decided() -> None:
    state, policy = TeaCacheState("cond"), Policy(0.25, torch.abs)
    values, times = [1.0, 1.125, 1.265625, 1.265625, 1.0], [900.0, 800.0, 700.0, 600.0, 900.0]
    for value, time in zip(values, times, strict=True):
        inputs = state.inputs(memory, 0)
        current = torch.full((2,), value)
        evidence = Evidence(torch.tensor(time), torch.tensor(0.0), torch.tensor(0), torch.tensor(0))
        decision = policy.decide(relative_l1(current, inputs[0]), evidence, PolicyState(*inputs[3:]))
        record = [decision.reason, decision.rel_l1, decision.accumulated]
        state.advance(inputs, [current, torch.zeros(2), torch.zeros(2), *decision.state[:-1], *record])
    (context,) = collect("Toy", [state])
    assert (context.model, context.name, len(context.steps)) == ("Toy", "cond", 5)
    first, *middle, restarted = context.steps
    assert middle == [
        StepStats(0, 1, R.SKIPPED, 0.125, 0.125, (R.SKIPPED,)),
        StepStats(0, 2, R.THRESHOLD, 0.125, 0.25, (R.THRESHOLD,)),
        StepStats(0, 3, R.SKIPPED, 0.0, 0.0, (R.SKIPPED,)),
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
    assert [context.name for context in stats.contexts] == ["cond", "uncond"], "idle has nothing to tell"
    assert [context.hit_rate for context in stats.contexts] == [0.75, 0]
    assert (stats.num_steps, stats.num_skipped, stats.hit_rate) == (6, 3, 0.5)


def test_no_steps_at_all() -> None:
    assert collect("Toy", []) == []
    stats = CacheStats(())
    assert (stats.num_steps, stats.num_skipped, stats.hit_rate) == (0, 0, 0)
    assert str(stats) == "TeaCache: no step has run"


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


def test_samples_that_decide_for_themselves() -> None:
    rows = [[R.FIRST, R.FIRST], [R.SKIPPED, R.SKIPPED], [R.SKIPPED, R.THRESHOLD], [R.THRESHOLD, R.THRESHOLD]]
    state = TeaCacheState("cond")
    for row in rows:
        inputs = state.inputs(memory, 0)
        numbers = [0.5, NAN] if row[0] is R.THRESHOLD else [0.125, 0.5]
        state.advance(inputs, [*inputs[:-1], torch.tensor(row), torch.tensor(numbers), torch.tensor(numbers)])
    (context,) = collect("Toy", [state])
    assert [step.reason for step in context.steps] == [R.FIRST, R.SKIPPED, R.THRESHOLD, R.THRESHOLD]
    assert [step.sample_reasons for step in context.steps] == [tuple(row) for row in rows]
    assert [step.in_vain for step in context.steps] == [False, False, True, False]
    assert [step.rel_l1 for step in context.steps] == [0.5] * 4
    stats = CacheStats((context,))
    assert (stats.num_skipped, stats.num_in_vain) == (1, 1)
    assert "1 computed steps were needed by some samples only" in str(stats)
    assert "computed (threshold) 1/2" in str(stats)


def test_a_first_step_at_another_shape_says_so() -> None:
    state = state_of("cond", [R.FIRST, R.SKIPPED, R.FIRST])
    state.first_reason = R.SHAPE_CHANGED
    (context,) = collect("Toy", [state])
    assert [step.reason for step in context.steps] == [R.SHAPE_CHANGED, R.SKIPPED, R.FIRST]
    assert context.reasons == {R.SKIPPED: 1, R.FIRST: 1, R.SHAPE_CHANGED: 1}


@pytest.mark.parametrize(
    ("reasons", "advice"),
    [
        ([R.FIRST, *[R.THRESHOLD] * 19], "not one of 20 steps was skipped"),
        ([R.FIRST, *[R.THRESHOLD] * 19, R.FIRST], "not one of 20 steps was skipped"),
        ([R.FIRST, *[R.THRESHOLD] * 18, R.FIRST], "a generation of 19 steps leaves little to skip"),
        ([R.FIRST, *[R.THRESHOLD] * 18], None),  # it may go on
        ([R.FIRST, *[R.THRESHOLD] * 18, R.SKIPPED], None),
        ([R.FIRST, R.SKIPPED, R.FIRST], None),
    ],
)
def test_advice_where_the_cache_did_not_help(reasons: list[StepReason], advice: str | None) -> None:
    stats = CacheStats(tuple(collect("Toy", [state_of("cond", reasons), state_of("uncond", reasons)])))
    assert len(stats.advice) == (advice is not None), "the same advice is given once"
    if advice is not None:
        assert stats.advice[0].startswith(advice)
        assert str(stats).splitlines()[-1].startswith(f"advice: {advice}")


def test_the_plot_shows_each_context_and_reason() -> None:
    states = [state_of("cond", [R.FIRST, R.SKIPPED, R.THRESHOLD, R.FIRST]), state_of("uncond", [R.FIRST, R.SKIPPED])]
    figure = CacheStats(tuple(collect("Toy", states))).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Toy, cond: 25% skipped",
        "Toy, uncond: 50% skipped",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["skipped", "first", "threshold"]
    (line,) = figure.axes[0].lines[-1:]
    assert np.array_equal(np.asarray(line.get_ydata()), [0.25] * 4)


def test_nothing_to_plot() -> None:
    with pytest.raises(ValueError, match="no step has run"):
        CacheStats(()).plot()
