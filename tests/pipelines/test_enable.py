"""`backend.enable(pipeline)` on diffusers' own pipelines, and the way back."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import pytest
import torch

from teacache_fx.hook import hook_of
from teacache_fx.policy import StepReason
from tests.pipelines import PIPELINES, build
from tests.pipelines.running import (
    HUGE,
    TINY,
    branch_names,
    enabled,
    generate,
    memories,
    reasons,
    tea_backend,
    timeline,
    uncached,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

CACHED = [name for name, spec in PIPELINES.items() if spec.declined is None]
QUICK = [name for name in CACHED if name not in ("ltx2", "qwenimage_edit", "qwenimage", "wan2.1", "flux_img2img")]


@pytest.mark.parametrize("name", CACHED)
def test_tiny_threshold_changes_nothing_and_branches_have_their_names(name: str) -> None:
    pipe, arguments, backend = enabled(name, TINY)
    assert torch.equal(generate(pipe, arguments).pictures, uncached(name).pictures)
    assert sorted(name for name, _ in timeline(backend)) == branch_names(name)
    assert StepReason.SKIPPED not in reasons(backend)
    assert not any(memories(backend)), "the end of the pipeline's call frees the memory"


@pytest.mark.parametrize("name", QUICK)
def test_huge_threshold_computes_first_steps_only(name: str) -> None:
    pipe, arguments, backend = enabled(name, HUGE)
    run = generate(pipe, arguments)
    assert torch.equal(run.first_output, uncached(name).first_output)
    assert not torch.equal(run.pictures, uncached(name).pictures)
    length = arguments["num_inference_steps"] // len(PIPELINES[name].transformers)
    assert sorted(timeline(backend)) == [(branch, "x" + "." * (length - 1)) for branch in branch_names(name)]
    assert not any(memories(backend))


def _is_untouched(transformer: torch.nn.Module) -> bool:
    return hook_of(transformer) is None and transformer.forward == type(transformer).forward.__get__(transformer)


@pytest.mark.parametrize("name", ["flux", "wan2.2"])
def test_disable_restores(name: str) -> None:
    pipe, arguments = build(name)
    transformers = [getattr(pipe, component) for component in PIPELINES[name].transformers]
    signatures = [inspect.signature(transformer.forward) for transformer in transformers]
    backend = tea_backend(HUGE)
    assert not backend.is_enabled()
    for _ in range(2):
        backend.enable(pipe)
        assert backend.is_enabled()
        assert all(hook_of(transformer) is not None for transformer in transformers)
        assert [inspect.signature(transformer.forward) for transformer in transformers] == signatures
        generate(pipe, arguments)
        backend.disable(pipe)
        assert not backend.is_enabled()
        assert all(map(_is_untouched, transformers))
        num_steps = backend.stats().num_steps
        assert torch.equal(generate(pipe, arguments).pictures, uncached(name).pictures)
        assert backend.stats().num_steps == num_steps
    backend.disable(pipe)  # once more is no error


def test_enabling_twice_is_an_error() -> None:
    pipe, _, backend = enabled("flux", TINY)
    for other in (backend, tea_backend(HUGE)):
        with pytest.raises(ValueError, match="TeaCache is applied to this FluxTransformer2DModel already"):
            other.enable(pipe)
    tea_backend(HUGE).disable(pipe)  # not the one that has enabled it
    assert backend.is_enabled()
    assert hook_of(pipe.transformer) is not None


@pytest.mark.parametrize(
    "in_place",
    [True, False],
)
def test_a_compiled_transformer_is_an_error(in_place: bool) -> None:
    pipe, _ = build("flux")
    if in_place:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    backend = tea_backend(HUGE)
    with pytest.raises(ValueError, match="module is a compiled FluxTransformer2DModel"):
        backend.enable(pipe)
    assert not backend.is_enabled()


def test_enable_applies_to_all_or_to_none() -> None:
    pipe, _ = build("wan2.2")
    pipe.transformer_2.compile(backend="eager")
    backend = tea_backend(HUGE)
    with pytest.raises(ValueError, match="compiled"):
        backend.enable(pipe)
    assert _is_untouched(pipe.transformer)
    assert not backend.is_enabled()


def test_a_pipeline_that_is_gone_is_not_enabled() -> None:
    pipe, _, backend = enabled("flux", HUGE)
    assert backend.is_enabled()
    del pipe
    gc.collect()
    assert not backend.is_enabled()


@pytest.mark.filterwarnings("ignore:num_final_steps=2 has no effect")  # it has: refresh says the length
@pytest.mark.parametrize("name", ["sd3", "flux_img2img"])
def test_refresh_with_a_length_forces_the_last_steps(name: str) -> None:
    pipe, arguments, backend = enabled(name, HUGE, num_final_steps=2)
    for num_steps in (8, 4):
        length = num_steps * 3 // 4 if name == "flux_img2img" else num_steps  # strength 0.75
        backend.refresh(pipe, num_inference_steps=length, verbose=False)
        generate(pipe, arguments, num_inference_steps=num_steps)
        texts = [text for _, text in timeline(backend)][-len(PIPELINES[name].branches) :]
        expected = "x" + "." * (length - 3) + "xx"
        assert all(text.endswith(expected) for text in texts)


def test_refresh_in_the_middle_begins_anew() -> None:
    pipe, arguments, backend = enabled("flux", HUGE)

    def refresh(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            backend.refresh(pipe, verbose=False)
        return tensors

    generate(pipe, arguments, callback_on_step_end=refresh)
    assert timeline(backend) == [("cond", "x.x."), ("uncond", "x.x.")]


def test_one_backend_serves_two_pipelines() -> None:
    backend = tea_backend(TINY)
    pipes = {name: build(name) for name in ("flux", "sd3")}
    for pipe, _ in pipes.values():
        backend.enable(pipe)
    for name, (pipe, arguments) in pipes.items():
        assert torch.equal(generate(pipe, arguments).pictures, uncached(name).pictures)
    backend.disable(pipes["flux"][0])
    assert backend.is_enabled()
    assert [context.model[:4] for context in backend.stats().contexts] == ["Flux", "Flux", "SD3T"]


@pytest.mark.parametrize("rel_l1_thresh", [TINY, HUGE])
def test_tables_that_are_built_at_the_first_call_are_no_hindrance(rel_l1_thresh: float) -> None:
    """Compiled by itself ZImage is declined, since dynamo cannot capture how it builds its rotary tables."""
    pipe, arguments = build("z_image")
    expected = generate(pipe, arguments)
    pipe, arguments = build("z_image")
    backend = tea_backend(rel_l1_thresh)
    backend.enable(pipe)
    run = generate(pipe, arguments)
    assert torch.equal(run.pictures, expected.pictures) == (rel_l1_thresh == TINY)
    assert torch.equal(run.first_output, expected.first_output)
    assert (backend.stats().num_skipped > 0) == (rel_l1_thresh == HUGE)
