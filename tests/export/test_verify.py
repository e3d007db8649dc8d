"""verify_export on programs of every kind: good ones pass, and those that lost something are found out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import teacache_fx
from teacache_fx.errors import VerificationError
from teacache_fx.verification import verify_export
from teacache_fx.verified_steps import ExportError
from tests import toys
from tests.export.verifying import CONFIG, TORCH_WARNS, Forgetful, decisions, export, onnx_file, verify

RESET, CONTEXT = {"teacache_reset": torch.tensor(False)}, {"teacache_context": torch.tensor(1)}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    """The toy with its state in buffers."""
    return export()


@pytest.mark.parametrize(
    ("own", "options"),
    [
        (RESET, {}),
        ({**RESET, **CONTEXT}, {"num_contexts": 2}),
        ({}, {"state": "io"}),
    ],
    ids=["buffers", "contexts", "io"],
)
def test_programs_of_export(own: dict[str, Tensor], options: dict[str, Any]) -> None:
    program = export(own=own, **options)
    verification = verify(program)
    assert decisions(verification) == "cscsccss"
    assert [step.found for step in verification.steps] == [step.expected for step in verification.steps]
    assert all(step.stated == step.expected and step.kept for step in verification.steps)
    assert max(step.difference for step in verification.steps) < 1e-6
    assert all(not tensor.any() for name, tensor in program.state_dict.items() if "teacache" in name), "its own state"


@TORCH_WARNS
def test_saved_and_decomposed(program: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(program.run_decompositions(), tmp_path / "toy.pt2")
    verification = verify(tmp_path / "toy.pt2")
    assert all(step.stated == step.found == step.expected and step.kept for step in verification.steps)

    distances = [step.accumulated for step in verification.steps]
    wanted = [None, 0.95, 1.05, 0.4, None, 1.05, 0.5, 0.95]
    assert distances == [number if number is None else pytest.approx(number, abs=0.02) for number in wanted]


@TORCH_WARNS
def test_packages_of_aotinductor(program: ExportedProgram, tmp_path: Path) -> None:
    path = str(tmp_path / "toy.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    verification = verify(path)
    assert decisions(verification) == "cscsccss"
    assert [step.found for step in verification.steps] == [step.expected for step in verification.steps]
    assert [step.kept for step in verification.steps] == [
        True if step.expected == "skipped" else None for step in verification.steps
    ]
    loaded = torch._inductor.aoti_load_package(path)
    loaded(**toys.inputs())  # its state is in the middle of a generation
    assert decisions(verify(loaded)) == "cscsccss"
    with pytest.raises(ExportError, match="differs from the model with TeaCache"):
        verify(path, config=dataclasses.replace(CONFIG, rel_l1_thresh=0.22))
    larger = toys.inputs(batch=3)
    with pytest.raises(ValueError, match=r"hidden_states: unmatched dim value at 0, expected: 2, but got: 3"):
        verify_export(path, toys.make(), (), larger, config=CONFIG)


@TORCH_WARNS
def test_onnx_files(tmp_path: Path) -> None:
    rewritten = teacache_fx.rewrite(toys.make(), (), toys.inputs(), config=CONFIG, state="io")
    path = onnx_file(rewritten, {**toys.inputs(), "teacache_state": rewritten.initial_state()}, tmp_path)
    verification = verify(path)
    assert decisions(verification) == "cscsccss"
    assert all(step.stated == step.found == step.expected and step.kept for step in verification.steps)
    with pytest.raises(ExportError):
        verify(path, config=dataclasses.replace(CONFIG, rel_l1_thresh=0.18))
    with pytest.raises(ValueError, match=r"input hidden_states is float32 \[2, 8, 4\], given float32 \[3, 8, 4\]"):
        verify_export(path, toys.make(), (), toys.inputs(batch=3), config=CONFIG)


@TORCH_WARNS
def test_onnx_files_without_a_cache(tmp_path: Path) -> None:
    for model in (toys.make(), Forgetful(toys.make(), toys.inputs()).eval()):
        path = onnx_file(model, toys.inputs(), tmp_path)
        with pytest.raises(ExportError, match="computes every step: the cache has vanished"):
            verify(path)


def test_a_plain_model_is_found_out() -> None:
    with pytest.raises(ExportError, match="computes every step: the cache has vanished") as caught:
        verify(torch.export.export(toys.make(), (), toys.inputs(), strict=False))
    assert isinstance(caught.value, VerificationError)
    steps = caught.value.verification.steps
    assert [step.found for step in steps] == ["computed"] * len(steps)
    assert [step.kept for step in steps if step.expected == "skipped"] == [False] * 4
    assert "computed instead of skipped" in str(caught.value)


def test_a_state_that_begins_anew_is_found_out() -> None:
    model = toys.make()
    with pytest.raises(ExportError, match="computes every step: the cache has vanished"):
        verify(torch.export.export(Forgetful(model, toys.inputs()).eval(), (), toys.inputs(), strict=False))


class Swapping(nn.Module):
    """Runs the form "io", and gives two numbers of the state back in each other's place."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.rewritten = teacache_fx.rewrite(toys.make(), (), toys.inputs(), config=CONFIG, state="io")
        self.names = {first: second, second: first}

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, teacache_state: dict[str, Tensor]
    ) -> Any:
        inputs = {"hidden_states": hidden_states, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        output, state = self.rewritten(**inputs, teacache_state=teacache_state)
        return output, {name: state[self.names.get(name, name)].clone() for name in state}


@pytest.mark.parametrize(
    "names", [("previous_timestep", "timestep_direction"), ("latents_move", "previous_latents_move")], ids=str
)
def test_numbers_of_the_state_in_wrong_places_are_found_out(names: tuple[str, str]) -> None:
    model = Swapping(*names).eval()
    kwargs = {**toys.inputs(), "teacache_state": model.rewritten.initial_state()}
    with pytest.raises(ExportError, match="state was lost"):
        verify(torch.export.export(model, (), kwargs, strict=False))


@pytest.mark.parametrize("thresh", [0.187, 0.213])
def test_another_threshold_is_found_out(thresh: float, program: ExportedProgram) -> None:
    with pytest.raises(ExportError, match="differs from the model with TeaCache") as caught:
        verify(program, config=dataclasses.replace(CONFIG, rel_l1_thresh=thresh))
    assert not caught.value.verification.steps[0].problem(1e-3)


def test_other_weights_are_found_out(program: ExportedProgram) -> None:
    model = toys.make()
    model.get_parameter("blocks.1.to_out.weight").mul_(1.1)
    with pytest.raises(ExportError, match="other weights, or another model"):
        verify_export(program, model, (), toys.inputs(), config=CONFIG)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_warmup_steps": 3},
        {"max_consecutive_skips": 1},
        {"granularity": "sample"},
        {"num_final_steps": 1, "num_inference_steps": 4},
        {"coefficients": (-2.0, 2.0, 0.01)},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    verification = verify(export(config=config), config=config)
    assert {"skipped", "computed"} <= {step.found for step in verification.steps}


def test_varying_sizes() -> None:
    model, kwargs = toys.make(), toys.inputs()
    shapes = {"hidden_states": {1: Dim("tokens", min=2, max=64)}, "timestep": None, "encoder_hidden_states": None}
    rewritten = teacache_fx.rewrite(model, (), kwargs, config=CONFIG, dynamic_shapes=shapes)
    program = torch.export.export(rewritten, (), kwargs, dynamic_shapes=shapes, strict=False)
    for tokens in (8, 12):
        assert verify_export(program, model, (), toys.inputs(tokens=tokens), config=CONFIG).steps


def test_half_precision_and_positional_arguments() -> None:
    model = toys.make().bfloat16()
    args = [tensor.bfloat16() for tensor in toys.inputs().values()]
    rewritten = teacache_fx.rewrite(model, args, config=CONFIG)
    program = torch.export.export(rewritten, tuple(args), strict=False)
    verification = verify_export(program, model, args, config=CONFIG)
    assert verification.tolerance == 0.05
    assert {"skipped", "computed"} <= {step.found for step in verification.steps}
    with pytest.raises(ExportError):
        verify_export(torch.export.export(model, tuple(args), strict=False), model, args, config=CONFIG)


def test_the_table(program: ExportedProgram) -> None:
    lines = str(verify(program)).splitlines()
    assert lines[0].startswith("the program (torch.export) does what the model with TeaCache does")
    assert " ".join(lines[1].split()) == "step expected found state says difference state kept distance"
    assert lines[3].split()[:4] == ["1", "skipped", "skipped", "skipped"]
    assert len(lines) == 10
