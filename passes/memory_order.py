"""Holds that no in-place write is seen in another order after the cut than before it.

Note [Memory order]: within a part, nodes keep their order; between parts, all of the prologue runs before all of the
blocks, and these before the epilogue. A write is therefore safe if (a) it is in the blocks, the prologue is done with
the memory, which is no input of the model (the branch writes to a copy), and the epilogue sees it only as the one
tensor that leaves through the cut; (b) it is in the prologue and no node of a later
part reads the memory before it; (c) it is in the epilogue and nothing that it overwrites is kept as state or leaves
the stack twice. Everything else is declined: a wrong picture is worse than no cache.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow, view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.graph import op_name, storages, written_arguments
from teacache_fx.passes.pair_live_outputs import LivePair

_SIZES = {"size", "sym_size", "numel", "sym_numel", "stride", "sym_stride", "dim"}  # these look at no element
_FILLS = {"setitem", "__setitem__", "copy_", "fill_", "zero_", "index_copy_", "index_put_", "masked_scatter_"}
_PROLOGUE, _BLOCKS, _EPILOGUE = range(3)


@dataclass(frozen=True)
class Parts:
    """The three parts as nodes, each in graph order."""

    prologue: list[fx.Node]
    blocks: list[fx.Node]
    epilogue: list[fx.Node]


def check_memory_order(flow: Dataflow, parts: Parts, pairs: list[LivePair], indicator: fx.Node) -> None:
    """Raises `Declined` (MUTATION_ACROSS_CUT) unless every write is safe by Note [Memory order]."""
    if not flow.writers:
        return
    part_of = {
        node: part for part, nodes in enumerate((parts.prologue, parts.blocks, parts.epilogue)) for node in nodes
    }
    part_of |= {node: _PROLOGUE for node in flow.nodes if node.op == "placeholder"}
    cut = {pair.value for pair in pairs}
    touching = _touching(flow, part_of)
    for storage, writers in flow.writers.items():
        live_writers = [writer for writer in writers if writer in part_of]
        leaving = [value for value in cut if storage in storages(value)]
        for writer in live_writers:
            _check_writer(flow, writer, part_of, touching[storage], leaving, cut)
        kept = [writer for writer in live_writers if part_of[writer] != _BLOCKS]
        for writer in kept:
            if storage in storages(indicator) and flow.order[writer] > flow.order[indicator]:
                raise _declined(writer, "it overwrites the modulated input, which is kept until the next step")
            entered = [pair.base for pair in pairs if storage in storages(pair.base)]
            is_late = any(flow.order[writer] > flow.order[base] for base in entered)
            if part_of[writer] == _PROLOGUE and is_late and not _fills(flow, writer, storage, touching[storage]):
                raise _declined(writer, f"it overwrites `{entered[0].name}`, which enters the stack")


def _touching(flow: Dataflow, part_of: dict[fx.Node, int]) -> dict[int, list[fx.Node]]:
    touching: dict[int, list[fx.Node]] = defaultdict(list)
    for node in flow.nodes:
        if node in part_of and op_name(node) not in _SIZES:
            involved = {s for argument in (node, *node.all_input_nodes) for s in storages(argument)}
            for storage in involved & flow.writers.keys():
                touching[storage].append(node)
    return touching


def _fills(flow: Dataflow, writer: fx.Node, storage: int, touching: list[fx.Node]) -> bool:
    """Whether the write is part of making the value: it reads nothing of the memory, and nothing has read it before."""
    if op_name(writer) not in _FILLS:
        return False
    earlier = (node for node in touching if flow.order[node] < flow.order[writer])
    reading = (node for node in earlier if view_source(node) is None and not written_arguments(node))
    return not any(storage in storages(argument) for node in reading for argument in node.all_input_nodes)


def _check_writer(
    flow: Dataflow,
    writer: fx.Node,
    part_of: dict[fx.Node, int],
    touching: list[fx.Node],
    leaving: list[fx.Node],
    cut: set[fx.Node],
) -> None:
    part = part_of[writer]
    if part == _BLOCKS:
        if any(node.op == "placeholder" for node in touching):
            raise _declined(writer, "a block writes to an input of the model")
        if any(part_of[node] == _PROLOGUE and flow.order[node] > flow.order[writer] for node in touching):
            raise _declined(writer, "what runs on every step reads memory after a block has written to it")
        if any(part_of[node] == _EPILOGUE and not cut & set(node.all_input_nodes) for node in touching):
            raise _declined(writer, "memory written by a block is read after the stack other than through its output")
    if part == _PROLOGUE:
        early = [n for n in touching if part_of[n] != _PROLOGUE and flow.order[n] < flow.order[writer]]
        if early:
            raise _declined(writer, f"it overwrites what `{early[0].name}` has to read before")
    if part == _EPILOGUE and any(part_of[n] != _EPILOGUE and flow.order[n] > flow.order[writer] for n in touching):
        raise _declined(writer, "a block reads what the epilogue has written")
    if part != _PROLOGUE and len(leaving) > 1:
        raise _declined(writer, "two outputs of the stack share the memory that it writes")


def _declined(writer: fx.Node, why: str) -> Declined:
    return Declined(DeclineReason.MUTATION_ACROSS_CUT, f"`{op_name(writer)}`: {why}", writer.name)
