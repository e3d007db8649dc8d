"""Whose call is it? The guidance branch and the request that a caller names, and the identity of the tensors passed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class CallContext:
    """What the caller has said of a call; `None` where nothing was said.

    Attributes:
        name: the guidance branch, such as "cond".
        request_id: the request, where the steps of several are interleaved.
        num_inference_steps: length of the generation in steps.
    """

    name: str | None = None
    request_id: Hashable = None
    num_inference_steps: int | None = None

    def or_else(self, other: CallContext) -> CallContext:
        """Takes from `other` what is not said here."""
        return CallContext(
            other.name if self.name is None else self.name,
            other.request_id if self.request_id is None else self.request_id,
            other.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps,
        )


_entered: ContextVar[tuple[tuple[weakref.ref[nn.Module], CallContext], ...]] = ContextVar("teacache_fx", default=())

# Models that somebody has spoken of, and who else to ask about their calls: diffusers' cache_context. The counter tells
# `CalledModel` when to look again whose weights it was called with.
_announced: weakref.WeakKeyDictionary[nn.Module, Callable[[], CallContext]] = weakref.WeakKeyDictionary()
_num_announced = 0

_lengths: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def set_num_inference_steps(model: nn.Module, number: int | None) -> None:
    """Says how long the coming generations of a model are, where nothing else says it; `None` for not known."""
    announce(model)
    _lengths.pop(model, None)
    if number is not None:
        _lengths[model] = number


def announce(model: nn.Module, listener: Callable[[], CallContext] | None = None) -> None:
    """Makes a model known, so that calls which use its weights are recognised as its own.

    Args:
        model: the transformer.
        listener: asked at each call for what was said by other means; it must be quick. `None` keeps the one there is.
    """
    global _num_announced
    if model not in _announced or listener is not None:
        _announced[model] = listener or _announced.get(model, CallContext)
        _num_announced += 1


@contextlib.contextmanager
def _enter(model: nn.Module, call: CallContext) -> Iterator[None]:
    model = original(model)
    announce(model)
    token = _entered.set(((weakref.ref(model), call), *_entered.get()))
    try:
        yield
    finally:
        _entered.reset(token)


def cache_context(
    model: nn.Module, name: str, *, num_inference_steps: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Names the guidance branch that calls of `model` inside the `with` block belong to, such as "cond" or "uncond".

    A name of diffusers' own `transformer.cache_context(name)` is understood as well; of both, this one counts.

    Args:
        model: the transformer, compiled or not.
        name: any non-empty text; calls under different names never share a state.
        num_inference_steps: length of the generation in steps, where it is known.

    Raises:
        TypeError: `model` is no module, `name` is not a string, or `num_inference_steps` is no integer.
        ValueError: `name` is empty, or `num_inference_steps` is not positive.
    """
    _check_model(model)
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'cond', got {name!r}")
    if not name:
        raise ValueError("name must not be empty; call the model without cache_context to leave it unnamed")
    if num_inference_steps is not None:
        check_num_inference_steps(num_inference_steps)
    return _enter(model, CallContext(name, num_inference_steps=num_inference_steps))


def session(model: nn.Module, request_id: Hashable) -> contextlib.AbstractContextManager[None]:
    """Says that calls of `model` inside the `with` block belong to one request, whose states are its own.

    For continuous batching and threads, where the steps of several requests are interleaved on one compiled model:
    enter it around each step. The states stay until they are the least recently used ones, or until
    `backend.end_session(request_id)`.

    Args:
        model: the transformer, compiled or not.
        request_id: anything hashable but `None`; the same at each step of a request.

    Raises:
        TypeError: `model` is no module, or `request_id` is `None` or not hashable.
    """
    _check_model(model)
    if request_id is None or not isinstance(request_id, Hashable):
        raise TypeError(f"request_id must be hashable and not None, got {request_id!r}")
    return _enter(model, CallContext(request_id=request_id))


def current_context(model: nn.Module) -> CallContext:
    """What is said of calls of this very module just now, in this thread."""
    found = CallContext()
    for reference, call in _entered.get():
        if reference() is model:
            found = found.or_else(call)
    listener = _announced.get(model)
    if listener is not None:
        found = found.or_else(listener())
    return found.or_else(CallContext(num_inference_steps=_lengths.get(model)))


def original(model: nn.Module) -> nn.Module:
    """The module behind what `torch.compile(module)` returns."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def check_num_inference_steps(value: object) -> int:
    """Returns a number of steps.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"num_inference_steps must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {value}")
    return value


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")


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

    def is_owned_by(self, model: nn.Module) -> bool:
        """Whether any of the weights belongs to the module."""
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return any(id(weight()) in own for weight in self._weights)

    @property
    def context(self) -> CallContext:
        """What is said just now of calls of this model, or of a module that it is part of."""
        if self._num_announced != _num_announced:
            self._num_announced = _num_announced
            self._owners = [weakref.ref(model) for model in list(_announced) if self.is_owned_by(model)]
        found = CallContext()
        for reference in self._owners:
            if (model := reference()) is not None:
                found = found.or_else(current_context(model))
        return found


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
