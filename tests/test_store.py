"""Which state a call gets: Note [Which state?] of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx.contexts import CallContext
from teacache_fx.identity import CalledModel
from teacache_fx.policy import StepReason
from teacache_fx.state import TeaCacheState
from teacache_fx.store import MAX_CONTEXTS, StateStore
from tests.test_state import advance

SHAPES = (0, ((2, 3), torch.float32))


class Calls:
    """Calls of one model under a store of its own."""

    def __init__(self, max_contexts: int = MAX_CONTEXTS) -> None:
        self.store = StateStore(max_contexts)
        self.module = nn.Linear(2, 2)

    @property
    def model(self) -> CalledModel:
        return self.store.model([*self.module.parameters()])

    def __call__(
        self, name: str | None, conditioning: Sequence[Tensor], shapes: object = SHAPES, request: object = None
    ) -> TeaCacheState:
        return self.store.select(self.model, CallContext(name, request), conditioning, shapes)


def prompt(value: float = 1.0) -> Tensor:
    return torch.full((4,), value)


def test_the_same_prompt_finds_its_state_and_another_gets_its_own() -> None:
    call, cond, uncond = Calls(), prompt(), prompt()  # equal, yet two objects
    first, second = call(None, [cond]), call(None, [uncond])
    assert first is not second
    assert [call(None, [one]) for one in (cond, uncond, cond)] == [first, second, first]
    assert [state.label for state in call.store.states] == ["context 1", "context 0"]


def test_every_conditioning_tensor_counts() -> None:
    call, text, pooled, other = Calls(), prompt(), prompt(), prompt()
    state = call(None, [text, pooled])
    assert call(None, [text, pooled]) is state
    assert len({id(call(None, tensors)) for tensors in ([text, other], [text], [pooled, text], [])} | {id(state)}) == 5


@pytest.mark.parametrize("name", [None, "cond"])
def test_without_conditioning_there_is_one_state(name: str | None) -> None:
    call = Calls()
    assert call(name, []) is call(name, [])


def reusing(address: int) -> Tensor:
    """A new tensor at the address of a freed one."""
    others = []
    for _ in range(10_000):  # the allocator soon gives the address away again
        others.append(prompt())
        if id(others[-1]) == address:
            return others[-1]
    pytest.fail("the address was not reused, so this test shows nothing")


@pytest.mark.parametrize("shapes", [SHAPES, "other"])
def test_a_freed_prompt_leaves_nothing_to_the_next_at_its_address(shapes: object) -> None:
    call, text = Calls(), prompt()
    address, state = id(text), call(None, [text])
    del text
    other = reusing(address)
    following = call(None, [other], shapes)
    assert following is not state
    assert following.first_reason is StepReason.FIRST  # other shapes, but of another context
    assert call.store.states == [following]


@pytest.mark.parametrize("name", [None, "cond"])
def test_other_shapes_and_graphs_have_another_state(name: str | None) -> None:
    call, text = Calls(), prompt()
    keys = [SHAPES, (0, ((2, 4), torch.float32)), (0, ((2, 3), torch.bfloat16)), (1, ((2, 3), torch.float32))]
    states = [call(name, [text], key) for key in keys]
    assert len(set(map(id, states))) == 4
    assert [call(name, [text], key) for key in keys] == states
    assert [state.first_reason for state in states] == [StepReason.FIRST] + [StepReason.SHAPE_CHANGED] * 3


def test_only_the_same_context_has_changed_its_shape() -> None:
    call, text = Calls(), prompt()
    call("cond", [text])
    call(None, [text])
    other, changed = StepReason.FIRST, StepReason.SHAPE_CHANGED
    kept = prompt()
    assert call("uncond", [text], "wide").first_reason is other
    assert call("cond", [kept], "wide").first_reason is changed  # whatever its conditioning
    assert call(None, [prompt()], "wide").first_reason is other
    assert call(None, [text], "wider").first_reason is changed
    assert call("cond", [text], "wide", "request").first_reason is other
    twin = nn.Linear(2, 2)
    model = call.store.model([*twin.parameters()])
    assert call.store.select(model, CallContext("cond"), [text], "wider").first_reason is other


def test_names_and_requests_never_mix() -> None:
    call, text = Calls(), prompt()
    keys: list[tuple[str | None, object]] = [("cond", None), ("uncond", None), ("cond", 7), (None, None), ("cond", "7")]
    keys.append((None, 7))
    states = [call(name, [text], request=request) for name, request in keys]
    assert len(set(map(id, states))) == 6
    assert [call(name, [text], request=request) for name, request in keys] == states
    labels = ["cond", "uncond", "request 7 cond", "context 0", "request 7 cond", "request 7 context 1"]
    assert [state.label for state in states] == labels


def test_a_named_branch_keeps_its_state_as_its_conditioning_is_made_anew() -> None:
    call = Calls()
    states = [call(name, [prompt(step), prompt()]) for step in range(4) for name in ("cond", "uncond")]
    assert states == states[:2] * 4
    assert states[0] is not states[1]
    assert len(call.store.states) == 2


def test_conditioning_that_is_made_anew_in_part_counts_as_new() -> None:
    call, pooled = Calls(), prompt()
    state = call("cond", [prompt(), pooled])
    assert call("cond", [prompt(), pooled]) is state
    other = prompt()
    assert call("cond", [other, pooled]) is state
    assert call("cond", [prompt(), pooled]) is not state  # `other` still lives: it may come back
    assert call("cond", [other, pooled]) is state


def test_a_named_prompt_changed_in_place_keeps_its_state() -> None:
    call, text = Calls(), prompt()
    state = call("cond", [text])
    text.add_(1)
    assert call("cond", [text]) is state
    assert call("cond", [text]) is state


def test_two_live_prompts_of_one_name_have_their_own_states() -> None:
    call, one, other = Calls(), prompt(), prompt()
    states = [call("cond", [one]), call("cond", [other])]
    assert states[0] is not states[1]
    assert [call("cond", [text]) for text in (one, other, one)] == [states[0], states[1], states[0]]
    del one
    assert call("cond", [other]) is states[1]
    assert call("cond", [prompt()]) is states[0]  # that of the dead one


@pytest.mark.parametrize("change", [{"shapes": "wide"}, {"request": 7}])
def test_a_state_is_handed_on_only_within_its_shapes_and_request(change: dict[str, Any]) -> None:
    call = Calls()
    state = call("cond", [prompt()])
    assert call("cond", [prompt()], **change) is not state
    assert call("uncond", [prompt()]) is not state
    assert call("cond", [prompt()]) is state


def test_a_context_whose_name_is_learnt_later_keeps_its_state() -> None:
    call, text, uncond = Calls(), prompt(), prompt()
    state, other = call(None, [text]), call(None, [uncond])
    advance(state)
    assert call("cond", [text]) is state
    assert call("uncond", [uncond]) is other
    assert [one.label for one in call.store.states] == ["cond", "uncond"]
    del text  # it has a name now, so the state outlives its conditioning
    assert state.memory is not None
    assert call("cond", [prompt()]) is state
    assert call(None, [uncond]) is not other


def test_inference_tensors_are_told_apart_as_objects() -> None:
    call = Calls()
    with torch.inference_mode():
        text, other = prompt(), prompt()
    state = call(None, [text])
    assert call(None, [text]) is state
    assert call(None, [other]) is not state


@pytest.mark.parametrize("name", [None, "cond"])
def test_a_prompt_changed_in_place_keeps_its_state(name: str | None) -> None:
    call, text = Calls(), prompt()
    state = call(name, [text])
    text.add_(1)  # the hash of the contents, in the graph, notices it
    assert call(name, [text]) is state


def test_one_branch_without_a_name_may_make_its_conditioning_anew() -> None:
    call, pooled = Calls(), prompt()
    states = []
    for step in range(5):
        text = prompt(step)
        states.append(call(None, [text, pooled]))
        advance(states[-1])
        del text
        assert states[-1].memory is not None
    assert len(set(map(id, states))) == len(call.store.states) == 1
    assert states[0].label == "context 0"


def test_conditioning_of_several_steps_hands_nothing_on_without_a_name() -> None:
    call, text = Calls(), prompt()
    for _ in range(2):
        state = call(None, [text])
        advance(state)
    del text
    assert state.memory is None
    following = call(None, [prompt()])
    assert following is not state
    assert list(call.store.recorded) == [state, following]


def test_two_branches_without_names_that_make_theirs_anew_are_noticed() -> None:
    call, kept = Calls(), []
    for number in range(30):
        kept.append(prompt())
        advance(call(None, [kept[-1]]))
        assert call.store.finds_none == (number > 11)
    call(None, [kept[-1]])
    assert not call.store.finds_none


def test_a_state_is_not_handed_over_while_another_has_its_key() -> None:
    call, text, other = Calls(), prompt(), prompt()
    states = [call("cond", [text]), call("cond", [other]), call(None, [text])]
    for state in states:
        advance(state)
    assert call("cond", [text]) is states[0]
    del other
    assert call("cond", [text]) is states[0]
    assert {id(state) for state in call.store.recorded} == set(map(id, states))
