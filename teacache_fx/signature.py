"""Layout of what a rewritten graph takes and returns beyond the model's own inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from teacache_fx.policy import PolicyState

RECORDED = ("reason", "rel_l1", "accumulated")
"""What a step reports about its decision, the last outputs of the graph."""


@dataclass(frozen=True)
class CacheSignature:
    """Inputs and outputs that the rewriting adds, always behind the model's own.

    Inputs: previous_modulated_input, previous_residual (one per live output), then the fields of `PolicyState`.
    Outputs: the same but `num_inference_steps`, which the host sets; then `RECORDED`.

    Attributes:
        num_inputs, num_outputs: how many the model itself has.
        tensors: fake tensors of previous_modulated_input and of each previous_residual; their sizes may be symbolic.
    """

    num_inputs: int
    num_outputs: int
    tensors: tuple[torch.Tensor, ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the large state tensors."""
        count = len(self.tensors) - 1
        residuals = (f"previous_residual_{i}" for i in range(count)) if count > 1 else ("previous_residual",)
        return ("previous_modulated_input", *residuals)

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Names of the scalar state inputs."""
        return PolicyState._fields
