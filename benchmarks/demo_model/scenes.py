"""The synthetic scenes that the demo model is trained on: a caption and the clip that it describes.

A scene has a static, textured background of random colour, one object (colour x shape) that moves at constant speed or
stays still, and in two of five scenes a second object that stays still. Everything is drawn from signed distances with
soft edges, so that positions are continuous and nothing aliases.
"""

from __future__ import annotations

import dataclasses
import random

import torch

SIZE = 64
FRAMES = 17
FPS = 8
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
}
SHAPES = ("disc", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
RADIUS = (8.5, 10.5)
TRAVEL = (28.0, 38.0)
SYNONYMS = {
    "disc": ("disc", "disc", "disc", "circle", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
}
VERBS = ("moves", "moves", "moves", "slides", "goes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Object:
    """One drawn thing: colour and shape by name, radius and centre in pixels, velocity in pixels per frame."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float
    dx: float = 0.0
    dy: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A caption, the direction it names, and the objects; the first one is the caption's subject."""

    caption: str
    direction: str
    objects: tuple[Object, ...]
    background_seed: int


def caption(subject: Object, direction: str, second: Object | None, rng: random.Random | None = None) -> str:
    """Say what a scene shows; with `rng` in varied words, without it in the canonical ones."""
    pick = rng.choice if rng else (lambda words: words[0])
    to_the = "to the " if rng and direction in ("left", "right") and rng.random() < 0.2 else ""
    motion = "stays still" if direction == "still" else f"{pick(VERBS)} {to_the}{direction}"
    text = f"a {subject.colour} {pick(SYNONYMS[subject.shape])} {motion}"
    if second is not None:
        text += f", with a still {second.colour} {pick(SYNONYMS[second.shape])}"
    return text


def random_scene(rng: random.Random, *, varied: bool = True) -> Scene:
    """Draw a scene; `varied` lets the caption use synonyms (training), else the canonical words (scoring)."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    direction = rng.choice(list(DIRECTIONS))
    sx, sy = DIRECTIONS[direction]
    radius = rng.uniform(*RADIUS)
    travel = rng.uniform(*TRAVEL) if direction != "still" else 0.0
    margin = radius + 1.0
    lo, hi = margin, SIZE - 1 - margin

    def start(sign: int) -> float:
        return rng.uniform(lo + (travel if sign < 0 else 0), hi - (travel if sign > 0 else 0))

    x, y = start(sx), start(sy)
    speed = travel / (FRAMES - 1)
    subject = Object(colour=colour, shape=shape, radius=radius, x=x, y=y, dx=sx * speed, dy=sy * speed)
    second = None
    if rng.random() < 0.4:
        second = _second_object(rng, subject, travel, (sx, sy))
    objects = (subject,) if second is None else (subject, second)
    return Scene(
        caption=caption(subject, direction, second, rng if varied else None),
        direction=direction,
        objects=objects,
        background_seed=rng.getrandbits(31),
    )


def _second_object(rng: random.Random, subject: Object, travel: float, sign: tuple[int, int]) -> Object | None:
    """Place a still object clear of everything the subject sweeps over; None where no free place was found."""
    colour = rng.choice([name for name in COLOURS if name != subject.colour])
    shape, radius = rng.choice(SHAPES), rng.uniform(*RADIUS)
    for _ in range(30):
        x, y = (rng.uniform(radius + 1, SIZE - 2 - radius) for _ in range(2))
        along = min(max((x - subject.x) * sign[0] + (y - subject.y) * sign[1], 0.0), travel)
        nearest = (subject.x + sign[0] * along, subject.y + sign[1] * along)
        if max(abs(x - nearest[0]), abs(y - nearest[1])) > subject.radius + radius + 2:
            return Object(colour=colour, shape=shape, radius=radius, x=x, y=y)
    return None


def render(scenes: list[Scene], *, frames: int = FRAMES, size: int = SIZE) -> torch.Tensor:
    """Draw clips [B, 3, frames, size, size] float32 in [-1, 1]."""
    video = torch.stack([_background(scene.background_seed, size) for scene in scenes])
    video = video[:, :, None].repeat(1, 1, frames, 1, 1)
    for b, scene in enumerate(scenes):
        for thing in reversed(scene.objects):
            still = thing.dx == 0 and thing.dy == 0
            cover = _coverage(thing, 1 if still else frames, size)
            colour = torch.tensor(COLOURS[thing.colour])[:, None, None, None]
            video[b] = video[b] * (1 - cover) + colour * cover
    return video * 2 - 1


def swept(scenes: list[Scene], *, frames: int = FRAMES, size: int = SIZE, cell: int = 4) -> torch.Tensor:
    """Where the subjects ever are: float [B, size / cell, size / cell], 1 for cells that one touches in any frame."""
    covers = [_coverage(scene.objects[0], frames, size).amax(1) for scene in scenes]
    return (torch.nn.functional.max_pool2d(torch.stack(covers), cell)[:, 0] > 0.1).float()


def _background(seed: int, size: int) -> torch.Tensor:
    """A muted base colour, a slope and three plane waves: [3, size, size] in [0, 1]."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(*shape, generator=g) * (high - low) + low

    grey = uniform(1, low=0.25, high=0.75)
    base = (grey + uniform(3, low=-0.12, high=0.12))[:, None, None]
    axis = torch.linspace(-1, 1, size)
    yy, xx = axis[:, None], axis[None, :]
    slope = uniform(2, low=-0.12, high=0.12)
    texture = slope[0] * xx + slope[1] * yy
    for _ in range(3):
        angle, cycles, phase, amplitude = (
            uniform(1, low=a, high=b) for a, b in ((0, 3.1416), (1, 4), (0, 6.2832), (0.01, 0.05))
        )
        texture = texture + amplitude * torch.sin(3.1416 * cycles * (xx * angle.cos() + yy * angle.sin()) + phase)
    tint = 1 + uniform(3, low=-0.3, high=0.3)[:, None, None]
    return (base + texture[None] * tint).clamp(0.02, 0.98)


def _coverage(thing: Object, frames: int, size: int) -> torch.Tensor:
    """How much of every pixel the object covers: [1, frames, size, size] in [0, 1], edges about one pixel wide."""
    t = torch.arange(frames, dtype=torch.float32)[:, None, None]
    axis = torch.arange(size, dtype=torch.float32)
    x = axis[None, None, :] - (thing.x + thing.dx * t)
    y = axis[None, :, None] - (thing.y + thing.dy * t)
    return (0.5 - signed_distance(thing.shape, x, y, thing.radius)).clamp(0, 1)[None]


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Distance in pixels to the outline, negative inside; the three shapes have about the same area."""
    if shape == "disc":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        half = radius * 0.886
        return torch.maximum(x.abs(), y.abs()) - half
    # Equilateral, point up: three half-planes at the inradius.
    inner = radius * 0.777
    sides = torch.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y)
    return torch.maximum(sides, y.expand_as(sides)) - inner
