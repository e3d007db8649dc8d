"""The command line, on factories and on exported programs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import teacache_fx
from teacache_fx.cli import main
from tests import toys

_FACTORIES = """
from tests import toys
def small(): return toys.make(), toys.inputs()
def large(): return toys.make(num_blocks=3), (), toys.inputs()
def pooled(): return toys.make(toys.PooledDiT), toys.inputs()
def nothing(): return toys.make()
def leaving(): raise SystemExit(0)
def raising(): raise LookupError("no weights here")
def misshaped(): return toys.make(), {**toys.inputs(), "hidden_states": toys.inputs()["encoder_hidden_states"]}
not_callable = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of factories in it."""
    (tmp_path / "factories.py").write_text(_FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


def test_snapshot_and_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", "factories:small", "-o", "small.txt"]) == 0
    assert main(["snapshot", "factories:small"]) == 0
    assert capsys.readouterr().out == (folder / "small.txt").read_text("utf-8")

    assert main(["diff", "small.txt", "factories:small"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", "small.txt", "factories:large"]) == 1
    assert "blocks.2" in capsys.readouterr().out
    assert main(["diff", "--full", "small.txt", "factories:large"]) == 1
    assert capsys.readouterr().out.startswith("--- small.txt\n+++ factories:large\n@@")


def test_exported_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(toys.make(), (), toys.inputs(), strict=False), "toy.pt2")
    assert main(["explain", "toy.pt2"]) == 0
    assert "blocks: 2 x Block" in capsys.readouterr().out
    assert main(["snapshot", "toy.pt2", "-o", "toy.txt"]) == 0
    assert main(["diff", "toy.txt", "toy.pt2"]) == 0
    assert "blocks.1" not in (folder / "toy.txt").read_text("utf-8").split("alike")[0]


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories:small"]) == 0
    assert "blocks: 2 x Block" in capsys.readouterr().out
    assert main(["explain", "factories:pooled"]) == 1
    assert "no latents found" in capsys.readouterr().out


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    config = teacache_fx.TeaCacheConfig(0.2, (1.0, 0.0))
    rewritten = teacache_fx.rewrite(toys.make(), (), toys.inputs(), config=config)
    torch.export.save(torch.export.export(rewritten, (), toys.inputs(), strict=False), "toy.pt2")
    settings = ["--coefficients", "1,0", "--thresh"]
    assert main(["verify", "toy.pt2", "factories:small", *settings, "0.2"]) == 0
    assert "does what the model with TeaCache does" in capsys.readouterr().out
    assert main(["verify", "toy.pt2", "factories:small", *settings, "0.25"]) == 1
    assert "computed instead of skipped" in capsys.readouterr().out
    for program, target in (
        ("toy.pt2", "factories:pooled"),
        ("toy.pt2", "toy.pt2"),
        ("missing.pt2", "factories:small"),
    ):
        assert main(["verify", program, target]) == 2
        assert capsys.readouterr().err.startswith("teacache-fx: ")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere:small", "no module named 'nowhere'"),
        ("factories:huge", "factories has no function 'huge'"),
        ("factories:not_callable", "factories has no function 'not_callable'"),
        ("factories:nothing", "must return a tuple (model, kwargs) or (model, args, kwargs), got ToyDiT"),
        ("missing.pt2", "'missing.pt2': no such file"),
        ("factories", "no such file, and no module:factory"),
        ("factories:leaving", "ends the process instead of making a model: sys.exit(0)"),
        ("factories:raising", "LookupError: no weights here"),
        ("factories:misshaped", "shapes cannot be multiplied"),
        ("factories.py", "'factories.py' is no snapshot"),
        ("broken.pt2", "is no program of torch.export"),
    ],
)
def test_bad_targets(target: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.pt2").write_bytes(b"no zip")
    for arguments in (["snapshot", target], ["diff", target, target]):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.splitlines()[-1].startswith("teacache-fx: ")  # torch may have something to say before
        assert said.out == ""


def test_bad_targets_of_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "missing.pt2"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["explain", "nowhere"]) == 2
    assert "neither a file nor module:factory" in capsys.readouterr().err


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
