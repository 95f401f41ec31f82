"""Pictures of a video while it is being denoised: its middle frame, as the model would finish it now."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..media.feeding import Frames
from ..models import adapter_for
from ..models.base import is_finite
from .hook import named
from .replay import level_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A preview is a thumbnail: at most this many rows or columns of latents go through the VAE,
_MAX_SIDE = 48
# and the linear map makes at most this many pixels of each, in both directions.
_MAX_SCALE = 4
# There is no forecast before the second step, and the first pictures are grey.
_FIRST_SHARE = 0.1
# Keeps the map small where the videos seen so far leave it undetermined.
_RIDGE = 1e-4


class LinearDecoder:
    """A least-squares map from the channels of a latent pixel to its RGB pixels, learnt from finished videos.

    It costs a matrix product where the VAE costs a network: a third of a millisecond, and 29 dB from the VAE's picture
    after two videos of the demo model.
    """

    def __init__(self) -> None:
        """Start with nothing learnt."""
        self._moments: tuple[Tensor, Tensor] | None = None
        self._weights: Tensor | None = None
        self._scale = 1

    @property
    def ready(self) -> bool:
        """Whether it has seen a video."""
        return self._weights is not None

    @torch.no_grad()
    def learn(self, latents: Tensor, frames: Frames, shape: tuple[int, ...] | None = None) -> None:
        """Take a finished video into account.

        Args:
            latents: final latents [1, C, F, Y, X].
            frames: their video, where the VAE makes the first frame of the first latent frame and a run of frames of
                each later one: uint8 [f, H, W, 3], or anything that gives frames [H, W, 3] one after the other.
            shape: [f, H, W, 3]; None: that of the array `frames`.
        """
        shape = frames.shape if shape is None else shape  # type: ignore[attr-defined]
        channels, num_latent, rows = latents.shape[1:4]
        spatial = shape[1] // rows
        scale = max(s for s in range(1, _MAX_SCALE + 1) if spatial % s == 0)
        run = max((shape[0] - 1) // max(num_latent - 1, 1), 1)
        gram: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        seen = itertools.islice(frames, 0, num_latent * run, run)
        for values, frame in zip(latents[0].float().cpu().unbind(1), seen, strict=False):
            known = _with_one(values.permute(1, 2, 0).reshape(-1, channels))
            target = _targets(frame, spatial, scale)
            gram, cross = gram + (known.T @ known).double(), cross + (known.T @ target).double()
        assert isinstance(gram, Tensor) and isinstance(cross, Tensor), "a video has frames"
        if self._moments is not None and self._moments[1].shape == cross.shape:
            gram, cross = gram + self._moments[0], cross + self._moments[1]
        self._moments, self._scale = (gram, cross), scale
        ridge = torch.eye(len(gram), dtype=gram.dtype) * _RIDGE * gram.diagonal().mean()
        self._weights = torch.linalg.solve(gram + ridge, cross).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of one frame [1, C, Y, X] -> [3, Y * s, X * s] in 0 to 1."""
        assert self._weights is not None, "decode comes after learn"
        self._weights = self._weights.to(latents.device)
        values = _with_one(latents[0].permute(1, 2, 0)) @ self._weights
        return torch.nn.functional.pixel_shuffle(values.permute(2, 0, 1), self._scale)


def _targets(frame: NDArray[np.uint8], spatial: int, scale: int) -> Tensor:
    """RGB that belongs to each latent pixel of a frame [H, W, 3]: [Y * X, 3 * scale * scale], 0 to 1."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).float().permute(2, 0, 1) / 255.0
    pixels = torch.nn.functional.avg_pool2d(pixels[None], spatial // scale)
    return torch.nn.functional.pixel_unshuffle(pixels, scale).permute(0, 2, 3, 1).flatten(0, 2)


def _with_one(values: Tensor) -> Tensor:
    """Append a constant, for the map's bias."""
    return torch.nn.functional.pad(values, (0, 1), value=1.0)


