"""Whose call it is, told by the very tensors passed: the model by its weights, the prompt by its embeddings."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from teacache_fx.contexts import CallContext, announced, current_context, num_announced


class Resettable(Protocol):
    """Something that holds on to tensors until it is reset."""

    def reset(self) -> None:
        """Lets them go."""


class CalledModel:
    """The model that a compiled graph is being called for, told by its weights.

    Dynamo runs one compiled graph for all models of the same structure, so only the weights tell which one it is.

    Attributes:
        states: what is remembered of it; freed together with the model.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.states: weakref.WeakSet[Resettable] = weakref.WeakSet()
        self._weights = [weakref.ref(weight) for weight in weights]
        self._first = Identity(weights[:1], self._free)
        self._version = _version(weights)
        self._owners: list[weakref.ref[nn.Module]] = []
        self._num_announced = -1

    def matches(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, the first of them alive and unchanged; it stands for all."""
        return self._first.matches(weights[:1]) and self._version == _version(weights)

    def _free(self) -> None:
        for state in list(self.states):
            state.reset()

    @property
    def is_alive(self) -> bool:
        """Whether the first weight still exists."""
        return self._first.is_alive

    def is_owned_by(self, model: nn.Module) -> bool:
        """Whether any of the weights belongs to the module."""
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return any(id(weight()) in own for weight in self._weights)

    @property
    def context(self) -> CallContext:
        """What is said just now of calls of this model, or of a module that it is part of."""
        if self._num_announced != num_announced():
            number, models = announced()
            self._owners = [weakref.ref(model) for model in models if self.is_owned_by(model)]
            self._num_announced = number  # last, since another thread may ask meanwhile
        return current_context(*[model for reference in self._owners if (model := reference()) is not None])


def _version(weights: Sequence[Tensor]) -> int:
    """How often the first weight was changed in place; inference tensors do not count it."""
    return weights[0]._version if weights and not weights[0].is_inference() else 0


class Identity:
    """Tells whether a call is conditioned on the very same tensors as an earlier one.

    Note [Identity]: a pipeline passes the same embeddings object at each step and another for the negative branch. The
    id alone would not do, since a freed tensor's address is given to the next one: so the tensors are held as weak
    references. A tensor refilled in place is noticed by the hash of the contents in the graph.

    Args:
        tensors: what to remember.
        on_death: called once any of the tensors is gone.
    """

    def __init__(self, tensors: Sequence[Tensor], on_death: Callable[[], None] | None = None) -> None:
        callback = None if on_death is None else lambda _: on_death()
        self._references = [weakref.ref(tensor, callback) for tensor in tensors]

    @property
    def is_alive(self) -> bool:
        """Whether all tensors still exist; if not, no call can match any more."""
        return all(reference() is not None for reference in self._references)

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors remembered."""
        return all(reference() is tensor for reference, tensor in zip(self._references, tensors, strict=True))
