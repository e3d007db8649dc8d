"""Finds the repeated blocks that carry the latents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import approximate, is_matmul, total_flops
from teacache_fx.graph import block_of, op_name
from teacache_fx.passes.base import PassContext
from teacache_fx.passes.input_roles import find_latents
from teacache_fx.passes.pair_live_outputs import LivePair, describe_pair, pair_live_outputs
from teacache_fx.plan import BlockList, BlockStack

_Lists = dict[str, dict[int, list[fx.Node]]]
_Paired = tuple[_Lists, list[LivePair], set[fx.Node]]
_ATTENTION = {"scaled_dot_product_attention", "flex_attention", "softmax"}


@dataclass(frozen=True)
class FindBlockStack:
    """Finds the lists of repeated blocks that pass the latents on from one to the next, and the nodes they span.

        latents ─> x_embedder ─> [blocks.0 ─> blocks.1 ─> ... ─> single_blocks.0 ─> ...] ─> norm_out ─> proj_out
                                 └───────────────── region ─────────────────────────┘

    A list belongs to the stack if at least two of its elements are of one class, hold matrix products that depend on
    the latents, and lie one behind the other on the way of the latents; text refiners do not depend on the latents,
    parallel heads do not lie behind each other, and the layers of an MLP are no blocks of their own.

    Declines when: no input is like the output (NO_LATENTS), no such list exists (NO_REPEATED_BLOCKS), the graph is
    one block compiled by itself (SINGLE_BLOCK), or a live output matches no input of the stack (NO_MATCHING_INPUT).

    Does not handle: blocks without a module path; repetition of the op sequence would have to find those.

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
        latents = find_latents(gm)
        dependent = flow.forward([latents]) & flow.live
        lists = self._qualifying_lists(flow, dependent)
        if not lists:
            raise _no_stack(flow, dependent)
        lists, pairs, region = self._paired(flow, lists, dependent)
        ctx.stack = BlockStack(
            lists=tuple(_describe(path, blocks, flow) for path, blocks in lists.items()),
            latents=latents.name,
            region=tuple(node.name for node in flow.sort(region)),
            live_outputs=tuple(map(describe_pair, pairs)),
        )
        return False

    def _paired(self, flow: Dataflow, lists: _Lists, dependent: set[fx.Node]) -> _Paired:
        """The lists with a residual for what leaves them.

        Image refiners come before text joins the sequence: of the whole nothing that enters is shaped like what leaves.
        So if need be the first list is left outside, as long as most of the work remains.
        """
        refusal: Declined | None = None
        for first in range(len(lists)):
            kept = dict(list(lists.items())[first:])
            if refusal is not None and _flops(kept) < self.smallest_rest * _flops(lists):
                break
            owned = {node for blocks in kept.values() for nodes in blocks.values() for node in nodes}
            core = _between(flow, owned & dependent) & flow.live
            try:
                return kept, *pair_live_outputs(flow, core, dependent)
            except Declined as declined:
                refusal = refusal or declined
                if declined.reason is not DeclineReason.NO_MATCHING_INPUT:
                    break
        assert refusal is not None
        raise refusal

    def _qualifying_lists(self, flow: Dataflow, dependent: set[fx.Node]) -> _Lists:
        lists = _blocks_of_lists(flow.sort(dependent))
        chains = {path: blocks for path, blocks in lists.items() if _is_repeated(blocks) and _is_chain(blocks, flow)}
        weights = {path: _flops({path: blocks}) for path, blocks in chains.items()}
        least = self.smallest_share * max(weights.values(), default=0.0)
        return {path: blocks for path, blocks in chains.items() if weights[path] >= least}


def _blocks_of_lists(nodes: Iterable[fx.Node]) -> _Lists:
    lists: dict[str, dict[int, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    for node in nodes:
        if node.op != "placeholder" and (owner := block_of(node)):
            lists[owner[0]][owner[1]].append(node)
    with_matmuls = {
        path: {index: nodes for index, nodes in blocks.items() if any(map(is_matmul, nodes))}
        for path, blocks in lists.items()
    }
    return {path: blocks for path, blocks in with_matmuls.items() if len(blocks) >= 2}


def _is_repeated(blocks: dict[int, list[fx.Node]]) -> bool:
    """At least two elements are of one class and are more than a single layer."""
    composite = [block_class(nodes) for nodes in blocks.values() if sum(map(is_matmul, nodes)) >= 2]
    return len(composite) > len(set(composite))


def _is_chain(blocks: dict[int, list[fx.Node]], flow: Dataflow) -> bool:
    """Each element that has a predecessor in the list depends on one; parallel heads and experts do not."""
    ordered = sorted(blocks.values(), key=lambda nodes: flow.order[nodes[0]])
    behind_first = flow.forward(ordered[0])
    last_matmuls = [node for node in ordered[-1] if is_matmul(node)]
    return any(node in behind_first for node in last_matmuls)


def _between(flow: Dataflow, nodes: set[fx.Node]) -> set[fx.Node]:
    """The nodes and everything on a way from one of them to another."""
    return flow.forward(nodes) & flow.backward(nodes)


def _flops(lists: _Lists) -> float:
    return approximate(sum(total_flops(_flat(blocks)) for blocks in lists.values()))


def _flat(blocks: dict[int, list[fx.Node]]) -> list[fx.Node]:
    return [node for nodes in blocks.values() for node in nodes]


def block_class(nodes: list[fx.Node]) -> str:
    """Class name of the list element that the nodes belong to."""
    return next((owner[2] for node in nodes if (owner := block_of(node))), "")


def _describe(path: str, blocks: dict[int, list[fx.Node]], flow: Dataflow) -> BlockList:
    classes = tuple(dict.fromkeys(block_class(nodes) for nodes in blocks.values()))
    kinds = {tuple(op_name(node) for node in flow.sort(nodes)) for nodes in blocks.values()}
    return BlockList(path, len(blocks), classes, len(kinds))


def _no_stack(flow: Dataflow, dependent: set[fx.Node]) -> Declined:
    heavy = [node for node in flow.sort(dependent) if is_matmul(node)]
    attention = [n for n in flow.sort(dependent) if op_name(n) in _ATTENTION and not block_of(n)]
    if attention:
        detail = "the graph holds attention outside any list of blocks: one block, compiled by itself"
        return Declined(DeclineReason.SINGLE_BLOCK, detail, attention[0].name)
    detail = f"{len(heavy)} matrix products depend on the latents, none in a list of repeated blocks"
    return Declined(DeclineReason.NO_REPEATED_BLOCKS, detail, heavy[0].name if heavy else None)