class Preview:
    """Follows a stock pipeline and makes a guess of the clean middle frame every few steps.

    Two latents in a row give the velocity that was really applied, whatever the guidance, scheduler or expert:
    v = (x_i - x_(i-1)) / (s_i - s_(i-1)); the clean latents it points to are x_i - s_i v. Only one frame is kept and
    decoded: by the VAE, until a video has been finished from which a `LinearDecoder` could learn.

    Example:
        >>> preview = Preview(engine.pipeline)
        >>> for event in engine.stream(request):
        ...     picture = preview.take()  # uint8 [H, W, 3], or None where there is no new one
        >>> preview.learn(event.latents, event.frames)  # the VideoOutput; later previews cost next to nothing

    Attributes:
        budget: a picture is made only while all of a run together stay below this share of the time since it began.
        seconds: that the pictures of this run took.
    """

    def __init__(self, pipeline: Any, budget: float = 0.02) -> None:
        """Attach to a loaded pipeline whose transformers are called at every step."""
        self.budget, self.seconds = budget, 0.0
        self._pipeline = pipeline
        self._adapter = adapter_for(pipeline)
        self._linear = LinearDecoder()
        self._cost: float | None = None
        self._step = -1
        self._started = 0.0
        self._latents: Tensor | None = None
        self._picture: NDArray[np.uint8] | None = None
        experts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
        self._handles = [
            expert.register_forward_pre_hook(self._enter, with_kwargs=True) for expert in experts if expert is not None
        ]

    def take(self) -> NDArray[np.uint8] | None:
        """Return the newest picture once, uint8 [H, W, 3]; None until there is another. Callable from any thread."""
        picture, self._picture = self._picture, None
        return picture

    def learn(self, latents: Tensor, frames: Frames, shape: tuple[int, ...] | None = None) -> None:
        """Learn from a finished video, as `LinearDecoder.learn`."""
        if not self._linear.ready:
            self._cost = None  # that of the VAE
        self._linear.learn(latents, frames, shape)

    def remove(self) -> None:
        """Detach from the pipeline."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: torch.nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Before each call of a transformer: the first one of a step brings that step's latents [B, C, F, Y, X]."""
        scheduler = self._pipeline.scheduler
        # None before the scheduler's first step of a run.
        step = scheduler.step_index or 0
        if step == self._step:
            return
        latents = self._adapter.video(module, named(module, inputs, arguments))
        frame = latents[:1, :, latents.shape[2] // 2].float().clone()
        now = time.perf_counter()
        if self._latents is None or step != self._step + 1 or frame.shape != self._latents.shape:
            self._started, self.seconds = now, 0.0
        elif self._worth_it(step, now):
            before, after = level_of(scheduler, step - 1), level_of(scheduler, step)
            if after != before:  # else they have not moved
                velocity = (frame - self._latents) / (after - before)
                self._picture = self._decode(frame - after * velocity)
                self._cost = time.perf_counter() - now
                self.seconds += self._cost
        self._step, self._latents = step, frame

    def _worth_it(self, step: int, now: float) -> bool:
        if step < _FIRST_SHARE * len(self._pipeline.scheduler.timesteps):
            return False
        elapsed = now - self._started
        # What the first picture of the VAE costs is not known; half a step is what it takes in a small model.
        cost = self._cost if self._cost is not None else 0.0 if self._linear.ready else elapsed / step / 2.0
        return self.seconds + cost <= self.budget * elapsed

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> NDArray[np.uint8] | None:
        """Latents [1, C, Y, X] of one frame -> uint8 [H, W, 3]; None where they or the VAE's picture are not finite."""
        latents = self._adapter.finished(self._pipeline, latents.unsqueeze(2))
        picture = self._linear.decode(latents[:, :, 0]) if self._linear.ready else self._through_vae(latents)
        if not is_finite(picture):
            return None
        pixels: NDArray[np.uint8] = (picture.clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0).cpu().numpy()
        return pixels

    def _through_vae(self, latents: Tensor) -> Tensor:
        """Latents [1, C, 1, Y, X] of one frame -> [3, H, W] in 0 to 1, as a video of one frame."""
        vae = self._pipeline.vae
        factor = -(-max(latents.shape[-2:]) // _MAX_SIDE)
        if factor > 1:
            latents = torch.nn.functional.avg_pool3d(latents, (1, factor, factor), ceil_mode=True)
        video = self._adapter.decode(vae, self._adapter.decodable(vae, latents))
        return video[0, :, 0].float() / 2.0 + 0.5
