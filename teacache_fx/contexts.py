"""What the caller says of a call: the guidance branch, the request, how many steps there will be."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from teacache_fx.checks import check_count


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


def num_announced() -> int:
    """How often a model was made known."""
    return _num_announced


def announced() -> tuple[int, list[nn.Module]]:
    """How often a model was made known, and the models."""
    number = _num_announced  # first, since another thread may announce one meanwhile
    return number, list(_announced)


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


class _Spoken(contextlib.AbstractContextManager[None]):
    """What is said inside a `with` block; it may be entered any number of times."""

    def __init__(self, model: nn.Module, call: CallContext) -> None:
        self._model, self._call = original(model), call
        self._tokens: list[Any] = []

    def __enter__(self) -> None:
        announce(self._model)
        self._tokens.append(_entered.set(((weakref.ref(self._model), self._call), *_entered.get())))

    def __exit__(self, *_: object) -> None:
        _entered.reset(self._tokens.pop())


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
        check_count("num_inference_steps", num_inference_steps, 1)
    return _Spoken(model, CallContext(name, num_inference_steps=num_inference_steps))


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
    check_request_id(request_id)
    return _Spoken(model, CallContext(request_id=request_id))


def current_context(*models: nn.Module) -> CallContext:
    """What is said of calls of these very modules just now, in this thread: first by `with`, the inmost one first."""
    found = CallContext()
    for reference, call in _entered.get():
        if reference() in models:
            found = found.or_else(call)
    for model in models:
        listener = _announced.get(model)
        found = found if listener is None else found.or_else(listener())
    for model in models:
        found = found.or_else(CallContext(num_inference_steps=_lengths.get(model)))
    return found


def original(model: nn.Module) -> nn.Module:
    """The module behind what `torch.compile(module)` returns."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def check_request_id(value: Hashable) -> Hashable:
    """Returns the name of a request.

    Raises:
        TypeError: it is `None`, or not hashable.
    """
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"request_id must be hashable, got {value!r}") from None
    if value is None:
        raise TypeError("request_id must not be None: that stands for calls outside any session")
    return value


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
