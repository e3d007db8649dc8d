"""Blocks that join text of a length that follows from a mask, and take it off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import TeaCacheBackend
from teacache_fx.graph import is_unbacked, op_name, tensor_of
from teacache_fx.slices import with_known_slices
from tests import toys
from tests.both_branches import ALWAYS_SKIP, measure
from tests.passes.capture import on_capture


class JoiningBlock(toys.Block):
    """Joins [image; text], works on both, and takes them apart from behind."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        words = text.shape[1]
        joined = super().forward(torch.cat([hidden_states, text], 1), text, temb)
        return joined[:, :-words], joined[:, -words:]


class MaskedTextDiT(toys.ToyDiT):
    """Only the words that the mask selects enter the blocks, of which the first ones work on the image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.joining_blocks = nn.ModuleList(JoiningBlock() for _ in range(2))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, mask: Tensor
    ) -> Tensor:
        temb, tokens = self.embed_time(timestep), self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states)[:, : mask.sum()]
        tokens = self.run_blocks(tokens, text, temb)
        for block in self.joining_blocks:
            tokens, text = block(tokens, text, temb)
        sample: Tensor = self.proj_out(self.norm_out(tokens))
        return sample


def _inputs(words: int = 2) -> dict[str, Tensor]:
    inputs = toys.inputs(tokens=8, words=5)
    return {**inputs, "mask": torch.arange(5) < words}


@pytest.fixture(autouse=True)
def _capture_sizes() -> object:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


@pytest.mark.parametrize(
    ("inner", "dynamic"), [("eager", True), pytest.param("inductor", True, marks=pytest.mark.slow)]
)
def test_the_image_tokens_are_as_many_as_before(inner: str, dynamic: bool) -> None:
    inputs = _inputs()
    backend = TeaCacheBackend(rel_l1_thresh=ALWAYS_SKIP, coefficients=[1.0, 0.0], inner=inner, on_decline="raise")
    compiled = torch.compile(toys.make(MaskedTextDiT), backend=backend, fullgraph=True, dynamic=dynamic)
    moved = {**inputs, "hidden_states": inputs["hidden_states"] * 1.1}
    both = measure(toys.make(MaskedTextDiT), compiled, backend, inputs, moved)
    assert both.skipped == (False, True, True)
    assert both.computed_error <= (0 if inner == "eager" else 1e-5)
    assert both.reuse_error <= 1e-5
    assert both.change > 1e-4
    plan = backend.reports[0].plan
    assert plan is not None
    assert plan.costs.skipped_share < 0.1


def test_any_number_of_words_but_none() -> None:
    model = toys.make(MaskedTextDiT)
    backend = TeaCacheBackend(rel_l1_thresh=1e-9, coefficients=[1.0], inner="eager", on_decline="raise")
    compiled = torch.compile(toys.make(MaskedTextDiT), backend=backend, fullgraph=True)
    with torch.no_grad():
        for words in (1, 2, 5, 3):
            assert torch.equal(compiled(**_inputs(words)), model(**_inputs(words)))
        assert model(**_inputs(0)).shape[1] == 0, "the model itself gives nothing back"
        with pytest.raises(RuntimeError, match="joined with one or more tokens: here with none"):
            compiled(**_inputs(0))
    assert len(backend.reports) == 1


def test_no_size_stays_open() -> None:
    """Torch names the length of each slice anew; counted from the front, all of them are known."""

    def sizes(gm: torch.fx.GraphModule) -> tuple[set[str], set[str], bool]:
        known = with_known_slices(gm)
        return _open(gm), _open(known), with_known_slices(known) is known

    ((before, after, is_done),) = on_capture(toys.make(MaskedTextDiT), _inputs(), sizes)
    assert len(before) > 4
    assert len(after) == 1, "the number of words"
    assert is_done


def test_graphs_without_such_slices_are_not_copied() -> None:
    ((is_same,),) = on_capture(toys.make(), toys.inputs(), lambda gm: (with_known_slices(gm) is gm,))
    assert is_same


def _open(gm: torch.fx.GraphModule) -> set[str]:
    sliced = [node for node in gm.graph.nodes if op_name(node) == "getitem" and isinstance(node.args[1], tuple)]
    sizes: list[Any] = [size for node in sliced for size in tensor_of(node).shape if is_unbacked(size)]
    return {str(symbol) for size in sizes for symbol in size.node.expr.free_symbols}
