"""What the export examples share: a plain denoising loop for the tiny model, a table of times, a grid of pictures."""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from examples.generation import SHIPPED_CONFIG, SHIPPED_GUIDANCE, SHIPPED_STEPS
from examples.options import at_least_one, threshold_value
from examples.tiny_flux.batches import GRID, image_ids
from examples.tiny_flux.pipeline import TinyFluxPipeline, load_pipeline
from teacache_fx import TeaCacheConfig

PROMPTS = (
    "a red circle on a blue background",
    "a small yellow ring on a purple background at the top left",
    "a green triangle on a white background",
    "a large blue square on a yellow background",
)
COND, UNCOND = 0, 1  # the guidance branches; each has a state of its own
Predict = Callable[[int, dict[str, Tensor]], tuple[Tensor, bool]]
"""Runs one branch on the transformer's arguments; returns what it predicts, and whether the blocks were skipped."""


def config_of(rel_l1_thresh: float) -> TeaCacheConfig:
    """The settings of the shipped model; see `examples.generation`."""
    return TeaCacheConfig(rel_l1_thresh, tuple(SHIPPED_CONFIG["coefficients"]))


def arguments(doc: str, arguments: Sequence[str] | None, output: Path, *flags: tuple[str, str]) -> argparse.Namespace:
    """The command line of an export example; `flags` are switches of its own, each with its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="PROMPT", help="one picture each")
    parser.add_argument("--steps", type=at_least_one, default=SHIPPED_STEPS, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rel-l1-thresh", type=threshold_value, default=SHIPPED_CONFIG["rel_l1_thresh"])
    parser.add_argument("--output", type=Path, default=output, metavar="FOLDER", help=f"default: {output}")
    for flag, text in flags:
        parser.add_argument(flag, action="store_true", help=text)
    args = parser.parse_args(arguments)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the folder --output {args.output}: {error.strerror}")
    return args


@dataclass(frozen=True)
class Job:
    """What to sample.

    Attributes:
        prompts: one picture each.
        latents: noise, float32 [prompts, 64, 48].
        sigmas: noise levels, float32 [steps + 1], from 1 down to 0.
        branches: arguments of the transformer that only depend on the prompt, for `COND` and `UNCOND`.
    """

    prompts: tuple[str, ...]
    latents: Tensor
    sigmas: Tensor
    branches: tuple[dict[str, Tensor], dict[str, Tensor]]

    def inputs(self, latents: Tensor, step: int, branch: int) -> dict[str, Tensor]:
        """The arguments of one call of the transformer."""
        timestep = self.sigmas[step].repeat(len(latents))
        return {"hidden_states": latents, "timestep": timestep, **self.branches[branch]}

    def first_inputs(self) -> dict[str, Tensor]:
        """Those of the first call, to export with."""
        return self.inputs(self.latents, 0, COND)


def load_job(args: argparse.Namespace) -> tuple[TinyFluxPipeline, Job]:
    """The tiny model, and what the command line asks of it.

    Raises:
        SystemExit: a word of a prompt is unknown to it.
    """
    pipe = load_pipeline()
    try:
        encoded = pipe.encode(args.prompts)
    except ValueError as error:
        raise SystemExit(f"error: --prompts: {error}") from None
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / args.steps, args.steps).tolist())
    latents = torch.randn(len(args.prompts), GRID * GRID, 48, generator=torch.Generator().manual_seed(args.seed))
    words = encoded["prompt_embeds"].shape[1]

    def branch(prefix: str) -> dict[str, Tensor]:
        return {
            "encoder_hidden_states": encoded[f"{prefix}prompt_embeds"],
            "pooled_projections": encoded[f"{prefix}pooled_prompt_embeds"],
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(words, 3),
        }

    return pipe, Job(tuple(args.prompts), latents, pipe.scheduler.sigmas.float(), (branch(""), branch("negative_")))


@dataclass(frozen=True)
class Samples:
    """What came out of a denoising loop.

    Attributes:
        name: of the program that made it.
        pictures: float32 [prompts, 32, 32, 3] in [0, 1].
        seconds: of each call of the transformer.
        skipped: for each call, whether the blocks were skipped.
    """

    name: str
    pictures: Tensor
    seconds: tuple[float, ...]
    skipped: tuple[bool, ...]


@torch.no_grad()
def denoise(name: str, job: Job, predict: Predict) -> Samples:
    """Euler's method from noise to pictures, guided by two calls a step."""
    latents, seconds, skipped = job.latents, [], []
    for step in range(len(job.sigmas) - 1):
        predicted = []
        for branch in (COND, UNCOND):
            started = time.perf_counter()
            velocity, is_skipped = predict(branch, job.inputs(latents, step, branch))
            seconds.append(time.perf_counter() - started)
            skipped.append(is_skipped)
            predicted.append(velocity)
        velocity = predicted[UNCOND] + SHIPPED_GUIDANCE * (predicted[COND] - predicted[UNCOND])
        latents = latents + (job.sigmas[step + 1] - job.sigmas[step]) * velocity
    return Samples(name, pictures_of(latents), tuple(seconds), tuple(skipped))


