"""Compile the tiny model with TeaCache in it ahead of time, and sample with the package: in Python, and in C++.

    python -m examples.export_aoti
    python -m examples.export_aoti --cpp     # also builds and runs examples/cpp, which needs CMake and a compiler

Writes the package `transformer.pt2`, `pictures.png` and `table.md`, the time of computed and of skipped steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.exported_sampling import (
    COND,
    UNCOND,
    Job,
    Samples,
    arguments,
    config_of,
    denoise,
    load_job,
    pictures_of,
    save,
)
from examples.generation import SHIPPED_GUIDANCE
from teacache_fx import rewrite
from teacache_fx.policy import StepReason

CPP = Path(__file__).parent / "cpp"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    cpp = ("--cpp", "also build and run the program in examples/cpp")
    args = arguments(__doc__ or "", argv, Path("out/export_aoti"), cpp)
    tool = _build(args.output / "build") if args.cpp else None  # before the long work, for its errors
    pipe, job = load_job(args)
    transformer = pipe.transformer
    path = args.output / "transformer.pt2"
    state = export(transformer, job, path, args.rel_l1_thresh)
    eager = denoise("eager, no cache", job, lambda _, inputs: (transformer(**inputs, return_dict=False)[0], False))
    rows = [eager, sample(path, job, {name: tensor.clone() for name, tensor in state.items()})]
    if tool is not None:
        rows.append(sample_in_cpp(tool, path, job, state, args))
    save(rows, job, args.output)


def export(transformer: Any, job: Job, path: Path, rel_l1_thresh: float) -> dict[str, Tensor]:
    """Writes the package; returns a state for it, by the names of its buffers."""
    inputs: dict[str, Any] = {**job.first_inputs(), "return_dict": False}
    rewritten = rewrite(transformer, (), inputs, config=config_of(rel_l1_thresh), num_contexts=2)
    own = {"teacache_reset": torch.tensor(False), "teacache_context": torch.tensor(COND)}
    program = torch.export.export(rewritten, (), {**inputs, **own})
    print("compiling ...", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return rewritten.teacache.fresh()


def sample(path: Path, job: Job, state: dict[str, Tensor]) -> Samples:
    """Samples with the package in Python."""
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # otherwise a package reads beyond the end of what is too small
    package = torch._inductor.aoti_load_package(os.fspath(path))
    kept = set(package.get_constant_fqns())
    mine = {name: tensor for name, tensor in state.items() if name in kept}
    package.load_constants(mine, check_full_update=False, user_managed=True)  # the package works on these tensors
    begins = {COND, UNCOND}

    def predict(branch: int, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
        reset = torch.tensor(branch in begins)
        begins.discard(branch)
        (velocity,) = package(**inputs, return_dict=False, teacache_reset=reset, teacache_context=torch.tensor(branch))
        return velocity, int(mine["teacache.reason"][branch]) == StepReason.SKIPPED

    return denoise("AOTInductor, TeaCache", job, predict)


def sample_in_cpp(tool: Path, package: Path, job: Job, state: dict[str, Tensor], args: argparse.Namespace) -> Samples:
    """Samples with the package in C++: noise, prompts and state go in as a file, and latents come out as one."""
    cond, uncond = job.branches
    given = {
        "latents": job.latents,
        "sigmas": job.sigmas,
        "guidance": torch.tensor(SHIPPED_GUIDANCE),
        **{f"cond.{name}": tensor for name, tensor in cond.items()},
        **{f"uncond.{name}": tensor for name, tensor in uncond.items()},
        **state,
    }
    into, out = args.output / "job.pt", args.output / "result.pt"
    torch.save(given, into)
    subprocess.run([tool, package, into, out], check=True)
    latents, seconds, skipped = torch.load(out)
    return Samples("C++, TeaCache", pictures_of(latents), tuple(seconds.tolist()), tuple(skipped.tolist()))


def _build(folder: Path) -> Path:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("error: --cpp needs CMake and a C++ compiler; leave it out, or install them")
    configure: list[str | Path] = [
        cmake,
        "-S",
        CPP,
        "-B",
        folder,
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    ]
    build: list[str | Path] = [cmake, "--build", folder, "--config", "Release"]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"error: building {CPP} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder / "sample"


if __name__ == "__main__":
    main()
