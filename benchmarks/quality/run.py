"""Make every prompt's dense video and the others beside it, compare them, and keep each result as it comes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ...engine.config import EngineConfig
from ...engine.engine import Engine
from ...engine.facts import ModelFacts
from ...engine.media.video import write_mp4
from ...engine.record import psnr, relative_l2, ssim
from ...engine.request import Event, GenerateRequest, VideoOutput, allocation, resolve
from ...errors import ConfigError
from ...hsa.config import HSAConfig
from ..baselines import Trial, available, build, tune
from .settings import Prompt, QualitySettings, listed
from .store import Store

DENSE = "dense"
Show = Callable[[Iterator[Event], str], VideoOutput]
"""Shows a run's events under a label, and returns its video."""


class Maker(Protocol):
    """Makes videos with the loaded model.

    Attributes:
        pipeline: the stock pipeline, which baselines change; None where other processes have it.
    """

    pipeline: Any

    def make(self, request: GenerateRequest, hsa: HSAConfig | None, label: str) -> VideoOutput:
        """Make a video with an allocation; None is the stock pipeline."""


class OneRank:
    """Makes videos in this process."""

    def __init__(self, config: EngineConfig, show: Show) -> None:
        """Load the model."""
        self._engine, self._show = Engine(dataclasses.replace(config, hsa=None)), show
        self.pipeline = self._engine.pipeline

    def make(self, request: GenerateRequest, hsa: HSAConfig | None, label: str) -> VideoOutput:
        """See `Maker`."""
        self._engine.config = dataclasses.replace(self._engine.config, hsa=hsa)
        return self._show(self._engine.stream(request), label)


class Method(NamedTuple):
    """Something that makes a video at a share of the work.

    Attributes:
        name: of a policy or a baseline.
        target: the wanted share.
        hsa: the allocation of a policy.
        settings: of a baseline.
    """

    name: str
    target: float
    hsa: HSAConfig | None = None
    settings: dict[str, Any] | None = None


class Estimate(NamedTuple):
    """How long a benchmark would still take, from the time of two dense steps and one decoding.

    Attributes:
        videos: that are to be made.
        runs: dense videos that take as long as their denoising.
        seconds: altogether.
        tuning: seconds of it, about, for finding the baselines' settings.
    """

    videos: int
    runs: float
    seconds: float
    tuning: float

    def __str__(self) -> str:
        tuning = f", {_duration(self.tuning)} of them for tuning the baselines" if self.tuning else ""
        work = f"{self.videos} videos to make, as much work as {self.runs:.1f} dense ones"
        return f"{work}: about {_duration(self.seconds)}{tuning}"


_TUNING_RUNS = {"unipc": 0, "euler": 0, "unipc-placed": 3, "dpcache": 6, "magcache": 16, "pab": 8, "cache-dit": 6}
"""Runs that tuning takes for each share, about; of others ten."""


