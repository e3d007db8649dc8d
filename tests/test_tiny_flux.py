"""The shipped text-to-image model, its checker and its training."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.tiny_flux import checker, pipeline, scenes, text_encoder
from examples.tiny_flux.batches import SceneBatches
from examples.train_tiny_flux import Options, Trainer, train

TINY_CONFIG = pipeline.DEFAULT_CONFIG | {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
}
MEBIBYTE = 2**20
# Under bfloat16 autocast the float32 weight of an RMS norm meets a bfloat16 input, and torch says that this is slower.
ignore_slow_norm = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


def to_picture(drawn: torch.Tensor) -> checker.Picture:
    """Drawn [3, 32, 32] in [-1, 1] to the layout that is read, [32, 32, 3] in [0, 1]."""
    picture: checker.Picture = ((drawn + 1) / 2).permute(1, 2, 0).numpy()
    return picture


def random_scenes(n: int) -> list[scenes.Scene]:
    """Scenes over all triples, held back or not."""
    rng = random.Random(0)
    every = scenes.triples(True) + scenes.triples(False)
    return [
        scenes.Scene(*rng.choice(every), rng.choice([None, *scenes.SIZES]), rng.choice([None, *scenes.POSITIONS]))
        for _ in range(n)
    ]


def test_prompt_mentions_what_is_set() -> None:
    scene = scenes.Scene("circle", "red", "orange")
    assert scene.prompt == "a red circle on an orange background"
    placed = dataclasses.replace(scene, size="small", position="top left")
    assert placed.prompt == "a small red circle on an orange background at the top left"


def test_unmentioned_means_large_and_centered() -> None:
    scene = scenes.Scene("circle", "red", "orange")
    assert torch.equal(scene.draw(), dataclasses.replace(scene, size="large", position="center").draw())


def test_undrawable_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'hexagon'.*circle, square"):
        scenes.Scene("hexagon", "red", "blue")
    with pytest.raises(ValueError, match="cannot be seen"):
        scenes.Scene("circle", "red", "red")


def test_checker_reads_clean_drawings() -> None:
    drawn = random_scenes(200)
    counts = checker.accuracy(drawn, [to_picture(scene.draw()) for scene in drawn])
    assert counts == dict.fromkeys([*checker.ATTRIBUTES, "all"], (200, 200))


@pytest.mark.parametrize(
    "change",
    [{"shape": "square"}, {"colour": "green"}, {"background": "white"}, {"size": "small"}, {"position": "top"}],
)
def test_checker_notices_one_wrong_attribute(change: dict[str, str]) -> None:
    scene = scenes.Scene("circle", "red", "blue", "large", "center")
    check = checker.check_picture(scene, to_picture(dataclasses.replace(scene, **change).draw()))
    assert [name for name, right in check.items() if not right] == list(change)


def test_checker_reads_no_shape_in_a_spoilt_picture() -> None:
    scene = scenes.Scene("circle", "red", "blue", "large", "center")
    picture = to_picture(scene.draw()).copy()
    picture[10:14, 4:28] = picture[0, 0]
    assert checker.read_picture(picture).shape is None
    assert checker.read_picture(picture * 0).shape is None


def test_unknown_word_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown word 'teapot'.*known words are a, an, on.*circle"):
        text_encoder.tokenize(["a red teapot on a blue background"])


def test_empty_prompt_is_padding_only() -> None:
    assert not text_encoder.tokenize([""]).any()


def test_training_never_shows_held_back_scenes() -> None:
    batches = SceneBatches()
    triple, size, position = batches.indices(20_000, torch.Generator().manual_seed(0))
    seen = {batches.triples[index] for index in triple.tolist()}
    assert seen == set(batches.triples)
    assert not any(scenes.is_held_back(scenes.Scene(*triple)) for triple in seen)
    assert set(size.tolist()) == set(range(len(scenes.SIZES)))
    assert set(position.tolist()) == set(range(len(scenes.POSITIONS)))
    held_back = {" ".join(triple) for triple in scenes.triples(True)}
    assert 0.1 < len(held_back) / len(scenes.triples(True) + scenes.triples(False)) < 0.2
    assert all(scenes.is_held_back(scene) for scene in scenes.held_back_scenes(50, seed=0))


def test_training_text_agrees_with_training_pictures() -> None:
    latents, tokens = SceneBatches().draw(16, torch.Generator().manual_seed(0))
    unpack: Callable[..., torch.Tensor] = pipeline.TinyFluxPipeline._unpack_latents
    (pictures,) = pipeline.PixelShuffleAutoencoder().decode(unpack(latents, 32, 32, 2))
    for picture, row in zip(pictures, tokens, strict=True):
        reading = checker.read_picture(to_picture(picture))
        assert reading.shape is not None
        prompt = " ".join(text_encoder.WORDS[index] for index in row.tolist()).strip()
        shape, colour, background = str(reading.shape), str(reading.colour), str(reading.background)
        sizes = {reading.size} | ({None} if reading.size == scenes.DEFAULT_SIZE else set())
        places = {reading.position} | ({None} if reading.position == scenes.DEFAULT_POSITION else set())
        assert prompt in {scenes.Scene(shape, colour, background, s, p).prompt for s in sizes for p in places}


def test_autoencoder_is_exact() -> None:
    vae = pipeline.PixelShuffleAutoencoder()
    picture = torch.rand(2, 3, 32, 32)
    latents = vae.encode(picture)
    assert latents.shape == (2, 12, 16, 16)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], picture)


@ignore_slow_norm
def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    options = Options(steps=6, batch_size=4, warmup=2)
    whole = Trainer(options, TINY_CONFIG)
    for _ in range(6):
        whole.train_step()
    first = Trainer(options, TINY_CONFIG)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(options, TINY_CONFIG)
    resumed.restore(tmp_path / "checkpoint.pt")
    train(resumed, tmp_path, tmp_path / "checkpoint.pt", minutes=10, save_every=100)
    assert resumed.step == 6
    for part in ("model", "average"):
        expected = getattr(whole, part).state_dict()
        for name, value in getattr(resumed, part).state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert pipeline.load_pipeline(tmp_path).transformer.config.num_layers == 1


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Trainer(Options(batch_size=4), TINY_CONFIG).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="was made with"):
        Trainer(Options(batch_size=8), TINY_CONFIG).restore(tmp_path / "checkpoint.pt")


def test_shipped_weights_are_small() -> None:
    files = list(pipeline.WEIGHTS_DIR.iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert sum(file.stat().st_size for file in files) <= 16 * MEBIBYTE


def test_shipped_weights_draw_held_back_prompts() -> None:
    wanted = scenes.held_back_scenes(4, seed=0)
    pictures = checker.sample(pipeline.load_pipeline(), [scene.prompt for scene in wanted], steps=12)
    assert pictures.shape == (4, 32, 32, 3)
    assert checker.accuracy(wanted, pictures)["all"] == (4, 4)
