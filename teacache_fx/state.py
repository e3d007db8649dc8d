"""What TeaCache remembers of one context between the steps of a generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teacache_fx.identity import Identity
from teacache_fx.policy import PolicyState, StepReason
from teacache_fx.signature import RECORDED

MAX_RECORDS = 4096
"""Steps that the statistics of one context go back."""

_NUM_SCALARS = len(PolicyState._fields)


class Memory(NamedTuple):
    """What one step leaves to the next. It is replaced as a whole, so that threads never see half of a step.

    Attributes:
        tensors: previous_modulated_input, each previous_residual, previous_latents.
        policy: what the policy carries.
    """

    tensors: tuple[Tensor, ...]
    policy: PolicyState


class TeaCacheState:
    """State of one context of one model at one set of shapes.

    Attributes:
        label: the context's name, or a number where the caller gave none.
        identity: the conditioning that it belongs to.
        steps_with_identity: calls with this very conditioning.
        memory: `None` before the first step of a generation.
        records: per step the tensors of `RECORDED`, read from the device only when statistics are asked for.
        first_reason: why its first step is computed.
        steps_since_reset: calls in this generation, as far as the host knows.
        weights_version: how often the model's weights had been changed in place at the first of them.
    """

    def __init__(
        self, label: str = "", identity: Identity | None = None, first_reason: StepReason = StepReason.FIRST
    ) -> None:
        self.label = label
        self.identity = identity or Identity(())
        self.steps_with_identity = 0
        self.memory: Memory | None = None
        self.records: deque[Sequence[Tensor]] = deque(maxlen=MAX_RECORDS)
        self.first_reason = first_reason
        self.steps_since_reset = 0
        self.weights_version = 0
        self._num_inference_steps = 0

    def reset(self) -> None:
        """Forgets the generation and frees its tensors; the records stay."""
        self.memory = None
        self.steps_since_reset = 0

    def belong_to(self, label: str, identity: Identity) -> None:
        """Gives the state another owner; it is for the caller to know that it may have one."""
        self.label, self.identity, self.steps_with_identity = label, identity, 0

    def inputs(self, allocate: Callable[[], Memory], num_inference_steps: int) -> list[Tensor]:
        """The state as inputs of the rewritten graph, allocated if this is the first step.

        Args:
            allocate: makes a state of zeros.
            num_inference_steps: length of the generation, 0 where it is not known.
        """
        memory = self.memory
        if memory is None or num_inference_steps != self._num_inference_steps:
            memory = allocate() if memory is None else memory
            # On the device already, and without waiting for it: a scalar's value travels with the launch.
            length = torch.full_like(memory.policy.num_inference_steps, num_inference_steps)
            memory = self.memory = Memory(memory.tensors, memory.policy._replace(num_inference_steps=length))
            self._num_inference_steps = num_inference_steps
        return [*memory.tensors, *memory.policy]

    def advance(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Takes over the new state and the record that a step has returned.

        Args:
            inputs: the state that the step was given.
            outputs: all that the rewriting has added to the graph's outputs.
        """
        count = len(inputs) - _NUM_SCALARS
        scalars = PolicyState._make([*outputs[count : -len(RECORDED)], inputs[-1]])
        self.memory = Memory(tuple(outputs[:count]), scalars)
        self.steps_since_reset += 1
        self.steps_with_identity += 1
        self.records.append(outputs[-len(RECORDED) :])

    @property
    def previous_modulated_input(self) -> Tensor | None:
        """The indicator at the last step, `None` before the first."""
        return self.memory.tensors[0] if self.memory else None

    @property
    def previous_residuals(self) -> tuple[Tensor, ...]:
        """Stack output minus stack input at the last computed step, one per live output; empty before the first."""
        return self.memory.tensors[1:-1] if self.memory else ()

    @property
    def previous_residual(self) -> Tensor | None:
        """The first of `previous_residuals`."""
        return self.previous_residuals[0] if self.memory else None

    @property
    def previous_latents(self) -> Tensor | None:
        """The latents at the last step, `None` before the first."""
        return self.memory.tensors[-1] if self.memory else None

    @property
    def policy(self) -> PolicyState:
        """What the policy carries: accumulated_rel_l1_distance, step_index, consecutive_skips and so on, as tensors."""
        return self.memory.policy if self.memory else PolicyState.initial(self._num_inference_steps)

    @property
    def accumulated_rel_l1_distance(self) -> Tensor:
        """float32, of shape [] or [batch]; likewise the next three."""
        return self.policy.accumulated_rel_l1_distance

    @property
    def step_index(self) -> Tensor:
        """int64, steps done in this generation."""
        return self.policy.step_index

    @property
    def consecutive_skips(self) -> Tensor:
        """int64."""
        return self.policy.consecutive_skips

    @property
    def previous_timestep(self) -> Tensor:
        """float32."""
        return self.policy.previous_timestep
