"""Around `optimizer.step()`, inside of everybody else's hooks.

torch runs step hooks in the order in which they were registered, and no post-hook after an exception. Here the pre-hook
is the last and the post-hook the first, whoever registered before or after, so that others only ever see kernels; and
`step` itself is wrapped, so that they are kernels again when an exception leaves it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer

# (optimizer, args, kwargs) to new (args, kwargs) or None
PreHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], "tuple[tuple[Any, ...], dict[str, Any]] | None"]
PostHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


class _StepHooks(OrderedDict[int, Any]):
    """An optimizer's step hooks, with one that keeps its place.

    torch asks for `values()` alone. The dictionary of before stays in use, because those who registered in it remove
    their hooks from it.
    """

    def __init__(self, earlier: OrderedDict[int, Any], first: bool) -> None:
        super().__init__()
        self.earlier, self.first = earlier, first
        self.own: list[Any] = []
        self.is_nested: Callable[[], bool] = lambda: False

    def values(self) -> list[Any]:  # type: ignore[override]
        if self.is_nested():  # a step that calls its parent's: the weights are W, which nobody must see
            return []
        others = [*self.earlier.values(), *super().values()]
        return [*self.own, *others] if self.first else [*others, *self.own]


class StepHooks:
    """The engine's place around one optimizer's step.

    Args:
        optimizer: whose step it is.
        before: runs as the last of the pre-hooks; calls `begin`.
        after: runs as the first of the post-hooks.
        abort: runs when `step` raised, before the exception leaves it.
    """

    def __init__(self, optimizer: Optimizer, before: PreHook, after: PostHook, abort: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._depth = 0  # of torch's wrapper round `step` in itself: 1 in an ordinary step
        self._running = False  # from `begin` to the end of the post-hook
        self._before, self._after, self._abort = before, after, abort
        for name, first, own in (
            ("_optimizer_step_pre_hooks", False, self._enter),
            ("_optimizer_step_post_hooks", True, self._leave),
        ):
            hooks = getattr(optimizer, name)
            if not isinstance(hooks, _StepHooks):
                hooks = _StepHooks(hooks, first)
                setattr(optimizer, name, hooks)
            hooks.own = [own]
            hooks.is_nested = self._nested_in if not first else self._nested_out
        self._guard()

    def remove(self) -> None:
        """Leave the optimizer's step alone from now on."""
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = getattr(self._optimizer, name)
            if isinstance(hooks, _StepHooks):
                hooks.own, hooks.is_nested = [], lambda: False
        # A scheduler that was made since keeps the guarded step, and with it this object: let nothing else hang on it.
        self._before, self._after, self._abort = _nothing, _nothing, _nothing
        if vars(self._optimizer).get("step") is self._guarded:
            if self._had_own_step:
                self._optimizer.step = self._inner_step  # type: ignore[method-assign]
            else:
                del vars(self._optimizer)["step"]

    def _guard(self) -> None:
        """Wrap `step` where it is looked up. Who kept it from before gets no abort: see `DecorHandle._recover`."""
        self._had_own_step = "step" in vars(self._optimizer)
        inner = self._inner_step = self._optimizer.step

        @functools.wraps(getattr(inner, "__func__", inner))
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._guarded_now, outer = True, self._guarded_now
            self._running = self._running and outer  # else left by one that was not guarded, and ended in an exception
            try:
                return inner(*args, **kwargs)
            except BaseException:
                self._depth, self._running = 0, False
                self._abort()
                raise
            finally:
                self._guarded_now = outer

        self._guarded = MethodType(step, self._optimizer)
        self._optimizer.step = self._guarded  # type: ignore[method-assign]

    _guarded_now = False

    def begin(self) -> None:
        """The weights move from here on: the closure, if there is one, has been evaluated."""
        self._running = True

    @property
    def is_running(self) -> bool:
        """Whether somebody asks from within a step, from where its weights begin to move to where R is refreshed."""
        return self._running and self._guarded_now

    def _nested_in(self) -> bool:
        if not self.is_running:
            self._depth = 0
            return False
        self._depth += 1
        return True

    def _nested_out(self) -> bool:
        if self._depth:
            self._depth -= 1
            return True
        return False

    # A compiled step (`torch.compile(optimizer.step)`) breaks its graph here: Dynamo would take what the weights hold
    # before the hook for what the optimizer steps from.
    @torch.compiler.disable
    def _enter(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return self._before(optimizer, args, kwargs)

    @torch.compiler.disable
    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._after(optimizer, args, kwargs)
        finally:
            self._running = False


def _nothing(*args: Any) -> None:
    """What a removed hook does."""
