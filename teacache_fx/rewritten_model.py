"""A model with TeaCache in its graph, for torch.export and what comes after it."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from teacache_fx.call_layout import leaves_by_name
from teacache_fx.config import TeaCacheConfig
from teacache_fx.export_capture import Captured, capture, named_weights
from teacache_fx.flat_state import take_from_flat
from teacache_fx.graph import fake_value
from teacache_fx.own_inputs import CONTEXT, OWN, RESET, STATE, check_own
from teacache_fx.plan import CachePlan
from teacache_fx.state_buffers import StateBuffers

StateForm = Literal["buffers", "io"]


class RewrittenModel(nn.Module):
    """Runs one denoising step as the model would, with TeaCache. Made by `teacache_fx.rewrite`.

    Takes and returns what the model does. Parameters and buffers are the model's own tensors, under their own names.

    Attributes:
        teacache: the state, where it lives in buffers; from the capture on.

    Args:
        model: the transformer; it stays as it is.
        config: the settings.
        state: "buffers" or "io".
        num_contexts: how many guidance branches have a state of their own.
    """

    teacache: StateBuffers

    def __init__(self, model: nn.Module, config: TeaCacheConfig, state: StateForm, num_contexts: int) -> None:
        super().__init__()
        self._source, self._config = [model], config  # in a list, to be no submodule
        self._is_io, self._num_contexts = state == "io", num_contexts
        self._captured: list[Captured] = []
        self._weights: list[tuple[nn.Module, str]] = []
        self._varying: list[tuple[int, int]] = []
        for name, tensor in named_weights(model):
            _register(self, name, tensor)
        self.train(model.training)

    def capture(self, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = None) -> None:
        """Captures the model for calls like this one.

        Args:
            args: positional arguments of one step.
            kwargs: its keyword arguments; those that are not the model's own are left out.
            dynamic_shapes: as `torch.export.export` takes them, by the names of the model's arguments, or `None`.

        Raises:
            Declined: torch.export does not take the model, or it cannot be rewritten.
            ValueError: a size may grow without limit, and the state lives in buffers.
        """
        model = self._source[0]
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN}
        if isinstance(dynamic_shapes, Mapping):
            dynamic_shapes = {name: sizes for name, sizes in dynamic_shapes.items() if name not in OWN}
        captured = capture(model, args, kwargs, dynamic_shapes, self._config, self._is_io)
        for name, tensor in captured.constants.items():
            _register(self, name, tensor)
        self._weights = [_place(self, name) for name in captured.weights]
        if not self._is_io:
            self._add_buffers(captured)
        self._captured, self._was_training = [captured], self.training

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModel:
        """A copy shares the captured graph, which holds no weights and no state."""
        memo.update({id(captured): captured for captured in self._captured})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def _add_buffers(self, captured: Captured) -> None:
        signature = captured.signature
        self._varying = list(_varying_sizes(captured.gm, len(captured.weights), signature.num_inputs))
        length = self._config.num_inference_steps or 0
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside it
            self.teacache = StateBuffers(signature, self._num_contexts, len(self._varying), length, captured.model_id)
        count = len(signature.tensor_names)
        rows = [getattr(self.teacache, name) for name in signature.tensor_names]
        flat = [row[0] if self._num_contexts > 1 else row for row in rows]
        if any(self.teacache.flat[:count]):
            take_from_flat(captured.gm, captured.plan, signature.tensor_names, flat)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, with the arguments of the model's forward."""
        if not self._captured:
            self._capture_call(args, kwargs)
        captured = self._captured[0]
        if self.training is not self._was_training:
            raise ValueError(
                f"the model was captured with training={self._was_training}, which is built in: call .eval() before "
                "the model is captured, or rewrite it anew"
            )
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        leaves = captured.layout.flatten(args, kwargs)
        weights = [getattr(owner, name) for owner, name in self._weights]
        sizes = [leaves[leaf].shape[dimension] for leaf, dimension in self._varying]
        state = self._state(captured, own, sizes)
        outputs = captured.gm(*weights, *leaves, *state)
        count = captured.signature.num_outputs
        result = pytree.tree_unflatten(list(outputs[:count]), captured.layout.output)
        added = [tensor.detach() for tensor in outputs[count:]]  # or a step would hold on to all before it
        if self._is_io:
            kept = added[: len(state) - 1]  # behind them comes what is recorded; no step changes the last two
            rest = (state[-1].clone(), torch.full_like(state[-1], captured.model_id))
            return result, dict(zip(captured.state_names, (*kept, *rest), strict=True))
        self.teacache.write(own.get(CONTEXT), added, sizes)
        return result

    def _state(self, captured: Captured, own: Mapping[str, Any], sizes: Sequence[Any]) -> list[Tensor]:
        if self._is_io:
            if set(own) != {STATE}:
                raise TypeError(f"state='io' takes {STATE}, the state as a dict, and no {RESET} or {CONTEXT}")
            return captured.checked_state(own[STATE])
        if STATE in own:
            raise TypeError(f"{STATE} is an argument of the form state='io'; here the state lives in buffers")
        check_own(own, self._num_contexts)
        return self.teacache.read(own.get(CONTEXT), own.get(RESET), sizes)

    def initial_state(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The state before the first step of a generation, for the form "io".

        Args:
            *args: arguments of a step, for its sizes; may be left out where no size varies.
            **kwargs: likewise.

        Raises:
            RuntimeError: the model has not been captured yet: call it, export it, or give `rewrite` the arguments.
        """
        return self._first_capture().initial_state(args, kwargs, self._config.num_inference_steps or 0)

    @property
    def output_names(self) -> list[str]:
        """Names to give to `torch.onnx.export` as its `output_names`, for the form "io".

        First those of the model's outputs: `output`, or `output_0` and so on, or `output_sample` where they have names
        of their own. Then the new state, each tensor as in `teacache_state`, with `teacache_next_state_` before it.

        Raises:
            RuntimeError: the model has not been captured yet.
        """
        captured = self._first_capture()
        spec = captured.layout.output
        outputs = leaves_by_name({"output": pytree.tree_unflatten(list(range(spec.num_leaves)), spec)})
        return [*outputs, *(f"teacache_next_state_{name}" for name in captured.state_names)]

    @property
    def plan(self) -> CachePlan | None:
        """What was found; `None` before the capture."""
        return self._captured[0].plan if self._captured else None

    def state_dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """What `torch.export.export` must be told of `teacache_state` in its `dynamic_shapes`.

        Raises:
            RuntimeError: the model has not been captured yet.
        """
        return self._first_capture().state_dynamic_shapes()

    def _first_capture(self) -> Captured:
        if not self._captured:
            raise RuntimeError("nothing is captured yet: give rewrite(model, args, kwargs) the arguments of one step")
        return self._captured[0]

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _capture_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.capture(args, kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module. torch.export asks for it first of all, which is when a model without inputs is captured.

        Raises:
            ValueError: the export is to ONNX, and the state lives in buffers.
        """
        if torch.onnx.is_in_onnx_export() and not self._is_io:
            raise ValueError("ONNX drops writes to buffers, and the cache with them: rewrite(model, state='io')")
        if not self._captured and (call := _arguments_of_export(self)) is not None:
            self.capture(*call)
        yield from super().named_modules(*args, **kwargs)


def with_signature_of(model: nn.Module) -> type[RewrittenModel]:
    """A class whose forward has the model's signature, and the names of our own inputs behind it."""

    @functools.wraps(RewrittenModel.forward)
    def forward(self: RewrittenModel, *args: Any, **kwargs: Any) -> Any:
        return RewrittenModel.forward(self, *args, **kwargs)

    parameters = list(inspect.signature(type(model).forward).parameters.values())
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN]
    is_open = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    behind = [parameters.pop()] if is_open else []
    forward.__signature__ = inspect.Signature([*parameters, *own, *behind])  # type: ignore[attr-defined]
    return type(f"TeaCache{type(model).__name__}", (RewrittenModel,), {"forward": forward})


def _arguments_of_export(module: nn.Module) -> tuple[Sequence[Any], Mapping[str, Any], Any] | None:
    """What `torch.export.export` was called with, if it is exporting the module right now."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _EXPORT_CODE and frame.f_locals["mod"] is module:
            given = frame.f_locals
            return given["args"], given["kwargs"] or {}, given["dynamic_shapes"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


_EXPORT_CODE = inspect.unwrap(torch.export.export).__code__


def _varying_sizes(gm: fx.GraphModule, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Leaf and dimension of each size of a call that varies."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for leaf, node in enumerate(placeholders[first:stop]):
        value = fake_value(node)
        if isinstance(value, Tensor):
            yield from ((leaf, i) for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt))


def _register(root: nn.Module, path: str, tensor: Tensor) -> None:
    *owners, name = path.split(".")
    if hasattr(RewrittenModel, path.split(".")[0]) or path.startswith("teacache."):
        raise ValueError(f"`{path.split('.')[0]}` of the model has a name that the rewritten module needs: rename it")
    for step in owners:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor, persistent=False)


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return root.get_submodule(owner), name
