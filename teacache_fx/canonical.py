"""Words for the values of a captured graph that do not depend on how dynamo has numbered its nodes.

Note [Names that stay]: a value is called by its module path and operation, `attn.to_q.linear`. Where several operations
of a block share that name, it is the last one before the line that speaks of it; `attn.mul~1` is the one before the
last, and so on. So an operation that is put in changes its own line and those of its users, and none besides, except
where a name is looked up across it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from typing import Any

import sympy
import torch
from torch import fx

from teacache_fx.graph import fake_value, is_user_input, op_name, source_name
from teacache_fx.module_paths import module_path
from teacache_fx.render import describe, describe_dtype, weight_path
from teacache_fx.segments import Segment, is_inlined, is_size, local_name

Source = tuple[fx.Node, str]  # a value, and what is picked of it, such as `[0][:, None]`


class Words:
    """Says what nodes yield, take and are called.

    Args:
        segments: the graph, cut into blocks and what is between them.

    Attributes:
        taken: for each block the values that it takes from elsewhere and no other block of its list does, with a name
            that they go by inside the block.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self._home = {node: segment for segment in segments for node in segment.nodes}
        self._order = {node: position for position, node in enumerate(self._home)}
        self._places: dict[tuple[Segment | None, str], list[int]] = {}
        self._starts: dict[str, int] = {}
        for node, segment in self._home.items():
            self._places.setdefault(self._scope(node), []).append(self._order[node])
            if segment.block:
                self._starts.setdefault(segment.path, self._order[node])
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.taken: dict[Segment, dict[Source, str]] = {}
        self._kinds: dict[Source, str] = {}
        self._name_taken([segment for segment in segments if segment.block])

    def kind(self, value: Any) -> str:
        """Dtype and shape of what a node yields: `f32[1, 16, 32]`, `6 x f32[1, 32]`."""
        if isinstance(value, (tuple, list)):
            kinds = [self.kind(item) for item in value]
            return f"{len(kinds)} x {kinds[0]}" if len(set(kinds)) == 1 else f"({', '.join(kinds)})"
        return self.size(value) if isinstance(value, _SYMBOLIC) else describe(value, self.size)

    def size(self, value: Any) -> str:
        """A size. Symbols are numbered as they appear: dynamo's numbers differ between its versions."""
        if not isinstance(value, _SYMBOLIC):
            return str(value)
        expression = sympy.sympify(value.node.expr)
        for symbol in sorted(expression.free_symbols, key=str):
            new = f"{str(symbol)[0]}{len(self._symbols)}"
            self._symbols.setdefault(symbol, sympy.Symbol(new, integer=True, positive=True))
        return str(expression.xreplace(self._symbols))

    def name(self, node: fx.Node) -> str:
        """What a node is called inside its block."""
        segment = self._home.get(node)
        return local_name(node, segment.block if segment is not None else "")

    def call(self, node: fx.Node) -> str:
        """The line of a node: name, arguments, what it yields."""
        given = node.args[:1] if op_name(node) == "call_module" else node.args  # without the handle, a count
        arguments = [self._argument(argument, node) for argument in given]
        arguments += [f"{key}={self._argument(value, node)}" for key, value in node.kwargs.items()]
        return f"{self.name(node)}({', '.join(arguments)}) -> {self.kind(fake_value(node))}"

    def is_input(self, placeholder: fx.Node) -> bool:
        """Whether the caller passes this tensor at each call."""
        return is_user_input(placeholder) and not is_size(placeholder)

    def is_weight(self, node: fx.Node) -> bool:
        """Whether the node is a parameter, a buffer or another attribute of the model, or a size."""
        return (node.op == "placeholder" and not is_user_input(node)) or is_size(node)

    def kind_of(self, source: Source) -> str:
        """Dtype and shape of a value that a block takes."""
        return self._kinds[source]

    def origin(self, source: Source, segment: Segment) -> str:
        """What a value that a block takes is called at the block's beginning."""
        return self._word(source[0], segment.nodes[0]) + source[1]

    def at_end(self, node: fx.Node) -> str:
        """What a value is called at the end of the graph; values before the blocks, at the beginning of those."""
        base, picks = self._base(node)
        home = self._home.get(base)
        if home is None:
            return self._outside(base, None) + picks
        end = len(self._order) if home.block else min(_later(self._starts.values(), self._order[base]), default=None)
        word = self._counted(base, len(self._order) if end is None else end) + picks
        return f"{home.label}.{word}" if home.block else word

    def _argument(self, argument: Any, user: fx.Node) -> str:
        if isinstance(argument, fx.Node):
            return self._reference(argument, user)
        if isinstance(argument, (tuple, list)):
            return f"[{', '.join(self._argument(item, user) for item in argument)}]"
        if isinstance(argument, dict):
            return "{" + ", ".join(f"{key}: {self._argument(item, user)}" for key, item in argument.items()) + "}"
        if isinstance(argument, slice):
            return self._slice(argument)
        return self._constant(argument)

    def _constant(self, value: Any) -> str:
        if isinstance(value, torch.dtype):
            return describe_dtype(value)
        if isinstance(value, torch.device):
            return value.type
        if isinstance(value, float):
            return f"{value:.6g}"  # what a math library computes differs in the last digits between machines
        if value is None or value is Ellipsis or isinstance(value, (bool, int, str, complex)):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, (*_SYMBOLIC, torch.layout, torch.memory_format)):
            return self.size(value).removeprefix("torch.")
        return getattr(value, "__name__", type(value).__name__)  # nothing that holds an address

    def _slice(self, value: slice) -> str:
        bounds = ["" if bound is None else self._bound(bound) for bound in (value.start, value.stop, value.step)]
        return ":".join(bounds if bounds[2] else bounds[:2])

    def _bound(self, bound: Any) -> str:
        return self.size(fake_value(bound) if isinstance(bound, fx.Node) else bound)

    def _reference(self, node: fx.Node, user: fx.Node) -> str:
        if is_size(node):
            return self.kind(fake_value(node))
        base, picks = self._base(node)
        taken = self.taken.get(self._home[user], {}).get((base, picks))
        return taken if taken is not None else self._word(base, user) + picks

    def _base(self, node: fx.Node) -> Source:
        """The value that a node picks from, and the picking."""
        picks = ""
        while is_inlined(node):
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            picked = [self._bound(i) if isinstance(i, fx.Node) else self._argument(i, node) for i in index]
            picks = f"[{', '.join(picked)}]{picks}"
            (node,) = node.all_input_nodes[:1]
        return node, picks

    def _word(self, base: fx.Node, user: fx.Node) -> str:
        """What a value is called where the user node stands."""
        home, here = self._home.get(base), self._home[user]
        if home is None:
            return self._outside(base, user)
        if self._scope(base)[0] is self._scope(user)[0]:
            return _within(
                self._counted(base, self._order[user]), module_path(user).removeprefix(here.block).strip(".")
            )
        if home.block:
            return f"{'/' if here.block else ''}{_label(home, here)}.{self._counted(base, len(self._order))}"
        start = self._starts[here.path]
        is_before_all = self._order[base] < start
        return f"/{self._counted(base, start if is_before_all else self._order[here.nodes[0]])}"

    def _outside(self, node: fx.Node, user: fx.Node | None) -> str:
        """An input, a weight, or a constant of the graph."""
        if node.op != "placeholder":
            return f"constant {self.kind(fake_value(node))}"
        if is_user_input(node):
            return f"input.{input_name(node)}"
        path, kind = weight_path(node), self.kind(fake_value(node))
        if user is not None:
            path = self._shortened(path, user)
        return f"{path} {kind}"

    def _shortened(self, path: str, user: fx.Node) -> str:
        """An absolute path as seen from a node: `.weight` in its own module, `/x` outside its block."""
        block = self._home[user].block
        if block and not path.startswith(f"{block}."):
            return f"/{path}"
        return _within(path.removeprefix(f"{block}."), module_path(user).removeprefix(block).strip("."))

    def _counted(self, node: fx.Node, before: int) -> str:
        name = self.name(node)
        places = self._places[self._scope(node)]
        back = bisect_left(places, before) - bisect_left(places, self._order[node]) - 1
        return f"{name}~{back}" if back else name

    def _scope(self, node: fx.Node) -> tuple[Segment | None, str]:
        segment = self._home[node]
        return segment if segment.block else None, self.name(node)

    def _name_taken(self, blocks: list[Segment]) -> None:
        sources = {block: self._sources(block) for block in blocks}
        users = Counter((block.path, source) for block in blocks for source in sources[block])
        for block in blocks:
            taken: list[tuple[str, int, Source]] = []
            for source, kind in sources[block].items():
                home = self._home.get(source[0])
                if users[block.path, source] == 1 or (home is not None and home.block):
                    taken.append((kind, len(taken), source))
            self.taken[block] = {source: f"taken.{n}" for n, (_, _, source) in enumerate(sorted(taken), 1)}

    def _sources(self, block: Segment) -> dict[Source, str]:
        """The values that a block takes from elsewhere, in order of use, each with its kind."""
        sources: dict[Source, str] = {}
        for node in block.nodes:
            for argument in node.all_input_nodes:
                base, picks = self._base(argument)
                is_own = self._home.get(base) is block or weight_path(base).startswith(f"{block.block}.")
                if not is_own and not is_size(argument) and base.op != "get_attr":
                    sources.setdefault((base, picks), self.kind(fake_value(argument)))
        self._kinds.update(sources)
        return sources


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def input_name(placeholder: fx.Node) -> str:
    """The caller's name of an input, with what is picked of it: `timestep`, `hidden_states[0]`."""
    steps = re.findall(r"\['(\w+)'\]|\[(\d+)\]|\.(\w+)", source_name(placeholder).removeprefix("L"))
    if len(steps) > 1 and steps[0][0] == "kwargs":
        steps = steps[1:]
    words = [key or (f"[{index}]" if index else f".{attribute}") for key, index, attribute in steps]
    return "".join(words) or placeholder.name


def _label(home: Segment, here: Segment) -> str:
    """A block as seen from another, or from what follows one: `transformer_blocks.(i-1)`."""
    back = here.index - home.index
    if back == 1 or (back == 0 and home is not here and (home.path != here.path or not here.block)):
        return f"{home.path}.(i{-back or ''})" if home.run == 1 else home.label
    return home.label


def _within(path: str, module: str) -> str:
    """A path that begins with a dot in the module that it leads into."""
    return path.removeprefix(module) if module and path.startswith(f"{module}.") else path


def _later(positions: Any, order: int) -> list[int]:
    return [position for position in positions if position > order]
