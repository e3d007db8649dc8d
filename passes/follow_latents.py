"""Holds that what a skipped step returns still follows the latents.

Note [Stale output]: a stack may carry tokens of its own beside those of the latents, such as a learned query, and the
model may read its output from these alone. Their residual is taken against a constant, so a skipped step would return
the same whatever the latents are. A second output, such as register tokens, may be read so beside one that is not.
"""

from __future__ import annotations

import torch
from torch import fx

from teacache_fx.dataflow import Dataflow, view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.graph import fake_value, is_join, op_name, same_shape, tensor_of
from teacache_fx.passes.pair_live_outputs import LivePair
from teacache_fx.sizes import Size, proven_less


def check_follows_latents(
    flow: Dataflow, pairs: list[LivePair], dependent: set[fx.Node], outputs: list[fx.Node]
) -> None:
    """Raises `Declined` (STALE_OUTPUT) if an output is read only from tokens of the stack that are not the latents'."""
    readings = [reading for pair in pairs for reading in _readings(flow, pair, dependent)]
    stale = [node for node, follows in readings if not follows]
    standing = flow.forward(stale) - flow.forward(node for node, follows in readings if follows)
    frozen = [output for output in outputs if output in standing]
    if frozen:
        detail = "the output is read from tokens of the stack that do not start from the latents"
        if len(frozen) < len(outputs):
            number = outputs.index(frozen[0])
            detail = f"output {number} of {len(outputs)} is read from tokens of the stack that do not start from them"
        raise Declined(DeclineReason.STALE_OUTPUT, detail, stale[0].name)


def _readings(flow: Dataflow, pair: LivePair, dependent: set[fx.Node]) -> list[tuple[fx.Node, bool]]:
    """The nodes that read the live output, and whether they read a token that starts from the latents."""
    span = _latent_span(pair.base, dependent)
    if span is None:
        return [(pair.value, pair.base in dependent)]
    dimension, start, stop = span
    readings, seen, todo = [], set[fx.Node](), [user for user in pair.value.users if user in flow.live]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        taken = _taken(node, dimension, tensor_of(pair.value).shape[dimension])
        if taken is not None:
            begin, end = taken
            readings.append((node, proven_less(start, end) and proven_less(begin, stop)))
        elif _keeps_tokens(node, pair.value):
            todo += [user for user in node.users if user in flow.live]
        else:
            readings.append((node, True))  # it may mix tokens
    return readings


def _latent_span(base: fx.Node, dependent: set[fx.Node]) -> tuple[int, Size, Size] | None:
    """Dimension and range of the joined tokens that start from the latents; `None` if nothing is joined."""
    node = base
    while not is_join(node):
        inputs = [source for source in node.all_input_nodes if source in dependent and _keeps_tokens(source, base)]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    parts = node.args[0] if isinstance(node.args[0], (list, tuple)) else []
    dimension = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(dimension, int) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    dimension %= tensor_of(node).ndim
    sizes = [tensor_of(part).shape[dimension] for part in parts if isinstance(part, fx.Node)]
    latent = [i for i, part in enumerate(parts) if part in dependent]
    if not latent:
        return dimension, 0, 0
    return dimension, sum(sizes[: latent[0]]), sum(sizes[: latent[-1] + 1])


def _keeps_tokens(node: fx.Node, like: fx.Node) -> bool:
    value = fake_value(node)
    return hasattr(value, "shape") and same_shape(value, tensor_of(like))


def _taken(node: fx.Node, dimension: int, size: Size) -> tuple[Size, Size] | None:
    """The first position that an indexing node takes along a dimension, and the end; `None` if it is no plain indexing.

    What a slice leaves out between them counts as taken.
    """
    if view_source(node) is None:
        return None
    if op_name(node) in ("slice", "select") and len(node.args) > 2:
        return _taken_by_aten(node, dimension, size)
    if op_name(node) != "getitem":
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(item is None or item is Ellipsis for item in index) or len(index) <= dimension:
        return None
    item = index[dimension]
    if isinstance(item, slice):
        return _between(_position(item.start, size, 0), _position(item.stop, size, size))
    first = _position(item, size, None)
    return None if first is None else (first, first + 1)


def _taken_by_aten(node: fx.Node, dimension: int, size: Size) -> tuple[Size, Size] | None:
    """The same for what export makes of an index: `slice(x, dim, start, stop, step)` and `select(x, dim, index)`."""
    source, along, *places = node.args
    if not isinstance(along, int) or along % tensor_of(source).ndim != dimension:  # type: ignore[arg-type]
        return None
    first = _position(places[0], size, 0)
    if op_name(node) == "select":
        return None if first is None else (first, first + 1)
    return _between(first, _position(places[1] if len(places) > 1 else None, size, size))


def _between(first: Size | None, end: Size | None) -> tuple[Size, Size] | None:
    return None if first is None or end is None else (first, end)


def _position(item: object, size: Size, otherwise: Size | None) -> Size | None:
    """An index counted from the front; `None` if it is no number, or one that may be of either sign."""
    if item is None:
        return otherwise
    value = fake_value(item) if isinstance(item, fx.Node) else item
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return None
    if proven_less(value, 0):
        return size + value
    return value if proven_less(-1, value) else None
