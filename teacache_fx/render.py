"""One text form of a graph, for logs, goldens and docs: one node a line, with shapes, dtypes and module paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from teacache_fx.graph import fake_value, is_user_input, op_name, source_name
from teacache_fx.module_paths import clean_path, module_path

_SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32"}


def render(gm: fx.GraphModule) -> str:
    """The graph as text, subgraphs of conds below it. Stable between processes and machines."""
    names = {node: _name(node) for node in gm.graph.nodes}
    sections = ["graph:", *(f"  {_line(node, names)}" for node in gm.graph.nodes)]
    for cond in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        _, *branches, operands = cond.args
        for branch in branches:
            graph = getattr(gm, branch.target).graph
            sections += [f"{branch.target}:", *_branch_lines(graph, operands, names)]
    return "\n".join(sections) + "\n"


def _branch_lines(branch: fx.Graph, operands: Sequence[fx.Node], outside: dict[fx.Node, str]) -> list[str]:
    """A branch calls its inputs as the graph around it does."""
    names = {node: _name(node) for node in branch.nodes}
    placeholders = (node for node in branch.nodes if node.op == "placeholder")
    names.update({inner: outside[outer] for inner, outer in zip(placeholders, operands, strict=True)})
    return [f"  {_line(node, names)}" for node in branch.nodes]


def _name(node: fx.Node) -> str:
    """Parameters are called by their module path, all else by the node's name."""
    if node.op == "placeholder" and getattr(node, "_dynamo_source", None) is not None and not is_user_input(node):
        return weight_path(node)
    return node.name


def weight_path(placeholder: fx.Node) -> str:
    """Path of a parameter, buffer or other attribute of the model, such as `transformer_blocks.0.norm.weight`."""
    steps = clean_path(source_name(placeholder)).split(".")
    return ".".join(step for step in steps if step not in ("_parameters", "_buffers", "__dict__"))


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    kind = describe(fake_value(node))
    if node.op == "placeholder":
        return f"input {names[node]}: {kind}"
    if node.op == "output":
        return f"return {_argument(node.args[0], names)}"
    arguments = [_argument(argument, names) for argument in node.args]
    arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
    path = module_path(node)
    call = op_name(node) or f"{node.op} {node.target}"
    return f"{names[node]}: {kind} = {call}({', '.join(arguments)})" + (f"  # {path}" if path else "")


def describe(value: Any, size: Callable[[Any], str] = str) -> str:
    """Dtype and shape of a tensor, as `f32[2, 8, 32]`; other values as they print.

    Args:
        value: what a node yields.
        size: writes one size, which may be symbolic.
    """
    if isinstance(value, torch.Tensor):
        return f"{describe_dtype(value.dtype)}[{', '.join(map(size, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(item, size) for item in value)})"
    return "-" if value is None else str(value)


def describe_dtype(dtype: torch.dtype) -> str:
    """Short name of a dtype: `f32`, `bf16`."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)


def _argument(argument: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(_argument(item, names) for item in argument)}]"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{key}: {_argument(item, names)}" for key, item in argument.items()) + "}"
    return str(argument)
