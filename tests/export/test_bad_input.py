"""What `rewrite` and what it returns say of models, arguments, states and sizes that they cannot work with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from teacache_fx import Declined, DeclineReason, TeaCacheBackend, TeaCacheConfig, apply_teacache_hook, rewrite
from teacache_fx.rewritten_model import RewrittenModel
from tests import toys
from tests.export.verifying import export, verify

CONFIG = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0))
SIZES = {
    "hidden_states": {1: Dim("tokens", min=4, max=64)},
    "timestep": None,
    "encoder_hidden_states": None,
}


def _hooked() -> nn.Module:
    model = toys.make()
    apply_teacache_hook(model, TeaCacheBackend(inner="eager"))
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rewrite(3), TypeError, "model must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: rewrite(torch.compile(toys.make())), ValueError, "model is a compiled ToyDiT"),  # type: ignore[arg-type]
        (lambda: rewrite(_hooked()), ValueError, "with diffusers hooks"),
        (lambda: rewrite(toys.make(), config=0.2), TypeError, "config must be a TeaCacheConfig, got float"),  # type: ignore[arg-type]
        (lambda: rewrite(toys.make(), state="none"), ValueError, "state must be 'buffers' or 'io', got 'none'"),  # type: ignore[arg-type]
        (lambda: rewrite(toys.make(), num_contexts=0), ValueError, "num_contexts"),
        (lambda: rewrite(toys.make(), state="io", num_contexts=2), ValueError, "pass each branch its own state"),
        (lambda: rewrite(toys.make(), dynamic_shapes=SIZES), ValueError, "needs the arguments of one step"),
        (lambda: rewrite(toys.make()).initial_state(), RuntimeError, "nothing is captured yet"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_declines() -> None:
    for model, reason in (
        (toys.make(toys.PooledDiT), DeclineReason.NO_LATENTS),
        (rewrite(toys.make(), (), toys.inputs(), config=CONFIG), DeclineReason.ALREADY_REWRITTEN),
    ):
        with pytest.raises(Declined) as caught:
            rewrite(model, (), toys.inputs(), config=CONFIG)
        assert caught.value.reason is reason


def _io() -> RewrittenModel:
    return rewrite(toys.make(), (), toys.inputs(), config=CONFIG, state="io")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda _: None, TypeError, "teacache_state must be a dict"),
        (lambda state: {**state, "previous_residual": torch.zeros(2, 9, 32)}, ValueError, "is it another model's"),
        (lambda state: {**state, "step_index": torch.zeros(())}, ValueError, "must be int64"),
        (lambda state: {"step_index": state["step_index"]}, ValueError, "has no previous_modulated_input"),
        (lambda state: {**state, "momentum": torch.zeros(3)}, ValueError, "has momentum, not kept by"),
    ],
)  # fmt: skip
def test_bad_states(change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    rewritten = _io()
    with torch.no_grad(), pytest.raises(error, match=message):
        rewritten(**toys.inputs(), teacache_state=change(rewritten.initial_state()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacache_state": {}}, "teacache_state is an argument of the form state='io'"),
        (
            {"teacache_context": torch.tensor(0)},
            "teacache_context, an int64 tensor of shape .., needs num_contexts > 1",
        ),
        ({"teacache_reset": True}, r"teacache_reset must be a tensor of shape \[\] and torch.bool, got bool"),
        ({"guidance": torch.ones(1)}, "guidance was not given when the model was captured"),
        ({"timestep": 3.0}, "timestep was a tensor when the model was captured, and is no tensor now"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    rewritten = rewrite(toys.make(), (), toys.inputs(), config=CONFIG)
    with torch.no_grad(), pytest.raises(TypeError, match=message):
        rewritten(**{**toys.inputs(), **arguments})
    with pytest.raises(TypeError, match="hidden_states was given twice, by position and by name"):
        rewritten(toys.inputs()["hidden_states"], **toys.inputs())
    with pytest.raises(TypeError, match="4 positional arguments were given, and the model takes 3"):
        rewritten(*toys.inputs().values(), 1)
    with pytest.raises(TypeError, match="encoder_hidden_states is missing"):
        rewritten(toys.inputs()["hidden_states"], toys.inputs()["timestep"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"sizes \[1, 8, 4\], but the model was captured for \[2, 4 to 64, 4\]: rewrite it anew"),
        (lambda x: x[:, :3], r"sizes \[2, 3, 4\]"),
        (lambda x: x.repeat(1, 9, 1), r"sizes \[2, 72, 4\].*say with dynamic_shapes which sizes vary"),
        (lambda x: x[0], r"sizes \[8, 4\]"),
        (lambda x: x.double(), "float64 on cpu, but the model was captured for float32 on cpu"),
        (lambda x: x.to("meta"), "float32 on meta, but"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", ["buffers", "io"])
def test_bad_tensors(state: Any, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs, config=CONFIG, state=state, dynamic_shapes=SIZES)
    own = {"teacache_state": rewritten.initial_state(**inputs)} if state == "io" else {}
    with torch.no_grad():
        rewritten(**inputs, **own)
        with pytest.raises(ValueError, match=f"hidden_states (has the|is) {message}"):
            rewritten(**{**inputs, "hidden_states": change(inputs["hidden_states"])}, **own)


def _finetuned() -> nn.Module:
    model = toys.make()
    with torch.no_grad():
        model.get_parameter("blocks.1.to_out.weight").mul_(1.1)
    return model


def test_the_state_of_a_finetune() -> None:
    """Eagerly an error; a program, which cannot raise one, begins a new generation with it."""
    inputs = toys.inputs()
    rewritten = rewrite(_finetuned(), (), inputs, config=CONFIG, state="io")
    with torch.no_grad():
        _, foreign = _io()(**inputs, teacache_state=_io().initial_state())
        with pytest.raises(ValueError, match="teacache_state is another model's, or of other weights"):
            rewritten(**inputs, teacache_state=foreign)
        arguments = {**inputs, "teacache_state": rewritten.initial_state()}
        module = torch.export.export(rewritten, (), arguments).module()
        output, state = module(**inputs, teacache_state=foreign)
        torch.testing.assert_close(output, _finetuned()(**inputs))
        assert (int(state["step_index"]), int(state["consecutive_skips"])) == (1, 0)
        _, state = module(**inputs, teacache_state=state)
        assert int(state["consecutive_skips"]) == 1


def test_the_buffers_of_a_finetune() -> None:
    """As a loaded package can be given them, which shares its state with whoever loaded it."""
    inputs = toys.inputs()
    mine, other = (rewrite(model, (), inputs, config=CONFIG) for model in (_finetuned(), toys.make()))
    with torch.no_grad():
        for call in (mine, other):
            call(**inputs)
            assert int(call.teacache.get_buffer("reason")) == 1
        mine.teacache.load_state_dict(other.teacache.state_dict())
        torch.testing.assert_close(mine(**inputs), _finetuned()(**inputs))
        assert int(mine.teacache.get_buffer("reason")) == 1
        mine(**inputs)
        assert int(mine.teacache.get_buffer("reason")) == 0


def test_a_program_of_another_version() -> None:
    rewritten = rewrite(toys.make(), (), toys.inputs(), config=CONFIG)
    rewritten.teacache.register_buffer("momentum", torch.zeros(3))
    program = torch.export.export(rewritten, (), toys.inputs(), strict=False)
    with pytest.raises(ValueError, match="by this version of teacache_fx: it keeps momentum, which is nothing of"):
        verify(program)
    assert verify(export()).steps


def test_sizes_without_a_limit() -> None:
    shapes = {"hidden_states": {1: Dim("tokens")}, "timestep": None, "encoder_hidden_states": None}
    with pytest.raises(ValueError, match=r"needs room for the largest call.*Dim\(name, max=4096\)"):
        rewrite(toys.make(), (), toys.inputs(), config=CONFIG, dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, TypeError, "says which of the 2 contexts"),
        (1, TypeError, r"must be a tensor of shape \[\] and torch.int64, got int"),
        (torch.tensor([1]), TypeError, r"got torch.int64 \[1\]"),
        (torch.tensor(1.0), TypeError, r"got torch.float32 \[\]"),
        (torch.tensor(2), ValueError, "must be from 0 to 1, got 2"),
        (torch.tensor(-1), ValueError, "must be from 0 to 1, got -1"),
    ],
    ids=str,
)
def test_bad_contexts(context: Any, error: type[Exception], message: str) -> None:
    rewritten = rewrite(toys.make(), (), toys.inputs(), config=CONFIG, num_contexts=2)
    own = {} if context is None else {"teacache_context": context}
    with torch.no_grad(), pytest.raises(error, match=message):
        rewritten(**toys.inputs(), **own)


def test_another_mode_than_at_the_capture() -> None:
    rewritten = rewrite(toys.make().train(), (), toys.inputs(), config=CONFIG)
    with torch.no_grad():
        rewritten(**toys.inputs())
        with pytest.raises(ValueError, match="captured with training=True, which is built in"):
            rewritten.eval()(**toys.inputs())


def test_names_that_the_rewritten_module_needs() -> None:
    model = toys.make()
    model.plan = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`plan` of the model has a name that the rewritten module needs"):
        rewrite(model)


def test_arguments_by_position_only() -> None:
    class Positional(toys.ToyDiT):
        def forward(self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, /) -> Any:
            return super().forward(hidden_states, timestep, encoder_hidden_states)

    with pytest.raises(TypeError, match="hidden_states of the model's forward can be given by position only"):
        rewrite(toys.make(Positional), tuple(toys.inputs().values()))
    with pytest.raises(TypeError, match="args must be a tuple of positional arguments, got Tensor"):
        rewrite(toys.make(), torch.ones(2))  # type: ignore[arg-type]
