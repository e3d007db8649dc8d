"""Snapshots stay the same as long as the model does, and what differs between two is told in a few lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx.graph_diff import MOST_LINES, compare, unified
from teacache_fx.snapshot import read_program, take_snapshot
from tests import toys


class NormedBlock(toys.Block):
    """With one more operation."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        return super().forward(hidden_states, text, temb).tanh()


class EditedDiT(toys.ToyDiT):
    """The same class name and block list, with another block in each place that is given."""

    def __init__(self, places: tuple[int, ...] = (), num_blocks: int = 4) -> None:
        super().__init__(num_blocks)
        for place in places:
            self.blocks[place] = NormedBlock()


class WiderTextDiT(EditedDiT):
    """Its text embedder is two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.context_embedder = nn.Sequential(self.context_embedder, nn.Linear(toys.WIDTH, toys.WIDTH))  # type: ignore[assignment]


def _text(model: nn.Module, **changes: Any) -> str:
    text = take_snapshot(model, (), {**toys.inputs(), **changes}).text
    return text.replace(f"model: {type(model).__name__}", "model: EditedDiT")


@pytest.fixture(scope="module")
def before() -> str:
    return _text(toys.make(EditedDiT))


def test_equal_models_do_not_differ(before: str) -> None:
    assert not compare(before, _text(toys.make(EditedDiT)))
    assert not compare(before, before.replace("torch: 2.13", "torch: 2.11"))


def test_a_new_operation_in_all_blocks(before: str) -> None:
    difference = compare(before, _text(toys.make(EditedDiT, places=(0, 1, 2, 3))))
    text = str(difference)
    assert "blocks.0 (and 3 more alike)" in text
    assert "+ tanh(add) -> f32[2, 8, 32], after add" in text
    assert "class Block -> NormedBlock" in text
    assert len(difference.lines) <= MOST_LINES


def test_a_new_operation_in_one_block(before: str) -> None:
    text = str(compare(before, _text(toys.make(EditedDiT, places=(2,)))))
    assert "blocks.2\n" in text
    assert "+ tanh(add) -> f32[2, 8, 32], after add" in text
    assert text.count("tanh(add)") == 1, "the others do what they did"


def test_a_new_block(before: str) -> None:
    text = str(compare(before, _text(toys.make(EditedDiT, num_blocks=5))))
    assert "+ new, " in text
    assert "blocks.4" in text
    assert "4 x Block" in text
    assert "5 x Block" in text


def test_other_shapes_are_told_once(before: str) -> None:
    larger = toys.inputs(tokens=12)["hidden_states"]
    difference = compare(before, _text(toys.make(EditedDiT), hidden_states=larger))
    assert "f32[2, 8, 32] -> f32[2, 12, 32]" in str(difference)
    assert len(str(difference).splitlines()) <= MOST_LINES + 2


def test_a_layer_outside_the_blocks(before: str) -> None:
    text = str(compare(before, _text(toys.make(WiderTextDiT))))
    assert "context_embedder.1.linear" in text
    assert "blocks.1" not in text


def test_a_model_that_is_declined_now(before: str) -> None:
    declined = take_snapshot(toys.make(toys.PooledDiT), (), toys.inputs())
    assert declined.declined is not None
    text = str(compare(before, declined.text))
    assert "declined now: no latents found" in text
    assert len(text.splitlines()) < 5
    assert "was declined: no latents found" in str(compare(declined.text, before))
    assert not compare(declined.text, take_snapshot(toys.make(toys.PooledDiT), (), toys.inputs()).text)


def test_what_moves_out_of_a_skipped_step_is_told(before: str) -> None:
    line = next(line for line in before.splitlines() if line.startswith("  | to_qkv.linear"))
    text = str(compare(before, before.replace(line, line.replace("  | ", "    "), 1)))
    assert "to_qkv.linear now runs on every step" in text


def test_another_torch_is_a_caution(before: str) -> None:
    other = re.sub(r"torch: \d+\.\d+", "torch: 2.10", before)
    assert "torch 2.10" in str(compare(other, _text(toys.make(EditedDiT, places=(1,)))))


def test_unified(before: str) -> None:
    text = unified(before, _text(toys.make(EditedDiT, places=(1,))), "old", "new")
    assert text.startswith("--- old\n+++ new\n@@")
    assert "\n+  | tanh(add)" in text


def test_another_process_writes_the_same() -> None:
    """Whatever was compiled before: the other process has compiled nothing."""
    code = "from tests import toys; from teacache_fx.snapshot import take_snapshot as t\n"
    code += "print(t(toys.make(), (), toys.inputs()).text, end='')"
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert ran.stdout == take_snapshot(toys.make(), (), toys.inputs()).text


def test_an_exported_program_reads_like_the_model(tmp_path: Path) -> None:
    """Its operations are aten's; blocks, shapes and plan are the same."""
    program = torch.export.export(toys.make(), (), toys.inputs(), strict=False)
    torch.export.save(program, tmp_path / "toy.pt2")
    snapshot = read_program(tmp_path / "toy.pt2")
    assert snapshot.declined is None
    assert "captured by: torch.export" in snapshot.text
    assert "blocks: 2 x Block" in snapshot.text
    assert "blocks.0: Block (and 1 alike)" in snapshot.text
    assert snapshot == read_program(tmp_path / "toy.pt2")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "model must be an nn.Module, got int"),
        ((nn.Identity(), (torch.ones(1),)), ValueError, "Identity has no parameters"),
        ((nn.Linear(1, 1), torch.ones(1)), TypeError, "args must be a tuple of positional arguments, got Tensor"),
        ((nn.Linear(1, 1), (), 3), TypeError, "kwargs must be a dict"),
        ((nn.Linear(1, 1), (1,)), ValueError, "is called with no tensor"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        take_snapshot(*arguments)
