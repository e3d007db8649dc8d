"""What tells the steps of one generation from those of another, as plain PyTorch to be traced into the graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from teacache_fx.policy import Evidence, relative_move

# All products stay below 2**63: C++ leaves it open what an overflow gives, and inductor's code for the CPU has been
# seen to give constants there. Multipliers and shifts are those of the 32-bit mixer "21f0aaad 735a2d97" that
# github.com/skeeto/hash-prospector lists for its low bias; any odd multiplier would do for the places.
_BITS = (1 << 32) - 1
_PLACE, _MIX_1, _MIX_2 = 0x6D2B79F5, 0x21F0AAAD, 0x735A2D97
_LOW, _HIGH = 0x5555, 0x33333333  # tell the halves of a 64-bit number apart


def gather_evidence(
    timestep: Tensor | None,
    latents: Tensor,
    previous_latents: Tensor,
    steady: Sequence[Tensor],
    further_times: Sequence[Tensor] = (),
    per_sample: bool = False,
    is_portable: bool = False,
) -> Evidence:
    """The evidence of one step, on the latents' device.

    Args:
        timestep: any real dtype and shape; `None` where the graph has none. It is averaged, over the whole batch or
            for each sample, to order the steps of a trajectory.
        latents: floating point, any shape; the batch comes first.
        previous_latents: those of the step before, alike.
        steady: all inputs that keep their contents throughout a generation, any dtype and shape.
        further_times: all timesteps beside `timestep`, likewise.
        per_sample: of shape [batch] instead of [].
        is_portable: as in `content_hash`.
    """
    batch = (latents.shape[0],) if per_sample else ()

    def average(value: Tensor) -> Tensor:
        value = value.to(latents.device, torch.float32)
        if _has_rows(value, latents, per_sample):
            return value if value.ndim == 1 else value.mean(tuple(range(1, value.ndim)))
        return value.mean().expand(batch)

    time = latents.new_zeros(batch, dtype=torch.float32) if timestep is None else average(timestep)

    def hash_all(tensors: Sequence[Tensor]) -> Tensor:
        hashes = (content_hash(each, _has_rows(each, latents, per_sample), is_portable) for each in tensors)
        return joint_hash(hashes, latents.new_zeros(batch, dtype=torch.int64))

    # The farthest of the samples counts: a mean would hide that one slot of a large batch has been given to another.
    moves = relative_move(latents, previous_latents, per_sample=True)
    return Evidence(time, moves if per_sample else moves.max(), hash_all(steady), hash_all(further_times))


def joint_hash(hashes: Iterable[Tensor], none: Tensor) -> Tensor:
    """One hash of several tensors, which tells their places too.

    Args:
        hashes: `content_hash` of each.
        none: that of no tensors at all: zeros, int64, on the device and of the shape of the result.
    """
    for number, one in enumerate(hashes):
        none = none + (one.to(none.device) & _BITS) * (2 * number + 1)
    return none


def content_hash(tensor: Tensor, per_sample: bool = False, is_portable: bool = False) -> Tensor:
    """A hash of the elements' bits and places: the same on every device and in every compiler.

    A change of a single element always changes it, a change of several but for about one in 2**32. It is a sum of
    integers, which unlike a sum of floats does not depend on the order of summation.

    Args:
        tensor: any dtype and shape.
        per_sample: hash each entry of the first dimension, the batch, by itself.
        is_portable: only of operations that ONNX has. It cannot look at the bits of a floating-point number, so the
            numbers are rounded to 2**-32 and limited to 2**30: finer and larger changes go unseen.

    Returns:
        int64 of shape [], or [batch].
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # Traced with contiguous inputs, `reshape` is a view, and fails for a chunk of a batch that a later call brings.
    tensor = tensor.resolve_neg().clone(memory_format=torch.contiguous_format)
    rows = (tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]) if per_sample else tensor.reshape(1, -1)
    is_wide = rows.dtype in (torch.float64, torch.int64)
    if rows.is_floating_point() and is_portable:
        rows, is_wide = (rows.to(torch.float64).nan_to_num().clamp(-(2.0**30), 2.0**30) * 2.0**32).round(), True
    elif rows.dtype == torch.float64:
        rows = rows.view(torch.int64)
    elif rows.is_floating_point():  # exact for the shorter types too
        rows = rows.to(torch.float32).view(torch.int32)
    bits = rows.to(torch.int64)
    place = torch.arange(rows.shape[1], dtype=torch.int64, device=rows.device)
    hashed = _mixed(bits & _BITS, place ^ _LOW).sum(1)
    if is_wide:
        hashed = hashed + _mixed(_shifted(bits, 32) & _BITS, place ^ _HIGH).sum(1)
    return hashed if per_sample else hashed[0]


def _mixed(bits: Tensor, place: Tensor) -> Tensor:
    """A one-to-one map of 32-bit numbers, another one at each place (below 2**32)."""
    mixed = bits ^ ((place * _PLACE) & _BITS)
    mixed = ((mixed ^ _shifted(mixed, 16)) * _MIX_1) & _BITS
    mixed = ((mixed ^ _shifted(mixed, 15)) * _MIX_2) & _BITS
    return mixed ^ _shifted(mixed, 15)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """`bits >> count`, by the operator that ExecuTorch has a kernel for."""
    return torch.bitwise_right_shift(bits, count)


def _has_rows(tensor: Tensor, latents: Tensor, per_sample: bool) -> bool:
    return per_sample and tensor.ndim > 0 and bool(tensor.shape[0] == latents.shape[0])
