"""What a step costs: against its share of active tokens, by part; whole loops; and the planner.

A random Wan transformer is measured: no weights are needed for time. Dense steps and others alternate; ratios are made
of neighbouring runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn
from torch.profiler import ProfilerActivity, profile

from ...engine.denoise.session import apply, remove
from ...engine.media.files import write_json
from ...errors import HeterostepError
from ...hsa.config import HSAConfig, Schedule
from ...hsa.planner import StepPlanner
from ...parallel.config import ParallelConfig
from ..results.result import metric, row
from .settings import StepSettings


@dataclasses.dataclass(frozen=True)
class Shape:
    """A transformer's sizes and the video it makes: heads, their width, layers, width of the feed-forward layer and of
    the text, tokens (frames, rows, columns)."""

    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    grid: tuple[int, int, int]
    dtype: torch.dtype


SHAPES = {
    "small": Shape(6, 64, 4, 1536, 64, (8, 16, 16), torch.float32),
    # The published sizes, at 832 x 480 and 81 frames.
    "wan-1.3b": Shape(12, 128, 30, 8960, 4096, (21, 30, 52), torch.bfloat16),
    "wan-14b": Shape(40, 128, 40, 13824, 4096, (21, 30, 52), torch.bfloat16),
}
LIMITS = {1.0: 1.05, 0.5: 0.56, 0.25: 0.31}
"""Denoising time over dense that each compute may take at most."""
LOOPS = (("joint", 1.0), ("joint", 0.5), ("joint", 0.25), ("tokens", 0.5), ("tokens", 0.25))
"""The default policy, and the one whose steps are partial whatever the default does."""
POLICIES = ("joint", "tokens", "groups")
PLAN_TOKENS = 75_600
"""Wan at 720p x 81 frames."""
PLAN_LIMIT = 0.030
"""Seconds of planning that a step may take."""


def build_pipeline(shape: Shape, device: str) -> tuple[Any, dict[str, Any]]:
    """A random pipeline, and the arguments of a call."""
    torch.manual_seed(0)
    z, width = 16, shape.heads * shape.head_dim
    with torch.device(device):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            in_channels=z,
            out_channels=z,
            text_dim=shape.text_dim,
            freq_dim=256 if width > 1000 else 64,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.layers,
            rope_max_seq_len=128,
        )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * z,
        latents_std=[1.0] * z,
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer.to(shape.dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer_2=None,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = shape.grid
    request = {
        "prompt_embeds": torch.randn(1, 64, shape.text_dim, device=device, dtype=shape.dtype),
        "height": 16 * height,
        "width": 16 * width,
        "num_frames": 4 * (frames - 1) + 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    return pipe, request


class FixedShare(StepPlanner):
    """A planner whose first step is full and whose others have one number of tokens; the policy chooses which.

    Attributes:
        seconds: that planning took, and learning from what was evaluated.
    """

    def __init__(self, share: float) -> None:
        super().__init__(HSAConfig(compute=0.5, policy="tokens"))
        self.share, self.seconds = share, 0.0

    def _count(self, schedule: Schedule) -> list[int]:
        later = [round(self.share * schedule.num_tokens)] * (schedule.num_steps - 1)
        return [schedule.num_tokens, *later]

    def plan(self, step: int, num_steps: int, sigma: float, num_tokens: int) -> Tensor | None:
        """See `StepPlanner`."""
        began = time.perf_counter()
        active = super().plan(step, num_steps, sigma, num_tokens)
        self.seconds += time.perf_counter() - began
        return active

    def observe(self, step: int, sigma: float, velocity: Tensor, active: Tensor | None) -> None:
        """See `StepPlanner`."""
        began = time.perf_counter()
        super().observe(step, sigma, velocity, active)
        self.seconds += time.perf_counter() - began


class StepClock:
    """Times the steps of one pipeline run, from the transformer's first call to the scheduler's end."""

    def __init__(
        self, pipe: Any, request: dict[str, Any], steps: int, clock: Callable[[], float], profiler: Any = None
    ) -> None:
        """Run `steps` steps by a clock; `seconds` has one time for each, `peak_bytes` what the GPU held at most.

        A `profiler` watches all steps but the first.
        """
        self.seconds: list[float] = []
        self._cuda, self._profiler, self._steps = pipe.device.type == "cuda", profiler, steps
        self._clock = clock
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        handle = pipe.transformer.register_forward_pre_hook(self._begin)
        try:
            generator = torch.Generator("cpu").manual_seed(0)
            pipe(**request, num_inference_steps=steps, generator=generator, callback_on_step_end=self._end)
        finally:
            handle.remove()
        self.peak_bytes = torch.cuda.max_memory_allocated() if self._cuda else None

    def _begin(self, *_: Any) -> None:
        self._started = self._now()

    def _end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.seconds.append(self._now() - self._started)
        if self._profiler is not None and index == 0:
            self._profiler.start()
        elif self._profiler is not None and index == self._steps - 1:
            self._profiler.stop()
        return tensors

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return self._clock()


def clock_for(device: str, ranks: int) -> Callable[[], float]:
    """The processor's time of this process where it is one thread on a CPU, which other programs disturb less."""
    alone = device == "cpu" and ranks == 1 and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


