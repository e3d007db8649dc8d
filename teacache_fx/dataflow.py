"""Who needs what in a graph, in-place writes included.

An FX edge says that a node takes another's value. It does not say that `out[..., 0::2] = x` must come along when `out`
is taken. Here a node needs its arguments and every earlier writer to the memory that it reads, so that a slice which
holds a tensor holds the writers to it too.

Note [Chains of writers]: a block stack that adds to one tensor has as many writers to it as layers, and more readers.
An edge from each reader to each writer before it would be a square of edges. A writer also reads what it writes to. So
one edge to the last writer is enough, and leads on from there to the others; a search that must not enter one of them
goes past it, to the writer before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx

from teacache_fx.graph import fake_value, is_unbacked, occupies, op_name, storages, written_arguments

_MODES = (
    "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode",
    "_sdpa_kernel",
)  # fmt: skip
_MAKERS = ("empty_like", "full_like", "new_", "ones_like", "rand_like", "randn_like", "zeros_like")
_LIKE_OTHERS = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
_Edges = dict[fx.Node, list[fx.Node]]
_MemoryEdges = defaultdict[fx.Node, list[tuple[int, fx.Node]]]  # each with the storage that it is about


class Dataflow:
    """Dependencies of one graph. A snapshot: build it anew after an edit.

    Attributes:
        order: position of each node in the graph.
        predecessors: arguments of a node and the last earlier writer to each memory that it reads, as in Note [Chains
            of writers]; and of the nodes inside a functorch transform all the others, since it can only be moved as a
            whole.
        successors: the converse.
        writers: for each storage that is written at all, its writers in graph order.
        live: the nodes that an output, a write to an input or an effect needs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: position for position, node in enumerate(self.nodes)}
        self.writers: dict[int, list[fx.Node]] = {}
        self.predecessors: _Edges = {}
        self.successors: _Edges = {node: [] for node in self.nodes}
        self._writers_before: _MemoryEdges = defaultdict(list)
        self._readers_behind: _MemoryEdges = defaultdict(list)
        self._storages: dict[fx.Node, set[int]] = {}
        for node in self.nodes:
            self._add(node)
        for stretch in transforms(self.nodes):
            for node in stretch:
                self._tie(node, stretch[0])
        self.live = self.backward(self._roots())

    def _add(self, node: fx.Node) -> None:
        needed = dict.fromkeys(node.all_input_nodes)
        if self.writers:
            read = {storage for argument in needed for storage in self.storages(argument)}
            for storage in read & self.writers.keys():
                writer = self.writers[storage][-1]
                needed[writer] = None
                self._writers_before[node].append((storage, writer))
                self._readers_behind[writer].append((storage, node))
        self.predecessors[node] = list(needed)
        for predecessor in needed:
            self.successors[predecessor].append(node)
        for argument in written_arguments(node):
            for storage in self.storages(argument):
                self.writers.setdefault(storage, []).append(node)

    def _tie(self, node: fx.Node, other: fx.Node) -> None:
        """Makes two nodes need each other."""
        for one, two in ((node, other), (other, node)):
            self.predecessors[one].append(two)
            self.successors[two].append(one)

    def _roots(self) -> list[fx.Node]:
        roots = [node for node in self.nodes if node.op == "output" or is_mode(node) or is_assertion(node)]
        for node in self.nodes:
            if node.op == "placeholder" and self.writers:
                roots += [writer for storage in self.storages(node) for writer in self.writers.get(storage, [])]
        return roots

    def storages(self, node: fx.Node) -> set[int]:
        """Identities of the storages that the node's tensors live in; remembered, for a node may have many tensors."""
        if node not in self._storages:
            self._storages[node] = storages(node)
        return self._storages[node]

    def backward(self, starts: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
        """All that the starts need, themselves included; what lies only behind a node of `stop` is left out."""
        return _reach(starts, self.predecessors, self._writers_before, stop)

    def forward(self, starts: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
        """All that depends on the starts, themselves included, other than through a node of `stop` alone."""
        return _reach(starts, self.successors, self._readers_behind, stop)

    def carried(self, starts: Iterable[fx.Node]) -> set[fx.Node]:
        """All that is computed from the values of the starts, themselves included.

        What takes no more of them than shape, dtype or device does not depend on them: `temb.type_as(hidden_states)`.
        Memory that they are written into does: `hidden_states.new_zeros(shape)`, once tokens have been put there.
        """
        reached, todo = set[fx.Node](), list(starts)
        while todo:
            node = todo.pop()
            if node not in reached:
                reached.add(node)
                users = (user for user in self.successors[node] if not takes_only_form(user, node))
                todo += [user for user in users if not _is_form(user)]
        filled = {storage for storage, writers in self.writers.items() if not reached.isdisjoint(writers)}
        return reached | {node for node in self.nodes if filled and self.storages(node) & filled}

    def sort(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes in graph order."""
        return sorted(nodes, key=self.order.__getitem__)


def _reach(starts: Iterable[fx.Node], edges: _Edges, memory: _MemoryEdges, stop: Collection[fx.Node]) -> set[fx.Node]:
    reached, passed = set[fx.Node](), set[tuple[int, fx.Node]]()
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node not in reached and node not in stop:
            reached.add(node)
            todo.extend(edges[node])
            if stop and node in memory:
                todo.extend(_past(memory[node], memory, stop, passed))
    return reached


def _past(
    steps: list[tuple[int, fx.Node]], memory: _MemoryEdges, stop: Collection[fx.Node], passed: set[tuple[int, fx.Node]]
) -> Iterator[fx.Node]:
    """What the steps lead to past nodes of `stop`, along the memory that each step is about."""
    todo = list(steps)
    while todo:
        storage, node = step = todo.pop()
        if node in stop and step not in passed:
            passed.add(step)
            further = [(about, other) for about, other in memory.get(node, ()) if about == storage]
            todo += further
            yield from (other for _, other in further)


def transforms(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """The stretches of the graph inside functorch transforms, such as the vmap that builds a block mask.

    Each begins by raising the level of nesting and ends by lowering it to where it was.
    """
    stretches: list[list[fx.Node]] = []
    level = 0
    for node in nodes:
        is_entry = op_name(node).endswith("_increment_nesting")
        if is_entry and level == 0:
            stretches.append([])
        level += is_entry
        if level > 0:
            stretches[-1].append(node)
        level -= op_name(node).endswith("_decrement_nesting")
    return stretches


def takes_only_form(user: fx.Node, node: fx.Node) -> bool:
    """Whether the user takes the shape, dtype or device of the node, and none of its values."""
    name, is_first = op_name(user), bool(user.args) and user.args[0] is node
    return (is_first and name.startswith(_MAKERS)) or (not is_first and name in _LIKE_OTHERS)


def _is_form(node: fx.Node) -> bool:
    """Whether the node yields sizes alone, which follow from shapes; a number read from a tensor's values is none."""
    leaves = torch.utils._pytree.tree_leaves(fake_value(node))
    return all(isinstance(leaf, (int, torch.SymInt, torch.Size)) and not is_unbacked(leaf) for leaf in leaves)


def is_mode(node: fx.Node) -> bool:
    """Whether the node switches a mode (autocast, grad, attention kernels) for the nodes that follow it."""
    return op_name(node) in _MODES


def is_assertion(node: fx.Node) -> bool:
    """Whether the node checks something, and gives back nothing that anybody takes."""
    name = op_name(node)
    return name.startswith(("_assert", "sym_constrain")) or name == "_check"


def view_source(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the node's value lies in, or `None` if the value is memory of its own.

    Covers views, tuples of views (chunk, split), no-op casts and the result of an in-place write.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    own = storages(node)
    if not own:
        return None
    source = next((argument for argument in node.all_input_nodes if occupies(argument, own)), None)
    if source is None or isinstance(fake_value(source), torch.Tensor):
        return source
    is_view = any(occupies(argument, own) for argument in source.all_input_nodes)
    return source if is_view else None  # one of several fresh results, such as of topk
