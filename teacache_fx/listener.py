"""Hears what diffusers' pipelines say to a transformer: the name of the guidance branch, and that a generation is over.

`transformer.cache_context("cond")` reaches every stateful hook in the transformer's hook registry, and so does the
reset at the end of a pipeline call. A `ListeningHook` is such a hook and does nothing else.

Needs diffusers; of its private names only the registry's `_hook_order` and `_fn_refs` are used. Tried on 0.42.
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any, Protocol

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import nn

from teacache_fx.contexts import CallContext, announce

_NAME = "teacache_listener"


class Resetting(Protocol):
    """A backend, as the hook sees it."""

    def reset_state(self, model: nn.Module) -> None:
        """Makes the next step of the model the first of a generation."""


class HeardContext(StateManager):  # type: ignore[misc]
    """Takes what a pipeline says, for each thread by itself: diffusers' own manager has one context for all threads."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[HeardContext], tuple[()]]:
        """A copy has heard nothing yet."""
        return type(self), ()

    def set_context(self, context: Any) -> None:
        """Called by diffusers, with `None` at the end; older versions pass the bare name."""
        self._local.context = context

    def reset(self, *_: Any, **__: Any) -> None:
        """Forgets the name."""
        self.set_context(None)

    def __call__(self) -> CallContext:
        """What counts for calls made now, in this thread."""
        context = getattr(self._local, "context", None)
        length = getattr(context, "num_inference_steps", None)
        return CallContext(getattr(context, "name", context), num_inference_steps=length)


class ListeningHook(ModelHook):  # type: ignore[misc]
    """A stateful hook that leaves the forward as it is.

    Attributes:
        state_manager: hears the names.
        backends: are told of resets.
    """

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.state_manager = HeardContext()
        self.backends: weakref.WeakSet[Resetting] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> ListeningHook:
        """Copies of a model tell the same backends."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, value if name in self._shared else copy.deepcopy(value, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """A model that is saved forgets the backends."""
        return {**vars(self), "backends": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Nobody is told until the model is compiled again."""
        self.__dict__.update({**state, "backends": weakref.WeakSet()})

    _shared: tuple[str, ...] = ("backends",)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a pipeline call."""
        for backend in list(self.backends):
            backend.reset_state(module)
        self.state_manager.reset()
        return module


def listen(model: nn.Module, backend: Resetting) -> None:
    """Makes a transformer that is compiled in place tell its contexts and resets to the backend.

    Args:
        model: a diffusers transformer with `cache_context`; one with a listening hook already only gains a listener.
        backend: is told of resets; held weakly.
    """
    hook = listening_hook(model)
    if hook is None:
        hook = ListeningHook()
        _insert(HookRegistry.check_if_exists_or_initialize(model), hook)
        announce(model, hook.state_manager)
    hook.backends.add(backend)


def listening_hook(model: nn.Module) -> ListeningHook | None:
    """The hook of a module that hears its contexts, if it has one."""
    registry = getattr(model, "_diffusers_hook", None)
    hooks = registry.hooks.values() if registry is not None else ()
    return next((hook for hook in hooks if isinstance(hook, ListeningHook)), None)


def _insert(registry: HookRegistry, hook: ListeningHook) -> None:
    """Registers without a wrapper around the forward, since dynamo would compile a wrapped forward once more.

    The first place is the one whose entry no other hook's removal looks at.
    """
    reference = HookFunctionReference()
    reference.forward = registry._fn_refs[0].forward if registry._fn_refs else registry._module_ref.forward
    reference.pre_forward, reference.post_forward = hook.pre_forward, hook.post_forward
    hook.fn_ref = reference
    registry.hooks[_NAME] = hook
    registry._hook_order.insert(0, _NAME)
    registry._fn_refs.insert(0, reference)
