"""The export examples, small: the pictures that each runtime draws, and the table of what its steps cost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples import export_aoti, export_onnx
from examples.exported_sampling import COND, Job, Samples, arguments, denoise, load_job, save
from examples.tiny_flux.checker import read_picture

STEPS = 12
PROMPTS = ["a red circle on a blue background", "a small yellow ring on a purple background at the top left"]
COMMAND = ["--steps", str(STEPS), "--prompts", *PROMPTS]


def _kept(example: Any, monkeypatch: pytest.MonkeyPatch) -> list[Samples]:
    """What an example saves; it saves it as well."""
    made: list[Samples] = []

    def keep(rows: Sequence[Samples], job: Job, folder: Path) -> None:
        made.extend(rows)
        save(rows, job, folder)

    monkeypatch.setattr(example, "save", keep)
    return made


def _rows(table: Path) -> dict[tuple[str, str], int]:
    """Calls by program and kind of step."""
    rows = re.findall(
        r"^\| ([\w+, ]+) \| (\w+) \| (\d+) \| [\d.]+ \| [\d.]+ \|$", table.read_text("utf-8"), re.MULTILINE
    )
    return {(program, kind): int(count) for program, kind, count in rows}


def _check(folder: Path, *programs: str) -> None:
    rows = _rows(folder / "table.md")
    assert rows.pop(("eager, no cache", "computed")) == 2 * STEPS
    assert {program for program, _ in rows} == set(programs)
    for program in programs:
        computed, skipped = rows[program, "computed"], rows[program, "skipped"]
        assert computed + skipped == 2 * STEPS
        assert skipped >= 4
        assert (computed, skipped) == (rows[programs[0], "computed"], rows[programs[0], "skipped"])
    with Image.open(folder / "pictures.png") as image:
        assert image.width > 400
        assert len(np.unique(np.asarray(image).reshape(-1, image.width), axis=0)) > 100


def _say_what_they_show(samples: Samples) -> None:
    found = [read_picture(picture.numpy()) for picture in samples.pictures]
    assert [(each.colour, each.shape, each.background) for each in found] == [
        ("red", "circle", "blue"),
        ("yellow", "ring", "purple"),
    ]


@pytest.fixture
def keeps_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", os.environ.get("AOTI_RUNTIME_CHECK_INPUTS", "1"))


@pytest.mark.usefixtures("keeps_environment")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_aotinductor_in_python_and_in_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has_compiler = shutil.which("cmake") is not None and shutil.which("c++") is not None
    has_compiler &= torch.version.cuda is None or torch.cuda.is_available()  # CMake asks for the toolkit torch is of
    made = _kept(export_aoti, monkeypatch)
    export_aoti.main([*COMMAND, "--output", str(tmp_path / "new"), *(["--cpp"] if has_compiler else [])])
    for samples in made:
        _say_what_they_show(samples)
    eager, python, *rest = made
    assert 0 < float((python.pictures - eager.pictures).abs().max()) < 0.2
    _check(tmp_path / "new", *(samples.name for samples in made[1:]))
    assert "PSNR against eager, no cache" in capsys.readouterr().out
    if not has_compiler:
        pytest.skip("the C++ program needs CMake, a compiler, and the toolkit of a CUDA torch: not here")
    (cpp,) = rest
    assert cpp.skipped == python.skipped
    torch.testing.assert_close(cpp.pictures, python.pictures)
    _refuses_what_is_wrong(tmp_path / "new")


def _refuses_what_is_wrong(folder: Path) -> None:
    """The program without Python, given other noise than was compiled for, a file that is missing, or no files."""
    job = torch.load(folder / "job.pt")
    torch.save({**job, "latents": job["latents"][:, :-1]}, folder / "short.pt")
    torch.save({name: tensor for name, tensor in job.items() if name != "sigmas"}, folder / "incomplete.pt")

    def run(*names: str) -> tuple[int, str]:
        done = subprocess.run([folder / "build" / "sample", *(folder / name for name in names)], capture_output=True)
        return done.returncode, done.stderr.decode()

    wrong = {
        "short.pt": "unmatched dim value",
        "missing.pt": "cannot read",
        "incomplete.pt": "there is no tensor sigmas",
    }
    for name, message in wrong.items():
        status, said = run("transformer.pt2", name, "out.pt")
        assert status == 1
        assert "error: " in said
        assert message in said
    assert run("transformer.pt2")[0] == 2
    assert not (folder / "out.pt").exists()


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _kept(export_onnx, monkeypatch)
    export_onnx.main([*COMMAND, "--output", str(tmp_path)])
    for samples in made:
        _say_what_they_show(samples)
    _check(tmp_path, "ONNX Runtime, TeaCache")
    assert 0 < float((made[1].pictures - made[0].pictures).abs().max()) < 0.2


@pytest.mark.parametrize("example", [export_aoti, export_onnx], ids=["aoti", "onnx"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "a zebra"], "zebra"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--rel-l1-thresh", "-1"], "--rel-l1-thresh: must be greater than 0"),
        (["--output", "{file}/below"], "cannot make the folder --output"),
    ],
)
def test_bad_command_lines(
    example: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    output = ["--output", str(tmp_path / "out")]
    given = [text.format(file=tmp_path / "file") for text in arguments]
    with pytest.raises(SystemExit) as caught:
        example.main([*(output if "--output" not in arguments else []), *given])
    assert message in f"{caught.value.code}{capsys.readouterr().err}"


def test_the_loop_is_the_pipelines(tmp_path: Path) -> None:
    """The plain loop gives the picture that diffusers' own pipeline gives."""
    args = arguments("", [*COMMAND, "--output", str(tmp_path)], tmp_path)
    pipe, job = load_job(args)
    transformer = pipe.transformer
    mine = denoise("eager", job, lambda _, inputs: (transformer(**inputs, return_dict=False)[0], False))
    theirs = pipe(
        **pipe.encode(PROMPTS), true_cfg_scale=2.0, num_inference_steps=STEPS, height=32, width=32,
        latents=job.latents, output_type="np",
    ).images  # fmt: skip
    np.testing.assert_allclose(mine.pictures.numpy(), theirs, atol=1e-4)
    assert set(job.inputs(job.latents, 0, COND)) == set(job.first_inputs())
