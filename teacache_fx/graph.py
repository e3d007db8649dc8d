"""Reading and copying FX graphs as dynamo captures them. All use of private torch API stands here and in `sizes`.

Tried on torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from teacache_fx.sizes import proven_equal

_FAKE_KEYS = ("example_value", "val")  # dynamo and export name them differently
_WEIGHT_CONTAINERS = ("_parameters", "_buffers")
_MODULE_CONTAINERS = (*_WEIGHT_CONTAINERS, "_modules")


def fake_value(node: fx.Node) -> Any:
    """What the node yields, as recorded at capture: a fake tensor, a tuple of them, a SymInt, or `None` if unknown."""
    for key in _FAKE_KEYS:
        if key in node.meta:
            return node.meta[key]
    return None


def set_fake_value(node: fx.Node, value: Any) -> None:
    """Records what a new node yields. AOTAutogradCache looks for dynamo's key."""
    node.meta["example_value"] = value


def fake_tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors among what the node yields."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(fake_value(node)) if isinstance(leaf, torch.Tensor)]


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node that yields exactly one."""
    value = fake_value(node)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node `{node.name}` yields {type(value).__name__}, not one tensor")
    return value


def emit(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call whose fake value is what the call yields on its arguments' fake values."""
    node = graph.call_function(target, args, kwargs)
    set_fake_value(node, target(*fx.node.map_arg(args, fake_value), **fx.node.map_arg(kwargs, fake_value)))
    return node


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are equal for certain; unlike `==` it puts no guard on a symbolic size."""
    return proven_equal(left, right)


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same sizes for certain."""
    return left.ndim == right.ndim and all(map(same_size, left.shape, right.shape))


def is_unbacked(size: Any) -> bool:
    """Whether a size is known only after running the model, such as the number of tokens that a mask selects."""
    return isinstance(size, torch.SymInt) and any(str(s).startswith("u") for s in size.node.expr.free_symbols)


def printed_shape(tensor: torch.Tensor) -> tuple[str, ...]:
    """The sizes as text, for comparing blocks with each other: each block names an unknown size anew."""
    return tuple("?" if is_unbacked(size) else str(size) for size in tensor.shape)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the graph's fake tensors live in.

    Raises:
        ValueError: no node of the graph has a fake value.
    """
    # Not torch's detect_fake_mode: inside a backend that answers with the fresh mode that dynamo made for the backend.
    for node in graph.nodes:
        for tensor in fake_tensors(node):
            if isinstance(tensor, FakeTensor):
                return tensor.fake_mode
    raise ValueError("the graph holds no fake values: capture it with torch.compile or torch.export first")


def storages(node: fx.Node) -> set[int]:
    """Identities of the storages that the node's tensors live in. Tensors share one exactly if they alias.

    What a vmap is mapping over has none that could be told.
    """
    return set(_storages(fake_tensors(node)))


def occupies(node: fx.Node, wanted: set[int]) -> bool:
    """Whether tensors of the node live in all of these storages; of many views of one tensor it looks at the first."""
    value, missing = fake_value(node), set(wanted)
    for part in value if isinstance(value, (tuple, list)) else [value]:
        missing.difference_update(_storages(torch.utils._pytree.tree_leaves(part)))
        if not missing:
            return True
    return not missing


def _storages(leaves: Iterable[Any]) -> Iterator[int]:
    for tensor in leaves:
        if not isinstance(tensor, torch.Tensor) or torch._C._functorch.is_batchedtensor(tensor):
            continue
        if tensor.layout == torch.strided:
            yield tensor.untyped_storage()._cdata


def op_name(node: fx.Node) -> str:
    """Plain name of what a node calls: `linear`, `chunk`, `setitem`; empty for nodes that call nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return getattr(node.target, "__name__", str(node.target))


