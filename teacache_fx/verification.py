"""Checks that an exported program decides and computes as the model with TeaCache does.

Note [How a vanished cache is found]: a program without a cache gives good pictures, only slowly. So each step is
compared with both outputs that it might have, of computing and of reusing, and the nearer one tells what the program
did. The steps are chosen so that the accumulated distance stops a little below the threshold, where a program with a
lower one computes, and goes a little beyond, where one with a higher one still skips.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx.checks import check_count
from teacache_fx.config import TeaCacheConfig
from teacache_fx.open_program import open_program
from teacache_fx.own_inputs import CONTEXT, RESET, STATE
from teacache_fx.program_runners import Expected, ProgramRunner
from teacache_fx.reference_steps import Reference, ReferenceStep, State, tensors_of
from teacache_fx.signature import RECORDED
from teacache_fx.state_buffers import SIZES
from teacache_fx.verified_steps import ExportError, Verification, VerifiedStep, judge

_STATE = f"{STATE}_"
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2
_MARGIN, _HALF_MARGIN = 0.05, 0.15


def verify_export(
    program_or_path: Any,
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: TeaCacheConfig | None = None,
    num_steps: int = 8,
    tolerance: float | None = None,
) -> Verification:
    """Runs an exported program through steps of both branches, and compares each with the model.

    A computed step must give what the unmodified model gives, and the decisions and the skipped steps must be those of
    `rewrite(model, args, kwargs, config=config, state="io")`. The program begins with a fresh state; an
    `ExportedProgram` stays as it is, and a loaded package is left in the state that the last step leaves.

    Args:
        program_or_path: an `ExportedProgram`; what `torch._inductor.aoti_load_package` returns; or the path of a .pt2
            file of either kind, or of an .onnx file.
        model: the transformer that was exported, unmodified.
        args: positional arguments of one step; the other steps are made from it by moving the latents.
        kwargs: its keyword arguments.
        config: the settings that were exported; `None` for the defaults.
        num_steps: how many steps to run; warm-up steps come on top.
        tolerance: how far outputs may differ, relative to their largest value; `None` for 0.001, or 0.05 where the
            model computes in half precision.

    Returns:
        what was found; print it.

    Raises:
        ExportError: a decision or an output differs; the message is the table. A `VerificationError`.
        TypeError: `program_or_path` or `model` is of a wrong type.
        FileNotFoundError: there is no such file.
        ValueError: `tolerance` is no such number, the file holds no program, the program takes other inputs or returns
            other outputs than the model, the settings never skip a step, or the arguments give no finite numbers.
        ImportError: an .onnx file, and ONNX Runtime is not installed.
        Declined: the model cannot be rewritten.
    """
    check_count("num_steps", num_steps, 2)
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be a finite number that is not negative, got {tolerance}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    program = open_program(program_or_path, list(inspect.signature(model.forward).parameters))
    is_half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in model.parameters())
    tolerance = (_HALF_TOLERANCE if is_half else _TOLERANCE) if tolerance is None else tolerance
    with torch.no_grad():
        reference = Reference(model, args, kwargs or {}, config or TeaCacheConfig())
        _check_inputs(program, reference)
        steps = list(reference.steps(num_steps, _HALF_MARGIN if is_half else _MARGIN))
        if not any(step.decision == "skipped" for step in steps):
            raise ValueError(
                f"no step is skipped with these settings, so nothing can be verified: the accumulated distance is "
                f"{min((step.accumulated for step in steps if step.accumulated is not None), default=0):.2f} "
                "thresholds at the smallest move; give the settings that were exported, or export a larger threshold"
            )
        found = _run(program, reference, steps)
    name = os.fspath(program_or_path) if isinstance(program_or_path, (str, os.PathLike)) else "the program"
    verification = Verification(f"{name} ({program.kind})", tuple(found), tolerance)
    if verification.problem:
        raise ExportError(verification)
    return verification


def _check_inputs(program: ProgramRunner, reference: Reference) -> None:
    given = {**reference.values, **_own_inputs(program, reference.initial_state())}
    tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
    differences = [f"it has no input {name}" for name in given if name in tensors and name not in program.inputs]
    for name, expected in program.inputs.items():
        if name not in given:
            differences.append(f"its input {name} is not among the arguments")
        elif name in tensors and not _fits(given[name], expected):
            value = given[name]
            wanted = f"{_dtype(expected.dtype)} {[size or 'any' for size in expected.shape or ()]}"
            differences.append(f"its input {name} is {wanted}, given {_dtype(value.dtype)} {list(value.shape)}")
    if unknown := program.kept.difference(reference.initial_state(), RECORDED, [SIZES]):
        differences.append(f"it keeps {', '.join(sorted(unknown))}, which is nothing of this version's")
    if differences:
        raise ValueError(
            f"the {program.kind} program was not made from this model and these arguments by this version of "
            f"teacache_fx: {'; '.join(differences)}"
        )


def _own_inputs(program: ProgramRunner, state: State) -> dict[str, Tensor]:
    """Those that the rewriting has added, as far as the program has any."""
    device = state["step_index"].device
    own = {RESET: torch.tensor(False, device=device), CONTEXT: torch.tensor(0, device=device)}
    own = {name: tensor for name, tensor in own.items() if name in program.inputs}
    if any(name.startswith(_STATE) for name in program.inputs):
        own |= {_STATE + name: tensor for name, tensor in state.items()}
    return own


def _fits(value: Tensor, expected: Expected) -> bool:
    if expected.dtype is None or expected.shape is None:
        return True
    sizes = zip(value.shape, expected.shape, strict=False)
    is_shape = value.ndim == len(expected.shape) and all(wanted in (None, size) for size, wanted in sizes)
    return value.dtype == expected.dtype and is_shape


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _run(program: ProgramRunner, reference: Reference, steps: Sequence[ReferenceStep]) -> list[VerifiedStep]:
    state, found = reference.initial_state(), []
    own = _own_inputs(program, state)
    is_io = _STATE + "step_index" in own
    program.forget({**steps[0].values, **own}, reference.latents)
    for step in steps:
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in step.values.items()}
        outputs = tensors_of(program.run({**copies, **own}))
        count = len(step.outputs[step.decision])
        _check_outputs(outputs, [*step.outputs[step.decision], *(state.values() if is_io else ())])
        if outputs[count:]:
            state = dict(zip(state, outputs[count:], strict=True))
            own |= {_STATE + name: tensor for name, tensor in state.items()}
        found.append(judge(outputs[:count], step, _kept_state(program, own)))
    return found


def _check_outputs(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    found, wanted = ([list(tensor.shape) for tensor in tensors] for tensors in (outputs, expected))
    if found != wanted:
        raise ValueError(
            f"the program returns tensors of shapes {found}, and the model {wanted}: it was not made from this model"
        )


def _kept_state(program: ProgramRunner, own: Mapping[str, Tensor]) -> State:
    """The state that the program has after a step, as far as it can be read; of the first context."""
    if CONTEXT in program.inputs:
        return {name: tensor[0] for name, tensor in program.state().items()}
    return {**program.state(), **{name.removeprefix(_STATE): tensor for name, tensor in own.items()}}
