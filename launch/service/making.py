"""What a worker does: load the model, then make one video after the other."""

from __future__ import annotations

import base64
import dataclasses
import functools
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ...engine.denoise.preview import Preview
from ...engine.engine import Engine
from ...engine.request import Decoding, EngineConfig, GenerateRequest, JobConfig, Started, StepDone, VideoOutput
from ...errors import TOO_LARGE, Cancelled, ConfigError, RequestError, is_out_of_memory
from ...hsa.config import HSAConfig
from ..logs import silence_libraries
from ..resume import go_on
from .condition import when_there_is_room
from .render import webp, write_files
from .worker import Line

_PREVIEW_SIDE = 320


def make_videos(line: Line, options: dict[str, Any]) -> None:
    """Serve tasks for ever.

    Args:
        line: where they come from.
        options: engine (an `EngineConfig` as a mapping), checkpoint_every, index.

    Raises:
        HeterostepError: the model cannot be loaded.
    """
    silence_libraries()
    asked = options["engine"]
    device = _device(asked["device"], options["index"])
    engine = Engine(EngineConfig(**{**asked, "hsa": HSAConfig(**asked["hsa"]), "device": device}))
    preview = Preview(engine.pipeline)
    line.on_wish = functools.partial(_end, engine)
    line.answer("ready", device=str(engine.device))
    while True:
        task = line.tasks.get()
        try:
            _make(line, engine, preview, task, options["checkpoint_every"])
        except (
            RequestError,
            ConfigError,
        ) as error:  # a share that so few steps cannot meet is the planner's ConfigError
            line.answer("refused", message=str(error))
        except Cancelled:
            line.answer("stopped" if line.wanted.get(task["id"]) == "stop" else "cancelled")
        except Exception as error:
            if is_out_of_memory(error):
                line.answer("refused", message=TOO_LARGE)
            else:
                traceback.print_exc()
                line.answer("failed", message=f"the engine failed ({type(error).__name__})")
        line.wanted.pop(task["id"], None)


def _make(line: Line, engine: Engine, preview: Preview, task: dict[str, Any], every: int) -> None:
    job = JobConfig(folder=task["state"], checkpoint_every=every)
    for event in go_on(engine, GenerateRequest(**task["request"]), job, anew=True):
        # A wish that came before the run began was lost to the engine.
        if task["id"] in line.wanted:
            _end(engine, line.wanted[task["id"]])
        if isinstance(event, Started):
            line.answer("started", **dataclasses.asdict(event))
        elif isinstance(event, StepDone):
            picture = preview.take()
            encoded = None if picture is None else base64.b64encode(webp(picture, _PREVIEW_SIDE, 60)).decode()
            line.answer("step", **dataclasses.asdict(event) | {"preview": encoded})
        elif isinstance(event, Decoding):
            line.answer("decoding", seconds=event.seconds)
        else:
            if line.wanted.get(task["id"]) == "cancel":
                raise Cancelled("cancelled while decoding")
            _write(line, engine, preview, event, task)


def _end(engine: Engine, verb: str) -> None:
    """Let the video being made end within a step; "stop" saves it first."""
    if verb == "cancel":
        engine.cancel()
    else:
        engine.save_and_stop()


def _write(line: Line, engine: Engine, preview: Preview, output: VideoOutput, task: dict[str, Any]) -> None:
    def wait(error: OSError) -> None:
        if task["id"] in line.wanted:
            raise Cancelled("ended while the disk was full") from error
        time.sleep(1.0)

    start = time.perf_counter()
    hsa = when_there_is_room(lambda: write_files(Path(task["folder"]), engine, output), wait)
    preview.learn(output.latents, output.frames)
    seconds = time.perf_counter() - start
    timing = {**output.seconds, "write": seconds, "total": output.seconds["total"] + seconds}
    line.answer("made", hsa=hsa, seconds=timing)


def _device(name: str, index: int) -> str:
    """The device of one of several workers: with "auto", each gets a GPU of its own as far as they go."""
    count = torch.cuda.device_count() if name == "auto" and torch.cuda.is_available() else 0
    return f"cuda:{index % count}" if count else name
