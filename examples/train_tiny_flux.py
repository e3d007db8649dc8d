"""Train the tiny text-to-image Flux model on pictures drawn on the fly.

    python -m examples.train_tiny_flux --steps 5000 --out weights

Rectified flow: a picture x0 and noise e are blended to x_s = (1 - s) x0 + s e, and the transformer learns e - x0.
An interrupted run continues where it stopped. Each batch is a function of (seed, step) only, so the continued run sees
the data and the noise that the uninterrupted one would have seen.

The shipped weights took 5000 steps of 64 pictures. Their run began with other settings (AdamW alone, random sizes and
positions where the text says none) and has used the present ones for its last 1400 steps only, so a run from scratch
gives other weights.
"""

import argparse
import copy
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm  # type: ignore[import-untyped]

from .tiny_flux.batches import SceneBatches, image_ids
from .tiny_flux.pipeline import DEFAULT_CONFIG, TIMESTEP_SHIFT, TinyFlux, save_weights
from .tiny_flux.text_encoder import MAX_TOKENS

# Muon's steps are scaled to the size of AdamW's, but they are safe to take longer.
MATRIX_RATE_FACTOR = 3.0
CHECKPOINT_NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Options:
    """What decides the result of a training run."""

    steps: int = 5_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    ema_decay: float = 0.996
    drop_text: float = 0.1
    seed: int = 0


def start_as_identity(model: TinyFlux) -> None:
    """Zero the modulations and the output, so that each block starts as the identity and training is stable."""
    for name, module in model.transformer.named_modules():
        modulation = "norm" in name and isinstance(module, nn.Linear)
        if modulation or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def make_optimizers(model: TinyFlux, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, which learn in fewer steps with it, and AdamW for all the rest."""
    inside = [p for name, p in model.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if "transformer_blocks" not in name or p.ndim != 2]
    matrices = {"params": inside, "rate_factor": MATRIX_RATE_FACTOR}
    return [
        torch.optim.Muon([matrices], lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def flow_loss(model: TinyFlux, x0: Tensor, tokens: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity; x0 and noise [B, 64, 48], tokens [B, 12], s [B]; float32 []."""
    blend = s[:, None, None]
    # FluxPipeline passes timestep / 1000, which is s; the transformer itself multiplies by 1000.
    with torch.autocast("cpu", torch.bfloat16):
        embeds, pooled = model.text_encoder(tokens)
        (velocity,) = model.transformer(
            hidden_states=(1 - blend) * x0 + blend * noise,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=s,
            img_ids=image_ids(),
            txt_ids=torch.zeros(MAX_TOKENS, 3),
            return_dict=False,
        )
    error: Tensor = velocity.float() - (noise - x0)
    return error.square().mean()


class Trainer:
    """Model, averaged model, optimizers and step count: all that a checkpoint holds."""

    def __init__(self, options: Options, config: dict[str, Any], compiled: bool = False) -> None:
        """Seeded start; `compiled` runs the loss through torch.compile, which pays after a few hundred steps."""
        torch.manual_seed(options.seed)
        self.options, self.config, self.step = options, config, 0
        self.model = TinyFlux(config)
        start_as_identity(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = make_optimizers(self.model, options.learning_rate)
        self.batches = SceneBatches()
        self.loss = torch.compile(flow_loss) if compiled else flow_loss

    def learning_rate(self) -> float:
        """Linear warm-up, then a half cosine down to zero at the last step."""
        options = self.options
        done = min(1.0, (self.step - options.warmup) / max(1, options.steps - options.warmup))
        factor = (self.step + 1) / options.warmup if done < 0 else 0.5 * (1 + math.cos(math.pi * done))
        return options.learning_rate * factor

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make (x0, tokens, noise, s) of the current step, a function of the seed and the step alone."""
        n = self.options.batch_size
        generator = torch.Generator().manual_seed((self.options.seed << 32) + self.step)
        x0, tokens = self.batches.draw(n, generator)
        noise = torch.randn(x0.shape, generator=generator)
        kept = torch.rand(n, 1, generator=generator) >= self.options.drop_text
        # One draw per slice of [0, 1] covers all noise levels in each batch and makes the gradient less noisy.
        uniform = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        return x0, tokens * kept, noise, TIMESTEP_SHIFT * uniform / (1 + (TIMESTEP_SHIFT - 1) * uniform)

    def train_step(self) -> float:
        """One optimizer step; the loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate() * group.get("rate_factor", 1.0)
        # The flash kernel's backward pass is slow on CPUs for sequences this short; the plain formula is not.
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(self.model, *self.batch())
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interruption leaves the previous one whole."""
        state = {
            "options": asdict(self.options),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint. `steps` may differ from the saved run: the cosine then ends elsewhere."""
        state = torch.load(path, weights_only=True)
        saved = state["options"] | {"steps": self.options.steps}
        if saved != asdict(self.options):
            raise ValueError(f"{path} was made with {state['options']}, not with {asdict(self.options)}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)


def train(trainer: Trainer, out: Path, checkpoint: Path, minutes: float, save_every: int) -> None:
    """Run to the last step or the time limit, saving checkpoint and averaged weights at intervals and at the end."""
    deadline = time.monotonic() + 60 * minutes

    def save_all() -> None:
        trainer.save(checkpoint)
        save_weights(trainer.average, trainer.config, out)

    mean_loss = math.nan
    with tqdm(total=trainer.options.steps, initial=trainer.step, mininterval=10, unit="step") as bar:
        while trainer.step < trainer.options.steps and time.monotonic() < deadline:
            loss = trainer.train_step()
            mean_loss = loss if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * loss
            bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            bar.update()
            if trainer.step % save_every == 0:
                save_all()
    save_all()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--out", type=Path, required=True, help="folder for the averaged weights")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder for the checkpoint; default: the --out folder")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time-limit-minutes", type=float, default=math.inf)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    options = Options(steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed)
    checkpoint_dir = args.checkpoint_dir or args.out
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_dir / CHECKPOINT_NAME
    trainer = Trainer(options, DEFAULT_CONFIG, compiled=args.compile)
    if args.resume and checkpoint.exists():
        trainer.restore(checkpoint)
    train(trainer, args.out, checkpoint, args.time_limit_minutes, args.save_every)


if __name__ == "__main__":
    main()
