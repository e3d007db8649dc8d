"""FLOPs of an einsum from its equation, against torch's own counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacache_fx.einsum import einsum_flops
from tests.counting import captured, counted, exported, flops_of

Shapes: TypeAlias = tuple[tuple[int, ...], ...]

# Equation and shapes; of length 1 where it is broadcast.
EINSUMS: tuple[tuple[str, Shapes], ...] = (
    ("bhqd,bhkd->bhqk", ((2, 3, 5, 4), (2, 3, 7, 4))),
    ("bhqk,bhkd->bqhd", ((2, 3, 5, 7), (2, 3, 7, 4))),
    ("nchw,oc->nohw", ((2, 3, 4, 5), (7, 3))),
    ("b i d , b j d -> b i j", ((2, 3, 4), (2, 5, 4))),
    ("...ij,...jk->...ik", ((2, 6, 3, 4), (2, 6, 4, 5))),
    ("...ij,jk", ((2, 6, 3, 4), (4, 5))),
    ("...ij,...jk->...ik", ((6, 3, 4), (2, 1, 4, 5))),
    ("ij,jk", ((3, 4), (4, 5))),
    ("ij,kl->", ((3, 4), (5, 6))),
    ("ii,ij->j", ((3, 3), (3, 4))),
    ("ij,ij->ij", ((3, 4), (3, 4))),
    ("i,j->ij", ((3,), (4,))),
    ("ij->ji", ((3, 4),)),
    ("ijk,jl->il", ((3, 4, 5), (4, 6))),
    ("ab,bc,cd->ad", ((2, 3), (3, 4), (4, 5))),
    ("bf,bf,f->b", ((2, 3), (2, 3), (3,))),
    ("ab,bc->ac", ((2, 1), (3, 4))),
    ("bc,bc->b", ((2, 3), (1, 3))),
)


def counted_einsum(equation: str, operands: Sequence[Tensor]) -> int:
    """From left to right, as torch does it without an optional package that looks for a better order."""
    with torch.backends.opt_einsum.flags(enabled=False):
        return counted(torch.einsum, equation, *operands)


@pytest.mark.parametrize(("equation", "shapes"), EINSUMS)
def test_einsum(equation: str, shapes: Shapes) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    expected = counted_einsum(equation, operands)
    assert einsum_flops(equation, shapes) == expected
    for how in (captured, exported):
        assert flops_of(how(lambda *tensors: torch.einsum(equation, *tensors), *operands)) == expected
    assert flops_of(captured(lambda *tensors: torch.einsum(equation, list(tensors)), *operands)) == expected


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_einsum(data: st.DataObject) -> None:
    sizes = dict(zip("abcdef", (2, 3, 5, 7, 4, 6), strict=True))
    subscript = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)
    subscripts = data.draw(st.lists(subscript, min_size=1, max_size=3))
    used = sorted({label for part in subscripts for label in part})
    kept = data.draw(st.lists(st.sampled_from(used), max_size=4, unique=True))
    shapes = [[data.draw(st.sampled_from((sizes[label], sizes[label], 1))) for label in part] for part in subscripts]
    equation = f"{','.join(map(''.join, subscripts))}->{''.join(kept)}"
    assert einsum_flops(equation, shapes) == counted_einsum(equation, [torch.ones(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("equation", "shapes"), [("ij,jk->ik", [(2, 3)]), ("ij->i", [(2, 3, 4)]), ("i...j->i", [(2,)])]
)
def test_an_equation_that_does_not_fit(equation: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"subscript|argument"):
        einsum_flops(equation, shapes)
