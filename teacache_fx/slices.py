"""Tells the sizes of slices that torch leaves open.

Note [Open slices]: some blocks join [image; text] and take them apart by `[:, :-words]` and `[:, -words:]`. Where the
number of words follows from a mask, torch cannot tell that it is not 0, for which the one slice would be empty and the
other everything. So each of them gets a size of its own, and that there are as many image tokens behind the blocks as
before is lost. A block that takes no words back makes no sense, and the model would fail on what it gives. So the
slices are counted from the front, `[:, :tokens - words]`, which is the same for all other numbers, and whether there
are words is checked whenever the model runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from teacache_fx.dataflow import is_assertion
from teacache_fx.graph import (
    copy_graph_module,
    emit,
    fake_mode_of,
    fake_value,
    is_unbacked,
    op_name,
    set_fake_value,
    tensor_of,
)
from teacache_fx.sizes import Size, proven_less

_TO_END = 1 << 62  # export writes the largest integer for a missing end
_EMPTY = "TeaCache takes it that a sequence is joined with one or more tokens: here with none; is a mask all False?"


def with_known_slices(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without open slices; the graph itself, if it has none or if their sizes cannot be told."""
    if not any(True for node in gm.graph.nodes for _ in _open_slices(node)):
        return gm
    copy = copy_graph_module(gm)
    mode = fake_mode_of(copy.graph)
    assert mode.shape_env is not None, "a size is symbolic"
    # The dispatcher in Python, as at the capture: the one in C++ takes open sizes for numbers (torch 2.11).
    with mode, enable_python_dispatcher(), mode.shape_env.ignore_fresh_unbacked_symbols():
        is_changed = _tell_sizes(copy.graph)
    copy.recompile()
    return copy if is_changed else gm


def _tell_sizes(graph: fx.Graph) -> bool:
    changed, checked = set[fx.Node](), set[Any]()
    for node in list(graph.nodes):
        if is_assertion(node) and fake_value(node.args[0]) is True:
            graph.erase_node(node)  # torch has asserted of an open size what is known now
            continue
        is_changed = bool(changed.intersection(node.all_input_nodes))
        for cut in _open_slices(node):
            length = -fake_value(cut.bound)
            entire = tensor_of(node.args[0]).shape[cut.dimension]
            if not (proven_less(-1, length) and proven_less(length, entire + 1)):
                continue
            _count_from_front(graph, node, cut, entire - length)
            if isinstance(length, torch.SymInt) and length.node.expr not in checked:
                checked.add(length.node.expr)
                _check_not_empty(graph, node, cut.bound)
            is_changed = True
        if is_changed and node.op in ("call_function", "call_method"):
            changed.add(node)
            set_fake_value(node, _evaluated(node))
    return bool(changed)


class _OpenSlice(NamedTuple):
    """A slice by one bound that only running the model tells: `x[bound:]` or `x[:bound]` along a dimension."""

    dimension: int
    bound: fx.Node
    is_start: bool


def _open_slices(node: fx.Node) -> Iterator[_OpenSlice]:
    if not isinstance(fake_value(node), torch.Tensor):
        return
    for dimension, item in enumerate(_items(node)):
        bound = item.start if item.stop is None else item.stop
        is_one = isinstance(bound, fx.Node) and (item.start is None or item.stop is None) and item.step is None
        if is_one and is_unbacked(fake_value(bound)):
            yield _OpenSlice(dimension, bound, item.stop is None)


def _items(node: fx.Node) -> list[slice]:
    """What the node takes along each dimension; empty if it does anything else than slicing."""
    if op_name(node) in ("getitem", "__getitem__"):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return list(index) if all(isinstance(item, slice) for item in index) else []  # type: ignore[arg-type]
    if node.target is torch.ops.aten.slice.Tensor:
        given: list[Any] = list(node.args[1:])
        given += [0, None, None, 1][len(given) :]
        dimension, start, stop, step = given
        is_to_end = isinstance(stop, int) and stop >= _TO_END
        item = slice(None if start == 0 else start, None if is_to_end else stop, None if step == 1 else step)
        return [slice(None)] * (dimension % tensor_of(node).ndim) + [item]
    return []


def _count_from_front(graph: fx.Graph, node: fx.Node, cut: _OpenSlice, kept: Size) -> None:
    source, position = node.args[0], kept
    if isinstance(kept, torch.SymInt):
        with graph.inserting_before(node):
            size = emit(graph, torch.ops.aten.sym_size.int, source, cut.dimension)
            position = emit(graph, operator.add, size, cut.bound)  # type: ignore[assignment]
    bounds = (position, None) if cut.is_start else (None, position)
    if node.target is torch.ops.aten.slice.Tensor:
        node.args = (source, cut.dimension, *(bounds if cut.is_start else (0, position)))
        return
    items = _items(node)
    items[cut.dimension] = slice(*bounds)
    node.args = (source, tuple(items))


def _check_not_empty(graph: fx.Graph, node: fx.Node, bound: fx.Node) -> None:
    with graph.inserting_before(node):
        is_negative = emit(graph, operator.lt, bound, 0)
        assertion = graph.call_function(torch.ops.aten._assert_scalar.default, (is_negative, _EMPTY))
        set_fake_value(assertion, None)


def _evaluated(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg(node.args, fake_value), fx.node.map_arg(node.kwargs, fake_value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
