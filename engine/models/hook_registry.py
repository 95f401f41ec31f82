"""Diffusers' hooks, put on a module and taken off again whatever other hooks come and go around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook

from ...errors import ConfigError

HOOK_NAME = "heterostep"
"""Name under which the hooks are registered with diffusers."""


class Uncopied:
    """What belongs to one pipeline and must not come along when that is copied or pickled.

    A copied hook would still call the model that it was made for.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copying and pickling both begin here."""
        raise ConfigError(
            "A pipeline with HSA cannot be copied or pickled: its copy would run the original's weights; call "
            "hs.remove(pipe) first, and hs.apply on the original and on the copy afterwards."
        )


class OwnHook(Uncopied, ModelHook):
    """A hook of ours.

    Attributes:
        outermost: the module's forward with this hook as its outermost.
        innermost: the forward of this hook alone, where it has one of its own.
        made_registry: whether the module had no hooks before.
    """

    outermost: Any = None
    innermost: Any = None
    made_registry = False


class LastingHook(OwnHook):
    """A hook with a `new_forward` of its own, which stays in force when a hook beneath it is removed.

    Diffusers then sets the forward of the next hook to the one beneath, and what that hook did is done no more. Group
    offloading with streams does it to itself after the first pass.
    """

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Diffusers asks this just before it looks up the forward."""
        reference = self.fn_ref
        if reference.forward is not self.innermost:
            reference.original_forward, reference.forward = reference.forward, self.innermost
        return args, kwargs


def register(module: Any, hook: OwnHook) -> None:
    """Put our hook around what the module's forward is now."""
    hook.made_registry = not hasattr(module, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _beneath_offloading(module):
        registry.register_hook(hook, HOOK_NAME)
        hook.outermost, hook.innermost = module.forward, hook.fn_ref.forward
    registry.invalidate_child_registries_cache()


def remove(module: Any) -> None:
    """Take our hook off; what others have put beneath it or around it since stays in force, and nothing is left of it.

    Does nothing where somebody else took it off.
    """
    hook = registered(module)
    if hook is None:
        return
    registry, reference = module._diffusers_hook, hook.fn_ref
    beneath = reference.forward
    # Another forward is there where a hook beneath was removed since the last call.
    if reference.original_forward is not None and beneath is hook.innermost:
        beneath = reference.original_forward
    index = registry._hook_order.index(HOOK_NAME)
    del registry.hooks[HOOK_NAME], registry._hook_order[index], registry._fn_refs[index]
    # Hooks of diffusers and accelerate's offloading lead to ours, in any order. A function of the user's may too: it
    # cannot be told, but then our hook passes all calls on.
    for holder in (module, *registry._fn_refs):
        for name in ("forward", "original_forward", "_old_forward"):
            if vars(holder).get(name) is hook.outermost:
                setattr(holder, name, beneath)
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # the class's own is found again
    registry.invalidate_child_registries_cache()
    if hook.made_registry and not registry.hooks:
        del module._diffusers_hook


def registered(module: Any) -> OwnHook | None:
    """Our hook on a module, if there is one."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook(HOOK_NAME) if registry is not None else None


@contextlib.contextmanager
def _beneath_offloading(module: Any) -> Iterator[None]:
    """Lay bare the forward that accelerate's offloading wraps, for hooks to be put there.

    A pipeline sets its offloading up anew at the end of every call. Whatever stood around it would be lost then.
    """
    around = module.forward if hasattr(module, "_hf_hook") else None
    if around is not None:
        module.forward = module._old_forward
    yield
    if around is not None:
        module._old_forward, module.forward = module.forward, around
