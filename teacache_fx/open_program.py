"""Tells what kind of exported program a file holds, and opens it."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from teacache_fx.onnx_runner import OnnxRunner
from teacache_fx.program_runners import ExportedRunner, PackageRunner, ProgramRunner

_WANTED = (
    "an ExportedProgram, a loaded AOTInductor package, or the path of a .pt2 file of torch.export.save, of an "
    "AOTInductor package or of an .onnx file"
)


def open_program(program: Any, parameters: Sequence[str]) -> ProgramRunner:
    """A runner for a program of any kind.

    Args:
        program: the program or its path.
        parameters: names of the parameters of the model's forward, in order.

    Raises:
        TypeError: it is neither.
        FileNotFoundError: there is no such file.
        ValueError: the file is of none of the kinds.
        ImportError: it is an .onnx file, and ONNX Runtime is not installed.
    """
    if isinstance(program, ExportedProgram):
        return ExportedRunner(program, parameters)
    if hasattr(program, "loader") and hasattr(program.loader, "get_call_spec"):
        return PackageRunner(program, parameters, is_fresh=False)
    if not isinstance(program, (str, os.PathLike)):
        raise TypeError(f"program_or_path must be {_WANTED}, got {type(program).__name__}")
    path = Path(program)
    if not path.is_file():
        raise FileNotFoundError(f"program_or_path {os.fspath(path)!r}: no such file")
    if zipfile.is_zipfile(path):
        return _open_archive(path, parameters)
    if path.suffix == ".onnx":
        return OnnxRunner(path)
    raise ValueError(f"{os.fspath(path)!r} is no exported program; what can be verified is {_WANTED}")


def _open_archive(path: Path, parameters: Sequence[str]) -> ProgramRunner:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/data/aotinductor/" in name for name in names):  # both are .pt2, and an archive may hold both
        return PackageRunner(torch._inductor.aoti_load_package(os.fspath(path)), parameters, is_fresh=True)
    if any(re.search("(^|/)models/[^/]+[.]json$", name) for name in names):
        return ExportedRunner(torch.export.load(path), parameters)
    raise ValueError(
        f"{os.fspath(path)!r} is an archive, but of no exported program; what can be verified is {_WANTED}"
    )