def is_join(node: fx.Node) -> bool:
    """Whether the node joins tensors along a dimension they have."""
    return op_name(node) in ("cat", "concat", "concatenate")


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Argument nodes whose memory the node writes: exact from the schema of an operator, else by torch's naming."""
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return list(dict.fromkeys(_schema_writes(node, target)))
    if isinstance(target, torch._ops.OpOverloadPacket):  # `torch.ops.space.name(x)` leaves open which one is meant
        overloads = [getattr(target, name) for name in target.overloads()]  # type: ignore[no-untyped-call]
        return list(dict.fromkeys(argument for each in overloads for argument in _schema_writes(node, each)))
    written = [node.kwargs["out"]] if "out" in node.kwargs else []
    if node.args and _writes_first_argument(node):
        written.append(node.args[0])
    return [argument for argument in written if isinstance(argument, fx.Node)]


def _schema_writes(node: fx.Node, target: torch._ops.OpOverload) -> Iterator[fx.Node]:
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            is_given = position < len(node.args) and not argument.kwarg_only
            written = node.kwargs.get(argument.name, node.args[position] if is_given else None)
            yield from (leaf for leaf in torch.utils._pytree.tree_leaves(written) if isinstance(leaf, fx.Node))


def _writes_first_argument(node: fx.Node) -> bool:
    name = op_name(node)
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or (name.startswith("i") and name[1:] in _IN_PLACE_OPERATORS)
    in_place_name = name.endswith("_") and not name.endswith("__")
    return in_place_name or name == "__setitem__" or bool(node.kwargs.get("inplace"))


_IN_PLACE_OPERATORS = {
    "add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"
}  # fmt: skip


def name_source(placeholder: fx.Node, source: str) -> None:
    """Says where an input comes from, as dynamo would, for a graph that dynamo has not captured."""
    placeholder.meta["teacache_source"] = source


def source_name(placeholder: fx.Node) -> str:
    """Where dynamo took an input from, such as `L['kwargs']['timestep']`; the placeholder's own name if unknown."""
    if "teacache_source" in placeholder.meta:
        return str(placeholder.meta["teacache_source"])
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    return str(source.name() if callable(source.name) else source.name)  # a method until torch 2.10


def is_user_input(placeholder: fx.Node) -> bool:
    """Whether the caller passes this input at each call, as against a parameter, buffer or attribute of the model."""
    name = source_name(placeholder)
    from_module = name.startswith(("L['self']", "L['module']", "G[")) or any(
        part in name for part in _MODULE_CONTAINERS
    )
    return placeholder.op == "placeholder" and not from_module


def is_weight(placeholder: fx.Node) -> bool:
    """Whether this input is a parameter or a buffer of a module; a number that dynamo has made a tensor is not."""
    name = source_name(placeholder)
    return placeholder.op == "placeholder" and any(part in name for part in _WEIGHT_CONTAINERS)


def is_number(placeholder: fx.Node) -> bool:
    """Whether this input is a python number that varies between calls: of the caller, or an attribute of a module.

    Dynamo passes a float as a tensor on the CPU, which an argument's hash covers, and an integer as it is. So it does
    with the sizes of tensors, which are none.
    """
    value = fake_value(placeholder)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return "()[" not in source_name(placeholder)  # x.size()[0]
    is_alone = isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype == torch.float64
    return is_alone and value.device.type == "cpu" and not is_user_input(placeholder) and not is_weight(placeholder)


def argument_name(placeholder: fx.Node) -> str:
    """The caller's name of an input: `timestep` for `L['kwargs']['timestep']`."""
    names = re.findall(r"\['(\w+)'\]|\.(\w+)", source_name(placeholder))
    return "".join(names[-1]) if names else placeholder.name


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be edited freely; attributes and fake values are shared with the original.

    Dynamo goes on reading the original's placeholders after the backend has returned, and AOTAutograd expects
    `_dynamo_source` on each placeholder of what it is given.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, lambda original: copies[original])
        copies[node].meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    copy = fx.GraphModule(gm, graph, class_name="GraphModule")
    copy.meta = dict(gm.meta)
    return copy


def mark_as_state(placeholder: fx.Node) -> None:
    """Tells dynamo's and AOTAutograd's bookkeeping that this input comes from the cache, not from the user's code."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {}


def inside_functorch() -> bool:
    """Whether a functorch transform, such as vmap, is active right now."""
    return torch._C._functorch.peek_interpreter_stack() is not None
