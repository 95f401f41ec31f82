"""The demo model as a test bench: clips, timed denoising, decoding, references, and figures."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import pathlib
import random
import shlex
import sys
import time
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from safetensors.torch import load_file, save_file
from torch import Tensor

from heterostep.benchmarks.baselines.solvers import scheduler_like
from heterostep.benchmarks.results import result as results

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPORTS = ROOT / "benchmarks" / "reports"
DEMO_MODEL = ROOT / "engine" / "demo_model"
sys.path.insert(0, str(ROOT / "benchmarks" / "demo_model"))

# Scripts of demo_model/, found by the line above.
import scenes  # noqa: E402
import score  # noqa: E402

from heterostep.engine.record import psnr, relative_l2, ssim  # noqa: E402

SEEDS = {"tune": 10_000, "held-out": 20_000, "calibration": 30_000}
ODE_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Clip:
    """One thing to generate: a caption with the scene behind it, and the seed of the noise."""

    name: str
    scene: scenes.Scene
    seed: int


def clips(split: str, count: int) -> list[Clip]:
    """The first clips of a split (``tune``, ``held-out``, ``calibration``): disjoint scenes and seeds."""
    made = []
    for i in range(count):
        scene = scenes.random_scene(random.Random(f"pareto {split} {i}"), varied=False)
        made.append(Clip(f"{split}-{i:03d}", scene, SEEDS[split] + i))
    return made


@dataclasses.dataclass(frozen=True)
class Denoised:
    """Final latents [1, C, F, Y, X] of one run, and how long the denoising loop took.

    ``seconds`` is wall time from the first call of the transformer to the end of the last scheduler step, so
    that text encoding and decoding are not in it; ``cpu_seconds`` is what the process got of the processor in
    that time, which other programs on the machine disturb less.
    """

    latents: Tensor
    seconds: float
    cpu_seconds: float


class Bench:
    """A stock pipeline and one fixed request shape.

    Attributes:
        pipe: `WanPipeline`; text is encoded once for each caption.
        guidance: guidance scale.
        solver: "euler" or "unipc", of the pipeline's scheduler.
        fingerprint: short hash of the transformer's weights.
    """

    def __init__(
        self, model: str | os.PathLike[str], guidance: float = 1.5, device: str = "cpu", solver: str = "euler"
    ) -> None:
        """Load a pipeline folder; its scheduler becomes one of the solver, with the folder's noise levels."""
        folder = pathlib.Path(model)
        if not (folder / "model_index.json").is_file():
            raise SystemExit(f"{folder} holds no pipeline (model_index.json): name one with --model.")
        self.pipe = WanPipeline.from_pretrained(folder).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = scheduler_like(self.pipe.scheduler, solver)
        self.guidance, self.device, self.solver = guidance, torch.device(device), solver
        weights = sorted((folder / "transformer").glob("*.safetensors"))
        self.fingerprint = hashlib.sha256(b"".join(w.read_bytes() for w in weights)).hexdigest()[:12]
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    def at(self, guidance: float) -> Bench:
        """The same pipeline with another guidance scale."""
        other = copy.copy(self)
        other.guidance = guidance
        return other

    def text(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embeddings of a caption and of the empty negative prompt."""
        if caption not in self._texts:
            # 512 is what the pipeline itself asks for.
            self._texts[caption] = self.pipe.encode_prompt(
                caption, negative_prompt="", do_classifier_free_guidance=True, max_sequence_length=512
            )
        return self._texts[caption]

    def denoise(self, batch: Clip | list[Clip], steps: int, on_step: Any = None) -> Denoised:
        """Run the pipeline up to its final latents.

        Args:
            batch: one clip, or several at once (for references; timings are made one by one).
            steps: ``num_inference_steps``.
            on_step: called after every step with (index, latents [B, C, F, Y, X]).
        """
        batch = [batch] if isinstance(batch, Clip) else batch
        texts = [self.text(clip.scene.caption) for clip in batch]
        started: list[tuple[float, float]] = []
        ended = (0.0, 0.0)

        def begin(*_: Any) -> None:
            if not started:
                started.append(self._now())

        def end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal ended
            if index == steps - 1:
                ended = self._now()
            if on_step is not None:
                on_step(index, tensors["latents"])
            return tensors

        handle = self.pipe.transformer.register_forward_pre_hook(begin)
        try:
            latents = self.pipe(
                prompt_embeds=torch.cat([cond for cond, _ in texts]),
                negative_prompt_embeds=torch.cat([uncond for _, uncond in texts]),
                height=scenes.SIZE,
                width=scenes.SIZE,
                num_frames=scenes.FRAMES,
                num_inference_steps=steps,
                guidance_scale=self.guidance,
                generator=[torch.Generator("cpu").manual_seed(clip.seed) for clip in batch],
                output_type="latent",
                callback_on_step_end=end,
            ).frames
        finally:
            handle.remove()
        return Denoised(latents, ended[0] - started[0][0], ended[1] - started[0][1])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [1, C, F, Y, X] -> frames uint8 [frames, height, width, 3], by the pipeline's VAE."""
        vae = self.pipe.vae
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean, std = (torch.tensor(v).view(shape).to(latents) for v in (vae.config.latents_mean, vae.config.latents_std))
        video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        frames = self.pipe.video_processor.postprocess_video(video, output_type="np")[0]
        return (frames * 255).round().clip(0, 255).astype(np.uint8)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


class References:
    """The dense run and the accurate solution of every clip, made once and kept as safetensors."""

    def __init__(self, bench: Bench, steps: int, folder: pathlib.Path) -> None:
        """Keep them in `folder`, which belongs to one model and one guidance scale."""
        self.bench, self.steps, self.folder = bench, steps, folder
        # On one CPU thread four clips take four times as long as one.
        self.ode_batch = 1 if bench.device.type == "cpu" else 4
        folder.mkdir(parents=True, exist_ok=True)

    def dense(self, clip: Clip) -> Tensor:
        """Latents of the stock pipeline at the dense number of steps."""
        path = self._path(clip, f"dense-{self.bench.solver}{self.steps}")
        if not path.exists():
            save(path, self.bench.denoise(clip, self.steps).latents)
        return load_file(path)["latents"]

    def keep(self, clip: Clip, latents: Tensor) -> None:
        """Take the latents of a dense run that was made for something else."""
        path = self._path(clip, f"dense-{self.bench.solver}{self.steps}")
        if not path.exists():
            save(path, latents)

    def ode(self, clip: Clip, ahead: list[Clip] | None = None) -> Tensor:
        """Latents of an accurate solution of the sampling ODE; clips that are needed next are made along in
        one batch.

        `ODE_STEPS` steps of `Adams`. Measured on one clip, guidance 1.5 and 4: a relative L2 of .0033 and .0021 (58.8
        and 60.2 dB of frames) from 200 steps of Adams-Bashforth 2, which on an early demo model were .004 from 400;
        the 50 UniPC steps that are judged are .043 and .029 from it.
        """
        path = self._path(clip, f"ode{ODE_STEPS}")
        if not path.exists():
            wanted = [c for c in (ahead or []) if not self._path(c, f"ode{ODE_STEPS}").exists() and c != clip]
            batch = [clip, *wanted[: self.ode_batch - 1]]
            stock = self.bench.pipe.scheduler
            self.bench.pipe.scheduler = scheduler_like(stock, "euler", Adams)
            try:
                latents = self.bench.denoise(batch, ODE_STEPS).latents
            finally:
                self.bench.pipe.scheduler = stock
            for c, rows in zip(batch, latents, strict=True):
                save(self._path(c, f"ode{ODE_STEPS}"), rows[None])
        return load_file(path)["latents"]

    def frames(self, clip: Clip, which: str) -> np.ndarray:
        """Decoded frames of the reference `which`, "dense" or "ode"."""
        latents = self.dense(clip) if which == "dense" else self.ode(clip)
        run = f"{self.bench.solver}{self.steps}" if which == "dense" else f"{ODE_STEPS}"
        path = self._path(clip, f"{which}-frames-{run}")
        if not path.exists():
            save(path, torch.from_numpy(self.bench.decode(latents.to(self.bench.device))), "frames")
        return load_file(path)["frames"].numpy()

    def _path(self, clip: Clip, which: str) -> pathlib.Path:
        return self.folder / f"{clip.name}-{which}.safetensors"


class Adams(FlowMatchEulerDiscreteScheduler):
    """Adams' method on the sigmas of the Euler scheduler, for references only.

    Predicts with the parabola through the last three velocities (Adams-Bashforth 3); when the next velocity is there,
    the step is made again with the cubic that it completes (Adams-Moulton). One evaluation a step.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Start a run."""
        super().set_timesteps(*args, **kwargs)
        self._levels = [float(s) for s in self.sigmas]
        self._velocities: list[Tensor] = []
        self._before: Tensor | None = None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        """Correct the step before, then make this one."""
        if self.step_index is None:
            self._init_step_index(timestep)
        i = self.step_index
        self._velocities = [*self._velocities[-3:], model_output]
        if self._before is not None:
            sample = self._before + self._moved(i - 1, i, self._velocities)
        self._before = sample
        moved = sample + self._moved(i, i, self._velocities[-3:])
        self._step_index += 1
        return (moved,) if not return_dict else FlowMatchEulerDiscreteSchedulerOutput(prev_sample=moved)

    def _moved(self, start: int, last: int, velocities: list[Tensor]) -> Tensor:
        """Integral over the step from level `start` of the polynomial through the velocities up to that of `last`."""
        levels = self._levels[last - len(velocities) + 1 : last + 1]
        low, high = self._levels[start : start + 2]
        nodes, weights = np.polynomial.legendre.leggauss(3)  # exact for cubics
        at = low + (high - low) * (nodes + 1) / 2
        total = torch.zeros_like(velocities[0])
        for k, velocity in enumerate(velocities):
            others = [level for j, level in enumerate(levels) if j != k]
            basis = np.prod([(at - level) / (levels[k] - level) for level in others], axis=0)
            total += velocity * float((weights * basis).sum() * (high - low) / 2)
        return total


def compare(latents: Tensor, reference: Tensor, frames: Any = None, other: Any = None) -> dict[str, float | None]:
    """Figures of one clip against one reference; frames are compared where there are any.

    ``latent_psnr`` takes the reference's own range as the peak.
    """
    reference = reference.to(latents)
    error, peak = float((latents - reference).square().mean()), float(reference.max() - reference.min())
    found: dict[str, float | None] = {
        "relative_l2": relative_l2(latents, reference),
        "latent_psnr": 10 * math.log10(peak**2 / error) if error else None,
    }
    if frames is not None:
        decibels = psnr(frames, other)
        found |= {"psnr": decibels if math.isfinite(decibels) else None, "ssim": ssim(frames, other)}
    return found


def judge(frames: np.ndarray, clip: Clip) -> dict[str, bool]:
    """What the demo model's scorer says: does the video show the right colour, size, direction, one object?"""
    found = score.score(frames, clip.scene)
    return {name: bool(getattr(found, name)) for name in score.NAMES}


def save(path: pathlib.Path, tensor: Tensor, name: str = "latents") -> None:
    """Write a file that is whole or absent."""
    torn = path.with_suffix(".tmp")
    save_file({name: tensor.cpu().contiguous()}, torn)
    torn.replace(path)


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """When, on what, with which versions and by which command a result was made."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    command = shlex.join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])
    return results.environment(name) | {"threads": torch.get_num_threads(), "command": command}


def source_digest() -> str:
    """Short hash of the code that decides what is computed: its results are kept apart by it."""
    files = sorted(file for part in ("hsa", "engine/denoise", "engine/models") for file in (ROOT / part).glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def quiet() -> None:
    """Keep libraries from talking, and from looking for files on the network."""
    import diffusers
    import transformers

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
