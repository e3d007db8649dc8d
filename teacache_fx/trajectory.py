"""What tells the steps of one generation from those of another, as plain PyTorch to be traced into the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teacache_fx.policy import Evidence, relative_move

# Odd 64-bit constants with well spread bits: the golden ratio's, and the multipliers of the SplitMix64 finalizer
# (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MASK = 0x5555
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def gather_evidence(
    timestep: Tensor | None,
    latents: Tensor,
    previous_latents: Tensor,
    steady: Sequence[Tensor],
    per_sample: bool = False,
) -> Evidence:
    """The evidence of one step, on the latents' device.

    Args:
        timestep: any real dtype and shape; `None` where the graph has none. It is averaged, over the whole batch or
            for each sample, to order the steps of a trajectory.
        latents: floating point, any shape; the batch comes first.
        previous_latents: those of the step before, alike.
        steady: all inputs that keep their contents throughout a generation, any dtype and shape.
        per_sample: of shape [batch] instead of [].
    """
    batch = (latents.shape[0],) if per_sample else ()

    def average(value: Tensor) -> Tensor:
        value = value.to(latents.device, torch.float32)
        if _has_rows(value, latents, per_sample):
            return value.reshape(value.shape[0], -1).mean(1)
        return value.mean().expand(batch)

    time = latents.new_zeros(batch, dtype=torch.float32) if timestep is None else average(timestep)
    hashed = latents.new_zeros(batch, dtype=torch.int64)
    for number, tensor in enumerate(steady):
        one = content_hash(tensor, _has_rows(tensor, latents, per_sample)).to(latents.device)
        hashed = hashed + one * (2 * number + 1)
    return Evidence(time, relative_move(latents, previous_latents, per_sample), hashed)


def content_hash(tensor: Tensor, per_sample: bool = False) -> Tensor:
    """A 64-bit hash of the elements' bits and places: exact, and the same on every device and in every compiler.

    Integer sums wrap around and so do not depend on the order of summation, as sums of floats would.

    Returns:
        int64 of shape [], or [batch].
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    rows = tensor.reshape(tensor.shape[0], -1) if per_sample else tensor.reshape(1, -1)
    if rows.dtype == torch.float64:
        rows = rows.view(torch.int64)
    elif rows.is_floating_point():  # exact for the shorter types too
        rows = rows.to(torch.float32).view(torch.int32)
    place = torch.arange(rows.shape[1], dtype=torch.int64, device=rows.device)
    # The exclusive or keeps inductor from folding the product into its index arithmetic, which overflows (torch 2.13).
    mixed = rows.to(torch.int64) + (place ^ _MASK) * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    hashed = (mixed ^ (mixed >> 31)).sum(1)
    return hashed if per_sample else hashed[0]


def _has_rows(tensor: Tensor, latents: Tensor, per_sample: bool) -> bool:
    return per_sample and tensor.ndim > 0 and bool(tensor.shape[0] == latents.shape[0])