class QualityBench:
    """A benchmark of one model: `estimate`, then `run`.

    Attributes:
        store: what is kept.
        prompts: all videos to make.
    """

    def __init__(
        self,
        settings: QualitySettings,
        facts: ModelFacts,
        prompts: Sequence[Prompt],
        request: GenerateRequest,
        hsa: HSAConfig,
        store: Store,
        say: Callable[[str], None],
    ) -> None:
        """Prepare; nothing is loaded.

        Args:
            settings: what to measure.
            facts: of the model.
            prompts: what the videos show; the last one also tunes baselines, with another seed.
            request: what all videos have in common.
            hsa: what all policies have in common.
            store: where results are kept.
            say: prints a line.

        Raises:
            HeterostepError: a request or an allocation does not fit the model.
        """
        self.settings, self.facts, self.store, self.prompts = settings, facts, store, list(prompts)
        self._request, self._hsa, self._say = request, hsa, say
        for prompt in self.prompts:
            store.check_prompt(prompt.name, prompt.fields)
        self.requests = {p.name: dataclasses.replace(request, **p.fields) for p in self.prompts}
        self.resolved = {name: resolve(made, facts) for name, made in self.requests.items()}
        self.steps = next(iter(self.resolved.values())).num_inference_steps
        self.lpips = None if settings.lpips is None else read_lpips(settings.lpips)

    @property
    def policies(self) -> list[Method]:
        """The policies at all shares."""
        return [
            Method(name, share, dataclasses.replace(self._hsa, policy=name, compute=share))
            for name in listed(self.settings.policies)
            for share in self.settings.shares
        ]

    @property
    def kinds(self) -> list[str]:
        """The baselines."""
        return listed(self.settings.baselines)

    def left(self, method: str, target: float) -> list[Prompt]:
        """Prompts whose video by a method is still to be made."""
        return [p for p in self.prompts if (p.name, method, target) not in self.store.results]

    def allocation_of(self, method: Method, name: str) -> HSAConfig | None:
        """What acts for a prompt; None where it is the stock pipeline."""
        return allocation(EngineConfig(hsa=method.hsa), self.resolved[name])

    def estimate(self, maker: Maker) -> Estimate:
        """Time two dense steps, which also pay for what the first steps of a process pay for."""
        left = {(name, share): len(self.left(name, share)) for name in self._names() for share in self.settings.shares}
        dense = [p for p in self.prompts if self.store.dense(p.name) is None]
        videos = sum(left.values()) + len(dense)
        if not videos:
            return Estimate(0, 0.0, 0.0, 0.0)
        request = dataclasses.replace(self.requests[self.prompts[0].name], num_inference_steps=2)
        maker.make(request, None, "warming up")
        seconds = maker.make(request, None, "timing two dense steps").seconds
        once = seconds["denoise"] / 2 * self.steps
        runs = len(dense) + sum(share * count for (_, share), count in left.items())
        tuned = self.store.remembered("tuned")
        searches = [
            share * _TUNING_RUNS.get(kind, 10)
            for kind in self.kinds
            for share in self.settings.shares
            if f"{share:g}" not in tuned.get(kind, {})
        ]
        tuning = (1 + sum(searches)) * once if any(searches) else 0.0
        other = seconds["total"] - seconds["denoise"]
        return Estimate(videos, runs, runs * once + videos * other + tuning, tuning)

    def _names(self) -> list[str]:
        return [*listed(self.settings.policies), *self.kinds]

    def run(self, maker: Maker) -> None:
        """Make and compare what is missing."""
        methods = [*self.policies, *self._baselines(maker)]
        # A worker group has one allocation at a time: there the policies take turns, elsewhere the prompts do.
        turns = (
            [methods] if maker.pipeline is not None else [self._of(methods, n) for n in listed(self.settings.policies)]
        )
        for turn in turns:
            for number, prompt in enumerate(self.prompts, 1):
                missing = [m for m in turn if (prompt.name, m.name, m.target) not in self.store.results]
                if not missing and (prompt.name, DENSE, 1.0) in self.store.results:
                    continue
                dense = self._dense(maker, prompt)
                for method in missing:
                    self._one(
                        maker, prompt, method, dense, f"{number}/{len(self.prompts)} {method.name} {method.target:g}"
                    )

    @staticmethod
    def _of(methods: Sequence[Method], name: str) -> list[Method]:
        return [method for method in methods if method.name == name]

    def _baselines(self, maker: Maker) -> list[Method]:
        """The baselines with settings that were tuned once, on the last prompt with another seed."""
        if self.kinds and maker.pipeline is None:
            raise ConfigError("--baselines change the pipeline in this process: leave out --nproc, or --baselines")
        tuned = self.store.remembered("tuned")
        kinds = [kind for kind in self.kinds if available(kind, maker.pipeline, self._say)]
        trials: list[Trial] = []
        for kind in kinds:
            missing = [share for share in self.settings.shares if f"{share:g}" not in tuned.get(kind, {})]
            if not missing:
                continue
            if not trials and kind not in ("euler", "unipc"):
                trials.append(self._trial(maker))
            found = tune(kind, maker.pipeline, self.steps, missing, trials, lambda text: self._say(f"tuned {text}"))
            tuned.setdefault(kind, {}).update({f"{share:g}": chosen for share, chosen in found.items()})
            self.store.remember("tuned", tuned)
        return [Method(k, share, settings=tuned[k][f"{share:g}"]) for k in kinds for share in self.settings.shares]

    def _trial(self, maker: Maker) -> Trial:
        request = self.requests[self.prompts[-1].name]
        request = dataclasses.replace(request, seed=request.seed + 1_000_003)

        def run(steps: int) -> torch.Tensor:
            return maker.make(dataclasses.replace(request, num_inference_steps=steps), None, "tuning").latents

        return Trial(run, run(self.steps))

    def _dense(self, maker: Maker, prompt: Prompt) -> dict[str, torch.Tensor]:
        """The stock pipeline's video, made once."""
        kept = self.store.dense(prompt.name)
        if kept is not None and (prompt.name, DENSE, 1.0) in self.store.results:
            return kept
        output = maker.make(self.requests[prompt.name], None, f"{prompt.name} dense")
        self.store.keep_dense(prompt.name, output)
        dense = self.store.dense(prompt.name)
        assert dense is not None
        self._keep(prompt, Method(DENSE, 1.0), output, 1.0, {}, output.seconds["denoise"])
        return dense

    def _one(self, maker: Maker, prompt: Prompt, method: Method, dense: dict[str, torch.Tensor], label: str) -> None:
        """Make a video, compare it with the dense one, and keep the result."""
        request = self.requests[prompt.name]
        if method.settings is None:
            output = maker.make(request, self.allocation_of(method, prompt.name), label)
            compute = output.report.compute
        else:
            baseline = build(method.name, self.steps, method.settings)
            with baseline.applied(maker.pipeline):
                output = maker.make(dataclasses.replace(request, num_inference_steps=baseline.steps), None, label)
            compute = baseline.compute
        beside = self.store.results[prompt.name, DENSE, 1.0]["seconds"]
        self._keep(prompt, method, output, compute, self._compared(output, dense), beside)

    def _compared(self, output: VideoOutput, dense: dict[str, torch.Tensor]) -> dict[str, float | None]:
        """Figures of a video against the dense one; None where one is not finite, as the PSNR of equal videos."""
        frames = dense["frames"].numpy()
        found: dict[str, float | None] = {"psnr": psnr(output.frames, frames)}
        if min(frames.shape[1:3]) >= 11:
            found["ssim"] = ssim(output.frames, frames)
        if self.lpips is not None:
            found["lpips"] = lpips_of(self.lpips, output.frames, frames)
        found["relative_l2"] = relative_l2(output.latents, dense["latents"])
        if output.audio_latents is not None:
            found["audio_relative_l2"] = relative_l2(output.audio_latents, dense["audio_latents"])
        return {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}

    def _keep(
        self, prompt: Prompt, method: Method, output: VideoOutput, compute: float, against: dict[str, Any], dense: float
    ) -> None:
        video = self.store.video(prompt.name, method.name, method.target)
        video.parent.mkdir(exist_ok=True)
        write_mp4(video, output.frames, output.fps, audio=output.audio)
        self.store.add(
            {
                "clip": prompt.name,
                "prompt": prompt.fields["prompt"],
                "fields": dict(prompt.fields),
                "method": method.name,
                "target": method.target,
                "settings": method.settings,
                "compute": compute,
                "seconds": output.seconds["denoise"],
                "total_seconds": output.seconds["total"],
                "dense_seconds": dense,
                "against": {DENSE: against},
                "video": str(video.relative_to(self.store.folder)),
                "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
        )


def read_lpips(path: str) -> torch.jit.ScriptModule:
    """A TorchScript module that takes two batches of pictures [N, 3, H, W] in [-1, 1] and gives their distances.

    Raises:
        ConfigError: the file is not one.
    """
    try:
        return torch.jit.load(str(Path(path)), map_location="cpu")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--lpips {path}: the file is not a TorchScript module ({str(error).splitlines()[0]})"
        ) from error


@torch.no_grad()
def lpips_of(module: Any, frames: Any, reference: Any) -> float:
    """Mean over the frames of two videos uint8 [F, H, W, 3]."""
    distances = []
    for frame, other in zip(frames, reference, strict=True):  # one by one: large frames need much memory
        pair = (torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (frame, other))
        distances.append(float(module(*pair).mean()))
    return sum(distances) / len(distances)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
