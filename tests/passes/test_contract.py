"""The verifier finds broken graphs, and dataflow sees through views and in-place writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from teacache_fx.dataflow import Dataflow, view_source
from teacache_fx.errors import VerificationError
from teacache_fx.graph import op_name, written_arguments
from teacache_fx.passes.verify import verify
from teacache_fx.pipeline import Pipeline
from tests import toys
from tests.passes.capture import CONFIG, on_capture

aten = torch.ops.aten


def _rewritten(gm: fx.GraphModule) -> fx.GraphModule:
    pipeline = Pipeline(gm)
    pipeline.analyse()
    return pipeline.rewrite(CONFIG).gm


def _output(branch: fx.GraphModule) -> list[fx.Node]:
    return list(branch.graph.output_node().all_input_nodes)


def _forget_fake(gm: fx.GraphModule) -> None:
    next(node for node in gm.graph.nodes if op_name(node) == "cond").meta.clear()


def _change_dtype(gm: fx.GraphModule) -> None:
    node = _output(gm.get_submodule("reuse_residual"))[0]  # type: ignore[arg-type]
    node.meta["example_value"] = node.meta["example_value"].to(torch.float64)


def _change_strides(gm: fx.GraphModule) -> None:
    node = _output(gm.get_submodule("run_blocks"))[0]  # type: ignore[arg-type]
    node.meta["example_value"] = node.meta["example_value"].transpose(0, 1).contiguous().transpose(0, 1)


def _return_an_operand(gm: fx.GraphModule) -> None:
    branch = gm.get_submodule("reuse_residual")
    assert isinstance(branch, fx.GraphModule)
    residual = next(node for node in branch.graph.nodes if node.name == "previous_residual")
    branch.graph.output_node().args = ((_output(branch)[0], residual),)


def _return_twice(gm: fx.GraphModule) -> None:
    branch = gm.get_submodule("run_blocks")
    assert isinstance(branch, fx.GraphModule)
    branch.graph.output_node().args = ((_output(branch)[0], _output(branch)[0]),)


def _forget_an_operand(gm: fx.GraphModule) -> None:
    cond = next(node for node in gm.graph.nodes if op_name(node) == "cond")
    *head, operands = cond.args
    cond.args = (*head, tuple(operands)[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_forget_fake, "has no fake value"),
        (_change_dtype, "the branches disagree"),
        (_change_strides, "the branches disagree"),
        (_return_an_operand, "aliases an operand"),
        (_return_twice, "aliases an operand or another output"),
        (_forget_an_operand, "operands"),
    ],
)
def test_verifier_finds(damage: Callable[[fx.GraphModule], None], message: str) -> None:
    def check(gm: fx.GraphModule) -> None:
        known = {node.name for node in gm.graph.nodes}
        rewritten = _rewritten(gm)
        verify(rewritten, known, "nothing")
        damage(rewritten)
        with pytest.raises(VerificationError, match=f"after damage: .*{message}"):
            verify(rewritten, known, "damage")

    on_capture(toys.make(), toys.inputs(), check)


def _capture(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.Graph:
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


def _node(graph: fx.Graph, name: str) -> fx.Node:
    found: fx.Node = next(node for node in graph.nodes if op_name(node) == name)
    return found


def test_a_reader_needs_the_writers_before_it() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:, 0::2] = x[:, 1::2]
        out[:, 1::2] = x[:, 0::2]
        early = out * 2
        out[:, 0] = 0
        return early

    graph = _capture(function, torch.randn(2, 4))
    flow = Dataflow(graph)
    writers = [node for node in flow.nodes if op_name(node) == "setitem"]
    needed = flow.backward([_node(graph, "mul")])
    assert [writer in needed for writer in writers] == [True, True, False]
    assert writers[2] not in flow.live


def test_a_write_to_an_input_is_live() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        result = x + 1
        x[:, :1].zero_()
        return result

    graph = _capture(function, torch.randn(2, 4))
    assert _node(graph, "zero_") in Dataflow(graph).live


def test_views_and_copies() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = x.chunk(2)
        values, _ = x.topk(1)
        return halves[0].transpose(0, 1) + 1, x.clone(), x.float(), values

    graph = _capture(function, torch.randn(4, 4))
    x = next(iter(graph.nodes))
    assert view_source(_node(graph, "chunk")) is x
    assert view_source(_node(graph, "transpose")) is not None
    assert view_source(_node(graph, "clone")) is None
    picked = next(user for user in _node(graph, "topk").users)
    assert view_source(picked) is None, "one of several fresh results is no view"


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "writes"),
    [
        (aten.add_.Tensor, 2, {}, True),
        (aten.add.Tensor, 2, {}, False),
        (torch.relu_, 1, {}, True),
        (torch.nn.functional.relu, 1, {"inplace": True}, True),
        (torch.nn.functional.relu, 1, {"inplace": False}, False),
        (torch._C._nn.linear, 2, {}, False),
    ],
)
def test_written_arguments(target: Any, args: int, kwargs: dict[str, Any], writes: bool) -> None:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "xy"][:args]
    node = graph.call_function(target, tuple(inputs), kwargs)
    assert written_arguments(node) == (inputs[:1] if writes else [])


def test_written_arguments_by_operator_and_out() -> None:
    import operator

    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert written_arguments(graph.call_function(operator.iadd, (x, y))) == [x]
    assert written_arguments(graph.call_function(operator.and_, (x, y))) == []
    assert written_arguments(graph.call_function(operator.invert, (x,))) == []
    assert written_arguments(graph.call_function(torch.add, (x, x), {"out": y})) == [y]
