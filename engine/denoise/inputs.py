"""What a transformer's calls are given besides latents and time, and whether that changes in the middle of a run.

A pipeline's callback may set another prompt, guidance or LoRA strength between two steps. Forecasts and cached keys and
values of before then describe another video. Nothing here reads a tensor's values on its device, unless a pipeline
makes a new tensor at every step, or in inference mode.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..models import Adapter
from ..models.hook_registry import HOOK_NAME
from ..request import ResolvedRequest
from ..sources import Sources
from .branch import Call
from .work_split import Sharding


class Change(IntEnum):
    """What is not as it was one step ago; the larger one includes the smaller."""

    NONE = 0
    BRANCH = 1
    ALL = 2


class Inputs:
    """Follows the calls of one run."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._calls: dict[tuple[int, str], Any] = {}
        self._weights: dict[int, Weights] = {}
        self._guidance: dict[str, tuple[str, ...]] | None = None

    def begin(self) -> None:
        """Start a run: forget an earlier one."""
        self.__init__()  # type: ignore[misc]

    def look(self, call: Call, adapter: Adapter, pipe: Any, *, begins: bool, fewer: bool) -> Change:
        """Note what a branch's call is given, and compare it with the branch's call one step ago.

        Args:
            call: the call.
            adapter: of its model.
            pipe: the pipeline that calls.
            begins: whether the call is its step's first; what all branches share is looked at then.
            fewer: whether it is a change too if branches are left out, and no other is there.
        """
        key, asked = (call.expert, call.name), call.asked(adapter.moving)
        seen, self._calls[key] = self._calls.get(key), _noted(asked)
        changed = seen is not None and not _same(seen, asked)
        if begins and self._shared_changed(call, adapter, pipe, fewer):
            return Change.ALL
        return Change.BRANCH if changed else Change.NONE

    def _shared_changed(self, call: Call, adapter: Adapter, pipe: Any, fewer: bool) -> bool:
        guidance = {name: adapter.units(pipe, name) for name in adapter.branches(pipe)}
        seen, self._guidance = self._guidance, guidance
        changed = seen is not None and any(seen.get(name) != units for name, units in guidance.items())
        if seen is not None and fewer and seen.keys() != guidance.keys():
            changed = True
        weights = self._weights.get(call.expert)
        if weights is None or not weights.same():
            self._weights[call.expert] = Weights(call.module)
            changed = changed or weights is not None
        return changed


