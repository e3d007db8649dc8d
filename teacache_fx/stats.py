"""What happened at each step, in a form that can be printed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from teacache_fx.policy import StepReason
from teacache_fx.state import TeaCacheState

_BEGINNINGS = (
    StepReason.FIRST, StepReason.SHAPE_CHANGED, StepReason.TRAJECTORY_RESTARTED, StepReason.CONDITIONING_CHANGED
)  # fmt: skip


@dataclass(frozen=True)
class StepStats:
    """One denoising step of one context.

    Attributes:
        generation: counts from 0; a first step or a restarted trajectory begins one.
        step_index: counts from 0 within the generation.
        reason: why it was computed, or `StepReason.SKIPPED`.
        rel_l1: relative L1 distance to the step before; NaN on the first step.
        accumulated: the accumulated, rescaled distance that was compared with the threshold.
    """

    generation: int
    step_index: int
    reason: StepReason
    rel_l1: float
    accumulated: float

    @property
    def skipped(self) -> bool:
        """Whether the residual was reused."""
        return self.reason is StepReason.SKIPPED


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
    def hit_rate(self) -> float:
        """Share of steps that were skipped, from 0 to 1."""
        return self.num_skipped / self.num_steps if self.num_steps else 0.0

    def __str__(self) -> str:
        if not self.contexts:
            return "TeaCache: no step has run"
        lines = [f"TeaCache: {self.num_skipped} of {self.num_steps} steps skipped ({self.hit_rate:.0%})"]
        for context in self.contexts:
            lines.append(f"{context.model}, {context.name}: hit rate {context.hit_rate:.0%}")
            lines.append(f"  {'generation':>10} {'step':>5}  {'decision':<32} {'rel_l1':>9} {'accumulated':>11}")
            lines += [f"  {line}" for line in map(_line, context.steps)]
        return "\n".join(lines)


def _line(step: StepStats) -> str:
    decision = "skipped" if step.skipped else f"computed ({step.reason.name.lower().replace('_', ' ')})"
    rel_l1 = "-" if math.isnan(step.rel_l1) else f"{step.rel_l1:.5f}"
    return f"{step.generation:>10} {step.step_index:>5}  {decision:<32} {rel_l1:>9} {step.accumulated:>11.5f}"


def collect(model: str, states: Iterable[TeaCacheState]) -> list[ContextStats]:
    """Reads the records from the device."""
    contexts = []
    for state in states:
        steps: list[StepStats] = []
        for reason_tensor, rel_l1, accumulated in state.records:
            reason = StepReason(int(reason_tensor))
            begins = reason in _BEGINNINGS or not steps
            generation = 0 if not steps else steps[-1].generation + begins
            index = 0 if begins else steps[-1].step_index + 1
            steps.append(StepStats(generation, index, reason, float(rel_l1), float(accumulated)))
        contexts.append(ContextStats(model, state.label, tuple(steps)))
    return contexts
