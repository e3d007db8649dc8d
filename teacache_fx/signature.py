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

    Inputs: previous_modulated_input, previous_residual (one per live output), previous_latents, then the fields of
    `PolicyState`.
    Outputs: the same but `num_inference_steps`, which the host sets; then `RECORDED`.

    Attributes:
        num_inputs, num_outputs: how many the model itself has.
        tensors: fake tensors of previous_modulated_input, of each previous_residual and of previous_latents; their
            sizes may be symbolic.
        scalars: fake tensors of the fields of `PolicyState`, of shape [] or [batch].
    """

    num_inputs: int
    num_outputs: int
    tensors: tuple[torch.Tensor, ...]
    scalars: PolicyState

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the large state tensors."""
        count = len(self.tensors) - 2
        residuals = (f"previous_residual_{i}" for i in range(count)) if count > 1 else ("previous_residual",)
        return ("previous_modulated_input", *residuals, "previous_latents")

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Names of what the policy carries."""
        return PolicyState._fields
