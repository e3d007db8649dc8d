"""Keeps the states of all models of one class under one config, and finds the one that a call belongs to."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence, Sized
from typing import NamedTuple

from torch import Tensor, nn

from teacache_fx.contexts import CallContext, check_request_id
from teacache_fx.identity import CalledModel, Identity
from teacache_fx.policy import StepReason
from teacache_fx.state import TeaCacheState

MAX_CONTEXTS = 16
"""States that a store keeps by default; the least recently used one goes first."""

_MAX_NEW_IN_A_ROW = 12
_MAX_PAST = 256  # dropped states of which the statistics are kept


class _Scope(NamedTuple):
    """All of a state's key but the conditioning."""

    model: CalledModel
    request_id: Hashable
    name: str | None
    numbers: Hashable
    shapes: Hashable


_Key = tuple[_Scope, tuple[int, ...]]


class StateStore:
    """All states of the models of one class under one config. Compiled graphs come and go, the store stays.

    Note [Which state?]: the key is the model (all its weights), the request, the branch's name, the python numbers that
    vary, the shapes and the graph, and the identity of the conditioning. Where the conditioning was made anew, the
    state is handed on; the hash of the contents, in the graph, tells whether the numbers are the same.

    Args:
        max_contexts: states kept; the least recently used one goes first.
    """

    def __init__(self, max_contexts: int = MAX_CONTEXTS) -> None:
        self._states: OrderedDict[_Key, TeaCacheState] = OrderedDict()
        self._models: dict[tuple[int, ...], CalledModel] = {}
        self._past: deque[TeaCacheState] = deque(maxlen=_MAX_PAST)
        self._max_contexts = max_contexts
        self._num_unnamed = 0
        self._num_new_in_a_row = 0
        self._lock = threading.Lock()

    @property
    def states(self) -> list[TeaCacheState]:
        """The states kept, least recently used first."""
        return list(self._states.values())

    @property
    def recorded(self) -> Iterator[TeaCacheState]:
        """Every state that has statistics, those dropped from the store first."""
        yield from list(self._past)
        yield from self.states

    @property
    def finds_none(self) -> bool:
        """Whether each of the last calls, more than branches and requests explain, brought new conditioning."""
        return self._num_new_in_a_row > _MAX_NEW_IN_A_ROW

    def forget_records(self) -> None:
        """Empties the statistics."""
        self._past.clear()
        for state in self.states:
            state.records.clear()

    def model(self, weights: Sequence[Tensor]) -> CalledModel:
        """The model that these tensors, in this order, are the weights of."""
        key = tuple(map(id, weights))
        model = self._models.get(key)
        if model is None or not model.matches(weights):
            with self._lock:
                model = self._models.get(key)  # another thread may have met it meanwhile
                if model is None or not model.matches(weights):
                    model = self._meet(key, weights, model)
        return model

    def _meet(self, key: tuple[int, ...], weights: Sequence[Tensor], former: CalledModel | None) -> CalledModel:
        for state in () if former is None else former.states:
            state.reset()  # its weights have changed: nobody can call for it again
        for gone in [other for other, model in self._models.items() if not model.is_alive]:
            del self._models[gone]
        model = self._models[key] = CalledModel(weights)
        return model

    def select(
        self,
        model: CalledModel,
        call: CallContext,
        conditioning: Sequence[Tensor],
        shapes: Hashable,
        numbers: Hashable = (),
    ) -> TeaCacheState:
        """The state for a call; a new one if there is none yet. See Note [Which state?].

        Args:
            model: the one called.
            call: what the caller has said.
            conditioning: text embeddings and the like.
            shapes: shapes, dtypes and devices of all inputs of the call, and the graph that takes them.
            numbers: python numbers among the arguments and in the model that dynamo has not built into the graph.
        """
        key = (_Scope(model, call.request_id, call.name, numbers, shapes), _identities(conditioning))
        with self._lock:
            state = self._states.get(key)
            if state is not None and state.identity.matches(conditioning):
                self._num_new_in_a_row = 0
            else:
                state = self._adopt(key, conditioning) or self._new(key, conditioning)
            self._states.move_to_end(key)
            return state

    def _adopt(self, key: _Key, conditioning: Sequence[Tensor]) -> TeaCacheState | None:
        """Hands on the state of a context whose conditioning was made anew, or whose name was not known yet."""
        found = self._predecessor(key, conditioning)
        if found is None:
            return None
        state = self._states[key] = self._states.pop(found)
        label = state.label if key[0].name is None else _label(key[0])
        state.belong_to(label, self._identity(key, conditioning, state))
        return state

    def _predecessor(self, key: _Key, conditioning: Sequence[Tensor]) -> _Key | None:
        scope, identities = key
        unnamed = (scope._replace(name=None), identities)
        if unnamed in self._states and self._states[unnamed].identity.matches(conditioning):
            return unnamed  # the name was not known at the first call, since that compiles
        outlived = [other for other, state in self._states.items() if other[0] == scope and not state.identity.is_alive]
        if scope.name is not None:
            return outlived[-1] if outlived else None
        # Only conditioning that served a single call is taken for one that is made anew. The branch called longest ago
        # is the next in turn.
        return next((other for other in outlived if self._states[other].steps_with_identity == 1), None)

    def _identity(self, key: _Key, conditioning: Sequence[Tensor], state: TeaCacheState) -> Identity:
        """Without a name the state dies with its conditioning, and its memory is free at once; see `_predecessor`."""
        if key[0].name is not None:
            return Identity(conditioning)
        reference = weakref.ref(state)

        def on_death() -> None:
            dying = reference()
            if dying is not None and dying.steps_with_identity > 1:
                dying.reset()

        return Identity(conditioning, on_death)

    def _new(self, key: _Key, conditioning: Sequence[Tensor]) -> TeaCacheState:
        scope = key[0]
        label = _label(scope, f"context {self._num_unnamed}")
        self._num_unnamed += scope.name is None
        self._num_new_in_a_row += 1
        reason = StepReason.SHAPE_CHANGED if self._has_other_shapes(key) else StepReason.FIRST
        if key in self._states:
            self._drop(key)
        for other, state in list(self._states.items()):
            if other[0].name is None and not state.identity.is_alive:
                self._drop(other)  # nobody can call for it again
        state = TeaCacheState(label, first_reason=reason)
        state.belong_to(label, self._identity(key, conditioning, state))
        scope.model.states.add(state)
        if _is_full(self._states, self._max_contexts):
            self._drop(next(iter(self._states)))
        self._states[key] = state
        return state

    def _has_other_shapes(self, key: _Key) -> bool:
        scope, identities = key
        return any(
            other._replace(shapes=scope.shapes) == scope and other.shapes != scope.shapes
            for (other, others), state in self._states.items()
            if scope.name is not None or (others == identities and state.identity.is_alive)
        )

    def _drop(self, key: _Key) -> None:
        state = self._states.pop(key)
        state.reset()
        if state.records:
            self._past.append(state)

    def of_model(self, model: nn.Module, request_id: Hashable) -> list[TeaCacheState]:
        """The states of a module's calls that belong to a request, or to none."""
        with self._lock:
            return [
                state
                for (scope, _), state in self._states.items()
                if scope.request_id == request_id and scope.model.is_owned_by(model)
            ]

    def end_session(self, request_id: Hashable) -> int:
        """Drops the states of a request and says how many there were.

        Raises:
            TypeError: `request_id` is `None` or not hashable.
        """
        check_request_id(request_id)
        with self._lock:
            ended = [key for key in self._states if key[0].request_id == request_id]
            for key in ended:
                self._drop(key)
        return len(ended)


def _identities(conditioning: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, conditioning))


def _is_full(states: Sized, limit: int) -> bool:
    return len(states) >= limit


def _label(scope: _Scope, number: str = "") -> str:
    request = "" if scope.request_id is None else f"request {scope.request_id} "
    return request + (scope.name or number)
