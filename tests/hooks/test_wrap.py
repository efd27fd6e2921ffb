"""Wrapping one object's method, and taking the wrapper off beside the wrappers of others."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import Tensor, nn

import tiny
from flowaccel.hooks import lend, wrap


class Doubler(nn.Module):
    def forward(self, hidden_states: Tensor, factor: float = 2.0, *, offset: float = 0.0) -> Tensor:
        """Says what it does."""
        return factor * hidden_states + offset


def adding(amount: float) -> Callable[..., Tensor]:
    def interceptor(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs) + amount

    return interceptor


ONE = torch.ones(1)


@pytest.fixture
def module() -> Doubler:
    return Doubler()


def test_surrounds_the_call_on_this_instance_only(module: Doubler) -> None:
    other = Doubler()
    wrap(module, "forward", adding(10))
    assert module(ONE) == 12
    assert module(ONE, 3.0, offset=1) == 14
    assert other(ONE) == 2
    assert Doubler().forward(ONE) == 2


def test_signature_name_and_docstring_are_kept(module: Doubler) -> None:
    signature = inspect.signature(module.forward)
    wrap(module, "forward", adding(1))
    assert inspect.signature(module.forward) == signature
    assert list(inspect.signature(module.forward).parameters) == ["hidden_states", "factor", "offset"]
    assert module.forward.__name__ == "forward"
    assert module.forward.__doc__ == "Says what it does."


def test_the_original_need_not_be_called(module: Doubler) -> None:
    wrap(module, "forward", lambda forward, *_, **__: torch.zeros(1))
    assert module(ONE) == 0


def test_remove_leaves_nothing(module: Doubler) -> None:
    keys = set(vars(module))
    handle = wrap(module, "forward", adding(1))
    assert set(vars(module)) == {*keys, "forward", "__getstate__"}
    handle.remove()
    assert set(vars(module)) == keys
    assert module(ONE) == 2
    handle.remove()
    assert set(vars(module)) == keys
    assert module(ONE) == 2


def test_remove_puts_back_what_the_instance_had(module: Doubler) -> None:
    def own(hidden_states: Tensor) -> Tensor:
        return hidden_states * 100

    module.forward = own
    handle = wrap(module, "forward", adding(1))
    assert module(ONE) == 101
    handle.remove()
    assert module.forward is own
    assert module(ONE) == 100


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_wrappers_come_off_in_any_order(module: Doubler, order: tuple[int, ...]) -> None:
    keys = set(vars(module))
    handles = [wrap(module, "forward", adding(amount)) for amount in (1, 10, 100)]
    left = {0: 1, 1: 10, 2: 100}
    assert module(ONE) == 113
    for index in order:
        handles[index].remove()
        del left[index]
        assert module(ONE) == 2 + sum(left.values())
    assert set(vars(module)) == keys


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_an_own_method_survives_any_order(module: Doubler, order: tuple[int, ...]) -> None:
    def own(hidden_states: Tensor) -> Tensor:
        return hidden_states * 100

    module.forward = own
    handles = [wrap(module, "forward", adding(amount)) for amount in (1, 10, 100)]
    for index in order:
        handles[index].remove()
    assert module.forward is own


def test_removed_below_a_stranger_lets_calls_through(module: Doubler) -> None:
    handle = wrap(module, "forward", adding(1))
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs) + 1000  # who keeps what it wrapped to itself
    stranger = module.forward
    handle.remove()
    assert module.forward is stranger
    assert module(ONE) == 1002
    handle.remove()
    assert module(ONE) == 1002


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_of_what_there_was_before(module: Doubler, copied: Callable[[Any], Any]) -> None:
    keys = set(vars(module))
    handles = [wrap(module, "forward", adding(amount)) for amount in (1, 10)]
    take_back = lend(module, "guest", Doubler())
    twin = copied(module)
    assert set(vars(twin)) == keys
    assert twin(ONE) == 2
    assert module(ONE) == 13 and isinstance(module.guest, Doubler)
    for undo in (take_back, *(handle.remove for handle in handles)):
        undo()
    assert set(vars(module)) == keys


def test_a_copied_wrapper_is_the_method_below(module: Doubler) -> None:
    """As others keep it that wrapped the same method: accelerate in `_old_forward`."""
    wrap(module, "forward", adding(1))
    add_hook_to_module(module, Shift())
    twin = copy.deepcopy(module)
    assert (module(ONE), twin(ONE)) == (1003, 1002)
    assert twin._old_forward.__self__ is twin


class Shift(ModelHook):
    """A hook of accelerate that shows in the result."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 1000


@pytest.mark.parametrize("added", ["hook first", "wrapper first"])
@pytest.mark.parametrize("removed", ["hook first", "wrapper first"])
def test_beside_accelerate(module: Doubler, added: str, removed: str) -> None:
    def add_hook() -> None:
        add_hook_to_module(module, Shift())

    handles = []

    def add_wrapper() -> None:
        handles.append(wrap(module, "forward", adding(1)))

    for act in (add_hook, add_wrapper) if added == "hook first" else (add_wrapper, add_hook):
        act()
    assert module(ONE) == 1003
    if removed == "hook first":
        remove_hook_from_module(module)
        assert module(ONE) in (2, 3)  # accelerate drops whatever was put on after its own hook
        handles[0].remove()
    else:
        handles[0].remove()
        assert module(ONE) == 1002
        assert module._hf_hook is not None
        remove_hook_from_module(module)
    assert module(ONE) == 2
    assert not hasattr(module, "_hf_hook")
    assert not hasattr(module, "_old_forward")


def test_a_hook_put_in_the_place_of_another_while_wrapped(module: Doubler) -> None:
    add_hook_to_module(module, Shift())
    handle = wrap(module, "forward", adding(1))
    add_hook_to_module(module, Shift())  # replaces: accelerate now calls the innermost method, past the wrapper
    handle.remove()
    assert module(ONE) == 1002
    remove_hook_from_module(module)
    assert module(ONE) == 2


class DiffusersShift(DiffusersHook):
    """A hook of diffusers (group offloading, layerwise casting, its caches) that shows in the result."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 1000


@pytest.mark.parametrize("hook_first", [True, False])
def test_beside_diffusers_hooks(module: Doubler, hook_first: bool) -> None:
    def add_hook() -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersShift(), "shift")

    if hook_first:
        add_hook()
    handle = wrap(module, "forward", adding(1))
    if not hook_first:
        add_hook()
    assert module(ONE) == 1003
    handle.remove()
    assert module(ONE) == 1002


def test_wraps_methods_of_any_object() -> None:
    pipe = tiny.sit_pipeline()
    seen: list[int] = []

    def interceptor(set_timesteps: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        seen.append(args[0])
        set_timesteps(*args, **kwargs)

    handle = wrap(pipe.scheduler, "set_timesteps", interceptor)
    pipe(3, num_inference_steps=2)
    handle.remove()
    pipe(3, num_inference_steps=3)
    assert seen == [2]
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_an_exception_passes_through(module: Doubler) -> None:
    handle = wrap(module, "forward", adding(1))
    with pytest.raises(TypeError):
        module()
    handle.remove()
    assert module(ONE) == 2


def test_a_name_that_is_not_there(module: Doubler) -> None:
    keys = set(vars(module))
    with pytest.raises(AttributeError, match="backwards"):
        wrap(module, "backwards", adding(1))
    assert set(vars(module)) == keys
