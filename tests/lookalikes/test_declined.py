"""What is no diffusion transformer is never cached: it runs as if we were not there, and one warning says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teacache_fx import TeaCacheBackend, TeaCacheWarning
from tests.both_branches import tensors
from tests.lookalikes import layered, libraries, transforming
from tests.lookalikes.case import Lookalike

CASES: dict[str, Lookalike] = {
    **layered.CASES,
    **transforming.CASES,
    **{f"{name} (library)": lookalike for name, lookalike in libraries.CASES.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_is_declined(name: str) -> None:
    lookalike = CASES[name]
    torch.manual_seed(0)
    model: Any = lookalike.make().eval().requires_grad_(False)
    backend = TeaCacheBackend(rel_l1_thresh=1e9, coefficients=[1.0, 0.0], inner="eager")
    call = getattr(model, lookalike.method) if lookalike.method != "forward" else model
    compiled: Any = torch.compile(call, backend=backend)
    inputs = lookalike.inputs()
    with torch.no_grad():
        expected = tensors(call(**inputs))
        with pytest.warns(TeaCacheWarning) as caught:
            outputs = [tensors(compiled(**inputs)) for _ in range(2)]
    declined = [report.declined for report in backend.reports if report.declined is not None]
    assert len(declined) == len(backend.reports), "it must not be rewritten"
    assert lookalike.reason in [refusal.reason for refusal in declined], declined
    assert len(caught) == 1
    assert lookalike.reason.value in str(caught[0].message)
    assert len(expected) > 0
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert backend.stats().contexts == ()
