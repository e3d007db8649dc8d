"""The inner compilers that a rewritten graph is handed to, and the options that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options

from teacache_fx.pin_operands import PinOperands

INNER_COMPILERS = ("inductor", "aot_eager", "eager")

# A cond makes FxGraphCache and AOTAutogradCache give up unless it is vouched for. Both caches hash the branches, so a
# changed branch misses (tried on torch 2.13); the value is part of the key: raise it when the form of the cond changes.
_CACHEABLE = {"torch.ops.higher_order.cond": "teacache-fx-1"}


def check_inner(inner: object) -> str:
    """Returns the name of an inner compiler.

    Raises:
        ValueError: it is none of `INNER_COMPILERS`.
    """
    if inner not in INNER_COMPILERS:
        raise ValueError(f"inner must be one of {', '.join(INNER_COMPILERS)}, got {inner!r}")
    return str(inner)


def inductor_options(inner: str, mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Settings for inductor from `mode=` and `options=` of torch.compile.

    Raises:
        ValueError: there are some, and the inner compiler is not inductor; or the mode is unknown.
    """
    if inner != "inductor" and (mode or options):
        given = f"mode={mode!r}" if mode else f"options {sorted(options)}"
        raise ValueError(f"{given} is for inductor, but inner={inner!r}")
    modes = list_mode_options()
    if mode and mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return {**(modes[mode] if mode else {}), **options}


def is_inductor_option(name: str) -> bool:
    """Whether inductor has a setting of that name."""
    return name.replace("-", "_") in list_options()


def compile_with(
    inner: str, gm: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """Compiles a graph.

    Args:
        inner: one of `INNER_COMPILERS`.
        gm: the graph.
        example_inputs: tensors, fake tensors and SymInts, one per placeholder.
        options: inductor's settings.
    """
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    vouched = {**inductor_config.unsafe_marked_cacheable_functions, **_CACHEABLE}
    user_pass = options.get("post_grad_custom_post_pass", inductor_config.post_grad_custom_post_pass)
    options = {**options, "post_grad_custom_post_pass": PinOperands(user_pass)}
    with inductor_config.patch(unsafe_marked_cacheable_functions=vouched):
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=options)  # type: ignore[assignment]
    return compiled
