"""Each guard by name, and how to remove it. A row of the fault table must fail without its guard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from teacache_fx import listener, pipeline, policy, state, store
from teacache_fx.contexts import CallContext
from teacache_fx.identity import CalledModel
from teacache_fx.passes import branches, insert_cond
from tests.faults.scene import replaced


def _never(*_: Any) -> Tensor:
    return torch.zeros((), dtype=torch.bool)


def _scope_without(field: str) -> Callable[..., Any]:
    original = store._Scope

    def scope(*values: Any) -> Any:
        fields = original(*values)._asdict()
        return original(**{**fields, field: None})

    return scope


def _one_model_for_all() -> AbstractContextManager[None]:
    model = CalledModel([])
    return replaced(store.StateStore, "model", lambda *_: model)


@contextlib.contextmanager
def _one_context_for_all() -> Iterator[None]:
    heard: list[Any] = [None]

    def hear(_: Any, context: Any) -> None:
        heard[0] = context

    def tell(_: Any) -> CallContext:
        return CallContext(getattr(heard[0], "name", None))

    with replaced(listener.HeardContext, "set_context", hear), replaced(listener.HeardContext, "__call__", tell):
        yield


def _as_it_is(_: fx.Graph, node: fx.Node) -> fx.Node:
    return node


def _computed_for_all(_: fx.Graph, __: fx.Node, computed: fx.Node, ___: fx.Node) -> fx.Node:
    return computed


GUARDS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "timestep turned back": partial(replaced, policy, "turned_back", _never),
    "latents jumped": partial(replaced, policy, "latents_jumped", _never),
    "hash of the conditioning": partial(replaced, policy, "conditioning_changed", _never),
    "identity of the conditioning": lambda: replaced(store, "_identities", lambda _: ()),
    "further timesteps": partial(replaced, policy, "times_tell_branches", _never),
    "numbers": lambda: replaced(store, "_Scope", _scope_without("numbers")),
    "not finite": partial(replaced, policy, "not_finite", _never),
    "name of the branch": lambda: replaced(store, "_Scope", _scope_without("name")),
    "request": lambda: replaced(store, "_Scope", _scope_without("request_id")),
    "shapes and graph": lambda: replaced(store, "_Scope", _scope_without("shapes")),
    "fingerprint of the graph": lambda: replaced(pipeline, "_fingerprint", lambda *_: 0),
    "weights of the model": _one_model_for_all,
    "one context per thread": _one_context_for_all,
    "reset at the end": lambda: replaced(listener.ListeningHook, "reset_state", lambda _, module: module),
    "copy of the latents": lambda: replaced(insert_cond, "_as_state", _as_it_is),
    "each sample its own": lambda: replaced(branches, "_choose", _computed_for_all),
    "handed on": lambda: replaced(store.StateStore, "_adopt", lambda *_: None),
    "limit of contexts": lambda: replaced(store, "_is_full", lambda *_: False),
    "freed with the prompt": lambda: replaced(state.TeaCacheState, "reset", lambda _: None),
}