class Weights:
    """The weights of a model and the strength of its adapters, by what tells of a change and costs next to nothing.

    These are PyTorch's version counters of the parameters, their addresses where they stay in place, and PEFT's
    settings. What is written through ``parameter.data`` is not counted.
    """

    def __init__(self, model: Any) -> None:
        """Note those of `model` as they are now."""
        modules = list(model.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._adapted = [module for module in modules if hasattr(module, "merged_adapters")]
        # Offloading, casting and sharding move parameters at every pass, and do not change them.
        self._still = not any(map(_moves, modules)) and not any(hasattr(p, "to_local") for p in model.parameters())
        # Kept so that no other module gets the identity of one.
        self._modules = modules
        self._seen = self._now()

    def same(self) -> bool:
        """Whether they are as they were."""
        return self._now() == self._seen

    def _now(self) -> tuple[Any, ...]:
        held = [p for values in self._parameters for p in values.values() if p is not None]
        try:
            versions = [p._version for p in held]
        except RuntimeError:  # changes of what was made in inference mode are not counted
            versions = [_version(p) for p in held]
        places = [_place(p) for p in held] if self._still else []
        children = [id(child) for values in self._children for child in values.values()]
        return children, versions, places, [_strength(module) for module in self._adapted]


class Noted:
    """A tensor as it was when it was noted."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # kept alive: no other tensor gets its memory
        self.version = _version(tensor)
        # Changes of tensors that were made in inference mode are not counted.
        self.copy = tensor.clone() if tensor.is_inference() else None

    def same(self, tensor: Any) -> bool:
        """Whether `tensor` has the same values."""
        if not isinstance(tensor, Tensor):
            return False
        kept = self.tensor
        if (kept.shape, kept.dtype, kept.device) != (tensor.shape, tensor.dtype, tensor.device):
            return False
        if self.copy is not None:
            return torch.equal(self.copy, tensor)
        if _version(kept) != self.version:
            return False
        where = (kept.data_ptr(), kept.stride()) == (tensor.data_ptr(), tensor.stride())
        return tensor is kept or where or torch.equal(kept, tensor)


def _noted(value: Any) -> Any:
    """What `_same` can compare with a later value, also after `value` is changed in place."""
    if isinstance(value, Tensor):
        return Noted(value)
    if isinstance(value, Mapping):
        return {name: _noted(item) for name, item in value.items()}
    return [_noted(item) for item in value] if isinstance(value, list | tuple) else value


def _same(noted: Any, value: Any) -> bool:
    if isinstance(noted, Noted):
        return noted.same(value)
    if isinstance(noted, dict):
        return (
            isinstance(value, Mapping)
            and noted.keys() == value.keys()
            and all(_same(item, value[name]) for name, item in noted.items())
        )
    if isinstance(noted, list):
        return (
            isinstance(value, list | tuple)
            and len(noted) == len(value)
            and all(_same(old, new) for old, new in zip(noted, value, strict=True))
        )
    plain = isinstance(value, bool | int | float | str)
    return noted is value or (plain and type(noted) is type(value) and bool(noted == value))


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, where PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def _place(parameter: Tensor) -> int:
    """Where a parameter is; one of another class, such as a quantised one, may have no address."""
    return parameter.data_ptr() if type(parameter) in (Tensor, torch.nn.Parameter) else id(parameter)


def _moves(module: Any) -> bool:
    """Whether a hook of accelerate or diffusers may move a module's parameters."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return hasattr(module, "_hf_hook") or any(name != HOOK_NAME for name in hooks)


def _strength(module: Any) -> tuple[Any, ...]:
    """Which of PEFT's adapters take part in a layer, and how much."""
    scales = tuple(
        (name, (scale.data_ptr(), _version(scale)) if isinstance(scale, Tensor) else round(scale, 9))
        # diffusers multiplies by attention_kwargs["scale"] before each pass and divides after it: last bits may turn.
        for name, scale in getattr(module, "scaling", {}).items()
    )
    active = module.active_adapters
    return scales, tuple(active), tuple(module.merged_adapters), module.disable_adapters


def encode_prompts(
    adapter: Adapter, pipeline: Any, request: ResolvedRequest, device: torch.device, sharding: Sharding | None
) -> dict[str, Tensor | None]:
    """Embeddings of the prompts, by the names of the pipeline's arguments, on every rank; rank 0 makes them for all."""
    if sharding is None:
        with torch.no_grad():
            return adapter.embed(pipeline, request)

    @torch.no_grad()
    def made() -> dict[str, Tensor]:
        pipeline.text_encoder.to(device)
        return {name: text.cpu() for name, text in adapter.embed(pipeline, request).items() if text is not None}

    embeds = sharding.agreement.decide(made)
    if sharding.agreement.leads and device.type == "cuda":
        pipeline.text_encoder.to("cpu")  # until the next prompt: its memory is worth more to K/V
    return {name: embeds[name].to(device) if name in embeds else None for name in adapter.embeds}


@torch.no_grad()
def seen_image(pipeline: Any, sources: Sources) -> dict[str, Tensor]:
    """What the transformer will be given of images besides latents: Wan 2.1's CLIP tokens, else nothing."""
    images = [image for image in (sources.image, sources.last_image) if image is not None]
    if not images or getattr(pipeline.transformer.config, "image_dim", None) is None:
        return {}
    view = pipeline.encode_image(images, pipeline._execution_device)
    return {"encoder_hidden_states_image": view.to(pipeline.transformer.dtype)}


def calling_pipeline() -> DiffusionPipeline | None:
    """Return the pipeline whose method is nearest on the stack of calls, or None if there is none.

    A transformer's forward is not told who calls it, and scheduler, guidance and number of steps are the caller's.
    """
    frame = _calling_frame()
    return None if frame is None else frame.f_locals["self"]


def loop_values(pipe: Any, names: Sequence[str]) -> list[Any]:
    """Return what the running call of `pipe` keeps in its variables `names`; nothing if none runs."""
    frame = _calling_frame() if names else None
    if frame is None or frame.f_locals["self"] is not pipe:
        return []
    return [frame.f_locals[name] for name in names if name in frame.f_locals]


def _calling_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                return frame
        frame = frame.f_back
    return None
