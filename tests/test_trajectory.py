"""The evidence of a step: which numbers the conditioning holds, where the timestep is, how far the latents moved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacache_fx import trajectory
from teacache_fx.trajectory import content_hash, gather_evidence

BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
    torch.uint8: torch.uint8,
    torch.int64: torch.int64,
    torch.complex64: torch.int32,
}
DTYPES = [*BITS, torch.bool]


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers of both signs and many sizes, no two alike where the dtype has room for it."""
    numbers = torch.randn(shape, dtype=torch.float64) * 100
    if dtype == torch.complex64:
        return torch.complex(numbers.float(), torch.randn(shape))
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def tensors() -> list[Tensor]:
    """Every dtype and layout that conditioning comes in; one is long enough for places beyond 16 bits."""
    found = [filled(dtype, 6, 37) for dtype in DTYPES]
    base = filled(torch.float32, 8, 10, 6)
    found += [base.transpose(0, 2), base[::2, 1:, :3], base[:, :1].expand(8, 7, 6), filled(torch.bfloat16, 5, 9).t()]
    found += [torch.tensor(3.5), torch.tensor(7), torch.tensor(True), torch.zeros(0), torch.zeros(3, 0)]
    return [*found, filled(torch.float32, 300, 300), torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1e-45])]


def hash_all(values: Sequence[Tensor]) -> list[Tensor]:
    return [content_hash(value) for value in values]


