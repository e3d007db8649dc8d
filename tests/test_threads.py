"""Several threads, or tasks, that call at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from torch import Tensor, nn

from teacache_fx import store as store_module
from teacache_fx.contexts import CallContext, cache_context, current_context, session
from teacache_fx.identity import CalledModel
from tests.test_contexts import linear, names
from tests.test_state import advance
from tests.test_store import Calls, prompt


def test_threads_do_not_see_each_others_contexts() -> None:
    model, found, together = linear(), {}, threading.Barrier(2, timeout=10)
    shared = CalledModel([*model.parameters()])

    def work(name: str) -> None:
        before = shared.context
        with cache_context(model, name), session(model, name.upper()):
            together.wait()
            found[name] = (before, shared.context)
            together.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cond", "uncond")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: (CallContext(), CallContext(name, name.upper())) for name in ("cond", "uncond")}
    assert names(model) == [None]


def test_a_thread_that_looks_for_names_hides_none_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looking, go_on = linear(), threading.Event(), threading.Event()
    shared, look = CalledModel([*model.parameters()]), CalledModel.is_owned_by
    main = threading.current_thread()

    def slow(self: CalledModel, module: nn.Module) -> bool:
        if threading.current_thread() is not main:
            looking.set()
            go_on.wait(2)
        return look(self, module)

    monkeypatch.setattr(CalledModel, "is_owned_by", slow)
    with cache_context(model, "cond"):
        thread = threading.Thread(target=lambda: shared.context)
        thread.start()
        assert looking.wait(10)
        found = shared.context.name
        go_on.set()
        thread.join()
    assert found == "cond"


def test_tasks_that_take_turns_do_not_see_each_others_contexts() -> None:
    model = linear()

    async def work(name: str) -> list[object]:
        found: list[object] = []
        with session(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(current_context(model).request_id)
        return found

    async def both() -> list[list[object]]:
        return list(await asyncio.gather(work("a"), work("b")))

    assert asyncio.run(both()) == [["a"] * 3, ["b"] * 3]


def together(count: int, work: Callable[[int], object]) -> list[object]:
    """What each of several threads returns that set out at once; raises what one raises."""
    start, found = threading.Barrier(count, timeout=10), {}

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = work(number)
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[number] for number in range(count)]


def test_threads_each_find_their_own_state() -> None:
    call, prompts = Calls(), [prompt(number) for number in range(4)]
    states = [call(f"{number}", [text]) for number, text in enumerate(prompts)]

    def work(number: int) -> set[int]:
        return {id(call(f"{number}", [prompts[number]])) for _ in range(300)}

    assert together(4, work) == [{id(state)} for state in states]
    assert len(call.store.states) == 4


def test_threads_that_come_and_go_keep_the_bound() -> None:
    call = Calls(5)

    def work(number: int) -> None:
        for step in range(200):
            text = prompt()
            advance(call(None if step % 2 else f"{number} {step}", [text], request=number))
            if step % 20 == 0:
                call.store.end_session(number)
                call.store.of_model(call.module, number)
            assert len(call.store.states) <= 5
            assert list(call.store.recorded)

    together(4, work)
    assert len({id(state) for state in call.store.states}) == len(call.store.states) <= 5


def test_threads_that_meet_a_model_first_agree_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowModel(CalledModel):
        def __init__(self, weights: Sequence[Tensor]) -> None:
            time.sleep(0.05)
            super().__init__(weights)

    monkeypatch.setattr(store_module, "CalledModel", SlowModel)
    call = Calls()
    found = together(3, lambda _: call.model)
    assert len(set(map(id, found))) == 1


def test_threads_of_one_context_share_its_state() -> None:
    call, text = Calls(), prompt()
    assert call.model is call.model
    found = together(4, lambda _: call("cond", [text]))
    assert len(set(map(id, found))) == 1
    assert len(call.store.states) == 1
