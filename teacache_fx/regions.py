"""Takes the regions of a graph apart that dynamo has captured as subgraphs.

`torch.utils.checkpoint` and `torch.compiler.nested_compile_region` put each block into a subgraph of its own, behind
one operation. They change how gradients are computed and how often a block is compiled, and no result. The passes look
for blocks among the operations themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from teacache_fx.graph import copy_graph_module, fake_mode_of, fake_value, op_name, set_fake_value

_FIRST_OPERAND = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}  # behind the subgraph, and its name
_STACK = "nn_module_stack"


def with_regions_inlined(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which the operations of each region stand in its place; the graph itself, if it has none."""
    if not any(_is_region(node) for node in gm.graph.nodes):
        return gm
    gm = copy_graph_module(gm)
    with fake_mode_of(gm.graph), enable_python_dispatcher():
        while regions := [node for node in gm.graph.nodes if _is_region(node)]:  # one may hold others
            for region in regions:
                _inline(gm, region)
    gm.recompile()
    return gm


def _is_region(node: fx.Node) -> bool:
    is_call = node.op == "call_function" and op_name(node) in _FIRST_OPERAND
    return is_call and all(op_name(user) == "getitem" for user in node.users)


def _inline(gm: fx.GraphModule, region: fx.Node) -> None:
    attribute = region.args[0]
    assert isinstance(attribute, fx.Node)
    body = gm.get_submodule(str(attribute.target))
    assert isinstance(body, fx.GraphModule)
    nodes = list(body.graph.nodes)
    operands = iter(region.args[_FIRST_OPERAND[op_name(region)] :])
    paths = _paths(region, nodes)
    copies: dict[fx.Node, Any] = {}
    with gm.graph.inserting_before(region):
        for node in nodes:
            if node.op == "placeholder":
                copies[node] = next(operands)
            elif node.op == "get_attr":
                copies[node] = _attribute(gm, body, node)
            elif node.op != "output":
                copies[node] = _copied(gm.graph, node, copies, paths)
    results: Any = fx.node.map_arg(nodes[-1].args[0], copies.__getitem__)
    for user in list(region.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(region)
    if not attribute.users:
        gm.graph.erase_node(attribute)


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], paths: tuple[str, str] | None) -> fx.Node:
    """One node, with what it yields on the tensors around the region: inside, they were taken for others."""
    copy = graph.node_copy(node, copies.__getitem__)
    copy.meta = dict(node.meta)
    args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), fake_value)
    if copy.op == "call_method":
        set_fake_value(copy, getattr(args[0], str(copy.target))(*args[1:], **kwargs))
    else:
        assert callable(copy.target)
        set_fake_value(copy, copy.target(*args, **kwargs))
    if paths is not None and _STACK in copy.meta:
        copy.meta[_STACK] = dict(_moved(copy.meta[_STACK], *paths))
    return copy


def _attribute(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A subgraph inside the region becomes one of the whole."""
    value = body
    for name in str(node.target).split("."):
        value = getattr(value, name)
    number = 0
    while hasattr(gm, f"inlined_{number}"):
        number += 1
    setattr(gm, f"inlined_{number}", value)
    return gm.graph.get_attr(f"inlined_{number}")


def _paths(region: fx.Node, nodes: list[fx.Node]) -> tuple[str, str] | None:
    """The module path that the body was captured under, and the one that it is called under, if they differ.

    Blocks that are alike share one body.
    """
    called = [path for path, _ in region.meta.get(_STACK, {}).values()]
    stacks = (node.meta.get(_STACK, {}) for node in nodes)
    captured = [path for path, _ in next((stack for stack in stacks if stack), {}).values()]
    if not called or len(captured) < len(called) or captured[len(called) - 1] == called[-1]:
        return None
    return captured[len(called) - 1], called[-1]


def _moved(stack: dict[str, tuple[str, object]], before: str, after: str) -> Iterator[tuple[str, tuple[str, object]]]:
    for key, (path, kind) in stack.items():
        is_inside = path == before or path.startswith(f"{before}.")
        yield (f"{key}:{after}", (after + path.removeprefix(before), kind)) if is_inside else (key, (path, kind))
