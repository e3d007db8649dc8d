"""How the arguments of a model's call are laid out as the flat inputs of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_MISSING = object()


class CallLayout:
    """The layout of one capture.

    Args:
        signature: of the model's forward.
        arguments: of the call that was captured, by name.
        output: structure of what the model returned.
    """

    def __init__(self, signature: inspect.Signature, arguments: Mapping[str, Any], output: pytree.TreeSpec) -> None:
        parameters = signature.parameters.values()
        self.output = output
        self._positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._specs = {name: pytree.tree_structure(value) for name, value in arguments.items()}
        self._constants = {
            name: [_MISSING if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(value)]
            for name, value in arguments.items()
        }

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, in the graph's order.

        Raises:
            TypeError: an argument is missing, or was not there at the capture, or had another structure.
            ValueError: a number, a flag or the like has another value than at the capture, where it was built in.
        """
        given = {**dict(zip(self._positional, args, strict=False)), **kwargs}
        for name, value in given.items():
            if name not in self._specs and not _is_same(value, self._defaults.get(name, _MISSING)):
                raise TypeError(f"{name} was not given when the model was captured: rewrite it anew, with {name}")
        return [leaf for name in self._specs for leaf in self._leaves(name, given)]

    def _leaves(self, name: str, given: Mapping[str, Any]) -> list[Any]:
        value = given.get(name, self._defaults.get(name, _MISSING))
        if value is _MISSING:
            raise TypeError(f"{name} is missing: the model was captured with {', '.join(self._specs)}")
        leaves, spec = pytree.tree_flatten(value)
        if spec != self._specs[name]:
            raise TypeError(f"{name} is not built as it was when the model was captured: rewrite it anew")
        for leaf, constant in zip(leaves, self._constants[name], strict=True):
            if isinstance(leaf, Tensor) is not (constant is _MISSING):
                kinds = ("a tensor", "no tensor")[:: 1 if constant is _MISSING else -1]
                raise TypeError(f"{name} was {kinds[0]} when the model was captured, and is {kinds[1]} now")
            if constant is not _MISSING and not _is_same(leaf, constant):
                raise ValueError(f"{name}={leaf!r}, but {constant!r} was built in when the model was captured")
        return leaves


def _is_same(value: Any, other: Any) -> bool:
    return value is other or (isinstance(value, (bool, int, float, str)) and bool(value == other))
