"""What TeaCache remembers between the steps of a generation, and where it is kept."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from teacache_fx.contexts import Identity
from teacache_fx.policy import PolicyState
from teacache_fx.signature import RECORDED

MAX_CONTEXTS = 16
"""States that a store keeps; the least recently used one goes first."""

MAX_RECORDS = 4096
"""Steps that the statistics of one context go back."""


class TeaCacheState:
    """State of one context of one model at one set of shapes.

    Attributes:
        label: the context's name, or a number where the caller gave none.
        identity: the tensors that it belongs to.
        tensors: previous_modulated_input and each previous_residual; empty before the first step.
        scalars: what the policy carries from step to step.
        records: per step the tensors of `RECORDED`, read from the device only when statistics are asked for.
    """

    def __init__(self, label: str, identity: Identity | None = None) -> None:
        self.label = label
        self.identity = identity or Identity(())
        self.tensors: list[Tensor] = []
        self.scalars: list[Tensor] = []
        self.records: deque[Sequence[Tensor]] = deque(maxlen=MAX_RECORDS)

    def reset(self) -> None:
        """Forgets the generation and frees its tensors; the records stay."""
        self.tensors, self.scalars = [], []

    def inputs(self, allocate: Callable[[], list[Tensor]], num_inference_steps: int) -> list[Tensor]:
        """The state as inputs of the rewritten graph, allocated if this is the first step."""
        if not self.tensors:
            self.tensors = allocate()
            self.scalars = list(PolicyState.initial(num_inference_steps, self.tensors[0].device))
        return [*self.tensors, *self.scalars]

    def advance(self, outputs: Sequence[Tensor]) -> None:
        """Takes over the new state and the record that a step has returned."""
        count = len(self.tensors)
        self.tensors = list(outputs[:count])
        self.scalars = [*outputs[count : -len(RECORDED)], self.scalars[-1]]
        self.records.append(outputs[-len(RECORDED) :])


class StateStore:
    """All states of the models of one class under one config. Compiled graphs come and go, the store stays."""

    def __init__(self, max_contexts: int = MAX_CONTEXTS) -> None:
        self._states: OrderedDict[Hashable, TeaCacheState] = OrderedDict()
        self._max_contexts = max_contexts
        self._num_unnamed = 0

    @property
    def states(self) -> list[TeaCacheState]:
        """The states kept, least recently used first."""
        return list(self._states.values())

    def select(
        self, name: str | None, conditioning: Sequence[Tensor], shapes: Hashable, weights: Sequence[Tensor] = ()
    ) -> TeaCacheState:
        """The state for a call: of the named context, else of these very conditioning tensors; a new one if unknown.

        Args:
            name: set by the caller with `cache_context`, or `None`.
            conditioning: text embeddings and the like.
            shapes: shapes, dtypes and devices of all inputs of the call, and how many tensors its state has.
            weights: the model's tensors. Dynamo runs one compiled graph for all models of the same structure, so only
                they tell which model is being called.
        """
        anchors = [*weights[:1], *(conditioning if name is None else [])]
        key = (name, tuple(map(id, weights)), tuple(map(id, anchors)), shapes)
        state = self._states.get(key)
        if state is None or not state.identity.matches(anchors):
            state = self._states[key] = self._new(name, anchors)
        self._states.move_to_end(key)
        return state

    def _new(self, name: str | None, anchors: Sequence[Tensor]) -> TeaCacheState:
        state = TeaCacheState(name or f"context {self._num_unnamed}", Identity(anchors))
        self._num_unnamed += name is None
        for other in self._states.values():
            if not other.identity.is_alive:
                other.reset()  # nobody can call for it again; its statistics stay until it is dropped
        if len(self._states) >= self._max_contexts:
            self._states.popitem(last=False)
        return state

    def reset(self) -> None:
        """Makes every context start anew; the statistics stay."""
        for state in self._states.values():
            state.reset()
