"""Extractors: a model that is really declined runs with TeaCache once it is told which tensors are which."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import CacheContext, DeclineReason, TeaCacheBackend, apply_teacache_hook, explain, extractors
from teacache_fx import register_extractor as register
from tests import toys


class MlpFirstBlock(toys.Block):
    """Does in another order what a block does."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        result: Tensor = super().forward(hidden_states + self.mlp(self.norm2(hidden_states)), text, temb)
        return result


class TwoAttributesDiT(toys.ToyDiT):
    """Its two blocks are attributes of their own and unlike: neither a list nor a repetition tells that they belong."""

    def __init__(self) -> None:
        super().__init__(num_blocks=0)
        self.first, self.second = toys.Block(), MlpFirstBlock()

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(hidden_states, text, temb), text, temb)
        return result


def extract(module: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> CacheContext:
    """What a user would write for it."""
    temb = module.embed_time(timestep)
    tokens, text = module.x_embedder(hidden_states), module.context_embedder(encoder_hidden_states)
    shift, scale = module.first.modulation(nn.functional.silu(temb)).unsqueeze(1).chunk(6, dim=-1)[:2]

    def postprocess(tokens: Tensor) -> Any:
        return module.proj_out(module.norm_out(tokens))

    return CacheContext(
        modulated_input=module.first.norm1(tokens) * (1 + scale) + shift,
        hidden_states=tokens,
        encoder_hidden_states=None,
        temb=temb,
        run_transformer_blocks=lambda: (module.run_blocks(tokens, text, temb),),
        postprocess=postprocess,
    )


@pytest.fixture(autouse=True)
def _no_extractors_left() -> Iterator[None]:
    yield
    extractors._extractors.clear()


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_declined_model_is_cached(inner: str) -> None:
    model, inputs = toys.make(TwoAttributesDiT), toys.inputs()
    declined = explain(model, **inputs).declined
    assert declined is not None
    assert declined.reason is DeclineReason.LITTLE_TO_SKIP, "what repeats itself are parts of the blocks"

    register("TwoAttributesDiT", extract)
    steps = [{**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.01 * i)} for i in range(4)]
    with torch.no_grad():
        expected = [model(**step) for step in steps]
        entered = [model.x_embedder(step["hidden_states"]) for step in steps]  # type: ignore[operator]
        text, temb = model.context_embedder(inputs["encoder_hidden_states"]), model.embed_time(inputs["timestep"])  # type: ignore[operator]
        residual = model.run_blocks(entered[0], text, temb) - entered[0]  # type: ignore[operator]
        backend = TeaCacheBackend(rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner=inner, on_decline="raise")
        apply_teacache_hook(model, backend)
        outputs = [model(**step) for step in steps]
        reused = [model.proj_out(model.norm_out(tokens + residual)) for tokens in entered]  # type: ignore[operator]
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(outputs[1:], reused[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert backend.stats().num_skipped == 3
    assert "as the extractor says" in str(backend.reports[0])


def test_two_streams() -> None:
    """Both streams that the blocks give back are cached, if the postprocessing needs both."""
    kept: list[Tensor] = []

    def both(module: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> CacheContext:
        context = extract(module, hidden_states, timestep, encoder_hidden_states)
        text = module.context_embedder(encoder_hidden_states)
        doubled: list[Tensor] = []

        def run_blocks() -> tuple[Tensor, Tensor]:
            (tokens,) = context.run_transformer_blocks()
            doubled.append(text * tokens.mean(1, keepdim=True))
            return tokens, doubled[0]

        return dataclasses.replace(
            context,
            encoder_hidden_states=text,
            run_transformer_blocks=run_blocks,
            postprocess=lambda tokens: context.postprocess(tokens + doubled[0].mean(1, keepdim=True)),
        )

    register("TwoAttributesDiT", both)
    model, inputs = toys.make(TwoAttributesDiT), toys.inputs()
    backend = TeaCacheBackend(rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    apply_teacache_hook(model, backend)
    with torch.no_grad():
        kept += [model(**inputs), model(**inputs)]
        context = both(model, **inputs)
        expected = context.postprocess(context.run_transformer_blocks()[0])
    torch.testing.assert_close(kept[0], expected)
    torch.testing.assert_close(kept[1], expected, rtol=1e-5, atol=1e-6)
    plan = backend.reports[0].plan
    assert plan is not None
    assert len(plan.stack.live_outputs) == 2
    assert backend.stats().num_skipped == 1


def _context(**changes: Any) -> CacheContext:
    tokens = torch.zeros(2, 8, 4)
    fields: dict[str, Any] = {
        "modulated_input": tokens, "hidden_states": tokens, "encoder_hidden_states": None, "temb": torch.zeros(2, 4),
        "run_transformer_blocks": lambda: (tokens,), "postprocess": lambda tokens: tokens, **changes,
    }  # fmt: skip
    return CacheContext(**fields)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"modulated_input": None}, TypeError, "modulated_input must be a tensor, got NoneType"),
        ({"hidden_states": [1.0]}, TypeError, "hidden_states must be a tensor, got list"),
        ({"temb": 3}, TypeError, "temb must be a tensor, got int"),
        ({"encoder_hidden_states": "text"}, TypeError, "encoder_hidden_states must be a tensor or None, got str"),
        ({"run_transformer_blocks": None}, TypeError, "run_transformer_blocks must be callable, got NoneType"),
        ({"postprocess": 1}, TypeError, "postprocess must be callable, got int"),
        ({"extra_states": []}, TypeError, "extra_states must be a dict or None, got list"),
        ({"modulated_input": torch.zeros(0, 8, 4)}, ValueError, r"modulated_input is empty: its shape is \[0, 8, 4\]"),
        ({"modulated_input": torch.zeros(3, 8, 4)}, ValueError, "modulated_input has batch 3, hidden_states has 2"),
        ({"hidden_states": torch.zeros(2, 8, 4).long()}, ValueError, "hidden_states must be floating point"),
        ({"modulated_input": torch.zeros(2)}, ValueError, r"must be floating point, \[batch, ...\]"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 4)}, ValueError, "encoder_hidden_states has batch 1"),
        ({"temb": torch.zeros(2, 4, device="meta")}, ValueError, "temb is on meta, hidden_states on cpu"),
        ({"run_transformer_blocks": lambda x: (x,)}, RuntimeError, "run_transformer_blocks must take no argument"),
        ({"postprocess": lambda: None}, RuntimeError, "postprocess must take one argument, the blocks' hidden_states"),
    ],
)  # fmt: skip
def test_validate(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    _context().validate()
    with pytest.raises(error, match=message):
        _context(**changes).validate()


def test_an_extractor_that_is_wrong_says_so_at_the_first_call() -> None:
    model, inputs = toys.make(TwoAttributesDiT), toys.inputs()
    cases: tuple[tuple[Any, type[Exception], str], ...] = (
        (lambda *_, **__: None, TypeError, "must return a CacheContext, got NoneType"),
        (lambda *_, **__: _context(temb=None), TypeError, "temb must be a tensor"),
    )
    for extractor, error, message in cases:
        register("TwoAttributesDiT", extractor)
        hooked = toys.make(TwoAttributesDiT)
        apply_teacache_hook(hooked)
        with torch.no_grad(), pytest.raises(error, match=message):
            hooked(**inputs)
    assert model


def test_bad_registrations() -> None:
    with pytest.raises(TypeError, match="transformer_cls_name must be a string, got <class"):
        register(TwoAttributesDiT, extract)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transformer_cls_name must not be empty"):
        register("", extract)
    with pytest.raises(TypeError, match="extractor_fn must be callable, got None"):
        register("TwoAttributesDiT", None)  # type: ignore[arg-type]
