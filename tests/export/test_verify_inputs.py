"""What verify_export says of files, models and settings that it cannot work with."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from teacache_fx import Declined, TeaCacheConfig
from teacache_fx.verification import verify_export
from tests import toys
from tests.export.verifying import CONFIG, export, verify


def test_settings_that_never_skip() -> None:
    config = TeaCacheConfig(1e-3, (1.0, 0.5))
    with pytest.raises(ValueError, match=r"no step is skipped with these settings.* 500.* thresholds"):
        verify(torch.export.export(toys.make(), (), toys.inputs(), strict=False), config=config)


def test_files_that_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing[.]pt2': no such file"):
        verify(tmp_path / "missing.pt2")
    (tmp_path / "notes.txt").write_text("no program", "utf-8")
    with pytest.raises(ValueError, match=r"notes[.]txt' is no exported program"):
        verify(tmp_path / "notes.txt")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("notes.txt", "no program")
    with pytest.raises(ValueError, match=r"other[.]pt2' is an archive, but of no exported program"):
        verify(tmp_path / "other.pt2")
    with pytest.raises(TypeError, match=r"program_or_path must be an ExportedProgram.*got ToyDiT"):
        verify(toys.make())


def test_a_broken_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"no program")
    with pytest.raises(ValueError, match=r"broken[.]onnx' is nothing that ONNX Runtime runs"):
        verify(tmp_path / "broken.onnx")


def test_another_model_is_named() -> None:
    program = torch.export.export(toys.make(toys.GuidedDiT), (), {**toys.inputs(), "strength": 0.5}, strict=False)
    with pytest.raises(ValueError, match="its input strength is not among the arguments"):
        verify(program)
    with pytest.raises(ValueError, match=r"its input hidden_states is float32 \[2, 8, 4\], given float32 \[2, 9, 4\]"):
        verify_export(export(), toys.make(), (), toys.inputs(tokens=9), config=CONFIG)
    with pytest.raises(ValueError, match="it has no input encoder_hidden_states"):
        verify(torch.export.export(nn.Identity(), (), {"input": torch.ones(2)}, strict=False))
    scores = torch.export.export(toys.make(toys.PooledDiT), (), toys.inputs(), strict=False)
    with pytest.raises(ValueError, match=r"returns tensors of shapes \[\[2\]\], and the model \[\[2, 8, 4\]\]"):
        verify(scores)
    with pytest.raises(Declined):
        verify_export(scores, toys.make(toys.PooledDiT), (), toys.inputs(), config=CONFIG)


def test_onnx_runtime_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.onnx").write_bytes(b"an onnx file")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'teacache-fx\[onnx\]'"):
        verify(tmp_path / "toy.onnx")


def test_latents_that_cannot_move() -> None:
    kwargs = toys.inputs()
    program = torch.export.export(toys.make(), (), kwargs, strict=False)
    with pytest.raises(ValueError, match="hidden_states must hold finite numbers that are not all 0"):
        verify_export(program, toys.make(), (), {**kwargs, "hidden_states": torch.zeros(2, 8, 4)}, config=CONFIG)
