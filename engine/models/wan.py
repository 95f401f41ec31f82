"""Wan: its adapter, and attention processors derived from diffusers' (Apache-2.0), whose arithmetic they keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ..vae.pieces import Pieces
from ..vae.wan import WanPieces, suits_wan
from .base import (
    Adapter,
    AttentionCall,
    CachedAttention,
    CachedTextAttention,
    Grid,
    Patch,
    Site,
    TextKV,
    attend,
    gather_rows,
    pack,
    patchify,
    unpatchify,
)
from .hook_registry import LastingHook, OwnHook

if TYPE_CHECKING:
    from ..facts import ModelFacts
    from ..request import ResolvedRequest
    from ..sources import Sources


_TEXT_LENGTH = 512
"""Text positions of Wan's models; what comes before them is the image."""


class CachedWanAttnProcessor(CachedAttention, WanAttnProcessor):
    """Wan's self-attention in which the queries of the active tokens attend to the keys of all tokens.

    A pass over all tokens is the stock one bit for bit.
    """

    def __init__(self, call: AttentionCall, replaced: WanAttnProcessor) -> None:
        """Stand in for the processor `replaced`."""
        super().__init__()
        self.take_over(call, replaced)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend: hidden_states [B, A, H * D] -> [B, A, H * D]; arguments as diffusers' WanAttnProcessor."""
        if self.stock:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = _project(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (t.unflatten(2, (attn.heads, -1)) for t in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        return attn.to_out[1](attn.to_out[0](self.attend(query, key, value, attention_mask)))


class CachedTextAttnProcessor(CachedTextAttention, WanAttnProcessor):
    """Wan's cross-attention with the prompt's keys and values computed once a run, bit for bit the stock one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend: hidden_states [B, A, H * D] -> [B, A, H * D]; arguments as diffusers' WanAttnProcessor."""
        store = self.store
        if store is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if store.text is None:
            _fill(store, attn, encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        image = None if store.image is None else attend(query, *store.image, None, self._attention_backend)
        assert store.text is not None
        out = attend(query, *store.text, attention_mask, self._attention_backend)
        if image is not None:
            out = out + image
        return attn.to_out[1](attn.to_out[0](out))


class RopeRows(LastingHook):
    """On the transformer's `rope`: embeddings of the active tokens at their true positions."""

    def __init__(self, call: AttentionCall, patch: Patch) -> None:
        """Follow `call`, with tokens of size `patch`."""
        super().__init__()
        self.call, self.patch = call, patch
        self._key: tuple[Any, ...] | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    def new_forward(self, module: torch.nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [1 or B, A, 1, D]."""
        active, grid = self.call.active, self.call.grid
        if active is None or grid is None:
            return self.fn_ref.original_forward(hidden_states)
        key = (grid, hidden_states.device, *(buffer.dtype for buffer in module.buffers()))
        if key != self._key or self._table is None:
            # The stock forward reads nothing but the shape: one expanded element stands for the whole video.
            shape = (1, 1, *(n * p for n, p in zip(grid, self.patch, strict=True)))
            self._table = self.fn_ref.original_forward(hidden_states.new_empty(1).expand(shape))
            self._key = key
        cos, sin = (t.expand(active.shape[0], -1, -1, -1) if active.ndim == 2 else t for t in self._table)
        return gather_rows(cos, active), gather_rows(sin, active)


def _fill(store: TextKV, attn: Any, states: Tensor) -> None:
    """Compute the keys and values of a prompt, and of the image that Wan's I2V puts before it."""
    if attn.add_k_proj is not None:
        length = states.shape[1] - _TEXT_LENGTH
        image, states = states[:, :length], states[:, length:]
        if attn.fused_projections:
            key, value = attn.to_added_kv(image).chunk(2, dim=-1)
        else:
            key, value = attn.add_k_proj(image), attn.add_v_proj(image)
        key = attn.norm_added_k(key)
        store.image = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
    if attn.fused_projections:
        key, value = attn.to_kv(states).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(states), attn.to_v(states)
    key = attn.norm_k(key)
    store.text = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


def _project(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, A, H * D], also with fused projections."""
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings [1 or B, A, 1, D] to x [B, A, H, D], in diffusers' order of arithmetic."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


class WanAdapter(Adapter):
    """Wan's videos from text, images or a video: one or two experts, timesteps per video or (TI2V-5B) per token.

    Active tokens are packed into a small video of their own; see `Adapter` for what the methods mean.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
    transformer: ClassVar[type] = WanTransformer3DModel
    silent: ClassVar[tuple[str, ...]] = ("WanVideoToVideoPipeline",)
    stock_processors: ClassVar[tuple[type, ...]] = (WanAttnProcessor,)
    moving: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep")
    solvers: ClassVar[tuple[str, ...]] = ("euler", "unipc", "dpm++")
    step_tensors: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[Any] = Transformer2DModelOutput

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        if not any(c.__name__ in cls.pipelines for c in type(pipe).__mro__):
            return False
        found = cls.transformers(pipe)
        return bool(found) and all(isinstance(t, cls.transformer) for _, t in found)

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        pair = (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None))
        return [(expert, model) for expert, model in enumerate(pair) if model is not None]

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        return list(transformer.blocks)

    @staticmethod
    def sites(transformer: Any) -> list[Site]:
        """Self-attention of each layer."""
        return [Site(block.attn1) for block in transformer.blocks]

    @staticmethod
    def processor(call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> CachedWanAttnProcessor:
        assert not everywhere
        return CachedWanAttnProcessor(call, replaced)

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Cross-attention modules with the stock processor."""
        found = [block.attn2 for block in transformer.blocks]
        return [attention for attention in found if type(attention.processor) is WanAttnProcessor]

    @staticmethod
    def text_processor(replaced: Any) -> CachedTextAttnProcessor:
        return CachedTextAttnProcessor(replaced)

    @staticmethod
    def hooks(transformer: Any, call: AttentionCall) -> list[tuple[Any, OwnHook]]:
        """The rotary embeddings, which are those of the small video otherwise."""
        return [(transformer.rope, RopeRows(call, _patch(transformer)))]

    @staticmethod
    def experts(pipe: Any) -> list[int]:
        timesteps, ratio = pipe.scheduler.timesteps, getattr(pipe.config, "boundary_ratio", None)
        if ratio is None:
            return [0] * len(timesteps)
        # Compared as tensors, as the pipeline does it: a float of Python's is more precise than a timestep.
        high_noise = timesteps >= ratio * pipe.scheduler.config.num_train_timesteps
        return [0 if high else 1 for high in high_noise.tolist()]

    @staticmethod
    def first_step(pipe: Any) -> int:
        """Not the first where a video is given, to which less noise than all is added."""
        return len(pipe.scheduler.timesteps) - pipe.num_timesteps if hasattr(pipe, "get_timesteps") else 0

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        return ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)

    @staticmethod
    def units(pipe: Any, branch: str) -> tuple[str, ...]:
        """One for each branch."""
        return (branch,)

    @staticmethod
    def guidance(pipe: Any, units: Sequence[str], expert: int) -> dict[str, float]:
        if set(units) != {"cond", "uncond"}:
            return {name: 1.0 / len(units) for name in units}
        scale = pipe._guidance_scale_2 if expert == 1 else pipe._guidance_scale
        return {"cond": float(scale), "uncond": 1.0 - float(scale)}

    @staticmethod
    def grid(module: Any, arguments: Mapping[str, Any]) -> Grid:
        return _patch(module).grid_of(arguments["hidden_states"])

    @staticmethod
    def video(module: Any, arguments: Mapping[str, Any]) -> Tensor:
        latents: Tensor = arguments["hidden_states"]
        return latents[:, : module.config.out_channels]

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        patch, timestep = _patch(module), arguments["timestep"]
        packed = pack(gather_rows(patchify(arguments["hidden_states"], patch), active), patch)
        if timestep.ndim == 2:
            timestep = gather_rows(timestep, active)
        return {**arguments, "hidden_states": packed, "timestep": timestep}

    @staticmethod
    def window(module: Any, arguments: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """See `Adapter`."""
        patch, timestep, latents = _patch(module), arguments["timestep"], arguments["hidden_states"]
        if timestep.ndim == 2:
            tokens = timestep.shape[1] // patch.grid_of(latents).frames
            timestep = timestep[:, start * tokens : stop * tokens]
        latents = latents[:, :, start * patch.frames : stop * patch.frames]
        return {**arguments, "hidden_states": latents, "timestep": timestep}

    @staticmethod
    def rows(module: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return patchify(out[0], _patch(module)), ()

    @staticmethod
    def answer(module: Any, grid: Grid, rows: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (unpatchify(rows, _patch(module), grid),)

    @staticmethod
    def nothing(module: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        latents = arguments["hidden_states"]
        shape = (latents.shape[0], module.config.out_channels, *latents.shape[2:])
        return (latents.new_zeros(()).expand(shape),)

    embeds: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    max_sequence_length: ClassVar[int] = 512

    @classmethod
    def told(cls, embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        found = zip(("cond", "uncond"), (embeds[name] for name in cls.embeds), strict=True)
        return {unit: text for unit, text in found if text is not None}

    @staticmethod
    def arguments(facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
        common = {"guidance_scale": request.guidance_scale, "max_sequence_length": WanAdapter.max_sequence_length}
        if request.strength is not None:  # a video is changed, which has its frames
            return common
        # With a VAE that does not compress time, the pipelines add one to the number of frames that they are given.
        extra = 1 if facts.vae_temporal == 1 else 0
        return {
            **common,
            "num_frames": request.num_frames - extra,
            "guidance_scale_2": request.guidance_scale_2,
        }

    @staticmethod
    def set_timesteps(scheduler: Any, facts: ModelFacts, request: ResolvedRequest) -> None:
        """Of a video that is changed, the steps that are not made too."""
        scheduler.set_timesteps(_whole_steps(request))

    @staticmethod
    def start(facts: ModelFacts, request: ResolvedRequest, sources: Sources) -> dict[str, Any]:
        given = {name: source for name, source in sources._asdict().items() if source is not None}
        if request.strength is None:
            return given
        return {**given, "strength": request.strength, "num_inference_steps": _whole_steps(request)}

    @staticmethod
    def worded(pipeline: Any, embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """See `Adapter`."""
        text = embeds["prompt_embeds"]
        assert text is not None
        return {"encoder_hidden_states": text}

    @staticmethod
    def results(output: Any) -> tuple[Tensor, Tensor | None]:
        return output.frames, None

    @staticmethod
    def decodable(vae: Any, latents: Tensor) -> Tensor:
        """Undo the normalisation, as the end of the pipelines does it."""
        latents = latents.to(vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        return latents / inverse_std + mean

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        video: Tensor = vae.decode(latents, return_dict=False)[0]
        return video

    @classmethod
    def pieces(cls, vae: Any) -> Pieces:
        """See `Adapter`."""
        return WanPieces(vae, cls.decode) if suits_wan(vae) else Pieces(vae, cls.decode)


def _whole_steps(request: ResolvedRequest) -> int:
    """Steps of a schedule of which the pipeline makes as many as are asked for, the last ones."""
    made, strength = request.num_inference_steps, request.strength
    return made if strength is None else next(n for n in count(made) if int(n * strength) == made)


class WanVACEAdapter(WanAdapter):
    """Wan VACE, which is led by a video, a mask or images: layers beside the others read these, at all tokens alike."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanVACEPipeline",)
    transformer: ClassVar[type] = WanVACETransformer3DModel
    silent: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        return [*transformer.vace_blocks, *transformer.blocks]

    @staticmethod
    def sites(transformer: Any) -> list[Site]:
        """Self-attention of each layer."""
        return [Site(block.attn1) for block in WanVACEAdapter.blocks(transformer)]

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Cross-attention modules with the stock processor."""
        found = [block.attn2 for block in WanVACEAdapter.blocks(transformer)]
        return [attention for attention in found if type(attention.processor) is WanAttnProcessor]

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        patch = _patch(module)
        control = pack(gather_rows(patchify(arguments["control_hidden_states"], patch), active), patch)
        return {**WanAdapter.subset(module, arguments, active), "control_hidden_states": control}

    @staticmethod
    def window(module: Any, arguments: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """See `Adapter`."""
        frames = _patch(module).frames
        control = arguments["control_hidden_states"][:, :, start * frames : stop * frames]
        return {**WanAdapter.window(module, arguments, start, stop), "control_hidden_states": control}


def _patch(transformer: Any) -> Patch:
    """Size of a token in latents."""
    return Patch(*transformer.config.patch_size)
