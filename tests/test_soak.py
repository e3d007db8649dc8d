"""A short soak; `python -m tests.soak` runs a long one and reports the memory."""

from __future__ import annotations

import pytest

from tests.soak import MAX_CONTEXTS, soak


@pytest.mark.parametrize("threads", [1, 2])
def test_interleaved_requests_come_out_as_if_alone(threads: int) -> None:
    run = soak(240, seed=threads, threads=threads)
    assert run.errors == []
    assert run.num_steps > 240
    assert run.num_skipped > 60, "too few skips to test anything"
    assert run.num_aborted > 3
    assert run.most_states <= MAX_CONTEXTS
