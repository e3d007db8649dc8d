"""Cuts the graph into prologue, blocks and epilogue by liveness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from teacache_fx.costs import measure
from teacache_fx.dataflow import Dataflow, is_assertion, is_mode, view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.fragments import CALL_INPUTS
from teacache_fx.graph import argument_name, fake_tensors, fake_value, is_unbacked, op_name
from teacache_fx.passes.base import PassContext, nodes_by_name, output_arguments
from teacache_fx.passes.follow_latents import check_follows_latents
from teacache_fx.passes.input_roles import all_latents, conditioning_inputs, steady_inputs
from teacache_fx.passes.memory_order import Parts, check_memory_order
from teacache_fx.passes.pair_live_outputs import LivePair
from teacache_fx.plan import Partition


@dataclass(frozen=True)
class PartitionGraph:
    """Decides for every node whether a skipped step still needs it. The blocks get all that only they need.

        cut at the stack's live outputs; then, backwards from (model outputs, modulated_input, stack inputs):

        x_embedder ─> norm1 ─> ... blocks ... ─┼─> norm_out ─> proj_out       reached before the cut: prologue
        temb ───────────┴───────────┘          │      │                       reached and behind it: epilogue
        rotary table, text projection ──┘   temb ─────┘                       not reached: blocks

    Rotary tables, text projections, per-block modulations and text refiners thus cost nothing on a skipped step.

    Requires: the block stack, the modulation.
    Declines when: an in-place write would be seen in another order than before (MUTATION_ACROSS_CUT), a mode is
    switched inside the graph (MODE_ACROSS_CUT), the residual's shape depends on values (UNKNOWN_STATE_SHAPE), or the
    output is read from tokens that the latents do not enter (STALE_OUTPUT), a varying float enters the blocks
    (VARYING_FLOAT), or a skipped step would save too little to be worth its error (LITTLE_TO_SKIP).

    Attributes:
        largest_share: of a computed step's FLOPs that a skipped one may pay.
    """

    name: str = "partition-graph"
    largest_share: float = 0.6

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        assert ctx.stack is not None
        assert ctx.modulation is not None
        flow, by_name = ctx.dataflow(gm), nodes_by_name(gm)
        latents, indicator = by_name[ctx.stack.latents], by_name[ctx.modulation.modulated_input]
        timestep = by_name[ctx.modulation.timestep]
        pairs = [LivePair(by_name[live.value], by_name[live.base]) for live in ctx.stack.live_outputs]
        region = {by_name[name] for name in ctx.stack.region}
        live = flow.live | flow.backward([indicator])  # an extractor may compute the indicator beside the blocks
        parts = _split(gm, flow, pairs, region, (indicator, timestep), live)
        outputs = [node for node in output_arguments(gm) if isinstance(node, fx.Node)]
        check_follows_latents(flow, pairs, flow.carried(all_latents(flow, latents, ctx.is_fragment)), outputs)
        check_memory_order(flow, parts, pairs, indicator)
        _check_modes(flow)
        _check_shapes([indicator, *(pair.value for pair in pairs)])
        if ctx.is_fragment:
            steady, times = ([by_name[name]] for name in CALL_INPUTS[1:])
        else:
            steady, times = steady_inputs(flow, latents, timestep)
        operands = _operands(flow, parts.blocks, pairs)
        ctx.partition = Partition(
            prologue=_names(parts.prologue),
            blocks=_names(parts.blocks),
            epilogue=_names(parts.epilogue),
            dead=_names(node for node in flow.nodes if node not in live and node.op != "placeholder"),
            operands=_names(operands),
            conditioning=() if ctx.is_fragment else _names(conditioning_inputs(steady)),
            steady=_names(steady),
            further_times=_names(times),
        )
        state = [indicator, *(pair.value for pair in pairs), latents]
        inputs = [node for node in flow.nodes if node.op == "placeholder"]
        ctx.costs = measure((parts.prologue, parts.blocks, parts.epilogue), state, inputs, latents)
        if (share := ctx.costs.skipped_share) > self.largest_share:
            raise _little_to_skip(share, flow, region)
        return False


def _little_to_skip(share: float, flow: Dataflow, region: set[fx.Node]) -> Declined:
    """The reason may be that the blocks write to memory of the caller or of the model, which each step has to do."""
    paid = f"a skipped step would pay {share:.0%} of a computed one's FLOPs"
    inputs = (node for node in flow.nodes if node.op == "placeholder")
    written = [(node, writer) for node in inputs for writer in _writers(flow, node) if writer in region]
    if not written:
        return Declined(DeclineReason.LITTLE_TO_SKIP, paid)
    node, writer = written[0]
    detail = f"the blocks write to `{argument_name(node)}`, which outlives the step, so {paid}"
    return Declined(DeclineReason.MUTATION_ACROSS_CUT, detail, writer.name)


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _split(
    gm: fx.GraphModule,
    flow: Dataflow,
    pairs: list[LivePair],
    region: set[fx.Node],
    needed: Iterable[fx.Node],
    live: set[fx.Node],
) -> Parts:
    cut = {pair.value for pair in pairs}
    # Who reads a live output needs no other writer to its memory: the branch gives back a copy of the finished value.
    written = {writer for value in cut for writer in _writers(flow, value)} & region
    # The output node itself: what it returns may have been written to behind the stack, `out[:, index] = sample`.
    starts = [gm.graph.output_node(), *needed, *(pair.base for pair in pairs)]
    starts += [writer for node in flow.nodes if node.op == "placeholder" for writer in _writers(flow, node)]
    behind_cut = flow.forward(cut)
    # Nobody takes an assertion's result. One that compares with what is inside the stack can only be made there.
    inside = flow.forward(region - cut, stop=cut)
    starts += [node for node in behind_cut if is_assertion(node) and node not in inside]
    keep = flow.backward(starts, stop=cut | written) & live
    keep |= {node for node in live if op_name(node) == "getitem" and keep & set(_tuple_source(node))}
    behind = behind_cut & keep
    inner = [node for node in flow.sort(live) if node.op not in ("placeholder", "output")]
    return Parts(
        prologue=[node for node in inner if node in keep and node not in behind],
        blocks=[node for node in inner if node not in keep],
        epilogue=[node for node in inner if node in behind],
    )


def _tuple_source(node: fx.Node) -> list[fx.Node]:
    """The several results that the node picks one of; only the pick, not the tuple, can enter a branch."""
    return [source for source in node.all_input_nodes if isinstance(fake_value(source), (tuple, list))]


def _writers(flow: Dataflow, node: fx.Node) -> list[fx.Node]:
    return [writer for storage in flow.storages(node) for writer in flow.writers.get(storage, [])]


def _operands(flow: Dataflow, blocks: list[fx.Node], pairs: list[LivePair]) -> list[fx.Node]:
    """Values that the branches take in: never a view of another, never a tuple, never an attribute of the graph.

    A view is derived anew inside the branch from the memory that it looks at, because cond allows no two operands to
    alias.
    """
    inside = set(blocks)
    outside = dict.fromkeys(argument for node in blocks for argument in node.all_input_nodes if argument not in inside)
    outside.update(dict.fromkeys(pair.base for pair in pairs))
    roots, seen = dict[fx.Node, None](), set[fx.Node]()
    todo = list(outside)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if view_source(node) is not None:
            todo += node.all_input_nodes  # sizes of a view may be values too
        elif not (node.op == "get_attr" and fake_value(node) is None):
            roots[node] = None
    for node in flow.sort(roots):
        if isinstance(fake_value(node), (float, torch.SymFloat)):
            detail = "a number that changes between calls enters the blocks, and a cond takes tensors only"
            raise Declined(DeclineReason.VARYING_FLOAT, detail, node.name)
    return flow.sort(roots)


def _check_modes(flow: Dataflow) -> None:
    for node in flow.nodes:
        if is_mode(node):
            raise Declined(DeclineReason.MODE_ACROSS_CUT, f"`{op_name(node)}` inside forward", node.name)


def _check_shapes(nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        for size in fake_tensors(node)[0].shape:
            if is_unbacked(size):
                detail = f"size {size} of the state is known only after running the model"
                raise Declined(DeclineReason.UNKNOWN_STATE_SHAPE, detail, node.name)
