"""Methods of models as dynamo should see them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def named_arguments(
    module: nn.Module, extractor: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments by the names that the model and the extractor share, by which inputs are recognised."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"][: len(args)]
    if not set(names) <= set(inspect.signature(extractor).parameters):
        return args, kwargs
    return args[len(names) :], {**dict(zip(names, args, strict=False)), **kwargs}


def with_own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a method with a code object of its own.

    Dynamo keeps what it has compiled with the code object, which all models of a class share, and gives up silently
    after eight variants: that many hooks in one process, and the ninth model would run uncached.
    """
    if not inspect.ismethod(forward):
        return forward
    function = forward.__func__
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(functools.update_wrapper(copy, function), forward.__self__)
