"""The contract that a graph keeps after every rewriting pass; checked by the observer, not a pass itself."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from teacache_fx.errors import VerificationError
from teacache_fx.graph import fake_tensors, fake_value, storages
from teacache_fx.passes.base import output_arguments


def verify(gm: fx.GraphModule, known: Collection[str], after: str) -> None:
    """Checks a rewritten graph.

    The graph lints; every node that is not among `known` (the names before rewriting) has a fake value; the branches
    of each cond agree in shape, dtype, device and stride, and none of their outputs aliases an operand or another.

    Args:
        gm: the graph after a pass.
        known: node names before rewriting.
        after: name of the pass, for the message.

    Raises:
        VerificationError: naming the pass and the node.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"after {after}: {error}") from error
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function") and node.name not in known and fake_value(node) is None:
            raise VerificationError(f"after {after}: new node `{node.name}` has no fake value")
        if node.target is torch.ops.higher_order.cond:
            _verify_cond(gm, node, after)


def _verify_cond(gm: fx.GraphModule, cond: fx.Node, after: str) -> None:
    _, *attributes, operands = cond.args
    branches = [gm.get_submodule(str(branch.target)) for branch in attributes if isinstance(branch, fx.Node)]
    described = []
    for branch in branches:
        assert isinstance(branch, fx.GraphModule)
        branch.graph.lint()
        outputs = [node for node in output_arguments(branch) if isinstance(node, fx.Node)]
        described.append([_describe(node) for node in outputs])
        placeholders = [node for node in branch.graph.nodes if node.op == "placeholder"]
        if len(placeholders) != len(operands):  # type: ignore[arg-type]
            raise VerificationError(f"after {after}: a branch takes {len(placeholders)} of {len(operands)} operands")  # type: ignore[arg-type]
        seen = {storage for node in placeholders for storage in storages(node)}
        for node in outputs:
            if storages(node) & seen:
                raise VerificationError(f"after {after}: `{node.name}` aliases an operand or another output")
            seen |= storages(node)
    if described[0] != described[1]:
        raise VerificationError(f"after {after}: the branches disagree: {described[0]} against {described[1]}")


def _describe(node: fx.Node) -> list[tuple[object, ...]]:
    return [(tuple(map(str, t.shape)), t.dtype, t.device, tuple(map(str, t.stride()))) for t in fake_tensors(node)]
