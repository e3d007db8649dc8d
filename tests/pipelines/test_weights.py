"""LoRA adapters and attention processors that come, change and go between generations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from teacache_fx import TeaCacheBackend
from tests.pipelines import build
from tests.pipelines.running import HUGE, TINY, WAYS_IN, Run, generate, tea_backend, timeline
from tests.pipelines.text import embeddings

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COMBINATIONS = list(zip(WAYS_IN, (TINY, HUGE), strict=True))
WayIn = Callable[[Any, TeaCacheBackend], None]
Change = Callable[[Any], object]


@pytest.fixture(autouse=True)
def _many_recompilations() -> Iterator[None]:
    """Each change of the adapters recompiles, and behind dynamo's limit the model would run uncompiled."""
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


def _adapter_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            yield name, parameter, 0.5 * torch.randn(parameter.shape, generator=generator)


def _fill(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for _, parameter, value in _adapter_weights(model, seed):
            parameter.copy_(value)


def _hotswap(model: Any, seed: int) -> None:
    """As `load_lora_weights(..., hotswap=True)` does."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    weights = {name: value for name, _, value in _adapter_weights(model, seed)}
    hotswap_adapter_from_state_dict(model, weights, "style", model.peft_config["style"])


def _add(model: Any) -> None:
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS), adapter_name="style")
    _fill(model, 1)
    model.requires_grad_(False).eval()


CHANGES: tuple[Change, ...] = (
    lambda _: None,
    _add,
    lambda model: model.set_adapters("style", 0.3),
    lambda model: _fill(model, 2),
    lambda model: _hotswap(model, 3),
    lambda model: model.fuse_lora(),
    lambda model: model.unfuse_lora(),
    lambda model: model.disable_adapters(),
    lambda model: model.enable_adapters(),
    lambda model: model.delete_adapters("style"),
)


def _pipeline(name: str, switch_on: WayIn | None, rel_l1_thresh: float = TINY) -> tuple[Any, dict[str, Any], Any]:
    """The prompt's embeddings are the same objects in each generation."""
    pipe, arguments = build(name)
    kept = {key: value for key, value in arguments.items() if "prompt" not in key}
    arguments = kept | embeddings(0, 32, {"flux": 32, "sd3": 64}[name])
    backend = tea_backend(rel_l1_thresh)
    if switch_on is not None:
        switch_on(pipe, backend)
    return pipe, arguments, backend


def _runs(pipe: Any, arguments: dict[str, Any], changes: tuple[Change, ...]) -> Iterator[Run]:
    for change in changes:
        change(pipe.transformer)
        yield generate(pipe, arguments)


def _check(name: str, changes: tuple[Change, ...], switch_on: WayIn, rel_l1_thresh: float) -> None:
    uncached = list(_runs(*_pipeline(name, None)[:2], changes))
    pipe, arguments, backend = _pipeline(name, switch_on, rel_l1_thresh)
    num_steps = 0
    for i, (ours, expected) in enumerate(zip(_runs(pipe, arguments, changes), uncached, strict=True)):
        assert torch.equal(ours.first_output, expected.first_output), f"another first step after change {i}"
        assert torch.equal(ours.pictures, expected.pictures) == (rel_l1_thresh == TINY), f"change {i}"
        assert backend.stats().num_steps > num_steps, f"runs uncompiled after change {i}"
        num_steps = backend.stats().num_steps
    skipped = "".join(text for _, text in timeline(backend)).count(".")
    assert (skipped > num_steps // 2) == (rel_l1_thresh == HUGE)


@pytest.mark.parametrize(("switch_on", "rel_l1_thresh"), COMBINATIONS)
def test_changes_of_an_adapter_between_generations(switch_on: WayIn, rel_l1_thresh: float) -> None:
    _check("flux", CHANGES, switch_on, rel_l1_thresh)


class _Louder(FluxAttnProcessor):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        return tuple(2 * value for value in output) if isinstance(output, tuple) else 2 * output


PROCESSORS: tuple[Change, ...] = (
    lambda _: None,
    lambda model: model.set_attn_processor(_Louder()),
    lambda model: model.set_attn_processor(FluxAttnProcessor()),
)
FUSED: tuple[Change, ...] = (
    lambda _: None,
    lambda model: model.fuse_qkv_projections(),
    lambda model: model.unfuse_qkv_projections(),
)


@pytest.mark.parametrize(
    ("name", "changes", "switch_on", "rel_l1_thresh"),
    [("flux", PROCESSORS, *COMBINATIONS[1]), ("sd3", FUSED, *COMBINATIONS[0])],
    ids=["processors", "fused"],
)
def test_changes_of_the_attention_between_generations(
    name: str, changes: tuple[Change, ...], switch_on: WayIn, rel_l1_thresh: float
) -> None:
    _check(name, changes, switch_on, rel_l1_thresh)


class _BrokenOffError(Exception):
    pass


def _break_off(_: Any, step: int, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        raise _BrokenOffError
    return arguments


SWAPS: dict[str, Change] = {
    "in place": lambda model: _fill(model, 2),
    "hot-swapped": lambda model: _hotswap(model, 3),
    "scaled": lambda model: model.set_adapters("style", 0.1),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_other_weights_after_a_generation_that_was_broken_off(swap: str) -> None:
    """Nothing has reset the cache, and seed and prompt are the same: the timestep turns back."""
    changes: tuple[Change, ...] = (_add, SWAPS[swap])
    *_, expected = _runs(*_pipeline("flux", None)[:2], changes)
    pipe, arguments, _ = _pipeline("flux", WAYS_IN[0], HUGE)
    _add(pipe.transformer)
    with pytest.raises(_BrokenOffError):
        generate(pipe, arguments, callback_on_step_end=_break_off)
    SWAPS[swap](pipe.transformer)
    run = generate(pipe, arguments)
    assert torch.equal(run.first_output, expected.first_output)
