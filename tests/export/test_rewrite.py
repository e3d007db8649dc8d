"""What `rewrite(model)` returns behaves as the model does, eagerly and exported, and remembers in both state forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from teacache_fx import TeaCacheConfig, rewrite
from tests import toys
from tests.both_branches import compare
from tests.zoo import build

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch

CONFIG = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0))
_BATCH = Dim("batch", min=1, max=8)
SIZES = {
    "hidden_states": {0: _BATCH, 1: Dim("tokens", max=64)},
    "timestep": {0: _BATCH},
    "encoder_hidden_states": {0: _BATCH},
}


def _moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "hidden_states": inputs["hidden_states"] * 1.01}


def _check(call: Callable[..., Any], batch: int = 2, tokens: int = 8) -> None:
    """One computed step, the same by reuse, and one that follows other latents."""
    inputs = toys.inputs(batch, tokens)
    branches = compare(toys.make(), call, inputs, _moved(inputs))
    assert branches.computed_error <= 1e-6
    assert branches.reuse_error <= 1e-6
    with torch.no_grad():
        fresh = toys.make()(**_moved(inputs))
    assert branches.change > 1e-4
    assert not torch.allclose(call(**_moved(inputs)), fresh, rtol=0, atol=1e-5), "a reused step is no computed one"


def test_it_runs_and_shares_the_weights() -> None:
    model = toys.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewritten = rewrite(model, config=CONFIG)
    _check(rewritten)
    own = dict(rewritten.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert set(own) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model).forward is toys.ToyDiT.forward
    assert rewritten.plan is not None


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict: bool, is_known: bool) -> None:
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs if is_known else None, config=CONFIG)
    program = torch.export.export(rewritten, (), inputs, strict=strict)
    _check(program.module())
    _check(program.run_decompositions().module())
    assert set(program.state_dict) - set(toys.make().state_dict()) == {
        f"teacache.{name}" for name, _ in rewritten.teacache.named_buffers()
    }


def test_positional_arguments_and_compile() -> None:
    model, inputs = toys.make(), toys.inputs()
    rewritten = rewrite(model, tuple(inputs.values()), config=CONFIG)
    with torch.no_grad():
        assert torch.equal(rewritten(*inputs.values()), model(**inputs))
        assert torch.equal(
            rewritten(*list(inputs.values())[:2], encoder_hidden_states=inputs["encoder_hidden_states"]),
            model(**inputs),
        )
    _check(torch.compile(rewrite(toys.make(), (), inputs, config=CONFIG), backend="aot_eager", fullgraph=True))


def test_output_types_are_the_models() -> None:
    model, inputs = build("pixart")
    inputs = {name: value for name, value in inputs.items() if name != "return_dict"}
    with torch.no_grad():
        expected = model(**inputs)
        found = rewrite(model, config=CONFIG)(**inputs)
        assert type(found) is type(expected)
        assert torch.equal(found.sample, expected.sample)
        plain = rewrite(model, (), {**inputs, "return_dict": False}, config=CONFIG)
        (sample,) = plain(**inputs, return_dict=False)
        assert torch.equal(sample, expected.sample)
        with pytest.raises(ValueError, match="return_dict=True, but False was built in"):
            plain(**inputs)


@pytest.mark.parametrize("strict", [False, True])
def test_state_in_and_out(strict: bool) -> None:
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs, config=CONFIG, state="io")
    program = torch.export.export(rewritten, (), {**inputs, "teacache_state": rewritten.initial_state()}, strict=strict)
    for call in (rewritten, program.module()):
        state = rewritten.initial_state()

        def step(call: Callable[..., Any] = call, **inputs: Tensor) -> Tensor:
            nonlocal state
            output, state = call(**inputs, teacache_state=state)
            assert isinstance(output, Tensor)
            return output

        _check(step)
        assert int(state["consecutive_skips"]) == 3
    assert not any("teacache" in name for name, _ in rewritten.named_buffers())


def test_sizes_that_vary_in_buffers() -> None:
    """A step of other sizes is a first step, whatever the buffers hold."""
    inputs = toys.inputs()
    known = rewrite(toys.make(), (), inputs, config=CONFIG, dynamic_shapes=SIZES)
    later = torch.export.export(rewrite(toys.make(), config=CONFIG), (), inputs, dynamic_shapes=SIZES)
    for call in (known, torch.export.export(known, (), inputs, dynamic_shapes=SIZES).module(), later.module()):
        for batch, tokens in ((2, 8), (3, 12), (2, 8)):
            _check(call, batch, tokens)


def test_sizes_that_vary_in_states() -> None:
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs, config=CONFIG, state="io", dynamic_shapes=SIZES)
    arguments = {**inputs, "teacache_state": rewritten.initial_state(**inputs)}
    shapes = {**SIZES, "teacache_state": rewritten.state_dynamic_shapes()}
    module = torch.export.export(rewritten, (), arguments, dynamic_shapes=shapes).module()
    for batch, tokens in ((2, 8), (3, 12)):
        state = rewritten.initial_state(**toys.inputs(batch, tokens))

        def step(**inputs: Tensor) -> Tensor:
            nonlocal state
            output, state = module(**inputs, teacache_state=state)
            assert isinstance(output, Tensor)
            return output

        _check(step, batch, tokens)


@pytest.mark.parametrize("strict", [False, True])
def test_contexts_and_reset(strict: bool) -> None:
    branches = [toys.inputs(seed=0), toys.inputs(seed=1)]
    model = toys.make()
    rewritten = rewrite(model, config=CONFIG, num_contexts=2)
    own = {"teacache_context": torch.tensor(0), "teacache_reset": torch.tensor(False)}
    module: Any = torch.export.export(rewritten, (), {**branches[0], **own}, strict=strict).module()
    with torch.no_grad():
        for _ in range(2):
            for number, inputs in enumerate(branches):
                output = module(**inputs, teacache_context=torch.tensor(number), teacache_reset=torch.tensor(False))
                torch.testing.assert_close(output, model(**inputs))
        assert module.teacache.reason.tolist() == [0, 0]
        module(**branches[0], teacache_context=torch.tensor(0), teacache_reset=torch.tensor(True))
        assert module.teacache.reason.tolist() == [1, 0]


def test_onnx_takes_no_buffers() -> None:
    with pytest.raises(Exception, match="state='io'"):
        torch.onnx.export(rewrite(toys.make(), config=CONFIG), (), kwargs=toys.inputs(), dynamo=True, verbose=False)
