"""Puts TeaCache into a model before it is exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from teacache_fx.checks import check_count
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import original
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.rewritten_model import RewrittenModel, StateForm, with_signature_of


def rewrite(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: TeaCacheConfig | None = None,
    state: StateForm = "buffers",
    num_contexts: int = 1,
    dynamic_shapes: Any = None,
) -> RewrittenModel:
    """A module that does what the model does, with TeaCache in it, and that torch.export takes.

        program = torch.export.export(teacache_fx.rewrite(transformer), (), inputs)

    It takes and returns what the model does, and shares its parameters. It may as well be called, or, once it is
    captured, compiled. The model is captured as soon as its inputs are known: here, or when the module is exported or
    called for the first time; call `.eval()` before. The model itself stays as it is; it runs once, eagerly and without
    gradients.

    With `state="buffers"` the state lives in buffers, `module.teacache`, which an exported program keeps from call to
    call; `module.teacache.reset()` begins a new generation, and so does a call with a true `teacache_reset`, a bool
    tensor of shape [], which is an input of the program if it was exported with it. With `state="io"` each call takes
    the state as `teacache_state`, a dict of tensors that `module.initial_state()` makes, and returns
    `(output, new state)`: for ONNX, which drops writes to buffers, and for servers that keep the states themselves.

    Args:
        model: the transformer.
        args: positional arguments of one denoising step, if they are known already.
        kwargs: its keyword arguments, likewise.
        config: the settings; `None` for the defaults.
        state: "buffers" or "io".
        num_contexts: how many guidance branches ("cond", "uncond") have a state of their own in the buffers; with more
            than one, each call says by `teacache_context`, an int64 tensor of shape [], which it belongs to.
        dynamic_shapes: which sizes vary, as `torch.export.export` takes them; only where `args` or `kwargs` are given.

    Raises:
        TypeError: `model` is no module, or `config` no `TeaCacheConfig`.
        ValueError: the model is compiled, or an argument is none of its values.
        Declined: the model cannot be exported or rewritten, or is rewritten already.
    """
    _check_model(model)
    if isinstance(args, (str, Tensor)) or not isinstance(args, Sequence):
        raise TypeError(f"args must be a tuple of positional arguments, got {type(args).__name__}")
    if config is not None and not isinstance(config, TeaCacheConfig):
        raise TypeError(f"config must be a TeaCacheConfig, got {type(config).__name__}")
    if state not in ("buffers", "io"):
        raise ValueError(f"state must be 'buffers' or 'io', got {state!r}")
    check_count("num_contexts", num_contexts, 1)
    if state == "io" and num_contexts > 1:
        raise ValueError(
            f"num_contexts={num_contexts} is for state='buffers'; with 'io' pass each branch its own state"
        )
    if dynamic_shapes is not None and not (args or kwargs):
        raise ValueError(
            "dynamic_shapes needs the arguments of one step: rewrite(model, args, kwargs, dynamic_shapes=...)"
        )
    rewritten = with_signature_of(model)(model, config or TeaCacheConfig(), state, num_contexts)
    if args or kwargs:
        rewritten.capture(args, kwargs or {}, dynamic_shapes)
    return rewritten


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, RewrittenModel):
        raise Declined(DeclineReason.ALREADY_REWRITTEN, f"model is a {type(model).__name__}")
    if original(model) is not model or model._compiled_call_impl is not None:
        raise ValueError(
            f"model is a compiled {type(original(model)).__name__}: rewrite the model as it was, and compile the result"
        )
    registry: Any = getattr(model, "_diffusers_hook", None)
    if registry is not None and registry.hooks:
        raise ValueError(f"model is a {type(model).__name__} with diffusers hooks: take them off before")
