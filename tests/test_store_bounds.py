"""When the store lets states go: bounds, deaths, resets, sessions, and other weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import store as store_module
from teacache_fx.contexts import CallContext
from teacache_fx.state import TeaCacheState
from teacache_fx.store import MAX_CONTEXTS, StateStore
from tests.test_state import advance
from tests.test_store import SHAPES, Calls, prompt


def memory_of(state: TeaCacheState) -> list[weakref.ref[Tensor]]:
    assert state.memory is not None
    return [weakref.ref(tensor) for tensor in (*state.memory.tensors, *state.memory.policy)]


def is_free(memory: list[weakref.ref[Tensor]]) -> bool:
    return all(reference() is None for reference in memory)


@pytest.mark.parametrize("bound", [1, 3, MAX_CONTEXTS])
def test_the_least_recently_used_state_goes_first(bound: int) -> None:
    call = Calls(bound) if bound != MAX_CONTEXTS else Calls()
    states = [call(f"{i}", []) for i in range(bound)]
    assert call("0", []) is states[0]  # used again: the second is now the oldest
    oldest = states[1 % bound]
    advance(oldest)
    memory = memory_of(oldest)
    call("new", [])
    assert [state.label for state in call.store.states] == [*map(str, range(2, bound)), *["0"][: bound - 1], "new"]
    assert is_free(memory)
    assert next(iter(call.store.recorded)) is oldest  # its statistics stay
    assert call(oldest.label, []) is not oldest


def test_a_dropped_state_without_statistics_is_gone() -> None:
    call = Calls(1)
    reference = weakref.ref(call("cond", []))
    call("uncond", [])
    assert reference() is None
    assert [state.label for state in call.store.recorded] == ["uncond"]


def test_the_past_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MAX_PAST", 5)
    call = Calls(2)
    for number in range(12):
        advance(call(f"{number}", []))
    assert [state.label for state in call.store.recorded] == [str(number) for number in range(5, 12)]


def test_models_that_are_gone_are_forgotten() -> None:
    store, kept = StateStore(), torch.ones(1)
    model = store.model([kept])
    for _ in range(200):
        store.model([torch.ones(1)])
    gc.collect()
    assert store.model([torch.ones(1)]) is not model
    assert store.model([kept]) is model
    assert len(store._models) <= 3


def test_the_model_in_use_is_not_forgotten_for_others() -> None:
    store, weights = StateStore(), [torch.ones(1) for _ in range(200)]
    used = store.model([weights[0]])
    for weight in weights:
        store.model([weight])
        assert store.model([weights[0]]) is used


def test_the_store_does_not_keep_prompts_or_models_alive() -> None:
    call, text = Calls(), prompt()
    references = [weakref.ref(text), weakref.ref(call.module.weight)]
    advance(call("cond", [text]))
    advance(call(None, [text]))
    del text
    assert references[0]() is None
    call.module = nn.Linear(2, 2)
    gc.collect()
    assert references[1]() is None


def test_memory_is_free_as_soon_as_an_unnamed_prompt_dies() -> None:
    call, text, pooled, kept = Calls(), prompt(), prompt(), prompt()
    state, other = call(None, [text, pooled]), call(None, [kept])
    for one in (state, other) * 2:
        advance(one)
    memory = memory_of(state)
    del pooled
    assert is_free(memory)
    assert len(state.records) == 2
    assert other.memory is not None
    assert call(None, [kept]) is other


def test_a_named_state_outlives_its_prompt() -> None:
    call, text = Calls(), prompt()
    state = call("cond", [text])
    advance(state)
    del text
    assert state.memory is not None


@pytest.mark.parametrize("name", [None, "cond"])
def test_memory_is_free_as_soon_as_the_model_dies(name: str | None) -> None:
    call, text = Calls(), prompt()
    state = call(name, [text])
    advance(state)
    memory = memory_of(state)
    call.module = nn.Linear(2, 2)
    gc.collect()
    assert is_free(memory)
    assert call(name, [text]) is not state


def in_requests(*requests: object) -> tuple[Calls, list[TeaCacheState]]:
    call = Calls()
    states = [call(name, [], request=request) for request in requests for name in ("cond", "uncond")]
    for state in states:
        advance(state)
    return call, states


def test_the_states_of_a_model_in_one_request() -> None:
    call, states = in_requests(None, 7, "7")
    assert call.store.of_model(call.module, 7) == states[2:4]
    assert call.store.of_model(call.module, None) == states[:2]
    assert call.store.of_model(call.module, "unknown") == []


def test_the_states_of_what_wraps_a_model_and_of_no_other() -> None:
    call, states = in_requests(None)
    twin = nn.Linear(2, 2)
    other = call.store.select(call.store.model([*twin.parameters()]), CallContext("cond"), [], SHAPES)
    assert call.store.of_model(nn.Linear(2, 2), None) == []
    assert call.store.of_model(nn.Sequential(call.module), None) == states
    assert call.store.of_model(nn.Sequential(call.module, twin), None) == [*states, other]


def test_the_end_of_a_session_drops_its_states() -> None:
    call, states = in_requests(None, 7, ("r", 8))
    memory = [*memory_of(states[2]), *memory_of(states[3])]
    assert call.store.end_session(7) == 2
    assert call.store.states == [*states[:2], *states[4:]]
    assert is_free(memory)
    assert {id(state) for state in call.store.recorded} == set(map(id, states))
    assert call.store.end_session(7) == call.store.end_session("unknown") == 0
    assert call("cond", [], request=7) is not states[2]
    assert call.store.end_session(("r", 8)) == 2


def test_two_models_of_one_graph_have_their_own_states() -> None:
    call, twin, text = Calls(), nn.Linear(2, 2), prompt()
    twin.load_state_dict(call.module.state_dict())
    other = call.store.model([*twin.parameters()])
    assert other is not call.model
    states = [call("cond", [text]), call.store.select(other, CallContext("cond"), [text], SHAPES)]
    assert states[0] is not states[1]
    assert call("cond", [text]) is states[0]
    shared = call.store.model([call.module.weight, twin.bias])
    assert len({id(shared), id(other), id(call.model)}) == 3


def test_other_weights_are_another_model_and_free_its_memory() -> None:
    call, text = Calls(), prompt()
    model, state = call.model, call("cond", [text])
    advance(state)
    with torch.no_grad():
        call.module.weight.mul_(2)
    assert call.model is not model
    assert call.model is call.model
    assert state.memory is None
    following = call("cond", [text])
    assert following is not state
    assert call("cond", [text]) is following
