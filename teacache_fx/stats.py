"""What happened at each step, in a form that can be printed and plotted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from teacache_fx.advice import FEWEST_STEPS, advice_on_generation
from teacache_fx.policy import StepReason
from teacache_fx.state import TeaCacheState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEGINNINGS = (
    StepReason.FIRST, StepReason.SHAPE_CHANGED, StepReason.TRAJECTORY_RESTARTED, StepReason.CONDITIONING_CHANGED
)  # fmt: skip


@dataclass(frozen=True)
class StepStats:
    """One denoising step of one context.

    Attributes:
        generation: counts from 0; a first step or a restarted trajectory begins one.
        step_index: counts from 0 within the generation.
        reason: why it was computed, or `StepReason.SKIPPED`; that of the first sample that needed it.
        rel_l1: relative L1 distance to the step before; NaN on the first step; the largest of all samples.
        accumulated: the accumulated, rescaled distance that was compared with the threshold; likewise.
        sample_reasons: the reason of each sample with `granularity="sample"`, else of the whole batch.
    """

    generation: int
    step_index: int
    reason: StepReason
    rel_l1: float
    accumulated: float
    sample_reasons: tuple[StepReason, ...]

    @property
    def skipped(self) -> bool:
        """Whether the blocks did not run."""
        return self.reason is StepReason.SKIPPED

    @property
    def in_vain(self) -> bool:
        """Whether some samples reused their residuals, and nothing was won since others needed the blocks."""
        return not self.skipped and StepReason.SKIPPED in self.sample_reasons


@dataclass(frozen=True)
class ContextStats:
    """The steps of one context of one model.

    Attributes:
        model: class name of the model.
        name: the context's name.
        steps: in order of execution.
    """

    model: str
    name: str
    steps: tuple[StepStats, ...]

    @property
    def hit_rate(self) -> float:
        """Share of steps that were skipped, from 0 to 1."""
        return sum(step.skipped for step in self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def generations(self) -> Iterator[tuple[StepStats, ...]]:
        """The steps of each generation."""
        for _, steps in groupby(self.steps, key=lambda step: step.generation):
            yield tuple(steps)

    @property
    def reasons(self) -> dict[StepReason, int]:
        """How many steps had each reason, those that occur."""
        found = [step.reason for step in self.steps]
        return {reason: found.count(reason) for reason in StepReason if reason in found}


@dataclass(frozen=True)
class CacheStats:
    """What the cache did, per context and step. `str()` is a table."""

    contexts: tuple[ContextStats, ...]

    @property
    def num_steps(self) -> int:
        """Steps in all contexts."""
        return sum(len(context.steps) for context in self.contexts)

    @property
    def num_skipped(self) -> int:
        """Skipped steps in all contexts."""
        return sum(step.skipped for context in self.contexts for step in context.steps)

    @property
    def num_in_vain(self) -> int:
        """Steps in which samples reused their residuals beside others that needed the blocks: nothing was won."""
        return sum(step.in_vain for context in self.contexts for step in context.steps)

    @property
    def hit_rate(self) -> float:
        """Share of steps that were skipped, from 0 to 1."""
        return self.num_skipped / self.num_steps if self.num_steps else 0.0

    @property
    def advice(self) -> tuple[str, ...]:
        """What could be done where the cache did not help, without repetition."""
        over = [steps for context in self.contexts for steps in context.generations if _is_over(steps, context)]
        found = (advice_on_generation(len(steps), any(step.skipped for step in steps)) for steps in over)
        return tuple(dict.fromkeys(text for text in found if text))

    def plot(self) -> Figure:
        """A matplotlib figure: per context the relative distance over the steps, and which were computed and why.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no step has run.
        """
        from teacache_fx.plot import plot_stats

        return plot_stats(self.contexts)

    def __str__(self) -> str:
        if not self.contexts:
            return "TeaCache: no step has run"
        lines = [f"TeaCache: {self.num_skipped} of {self.num_steps} steps skipped ({self.hit_rate:.0%})"]
        if self.num_in_vain:
            lines.append(f"{self.num_in_vain} computed steps were needed by some samples only: nothing was won there")
        for context in self.contexts:
            lines.append(f"{context.model}, {context.name}: hit rate {context.hit_rate:.0%}")
            lines.append(f"  {'generation':>10} {'step':>5}  {'decision':<32} {'rel_l1':>9} {'accumulated':>11}")
            lines += [f"  {line}" for line in map(_line, context.steps)]
        return "\n".join([*lines, *(f"advice: {text}" for text in self.advice)])


def _is_over(steps: tuple[StepStats, ...], context: ContextStats) -> bool:
    """The last generation of a context may still be running, unless it is long enough to be judged."""
    return steps[-1] is not context.steps[-1] or len(steps) >= FEWEST_STEPS


def _line(step: StepStats) -> str:
    decision = "skipped" if step.skipped else f"computed ({step.reason.name.lower().replace('_', ' ')})"
    if step.in_vain:
        decision += f" {sum(map(bool, step.sample_reasons))}/{len(step.sample_reasons)}"
    rel_l1 = "-" if math.isnan(step.rel_l1) else f"{step.rel_l1:.5f}"
    return f"{step.generation:>10} {step.step_index:>5}  {decision:<32} {rel_l1:>9} {step.accumulated:>11.5f}"


def collect(model: str, states: Iterable[TeaCacheState]) -> list[ContextStats]:
    """Reads the records from the device."""
    return [ContextStats(model, state.label, tuple(_steps(state))) for state in states if state.records]


def _steps(state: TeaCacheState) -> Iterator[StepStats]:
    generation, index = -1, 0
    # One transfer for each kind of record, not one for each number.
    reasons, distances, sums = (
        torch.stack([value.reshape(-1) for value in column]).tolist()
        for column in zip(*list(state.records), strict=True)
    )
    for row, distance, accumulated in zip(reasons, distances, sums, strict=True):
        samples = tuple(map(StepReason, row))
        reason = next((sample for sample in samples if sample), StepReason.SKIPPED)
        begins = reason in _BEGINNINGS or generation < 0
        generation, index = (generation + 1, 0) if begins else (generation, index + 1)
        if reason is StepReason.FIRST and generation == 0:
            reason = state.first_reason
        yield StepStats(generation, index, reason, _largest(distance), _largest(accumulated), samples)


def _largest(values: list[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)
