"""The decision of TeaCache as plain PyTorch. The rewriting pass traces `decide` into the graph.

    rel  = mean|modulated_input - previous_modulated_input| / (mean|previous_modulated_input| + 1e-8)   (float32)
    acc' = acc + |poly(rel)|
    compute if forced or acc' >= rel_l1_thresh; then acc <- 0, else acc <- acc'

Everything is decided for the whole batch (tensors of shape []) or for each sample (tensors of shape [batch]); the
formulas are the same.

Note [Trajectory guard]: a residual must never pass from one generation to the next, and nobody has to say when one
begins. A step begins a new trajectory if
- the timestep turned back against the direction that it had,
- the latents jumped: a sampler moves them a little at a time, another seed or another picture is far away. The limit is
  five times the larger one of the last two moves (second-order samplers alternate between a long and a short one),
  but at least 0.1 (0.3 while only one is known) and at most 0.9 (as long as none is); two independent noises are 1.41
  apart, and ancestral samplers at 20 steps move 0.65,
- or the conditioning (any input that stays the same throughout a generation) holds other numbers than before.
Further timesteps (of a second modality, of where a jump ends) change with the first one. If one of them changes while
the timestep stands still, it tells guidance branches or prompts apart, and from then on counts as conditioning.
A false alarm costs one computed step. A restarted trajectory knows no moves, so that two that take turns on one state
are told apart at every turn until they are nearer to each other than 0.9.

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
_JUMP = 5.0  # times the usual move of the latents
_SMALLEST_JUMP, _SMALLEST_EARLY_JUMP, _LARGEST_MOVE = 0.1, 0.3, 0.9


class StepReason(enum.IntEnum):
    """Why a step was computed; `SKIPPED` if it was not. The first that holds, in this order."""

    SKIPPED = 0
    FIRST = 1
    SHAPE_CHANGED = 2  # also a first step: the same context had a state of other shapes before
    TRAJECTORY_RESTARTED = 3
    CONDITIONING_CHANGED = 4
    NON_FINITE = 5
    WARMUP = 6
    FINAL = 7
    MAX_CONSECUTIVE_SKIPS = 8
    THRESHOLD = 9


class PolicyState(NamedTuple):
    """What the policy carries from step to step, each of shape [] or [batch].

    Attributes:
        accumulated_rel_l1_distance: float32.
        step_index: int64, steps done in this generation.
        consecutive_skips: int64.
        previous_timestep: float32.
        timestep_direction: float32, +1 or -1 once the timestep has moved, 0 before.
        latents_move: float32, relative change of the latents at the last step of this trajectory, 0 if there was none.
        previous_latents_move: float32, at the step before that.
        conditioning: int64, hash of the conditioning's contents.
        further_times: int64, one more than the hash of the further timesteps; negative once they count as conditioning.
        num_inference_steps: int64, always of shape []; 0 where it is not known.
    """

    accumulated_rel_l1_distance: Tensor
    step_index: Tensor
    consecutive_skips: Tensor
    previous_timestep: Tensor
    timestep_direction: Tensor
    latents_move: Tensor
    previous_latents_move: Tensor
    conditioning: Tensor
    further_times: Tensor
    num_inference_steps: Tensor

    @staticmethod
    def initial(
        num_inference_steps: int = 0, device: torch.device | str = "cpu", shape: tuple[int, ...] = ()
    ) -> PolicyState:
        """The state before the first step; `shape` is () or (batch,)."""

        def zero(dtype: torch.dtype) -> Tensor:  # a tensor of its own each: tracing tells them apart
            return torch.zeros(shape, dtype=dtype, device=device)

        return PolicyState(
            accumulated_rel_l1_distance=zero(torch.float32),
            step_index=zero(torch.int64),
            consecutive_skips=zero(torch.int64),
            previous_timestep=zero(torch.float32),
            timestep_direction=zero(torch.float32),
            latents_move=zero(torch.float32),
            previous_latents_move=zero(torch.float32),
            conditioning=zero(torch.int64),
            further_times=zero(torch.int64),
            num_inference_steps=torch.full((), num_inference_steps, dtype=torch.int64, device=device),
        )


class Evidence(NamedTuple):
    """What tells a step of the same trajectory from the first one of another, of shape [] or [batch].

    Attributes:
        timestep: float32.
        latents_move: float32, `relative_move` of the latents since the step before.
        conditioning: int64, `content_hash` of the conditioning.
        further_times: int64, the same of the timesteps beside the first.
    """

    timestep: Tensor
    latents_move: Tensor
    conditioning: Tensor
    further_times: Tensor


class Decision(NamedTuple):
    """Outcome of one step, tensors of shape [] or [batch].

    Attributes:
        should_compute: bool.
        reason: int64, a `StepReason`.
        rel_l1: float32, NaN on the first step of a trajectory.
        accumulated: float32, the accumulated distance that was compared with the threshold.
        state: what the next step is given.
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
        rescale: the increment of the accumulated distance as a function of the relative one, both float32.
        per_sample: decide for each sample of the batch.
    """

    rel_l1_thresh: float
    rescale: Callable[[Tensor], Tensor]
    num_warmup_steps: int = 0
    num_final_steps: int = 0
    max_consecutive_skips: int | None = None
    per_sample: bool = False

    def decide(self, rel_l1: Tensor, evidence: Evidence, state: PolicyState) -> Decision:
        """Decides one step.

        Args:
            rel_l1: float32, `relative_l1` of the modulated input to that of the step before.
            evidence: of the trajectory.
            state: what the step before has left.
        """
        time = evidence.timestep
        moved = (time > state.previous_timestep).float() - (time < state.previous_timestep).float()
        first = state.step_index == 0
        restarted = turned_back(moved, state) | latents_jumped(evidence, state)
        others = times_tell_branches(moved, evidence, state)
        other_conditioning = conditioning_changed(evidence, state) | (others & times_changed(evidence, state))
        begins = first | restarted | other_conditioning
        index = torch.where(begins, 0, state.step_index)
        accumulated = torch.where(begins, 0.0, state.accumulated_rel_l1_distance + self.rescale(rel_l1))

        reason = self._reason(index, accumulated, time, state)
        reason = torch.where(other_conditioning, int(StepReason.CONDITIONING_CHANGED), reason)
        reason = torch.where(restarted, int(StepReason.TRAJECTORY_RESTARTED), reason)
        reason = torch.where(first, int(StepReason.FIRST), reason)
        should_compute = reason != StepReason.SKIPPED
        direction = torch.where(moved != 0, moved, state.timestep_direction)
        following = PolicyState(
            accumulated_rel_l1_distance=torch.where(should_compute, 0.0, accumulated),
            step_index=index + 1,
            consecutive_skips=torch.where(should_compute, 0, state.consecutive_skips + 1),
            previous_timestep=torch.where(torch.isfinite(time), time, state.previous_timestep),
            timestep_direction=torch.where(begins, 0.0, direction),
            latents_move=torch.where(begins, 0.0, evidence.latents_move),
            previous_latents_move=torch.where(begins, 0.0, state.latents_move),
            conditioning=evidence.conditioning.clone(),
            further_times=torch.where(others, -1, 1) * (evidence.further_times + 1),
            num_inference_steps=state.num_inference_steps,
        )
        return Decision(should_compute, reason, torch.where(begins, float("nan"), rel_l1), accumulated, following)

    def _reason(self, index: Tensor, accumulated: Tensor, time: Tensor, state: PolicyState) -> Tensor:
        """The reason within a trajectory."""
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
        return torch.where(not_finite(accumulated, time), int(StepReason.NON_FINITE), reason)


def turned_back(moved: Tensor, state: PolicyState) -> Tensor:
    """Whether the timestep moves against the direction of the trajectory; `moved` is +1, 0 or -1."""
    return moved * state.timestep_direction < 0


def latents_jumped(evidence: Evidence, state: PolicyState) -> Tensor:
    """Whether the latents moved farther than they may within a trajectory; see Note [Trajectory guard]."""
    usual = torch.maximum(state.latents_move, state.previous_latents_move)
    least = torch.where(state.previous_latents_move > 0, _SMALLEST_JUMP, _SMALLEST_EARLY_JUMP)
    limit = torch.where(usual > 0, torch.maximum(_JUMP * usual, least).clamp(max=_LARGEST_MOVE), _LARGEST_MOVE)
    return evidence.latents_move > limit


def not_finite(accumulated: Tensor, time: Tensor) -> Tensor:
    """Whether there is nothing to decide by. A timestep that is not a number would compare as "not moved"."""
    return ~(torch.isfinite(accumulated) & torch.isfinite(time))


def conditioning_changed(evidence: Evidence, state: PolicyState) -> Tensor:
    """Whether the conditioning holds other numbers than at the step before."""
    return evidence.conditioning != state.conditioning


def times_changed(evidence: Evidence, state: PolicyState) -> Tensor:
    """Whether the further timesteps hold other numbers than at the step before."""
    return evidence.further_times + 1 != state.further_times.abs()


def times_tell_branches(moved: Tensor, evidence: Evidence, state: PolicyState) -> Tensor:
    """Whether the further timesteps have changed, now or before, while the timestep stood still."""
    now = (moved == 0) & (state.step_index > 0) & times_changed(evidence, state)
    return (state.further_times < 0) | now


def relative_l1(current: Tensor, previous: Tensor, per_sample: bool = False) -> Tensor:
    """mean|current - previous| / (mean|previous| + 1e-8) in float32, of shape [], or [batch] over each sample."""
    current, previous = current.to(torch.float32), previous.to(torch.float32)
    each = _dimensions(current, per_sample)
    return (current - previous).abs().mean(each) / (previous.abs().mean(each) + EPSILON)


def relative_move(current: Tensor, previous: Tensor, per_sample: bool = False) -> Tensor:
    """Like `relative_l1`, over the elements that changed: channels that only condition (a mask, an image) stay out."""
    current, previous = current.to(torch.float32), previous.to(torch.float32)
    each = _dimensions(current, per_sample)
    difference = (current - previous).abs()
    moving = torch.where(difference == 0, 0.0, previous.abs())
    total = difference.sum(each)
    # Exporters to ONNX take a number as small as the epsilon for a zero, and leave it out.
    return torch.where(total == 0, 0.0, total / (moving.sum(each) + EPSILON))


def _dimensions(tensor: Tensor, per_sample: bool) -> tuple[int, ...]:
    """Those of a sample, or all. Reshaped to rows instead, inputs would have to be laid out as they were at capture."""
    return tuple(range(1 if per_sample and tensor.ndim > 1 else 0, tensor.ndim))
