"""Graphs of programs that torch.export has made, prepared for the passes."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from teacache_fx.graph import copy_graph_module, fake_value, name_source, op_name

_WEIGHTS = {InputKind.PARAMETER: "_parameters", InputKind.BUFFER: "_buffers", InputKind.CONSTANT_TENSOR: "_buffers"}


def load_graph(path: str | os.PathLike[str]) -> fx.GraphModule:
    """The graph of an exported program on disk, ready for the passes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no program of torch.export.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path {os.fspath(path)!r}: no such file; torch.export.save(program, path) makes one")
    try:
        program = torch.export.load(path)
    except (zipfile.BadZipFile, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"path {os.fspath(path)!r} is no program of torch.export: {error}") from error
    return graph_of(program)


def graph_of(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the program's graph in which inputs are told by name and casts that change nothing are left out.

    Export knows inputs by its own signature, and dynamo by where it took them from; the passes ask for the latter.
    """
    gm = copy_graph_module(program.graph_module)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    # By place: an input called `input` or `id` has got another name in the copy.
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if kind := _WEIGHTS.get(spec.kind):
            name_source(node, f"L['self'].{kind}.{spec.target}")
        elif hasattr(spec.arg, "name"):
            name_source(node, f"L['{spec.arg.name}']")
    _strip_metadata_checks(gm)
    _strip_idle_casts(gm)
    gm.recompile()
    return gm


def _strip_metadata_checks(gm: fx.GraphModule) -> None:
    """Takes out the assertions that export puts before each cast: of dtypes, which cannot change in the graph."""
    for node in list(gm.graph.nodes):
        if op_name(node) == "_assert_tensor_metadata":
            gm.graph.erase_node(node)


def _strip_idle_casts(gm: fx.GraphModule) -> None:
    """Lets users of a cast to the dtype and device that a tensor has already read the tensor itself.

    Otherwise all later blocks would read a shared embedding through the cast inside block 0, and so depend on it.
    """
    for node in list(gm.graph.nodes):
        if op_name(node) != "to" or not isinstance(node.args[0], fx.Node):
            continue
        before, after = fake_value(node.args[0]), fake_value(node)
        if isinstance(before, Tensor) and isinstance(after, Tensor) and _is_same(before, after):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _is_same(before: Tensor, after: Tensor) -> bool:
    return before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
