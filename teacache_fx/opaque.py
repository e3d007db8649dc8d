"""Keeps submodules that dynamo cannot capture whole in the graph, as one operation each.

Note [Opaque modules]: a mixture of experts that counts its tokens on the host breaks the graph in every block, and no
flag of dynamo heals it. What such a module returns is nonetheless shaped like what it takes. So the call of the module
is put into the graph as one operation, which runs the module as it is, and the graph goes on behind it.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from teacache_fx.capture import GraphBreak


class OpaqueModule:
    """A submodule whose forward is one operation while this is installed.

    Attributes:
        handle: what the operation in the graph calls it by.
        flops: floating-point operations of one call, as counted by torch's counter.
        weight_bytes: bytes of the module's parameters and buffers.
    """

    _handles = itertools.count()

    def __init__(self, module: nn.Module, flops: int) -> None:
        self._module = weakref.ref(module)
        self.run: Callable[[Tensor], Tensor] = module.forward
        self.handle, self.flops = next(self._handles), flops
        handle = self.handle
        self.weight_bytes = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))

        def forward(hidden_states: Tensor) -> Tensor:
            result: Tensor = call_module(hidden_states, handle)
            return result

        self._former = module.__dict__.get("forward")
        module.forward = forward
        _installed[handle] = self

    def remove(self) -> None:
        """Gives the module its forward back."""
        module = self._module()
        if module is not None:
            del module.__dict__["forward"]
            if self._former is not None:
                module.forward = self._former


_installed: weakref.WeakValueDictionary[int, OpaqueModule] = weakref.WeakValueDictionary()


@torch.library.custom_op("teacache_fx::call_module", mutates_args=())
def call_module(hidden_states: Tensor, handle: int) -> Tensor:
    """Runs an opaque module on a tensor of any shape; the result has its shape, dtype and device."""
    result = _installed[handle].run(hidden_states)
    return result.clone() if result.untyped_storage()._cdata == hidden_states.untyped_storage()._cdata else result


@call_module.register_fake
def _(hidden_states: Tensor, handle: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(hidden_states)


def opaque_module(handle: int) -> OpaqueModule | None:
    """The opaque module that the operation with this handle runs; `None` once it is gone."""
    return _installed.get(handle)


def breaking_modules(model: nn.Module, breaks: Iterable[GraphBreak]) -> list[nn.Module]:
    """The innermost submodules in whose forwards the capture broke, and all others of their classes."""
    classes = {type(module): _lines(type(module)) for module in model.modules() if module is not model}
    broken = set()
    for graph_break in breaks:
        for filename, number in reversed(graph_break.frames):
            found = [cls for cls, (file, lines) in classes.items() if file == filename and number in lines]
            if found:
                broken.update(found)
                break
    return [module for module in model.modules() if type(module) in broken]


def _lines(cls: type[nn.Module]) -> tuple[str, range]:
    code = inspect.unwrap(cls.forward).__code__
    numbers = [line for _, _, line in code.co_lines() if line is not None]
    return code.co_filename, range(min(numbers), max(numbers) + 1)


def make_opaque(modules: list[nn.Module], call: Callable[[], Any]) -> list[OpaqueModule]:
    """Makes those of the modules opaque that take one tensor and return one alike; none, if any does otherwise.

    Args:
        modules: submodules of a model.
        call: calls the model eagerly, to see what they are called with.
    """
    counters: dict[nn.Module, FlopCounterMode] = {}
    fit: set[nn.Module] = set()

    def enter(module: nn.Module, _: tuple[Any, ...]) -> None:
        counters[module] = FlopCounterMode(display=False).__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        counters[module].__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if len(args) == 1 and not kwargs and _alike(args[0], output):
            fit.add(module)

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave, with_kwargs=True) for module in modules]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if fit != counters.keys():
        return []
    return [OpaqueModule(module, counter.get_total_flops()) for module, counter in counters.items()]


def _alike(entered: Any, returned: Any) -> bool:
    if not isinstance(entered, Tensor) or not isinstance(returned, Tensor):
        return False
    return (entered.shape, entered.dtype, entered.device) == (returned.shape, returned.dtype, returned.device)
