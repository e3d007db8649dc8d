"""The decision written out once more on Python numbers, and what drives it and the package's own step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacache_fx.config import Accumulation, ResolvedConfig, TeaCacheConfig
from teacache_fx.pipeline import policy_of
from teacache_fx.policy import Decision, Evidence, Policy, PolicyState, StepReason

NAN, INF = math.nan, math.inf


class Step(NamedTuple):
    """What one step of one sample is decided from."""

    rel: float
    time: float
    move: float = 0.0
    content: int = 0
    further: int = 0


@dataclass
class Reference:
    """The algorithm for one sample. It shares no code with the package."""

    thresh: float
    coefficients: Sequence[float] = (1.0, 0.0)
    signed: bool = False
    warmup: int = 0
    final: int = 0
    total: int = 0
    limit: int | None = None
    accumulated: float = 0.0
    index: int = 0
    skips: int = 0
    direction: int = 0
    time: float = 0.0
    moves: tuple[float, float] = (0.0, 0.0)
    content: int = 0
    further: int | None = None
    further_tells: bool = False

    def step(self, step: Step) -> tuple[str, float]:
        """The reason's name, and the accumulated distance that was compared."""
        moved = (step.time > self.time) - (step.time < self.time)
        if self.index > 0 and moved == 0 and step.further != self.further:
            self.further_tells = True
        begun = self._beginning(step, moved)
        if begun:
            self.accumulated, self.index, self.skips, self.direction, self.moves = 0.0, 0, 0, 0, (0.0, 0.0)
        else:
            rescaled = 0.0
            for coefficient in self.coefficients:
                rescaled = rescaled * step.rel + coefficient
            self.accumulated += rescaled if self.signed else abs(rescaled)
            self.direction = moved or self.direction
            self.moves = (step.move, self.moves[0])
        self.time = step.time if math.isfinite(step.time) else self.time
        self.content, self.further = step.content, step.further
        compared = self.accumulated
        reason = begun or self._within(compared, step.time)
        self.index += 1
        skipped = reason == "SKIPPED"
        self.skips = self.skips + 1 if skipped else 0
        self.accumulated = compared if skipped else 0.0
        return reason, compared

    def _beginning(self, step: Step, moved: int) -> str:
        if self.index == 0:
            return "FIRST"
        farthest = 0.9
        if not any(map(math.isnan, self.moves)) and max(self.moves) > 0:
            least = 0.1 if self.moves[1] > 0 else 0.3
            farthest = min(max(5 * max(self.moves), least), 0.9)
        if moved * self.direction == -1 or step.move > farthest:
            return "TRAJECTORY_RESTARTED"
        is_other = step.content != self.content or (self.further_tells and step.further != self.further)
        return "CONDITIONING_CHANGED" if is_other else ""

    def _within(self, compared: float, time: float) -> str:
        if not (math.isfinite(compared) and math.isfinite(time)):
            return "NON_FINITE"
        if self.index < self.warmup:
            return "WARMUP"
        if self.total and self.index >= self.total - self.final and self.final:
            return "FINAL"
        if self.limit is not None and self.skips >= self.limit:
            return "MAX_CONSECUTIVE_SKIPS"
        return "THRESHOLD" if compared >= self.thresh else "SKIPPED"


def policy_for(reference: Reference, per_sample: bool = False) -> Policy:
    """The package's policy under the settings of the reference, built as the rewriting does."""
    accumulation: Accumulation = "signed" if reference.signed else "abs"
    config = TeaCacheConfig(
        rel_l1_thresh=reference.thresh,
        accumulation=accumulation,
        num_warmup_steps=reference.warmup,
        num_final_steps=reference.final,
        max_consecutive_skips=reference.limit,
        granularity="sample" if per_sample else "batch",
    )
    return policy_of(ResolvedConfig(config, tuple(reference.coefficients), ""))


def plain(thresh: float = 0.25, rescale: Callable[[Tensor], Tensor] = lambda rel: rel, **fields: Any) -> Policy:
    """A policy that accumulates the distances as they are."""
    return Policy(thresh, rescale, **fields)


def tensors_of(step: Step | Sequence[Step]) -> tuple[Tensor, Evidence]:
    """The relative distance and the evidence, of shape [] for one step and [batch] for several."""
    rel, time, move, content, further = step if isinstance(step, Step) else zip(*step, strict=True)
    kind = torch.float32
    evidence = Evidence(
        torch.tensor(time, dtype=kind), torch.tensor(move, dtype=kind), torch.tensor(content), torch.tensor(further)
    )
    return torch.tensor(rel, dtype=kind), evidence


def run(policy: Policy, steps: Sequence[Step] | Sequence[Sequence[Step]], total: int = 0) -> list[Decision]:
    """Decides step after step."""
    first = steps[0]
    state, decisions = PolicyState.initial(total, shape=() if isinstance(first, Step) else (len(first),)), []
    for step in steps:
        decisions.append(policy.decide(*tensors_of(step), state))
        state = decisions[-1].state
    return decisions


def reasons(decisions: Sequence[Decision]) -> list[StepReason]:
    """Of decisions of shape []."""
    return [StepReason(int(decision.reason)) for decision in decisions]


def falling(*rels: float) -> list[Step]:
    """Steps of these relative distances along a falling timestep; the first distance is none."""
    return [Step(rel, 1000.0 - 20 * i) for i, rel in enumerate((NAN, *rels))]


def timed(*times: float) -> list[Step]:
    """Steps at these timesteps at which nothing changes."""
    return [Step(0.0, time) for time in times]
