"""What TeaCache makes of a model, as a text that stays the same as long as the model does."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from teacache_fx.capture import capture_site
from teacache_fx.config import ResolvedConfig, TeaCacheConfig
from teacache_fx.contexts import original
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.explanation import explained
from teacache_fx.exported import load_graph
from teacache_fx.folding import canonical_graph
from teacache_fx.forwards import with_own_code
from teacache_fx.graph_backend import GraphBackend
from teacache_fx.pipeline import Pipeline
from teacache_fx.plan_text import plan_lines, state_lines
from teacache_fx.whole_call import current_call

FORMAT = 1
_SETTINGS = TeaCacheConfig(rel_l1_thresh=0.2, coefficients=(1.0, 0.0))
# What earlier captures in the process were called with must not show: dynamo makes dynamic what has varied.
_CAPTURE = {
    "automatic_dynamic_shapes": False,
    "specialize_float": True,
    "recompile_limit": 1 << 16,
    "accumulated_recompile_limit": 1 << 16,
}


@dataclass(frozen=True)
class Snapshot:
    """The canonical text of a model: the plan, and the graph with what a skipped step leaves out.

    Attributes:
        text: a header, then sections; see `docs/ci.md`. The same in every process, and on every machine.
        declined: why the model cannot be rewritten; `None` if it can.
    """

    text: str
    declined: str | None = None


def take_snapshot(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Snapshot:
    """Captures a model, rewrites the graph and writes down both. Nothing is compiled; the model itself stays as it is.

    The model runs a few times, eagerly and without gradients. Sizes that are to stay symbolic are told with
    `torch._dynamo.mark_dynamic`.

    Args:
        model: the transformer; meta tensors will do, unless its capture breaks.
        args: positional arguments of one call.
        kwargs: its keyword arguments.

    Raises:
        TypeError: `model` is no module, `args` no sequence or `kwargs` no mapping.
        ValueError: the model has no parameters, or is called with no tensor.
    """
    model, kwargs = _checked(model, args, kwargs or {})
    recorder = _Recorder(type(model).__name__)
    with torch.no_grad(), torch._dynamo.config.patch(_CAPTURE):
        model.forward(*args, **kwargs)  # some models build tables at their first call, which dynamo could not capture
        torch.compile(with_own_code(model.forward), backend=recorder.record)(*args, **kwargs)
        way = "torch.compile"
        if not recorder.is_rewritten and _can_be_hooked(model):
            way = "TeaCacheBackend.enable"
            recorder = _Recorder(type(model).__name__)
            _call_hooked(model, recorder, args, kwargs)
    return recorder.snapshot(way)


def read_program(path: str | os.PathLike[str]) -> Snapshot:
    """The snapshot of a program that torch.export has made and saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no program of torch.export.
    """
    gm = load_graph(path)
    stacks = (node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    roots = [str(next(iter(stack.values()))[1]).rsplit(".", 1)[-1] for stack in stacks if stack]
    recorder = _Recorder(roots[0] if roots else "function")
    with torch.no_grad():
        recorder.record(gm, ())
    return recorder.snapshot("torch.export")


@dataclass(frozen=True)
class _Graph:
    """One captured graph: its sections if it was rewritten, or why not."""

    num_nodes: int
    lines: list[str]
    declined: Declined | None


class _Recorder(GraphBackend):
    """Writes down each graph that it is given."""

    def __init__(self, class_name: str) -> None:
        super().__init__(_SETTINGS, inner="eager", on_decline="ignore")
        self._class_name = class_name
        self._graphs: list[_Graph] = []

    @property
    def is_rewritten(self) -> bool:
        """Whether one of the graphs holds the blocks."""
        return any(graph.declined is None for graph in self._graphs)

    def record(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        """A backend that only looks."""
        site = capture_site()
        size = len(gm.graph.nodes)
        try:
            pipeline = Pipeline(gm, is_fragment=site.is_resumed and current_call() is not None)
            self._graphs.append(_Graph(size, _rewritten(pipeline), None))
        except Declined as refusal:
            self._graphs.append(_Graph(size, [], explained(refusal, site)))
        return gm.forward

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """A backend that looks and then does what `TeaCacheBackend` does."""
        self.record(gm, example_inputs)
        return super().__call__(gm, example_inputs, **options)

    def snapshot(self, way: str) -> Snapshot:
        """The text, of the largest graph that was rewritten."""
        if not self._graphs:
            nothing = Declined(DeclineReason.NO_REPEATED_BLOCKS, "nothing of the model could be captured")
            self._graphs.append(_Graph(0, [], nothing))
        rewritten = [graph for graph in self._graphs if graph.declined is None]
        graph = max(rewritten or self._graphs, key=_weight)
        head = [
            f"teacache-fx snapshot, format {FORMAT}",
            f"model: {self._class_name}",
            f"torch: {'.'.join(torch.__version__.split('.')[:2])}",
            f"captured by: {way}",
            *(
                [f"graphs: {len(self._graphs)} (the capture breaks; this is the one with the blocks)"]
                if len(self._graphs) > 1
                else []
            ),
        ]
        if graph.declined is None:
            return Snapshot("\n".join([*head, *graph.lines]) + "\n")
        reason = re.sub(r":\d+ ", " ", f"{graph.declined.reason.value}: {graph.declined.detail}")  # no line numbers
        return Snapshot("\n".join([*head, "", "declined", f"    {reason}"]) + "\n", str(graph.declined))


def _weight(graph: _Graph) -> tuple[bool, int]:
    is_broken = graph.declined is not None and graph.declined.reason is DeclineReason.GRAPH_BREAK
    return is_broken, graph.num_nodes


def _rewritten(pipeline: Pipeline) -> list[str]:
    plan = pipeline.analyse()
    rewritten = pipeline.rewrite(ResolvedConfig(_SETTINGS, _SETTINGS.coefficients or (), "given"))
    graph = pipeline.original.graph
    lines, words = canonical_graph(graph, plan.partition.blocks, plan.partition.dead)
    return [
        "",
        "plan",
        *plan_lines(plan, graph, words),
        "",
        "state",
        *state_lines(rewritten, words),
        "",
        *lines,
    ]


def _checked(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(args, (str, Tensor)) or not isinstance(args, Sequence):
        raise TypeError(f"args must be a tuple of positional arguments, got {type(args).__name__}")
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict of keyword arguments, got {type(kwargs).__name__}")
    model = original(model)
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model {type(model).__name__} has no parameters: pass the transformer itself")
    if not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves((tuple(args), dict(kwargs)))):
        raise ValueError(f"model {type(model).__name__} is called with no tensor: pass the inputs of one step")
    return model, dict(kwargs)


def _can_be_hooked(model: nn.Module) -> bool:
    is_real = not any(parameter.is_meta for parameter in model.parameters())
    return is_real and importlib.util.find_spec("diffusers") is not None


def _call_hooked(model: nn.Module, recorder: _Recorder, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Captures the model as `TeaCacheBackend.enable` does, which gets past some graph breaks."""
    from teacache_fx.hook import apply_teacache_hook, remove_teacache_hook

    apply_teacache_hook(model, recorder)
    try:
        for _ in range(2):  # the first call may find out what breaks the graph
            model(*args, **kwargs)
    finally:
        remove_teacache_hook(model)