class StepBench:
    """Steps and loops of the random model, on one rank or as one of several.

    Attributes:
        samples: what was measured so far, by what and by metric.
    """

    def __init__(self, settings: StepSettings, device: str, ranks: int = 1) -> None:
        """Build the model."""
        self.settings, self.device, self.shape = settings, device, SHAPES[settings.shape]
        self.parallel = ParallelConfig(ulysses=ranks) if ranks > 1 else None
        self.clock = clock_for(device, ranks)
        self.pipe, self.request = build_pipeline(self.shape, device)
        self.samples: dict[tuple[tuple[str, Any], ...], dict[str, list[float]]] = {}

    def run(self, done: Callable[[], None] = lambda: None) -> None:
        """Measure; `done` is called whenever there is more."""
        for policy in POLICIES:
            self._planner(policy)
        done()
        if self.settings.repeats:
            self.steps(done)
        self._loops(done)

    def steps(self, done: Callable[[], None] = lambda: None) -> None:
        """Measure single steps alone."""
        self._clock(2, None)
        for _ in range(self.settings.rounds):
            for share in self.settings.active:
                self._partial(share)
            done()

    def rows(self) -> list[dict[str, Any]]:
        """What was measured so far, as rows of a result."""
        found = []
        for what, metrics in self.samples.items():
            limits = _limits(dict(what))
            made = {name: metric(values, limit=limits.get(name)) for name, values in metrics.items()}
            found.append(row(dict(what), made))
        return found

    def _add(self, what: Mapping[str, Any], **values: float | None) -> None:
        kept = self.samples.setdefault(tuple(what.items()), {})
        for name, value in values.items():
            if value is not None:
                kept.setdefault(name, []).append(value)

    @contextlib.contextmanager
    def _applied(self, config: HSAConfig, planner: Any = None) -> Iterator[Any]:
        session = apply(self.pipe, config, planner=planner, parallel=self.parallel)
        try:
            yield session
        finally:
            remove(self.pipe)

    def _clock(self, steps: int, config: HSAConfig | None) -> StepClock:
        """A run; without a config a dense one: of the stock pipeline, where there is one rank."""
        if config is None and self.parallel is None:
            return StepClock(self.pipe, self.request, steps, self.clock)
        with self._applied(config or HSAConfig(compute=1.0)):
            return StepClock(self.pipe, self.request, steps, self.clock)

    def _partial(self, share: float) -> None:
        """Partial steps: one full step, then timed ones, with a dense run on either side; and one profiled run."""
        steps = self.settings.repeats + 1
        dense = self._clock(2, None).seconds
        with self._applied(HSAConfig(compute=1.0), FixedShare(share)):
            partial = StepClock(self.pipe, self.request, steps, self.clock).seconds[1:]
        dense += self._clock(2, None).seconds
        self._add({"step": "dense"}, seconds=float(np.median(dense)))
        seconds = float(np.median(partial))
        parts = {name: part * seconds for name, part in self._split(share, steps).items()}
        self._add({"step": f"{share:g} active"}, seconds=seconds, over_dense=seconds / float(np.median(dense)), **parts)

    def _split(self, share: float, steps: int) -> dict[str, float]:
        """Shares of a step's time: under the profiler it is slower, so only these are taken from there."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device != "cpu" else [])]
        profiler = profile(activities=kinds)
        planner = FixedShare(share)
        with self._applied(HSAConfig(compute=1.0), planner) as session:
            wall = sum(StepClock(self.pipe, self.request, steps, time.perf_counter, profiler).seconds[1:])
            shared = [record.parallel for record in session.report.steps[1:] if record.parallel is not None]
        sent = [(name, count.seconds) for record in shared for name, count in record.sent.items()]
        spent = {"attention": 0.0, "linear": 0.0, "elementwise": 0.0}
        for event in profiler.key_averages():
            own = event.self_cpu_time_total if self.device == "cpu" else event.self_device_time_total
            if event.key.startswith("aten::"):
                spent[_kind(event.key)] += own / 1e6
        spent["exchange"] = sum(seconds for name, seconds in sent if name != "plan")
        spent["plan"] = planner.seconds * (steps - 1) / steps + sum(s for name, s in sent if name == "plan")
        if self.device == "cpu":  # planning is made of operations, too
            spent["elementwise"] = max(spent["elementwise"] - planner.seconds * (steps - 1) / steps, 0.0)
        gaps = max(wall - sum(spent.values()), 0.0)
        return {name: seconds / wall for name, seconds in {**spent, "gaps": gaps}.items()}

    def _loops(self, done: Callable[[], None]) -> None:
        """Whole denoising loops under a policy against dense ones before and after them."""
        steps = self.settings.loop_steps
        dense = self._clock(steps, None)
        before = sum(dense.seconds)
        for _ in range(self.settings.rounds):
            found = {}
            for policy, compute in LOOPS:
                with self._applied(HSAConfig(compute=compute, policy=policy)) as session:
                    found[policy, compute] = (
                        StepClock(self.pipe, self.request, steps, self.clock),
                        session.report.compute,
                    )
            after = sum(self._clock(steps, None).seconds)
            for (policy, compute), (clock, achieved) in found.items():
                ratio = 2 * sum(clock.seconds) / (before + after)
                self._add(
                    {"loop": policy, "compute": compute}, seconds=sum(clock.seconds), over_dense=ratio,
                    achieved=achieved, peak_bytes=clock.peak_bytes, dense_peak_bytes=dense.peak_bytes,
                )  # fmt: skip
            before = after
            done()

    def _planner(self, policy: str) -> None:
        """Plan and observe of each evaluated step at N = 75,600, 64 numbers a token."""
        sigmas = [3 * s / (1 + 2 * s) for s in np.linspace(1, 0, 41)]
        velocity = [torch.randn(1, PLAN_TOKENS, 64, device=self.device) for _ in range(2)]
        planner = StepPlanner(HSAConfig(compute=0.5, policy=policy))
        planner.begin(sigmas, PLAN_TOKENS)
        for step in range(40):
            began = self.clock()
            active = planner.plan(step, 40, sigmas[step], PLAN_TOKENS)
            active = None if active is None else active.to(self.device)
            planner.observe(step, sigmas[step], velocity[step % 2], active)
            if self.device != "cpu":
                torch.cuda.synchronize()
            # The first step only allocates; a skipped one has nothing to learn from.
            if step and (active is None or active.numel()):
                self._add({"planner": policy, "tokens": PLAN_TOKENS}, seconds=self.clock() - began)


def _limits(what: Mapping[str, Any]) -> dict[str, float]:
    if "planner" in what:
        return {"seconds": PLAN_LIMIT}
    return {"over_dense": LIMITS[what["compute"]]} if "loop" in what else {}


def _kind(operation: str) -> str:
    if "attention" in operation or "scaled_dot_product" in operation:
        return "attention"
    names = ("mm", "matmul", "linear", "convolution", "conv3d")
    return "linear" if operation.removeprefix("aten::").strip("_").endswith(names) else "elementwise"


def measure(settings: StepSettings, device: str, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measure on one rank here, or on several processes; `keep` gets all rows whenever there are more.

    Raises:
        HeterostepError: a rank failed.
    """
    if settings.nproc == 1:
        bench = StepBench(settings, device)
        bench.run(lambda: keep(bench.rows()))
        return
    with tempfile.TemporaryDirectory(prefix="heterostep-step-") as folder:
        file = Path(folder) / "rows.json"
        try:
            on_ranks(_rank, (settings, device, folder), settings.nproc)
        finally:
            if file.exists():
                keep(json.loads(file.read_text())["rows"])


def on_ranks(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call `work(rank, *arguments)` in so many processes of this machine, until all have ended.

    Raises:
        HeterostepError: a rank failed.
    """
    try:
        spawn(work, arguments, count)
    except (ProcessExitedException, ProcessRaisedException) as error:
        raise HeterostepError(f"a rank of {count} failed: {str(error).strip().splitlines()[-1]}") from error


def meet(rank: int, count: int, device: str, folder: str) -> str:
    """Join the process group of the ranks that `on_ranks` started, by a file in `folder`; the rank's own device."""
    if device != "cpu":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    return device


def _rank(rank: int, settings: StepSettings, device: str, folder: str) -> None:
    """Life of one rank."""
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.nproc))
    device = meet(rank, settings.nproc, device, folder)
    bench, file = StepBench(settings, device, settings.nproc), Path(folder) / "rows.json"
    with contextlib.suppress(KeyboardInterrupt):
        bench.run(lambda: None if rank else write_json(file, {"rows": bench.rows()}))
    dist.destroy_process_group()
