"""Wrappers of accelerate and hooks of diffusers around the same transformer, put on before TeaCache and after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading

from teacache_fx import TeaCacheWarning
from teacache_fx.hook import hook_of
from tests.pipelines import build
from tests.pipelines.running import (
    HUGE,
    TINY,
    by_compile,
    by_enable,
    generate,
    tea_backend,
    timeline,
    uncached,
)

accelerate = pytest.importorskip("accelerate.hooks")

pytestmark = pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip")

Wrap = Callable[[Any], object]


def _offload(pipe: Any) -> None:
    """Pipelines take these wrappers off and put them on again after each call."""
    pipe.enable_model_cpu_offload(device="cpu")


def _align(pipe: Any) -> None:
    hook = accelerate.AlignDevicesHook(execution_device="cpu", io_same_device=True, place_submodules=True)
    accelerate.add_hook_to_module(pipe.transformer, hook)


class _PassingHook(ModelHook):  # type: ignore[misc]
    pass


def _hook(pipe: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(_PassingHook(), "passing")


def _cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def _offload_groups(pipe: Any) -> None:
    apply_group_offloading(pipe.transformer, "cpu", "cpu", "block_level", num_blocks_per_group=1)


def _take_off(pipe: Any, wrap: Wrap) -> None:
    if wrap is _hook:
        pipe.transformer._diffusers_hook.remove_hook("passing")
    else:
        pipe.remove_all_hooks()
        accelerate.remove_hook_from_module(pipe.transformer)


WRAPS: tuple[Wrap, ...] = (_offload, _align, _hook)


@pytest.mark.parametrize(
    ("wrap", "is_first", "rel_l1_thresh"),
    [
        (_offload, True, TINY),
        (_offload, True, HUGE),
        (_offload, False, HUGE),
        (_align, True, HUGE),
        (_align, False, TINY),
        (_hook, False, HUGE),
        (_hook, True, TINY),
    ],
)
def test_enabled_beneath_a_wrapper(wrap: Wrap, is_first: bool, rel_l1_thresh: float) -> None:
    pipe, arguments = build("flux")
    backend = tea_backend(rel_l1_thresh)
    for put_on in (wrap, backend.enable) if is_first else (backend.enable, wrap):
        put_on(pipe)
    for seed in range(2):
        run = generate(pipe, arguments, seed)
        assert torch.equal(run.first_output, uncached("flux", seed).first_output)
        assert torch.equal(run.pictures, uncached("flux", seed).pictures) == (rel_l1_thresh == TINY)
    text = ("xxxx" if rel_l1_thresh == TINY else "x...") * 2
    assert timeline(backend) == [("cond", text), ("uncond", text)]


@pytest.mark.parametrize(
    ("wrap", "is_first", "disable_first"),
    # diffusers' registry itself cannot remove a hook beneath one that replaces the forward
    [order for order in itertools.product(WRAPS, (True, False), (True, False)) if order != (_hook, True, False)],
)
def test_taken_off_in_any_order(wrap: Wrap, is_first: bool, disable_first: bool) -> None:
    pipe, arguments = build("flux")
    backend = tea_backend(HUGE)
    for put_on in (wrap, backend.enable) if is_first else (backend.enable, wrap):
        put_on(pipe)
    steps: list[Callable[[], object]] = [lambda: backend.disable(pipe), lambda: _take_off(pipe, wrap)]
    for take_off in steps if disable_first else reversed(steps):
        take_off()
    transformer = pipe.transformer
    assert hook_of(transformer) is None
    assert transformer.forward == type(transformer).forward.__get__(transformer)
    assert torch.equal(generate(pipe, arguments).pictures, uncached("flux").pictures)
    assert backend.stats().num_steps == 0


def test_offloading_taken_off_leaves_the_cache() -> None:
    pipe, arguments = build("flux")
    backend = tea_backend(HUGE)
    _offload(pipe)
    backend.enable(pipe)
    for seed in range(2):
        generate(pipe, arguments, seed)
        pipe.remove_all_hooks()
    assert timeline(backend) == [("cond", "x...x..."), ("uncond", "x...x...")]


@pytest.mark.parametrize(("wrap", "is_first"), [(_offload, True), (_offload, False), (_hook, True)])
def test_compiled_beneath_a_wrapper_makes_the_same_picture(wrap: Wrap, is_first: bool) -> None:
    pipe, arguments = build("flux")
    backend = tea_backend(TINY)
    for put_on in (wrap, lambda pipe: by_compile(pipe, backend))[:: 1 if is_first else -1]:
        put_on(pipe)
    for seed in range(2):
        assert torch.equal(generate(pipe, arguments, seed).pictures, uncached("flux", seed).pictures)


@pytest.mark.parametrize("wrap", WRAPS)
def test_compiled_beneath_a_wrapper_the_cache_is_alive(wrap: Wrap) -> None:
    pipe, arguments = build("flux")
    backend = tea_backend(HUGE)
    wrap(pipe)
    by_compile(pipe, backend)
    for seed in range(2):
        run = generate(pipe, arguments, seed)
        assert torch.equal(run.first_output, uncached("flux", seed).first_output)
    assert {context.model for context in backend.stats().contexts} == {"FluxTransformer2DModel"}
    assert timeline(backend)[-1] == ("uncond", "x...x...")
    # The first call compiles before names are heard; where a wrapper hands on new tensors, it stays by itself.
    assert sum(text.count("x") for _, text in timeline(backend)) == 4 + (wrap is _offload)


@pytest.mark.parametrize(
    ("wrap", "is_first", "switch_on"),
    [(_cast, True, by_enable), (_offload_groups, False, by_enable), (_offload_groups, True, by_compile)],
)
def test_hooks_within_the_transformer_break_the_capture(wrap: Wrap, is_first: bool, switch_on: Any) -> None:
    """Declined with a warning, since each moves or casts weights in the middle; the picture is right."""
    pipe, arguments = build("flux")
    wrap(pipe)
    expected = generate(pipe, arguments, num_inference_steps=2).pictures
    pipe, arguments = build("flux")
    backend = tea_backend(HUGE, on_decline="warn")
    for put_on in (wrap, lambda pipe: switch_on(pipe, backend))[:: 1 if is_first else -1]:
        put_on(pipe)
    with pytest.warns(TeaCacheWarning, match="runs without TeaCache"):
        pictures = generate(pipe, arguments, num_inference_steps=2).pictures
    assert torch.equal(pictures, expected)
    assert backend.stats().num_steps == 0
    assert all(not report.is_rewritten for report in backend.reports)
