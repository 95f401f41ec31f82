"""What a model must say about itself, so that the hook can run it on some of its tokens and the engine can call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...errors import RequestError
from ...hsa.cache import KVCache, gather_rows, write_rows
from ..vae.pieces import Pieces
from .hook_registry import OwnHook

if TYPE_CHECKING:
    from ..facts import ModelFacts
    from ..media.audio import Audio
    from ..request import ResolvedRequest
    from ..sources import Sources

_WIDER = {torch.float16: "--dtype bfloat16 or float32", torch.bfloat16: "--dtype float32"}
_DAMAGED = "its weights may be damaged: copy or download the model again"


class Site(NamedTuple):
    """An attention module whose keys and values come from the video's tokens, and so are cached.

    Attributes:
        attention: the module; its processor is replaced.
        everywhere: its queries are not video tokens, but something that every rank has whole (sound).
    """

    attention: Any
    everywhere: bool = False


class Adapter(Protocol):
    """A model and its diffusers pipelines; `docs/adding_a_model.md` shows how one is written.

    `arguments` are those of a call of the transformer, by name, without ``return_dict``; ``hidden_states`` is always
    among them, its first dimension is the batch. A *branch* is what a pipeline names by
    ``transformer.cache_context(name)``. Its call evaluates one guidance unit, or several that are stacked in its batch,
    each with all B videos: `units` names them. What has a body here suits most models.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Class names of the pipelines; the first makes videos from text alone."""
    stock_processors: ClassVar[tuple[type, ...]]
    """Types of the attention processors that may be replaced."""
    moving: ClassVar[tuple[str, ...]]
    """Arguments that change from step to step; if another one changes, the forecasts of its branch start over."""
    solvers: ClassVar[tuple[str, ...]]
    """Schedulers that may replace the pipeline's own."""
    step_tensors: ClassVar[tuple[str, ...]]
    """Tensors besides the latents that the pipeline's loop carries from step to step, by the names it gives them."""
    step_schedulers: ClassVar[tuple[str, ...]] = ()
    """Variables of the pipeline's loop that hold the schedulers of the `step_tensors`, in their order."""
    output: ClassVar[Any]
    """What the transformer returns where it is not asked for a tuple."""
    silent: ClassVar[tuple[str, ...]] = ()
    """Pipelines that do not name their branches; what tells them apart are the prompts, which their loops keep in
    variables called as `embeds`, in the order of `branches`."""

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        """Whether `pipe` is one of `pipelines` (or derived from one) with stock transformers."""

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        """Return (expert, transformer) pairs; expert 0 does the high noise, 1 the low noise."""

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """The layers, in the order in which they run."""

    @staticmethod
    def sites(transformer: Any) -> list[Site]:
        """All places where tokens meet, in a fixed order."""

    @staticmethod
    def processor(call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> Any:
        """Return what stands in for the stock processor `replaced` at a site."""

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Cross-attention modules whose keys and values are those of the prompt, constant until that changes."""
        return []

    @staticmethod
    def text_processor(replaced: Any) -> Any:
        """Return what stands in for the stock processor of one of `text_attentions`."""
        raise NotImplementedError

    @staticmethod
    def hooks(transformer: Any, call: AttentionCall) -> list[tuple[Any, OwnHook]]:
        """(module, hook) for modules that must know which tokens are active, such as rotary embeddings."""
        return []

    @staticmethod
    def conditioned(timestep: Tensor) -> Tensor | None:
        """Indices int64 [C] of the tokens that are given, by the timesteps [B] or [B, N] of a first call; or None.

        An image is the first latent frame of most models, whose tokens stand at timestep 0 from the start.
        """
        return (timestep == 0).all(0).nonzero()[:, 0] if timestep.ndim == 2 else None

    @staticmethod
    def experts(pipe: Any) -> list[int]:
        """Expert that the pipeline will call at each step."""
        return [0] * len(pipe.scheduler.timesteps)

    @staticmethod
    def first_step(pipe: Any) -> int:
        """Step of the scheduler with which the loop of the running pipeline call begins."""
        return 0

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        """Names of the branches of the running pipeline call, in the order of its calls."""

    @staticmethod
    def units(pipe: Any, branch: str) -> tuple[str, ...]:
        """Guidance units in the batch of a branch's call, in their order there; names unique among all branches."""

    @staticmethod
    def guidance(pipe: Any, units: Sequence[str], expert: int) -> dict[str, float]:
        """Weights with which the pipeline mixes the units' velocities into the guided one."""

    @staticmethod
    def grid(module: Any, arguments: Mapping[str, Any]) -> Grid:
        """Tokens of the video of a call."""

    @staticmethod
    def video(module: Any, arguments: Mapping[str, Any]) -> Tensor:
        """The noisy latents of a call [batch, C, F, Y, X], without what else the model gets as channels."""

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        """The call for the active tokens [A] or [batch, A] alone."""

    @staticmethod
    def window(module: Any, arguments: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """The call for the frames of tokens from `start` to before `stop` alone, as a video that begins there."""
        raise NotImplementedError

    @staticmethod
    def beside(module: Any, arguments: Mapping[str, Any], start: int, stop: int) -> list[tuple[int, int]]:
        """For each other output of `rows`, which part of it [batch, M, ...] belongs to these frames: first, end."""
        return []

    @staticmethod
    def rows(module: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the transformer returned: velocity rows [batch, A, D] of the tokens in the call, and all else."""

    @staticmethod
    def answer(module: Any, grid: Grid, rows: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inverse of `rows` for all tokens [batch, N, D]."""

    @classmethod
    def spread(cls, module: Any, grid: Grid, rows: Tensor, like: Tensor) -> Tensor:
        """What holds for tokens, [B, N], in the form in which the pipeline's scheduler gets its velocity `like`."""
        width = like[0].numel() // grid.num_tokens
        return cls.answer(module, grid, rows[..., None].expand(-1, -1, width), ())[0]

    @staticmethod
    def nothing(module: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Zeros in the form of the transformer's answer, which cost no memory."""

    # How the engine calls a pipeline, and what becomes of its latents. Everything runs on stock parts.

    embeds: ClassVar[tuple[str, ...]]
    """Arguments of the pipeline that hold the prompts, encoded, in the order of what its `encode_prompt` gives."""
    max_sequence_length: ClassVar[int]
    """Maximum prompt length in text-encoder tokens; the pipeline's own default."""

    @classmethod
    def embed(cls, pipeline: Any, request: ResolvedRequest) -> dict[str, Tensor | None]:
        """Encode the prompts: values for all of `embeds`, None where a request has no use for one."""
        found = pipeline.encode_prompt(
            request.prompt,
            request.negative_prompt,
            do_classifier_free_guidance=request.guidance_scale > 1.0,
            max_sequence_length=cls.max_sequence_length,
        )
        return dict(zip(cls.embeds, found, strict=True))

    @staticmethod
    def told(embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What the transformer will get as ``encoder_hidden_states``, by guidance unit, as far as it is known."""
        return {}

    @staticmethod
    def arguments(facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
        """Arguments of the pipeline's call besides embeddings, image, width, height, steps, seed and callback."""

    @staticmethod
    def set_timesteps(scheduler: Any, facts: ModelFacts, request: ResolvedRequest) -> None:
        """Set a scheduler's timesteps as the pipeline's call does it."""
        scheduler.set_timesteps(request.num_inference_steps)

    @staticmethod
    def start(facts: ModelFacts, request: ResolvedRequest, sources: Sources) -> dict[str, Any]:
        """Arguments about what a video is made from beside text; they replace others of the same name."""

    @staticmethod
    def more_frames(request: ResolvedRequest) -> int:
        """How many frames of tokens the transformer gets beside the video's own."""
        return 0

    @staticmethod
    def long(pipeline: Any, facts: ModelFacts, request: ResolvedRequest, noise: Tensor | None) -> dict[str, Any]:
        """More arguments for a video in windows, with its initial noise [1, C, F, Y, X] if that is not drawn there."""
        return {} if noise is None else {"latents": noise}

    @staticmethod
    def worded(pipeline: Any, embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What the transformer gets for the prompt of these `embeds`, by the names of its arguments."""
        raise NotImplementedError

    @staticmethod
    def results(output: Any) -> tuple[Tensor, Tensor | None]:
        """Latents of the video [1, C, F, Y, X], and of the sound, out of a call with ``output_type="latent"``."""

    @staticmethod
    def finished(pipeline: Any, latents: Tensor) -> Tensor:
        """Latents of the loop [1, C, F, Y, X] as the pipeline would give them in the end."""
        return latents

    @staticmethod
    def decodable(vae: Any, latents: Tensor) -> Tensor:
        """Latents in the form and type that the VAE decodes."""

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        """Decode `decodable` latents: [1, 3, F, H, W], nominally from -1 to 1."""

    @classmethod
    def pieces(cls, vae: Any) -> Pieces:
        """How a VAE decodes a few frames at a time, or whole videos if it cannot."""
        return Pieces(vae, cls.decode)

    @staticmethod
    def audio(pipeline: Any, latents: Tensor) -> Audio:
        """Decode latents of sound; only asked for where there are any."""
        raise NotImplementedError


class AttentionCall:
    """What the processors of one transformer must know about the forward pass that is running.

    Attributes:
        cached: whether this pass touches the caches; otherwise the processors are the stock ones.
        active: None when all tokens are in the pass, else int64 [A] or [B, A].
        grid: tokens of the whole video.
        weight: weight [B, N] of the damped K/V forecast, or None.
        attend: on many ranks, attention of this rank's rows: (q, k, v, cache, everywhere) -> out, of the shape of q
            [B, n, H, D]; `everywhere` as in `CachedAttention`.
    """

    def __init__(self) -> None:
        """Start inactive."""
        self.cached = False
        self.active: Tensor | None = None
        self.grid: Grid | None = None
        self.weight: Tensor | None = None
        self.attend: Callable[[Tensor, Tensor, Tensor, KVCache | None, bool], Tensor] | None = None

    def clear(self) -> None:
        """Make the processors stock again."""
        self.__init__()  # type: ignore[misc]


class CachedAttention:
    """The part of an attention processor that no model changes: fresh K/V rows go to the cache, queries see all rows.

    A processor derives from this and from the model's stock processor. ``cache`` is set before each pass to the
    guidance branch's cache of this layer. ``everywhere`` says that the queries are not video tokens but something that
    every rank has whole, such as sound.
    """

    _attention_backend: Any
    _parallel_config: Any

    def take_over(self, call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> None:
        """Stand in for the processor `replaced`, with the same attention kernel."""
        self.call = call
        self.cache: KVCache | None = None
        self.everywhere = everywhere
        self._attention_backend = replaced._attention_backend
        self._parallel_config = replaced._parallel_config

    @property
    def stock(self) -> bool:
        """Whether this pass wants nothing but the stock processor."""
        return not self.call.cached or (self.cache is None and self.call.attend is None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend after normalisation and RoPE: q [B, M, H, D], fresh k and v [B, A, H, D] -> [B, M, H * D]."""
        cache, shared = self.cache, self.call.attend
        if shared is not None:
            return shared(query, key, value, cache, self.everywhere).flatten(2, 3).type_as(query)
        assert cache is not None
        cache.write(key, value, self.call.active)
        if self.call.active is not None:
            key, value = cache.keys_values(query.dtype, self.call.weight)
        return attend(query, key, value, mask, self._attention_backend)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Any) -> Tensor:
    """Attend by the kernel that diffusers calls `backend`: q [B, M, H, D], k and v [B, N, H, D] -> [B, M, H * D]."""
    out = dispatch_attention_fn(
        query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=backend, parallel_config=None
    )
    return out.flatten(2, 3).type_as(query)


class TextKV:
    """Keys and values of the prompt in one layer, for one guidance branch: good until prompt or weights change."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.text: tuple[Tensor, Tensor] | None = None
        self.image: tuple[Tensor, Tensor] | None = None


class CachedTextAttention:
    """The part of a processor of attention to the prompt that no model changes.

    A processor derives from this and from the model's stock processor. ``store`` is set before each pass to the
    guidance branch's; without it the processor is the stock one.
    """

    def __init__(self, replaced: Any) -> None:
        """Stand in for the processor `replaced`, with the same attention kernel."""
        super().__init__()
        self.store: TextKV | None = None
        self._attention_backend = replaced._attention_backend
        self._parallel_config = replaced._parallel_config


__all__ = ["Grid", "Patch", "gather_rows", "pack", "patchify", "unpack", "unpatchify", "write_rows"]


# Between latents [B, C, F, Y, X] and token rows [B, N, D]: D = C * pt * ph * pw, and tokens are ordered (frame, row,
# column), as in a model's flattened patch embedding.


class Grid(NamedTuple):
    """How many tokens lie along each axis."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """N."""
        return math.prod(self)


class Patch(NamedTuple):
    """How many latents one token covers along each axis."""

    frames: int
    height: int
    width: int

    def grid_of(self, latents: Tensor) -> Grid:
        """Grid of tokens of latents [B, C, F, Y, X]."""
        frames, height, width = (size // p for size, p in zip(latents.shape[-3:], self, strict=True))
        return Grid(frames, height, width)


def patchify(latents: Tensor, patch: Patch) -> Tensor:
    """[B, C, F, Y, X] -> [B, N, D]."""
    batch, channels = latents.shape[:2]
    (f, h, w), (pt, ph, pw) = patch.grid_of(latents), patch
    cells = latents.reshape(batch, channels, f, pt, h, ph, w, pw)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, f * h * w, -1)


def unpatchify(tokens: Tensor, patch: Patch, grid: Grid) -> Tensor:
    """[B, N, D] -> [B, C, F, Y, X]: the inverse of `patchify`."""
    batch, (f, h, w), (pt, ph, pw) = tokens.shape[0], grid, patch
    cells = tokens.reshape(batch, f, h, w, -1, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cells.reshape(batch, -1, f * pt, h * ph, w * pw)


def pack(rows: Tensor, patch: Patch) -> Tensor:
    """Lay token rows [B, A, D] side by side as a video one patch high: [B, C, pt, ph, A * pw].

    A model whose patch embedding has its kernel equal to its stride sees the same tokens in it as in the
    whole video.
    """
    return unpatchify(rows, patch, Grid(1, 1, rows.shape[1]))


def unpack(video: Tensor, patch: Patch) -> Tensor:
    """[B, C, pt, ph, A * pw] -> [B, A, D]: the inverse of `pack`."""
    return patchify(video, patch)


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; needs no memory beside the values."""
    # Both ends are NaN where any value is.
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def check_finite(values: Tensor, source: str, dtype: torch.dtype, otherwise: str = "") -> None:
    """Refuse NaN and infinite values, which would become a black video or silence.

    Args:
        values: what a network returned.
        source: that network, e.g. `"the VAE"`.
        dtype: in which it computed.
        otherwise: what would do beside another dtype, e.g. `"a lower --guidance"`.

    Raises:
        RequestError: the message names the network, the dtype, and what would do.
    """
    if not is_finite(values):
        remedies = " or ".join(remedy for remedy in (_WIDER.get(dtype), otherwise) if remedy)
        raise RequestError(
            f"{source} produced values that are not finite numbers (NaN or infinity) in "
            f"{str(dtype).removeprefix('torch.')}; {f'use {remedies}' if remedies else _DAMAGED}"
        )