def hash_rows(values: Sequence[Tensor]) -> list[Tensor]:
    return [content_hash(value, per_sample=True) for value in values]


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("function", [hash_all, hash_rows])
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compilers_agree(function: Callable[[Sequence[Tensor]], list[Tensor]], dynamic: bool) -> None:
    values = [value for value in tensors() if function is hash_all or value.ndim > 1]
    compiled = torch.compile(function, dynamic=dynamic, fullgraph=True)
    found, expected = compiled(values), function(values)
    assert {one.dtype for one in found} == {torch.int64}
    assert [one.tolist() for one in found] == [one.tolist() for one in expected]
    distinct = {number for one in expected for number in one.reshape(-1).tolist()}
    assert len(distinct) >= len(values) - 1  # the two empty ones are alike, and nothing else


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter_but_places_do(dtype: torch.dtype) -> None:
    value = filled(dtype, 6, 10)
    spread = torch.stack([value, value], -1)[..., 0]
    assert not spread.is_contiguous()
    assert content_hash(spread) == content_hash(value) == content_hash(value.clone())
    assert content_hash(value.t()) == content_hash(value.t().contiguous()) != content_hash(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_last_bit_of_any_element_changes_it(dtype: torch.dtype, per_sample: bool) -> None:
    value = filled(dtype, 4, 9)
    before = content_hash(value, per_sample)
    bits = BITS.get(dtype, torch.bool)
    seen = {int(content_hash(value))}
    for number in range(value.view(bits).numel()):
        changed = value.clone()
        flat = changed.view(bits).view(-1)
        flat[number] = flat[number].logical_not() if bits == torch.bool else flat[number] ^ 1
        after = content_hash(changed, per_sample)
        rows = [int(number // (flat.numel() // 4)) == row for row in range(4)] if per_sample else True
        assert (after != before).tolist() == rows
        seen.add(int(content_hash(changed)))
    assert len(seen) == value.view(bits).numel() + 1


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_counts(bit: int) -> None:
    value = filled(torch.float32, 3, 5)
    flat = value.view(torch.int32).clone()
    flat[1, 2] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert content_hash(flat.view(torch.float32)) != content_hash(value)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bool])
def test_swapped_elements_rows_and_signs_change_it(dtype: torch.dtype) -> None:
    value = torch.arange(1, 25).reshape(4, 6).to(dtype)
    before = content_hash(value)
    seen = {int(before)}
    for number in range(23):
        order = torch.arange(24)
        order[[number, number + 1]] = order[[number + 1, number]]
        seen.add(int(content_hash(value.view(-1)[order].view(4, 6))))
    swapped_rows = [value[[1, 0, 2, 3]], value[[3, 1, 2, 0]], value.roll(1, 0), value.roll(1, 1), value.flip(0)]
    seen |= {int(content_hash(other)) for other in swapped_rows}
    assert len(seen) == 24 + len(swapped_rows)


def test_the_place_of_a_one_among_zeros_counts() -> None:
    places = torch.eye(300)
    assert len(set(content_hash(places, per_sample=True).tolist())) == 300
    assert len({int(content_hash(torch.zeros(length))) for length in range(50)}) == 50


def test_zeros_of_either_sign_differ() -> None:
    assert content_hash(torch.tensor([0.0])) != content_hash(torch.tensor([-0.0]))


@pytest.mark.parametrize("place", [0, trajectory._LOW, trajectory._HIGH % 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_no_two_elements_give_the_same_at_one_place(dtype: torch.dtype, place: int) -> None:
    """Whole rows of numbers, their complements among them, side by side; only one element differs."""
    values = torch.cat([torch.arange(-50, 50), 1 << torch.arange(40), ~(1 << torch.arange(40))]).to(dtype)
    values = torch.tensor(sorted(set(values.tolist())), dtype=dtype)
    rows = torch.zeros(len(values), place + 1, dtype=dtype)
    rows[:, -1] = values
    assert len(set(content_hash(rows, per_sample=True).tolist())) == len(values)


def test_lazily_conjugated_numbers_are_hashed() -> None:
    value = filled(torch.complex64, 3, 4)
    assert content_hash(value.conj()) == content_hash(value.conj().resolve_conj()) != content_hash(value)
    assert content_hash(value.conj().imag) == content_hash(-value.imag)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 7), st.sampled_from(DTYPES))
def test_rows_are_hashed_as_if_alone(seed: int, batch: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    value = filled(dtype, batch, size, 2)
    rows = content_hash(value, per_sample=True)
    assert (rows.dtype, rows.shape) == (torch.int64, (batch,))
    assert rows.tolist() == [int(content_hash(row)) for row in value]
    assert rows.tolist() == [int(content_hash(row[None], per_sample=True)[0]) for row in value]


BATCH = 3
LATENTS, PREVIOUS = torch.rand(BATCH, 4, 6), torch.rand(BATCH, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    ("time", "mean", "rows"),
    [
        ([[8.0] * 8, [0.0, 16.0] * 4, [4.0] * 8], 20 / 3, [8, 8, 4]),  # per token
        ([[[2.0], [4.0]], [[6.0], [8.0]], [[1.0], [1.0]]], 22 / 6, [3, 7, 1]),
        ([6.0], 6, [6, 6, 6]),
        (6.0, 6, [6, 6, 6]),
        ([[2.0, 4.0]], 3, [3, 3, 3]),
        ([1.0, 2.0, 6.0], 3, [1, 2, 6]),
    ],
)
def test_timesteps_of_any_shape(time: list[float], mean: float, rows: list[float], dtype: torch.dtype) -> None:
    timestep = torch.tensor(time).to(dtype)
    whole = gather_evidence(timestep, LATENTS, PREVIOUS, []).timestep
    each = gather_evidence(timestep, LATENTS, PREVIOUS, [], per_sample=True).timestep
    assert (whole.dtype, whole.shape, each.dtype, each.shape) == (torch.float32, (), torch.float32, (BATCH,))
    assert float(whole) == pytest.approx(mean)
    assert each.tolist() == rows


@pytest.mark.parametrize("per_sample", [False, True])
def test_without_timestep_and_conditioning(per_sample: bool) -> None:
    evidence = gather_evidence(None, LATENTS.bfloat16(), PREVIOUS.bfloat16(), [], per_sample=per_sample)
    shape = (BATCH,) if per_sample else ()
    assert [tuple(field.shape) for field in evidence] == [shape] * 4
    assert [field.dtype for field in evidence] == [torch.float32, torch.float32, torch.int64, torch.int64]
    assert not evidence.timestep.any()
    assert not evidence.conditioning.any()


def test_the_move_is_that_of_the_latents() -> None:
    current, previous = LATENTS.double().numpy(), PREVIOUS.double().numpy()
    difference, size = abs(current - previous), abs(previous)
    whole = gather_evidence(None, LATENTS, PREVIOUS, []).latents_move
    rows = gather_evidence(None, LATENTS, PREVIOUS, [], per_sample=True).latents_move
    assert float(whole) == max(rows.tolist()), "one slot of a batch may have been given to another request"
    assert rows.tolist() == pytest.approx((difference.sum((1, 2)) / size.sum((1, 2))).tolist(), rel=1e-5)


def hashed(conditioning: Sequence[Tensor], per_sample: bool = False) -> list[int]:
    return (
        gather_evidence(None, LATENTS, PREVIOUS, conditioning, per_sample=per_sample).conditioning.reshape(-1).tolist()
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_every_conditioning_tensor_and_its_place_count(per_sample: bool) -> None:
    parts = [filled(torch.float32, BATCH, 5, 2), filled(torch.bfloat16, BATCH, 4), torch.tensor(7.0), torch.ones(1)]
    before = hashed(parts, per_sample)
    assert hashed(copy.deepcopy(parts), per_sample) == before
    for number in range(len(parts)):
        changed = [part.clone() for part in parts]
        changed[number].view(-1)[0] += 1
        differs = [one != other for one, other in zip(hashed(changed, per_sample), before, strict=True)]
        assert differs == ([True, number > 1, number > 1] if per_sample else [True])
    twins = [parts[0], parts[0] + 1]
    assert hashed(twins, per_sample) != hashed(twins[::-1], per_sample)
    assert hashed([parts[0]] * 2, per_sample) != hashed([parts[0]], per_sample)


def test_a_sample_keeps_its_hash_in_another_batch() -> None:
    prompts, shared = filled(torch.float32, BATCH, 5), torch.ones(1, 4)
    rows = hashed([prompts, shared], per_sample=True)
    order = [2, 0, 1]
    assert hashed([prompts[order], shared], per_sample=True) == [rows[number] for number in order]


@pytest.mark.parametrize("per_sample", [False, True])
def test_compiled_evidence_is_the_same(per_sample: bool) -> None:
    def gather(timestep: Tensor, conditioning: list[Tensor]) -> list[Tensor]:
        return list(gather_evidence(timestep, LATENTS, PREVIOUS, conditioning, per_sample=per_sample))

    arguments = torch.tensor([1.0, 2.0, 6.0]), [filled(torch.float16, BATCH, 70), torch.tensor(7)]
    time, move, content, _ = torch.compile(gather, fullgraph=True)(*arguments)
    eager = gather(*arguments)
    torch.testing.assert_close((time, move), tuple(eager[:2]))
    assert torch.equal(content, eager[2])
