"""Help for a model that the matcher declines: a function that says which tensors are which.

The function is called while the model is being captured, so what it returns are values of the graph, and what it does
is compiled. Under `torch.compile` alone it is not asked: use `apply_teacache_hook` or `TeaCacheBackend.enable`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx.marks import mark_value


@dataclass
class CacheContext:
    """What an extractor says of one call of a model.

    Attributes:
        modulated_input: floating point, [batch, ...]: the first block's input after norm and modulation; the indicator.
        hidden_states: floating point, [batch, ...]: the latents' tokens as they enter the blocks.
        encoder_hidden_states: [batch, ...]: the text's tokens, if the blocks return them too; else `None`.
        temb: timestep embedding.
        run_transformer_blocks: takes nothing, runs the blocks, returns `(hidden_states,)` or
            `(hidden_states, encoder_hidden_states)`, of the shapes that entered.
        postprocess: takes the blocks' `hidden_states` and returns what the model returns.
        extra_states: for the extractor's own use; it is not cached.
    """

    modulated_input: Tensor
    hidden_states: Tensor
    encoder_hidden_states: Tensor | None
    temb: Tensor
    run_transformer_blocks: Callable[[], tuple[Tensor, ...]]
    postprocess: Callable[[Tensor], Any]
    extra_states: dict[str, Any] | None = None

    def validate(self) -> None:
        """Checks types, tensors and signatures. It runs neither the blocks nor the postprocessing.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a tensor is empty, not floating point, or differs from the others in batch or device.
            RuntimeError: `run_transformer_blocks` cannot be called without arguments, or `postprocess` with one.
        """
        self._check_types()
        self._check_tensors()
        for name, arguments in (("run_transformer_blocks", ()), ("postprocess", (self.hidden_states,))):
            try:
                inspect.signature(getattr(self, name)).bind(*arguments)
            except TypeError as error:
                taken = "no argument" if not arguments else "one argument, the blocks' hidden_states"
                raise RuntimeError(f"CacheContext.{name} must take {taken}: {error}") from error

    def _check_types(self) -> None:
        for name in ("modulated_input", "hidden_states", "temb"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"CacheContext.{name} must be a tensor, got {type(getattr(self, name)).__name__}")
        if self.encoder_hidden_states is not None and not isinstance(self.encoder_hidden_states, Tensor):
            found = type(self.encoder_hidden_states).__name__
            raise TypeError(f"CacheContext.encoder_hidden_states must be a tensor or None, got {found}")
        for name in ("run_transformer_blocks", "postprocess"):
            if not callable(getattr(self, name)):
                raise TypeError(f"CacheContext.{name} must be callable, got {type(getattr(self, name)).__name__}")
        if self.extra_states is not None and not isinstance(self.extra_states, dict):
            raise TypeError(f"CacheContext.extra_states must be a dict or None, got {type(self.extra_states).__name__}")

    def _check_tensors(self) -> None:
        tokens = {"modulated_input": self.modulated_input, "hidden_states": self.hidden_states}
        if self.encoder_hidden_states is not None:
            tokens["encoder_hidden_states"] = self.encoder_hidden_states
        for name, tensor in {**tokens, "temb": self.temb}.items():
            if tensor.numel() == 0:
                raise ValueError(f"CacheContext.{name} is empty: its shape is {list(tensor.shape)}")
            if tensor.device != self.hidden_states.device:
                raise ValueError(
                    f"CacheContext.{name} is on {tensor.device}, hidden_states on {tokens['hidden_states'].device}"
                )
        for name, tensor in tokens.items():
            if not tensor.is_floating_point() or tensor.ndim < 2:
                raise ValueError(
                    f"CacheContext.{name} must be floating point, [batch, ...]; got {tensor.dtype}{list(tensor.shape)}"
                )
            if tensor.shape[0] != self.hidden_states.shape[0]:
                raise ValueError(
                    f"CacheContext.{name} has batch {tensor.shape[0]}, hidden_states has {self.hidden_states.shape[0]}"
                )


Extractor = Callable[..., CacheContext]

_extractors: dict[str, Extractor] = {}


def register_extractor(transformer_cls_name: str, extractor_fn: Extractor) -> None:
    """Registers the extractor of a model class; it replaces an earlier one.

    `apply_teacache_hook` and `TeaCacheBackend.enable` then ask it instead of the matcher; plain torch.compile does not.

    Args:
        transformer_cls_name: name of the model's class.
        extractor_fn: called as `extractor_fn(module, *args, **kwargs)` with the arguments of the model's forward;
            returns a `CacheContext`.

    Raises:
        TypeError: the name is not a string, or the extractor is not callable.
        ValueError: the name is empty.
    """
    if not isinstance(transformer_cls_name, str):
        raise TypeError(f"transformer_cls_name must be a string, got {transformer_cls_name!r}")
    if not transformer_cls_name:
        raise ValueError("transformer_cls_name must not be empty: pass type(model).__name__")
    if not callable(extractor_fn):
        raise TypeError(f"extractor_fn must be callable, got {extractor_fn!r}")
    _extractors[transformer_cls_name] = extractor_fn


def extractor_of(model: nn.Module) -> Extractor | None:
    """The extractor registered for the model's class."""
    return _extractors.get(type(model).__name__)


def has_extractor(class_name: str) -> bool:
    """Whether one is registered for models of that class."""
    return class_name in _extractors


def validated(extractor: Extractor, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Calls an extractor once, eagerly, and checks what it returns; the blocks do not run.

    Raises:
        TypeError: it returns no `CacheContext`, or one with fields of wrong types.
        ValueError, RuntimeError: as `CacheContext.validate`.
    """
    with torch.no_grad():
        context = extractor(model, *args, **kwargs)
    if not isinstance(context, CacheContext):
        name = getattr(extractor, "__name__", repr(extractor))
        raise TypeError(f"{name} must return a CacheContext, got {type(context).__name__}")
    context.validate()


def extracted_forward(extractor: Extractor) -> Callable[..., Any]:
    """A forward that does what the extractor says, with marks in it that the rewriting reads."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = extractor(self, *args, **kwargs)
        mark_value(context.modulated_input, "modulated_input")
        mark_value(context.hidden_states, "hidden_states")
        if context.encoder_hidden_states is not None:
            mark_value(context.encoder_hidden_states, "encoder_hidden_states")
        results = context.run_transformer_blocks()
        mark_value(results[0], "hidden_states_out")
        if len(results) > 1:
            mark_value(results[1], "encoder_hidden_states_out")
        return context.postprocess(results[0])

    return forward