def pictures_of(latents: Tensor) -> Tensor:
    """Latents [n, 64, 48] as pictures [n, 32, 32, 3] in [0, 1]."""
    patches = latents.reshape(-1, GRID, GRID, 12, 2, 2).permute(0, 3, 1, 4, 2, 5)
    pictures = pixel_shuffle(patches.reshape(-1, 12, 2 * GRID, 2 * GRID), 2)
    return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def save(rows: Sequence[Samples], job: Job, folder: Path) -> None:
    """Writes `pictures.png`, a row for each program, and `table.md`, which is printed as well."""
    table = _table(rows)
    (folder / "table.md").write_text(table, "utf-8")
    _grid(rows, job.prompts).savefig(folder / "pictures.png")
    print(f"\n{table}\n{folder / 'pictures.png'}\n{folder / 'table.md'}")


def _table(rows: Sequence[Samples]) -> str:
    lines = ["| program | step | calls | ms each | of a computed step |", "|---|---|---|---|---|"]
    for samples in rows:
        kinds = {
            kind: [each for each, skipped in zip(samples.seconds, samples.skipped, strict=True) if skipped is is_skip]
            for kind, is_skip in (("computed", False), ("skipped", True))
        }
        computed = statistics.median(kinds["computed"])
        for kind, seconds in kinds.items():
            if seconds:
                median = statistics.median(seconds)
                cells = (samples.name, kind, str(len(seconds)), f"{1e3 * median:.2f}", f"{median / computed:.3f}")
                lines.append(f"| {' | '.join(cells)} |")
    psnr = [f"{row.name}: {_psnr_db(row.pictures, rows[0].pictures):.0f} dB" for row in rows[1:]]
    return "\n".join([*lines, "", f"PSNR against {rows[0].name}: {', '.join(psnr)}", ""])


def _psnr_db(pictures: Tensor, reference: Tensor) -> float:
    error = (pictures - reference).double().square().mean()
    return float(-10 * error.clamp_min(1e-20).log10())


def _grid(rows: Sequence[Samples], prompts: Sequence[str]) -> Figure:
    count = len(prompts)
    figure = Figure(figsize=(1.4 + 1.4 * count, 0.6 + 1.4 * len(rows)), dpi=150, layout="constrained")
    cells = figure.subplots(len(rows), count, squeeze=False)
    for number, samples in enumerate(rows):
        for column, prompt in enumerate(prompts):
            axes = cells[number][column]
            axes.imshow(samples.pictures[column].numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if number == 0:
                axes.set_title(textwrap.fill(prompt, 20), fontsize=6.5)
            if column == 0:
                skips = f"{sum(samples.skipped)} of {len(samples.skipped)} calls skipped"
                axes.set_ylabel(f"{samples.name}\n{skips}", fontsize=6.5)
    return figure
