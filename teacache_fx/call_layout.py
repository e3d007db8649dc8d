"""How the arguments of a model's call are laid out as the flat inputs of its graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teacache_fx.sizes import limits

_MISSING = object()


def leaves_by_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of arguments of any structure, named as torch.export names the inputs of its graphs."""
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return {"_".join(_word(key) for key in path): leaf for path, leaf in leaves}


def _word(key: Any) -> str:
    if isinstance(key, pytree.MappingKey):
        return re.sub(r"[^a-zA-Z0-9]", "_", str(key.key)).lower()
    return str(key.idx if isinstance(key, pytree.SequenceKey) else key.name).lower()


class CallLayout:
    """The layout of one capture.

    Args:
        signature: of the model's forward.
        arguments: of the call that was captured, by name.
        fakes: what stands for each of their leaves in the graph.
        output: structure of what the model returned.
    """

    def __init__(
        self,
        signature: inspect.Signature,
        arguments: Mapping[str, Any],
        fakes: Sequence[Any],
        output: pytree.TreeSpec,
    ) -> None:
        parameters = signature.parameters.values()
        self.output = output
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._specs = {name: pytree.tree_structure(value) for name, value in arguments.items()}
        self._constants = {
            name: [_MISSING if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(value)]
            for name, value in arguments.items()
        }
        in_order = iter(fakes)
        self._fakes = {name: [next(in_order) for _ in constants] for name, constants in self._constants.items()}

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, in the graph's order.

        Raises:
            TypeError: an argument is missing or given twice, or was not there at the capture, or had another structure.
            ValueError: a number, a flag or the like has another value than at the capture, where it was built in, or a
                tensor a size, dtype or device that the graph was not captured for.
        """
        if len(args) > len(self._positional):
            raise TypeError(f"{len(args)} positional arguments were given, and the model takes {len(self._positional)}")
        if twice := [name for name in self._positional[: len(args)] if name in kwargs]:
            raise TypeError(f"{twice[0]} was given twice, by position and by name")
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
        for leaf, constant, fake in zip(leaves, self._constants[name], self._fakes[name], strict=True):
            if isinstance(leaf, Tensor) is not (constant is _MISSING):
                kinds = ("a tensor", "no tensor")[:: 1 if constant is _MISSING else -1]
                raise TypeError(f"{name} was {kinds[0]} when the model was captured, and is {kinds[1]} now")
            if constant is not _MISSING and not _is_same(leaf, constant):
                raise ValueError(f"{name}={leaf!r}, but {constant!r} was built in when the model was captured")
            if isinstance(fake, Tensor):
                _check_tensor(name, leaf, fake)
        return leaves


def _check_tensor(name: str, given: Tensor, fake: Tensor) -> None:
    """A size that varies at the capture may have any value within its limits."""
    bounds = [limits(size) for size in fake.shape]
    is_shape = given.ndim == fake.ndim and all(
        size >= least and (most is None or size <= most)
        for size, (least, most) in zip(given.shape, bounds, strict=True)
    )
    if not is_shape:
        wanted = ", ".join(
            str(least) if least == most else f"{least} to {most}" if most else f"{least} or more"
            for least, most in bounds
        )
        raise ValueError(
            f"{name} has the sizes {list(given.shape)}, but the model was captured for [{wanted}]: rewrite it anew, or "
            "say with dynamic_shapes which sizes vary"
        )
    if (given.dtype, given.device.type) != (fake.dtype, fake.device.type):
        found, wanted = (f"{_name(each.dtype)} on {each.device.type}" for each in (given, fake))
        raise ValueError(f"{name} is {found}, but the model was captured for {wanted}: convert it, or rewrite it anew")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_same(value: Any, other: Any) -> bool:
    return value is other or (isinstance(value, (bool, int, float, str)) and bool(value == other))
