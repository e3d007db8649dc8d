"""What is exported runs without teacache_fx: in a new process, in AOTInductor's packages, in ONNX runtimes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from teacache_fx import rewrite
from teacache_fx.policy import StepReason
from teacache_fx.verification import verify_export
from tests import toys
from tests.export.verifying import CONFIG, TORCH_WARNS, decisions, onnx_file

pytestmark = TORCH_WARNS

_BATCH = Dim("batch", min=1, max=8)
SIZES: dict[str, Any] = {
    "hidden_states": {0: _BATCH, 1: Dim("tokens", min=2, max=64)},
    "timestep": {0: _BATCH},
    "encoder_hidden_states": {0: _BATCH},
}
MOVES = (1.0, 1.03, 1.06, -1.0, -1.03)  # of the latents: the fourth step begins a new trajectory


def _steps(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    inputs = {name: tensor.to(dtype) for name, tensor in toys.inputs().items()}
    return [{**inputs, "hidden_states": inputs["hidden_states"] * move} for move in MOVES]


def _expected(steps: list[dict[str, Tensor]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of the model where it is computed, and of the same with TeaCache, run eagerly, where it is not."""
    model = toys.make().to(dtype)
    rewritten = rewrite(toys.make().to(dtype), (), steps[0], config=CONFIG)
    with torch.no_grad():
        cached = [rewritten(**step) for step in steps]
        computed = [model(**step) for step in steps]
    for index in (0, 3):
        torch.testing.assert_close(cached[index], computed[index])
    for index in (1, 2, 4):
        assert not torch.allclose(cached[index].float(), computed[index].float(), rtol=0, atol=1e-6)
    return cached


RUN_ALONE = """
import sys, torch
program, steps, results = sys.argv[1:]
module = torch.export.load(program).module()
outputs = [(module(**step), int(module.teacache.reason)) for step in torch.load(steps)]
assert not any(name.startswith(("teacache_fx", "diffusers")) for name in sys.modules)
torch.save(outputs, results)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_process_without_teacache_fx(dtype: torch.dtype, tmp_path: Path) -> None:
    steps = _steps(dtype)
    rewritten = rewrite(toys.make().to(dtype), config=CONFIG)
    torch.export.save(torch.export.export(rewritten, (), steps[0]), tmp_path / "toy.pt2")
    torch.save(steps, tmp_path / "steps.pt")
    files = [tmp_path / name for name in ("toy.pt2", "steps.pt", "results.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN_ALONE, *files], check=True, timeout=300)
    outputs, reasons = zip(*torch.load(files[-1]), strict=True)
    torch.testing.assert_close(list(outputs), _expected(steps, dtype))
    restarted = StepReason.TRAJECTORY_RESTARTED
    assert reasons == (StepReason.FIRST, StepReason.SKIPPED, StepReason.SKIPPED, restarted, StepReason.SKIPPED)


def test_packages_of_varying_sizes_for_many_requests(tmp_path: Path) -> None:
    """Each request lends the package a state of its own, and sees in it what was decided."""
    own = {"teacache_reset": torch.tensor(False)}
    rewritten = rewrite(toys.make(), (), toys.inputs(), config=CONFIG, dynamic_shapes=SIZES)
    shapes = {**SIZES, "teacache_reset": None}
    program = torch.export.export(rewritten, (), {**toys.inputs(), **own}, dynamic_shapes=shapes)
    path = str(tmp_path / "toy.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    for batch, tokens in ((2, 8), (3, 12)):
        verification = verify_export(path, toys.make(), (), toys.inputs(batch, tokens), config=CONFIG)
        assert decisions(verification) == "cscsccss"

    package = torch._inductor.aoti_load_package(path)
    kept = package.get_constant_fqns()
    states = [{name: each for name, each in rewritten.teacache.fresh().items() if name in kept} for _ in range(2)]
    requests = [toys.inputs(2, 8, seed=0), toys.inputs(3, 12, seed=1)]
    for index, is_reset in enumerate((False, False, False, True)):
        for state, inputs in zip(states, requests, strict=True):
            package.load_constants(state, check_full_update=False, user_managed=True)
            output = package(**inputs, teacache_reset=torch.tensor(is_reset))
            with torch.no_grad():
                torch.testing.assert_close(output, toys.make()(**inputs))
            is_first = index == 0 or is_reset
            assert int(state["teacache.reason"]) == (StepReason.FIRST if is_first else StepReason.SKIPPED)


def test_packages_in_bfloat16(tmp_path: Path) -> None:
    steps = _steps(torch.bfloat16)
    program = torch.export.export(rewrite(toys.make().bfloat16(), config=CONFIG), (), steps[0])
    path = str(tmp_path / "toy.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    verification = verify_export(path, toys.make().bfloat16(), (), steps[0], config=CONFIG)
    assert {"skipped", "computed"} <= {step.found for step in verification.steps}
    names = {name for name in torch._inductor.aoti_load_package(path).get_constant_fqns() if "teacache" not in name}
    assert names <= set(toys.make().state_dict()), "no copies under names of their own"


@pytest.fixture(scope="module")
def varying_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as an ONNX file that takes any batch and number of tokens."""
    inputs = toys.inputs()
    rewritten = rewrite(toys.make(), (), inputs, config=CONFIG, state="io", dynamic_shapes=SIZES)
    kwargs = {**inputs, "teacache_state": rewritten.initial_state(**inputs)}
    shapes = {**SIZES, "teacache_state": rewritten.state_dynamic_shapes()}
    return onnx_file(rewritten, kwargs, tmp_path_factory.mktemp("onnx"), dynamic_shapes=shapes)


