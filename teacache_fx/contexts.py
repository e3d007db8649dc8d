"""Which state serves a call: by the name that the caller gives, else by the identity of the conditioning tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_names: ContextVar[tuple[tuple[weakref.ref[nn.Module], str], ...]] = ContextVar("teacache_fx_contexts", default=())


@contextlib.contextmanager
def cache_context(model: nn.Module, name: str) -> Iterator[None]:
    """Names the guidance branch that calls of `model` inside the `with` block belong to, such as "cond" or "uncond".

    Args:
        model: the transformer, compiled or not.
        name: any non-empty text; calls under different names never share a state.

    Raises:
        TypeError: `model` is no module, or `name` is not a string.
        ValueError: `name` is empty.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'cond', got {name!r}")
    if not name:
        raise ValueError("name must not be empty; call the model without cache_context to leave it unnamed")
    token = _names.set(((weakref.ref(original(model)), name), *_names.get()))
    try:
        yield
    finally:
        _names.reset(token)


def context_name(weights: Sequence[Tensor]) -> str | None:
    """The innermost name set in this thread for the model that these parameters and buffers belong to, if any."""
    names = _names.get()
    wanted = set(map(id, weights)) if names else set()
    for reference, name in names:
        model = reference()
        if model is not None and any(id(own) in wanted for own in model.parameters()):
            return name
    return None


def original(model: nn.Module) -> nn.Module:
    """The module behind what `torch.compile(module)` returns."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


class Identity:
    """Tells whether a call is conditioned on the very same tensors as an earlier one.

    Note [Identity]: a pipeline passes the same embeddings object at each step and another for the negative branch. The
    id alone would not do: a freed tensor's address is given to the next one, and a prompt can be changed in place.
    So the tensors are held as weak references together with their version counters. Inference tensors have no version
    counter: of these a copy is kept, and the contents are compared.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._references = [weakref.ref(tensor) for tensor in tensors]
        self._versions = [_version(tensor) for tensor in tensors]

    @property
    def is_alive(self) -> bool:
        """Whether all tensors still exist; if not, no call can match any more."""
        return all(reference() is not None for reference in self._references)

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors remembered, alive and unchanged since."""
        return all(
            reference() is tensor and _is_version(version, tensor)
            for reference, version, tensor in zip(self._references, self._versions, tensors, strict=True)
        )


def _version(tensor: Tensor) -> int | Tensor:
    return tensor.clone() if tensor.is_inference() else tensor._version


def _is_version(version: int | Tensor, tensor: Tensor) -> bool:
    return torch.equal(version, tensor) if isinstance(version, Tensor) else version == tensor._version
