"""Finds the repeated blocks that carry the latents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import captured_flops, is_matmul
from teacache_fx.graph import op_name
from teacache_fx.module_paths import block_of, numbered_block_of
from teacache_fx.passes.base import PassContext
from teacache_fx.passes.block_lists import (
    Blocks,
    are_stages,
    blocks_by_module,
    hands_over,
    have_shapes_in_common,
    is_chain,
    is_repeated,
    keeps_shapes,
)
from teacache_fx.passes.input_roles import all_latents, embedded_latents, find_latents
from teacache_fx.passes.pair_live_outputs import LivePair, describe_pairs, pair_live_outputs
from teacache_fx.passes.repetition import blocks_by_repetition
from teacache_fx.plan import BlockStack

_Paired = tuple[list[Blocks], list[LivePair], set[fx.Node]]
_ATTENTION = {"scaled_dot_product_attention", "flex_attention", "softmax"}


@dataclass(frozen=True)
class FindBlockStack:
    """Finds the lists of repeated blocks that pass the latents on from one to the next, and the nodes they span.

        latents ─> x_embedder ─> [blocks.0 ─> blocks.1 ─> ... ─> single_blocks.0 ─> ...] ─> norm_out ─> proj_out
                                 └───────────────── region ─────────────────────────┘

    A list belongs to the stack if at least two of its elements are of one class, hold matrix products that depend on
    the latents, and lie one behind the other on the way of the latents; text refiners do not depend on the latents,
    parallel heads do not lie behind each other, and the layers of an MLP are no blocks of their own. Where lists
    of modules leave most of the work to others, numbered attributes may tell, and then the repetition of the matrix
    products.

    Declines when: no input is like the output (NO_LATENTS), no such list exists (NO_REPEATED_BLOCKS), the graph is
    one block compiled by itself (SINGLE_BLOCK), the blocks are those of a U-Net (CHANGING_SHAPES), or a live output
    matches no input of the stack (NO_MATCHING_INPUT).

    Attributes:
        smallest_share: lists with less than this share of the largest list's FLOPs are not part of the stack.
        smallest_rest: first lists may be left out as long as this share of all lists' FLOPs remains.
    """

    name: str = "find-block-stack"
    smallest_share: float = 0.02
    smallest_rest: float = 0.5

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        if ctx.stack is not None:
            return False
        flow = ctx.dataflow(gm)
        refusal: Declined | None = None
        for latents in _latents(gm, ctx.is_fragment):
            try:
                ctx.stack = self._stack(flow, all_latents(flow, latents, ctx.is_fragment))
                return False
            except Declined as declined:
                refusal = refusal or declined
        assert refusal is not None
        raise refusal

    def _stack(self, flow: Dataflow, every: list[fx.Node]) -> BlockStack:
        latents, carried = every[0], flow.carried(every)
        dependent = flow.forward(every) & flow.live  # with sizes and the checks of them, to come along
        lists = [b for b in _qualifying_lists(flow, dependent, self.smallest_share) if b.last_matmul in carried]
        if not lists:
            raise _no_stack(flow, dependent & carried)
        lists, pairs, region = self._paired(flow, lists, dependent, carried)
        return BlockStack(
            lists=tuple(blocks.describe() for blocks in lists),
            latents=latents.name,
            region=tuple(node.name for node in flow.sort(region)),
            live_outputs=describe_pairs(pairs, flow, latents),
        )

    def _paired(self, flow: Dataflow, lists: list[Blocks], dependent: set[fx.Node], carried: set[fx.Node]) -> _Paired:
        """The lists with a residual for what leaves them.

        Image refiners come before text joins the sequence: of the whole nothing that enters is shaped like what leaves.
        So if need be the first list is left outside, as long as most of the work remains.
        """
        refusal: Declined | None = None
        for first in range(len(lists)):
            kept = lists[first:]
            if refusal is not None and _work(kept) < self.smallest_rest * _work(lists):
                break
            owned = {node for blocks in kept for node in blocks.nodes}
            core = _between(flow, owned & dependent) & flow.live
            try:
                return kept, *pair_live_outputs(flow, core, carried, set(kept[0].elements[0]))
            except Declined as declined:
                refusal = refusal or declined
                if declined.reason is not DeclineReason.NO_MATCHING_INPUT:
                    break
        assert refusal is not None
        if refusal.reason is DeclineReason.NO_MATCHING_INPUT and _are_apart(lists):
            detail = f"each of the {len(lists)} lists of blocks works on shapes of its own; {refusal.detail}"
            raise Declined(DeclineReason.CHANGING_SHAPES, detail, refusal.node)
        raise refusal


def _are_apart(lists: Sequence[Blocks]) -> bool:
    """There are several, as in a ResNet, and no two neighbours do any matrix product on the same shapes."""
    pairs = list(itertools.pairwise(lists))
    return bool(pairs) and not any(have_shapes_in_common(left.nodes, right.nodes) for left, right in pairs)


def _latents(gm: fx.GraphModule, is_fragment: bool) -> list[fx.Node]:
    """Inputs that may be the latents, the likeliest first."""
    if is_fragment and (candidates := embedded_latents(gm)):
        return candidates
    return [find_latents(gm)]


def _qualifying_lists(flow: Dataflow, dependent: set[fx.Node], smallest_share: float) -> list[Blocks]:
    """The lists of blocks that carry the latents, in order of execution.

    Raises:
        Declined: CHANGING_SHAPES, if most of the work is done in blocks that change the shape of what they carry.
    """
    chains = _chains(flow, dependent)
    even = [blocks for blocks in chains if keeps_shapes(blocks)]
    uneven = [blocks for blocks in chains if blocks not in even]
    if uneven and _work(uneven) > _work(even):
        largest = max(uneven, key=lambda blocks: blocks.work)
        detail = f"no two of the {len(largest.elements)} blocks in `{largest.path}` work on the same shapes"
        raise Declined(DeclineReason.CHANGING_SHAPES, detail, largest.elements[0][0].name)
    least = smallest_share * max((blocks.work for blocks in even), default=0.0)
    return [blocks for blocks in even if blocks.work >= least]


def _chains(flow: Dataflow, dependent: set[fx.Node]) -> list[Blocks]:
    """Lists of modules; where these leave most of the work to others, numbered attributes and what repeats itself too.

    A list of refiners may stand before blocks that are no list.
    """
    total = captured_flops(dependent)
    chains: list[Blocks] = []
    for find in (_listed, _numbered, blocks_by_repetition):
        if 2 * _work(chains) < total or not chains:
            rest = dependent.difference(*(blocks.nodes for blocks in chains))
            chains += [blocks for blocks in find(flow, rest) if is_chain(blocks, flow)]
    return sorted(chains, key=lambda blocks: flow.order[blocks.elements[0][0]])


def _listed(flow: Dataflow, nodes: set[fx.Node]) -> list[Blocks]:
    return [blocks for blocks in blocks_by_module(flow.sort(nodes)) if is_repeated(blocks) or are_stages(blocks)]


def _numbered(flow: Dataflow, nodes: set[fx.Node]) -> list[Blocks]:
    found = blocks_by_module(flow.sort(nodes), numbered_block_of)
    return [blocks for blocks in found if is_repeated(blocks) and hands_over(blocks)]


def _between(flow: Dataflow, nodes: set[fx.Node]) -> set[fx.Node]:
    """The nodes and everything on a way from one of them to another."""
    return flow.forward(nodes) & flow.backward(nodes)


def _work(lists: Sequence[Blocks]) -> float:
    return sum(blocks.work for blocks in lists)


def _no_stack(flow: Dataflow, dependent: set[fx.Node]) -> Declined:
    heavy = [node for node in flow.sort(dependent) if is_matmul(node)]
    attention = [n for n in flow.sort(dependent) if op_name(n) in _ATTENTION and not block_of(n)]
    elsewhere = [blocks for blocks in _listed(flow, flow.live - dependent) if is_chain(blocks, flow)]
    detail = f"{len(heavy)} matrix products depend on the latents, none in a list of repeated blocks"
    if elsewhere:
        detail += f"; the {len(elsewhere[0].elements)} blocks in `{elsewhere[0].path}` do not depend on them"
    elif attention:
        detail = "the graph holds attention outside any list of blocks: one block, compiled by itself"
        return Declined(DeclineReason.SINGLE_BLOCK, detail, attention[0].name)
    return Declined(DeclineReason.NO_REPEATED_BLOCKS, detail, heavy[0].name if heavy else None)
