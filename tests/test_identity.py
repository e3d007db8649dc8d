"""What tells one model from another, and one prompt from another."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from teacache_fx.identity import CalledModel, Identity


def linear() -> nn.Linear:
    return nn.Linear(1, 1)


class Resets:
    """Counts its resets."""

    count = 0

    def reset(self) -> None:
        self.count += 1


def test_a_model_is_told_by_its_weights() -> None:
    model, twin = linear(), linear()
    twin.load_state_dict(model.state_dict())
    known = CalledModel([*model.parameters()])
    assert known.matches([*model.parameters()])
    assert not known.matches([*twin.parameters()])
    assert [known.is_owned_by(module) for module in (model, twin, nn.Sequential(model), nn.ReLU())] == [1, 0, 1, 0]
    with torch.no_grad():
        model.weight.add_(0)
    assert not known.matches([*model.parameters()])


def test_a_model_may_be_told_by_a_buffer() -> None:
    model = nn.BatchNorm1d(2, affine=False)
    assert CalledModel([*model.buffers()]).is_owned_by(model)
    assert not CalledModel([]).is_owned_by(model)


def test_states_are_reset_when_the_first_weight_dies() -> None:
    weights, state = [torch.ones(2), torch.ones(2)], Resets()
    model = CalledModel(weights)
    model.states.add(state)
    del weights[1]
    assert state.count == 0
    weights.clear()
    assert state.count == 1
    assert not model.is_owned_by(linear())


def tensors() -> list[Tensor]:
    return [torch.ones(4), torch.ones(4)]


def test_the_same_unchanged_tensors_match() -> None:
    given = tensors()
    identity = Identity(given)
    assert identity.is_alive
    assert identity.matches(given)
    assert not identity.matches(given[::-1])  # equal numbers, other objects
    assert not identity.matches([given[0], given[1].clone()])
    assert not identity.matches([given[0], given[1].view(4)])
    assert Identity(()).matches([])


@pytest.mark.parametrize("number", [0, 1])
def test_any_tensors_death_is_told_once_and_none_is_kept_alive(number: int) -> None:
    given, state = tensors(), Resets()
    references = [weakref.ref(tensor) for tensor in given]
    identity = Identity(given, state.reset)
    del given[number]
    assert (references[number](), state.count, identity.is_alive) == (None, 1, False)


def test_an_identity_that_is_gone_tells_nothing() -> None:
    given, state = tensors(), Resets()
    identity = Identity(given, state.reset)
    del identity
    given.clear()
    assert state.count == 0


def test_a_change_in_place_is_left_to_the_hash() -> None:
    given = tensors()
    identity = Identity(given)
    given[0].add_(1)
    assert identity.is_alive
    assert identity.matches(given)


def test_inference_tensors_are_told_apart_as_objects() -> None:
    with torch.inference_mode():
        given, others = tensors(), tensors()
        identity = Identity(given)
        assert CalledModel(given).matches(given)
    assert identity.matches(given)
    assert not identity.matches(others)
