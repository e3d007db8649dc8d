"""Runs ONNX files in ONNX Runtime on tensors by name."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teacache_fx.program_runners import Expected, ProgramRunner

_ONNX_DTYPES = {  # as ONNX Runtime names them, with ONNX's own number
    "float": (torch.float32, 1),
    "float16": (torch.float16, 10),
    "bfloat16": (torch.bfloat16, 16),
    "double": (torch.float64, 11),
    "int8": (torch.int8, 3),
    "uint8": (torch.uint8, 2),
    "int32": (torch.int32, 6),
    "int64": (torch.int64, 7),
    "bool": (torch.bool, 9),
}


class OnnxRunner(ProgramRunner):
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: of the file.
    """

    kind = "ONNX"

    def __init__(self, path: Path) -> None:
        try:
            onnxruntime = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise ImportError("an .onnx file needs ONNX Runtime: pip install 'teacache-fx[onnx]'") from error
        self._values = onnxruntime.OrtValue
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise ValueError(f"{os.fspath(path)!r} is nothing that ONNX Runtime runs: {error}") from error
        self.inputs = {put.name: _described_by_onnx(put) for put in self._session.get_inputs()}
        self._outputs = [put.name for put in self._session.get_outputs()]

    def run(self, values: Mapping[str, Any]) -> list[Any]:
        """See `ProgramRunner`."""
        numbers = dict(_ONNX_DTYPES.values())
        feeds = {}
        for name in self.inputs:
            tensor = values[name].detach().cpu().contiguous()
            is_known = tensor.dtype != torch.bfloat16  # to numpy
            array = (tensor if is_known else tensor.view(torch.int16)).numpy()
            feeds[name] = self._values.ortvalue_from_numpy_with_onnx_type(array, numbers[tensor.dtype])
        try:
            return [_tensor(value) for value in self._session.run_with_ort_values(self._outputs, feeds)]
        except Exception as error:  # as above
            raise ValueError(f"ONNX Runtime does not take these inputs: {error}") from error


def _described_by_onnx(put: Any) -> Expected:
    kind = re.sub(r"^tensor\((.*)\)$", r"\1", put.type)
    dtype = _ONNX_DTYPES[kind][0] if kind in _ONNX_DTYPES else None
    return Expected(dtype, tuple(size if isinstance(size, int) else None for size in put.shape))


def _tensor(value: Any) -> Tensor:
    dtype, _ = _ONNX_DTYPES[re.sub(r"^tensor\((.*)\)$", r"\1", value.data_type())]
    memory = bytearray(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()))
    flat = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)
    return flat.reshape(value.shape())
