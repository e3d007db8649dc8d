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
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from teacache_fx.dataflow import Dataflow, view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.graph import op_name, written_arguments
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


@dataclass
class _Memory:
    """Who has to do with one storage. Collected once, since a storage may have as many writers as there are blocks.

    Attributes:
        first, last: of each part, the first and the last node that has.
        reader: the first node that reads it and is neither a view nor a writer.
        aside: a node of the epilogue that has, and does not take what leaves the stack.
        is_input: an input of the model lives in it.
        leaving, entering: values that leave the stack, and that it is entered with, that live in it.
    """

    first: dict[int, fx.Node] = field(default_factory=dict)
    last: dict[int, fx.Node] = field(default_factory=dict)
    reader: fx.Node | None = None
    aside: fx.Node | None = None
    is_input: bool = False
    leaving: list[fx.Node] = field(default_factory=list)
    entering: list[fx.Node] = field(default_factory=list)


def check_memory_order(flow: Dataflow, parts: Parts, pairs: list[LivePair], indicator: fx.Node) -> None:
    """Raises `Declined` (MUTATION_ACROSS_CUT) unless every write is safe by Note [Memory order]."""
    if not flow.writers:
        return
    part_of = {
        node: part for part, nodes in enumerate((parts.prologue, parts.blocks, parts.epilogue)) for node in nodes
    }
    part_of |= {node: _PROLOGUE for node in flow.nodes if node.op == "placeholder"}
    memories = _memories(flow, part_of, pairs)
    for storage, writers in flow.writers.items():
        live_writers = [writer for writer in writers if writer in part_of]
        for writer in live_writers:
            _check_writer(flow, writer, part_of[writer], memories[storage])
        for writer in live_writers:
            part = part_of[writer]
            is_late = flow.order[writer] > flow.order[indicator]
            if part != _BLOCKS and is_late and storage in flow.storages(indicator):
                raise _declined(writer, "it overwrites the modulated input, which is kept until the next step")
            if part == _PROLOGUE:
                _check_entering(flow, writer, memories[storage])


def _memories(flow: Dataflow, part_of: dict[fx.Node, int], pairs: list[LivePair]) -> dict[int, _Memory]:
    memories: dict[int, _Memory] = defaultdict(_Memory)
    cut = {pair.value for pair in pairs}
    for node in flow.nodes:
        if node not in part_of or op_name(node) in _SIZES:
            continue
        read = {storage for argument in node.all_input_nodes for storage in flow.storages(argument)}
        for storage in (read | flow.storages(node)) & flow.writers.keys():
            memory, part = memories[storage], part_of[node]
            memory.first.setdefault(part, node)
            memory.last[part] = node
            memory.is_input = memory.is_input or node.op == "placeholder"
            if memory.reader is None and storage in read and view_source(node) is None and not written_arguments(node):
                memory.reader = node
            if part == _EPILOGUE and cut.isdisjoint(node.all_input_nodes):
                memory.aside = node
    for pair in pairs:
        for storage in flow.storages(pair.value):
            memories[storage].leaving.append(pair.value)
        for storage in flow.storages(pair.base):
            memories[storage].entering.append(pair.base)
    return memories


def _check_writer(flow: Dataflow, writer: fx.Node, part: int, memory: _Memory) -> None:
    if part == _BLOCKS:
        if memory.is_input:
            raise _declined(writer, "a block writes to an input of the model")
        if _behind(flow, writer, memory.last, (_PROLOGUE,)):
            raise _declined(writer, "what runs on every step reads memory after a block has written to it")
        if memory.aside is not None:
            raise _declined(writer, "memory written by a block is read after the stack other than through its output")
    if part == _PROLOGUE:
        later = flow.sort(memory.first[other] for other in (_BLOCKS, _EPILOGUE) if other in memory.first)
        if later and flow.order[later[0]] < flow.order[writer]:
            raise _declined(writer, f"it overwrites what `{later[0].name}` has to read before")
    if part == _EPILOGUE and _behind(flow, writer, memory.last, (_PROLOGUE, _BLOCKS)):
        raise _declined(writer, "a block reads what the epilogue has written")
    if part != _PROLOGUE and len(set(memory.leaving)) > 1:
        raise _declined(writer, "two outputs of the stack share the memory that it writes")


def _behind(flow: Dataflow, writer: fx.Node, last: dict[int, fx.Node], parts: Iterable[int]) -> bool:
    return any(flow.order[last[part]] > flow.order[writer] for part in parts if part in last)


def _check_entering(flow: Dataflow, writer: fx.Node, memory: _Memory) -> None:
    """A write is late for what enters the stack, unless it is part of making it.

    It is if it reads nothing of the memory, and nothing has read it before.
    """
    is_late = any(flow.order[writer] > flow.order[base] for base in memory.entering)
    is_first = memory.reader is None or flow.order[writer] < flow.order[memory.reader]
    if is_late and not (is_first and op_name(writer) in _FILLS):
        raise _declined(writer, f"it overwrites `{memory.entering[0].name}`, which enters the stack")


def _declined(writer: fx.Node, why: str) -> Declined:
    return Declined(DeclineReason.MUTATION_ACROSS_CUT, f"`{op_name(writer)}`: {why}", writer.name)
