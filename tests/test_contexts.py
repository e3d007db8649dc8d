"""Whose call it is: what a caller says, of which model, in which thread."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from teacache_fx.contexts import (
    CallContext,
    announce,
    cache_context,
    current_context,
    original,
    session,
    set_num_inference_steps,
)
from teacache_fx.identity import CalledModel


def called(*models: nn.Module) -> list[CallContext]:
    """What counts for calls of these models just now; they are looked up anew, as at their first call."""
    return [CalledModel([*model.parameters()]).context for model in models]


def names(*models: nn.Module) -> list[str | None]:
    return [call.name for call in called(*models)]


def linear() -> nn.Linear:
    return nn.Linear(1, 1)


def test_nothing_is_said_of_a_model_at_first() -> None:
    model = linear()
    assert (current_context(model), called(model)) == (CallContext(), [CallContext()])


def test_contexts_nest_per_model() -> None:
    one, other = linear(), linear()
    with cache_context(one, "cond"):
        assert names(one, other) == ["cond", None]
        with cache_context(other, "control"), cache_context(one, "uncond"):
            assert names(one, other) == ["uncond", "control"]
        assert names(one, other) == ["cond", None]
    assert names(one, other) == [None, None]


def test_a_context_ends_with_an_exception() -> None:
    model = linear()
    with cache_context(model, "cond"):
        with pytest.raises(ZeroDivisionError), cache_context(model, "uncond"):
            _ = 1 / 0
        assert names(model) == ["cond"]
    assert names(model) == [None]


def test_what_is_said_adds_up_and_the_inmost_counts() -> None:
    model = linear()
    with session(model, "r1"), cache_context(model, "cond", num_inference_steps=20):
        assert called(model) == [CallContext("cond", "r1", 20)]
        with cache_context(model, "uncond"):
            assert called(model) == [CallContext("uncond", "r1", 20)]
            with session(model, ("r", 2)):
                assert called(model) == [CallContext("uncond", ("r", 2), 20)]
    assert called(model) == [CallContext()]


def test_or_else_takes_only_what_is_missing() -> None:
    said, other = CallContext("cond", 0, None), CallContext("uncond", "r", 7)
    assert said.or_else(other) == CallContext("cond", 0, 7)  # 0 is a request like any other
    assert other.or_else(said) == other
    assert said.or_else(CallContext()) == said == CallContext().or_else(said)


@pytest.mark.parametrize("name", [0, None, b"cond"])
def test_a_context_needs_a_text(name: Any) -> None:
    with pytest.raises(TypeError, match=f"name must be a string such as 'cond', got {name!r}"):
        cache_context(linear(), name)


def test_a_context_needs_a_name() -> None:
    with pytest.raises(ValueError, match="name must not be empty; call the model without cache_context"):
        cache_context(linear(), "")


@pytest.mark.parametrize("enter", [lambda model: cache_context(model, "cond"), lambda model: session(model, "r")])
def test_a_context_needs_a_module(enter: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 'transformer'"):
        enter("transformer")


@pytest.mark.parametrize("number", [20.0, True, "20"])
def test_a_number_of_steps_is_an_integer(number: Any) -> None:
    with pytest.raises(TypeError, match=f"num_inference_steps must be an integer, got {number!r}"):
        cache_context(linear(), "cond", num_inference_steps=number)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_steps_is_positive(number: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must be at least 1, got {number}"):
        cache_context(linear(), "cond", num_inference_steps=number)


@pytest.mark.parametrize("request_id", [None, ["r"], ("r", ["s"])])
def test_a_request_is_hashable(request_id: Any) -> None:
    with pytest.raises(TypeError, match="request_id must"):
        session(linear(), request_id)


def test_the_length_of_a_generation_may_be_said_beforehand() -> None:
    model, other = linear(), linear()
    set_num_inference_steps(model, 30)
    assert [call.num_inference_steps for call in called(model, other)] == [30, None]
    with cache_context(model, "cond", num_inference_steps=20):
        assert called(model)[0].num_inference_steps == 20
    with cache_context(model, "cond"):
        assert called(model)[0].num_inference_steps == 30
    set_num_inference_steps(model, 40)
    assert called(model)[0].num_inference_steps == 40
    set_num_inference_steps(model, None)
    assert called(model)[0].num_inference_steps is None
    set_num_inference_steps(model, None)  # nor does it matter that nothing was known


def test_a_listener_is_asked_at_each_call_and_counts_less() -> None:
    model, heard = linear(), [CallContext("heard", num_inference_steps=9)]
    announce(model, lambda: heard[0])
    announce(model)  # keeps the listener
    assert called(model) == [CallContext("heard", None, 9)]
    with cache_context(model, "said"):
        assert called(model) == [CallContext("said", None, 9)]
    heard[0] = CallContext("later")
    assert called(model) == [CallContext("later")]
    announce(model, lambda: CallContext("other"))
    assert names(model) == ["other"]


def test_a_name_for_a_wrapping_module_names_the_model_within() -> None:
    inner = linear()
    outer, aside = nn.Sequential(nn.Sequential(inner), nn.ReLU()), linear()
    with cache_context(outer, "cond", num_inference_steps=5), session(outer, "r"):
        assert called(inner, aside) == [CallContext("cond", "r", 5), CallContext()]
    set_num_inference_steps(outer, 8)
    assert called(inner)[0].num_inference_steps == 8


def test_a_model_learns_of_names_given_after_its_first_call() -> None:
    inner = linear()
    outer, model = nn.Sequential(inner), CalledModel([*inner.parameters()])
    assert model.context == CallContext()
    with cache_context(outer, "cond"):
        assert model.context.name == "cond"
        with cache_context(inner, "uncond"), cache_context(linear(), "other"):
            assert model.context.name is not None
    assert model.context == CallContext()


@pytest.mark.parametrize("first", ["inner", "outer"])
@pytest.mark.parametrize("inmost", ["inner", "outer"])
def test_of_two_wrapped_modules_the_inmost_context_counts(first: str, inmost: str) -> None:
    inner = linear()
    modules = {"inner": inner, "outer": nn.Sequential(inner)}
    announce(modules[first])
    other = "outer" if inmost == "inner" else "inner"
    with cache_context(modules[other], "cond"), cache_context(modules[inmost], "uncond"):
        assert names(inner) == ["uncond"]


def test_a_name_for_a_wrapping_module_counts_more_than_a_heard_one() -> None:
    inner = linear()
    announce(inner, lambda: CallContext("heard", num_inference_steps=9))
    set_num_inference_steps(inner, 30)
    with cache_context(nn.Sequential(inner), "said", num_inference_steps=20):
        assert called(inner) == [CallContext("said", None, 20)]


def test_a_compiled_module_and_its_original_are_one_model() -> None:
    model = linear()
    compiled: Any = torch.compile(model, backend="eager")
    assert original(compiled) is model is original(model)
    with cache_context(compiled, "cond"):
        assert names(model) == ["cond"]
    with session(model, "r"):
        assert current_context(original(compiled)).request_id == "r"
    set_num_inference_steps(compiled, 6)
    assert called(model)[0].num_inference_steps == 6


def test_what_was_said_does_not_keep_a_model_alive() -> None:
    model = linear()
    reference = weakref.ref(model)
    set_num_inference_steps(model, 3)
    announce(model, lambda: CallContext("heard"))
    with cache_context(model, "cond"):
        pass
    assert names(model) == ["heard"]
    del model
    gc.collect()
    assert reference() is None
