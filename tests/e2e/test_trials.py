"""Odd things that users do with a model that runs with TeaCache."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from teacache_fx import TeaCacheBackend, apply_teacache_hook, cache_context, register_extractor
from tests import toys
from tests.faults.row import CachedDiT
from tests.zoo import build, trajectory


def _backend(**options: Any) -> TeaCacheBackend:
    return TeaCacheBackend(
        **{"rel_l1_thresh": 1e6, "coefficients": [1.0, 0.0], "inner": "eager", "on_decline": "raise", **options}
    )


def test_a_copy_of_a_compiled_model_is_a_model_of_its_own() -> None:
    model: Any = toys.make(CachedDiT)
    backend, inputs = _backend(), toys.inputs()
    model.compile(backend=backend)
    with torch.no_grad():
        model(**inputs)
        twin = copy.deepcopy(model)
        for parameter in twin.get_submodule("blocks").parameters():
            parameter.mul_(1.5)
        expected = toys.make(CachedDiT)
        expected.load_state_dict(twin.state_dict())
        twin.compile(backend=backend)
        assert torch.equal(twin(**inputs), expected(**inputs))
        model(**inputs)
    assert sorted(len(context.steps) for context in backend.stats().contexts) == [1, 2]


def test_a_copy_of_a_model_with_the_hook_says_what_to_do() -> None:
    """Diffusers binds a hooked forward to the model, so the copy's would run the original's weights."""
    model, inputs = toys.make(), toys.inputs()
    apply_teacache_hook(model, _backend())
    with torch.no_grad():
        model(**inputs)
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"was copied while TeaCache was applied.*take TeaCache off"):
            twin(**inputs)


def test_a_model_that_was_compiled_in_place_can_be_pickled() -> None:
    model: Any = toys.make(CachedDiT)
    inputs = toys.inputs()
    model.compile(backend=_backend())
    with torch.no_grad():
        expected = model(**inputs)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(**inputs), expected)


def test_a_context_may_be_entered_again_and_again() -> None:
    model, inputs, backend = toys.make(), toys.inputs(), _backend()
    compiled, cond = torch.compile(model, backend=backend), cache_context(model, "cond")
    with torch.no_grad():
        for _ in range(3):
            with cond:
                compiled(**inputs)
    assert [(context.name, len(context.steps)) for context in backend.stats().contexts] == [("cond", 3)]


def test_compiled_once_more_outside_it_still_caches() -> None:
    model, inputs = build("flux")
    steps, backend = trajectory("flux", inputs, 3), _backend()
    backend.enable(SimpleNamespace(transformer=model))
    model.compile(backend="eager")
    with torch.no_grad():
        for step in steps:
            model(**step)
    assert backend.stats().num_skipped == 2


def test_control_images_are_told_apart() -> None:
    model, inputs = build("flux")
    backend = _backend()
    compiled = torch.compile(model, backend=backend)
    generator = torch.Generator().manual_seed(0)
    controls = [[torch.randn(1, 16, 32, generator=generator)] for _ in range(2)]
    with torch.no_grad():
        for _ in range(3):
            for control in controls:
                step = {**inputs, "controlnet_block_samples": [control[0] * 1.01]}
                assert torch.equal(compiled(**step)[0], model(**step)[0])


@pytest.mark.parametrize("batch", [4, 32])
def test_one_slot_of_a_batch_given_to_another_request(batch: int) -> None:
    model, inputs, backend = toys.make(), toys.inputs(batch=batch), _backend()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for step in range(3):
            compiled(**{**inputs, "hidden_states": inputs["hidden_states"] * (1 - 0.01 * step)})
        latents = inputs["hidden_states"] * 0.96
        latents[2] = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(7))
        changed = {**inputs, "hidden_states": latents}
        assert torch.equal(compiled(**changed), model(**changed))


def test_weights_changed_in_place_after_a_single_step() -> None:
    model, inputs, backend = toys.make(), toys.inputs(), _backend()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(**inputs)
        model.get_submodule("blocks.1.to_out").weight.mul_(2.0)  # type: ignore[operator]
        assert torch.equal(compiled(**inputs), model(**inputs))
        compiled(**inputs)
    assert backend.stats().num_skipped == 1


def test_an_extractor_is_called_with_positions_too() -> None:
    from teacache_fx import extractors
    from tests.e2e.test_extractors import TwoAttributesDiT, extract

    model, inputs, backend = toys.make(TwoAttributesDiT), toys.inputs(), _backend()
    register_extractor("TwoAttributesDiT", extract)
    try:
        apply_teacache_hook(model, backend)
        with torch.no_grad():
            results: list[Tensor] = [model(*inputs.values()) for _ in range(2)]
    finally:
        extractors._extractors.clear()
    assert list(inputs) == ["hidden_states", "timestep", "encoder_hidden_states"]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert backend.stats().num_skipped == 1
