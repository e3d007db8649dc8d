"""FLOPs of each kind of matrix product, against torch's own counter on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    layer_norm,
    linear,
    scaled_dot_product_attention,
)  # fmt: skip

from teacache_fx.flops import captured_flops, flops, is_matmul
from teacache_fx.graph import op_name
from tests.counting import captured, counted, exported, flops_of

Function: TypeAlias = Callable[..., Any]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]

# What is called, and the shapes that it is called with.
CASES: dict[str, tuple[Function, Shapes]] = {
    "linear": (linear, ((2, 3, 5), (7, 5))),
    "linear of a vector": (linear, ((5,), (7, 5))),
    "linear with bias": (linear, ((2, 3, 5), (7, 5), (7,))),
    "linear by name": (lambda x, w: linear(weight=w, input=x), ((2, 3, 5), (7, 5))),
    "matmul": (torch.matmul, ((2, 3, 5), (2, 5, 7))),
    "matmul broadcast": (torch.matmul, ((4, 1, 3, 5), (2, 5, 7))),
    "matmul of vector and matrix": (torch.matmul, ((5,), (5, 7))),
    "matmul by name": (lambda x, y: torch.matmul(other=y, input=x), ((3, 5), (5, 7))),
    "matmul as a method": (lambda x, y: x.matmul(y), ((2, 3, 5), (2, 5, 7))),
    "operator": (lambda x, y: x @ y, ((2, 3, 5), (5, 7))),
    "mm": (torch.mm, ((3, 5), (5, 7))),
    "inner": (torch.inner, ((2, 3, 5), (7, 5))),
    "linalg": (torch.linalg.matmul, ((2, 3, 5), (5, 7))),
    "bmm": (torch.bmm, ((2, 3, 5), (2, 5, 7))),
    "addmm": (torch.addmm, ((7,), (3, 5), (5, 7))),
    "addmm by name": (lambda b, x, y: torch.addmm(b, mat2=y, mat1=x), ((7,), (3, 5), (5, 7))),
    "baddbmm": (torch.baddbmm, ((2, 3, 7), (2, 3, 5), (2, 5, 7))),
    "tensordot": (lambda x, y: torch.tensordot(x, y, 2), ((2, 3, 5), (3, 5, 7))),
    "tensordot over pairs": (lambda x, y: torch.tensordot(x, y, dims=([1, 0], [0, 2])), ((2, 3, 5), (3, 4, 2))),
    "conv1d": (conv1d, ((2, 4, 9), (6, 4, 3))),
    "conv1d unbatched": (conv1d, ((4, 9), (6, 4, 3))),
    "conv2d": (lambda x, w: conv2d(x, w, stride=2, padding=1, dilation=2), ((2, 4, 9, 8), (6, 4, 3, 2))),
    "conv2d in groups": (lambda x, w: conv2d(x, w, groups=2), ((2, 4, 9, 8), (6, 2, 3, 3))),
    "conv2d the same": (lambda x, w: conv2d(x, w, padding="same"), ((2, 4, 9, 8), (6, 4, 3, 3))),
    "conv2d depthwise": (
        lambda x, w, b: conv2d(x, w, b, padding=1, groups=4),
        ((2, 4, 9, 8), (4, 1, 3, 3), (4,)),
    ),
    "conv3d": (lambda x, w: conv3d(x, w, stride=(1, 2, 2)), ((2, 4, 3, 8, 8), (6, 4, 1, 2, 2))),
    "conv_transpose1d": (lambda x, w: conv_transpose1d(x, w, stride=2), ((2, 4, 9), (4, 6, 3))),
    "conv_transpose2d": (lambda x, w: conv_transpose2d(x, w, padding=1), ((2, 4, 9, 8), (4, 6, 3, 2))),
    "conv_transpose2d in groups": (
        lambda x, w: conv_transpose2d(x, w, groups=2),
        ((2, 4, 9, 8), (4, 3, 3, 2)),
    ),
    "conv_transpose3d": (lambda x, w: conv_transpose3d(x, w, stride=2), ((2, 4, 3, 4, 4), (4, 6, 1, 2, 2))),
    "aten convolution": (
        lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        ((2, 4, 9, 8), (6, 4, 3, 2)),
    ),
    "aten convolution transposed": (
        lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
        ((2, 4, 9, 8), (4, 6, 3, 2)),
    ),
    "sdpa": (scaled_dot_product_attention, ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))),
    "sdpa of a wider value": (scaled_dot_product_attention, ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))),
    "sdpa by name": (
        lambda q, k, v: scaled_dot_product_attention(value=v, key=k, query=q),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ),
    "sdpa in groups": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ),
    "sdpa causal": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    ),
}

# Torch's counter does not know these, but the products of matrices that they are.
EQUAL: dict[str, tuple[Function, Function, Shapes]] = {
    "mv": (torch.mv, lambda m, v: m @ v[:, None], ((3, 5), (5,))),
    "matmul of matrix and vector": (torch.matmul, lambda m, v: m @ v[:, None], ((3, 5), (5,))),
    "matmul of stack and vector": (torch.matmul, lambda m, v: m @ v[:, None], ((2, 3, 5), (5,))),
    "dot": (torch.dot, lambda v, w: v[None] @ w[:, None], ((5,), (5,))),
    "matmul of vectors": (torch.matmul, lambda v, w: v[None] @ w[:, None], ((5,), (5,))),
    "addmv": (torch.addmv, lambda _, m, v: m @ v[:, None], ((3,), (3, 5), (5,))),
    "addbmm": (torch.addbmm, lambda _, x, y: x @ y, ((3, 7), (2, 3, 5), (2, 5, 7))),
    "addmm in place": (lambda b, x, y: b.clone().addmm_(x, y), torch.addmm, ((3, 7), (3, 5), (5, 7))),
    "baddbmm in place": (lambda b, x, y: b.clone().baddbmm_(x, y), torch.baddbmm, ((2, 3, 7), (2, 3, 5), (2, 5, 7))),
}


@pytest.mark.parametrize("how", [captured, exported])
@pytest.mark.parametrize("name", CASES)
def test_an_operation(name: str, how: Callable[..., fx.Graph]) -> None:
    function, shapes = CASES[name]
    inputs = [torch.randn(shape) for shape in shapes]
    graph = how(function, *inputs)
    expected = counted(function, *inputs)
    assert expected > 0
    assert flops_of(graph) == expected, [op_name(node) for node in graph.nodes]
    assert captured_flops(graph.nodes) == expected


@pytest.mark.parametrize("how", [captured, exported])
@pytest.mark.parametrize("name", EQUAL)
def test_an_operation_that_torch_does_not_count(name: str, how: Callable[..., fx.Graph]) -> None:
    function, like, shapes = EQUAL[name]
    inputs = [torch.randn(shape) for shape in shapes]
    assert flops_of(how(function, *inputs)) == counted(like, *inputs) > 0


@pytest.mark.parametrize(("embed", "batch"), [(8, (3,)), (8, ())])
def test_multi_head_attention(embed: int, batch: tuple[int, ...]) -> None:
    attention = nn.MultiheadAttention(embed, 2, kdim=6, vdim=4).eval()
    query, key, value = torch.randn(5, *batch, embed), torch.randn(7, *batch, 6), torch.randn(7, *batch, 4)
    graph = captured(attention, query, key, value)
    assert "multi_head_attention_forward" in map(op_name, graph.nodes)
    assert flops_of(graph) == counted(attention, query, key, value) > 0


def test_a_transformer_layer_of_torch() -> None:
    layer, source = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        graph = captured(layer, source)
    assert "_transformer_encoder_layer_fwd" in map(op_name, graph.nodes)
    layer.train()  # the same products, but in operations that torch's counter knows
    assert flops_of(graph) == counted(layer, source) > 0


def test_pointwise_work_is_free() -> None:
    graph = captured(lambda x, y: (x * y + x.softmax(-1)).sum() + layer_norm(x, (4,)).cumsum(0), *torch.ones(2, 3, 4))
    assert flops_of(graph) == 0
    assert not any(map(is_matmul, graph.nodes))


def test_a_call_of_unknown_form_counts_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2, 3)
    node = graph.call_function(torch.matmul, (x, 2.0))
    assert flops(node) == 0, "what it yields is unknown"
    node.meta["example_value"] = torch.ones(2, 3)
    strange = graph.call_function(linear, (), {"x": x})
    strange.meta["example_value"] = torch.ones(2, 3)
    assert flops(strange) == 0
