"""Save and resume a training run: weights, optimizer moments and progress, in safetensors and JSON."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file

Modules = dict[str, torch.nn.Module]


def save(out: pathlib.Path, modules: Modules, optimizers: list[torch.optim.Optimizer], progress: dict) -> None:
    """Write a new state folder, point progress.json at it, then drop the older ones."""
    folder = out / f"state-{progress['step']:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        save_file(
            {k: v.contiguous().clone() for k, v in module.state_dict().items()},
            folder / f"{name}.safetensors",
        )
    moments = {
        f"{i}.{index}.{field}": torch.as_tensor(value).contiguous()
        for i, optimizer in enumerate(optimizers)
        for index, fields in optimizer.state_dict()["state"].items()
        for field, value in fields.items()
        if value is not None
    }
    save_file(moments, folder / "optimizers.safetensors")
    temporary = out / "progress.json.tmp"
    temporary.write_text(json.dumps(progress | {"folder": folder.name}))
    os.replace(temporary, out / "progress.json")
    for old in out.glob("state-*"):
        if old != folder:
            shutil.rmtree(old)


def load(out: pathlib.Path, modules: Modules, optimizers: list[torch.optim.Optimizer]) -> dict | None:
    """Bring a run back from its folder and return its progress; None where there is nothing to resume."""
    if not (out / "progress.json").exists():
        return None
    progress = json.loads((out / "progress.json").read_text())
    folder = out / progress["folder"]
    for name, module in modules.items():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    entries: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(folder / "optimizers.safetensors").items():
        owner, index, field = key.split(".")
        entries[int(owner)].setdefault(int(index), {})[field] = value
    for optimizer, state in zip(optimizers, entries, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress
