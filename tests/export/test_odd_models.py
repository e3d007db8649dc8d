"""Models and calls that are unlike the ordinary ones: names, layouts, modes, shared buffers, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from teacache_fx import TeaCacheConfig, rewrite
from tests import toys
from tests.both_branches import compare

CONFIG = TeaCacheConfig(rel_l1_thresh=1e6, coefficients=(1.0, 0.0))
TORCH_WARNS = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


class NamedDiT(toys.ToyDiT):
    """Arguments called as Python's own names are, and as tensors of the state are."""

    def forward(self, input: Tensor, timestep: Tensor, step_index: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input, timestep, step_index)


class SharingDiT(toys.ToyDiT):
    """One buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(1, 1, toys.WIDTH))
        self.norm_out.register_buffer("table", self.table)

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        table = self.table + self.norm_out.get_buffer("table")
        return super().run_blocks(hidden_states * table, text, temb)

    table: Tensor


def _check(model: nn.Module, call: Any, inputs: dict[str, Any], latents: str = "hidden_states") -> None:
    branches = compare(model, call, inputs, {**inputs, latents: inputs[latents] * 1.01})
    assert branches.computed_error <= 1e-6
    assert branches.reuse_error <= 1e-6
    assert branches.change > 1e-4


@TORCH_WARNS
@pytest.mark.parametrize("state", ["buffers", "io"])
def test_names_that_python_or_the_state_has_too(state: Any) -> None:
    given = toys.inputs()
    inputs = {"input": given["hidden_states"], "timestep": given["timestep"]}
    inputs["step_index"] = given["encoder_hidden_states"]
    rewritten = rewrite(toys.make(NamedDiT), (), inputs, config=CONFIG, state=state)
    if state == "io":
        kept = [rewritten.initial_state()]

        def step(**inputs: Tensor) -> Tensor:
            output, kept[0] = program(**inputs, teacache_state=kept[0])
            return output  # type: ignore[no-any-return]

        program = torch.export.export(rewritten, (), {**inputs, "teacache_state": kept[0]}).module()
        _check(toys.make(NamedDiT), step, inputs, "input")
    else:
        _check(toys.make(NamedDiT), torch.export.export(rewritten, (), inputs).module(), inputs, "input")


def test_a_buffer_under_two_names() -> None:
    _check(toys.make(SharingDiT), rewrite(toys.make(SharingDiT), config=CONFIG), toys.inputs())


@TORCH_WARNS
@pytest.mark.parametrize("is_exported", [False, True])
def test_chunks_of_a_batch(is_exported: bool) -> None:
    """What guidance is computed from is often a chunk of a larger tensor, and no memory of its own."""
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs, config=CONFIG)
    call = torch.export.export(rewritten, (), inputs).module() if is_exported else rewritten
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in inputs.items()}
    assert not strided["encoder_hidden_states"].is_contiguous()
    _check(toys.make(), call, strided)


def test_copies_go_ways_of_their_own() -> None:
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs, config=CONFIG)
    twin = copy.deepcopy(rewritten)
    with torch.no_grad():
        rewritten(**inputs)
        twin.get_parameter("proj_out.bias").add_(1.0)
    assert [int(each.teacache.get_buffer("step_index")[0]) for each in (rewritten, twin)] == [1, 0]
    model = toys.make()
    with torch.no_grad():
        model.get_parameter("proj_out.bias").add_(1.0)
    _check(model, twin, inputs)


def test_steps_do_not_hold_on_to_those_before() -> None:
    """In grad mode, which the state must not carry from step to step."""
    torch.manual_seed(0)
    rewritten = rewrite(toys.ToyDiT().eval(), (), toys.inputs(), config=CONFIG)
    sizes = [_num_autograd_nodes(rewritten(**toys.inputs())) for _ in range(4)]
    assert sizes[1] == sizes[2] == sizes[3] > 0
    assert not any(buffer.requires_grad for buffer in rewritten.teacache.buffers())


def _num_autograd_nodes(output: Tensor) -> int:
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


def test_captured_in_inference_mode() -> None:
    rewritten = rewrite(toys.make(), config=CONFIG)
    with torch.inference_mode():
        rewritten(**toys.inputs())
    _check(toys.make(), _from_the_start(rewritten), toys.inputs())


def _from_the_start(rewritten: Any) -> Any:
    rewritten.teacache.reset()
    return rewritten


@TORCH_WARNS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("varying", [["tokens"], ["batch"], ["tokens", "batch"]], ids=str)
def test_contexts_and_sizes_that_vary(strict: bool, varying: list[str]) -> None:
    batch = {0: Dim("batch", max=4)} if "batch" in varying else {}
    tokens = {1: Dim("tokens", max=32)} if "tokens" in varying else {}
    shapes = {"hidden_states": {**batch, **tokens}, "timestep": batch, "encoder_hidden_states": batch}
    shapes["teacache_context"] = {}
    rewritten = rewrite(toys.make(), num_contexts=2, config=CONFIG)
    kwargs = {**toys.inputs(), "teacache_context": torch.tensor(0)}
    program = torch.export.export(rewritten, (), kwargs, dynamic_shapes=shapes, strict=strict)
    call = program.module()
    for size in (8, 32 if tokens else 8):
        inputs = toys.inputs(4 if batch else 2, size)
        for context in (0, 1):
            own = {**inputs, "teacache_context": torch.tensor(context)}
            first, again = call(**own), call(**own)
            torch.testing.assert_close(first, toys.make()(**inputs))
            torch.testing.assert_close(again, first)


@TORCH_WARNS
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_varying_size_in_and_out(strict: bool) -> None:
    shapes: dict[str, Any] = {"hidden_states": {1: Dim("tokens", min=2, max=64)}}
    shapes |= {"timestep": None, "encoder_hidden_states": None}
    rewritten = rewrite(toys.make(), (), toys.inputs(), config=CONFIG, state="io", dynamic_shapes=shapes)
    kwargs: dict[str, Any] = {**toys.inputs(), "teacache_state": rewritten.initial_state(**toys.inputs())}
    shapes["teacache_state"] = rewritten.state_dynamic_shapes()
    program = torch.export.export(rewritten, (), kwargs, dynamic_shapes=shapes, strict=strict).module()
    inputs = toys.inputs(tokens=12)
    output, state = program(**inputs, teacache_state=rewritten.initial_state(**inputs))
    torch.testing.assert_close(output, toys.make()(**inputs))
    assert int(state["step_index"]) == 1
    with pytest.raises(TypeError, match="sizes vary between calls: give initial_state the arguments of a step"):
        rewritten.initial_state()
