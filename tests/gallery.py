"""Videos that nobody makes, in the job store of a running service: finished, running and waiting, of every shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from heterostep.engine.facts import read_facts
from heterostep.engine.media.video import overlay_frames, write_mp4
from heterostep.engine.request import GenerateRequest, resolve
from heterostep.launch.service.database import Lease
from heterostep.launch.service.store import JobStore

# The service makes videos of its own model only, so these wait as long as a test likes.
MODEL = "nobody's"
SHAPES = ((64, 64), (112, 64), (48, 80), (64, 64))
COLOURS = ((200, 60, 50), (60, 120, 220), (230, 190, 60), (90, 180, 100), (190, 90, 180))
FRAMES, STEPS = 5, 12


class Gallery:
    """One owner's videos, beside whatever the service does; they are gone after `close`.

    Attributes:
        finished: ids, newest first; all are completed but one that failed.
        running: the id of the one that is being made.
        waiting: ids, the next one first.
        prompts: by id.
    """

    def __init__(self, data_dir: Path, owner: str, *, finished: int, waiting: int):
        self._store, self._lease = JobStore(data_dir / "jobs.sqlite3"), Lease(data_dir / "leases")
        self._owner, self._results = owner, data_dir / "results"
        self.prompts: dict[str, str] = {}
        self.finished = [self._finish(number) for number in range(finished)][::-1]
        self.running = self._add("a blue square rests over a slowly turning field", (64, 64))
        job = self._store.claim(self._lease.name, MODEL)
        columns = {"step": 5, "progress": 38, "stage": "denoising", "eta_seconds": 4.2}
        self._store.progress(job, **columns, hsa={"steps": [1, 0, 0.5, 1, 0.25]})
        self.waiting = [self._add(f"the video that waits at place {place}", (112, 64)) for place in range(waiting)]

    def close(self) -> None:
        self._store.finish(self._store.get(self.running, self._owner), "completed")
        for id in (*self.waiting, self.running, *self.finished):
            self._store.delete(id, self._owner)
            self._store.remove(id)
        self._store.close()
        self._lease.release()

    def _add(self, prompt: str, size: tuple[int, int]) -> str:
        asked = GenerateRequest(
            prompt=prompt,
            width=size[0],
            height=size[1],
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            fps=4,
            seed=3,
            compute=0.5,
        )
        request = resolve(asked, read_facts("demo"))
        id = f"video_{len(self.prompts) + 1:032x}"
        self.prompts[id] = prompt
        self._store.create(id=id, owner=self._owner, model=MODEL, request=request, max_queue=1000)
        return id

    def _finish(self, number: int) -> str:
        size = SHAPES[number % len(SHAPES)]
        id = self._add(f"disc number {number} goes from edge to edge, and the whole of it is to be seen", size)
        job = self._store.claim(self._lease.name, MODEL)
        if number == 1:
            self._store.finish(job, "failed", error={"code": "error", "message": "the model ran out of memory"})
            return id
        evaluations = np.add.outer(np.arange(3), np.add.outer(np.arange(size[1] // 8), np.arange(size[0] // 8)))
        _write(self._results / id, _frames(size, COLOURS[number % len(COLOURS)]), evaluations)
        extremes = {"min": int(evaluations.min()), "max": int(evaluations.max())}
        steps = [1, *(round(0.9 - step / STEPS, 2) for step in range(STEPS - 1))]
        self._store.finish(
            job,
            "completed",
            progress=100,
            hsa={"compute": 0.5, "achieved": 0.5, "policy": "tokens", "evaluations": extremes, "steps": steps},
            timing={"total": 2.8, "denoise": 2.3, "decode": 0.3, "queued": 0.1},
        )
        return id


def _frames(size: tuple[int, int], colour: tuple[int, int, int]) -> np.ndarray:
    """A disc that touches the edges, which a cut picture would lose."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    radius = min(size) / 3
    frames = np.empty((FRAMES, height, width, 3), np.uint8)
    for k, place in enumerate(np.linspace(0, 1, FRAMES)):
        centre = radius + place * (width - 2 * radius), radius + place * (height - 2 * radius)
        inside = np.hypot(x - centre[0], y - centre[1]) < radius
        background = np.stack([40 + x * 60 // width, 60 + y * 60 // height, 90 + 0 * x], -1)
        frames[k] = np.where(inside[..., None], colour, background)
    return frames


def _write(folder: Path, frames: np.ndarray, evaluations: np.ndarray) -> None:
    folder.mkdir()
    write_mp4(folder / "video.mp4", frames, 4)
    write_mp4(folder / "heatmap.mp4", overlay_frames(frames, evaluations), 4, scale=4)
    Image.fromarray(frames[-1]).save(folder / "thumbnail.webp", quality=90)
    (folder / "report.json").write_text(json.dumps({}))
