"""Runs programs of torch.export and packages of AOTInductor on tensors by name."""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from teacache_fx.call_layout import leaves_by_name

_OWN = re.compile(r"(^|\.)teacache\.(?P<name>\w+)$")  # buffers that the rewriting has added


@dataclass(frozen=True)
class Expected:
    """What a program says of one of its inputs.

    Attributes:
        dtype: `None` where the program does not tell, or the input is no tensor.
        shape: likewise; `None` for a size that varies.
    """

    dtype: torch.dtype | None = None
    shape: tuple[int | None, ...] | None = None


class ProgramRunner(ABC):
    """One program, ready to run.

    Attributes:
        kind: in words.
        inputs: by name; parts of lists and dicts are named as torch.export does, `states_0`.
        kept: names of the state's tensors that it keeps in buffers.
    """

    kind: str
    inputs: dict[str, Expected]
    kept: frozenset[str] = frozenset()

    @abstractmethod
    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """The leaves of the outputs, those of the new state behind the others.

        Args:
            values: for each of the inputs.

        Raises:
            ValueError: the program does not take them.
        """

    def state(self) -> dict[str, Tensor]:
        """The state that the program keeps in buffers, by name; empty where that cannot be read."""
        return {}

    def forget(self, values: Mapping[str, Any], latents: str) -> None:  # noqa: B027 - most start afresh
        """Lets a program that has been called before begin anew.

        Args:
            values: of a first step.
            latents: which of them holds the latents.
        """


class _Call:
    """Lays out values by name as the arguments that a program was exported with."""

    def __init__(self, spec: pytree.TreeSpec, parameters: Sequence[str]) -> None:
        self._spec = spec
        args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        places = leaves_by_name({**dict(zip(parameters, args, strict=False)), **kwargs})
        self.names = sorted(places, key=places.__getitem__)

    def arguments(self, values: Mapping[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten([values[name] for name in self.names], self._spec)
        return args, kwargs


class ExportedRunner(ProgramRunner):
    """A program of torch.export. It gets a state of its own, and the program stays as it is.

    Args:
        program: the program.
        parameters: names of the parameters of the model's forward, in order.
    """

    kind = "torch.export"

    def __init__(self, program: ExportedProgram, parameters: Sequence[str]) -> None:
        signature = program.graph_signature
        self._call = _Call(program.call_spec.in_spec, parameters)
        self._module = program.module()
        self._state: dict[str, Tensor] = {}
        buffers = {
            match["name"]: target for target, _ in self._module.named_buffers() if (match := _OWN.search(target))
        }
        for name, target in buffers.items():  # the module shares them with the program
            self._state[name] = self._module.get_buffer(target).clone()
            setattr(self._module.get_submodule(target.rpartition(".")[0]), name, self._state[name])
        self.kept = frozenset(buffers)
        if "step_index" in self._state:
            self._state["step_index"].zero_()
        fakes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        given = [spec.arg for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
        values = [fakes.get(getattr(arg, "name", "")) for arg in given]
        self.inputs = {name: _described(value) for name, value in zip(self._call.names, values, strict=True)}

    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """See `ProgramRunner`."""
        args, kwargs = self._call.arguments(values)
        try:
            return pytree.tree_leaves(self._module(*args, **kwargs))
        except AssertionError as error:  # what guards of torch.export raise
            raise ValueError(f"the program does not take these inputs: {error}") from error

    def state(self) -> dict[str, Tensor]:
        """See `ProgramRunner`."""
        return self._state


def _described(value: Any) -> Expected:
    if not isinstance(value, Tensor):
        return Expected()
    return Expected(value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape))


class PackageRunner(ProgramRunner):
    """A package of AOTInductor, which tells names, but neither shapes nor its state.

    Args:
        package: the loaded package.
        parameters: names of the parameters of the model's forward, in order.
        is_fresh: whether it has not been called since it was loaded.
    """

    kind = "AOTInductor"

    def __init__(self, package: Any, parameters: Sequence[str], is_fresh: bool) -> None:
        self._package, self._is_fresh = package, is_fresh
        self._call = _Call(pytree.treespec_loads(package.loader.get_call_spec()[0]), parameters)
        self.inputs = {name: Expected() for name in self._call.names}
        self.kept = frozenset(match["name"] for name in package.get_constant_fqns() if (match := _OWN.search(name)))

    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """See `ProgramRunner`."""
        args, kwargs = self._call.arguments(values)
        try:
            with _inputs_are_checked():
                return pytree.tree_leaves(self._package(*args, **kwargs))
        except RuntimeError as error:
            names = [name for name in self._call.names if isinstance(values[name], Tensor)]
            cause = re.sub(r"input_handles\[(\d+)\]", lambda match: names[int(match[1])], str(error)).strip()
            raise ValueError(f"the package does not take these inputs: {cause}") from error

    def forget(self, values: Mapping[str, Any], latents: str) -> None:
        """See `ProgramRunner`. After a step far away, any other one begins a new trajectory."""
        if not self._is_fresh:
            self.run({**values, latents: -values[latents]})


@contextlib.contextmanager
def _inputs_are_checked() -> Iterator[None]:
    """Lets a package check shapes, as it does if asked at its first call; otherwise it reads beyond a tensor's end."""
    name = "AOTI_RUNTIME_CHECK_INPUTS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
