"""The state of an exported program, as buffers that it writes.

Note [State in buffers]: what is written is written after the cond, with `copy_`; inside a branch it would break dynamic
shapes and decompositions. Where sizes vary between calls, a tensor lies at the beginning of a flat buffer that has room
for the largest one, and the sizes of the step before are kept: a step of other sizes does not read as numbers of its
own what was left there, but is a first step.

Note [Single numbers]: inductor takes a buffer of a single element for a constant, though the graph writes to it (torch
2.13): a compiled program would compute every step. So each of those that are read has room for a second one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx.signature import RECORDED, CacheSignature
from teacache_fx.sizes import limits

SIZES = "sizes"
"""The buffer of those sizes of the last step that vary."""

_RECORDED_DTYPES = {"reason": torch.int64, "rel_l1": torch.float32, "accumulated": torch.float32}


class StateBuffers(nn.Module):
    """What is remembered from one step to the next, for each context; all zeros before the first step.

    Attributes:
        previous_modulated_input, previous_residual (or previous_residual_0 and so on), previous_latents: as large as
            what they are named after; flat, with room for the largest, where sizes vary.
        accumulated_rel_l1_distance, step_index and so on: the fields of `PolicyState`; of a single number the first of
            two elements.
        reason, rel_l1, accumulated: of the last step, for whoever wants to look; `reason` is a `StepReason`.
        sizes: int64, those sizes of the last step that vary.
        model_id: int64, of the model that the state is of, since it can be exchanged in a loaded program.

    Args:
        signature: of the rewritten graph.
        num_contexts: with more than one, the context is the first dimension of each buffer.
        num_sizes: how many sizes of a call vary.
        num_inference_steps: length of a generation in steps, 0 where it is not known.
        model_id: of the model.

    Raises:
        ValueError: a size has no upper limit.
    """

    def __init__(
        self, signature: CacheSignature, num_contexts: int, num_sizes: int, num_inference_steps: int, model_id: int
    ) -> None:
        super().__init__()
        self._model_id = model_id
        self._names = (*signature.tensor_names, *signature.scalar_names)
        self._has_contexts = num_contexts > 1
        fakes = (*signature.tensors, *signature.scalars)
        shapes = [_room(fake) for fake in fakes]
        self.flat = tuple(is_flat for _, is_flat in shapes)
        self._single: dict[str, tuple[int, ...]] = {}  # shapes of what has one element
        contexts = (num_contexts,) if self._has_contexts else ()
        device = signature.tensors[0].device

        def register(name: str, shape: tuple[int, ...], dtype: torch.dtype, is_read: bool = True) -> None:
            if is_read and math.prod((*contexts, *shape)) == 1:
                self._single[name], shape = shape, (2,)
            self.register_buffer(name, torch.zeros((*contexts, *shape), dtype=dtype, device=device))

        for name, (shape, _), fake in zip(self._names, shapes, fakes, strict=True):
            register(name, shape, fake.dtype)
        for name in RECORDED:
            register(name, tuple(signature.scalars.step_index.shape), _RECORDED_DTYPES[name], is_read=False)
        register(SIZES, (num_sizes,), torch.int64)
        register("model_id", (), torch.int64)
        self.get_buffer("num_inference_steps").fill_(num_inference_steps)

    def reset(self) -> None:
        """Forgets all generations: the next step of each context is computed."""
        self.get_buffer("step_index").zero_()

    def fresh(self) -> dict[str, Tensor]:
        """A state of its own before the first step, for a package of AOTInductor: by the names of the buffers there.

        `package.load_constants(state, check_full_update=False, user_managed=True)` lets the package work on these
        tensors, which must stay alive, instead of its own: to see what it decides, and for a state per request. Leave
        out those that `package.get_constant_fqns()` does not name.
        """
        state = {f"teacache.{name}": torch.zeros_like(buffer) for name, buffer in self.named_buffers()}
        state["teacache.num_inference_steps"].copy_(self.get_buffer("num_inference_steps"))
        return state

    def read(self, context: Tensor | None, is_reset: Tensor | None, sizes: Sequence[Any]) -> list[Tensor]:
        """The state as inputs of the graph.

        Args:
            context: int64 [], which one.
            is_reset: bool [], whether this is the first step of a generation.
            sizes: those of the call that vary.
        """
        state = {name: self._read(name, context) for name in self._names}
        goes_on = self._read("model_id", context) == self._model_id
        if sizes:
            goes_on = goes_on & (self._read(SIZES, context) == _tensor(sizes, self.sizes)).all()
        if is_reset is not None:
            goes_on = goes_on & ~is_reset
        state["step_index"] = torch.where(goes_on, state["step_index"], 0)
        return list(state.values())

    def write(self, context: Tensor | None, values: Sequence[Tensor], sizes: Sequence[Any]) -> None:
        """Keeps what the graph has given back: the new state but `num_inference_steps`, and what is recorded."""
        for name, value in zip((*self._names[:-1], *RECORDED), values, strict=True):
            self._write(name, context, value)
        if sizes:
            self._write(SIZES, context, _tensor(sizes, self.sizes))
        self._write("model_id", context, torch.full((), self._model_id, dtype=torch.int64, device=self.sizes.device))

    def _read(self, name: str, context: Tensor | None) -> Tensor:
        buffer: Tensor = getattr(self, name)
        if name in self._single:
            return buffer.narrow(0, 0, 1).view(self._single[name])
        return buffer if context is None else buffer.index_select(0, context.reshape(1))[0]

    def _write(self, name: str, context: Tensor | None, value: Tensor) -> None:
        buffer: Tensor = getattr(self, name)
        is_flat = name in self._names and self.flat[self._names.index(name)]
        if is_flat and context is not None:  # parts of several rows at once are no one piece of memory
            for number in range(buffer.shape[0]):
                part = buffer[number].narrow(0, 0, value.numel())
                part.copy_(torch.where(context == number, value.reshape(-1), part))
            return
        if name in self._single or is_flat:
            buffer, value = buffer.narrow(-1, 0, value.numel()), value.reshape(-1)
        if context is None:
            buffer.copy_(value)
        else:
            buffer.index_copy_(0, context.reshape(1), value[None])

    sizes: Tensor


def _room(fake: Tensor) -> tuple[tuple[int, ...], bool]:
    """Shape of the buffer for a tensor, and whether it is flat."""
    if all(isinstance(size, int) for size in fake.shape):
        return tuple(fake.shape), False
    _, most = limits(math.prod(fake.shape))
    if most is None:
        raise ValueError(
            f"state='buffers' needs room for the largest call, and the sizes {list(fake.shape)} have no limit: give "
            "one, as in torch.export.Dim(name, max=4096), or use state='io'"
        )
    return (most,), True


def _tensor(sizes: Sequence[Any], like: Tensor) -> Tensor:
    return torch.stack([torch.scalar_tensor(size, dtype=torch.int64, device=like.device) for size in sizes])
