"""The decision of TeaCache as plain PyTorch. The rewriting pass traces `decide` into the graph.

    rel  = mean|modulated_input - previous_modulated_input| / (mean|previous_modulated_input| + 1e-8)   (float32)
    acc' = acc + |poly(rel)|
    compute if forced or acc' >= rel_l1_thresh; then acc <- 0, else acc <- acc'

The relative distance and its rescaling by a polynomial are those of TeaCache (arXiv 2411.19108, section 3.3); the
epsilon is vLLM-Omni's. Nothing here looks at a value on the host: every branch is a `torch.where`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-8


class StepReason(enum.IntEnum):
    """Why a step was computed; `SKIPPED` if it was not. The first that holds, in this order."""

    SKIPPED = 0
    FIRST = 1
    TRAJECTORY_RESTARTED = 2
    NON_FINITE = 3
    WARMUP = 4
    FINAL = 5
    MAX_CONSECUTIVE_SKIPS = 6
    THRESHOLD = 7


class PolicyState(NamedTuple):
    """Scalars that the policy carries from step to step, all of shape [].

    Attributes:
        accumulated_rel_l1_distance: float32.
        step_index: int64, steps done in this generation.
        consecutive_skips: int64.
        previous_timestep: float32, mean over the batch.
        timestep_direction: float32, +1 or -1 once the timestep has moved, 0 before.
        num_inference_steps: int64, 0 where it is not known.
    """

    accumulated_rel_l1_distance: Tensor
    step_index: Tensor
    consecutive_skips: Tensor
    previous_timestep: Tensor
    timestep_direction: Tensor
    num_inference_steps: Tensor

    @staticmethod
    def initial(num_inference_steps: int = 0, device: torch.device | str = "cpu") -> PolicyState:
        """The state before the first step."""

        def scalar(value: float, dtype: torch.dtype) -> Tensor:  # a tensor of its own each: tracing tells them apart
            return torch.full((), value, dtype=dtype, device=device)

        return PolicyState(
            scalar(0, torch.float32),
            scalar(0, torch.int64),
            scalar(0, torch.int64),
            scalar(0, torch.float32),
            scalar(0, torch.float32),
            scalar(num_inference_steps, torch.int64),
        )


class Decision(NamedTuple):
    """Outcome of one step, all tensors of shape [].

    Attributes:
        should_compute: bool.
        reason: int64, a `StepReason`.
        rel_l1: float32, NaN on the first step of a trajectory.
        accumulated: float32, the accumulated distance that was compared with the threshold.
        state: the scalars for the next step.
    """

    should_compute: Tensor
    reason: Tensor
    rel_l1: Tensor
    accumulated: Tensor
    state: PolicyState


@dataclass(frozen=True)
class Policy:
    """The settings that are baked into the graph.

    Attributes:
        rel_l1_thresh, num_warmup_steps, num_final_steps, max_consecutive_skips: as in `TeaCacheConfig`.
        rescale: the increment of the accumulated distance as a function of the relative one, both float32 of shape [].
    """

    rel_l1_thresh: float
    rescale: Callable[[Tensor], Tensor]
    num_warmup_steps: int = 0
    num_final_steps: int = 0
    max_consecutive_skips: int | None = None

    def decide(
        self, modulated_input: Tensor, previous_modulated_input: Tensor, timestep: Tensor, state: PolicyState
    ) -> Decision:
        """Decides one step.

        Args:
            modulated_input: floating point, any shape.
            previous_modulated_input: that of the step before, of the same shape.
            timestep: any real dtype and shape; its mean orders the steps of a trajectory.
            state: the scalars after the step before.
        """
        time = timestep.to(modulated_input.device, torch.float32).mean()
        moved = (time > state.previous_timestep).float() - (time < state.previous_timestep).float()
        first = state.step_index == 0
        restarted = ~first & (moved * state.timestep_direction < 0)
        begins = first | restarted
        index = torch.where(begins, 0, state.step_index)

        rel_l1 = relative_l1(modulated_input, previous_modulated_input)
        accumulated = torch.where(begins, 0.0, state.accumulated_rel_l1_distance + self.rescale(rel_l1))
        reason = self._reason(first, restarted, index, accumulated, time, state)
        should_compute = reason != StepReason.SKIPPED
        direction = torch.where(moved != 0, moved, state.timestep_direction)
        following = PolicyState(
            accumulated_rel_l1_distance=torch.where(should_compute, 0.0, accumulated),
            step_index=index + 1,
            consecutive_skips=torch.where(should_compute, 0, state.consecutive_skips + 1),
            previous_timestep=torch.where(torch.isfinite(time), time, state.previous_timestep),
            timestep_direction=torch.where(begins, 0.0, direction),
            num_inference_steps=state.num_inference_steps,
        )
        return Decision(should_compute, reason, torch.where(begins, float("nan"), rel_l1), accumulated, following)

    def _reason(
        self, first: Tensor, restarted: Tensor, index: Tensor, accumulated: Tensor, time: Tensor, state: PolicyState
    ) -> Tensor:
        # `time` is checked too: a timestep that is not a number compares as "not moved".
        non_finite = ~(torch.isfinite(accumulated) & torch.isfinite(time))
        reason = torch.where(accumulated >= self.rel_l1_thresh, int(StepReason.THRESHOLD), int(StepReason.SKIPPED))
        if self.max_consecutive_skips is not None:
            limit = state.consecutive_skips >= self.max_consecutive_skips
            reason = torch.where(limit, int(StepReason.MAX_CONSECUTIVE_SKIPS), reason)
        if self.num_final_steps:
            steps_left = state.num_inference_steps - index
            final = (state.num_inference_steps > 0) & (steps_left <= self.num_final_steps)
            reason = torch.where(final, int(StepReason.FINAL), reason)
        if self.num_warmup_steps:
            reason = torch.where(index < self.num_warmup_steps, int(StepReason.WARMUP), reason)
        reason = torch.where(non_finite, int(StepReason.NON_FINITE), reason)
        reason = torch.where(restarted, int(StepReason.TRAJECTORY_RESTARTED), reason)
        return torch.where(first, int(StepReason.FIRST), reason)


def relative_l1(current: Tensor, previous: Tensor) -> Tensor:
    """mean|current - previous| / (mean|previous| + 1e-8) in float32, of shape []."""
    current, previous = current.to(torch.float32), previous.to(torch.float32)
    return (current - previous).abs().mean() / (previous.abs().mean() + EPSILON)
