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
RADIUS = (9.0, 10.0)
TRAVEL = (28.0, 38.0)
"""Pixels from the first frame to the last of `FRAMES`."""
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


def random_scene(rng: random.Random, *, varied: bool = True, frames: int = FRAMES, size: int = SIZE) -> Scene:
    """Draw a scene; `varied` lets the caption use synonyms (training), else the canonical words (scoring).

    In fewer `frames` things go less far, at the same speed; in a smaller picture there is less room for a second one.
    """
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    direction = rng.choice(list(DIRECTIONS))
    subject = _subject(rng, colour, shape, rng.uniform(*RADIUS), direction, frames, size)
    second = _second_object(rng, subject, frames, size) if rng.random() < 0.4 else None
    objects = (subject,) if second is None else (subject, second)
    return Scene(
        caption=caption(subject, direction, second, rng if varied else None),
        direction=direction,
        objects=objects,
        background_seed=rng.getrandbits(31),
    )


def elsewhere(
    scene: Scene, rng: random.Random, count: int, *, same_way: bool, frames: int = FRAMES, size: int = SIZE
) -> list[Object]:
    """Up to `count` other subjects that the scene could have had: same looks, other place and speed.

    They are drawn as the scene's own was; `same_way` keeps the direction too, as its caption demands.
    """
    own, others = scene.objects[0], []
    for _ in range(count):
        direction = scene.direction if same_way else rng.choice(list(DIRECTIONS))
        others.append(_subject(rng, own.colour, own.shape, own.radius, direction, frames, size))
    return [other for other in others if _could_be(other, scene, frames, size)]


def nearby(
    scene: Scene, rng: random.Random, count: int, spread: float, *, frames: int = FRAMES, size: int = SIZE
) -> list[Object]:
    """Up to `count` other subjects near the scene's own, start and travel about `spread` pixels away.

    All of them, the scene's own too, are equally far from a centre that is drawn first, so that the set does not tell
    which one is the scene's own.
    """
    own, (sx, sy) = scene.objects[0], DIRECTIONS[scene.direction]
    travel = abs(own.dx + own.dy) * (FRAMES - 1)
    centre = [value + rng.gauss(0, spread) for value in (own.x, own.y, travel)]
    others = []
    for _ in range(count):
        x, y, far = (value + rng.gauss(0, spread) for value in centre)
        speed = far / (FRAMES - 1) if travel else 0.0
        others.append(dataclasses.replace(own, x=x, y=y, dx=sx * speed, dy=sy * speed))
    return [other for other in others if _could_be(other, scene, frames, size)]


def _could_be(subject: Object, scene: Scene, frames: int, size: int) -> bool:
    """Whether `random_scene` could have drawn this subject beside the scene's other objects."""
    travel, margin = abs(subject.dx + subject.dy) * (FRAMES - 1), subject.radius + 1.0
    ends = [v + s * f for v, s in ((subject.x, subject.dx), (subject.y, subject.dy)) for f in (0, frames - 1)]
    inside = margin <= min(ends) and max(ends) <= size - 1 - margin
    fast = not travel or TRAVEL[0] <= travel <= TRAVEL[1]
    return inside and fast and all(_clear(subject, thing, frames) for thing in scene.objects[1:])


def _subject(
    rng: random.Random, colour: str, shape: str, radius: float, direction: str, frames: int, size: int
) -> Object:
    """Place an object so that all its way lies in the picture."""
    sx, sy = DIRECTIONS[direction]
    speed = rng.uniform(*TRAVEL) / (FRAMES - 1)
    margin, travel = radius + 1.0, speed * (frames - 1)
    lo, hi = margin, size - 1 - margin
    x, y = (rng.uniform(lo + (travel if s < 0 else 0), hi - (travel if s > 0 else 0)) for s in (sx, sy))
    return Object(colour=colour, shape=shape, radius=radius, x=x, y=y, dx=sx * speed, dy=sy * speed)


def _second_object(rng: random.Random, subject: Object, frames: int, size: int) -> Object | None:
    """Place a still object clear of everything the subject sweeps over; None where no free place was found."""
    colour = rng.choice([name for name in COLOURS if name != subject.colour])
    shape, radius = rng.choice(SHAPES), rng.uniform(*RADIUS)
    for _ in range(30):
        x, y = (rng.uniform(radius + 1, size - 2 - radius) for _ in range(2))
        second = Object(colour=colour, shape=shape, radius=radius, x=x, y=y)
        if _clear(subject, second, frames):
            return second
    return None


def _clear(subject: Object, still: Object, frames: int) -> bool:
    """Whether a subject stays clear of a still object all its way."""
    last = frames - 1
    nearest = [
        min(max(at, min(start, start + speed * last)), max(start, start + speed * last))
        for at, start, speed in ((still.x, subject.x, subject.dx), (still.y, subject.y, subject.dy))
    ]
    return max(abs(still.x - nearest[0]), abs(still.y - nearest[1])) > subject.radius + still.radius + 2


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


def render_each(scene: Scene, subjects: list[Object], *, frames: int = FRAMES, size: int = SIZE) -> torch.Tensor:
    """Draw one scene with each of several subjects of one shape, radius and colour: [len(subjects), 3, F, S, S]."""
    rest = render([dataclasses.replace(scene, objects=scene.objects[1:])], frames=1, size=size)
    t = torch.arange(frames, dtype=torch.float32)
    x = torch.tensor([s.x for s in subjects])[:, None] + torch.tensor([s.dx for s in subjects])[:, None] * t
    y = torch.tensor([s.y for s in subjects])[:, None] + torch.tensor([s.dy for s in subjects])[:, None] * t
    axis = torch.arange(size, dtype=torch.float32)
    dx, dy = axis - x[..., None, None], axis[:, None] - y[..., None, None]
    cover = (0.5 - signed_distance(subjects[0].shape, dx, dy, subjects[0].radius)).clamp_(0, 1)[:, None]
    colour = torch.tensor(COLOURS[subjects[0].colour])[:, None, None, None] * 2 - 1
    return torch.lerp(rest, colour, cover)


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
