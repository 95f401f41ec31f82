"""Diffusers' hooks, put on a module and taken off again whatever other hooks come and go around them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook

HOOK_NAME = "heterostep"
"""Name under which the hooks are registered with diffusers."""


class LastingHook(ModelHook):
    """A hook with a `new_forward` of its own, which stays in force when a hook beneath it is removed.

    Diffusers then sets the forward of the next hook to the one beneath, and what that hook did is done no more. Group
    offloading with streams does it to itself after the first pass.
    """

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Diffusers asks this just before it looks up the forward."""
        reference = self.fn_ref
        if getattr(reference.forward, "func", None) != self.new_forward:
            reference.original_forward = reference.forward
            reference.forward = functools.partial(self.new_forward, module)
        return args, kwargs


def register(module: Any, hook: ModelHook) -> None:
    """Put our hook around what the module's forward is now."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _beneath_offloading(module):
        registry.register_hook(hook, HOOK_NAME)
    registry.invalidate_child_registries_cache()


def remove(module: Any) -> None:
    """Take our hook off, and leave the one that was put around it in force."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    above = registry._fn_refs[registry._hook_order.index(HOOK_NAME) + 1 :][:1]
    forwards = [reference.forward for reference in above]
    with _beneath_offloading(module):
        registry.remove_hook(HOOK_NAME, recurse=False)
    for reference, forward in zip(above, forwards, strict=True):
        if reference.original_forward is not None:
            reference.original_forward, reference.forward = reference.forward, forward
    registry.invalidate_child_registries_cache()


def registered(module: Any) -> ModelHook | None:
    """Our hook on a module, if there is one."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook(HOOK_NAME) if registry is not None else None


@contextlib.contextmanager
def _beneath_offloading(module: Any) -> Iterator[None]:
    """Lay bare the forward that accelerate's offloading wraps, for hooks to be put there or taken away.

    A pipeline sets its offloading up anew at the end of every call. Whatever stood around it would be lost then.
    """
    around = module.forward if hasattr(module, "_hf_hook") else None
    if around is not None:
        module.forward = module._old_forward
    yield
    if around is not None:
        module._old_forward, module.forward = module.forward, around
