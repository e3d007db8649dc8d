"""What one context keeps from step to step, and when it lets it go."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from teacache_fx.identity import Identity
from teacache_fx.policy import PolicyState, StepReason
from teacache_fx.state import MAX_RECORDS, Memory, TeaCacheState

RECORD = [torch.tensor(1), torch.tensor(0.5), torch.tensor(0.25)]
NUM_SCALARS = len(PolicyState._fields)


def zeros() -> Memory:
    """Room for previous_modulated_input, two residuals and previous_latents."""
    return Memory(tuple(torch.zeros(3) for _ in range(4)), PolicyState.initial())


def outputs_of_a_step(value: float = 1.0, record: Sequence[Tensor] = RECORD) -> list[Tensor]:
    """All tensors different, in the order of a rewritten graph; it returns no length."""
    tensors = [torch.full((3,), value + i) for i in range(4)]
    return [*tensors, *(torch.tensor(value + i) for i in range(4, 3 + NUM_SCALARS)), *record]


def advance(state: TeaCacheState, value: float = 1.0, record: Sequence[Tensor] = RECORD, length: int = 50) -> None:
    state.advance(state.inputs(zeros, length), outputs_of_a_step(value, record))


def test_a_new_state_holds_nothing() -> None:
    state = TeaCacheState("cond")
    assert (state.label, state.memory, len(state.records), state.steps_since_reset) == ("cond", None, 0, 0)
    assert (state.previous_modulated_input, state.previous_residual, state.previous_latents) == (None, None, None)
    assert state.previous_residuals == ()
    assert [float(field) for field in state.policy] == [0] * NUM_SCALARS
    assert state.first_reason is StepReason.FIRST
    assert TeaCacheState(first_reason=StepReason.SHAPE_CHANGED).first_reason is StepReason.SHAPE_CHANGED


def test_a_new_state_is_allocated_once() -> None:
    state = TeaCacheState("cond")
    inputs = state.inputs(zeros, 50)
    assert [float(tensor.sum()) for tensor in inputs] == [0] * (3 + NUM_SCALARS) + [50]
    assert inputs[-1].dtype == torch.int64
    again = state.inputs(lambda: pytest.fail("allocated twice"), 50)
    assert all(one is other for one, other in zip(inputs, again, strict=True))


def test_advance_hands_each_output_to_the_next_step() -> None:
    state = TeaCacheState("cond")
    inputs, outputs = state.inputs(zeros, 50), outputs_of_a_step()
    state.advance(inputs, outputs)
    following = state.inputs(zeros, 50)
    expected = [*outputs[:-3], inputs[-1]]
    assert len(following) == 4 + NUM_SCALARS
    assert all(one is other for one, other in zip(following, expected, strict=True))
    assert [list(map(float, record)) for record in state.records] == [[1, 0.5, 0.25]]
    assert state.steps_since_reset == 1


def test_what_is_kept_has_names() -> None:
    state = TeaCacheState("cond")
    outputs = outputs_of_a_step()
    state.advance(state.inputs(zeros, 50), outputs)
    assert state.previous_modulated_input is outputs[0]
    assert [id(tensor) for tensor in state.previous_residuals] == [id(outputs[1]), id(outputs[2])]
    assert state.previous_residual is outputs[1]
    assert state.previous_latents is outputs[3]
    fields = ("accumulated_rel_l1_distance", "step_index", "consecutive_skips", "previous_timestep")
    assert [id(getattr(state, name)) for name in fields] == [id(tensor) for tensor in outputs[4:8]]
    assert state.policy.conditioning is outputs[4 + PolicyState._fields.index("conditioning")]
    assert int(state.policy.num_inference_steps) == 50


def test_the_length_may_become_known_within_a_generation() -> None:
    state = TeaCacheState("cond")
    advance(state, length=0)
    before = state.inputs(zeros, 0)
    after = state.inputs(lambda: pytest.fail("allocated anew"), 20)
    assert [int(before[-1]), int(after[-1])] == [0, 20]
    assert all(one is other for one, other in zip(before[:-1], after[:-1], strict=True))
    assert state.inputs(zeros, 20)[-1] is after[-1]
    assert int(state.inputs(zeros, 0)[-1]) == 0


def test_a_reset_frees_the_tensors_and_keeps_the_records() -> None:
    state = TeaCacheState("cond")
    advance(state)
    assert state.memory is not None
    references = [weakref.ref(tensor) for tensor in (*state.memory.tensors, *state.memory.policy)]
    state.reset()
    assert [reference() for reference in references] == [None] * len(references)
    assert (state.previous_latents, state.previous_residuals) == (None, ())
    assert (len(state.records), state.steps_since_reset) == (1, 0)
    fresh = state.inputs(zeros, 30)
    assert [float(tensor.sum()) for tensor in fresh] == [0] * (3 + NUM_SCALARS) + [30]


def test_a_reset_forgets_nothing_that_the_next_generation_is_told_again() -> None:
    state = TeaCacheState("cond")
    advance(state, length=30)
    state.reset()
    assert int(state.inputs(zeros, 30)[-1]) == 30


def test_steps_are_counted_from_a_reset() -> None:
    state = TeaCacheState("cond")
    counts = []
    for step in range(5):
        if step == 3:
            state.reset()
        advance(state)
        counts.append((state.steps_since_reset, state.steps_with_identity))
    assert counts == [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5)]


def test_a_step_replaces_the_memory_as_a_whole() -> None:
    state = TeaCacheState("cond")
    inputs = state.inputs(zeros, 50)
    memory, kept = state.memory, [tensor.clone() for tensor in inputs]
    advance(state)
    assert state.memory is not memory
    assert [tensor.tolist() for tensor in inputs] == [tensor.tolist() for tensor in kept]


def test_records_are_bounded() -> None:
    state, inputs = TeaCacheState("cond"), TeaCacheState("cond").inputs(zeros, 50)
    outputs = outputs_of_a_step()[:-3]
    for step in range(MAX_RECORDS + 3):
        state.advance(inputs, [*outputs, torch.tensor(step), *RECORD[1:]])
    assert len(state.records) == MAX_RECORDS
    assert (int(state.records[0][0]), int(state.records[-1][0])) == (3, MAX_RECORDS + 2)


def test_records_of_a_batch_are_kept_as_they_are() -> None:
    state = TeaCacheState("cond")
    record = [torch.tensor([1, 0]), torch.tensor([0.5, 0.25]), torch.tensor([0.0, 0.125])]
    advance(state, record=record)
    assert [tensor.tolist() for tensor in state.records[0]] == [tensor.tolist() for tensor in record]


def test_a_state_may_be_given_another_owner() -> None:
    state, identity = TeaCacheState("context 0"), Identity([torch.ones(1)])
    advance(state)
    memory = state.memory
    state.belong_to("cond", identity)
    assert (state.label, state.identity, state.steps_with_identity) == ("cond", identity, 0)
    assert (state.memory, state.steps_since_reset, len(state.records)) == (memory, 1, 1)
