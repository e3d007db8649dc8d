"""Which state a call gets, what it keeps, and when it is let go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx.contexts import cache_context, context_name, original
from teacache_fx.policy import PolicyState
from teacache_fx.state import MAX_CONTEXTS, MAX_RECORDS, StateStore, TeaCacheState


def named(model: nn.Module | None) -> str | None:
    return context_name([torch.zeros(1), *model.parameters()] if model is not None else [])


SHAPES = ((2, 3), torch.float32)
RECORD = [torch.tensor(1), torch.tensor(0.5), torch.tensor(0.25)]


def zeros() -> list[Tensor]:
    """Room for previous_modulated_input and one previous_residual."""
    return [torch.zeros(3), torch.zeros(3)]


def advance(state: TeaCacheState, value: float = 1.0, record: Sequence[Tensor] = RECORD) -> None:
    """One step that leaves tensors of this value behind."""
    inputs = state.inputs(zeros, 50)
    state.advance([torch.full((3,), value), torch.full((3,), -value), *inputs[2:-1], *record])


def test_a_new_state_is_allocated_once() -> None:
    state = TeaCacheState("cond")
    inputs = state.inputs(zeros, 50)
    assert [tensor.tolist() for tensor in inputs[:2]] == [[0, 0, 0], [0, 0, 0]]
    assert [float(scalar) for scalar in inputs[2:]] == [0, 0, 0, 0, 0, 50]
    again = state.inputs(lambda: pytest.fail("allocated twice"), 50)
    assert all(one is other for one, other in zip(inputs, again, strict=True))


def test_advance_hands_each_output_to_the_next_step() -> None:
    state = TeaCacheState("cond")
    length = state.inputs(zeros, 50)[-1]
    outputs = [torch.full((3,), float(i)) for i in range(2)] + [torch.tensor(float(i)) for i in range(2, 7)]
    state.advance([*outputs, *RECORD])
    inputs = state.inputs(zeros, 50)
    assert len(inputs) == 2 + len(PolicyState._fields)
    assert all(one is other for one, other in zip(inputs, [*outputs, length], strict=True))
    assert [list(map(float, record)) for record in state.records] == [[1, 0.5, 0.25]]


def test_reset_frees_the_tensors_and_keeps_the_records() -> None:
    state = TeaCacheState("cond")
    advance(state)
    references = [weakref.ref(tensor) for tensor in state.tensors + state.scalars]
    state.reset()
    assert [reference() for reference in references] == [None] * len(references)
    assert len(state.records) == 1
    fresh = state.inputs(zeros, 30)
    assert [float(tensor.sum()) for tensor in fresh] == [0, 0, 0, 0, 0, 0, 0, 30]


def test_records_are_bounded() -> None:
    state = TeaCacheState("cond")
    for step in range(MAX_RECORDS + 3):
        advance(state, record=[torch.tensor(step), *RECORD[1:]])
    assert len(state.records) == MAX_RECORDS
    assert (int(state.records[0][0]), int(state.records[-1][0])) == (3, MAX_RECORDS + 2)


def test_the_same_prompt_finds_its_state_and_another_gets_its_own() -> None:
    store = StateStore()
    cond, uncond = torch.ones(4), torch.ones(4)  # equal, yet two objects
    first = store.select(None, [cond], SHAPES)
    second = store.select(None, [uncond], SHAPES)
    assert first is not second
    assert [store.select(None, [prompt], SHAPES) for prompt in (cond, uncond, cond)] == [first, second, first]
    assert [state.label for state in store.states] == ["context 1", "context 0"]


def test_every_conditioning_tensor_counts() -> None:
    store = StateStore()
    prompt, pooled, other = torch.ones(4), torch.ones(2), torch.ones(2)
    state = store.select(None, [prompt, pooled], SHAPES)
    assert store.select(None, [prompt, pooled], SHAPES) is state
    assert store.select(None, [prompt, other], SHAPES) is not state
    assert store.select(None, [prompt], SHAPES) is not state
    assert store.select(None, [pooled, prompt], SHAPES) is not state


def test_without_conditioning_there_is_one_state() -> None:
    store = StateStore()
    assert store.select(None, [], SHAPES) is store.select(None, [], SHAPES)


def test_a_prompt_changed_in_place_is_another_prompt() -> None:
    store = StateStore()
    prompt, pooled = torch.ones(4), torch.ones(2)
    state = store.select(None, [prompt, pooled], SHAPES)
    pooled[0] = 7
    changed = store.select(None, [prompt, pooled], SHAPES)
    assert changed is not state
    assert not changed.tensors
    assert store.select(None, [prompt, pooled], SHAPES) is changed
    prompt.view(2, 2)[0] = 0  # a view shares the version counter
    assert store.select(None, [prompt, pooled], SHAPES) is not changed
    assert len(store.states) == 1  # the old prompts cannot come back


def test_a_freed_prompt_does_not_hand_its_state_to_the_next() -> None:
    store = StateStore()
    prompt = torch.ones(4)
    address, state = id(prompt), store.select(None, [prompt], SHAPES)
    del prompt
    others = []
    for _ in range(10_000):  # the allocator soon gives the address away again
        others.append(torch.ones(4))
        if id(others[-1]) == address:
            break
    assert id(others[-1]) == address, "the address was not reused, so this test shows nothing"
    assert store.select(None, [others[-1]], SHAPES) is not state


def test_the_store_does_not_keep_a_prompt_alive() -> None:
    store = StateStore()
    prompt = torch.ones(4)
    reference = weakref.ref(prompt)
    store.select(None, [prompt], SHAPES)
    del prompt
    assert reference() is None


@pytest.mark.parametrize("name", [None, "cond"])
def test_other_shapes_have_another_state(name: str | None) -> None:
    store, prompt = StateStore(), torch.ones(4)
    keys = [((2, 3), torch.float32), ((2, 4), torch.float32), ((2, 3), torch.bfloat16)]
    states = [store.select(name, [prompt], key) for key in keys]
    assert len(set(map(id, states))) == 3
    assert [store.select(name, [prompt], key) for key in keys] == states


def test_names_never_mix() -> None:
    store, prompt = StateStore(), torch.ones(4)
    cond, uncond = (store.select(name, [prompt], SHAPES) for name in ("cond", "uncond"))
    unnamed = store.select(None, [prompt], SHAPES)
    assert len({id(cond), id(uncond), id(unnamed)}) == 3
    assert [cond.label, uncond.label, unnamed.label] == ["cond", "uncond", "context 0"]
    assert store.select("cond", [prompt], SHAPES) is cond


def test_a_name_holds_whatever_the_conditioning() -> None:
    store, prompt = StateStore(), torch.ones(4)
    state = store.select("cond", [prompt], SHAPES)
    assert store.select("cond", [torch.zeros(4)], SHAPES) is state
    prompt += 1
    assert store.select("cond", [prompt], SHAPES) is state


@pytest.mark.parametrize("bound", [1, 3, MAX_CONTEXTS])
def test_the_least_recently_used_state_goes_first(bound: int) -> None:
    store = StateStore(bound) if bound != MAX_CONTEXTS else StateStore()
    states = [store.select(f"{i}", [], SHAPES) for i in range(bound)]
    assert store.select("0", [], SHAPES) is states[0]  # used again: the second is now the oldest
    reference = weakref.ref(states[1 % bound])
    store.select("new", [], SHAPES)
    assert [state.label for state in store.states] == [*map(str, range(2, bound)), *["0"][: bound - 1], "new"]
    del states
    assert reference() is None


def test_a_store_resets_all_its_states() -> None:
    store = StateStore()
    states = [store.select(name, [], SHAPES) for name in ("cond", "uncond")]
    for state in states:
        advance(state)
    store.reset()
    assert store.states == states
    assert [(state.tensors, state.scalars, len(state.records)) for state in states] == [([], [], 1)] * 2


def test_inference_tensors_are_told_apart_as_objects() -> None:
    store = StateStore()
    with torch.inference_mode():
        prompt, other = torch.ones(4), torch.ones(4)
    state = store.select(None, [prompt], SHAPES)
    assert store.select(None, [prompt], SHAPES) is state
    assert store.select(None, [other], SHAPES) is not state


def test_contexts_nest_per_model() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert named(one) is None
    with cache_context(one, "cond"):
        assert (named(one), named(other), named(None)) == ("cond", None, None)
        with cache_context(other, "control"), cache_context(one, "uncond"):
            assert (named(one), named(other)) == ("uncond", "control")
        assert (named(one), named(other)) == ("cond", None)
    assert named(one) is None


def test_a_context_ends_with_an_exception() -> None:
    model = nn.Linear(1, 1)
    with cache_context(model, "cond"):
        with pytest.raises(ZeroDivisionError), cache_context(model, "uncond"):
            _ = 1 / 0
        assert named(model) == "cond"
    assert named(model) is None


def test_a_context_needs_a_name() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="name must be a string such as 'cond', got 0"), cache_context(model, 0):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="name must not be empty"), cache_context(model, ""):
        pass
    assert named(model) is None


def test_threads_do_not_see_each_others_contexts() -> None:
    model, found, together = nn.Linear(1, 1), {}, threading.Barrier(2, timeout=10)

    def work(name: str) -> None:
        before = named(model)
        with cache_context(model, name):
            together.wait()
            found[name] = (before, named(model))
            together.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cond", "uncond")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"cond": (None, "cond"), "uncond": (None, "uncond")}
    assert named(model) is None


def test_a_compiled_module_and_its_original_are_one_model() -> None:
    model = nn.Linear(1, 1)
    compiled: Any = torch.compile(model, backend="eager")
    assert original(compiled) is model is original(model)
    with cache_context(compiled, "cond"):
        assert named(model) == "cond"
    with cache_context(model, "uncond"):
        assert named(original(compiled)) == "uncond"
