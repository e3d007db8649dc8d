"""Exported programs on a GPU: both branches, half precision, a state that a package is lent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teacache_fx import rewrite
from teacache_fx.policy import StepReason
from teacache_fx.verification import verify_export
from tests import toys
from tests.export.verifying import CONFIG, TORCH_WARNS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    TORCH_WARNS,
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_programs_and_packages(dtype: torch.dtype, tmp_path: Path) -> None:
    model = toys.make().to("cuda", dtype)
    inputs = {name: tensor.to("cuda", dtype) for name, tensor in toys.inputs().items()}
    rewritten = rewrite(model, config=CONFIG)
    program = torch.export.export(rewritten, (), inputs)
    assert {"computed", "skipped"} <= {
        step.found for step in verify_export(program, model, (), inputs, config=CONFIG).steps
    }
    path = str(tmp_path / "toy.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    assert {"computed", "skipped"} <= {
        step.found for step in verify_export(path, model, (), inputs, config=CONFIG).steps
    }

    package = torch._inductor.aoti_load_package(path)
    kept = package.get_constant_fqns()
    state = {name: tensor for name, tensor in rewritten.teacache.fresh().items() if name in kept}
    package.load_constants(state, check_full_update=False, user_managed=True)
    reasons = []
    for _ in range(2):
        package(**inputs)
        reasons.append(int(state["teacache.reason"]))
    assert reasons == [StepReason.FIRST, StepReason.SKIPPED]


def test_a_model_on_another_device() -> None:
    rewritten = rewrite(toys.make(), (), toys.inputs(), config=CONFIG)
    moved = {name: tensor.to("cuda") for name, tensor in toys.inputs().items()}
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="float32 on cuda, but the model was captured for float32 on cpu"),
    ):
        rewritten(**moved)
