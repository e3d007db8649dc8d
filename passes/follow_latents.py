"""Holds that what a skipped step returns still follows the latents.

Note [Stale output]: a stack may carry tokens of its own beside those of the latents, such as a learned query, and the
model may read its output from these alone. Their residual is taken against a constant, so a skipped step would return
the same whatever the latents are.
"""

from __future__ import annotations

from torch import fx

from teacache_fx.dataflow import Dataflow, view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.graph import fake_value, is_join, op_name, same_shape, tensor_of
from teacache_fx.passes.pair_live_outputs import LivePair


def check_follows_latents(flow: Dataflow, pairs: list[LivePair], dependent: set[fx.Node]) -> None:
    """Raises `Declined` (STALE_OUTPUT) if all that is read from the stack are tokens which the latents do not enter."""
    readings = [reading for pair in pairs for reading in _readings(flow, pair, dependent)]
    if readings and not any(follows for _, follows in readings):
        node, _ = readings[0]
        detail = "the output is read from tokens of the stack that do not start from the latents"
        raise Declined(DeclineReason.STALE_OUTPUT, detail, node.name)


def _readings(flow: Dataflow, pair: LivePair, dependent: set[fx.Node]) -> list[tuple[fx.Node, bool]]:
    """The nodes that read the live output, and whether they read a token that starts from the latents."""
    span = _latent_span(pair.base, dependent)
    if span is None:
        return [(pair.value, pair.base in dependent)]
    dimension, start, stop = span
    readings, todo = [], [user for user in pair.value.users if user in flow.live]
    while todo:
        node = todo.pop()
        taken = _taken(node, dimension, tensor_of(pair.value).shape[dimension])
        if taken is not None:
            readings.append((node, any(start <= token < stop for token in taken)))
        elif _keeps_tokens(node, pair.value):
            todo += [user for user in node.users if user in flow.live]
        else:
            readings.append((node, True))  # it may mix tokens
    return readings


def _latent_span(base: fx.Node, dependent: set[fx.Node]) -> tuple[int, int, int] | None:
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
    if not all(isinstance(size, int) for size in sizes):
        return None
    latent = [i for i, part in enumerate(parts) if part in dependent]
    return dimension, sum(sizes[: latent[0]]), sum(sizes[: latent[-1] + 1])


def _keeps_tokens(node: fx.Node, like: fx.Node) -> bool:
    value = fake_value(node)
    return hasattr(value, "shape") and same_shape(value, tensor_of(like))


def _taken(node: fx.Node, dimension: int, size: int) -> range | None:
    """The positions that an indexing node takes along a dimension; `None` if it is no plain indexing."""
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
    if isinstance(item, int):
        return range(size)[item : item + 1 or None]
    if isinstance(item, slice) and all(bound is None or isinstance(bound, int) for bound in (item.start, item.stop)):
        return range(size)[item]
    return None


def _taken_by_aten(node: fx.Node, dimension: int, size: int) -> range | None:
    """The same for what export makes of an index: `slice(x, dim, start, stop, step)` and `select(x, dim, index)`."""
    numbers = [argument for argument in node.args[1:] if isinstance(argument, int)]
    if len(numbers) < len(node.args) - 1 or numbers[0] % tensor_of(node.args[0]).ndim != dimension:  # type: ignore[arg-type]
        return None
    if op_name(node) == "select":
        return range(size)[numbers[1] : numbers[1] + 1 or None]
    return range(size)[slice(*numbers[1:])]
