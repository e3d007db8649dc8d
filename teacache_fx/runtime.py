"""Calls a compiled, rewritten graph: picks the state, passes it in, takes the new one out."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from teacache_fx.advice import NEW_CONDITIONING
from teacache_fx.argument_names import ENOUGH, says_time
from teacache_fx.config import TeaCacheConfig
from teacache_fx.errors import TeaCacheWarning
from teacache_fx.graph import argument_name, fake_value, is_number, is_user_input, is_weight
from teacache_fx.pipeline import RewrittenGraph
from teacache_fx.policy import PolicyState
from teacache_fx.signature import CacheSignature
from teacache_fx.state import Memory, TeaCacheState
from teacache_fx.store import StateStore
from teacache_fx.whole_call import current_call


class CachedGraph:
    """What dynamo calls in place of the captured graph. It looks at no value, so it never waits for the device."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        rewritten: RewrittenGraph,
        store: StateStore,
        config: TeaCacheConfig,
    ) -> None:
        placeholders = [node for node in rewritten.gm.graph.nodes if node.op == "placeholder"]
        placeholders = placeholders[: rewritten.signature.num_inputs]
        conditioning = set(rewritten.plan.partition.conditioning)
        self._compiled, self._store = compiled, store
        self._is_advised = False
        self._num_inference_steps = config.num_inference_steps or 0
        self._num_outputs = rewritten.signature.num_outputs
        self._state_shapes = StateShapes(placeholders, rewritten.signature)
        self._graph = rewritten.fingerprint
        tensors = [i for i, node in enumerate(placeholders) if isinstance(fake_value(node), Tensor)]
        self._is_fragment = rewritten.plan.is_fragment
        self._device = rewritten.signature.tensors[0].device
        self._conditioning = _picker([i for i in tensors if placeholders[i].name in conditioning])
        self._user_inputs = _picker([i for i in tensors if is_user_input(placeholders[i])])
        self._weights = _picker([i for i in tensors if is_weight(placeholders[i])])
        self._numbers = _picker([i for i, node in enumerate(placeholders) if is_number(node) and not _is_time(node)])

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Runs one denoising step.

        Raises:
            RuntimeError: the graph holds only a part of the forward, and nobody has said what the model is called with.
        """
        conditioning = self._conditioning(args)
        if self._is_fragment:
            whole = current_call()
            if whole is None:
                raise RuntimeError("this graph begins behind a graph break: call the model through its TeaCache hook")
            args, conditioning = (*args, *whole.inputs(self._device)), whole.conditioning
        weights = self._weights(args)
        model = self._store.model(weights)
        call = model.context
        shapes = (self._graph, *[(tensor.shape, tensor.dtype, tensor.device) for tensor in self._user_inputs(args)])
        numbers = tuple(map(float, self._numbers(args)))
        state = self._store.select(model, call, conditioning, shapes, numbers)
        if self._store.finds_none and not self._is_advised:
            self._is_advised = True
            warnings.warn(NEW_CONDITIONING, TeaCacheWarning, stacklevel=2)
        if state.steps_since_reset < 2:
            _check_weights(state, weights)
        length = call.num_inference_steps or self._num_inference_steps
        remembered = state.inputs(lambda: self._state_shapes.allocate(args), length)
        outputs: Sequence[Any] = self._compiled(*args, *remembered)
        state.advance(remembered, outputs[self._num_outputs :])
        return outputs[: self._num_outputs]


def _is_time(number: fx.Node) -> bool:
    """A timestep given as a python number varies within a generation."""
    return says_time(argument_name(number), 0) >= ENOUGH


def _check_weights(state: TeaCacheState, weights: Sequence[Tensor]) -> None:
    """Begins anew if a weight was changed in place after the first step.

    After two steps a new generation is told by its timestep. Looking at a thousand weights is too slow for every step.
    """
    try:
        version = sum(weight._version for weight in weights)
    except RuntimeError:  # inference tensors do not count
        version = 0
    if version != state.weights_version:
        state.reset()
        state.weights_version = version


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Picks arguments out; `itemgetter` alone would return a single one bare. There may be a thousand weights."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: tuple(args[place] for place in places)


class StateShapes:
    """Allocates state tensors; sizes that are symbolic are worked out from the arguments of a call."""

    def __init__(self, placeholders: Sequence[fx.Node], signature: CacheSignature) -> None:
        self._num_tensors = len(signature.tensors)
        fakes = (*signature.tensors, *signature.scalars)
        self._fakes = [(tuple(fake.shape), fake.dtype, fake.device) for fake in fakes]
        self._symbols: dict[Any, tuple[int, int | None]] = {}  # symbol -> argument and its dimension
        for position, node in enumerate(placeholders):
            value = fake_value(node)
            if isinstance(value, torch.SymInt):
                self._learn(value, position, None)
            elif isinstance(value, Tensor):
                for dimension, size in enumerate(value.shape):
                    self._learn(size, position, dimension)

    def _learn(self, size: Any, position: int, dimension: int | None) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            self._symbols.setdefault(size.node.expr, (position, dimension))

    def allocate(self, args: Sequence[Any]) -> Memory:
        """Zeros for each state tensor of a call with these arguments."""
        zeros = [
            torch.zeros([self._size(size, args) for size in shape], dtype=dtype, device=device)
            for shape, dtype, device in self._fakes
        ]
        return Memory(tuple(zeros[: self._num_tensors]), PolicyState(*zeros[self._num_tensors :]))

    def _size(self, size: Any, args: Sequence[Any]) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        values = {}
        for symbol in expression.free_symbols:
            position, dimension = self._symbols[symbol]
            values[symbol] = args[position] if dimension is None else args[position].shape[dimension]
        return int(expression.subs(values))
