"""Videos made for the clock by one replica or several, and what their times say."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...engine.media.video import write_mp4
from ...engine.request import GenerateRequest, VideoOutput
from ...errors import ConfigError
from ...hsa.config import HSAConfig
from ..quality.run import Maker
from ..results.result import metric, row

_NAME_BYTES = 240


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One video's figures.

    Attributes:
        seconds: from the request to the frames.
        stages: seconds by stage.
        compute: achieved share of the dense work.
        sent: by collective, of the rank that sends most: calls, bytes, seconds.
        peak_bytes: of the rank with the most; None where nobody knows.
    """

    seconds: float
    stages: dict[str, float]
    compute: float
    sent: dict[str, tuple[int, int, float]]
    peak_bytes: int | None


@dataclass(kw_only=True)
class Run:
    """What was made of one kind.

    Attributes:
        busy: seconds that each replica has worked, without the writing of files.
        made: videos that are done.
        joules: that the GPUs took; None where nobody knows.
    """

    busy: list[float]
    made: list[Timed] = field(default_factory=list)
    joules: float | None = None


def drive(
    makers: Sequence[Maker],
    requests: Sequence[GenerateRequest],
    hsa: HSAConfig | None,
    run: Run,
    label: str,
    save: Callable[[int, VideoOutput], None] | None = None,
) -> None:
    """Make the videos of some requests; a replica that is free takes the next one.

    Args:
        makers: the replicas.
        requests: what to make.
        hsa: the allocation.
        run: takes what is done, as it is done.
        label: of the steps.
        save: gets the number of each request and its video, which is not timed.

    Raises:
        HeterostepError: a replica failed; KeyboardInterrupt: all stop after what they are doing, or sooner.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    stop = threading.Event()

    def work(replica: int) -> None:
        while not stop.is_set():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            if torch.cuda.is_initialized():  # by this process, where it makes the videos itself
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            output = makers[replica].make(requests[number], hsa, f"{label}, video {number + 1} of {len(requests)}")
            seconds = time.perf_counter() - began
            run.busy[replica] += seconds
            run.made.append(_timed(output, seconds))
            if save is not None:
                save(number, output)

    if len(makers) == 1:  # in this thread, which shows progress and takes signals
        work(0)
    else:
        _beside(work, len(makers), stop)


def _beside(work: Callable[[int], None], replicas: int, stop: threading.Event) -> None:
    """Do the work of all replicas, each in a thread; the first error ends all."""
    failed = queue.SimpleQueue[BaseException]()

    def guarded(replica: int) -> None:
        try:
            work(replica)
        except BaseException as error:
            stop.set()
            failed.put(error)

    # Daemons: a second Ctrl-C ends the process even while they work.
    threads = [threading.Thread(target=guarded, args=(replica,), daemon=True) for replica in range(replicas)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.2) if threads[0].is_alive() else time.sleep(0.2)
    finally:
        stop.set()
    if not failed.empty():
        raise failed.get()


def _timed(output: VideoOutput, seconds: float) -> Timed:
    sent: dict[str, tuple[int, int, float]] = {}
    for rank in output.report.ranks:
        for name, count in rank.sent.items():
            most = sent.get(name, (0, 0, 0.0))
            sent[name] = max(most, (count.calls, count.bytes, count.seconds), key=lambda found: found[1])
    peaks = [rank.peak_bytes for rank in output.report.ranks]
    if not peaks and torch.cuda.is_available():
        peaks = [torch.cuda.max_memory_allocated()]
    stages = {name: float(value) for name, value in output.seconds.items() if name != "total"}
    return Timed(
        seconds=seconds, stages=stages, compute=output.report.compute, sent=sent, peak_bytes=max(peaks, default=None)
    )


def figures(what: dict[str, Any], run: Run, ranks: int) -> dict[str, Any]:
    """The row of a kind of video: throughput by the replica that worked longest, and the time of one video."""
    seconds, replicas = [one.seconds for one in run.made], len(run.busy)
    duration, count = max(run.busy), len(run.made)
    gpus = replicas * ranks
    per_hour = metric([3600 * replicas / each for each in seconds])
    per_hour["value"] = 3600 * count / duration
    stages = list(dict.fromkeys(name for one in run.made for name in one.stages))
    metrics = {
        "videos": count,
        "duration_seconds": duration,
        "videos_per_hour": per_hour,
        "videos_per_gpu_hour": {name: value / gpus for name, value in per_hour.items()},
        "gpu_seconds_per_video": gpus * duration / count,
        "joules_per_video": None if run.joules is None else run.joules / count,
        "seconds": metric(seconds),
        "p90_seconds": float(np.percentile(seconds, 90)),
        **{f"{name}_seconds": metric([one.stages[name] for one in run.made if name in one.stages]) for name in stages},
        "achieved_compute": float(np.mean([one.compute for one in run.made])),
        "peak_bytes": max((one.peak_bytes for one in run.made if one.peak_bytes is not None), default=None),
    }
    return row(what, metrics)


def traffic(what: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """A row for each collective: what the rank that sends most sent for one video, and how long it took."""
    names = list(dict.fromkeys(name for one in run.made for name in one.sent))
    found = []
    for name in names:
        counts = [one.sent[name] for one in run.made if name in one.sent]
        calls, size, seconds = (metric([count[i] for count in counts]) for i in range(3))
        found.append(row({**what, "collective": name}, {"calls": calls, "bytes": size, "seconds": seconds}))
    return found


class Energy:
    """Joules that GPUs have taken, by NVML's counters; None without NVML, or on GPUs without such a counter."""

    def __init__(self, gpus: Sequence[int]) -> None:
        """Watch GPUs by their numbers in PyTorch."""
        self._nvml: Any = None
        if not gpus or not torch.cuda.is_available():
            return
        try:
            self._nvml = nvml = import_module("pynvml")
            nvml.nvmlInit()
            # By their ids: NVML counts GPUs that this process may not see.
            ids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in gpus]
            self._handles = [nvml.nvmlDeviceGetHandleByUUID(each) for each in ids]
            self.joules()
        except Exception:  # it has an error type of its own for each thing that can be missing
            self._nvml = None

    def joules(self) -> float | None:
        """So far, of all together."""
        if self._nvml is None:
            return None
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1000


class Saved:
    """Writes videos into a folder under the names by which VBench finds their prompts: `PROMPT-INDEX.mp4`."""

    def __init__(self, folder: str, prompts: Sequence[str]) -> None:
        """Create the folder.

        Raises:
            ConfigError: it cannot be used, or a prompt cannot be the name of a file.
        """
        self._folder, self._names = Path(folder), []
        seen: dict[str, int] = {}
        for prompt in prompts:
            if "/" in prompt or "\0" in prompt or len(prompt.encode()) > _NAME_BYTES:
                raise ConfigError(
                    f"--save names videos by their prompts, but {prompt[:40]!r}... cannot be the name of a file: it "
                    f"has a slash or more than {_NAME_BYTES} bytes; change it, or leave out --save"
                )
            self._names.append(f"{prompt}-{seen.get(prompt, 0)}.mp4")
            seen[prompt] = seen.get(prompt, 0) + 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--save {folder}: the folder cannot be used ({error})") from error

    def __call__(self, number: int, output: VideoOutput) -> None:
        """Write the video of a request."""
        write_mp4(self._folder / self._names[number], output.frames, output.fps, audio=output.audio)
