"""The folder of a benchmark: its settings, a line for each result, dense frames, and videos."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...engine.facts import ModelFacts, read_scheduler
from ...engine.media.files import replacing, write_json
from ...engine.request import VideoOutput
from ...errors import ConfigError
from ..baselines.solvers import scheduler_like

_MARK = ".made-by-bench-quality"
"""File in the folder of links to a model: what has it may be removed."""


class Store:
    """What is kept in the folder, so that the same command continues where it was.

    Attributes:
        folder: of the benchmark.
        results: one for each clip, method and compute; the last written one counts.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Read what is in the folder, if there is one.

        Raises:
            ConfigError: it cannot be used, or holds results that other settings gave.
        """
        self.folder = folder
        self._lines, self._settings = folder / "results.jsonl", folder / "settings.json"
        try:
            kept = json.loads(self._settings.read_text()) if self._settings.exists() else None
            text = self._lines.read_text() if self._lines.exists() else ""
        except (OSError, ValueError) as error:
            raise ConfigError(f"--output {folder}: the folder cannot be used ({error})") from error
        self._identity = identity = json.loads(json.dumps(identity))
        if kept is not None and kept != identity:
            names = [name for name in identity if kept.get(name) != identity[name]]
            said = "; ".join(f"{name} {kept.get(name)!r} there, {identity[name]!r} now" for name in names)
            raise ConfigError(f"--output {folder} holds a benchmark with other settings ({said}); name another folder")
        self.results: dict[tuple[str, str, float], dict[str, Any]] = {}
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                result = json.loads(line)
            except ValueError:  # the last one may be torn
                continue
            self._take(result)

    def prepare(self) -> None:
        """Create the folder, and write the settings down.

        Raises:
            ConfigError: it cannot be created.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, self._identity)
            if self._torn:  # or the next result would become part of that line
                with self._lines.open("a") as file:
                    file.write("\n")
        except OSError as error:
            raise ConfigError(f"--output {self.folder}: the folder cannot be used ({error})") from error

    def _take(self, result: dict[str, Any]) -> None:
        self.results[result["clip"], result["method"], result["target"]] = result

    def check_prompt(self, clip: str, fields: Mapping[str, Any]) -> None:
        """Refuse a prompt whose name another one has here.

        Raises:
            ConfigError: the clip's results are of another prompt.
        """
        for (name, _, _), result in self.results.items():
            if name == clip and result["fields"] != dict(fields):
                raise ConfigError(
                    f"--output {self.folder} holds videos of other prompts (number {clip} was {result['fields']}, now "
                    f"it is {dict(fields)}); name another folder"
                )

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result."""
        with self._lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(result)

    def video(self, clip: str, method: str, target: float) -> Path:
        """Path of a video."""
        return self.folder / "videos" / f"{clip}-{method}-{target:g}.mp4"

    def keep_dense(self, clip: str, output: VideoOutput) -> None:
        """Keep what others are compared with."""
        path = self._dense(clip)
        path.parent.mkdir(exist_ok=True)
        tensors = {"frames": torch.from_numpy(output.frames).contiguous(), "latents": output.latents.contiguous()}
        if output.audio_latents is not None:
            tensors["audio_latents"] = output.audio_latents.contiguous()
        with replacing(path) as torn:
            save_file(tensors, torn)

    def dense(self, clip: str) -> dict[str, torch.Tensor] | None:
        """Frames, latents and sound of a dense video; None if it must be made."""
        path = self._dense(clip)
        return load_file(path) if path.exists() else None

    def _dense(self, clip: str) -> Path:
        return self.folder / "dense" / f"{clip}.safetensors"

    def remembered(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the folder; empty without one."""
        path = self.folder / f"{name}.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def remember(self, name: str, content: Mapping[str, Any]) -> None:
        """Write such a file."""
        write_json(self.folder / f"{name}.json", content)


def with_scheduler(facts: ModelFacts, folder: Path, solver: str | None, shift: float | None) -> str:
    """Name a model that differs from another in its scheduler alone.

    Args:
        facts: of the model.
        folder: where the model's folder can be laid: links to the files of the original.
        solver: "euler" or "unipc"; None keeps the class.
        shift: of the noise levels; None keeps it.

    Returns:
        What to load: the model itself where nothing differs.

    Raises:
        ConfigError: the model is not in a folder, its shift depends on the size of the video, or something else is
            where its folder can be laid.
    """
    if solver is None and shift is None:
        return facts.name
    import diffusers

    name, config = read_scheduler(facts)
    if shift is not None and config.get("use_dynamic_shifting"):
        raise ConfigError(
            f"--shift {shift:g}: the noise levels of {facts.name!r} depend on the size of the video; leave it out"
        )
    location = Path(facts.location)
    if not location.is_dir():
        raise ConfigError(
            f"--scheduler and --shift need the model in a folder, but {facts.name!r} is a name on the Hugging Face "
            f"Hub: download it (hf download {facts.name} --local-dir FOLDER) and give --model FOLDER"
        )
    stock = getattr(diffusers, name).from_config(config)
    if solver is None:
        solver = "euler" if name == "FlowMatchEulerDiscreteScheduler" else "unipc"
    made = scheduler_like(stock, solver, shift=shift)
    mark = folder / _MARK
    if folder.exists() and not mark.exists():  # it may be the user's own model
        raise ConfigError(
            f"{folder} exists and was not made by this command, which needs that name for links to the model; name "
            "another folder with --output"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.touch()
    for part in location.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            (folder / part.name).symlink_to(part.resolve(), target_is_directory=part.is_dir())
    made.save_pretrained(folder / "scheduler")
    index = json.loads((location / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(made).__name__]
    write_json(folder / "model_index.json", index)
    return str(folder)
