"""TeaCache as a diffusers hook around the forward of one transformer. Needs diffusers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from teacache_fx.coefficients import evaluate, horner
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import announce, original
from teacache_fx.extractors import extracted_forward, extractor_of, validated
from teacache_fx.forwards import named_arguments, with_own_code
from teacache_fx.graph_backend import GraphBackend
from teacache_fx.listener import ListeningHook
from teacache_fx.opaque import OpaqueModule, breaking_modules, make_opaque
from teacache_fx.whole_call import CallReader, Capture, seen_whole

HOOK_NAME = "teacache"

# Without these dynamo breaks the graph where a size follows from a mask or from the experts chosen: within the blocks,
# in some models. With them it fails where such a size decides what to do.
_CAPTURE_MORE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}


class TeaCacheHook(ListeningHook):
    """Replaces a transformer's forward by the rewritten, compiled one.

    It stands in the transformer's `HookRegistry`, so diffusers' `cache_context` and the reset at the end of a pipeline
    call reach it, and `HookRegistry.remove_hook("teacache")` takes it away again.

    Attributes:
        config: the settings.
        state_manager: hears the names of the guidance branches.
        extractor_fn: the extractor registered for the model's class; `None` where the matcher finds the blocks itself.
        backend: compiles, and keeps states, reports and statistics.

    Args:
        config: the settings, or a backend to share with other transformers; `None` for the defaults.
    """

    def __init__(self, config: TeaCacheConfig | GraphBackend | None = None) -> None:
        super().__init__()
        self.backend = config if isinstance(config, GraphBackend) else GraphBackend(config)
        self.backends.add(self.backend)
        self.config = self.backend.config
        self.extractor_fn: Callable[..., Any] | None = None
        self._capture: dict[str, Any] = _CAPTURE_MORE
        self._compiled: Callable[..., Any] | None = None
        self._reader: CallReader | None = None
        self._opaque: list[OpaqueModule] = []
        self._has_rewritten = False

    _shared = (
        "backends", "backend", "config", "extractor_fn", "_capture", "_compiled", "_reader", "_opaque", "_has_rewritten"
    )  # fmt: skip

    def rescale_func(self, rel_l1: Tensor) -> Tensor:
        """The polynomial by which the relative L1 distance is rescaled; a tensor or a number of any shape."""
        coefficients = self.config.resolve(self.config.transformer_type or self._class_name).coefficients
        return torch.as_tensor(evaluate(horner(coefficients), torch.as_tensor(rel_l1)))

    _class_name = ""
    _module: weakref.ref[nn.Module] | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by the registry: learns the model's class and its extractor. Nothing is compiled yet."""
        self._class_name, self._module = type(module).__name__, weakref.ref(module)
        self.extractor_fn = extractor_of(module)
        announce(module, self.state_manager)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Called by the registry before each step.

        Raises:
            RuntimeError: the model is a deep copy, whose forward, as diffusers copies it, runs the original's weights.
        """
        if self._module is not None and module is not self._module():
            raise RuntimeError(
                f"this {self._class_name} was copied while TeaCache was applied, and its forward still is the "
                "original's: take TeaCache off (backend.disable or remove_teacache_hook), copy, and apply it to both"
            )
        return args, kwargs

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # an outer torch.compile leaves it to compile by itself
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Runs one denoising step; the first call compiles.

        Args:
            module: the transformer.
            *args: what its forward takes.
            **kwargs: likewise.

        Returns:
            what its forward returns.
        """
        try:
            return self._call(module, args, kwargs)
        except (GuardOnDataDependentSymNode, UserError):
            if not self._capture:
                raise
            self._capture, self._compiled = {}, None  # rather a graph break than none at all
            return self._call(module, args, kwargs)

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The settings count at each call, since dynamo would compile anew for others.
        if self.extractor_fn is not None:
            args, kwargs = named_arguments(module, self.extractor_fn, args, kwargs)
        with torch._dynamo.config.patch(self._capture):
            if self._compiled is None:
                self._compiled = self._compile(module, args, kwargs)
            with seen_whole(module, self._reader.read(args, kwargs) if self._reader is not None else None) as capture:
                output = self._compiled(*args, **kwargs)
            self._has_rewritten |= capture.is_rewritten
            verdict = None if self._has_rewritten else capture.verdict
            if verdict is not None and not self._heal(module, capture, args, kwargs):
                self.backend.tell(module, self._class_name, verdict)
            return output

    def _heal(
        self, module: nn.Module, capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[OpaqueModule]:
        """Keeps whole the submodules that broke the graph, so that the next call captures the rest; once at most."""
        if self._opaque or self.extractor_fn is not None:
            return []
        breaks = [cause for _, cause in capture.refusals if cause is not None]
        forward = self.fn_ref.original_forward
        with torch.no_grad():
            self._opaque = make_opaque(breaking_modules(module, breaks), lambda: forward(*args, **kwargs))
        if self._opaque:
            self._compiled = None
        return self._opaque

    def _compile(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        forward = with_own_code(self.fn_ref.original_forward)
        with torch.no_grad():
            # Some models build tables at their first call, which dynamo could not capture.
            output = forward(*args, **kwargs)
        if self.extractor_fn is not None:
            validated(self.extractor_fn, module, *args, **kwargs)
            forward = extracted_forward(self.extractor_fn).__get__(module)
        else:
            self._reader = CallReader(forward, args, kwargs, output)
        compiled: Callable[..., Any] = torch.compile(forward, backend=self.backend)
        return compiled

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # the method's name in diffusers
        """Called by the registry on removal: forgets the states of the module."""
        self.backend.reset_state(module)
        for opaque in self._opaque:
            opaque.remove()
        return module


def apply_teacache_hook(module: nn.Module, config: TeaCacheConfig | GraphBackend | None = None) -> None:
    """Makes a transformer run with TeaCache, in place; a pipeline that it belongs to needs no change.

    Args:
        module: the transformer.
        config: the settings, or a backend to share with other transformers; `None` for the defaults.

    Raises:
        TypeError: `module` is no module, or `config` is neither.
        ValueError: TeaCache is applied already, or the module is compiled already.
    """
    check_applicable(module)
    with _beneath_offloading(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(TeaCacheHook(config), HOOK_NAME)


def check_applicable(module: nn.Module) -> None:
    """Raises what `apply_teacache_hook` would raise for the module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if original(module) is not module or module._compiled_call_impl is not None:
        raise ValueError(
            f"module is a compiled {type(original(module)).__name__}; the hook compiles by itself: apply it to the "
            "model as it was, or compile that with torch.compile(model, backend=TeaCacheBackend(...))"
        )
    if hook_of(module) is not None:
        raise ValueError(
            f"TeaCache is applied to this {type(module).__name__} already; backend.disable(pipeline) or "
            "remove_teacache_hook(module) takes it off"
        )


def remove_teacache_hook(module: nn.Module) -> None:
    """Gives a transformer its own forward back. Without the hook nothing happens."""
    if hook_of(module) is not None:
        with _beneath_offloading(module):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK_NAME, recurse=False)


def hook_of(module: nn.Module) -> TeaCacheHook | None:
    """The TeaCache hook of a module, if it has one."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK_NAME) if registry is not None else None
    return hook if isinstance(hook, TeaCacheHook) else None


@contextlib.contextmanager
def _beneath_offloading(module: Any) -> Iterator[None]:
    """Works on the forward beneath accelerate's wrapper, which moves the weights.

    accelerate keeps the forward that it has wrapped in `_old_forward`, and puts it back when a pipeline takes its
    wrappers off and on again after each call; a hook above the wrapper would be lost there.
    """
    if not hasattr(module, "_hf_hook"):
        yield
        return
    wrapper, module.forward = module.forward, module._old_forward
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, wrapper