def test_onnx_files_of_varying_sizes(varying_file: Path) -> None:
    for batch, tokens in ((2, 8), (3, 12)):
        verification = verify_export(varying_file, toys.make(), (), toys.inputs(batch, tokens), config=CONFIG)
        assert decisions(verification) == "cscsccss"


def test_onnx_in_float16(tmp_path: Path) -> None:
    steps = _steps(torch.float16)
    rewritten = rewrite(toys.make().half(), (), steps[0], config=CONFIG, state="io")
    path = onnx_file(rewritten, {**steps[0], "teacache_state": rewritten.initial_state()}, tmp_path)
    verification = verify_export(path, toys.make().half(), (), steps[0], config=CONFIG)
    assert {"skipped", "computed"} <= {step.found for step in verification.steps}


def test_onnx_skips_run_less(varying_file: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own profile of a computed and of a skipped step: the `If` goes both ways."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(varying_file, options)
    inputs = toys.inputs()
    state = rewrite(toys.make(), (), inputs, config=CONFIG, state="io").initial_state()
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    feeds |= {f"teacache_state_{name}": tensor.numpy() for name, tensor in state.items()}
    outputs = [put.name for put in session.get_outputs()]
    assert outputs[0] == "output"
    for _ in range(2):
        results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        feeds |= {name.replace("_next", ""): results[name] for name in outputs[1:]}
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    matmuls: list[int] = [0]
    for event in events:
        if event["name"] == "model_run":
            matmuls.append(0)  # an event ends what it tells of
        elif "args" in event and event["args"].get("op_name") in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
            matmuls[-1] += 1
    computed, skipped, _ = matmuls
    assert int(feeds["teacache_state_consecutive_skips"]) == 1
    assert float(feeds["teacache_state_latents_move"]) == 0, "not 0 / 0, which no jump would be seen after"
    assert 0 < skipped < computed / 2


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # of zeros, before the first step
def test_onnx_in_bfloat16(tmp_path: Path) -> None:
    """By ONNX's own evaluator: ONNX Runtime has no bfloat16 matrix product on the CPU."""
    import ml_dtypes
    import onnx
    from onnx.reference import ReferenceEvaluator

    steps = _steps(torch.bfloat16)
    rewritten = rewrite(toys.make().bfloat16(), (), steps[0], config=CONFIG, state="io")
    state = rewritten.initial_state()
    model = onnx.load(onnx_file(rewritten, {**steps[0], "teacache_state": state}, tmp_path))
    onnx.checker.check_model(model, full_check=True)
    assert sum(len(weight.raw_data) for weight in model.graph.initializer) < 1.1 * sum(
        parameter.nbytes for parameter in rewritten.parameters()
    )

    def array(tensor: Tensor) -> Any:
        is_half = tensor.dtype == torch.bfloat16
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_half else tensor.numpy()

    evaluator = ReferenceEvaluator(model)
    feeds = {f"teacache_state_{name}": array(tensor) for name, tensor in state.items()}
    skips = []
    for step, expected in zip(steps, _expected(steps, torch.bfloat16), strict=True):
        results: Any = evaluator.run(None, {**{name: array(tensor) for name, tensor in step.items()}, **feeds})
        np.testing.assert_allclose(results[0].astype(np.float32), expected.float().numpy(), rtol=0.05, atol=0.05)
        feeds = {
            name.replace("_next", ""): each for name, each in zip(rewritten.output_names[1:], results[1:], strict=True)
        }
        skips.append(int(feeds["teacache_state_consecutive_skips"]))
    assert skips == [0, 1, 2, 0, 1]


def test_executorch(tmp_path: Path) -> None:
    exir = pytest.importorskip("executorch.exir", reason="ExecuTorch is not installed")
    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    steps = _steps()
    rewritten = rewrite(toys.make(), (), steps[0], config=CONFIG, state="io")
    state = rewritten.initial_state()
    program = torch.export.export(rewritten, (), {**steps[0], "teacache_state": state})
    shift = torch.ops.aten.bitwise_right_shift.Tensor_Scalar
    edge = exir.to_edge(program, compile_config=exir.EdgeCompileConfig(_core_aten_ops_exception_list=[shift]))
    (tmp_path / "toy.pte").write_bytes(edge.to_executorch().buffer)
    method = runtime.load_program(tmp_path / "toy.pte").load_method("forward")
    skips = []
    for step, expected in zip(steps, _expected(steps), strict=True):
        output, *following = (tensor.clone() for tensor in method.execute([*step.values(), *state.values()]))
        torch.testing.assert_close(output, expected)
        state = dict(zip(state, following, strict=True))
        skips.append(int(state["consecutive_skips"]))
    assert skips == [0, 1, 2, 0, 1]
