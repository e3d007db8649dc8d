"""Captures a model by torch.export, and rewrites the graph."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from teacache_fx.call_layout import CallLayout
from teacache_fx.config import TeaCacheConfig
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.exported import graph_of
from teacache_fx.graph import fake_value, op_name
from teacache_fx.pipeline import Pipeline
from teacache_fx.plan import CachePlan
from teacache_fx.runtime import StateShapes
from teacache_fx.signature import CacheSignature

MODEL_ID = "model_id"
"""Entry of a state that tells which model it is of, int64."""

_STATE_FORMAT = 2  # counts up when what a state means changes
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Captured:
    """A rewritten graph, and how to call it.

    Attributes:
        gm: takes weights, then the leaves of the call, then the state.
        plan: that it was rewritten from.
        signature: layout of what was added.
        layout: of the leaves.
        weights: names of the weights that it takes, in order.
        constants: those among them that are attributes of no module.
        model_id: of the model with these weights; goes with a state, so that no other model continues it.
    """

    gm: fx.GraphModule
    plan: CachePlan
    signature: CacheSignature
    layout: CallLayout
    weights: tuple[str, ...]
    constants: dict[str, Tensor]
    model_id: int

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state's tensors, in order."""
        return (*self.signature.tensor_names, *self.signature.scalar_names, MODEL_ID)

    @property
    def _state_fakes(self) -> tuple[Tensor, ...]:
        num_steps = self.signature.scalars.num_inference_steps  # as model_id, it has no entry per sample
        return (*self.signature.tensors, *self.signature.scalars, num_steps)

    def initial_state(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], num_inference_steps: int
    ) -> dict[str, Tensor]:
        """The state before the first step, as large as a call with these arguments needs it."""
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        leaves = self.layout.flatten(args, kwargs) if args or kwargs else []
        if not leaves and any(isinstance(size, torch.SymInt) for fake in self._state_fakes for size in fake.shape):
            raise TypeError("sizes vary between calls: give initial_state the arguments of a step, for its sizes")
        shapes = StateShapes(placeholders[: self.signature.num_inputs], self.signature)
        memory = shapes.allocate([*self.weights, *leaves])
        memory.policy.num_inference_steps.fill_(num_inference_steps)
        model_id = torch.full_like(memory.policy.num_inference_steps, self.model_id)
        return dict(zip(self.state_names, (*memory.tensors, *memory.policy, model_id), strict=True))

    def checked_state(self, state: Any) -> list[Tensor]:
        """The state's tensors in order but the model's id; where that is another one, the step index is 0.

        Raises:
            TypeError: it is no dict of tensors by name.
            ValueError: a tensor is missing, unknown, or of another shape or dtype, or the state is another model's.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"teacache_state must be a dict, as initial_state() makes it, got {type(state).__name__}")
        if missing := [name for name in self.state_names if name not in state]:
            raise ValueError(f"teacache_state has no {', '.join(missing)}: initial_state() makes a complete one")
        if unknown := [name for name in state if name not in self.state_names]:
            raise ValueError(f"teacache_state has {', '.join(unknown)}, not kept by this model: is it another's?")
        is_compiling = torch.compiler.is_compiling()  # then the sizes of the capture mean nothing
        for name, fake in zip(self.state_names, () if is_compiling else self._state_fakes, strict=not is_compiling):
            given = state[name]
            if not isinstance(given, Tensor):
                raise TypeError(f"teacache_state[{name!r}] must be a tensor, got {type(given).__name__}")
            if given.dtype != fake.dtype or not _fits(given, fake):
                expected = f"{str(fake.dtype).removeprefix('torch.')} {list(fake.shape)}"
                found = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
                raise ValueError(f"teacache_state[{name!r}] must be {expected}, got {found}: is it another model's?")
        is_own = state[MODEL_ID] == self.model_id
        if not is_compiling and not bool(is_own):
            raise ValueError("teacache_state is another model's, or of other weights: initial_state() makes a new one")
        return [
            torch.where(is_own, state[name], 0) if name == "step_index" else state[name]
            for name in self.state_names[:-1]
        ]

    def state_dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """For each tensor of the state which of its sizes vary, as torch.export is told."""
        return {
            name: {i: Dim.AUTO for i, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)}
            for name, fake in zip(self.state_names, self._state_fakes, strict=True)
        }


def _fits(given: Tensor, fake: Tensor) -> bool:
    pairs = zip(given.shape, fake.shape, strict=False)
    return given.ndim == fake.ndim and all(isinstance(known, torch.SymInt) or size == known for size, known in pairs)


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    config: TeaCacheConfig,
    is_portable: bool,
) -> Captured:
    """Exports the model and rewrites the graph; the model runs once, eagerly, and stays as it is.

    Args:
        model: the transformer.
        args: positional arguments of one step.
        kwargs: its keyword arguments.
        dynamic_shapes: as `torch.export.export` takes them, by argument name, or `None`.
        config: the settings.
        is_portable: add only operations that ONNX has.

    Raises:
        Declined: torch.export does not take the model (NOT_EXPORTABLE), or the graph cannot be rewritten.
    """
    signature = inspect.signature(model.forward)
    arguments = _by_name(signature, args, kwargs)
    resolved = config.resolve(type(model).__name__)
    with torch.no_grad():
        model(**arguments)  # some models build tables at their first call, which torch.export could not capture
        program = _exported(model, arguments, dynamic_shapes)
        pipeline = Pipeline(graph_of(program))
        _check_blocks(pipeline.original, pipeline.analyse())
        rewritten = pipeline.rewrite(resolved, is_portable)
    placeholders = [node for node in pipeline.original.graph.nodes if node.op == "placeholder"]
    weights = [str(spec.target) for spec in program.graph_signature.input_specs if spec.kind in _WEIGHTS]
    own = {name for name, _ in named_weights(model)}
    constants = {name: program.constants[name] for name in weights if name not in own}
    fakes = [fake_value(node) for node in placeholders[len(weights) :]]
    layout = CallLayout(signature, arguments, fakes, program.call_spec.out_spec)
    model_id = _model_id(model, {**program.state_dict, **program.constants})
    return Captured(rewritten.gm, rewritten.plan, rewritten.signature, layout, tuple(weights), constants, model_id)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _model_id(model: nn.Module, weights: Mapping[str, Any]) -> int:
    """Tells models apart, and by the first number of each weight also finetunes of one model; below 2**56."""
    facts = [
        (name, str(tensor.dtype), tuple(tensor.shape), [] if tensor.is_meta else tensor.reshape(-1)[:1].tolist())
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)
    ]
    text = repr((_STATE_FORMAT, type(model).__qualname__, sorted(facts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _exported(model: nn.Module, arguments: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    refusals = []
    for way in (contextlib.nullcontext(), _data_is_traced()):
        try:
            with way, contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph that it cannot export
                return torch.export.export(model, (), arguments, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:  # whatever torch.export raises is its way of refusing
            refusals.append(error)
    cause = str(refusals[0]).strip().split("\n")[0]
    detail = f"{type(refusals[0]).__name__}: {cause}"
    raise Declined(DeclineReason.NOT_EXPORTABLE, detail) from refusals[0]


def _check_blocks(gm: fx.GraphModule, plan: CachePlan) -> None:
    """flex_attention in a branch can be traced again, but the mask that comes out of it cannot be run (torch 2.13)."""
    blocks = set(plan.partition.blocks)
    for node in gm.graph.nodes:
        if node.name in blocks and op_name(node) == "flex_attention":
            raise Declined(DeclineReason.NOT_EXPORTABLE, "flex_attention inside a branch of a cond", node.name)


@contextlib.contextmanager
def _data_is_traced() -> Iterator[None]:
    """Lets `tensor.data` be seen by a tracer, which `tensor.detach()` is and does the same.

    Some models write their position tables through `.data`: torch.export then finds a tensor that it knows nothing of.
    """
    plain: Any = torch._C.TensorBase.data
    setattr(torch.Tensor, "data", property(lambda tensor: tensor.detach(), plain.__set__))  # noqa: B010 - for mypy
    try:
        yield
    finally:
        delattr(torch.Tensor, "data")


def _by_name(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"{name} of the model's forward can be given by position only: wrap the model in a module whose "
                "forward names all its arguments"
            )
        arguments.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return arguments
