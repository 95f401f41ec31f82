"""What a model folder says about itself, read from its JSON files without loading a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError

DEMO_MODEL = Path(__file__).parent / "demo_model"
SUPPORTED_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
IMAGE_PIPELINE = "WanImageToVideoPipeline"
TEXT_PIPELINE = "WanPipeline"
# What the pipelines' check_inputs ask for, whatever the model's own patch is.
_PIPELINE_STEP = 16


class Defaults(NamedTuple):
    """What a request gets for everything that it leaves out."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None


# The values that the models' makers publish; for small models, those of the demo model.
DEFAULTS: Mapping[str, Defaults] = {
    "Wan small": Defaults(64, 64, 17, 8, 40, 1.5),
    "Wan 1.3B": Defaults(832, 480, 81, 16, 50, 5.0),
    "Wan 14B": Defaults(832, 480, 81, 16, 50, 5.0),
    "Wan 1.3B I2V": Defaults(832, 480, 81, 16, 40, 5.0),
    "Wan 14B I2V": Defaults(832, 480, 81, 16, 40, 5.0),
    "Wan 2.2 A14B": Defaults(1280, 720, 81, 16, 40, 4.0, 3.0),
    "Wan 2.2 A14B I2V": Defaults(1280, 720, 81, 16, 40, 3.5, 3.5),
    "Wan 2.2 TI2V 5B": Defaults(1280, 704, 121, 24, 50, 5.0),
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of a model.

    Attributes:
        name: what the user called it.
        location: local folder, or hub id.
        pipeline: class name of the diffusers pipeline.
        family: key of `DEFAULTS`.
        experts: number of transformers (2 for Wan 2.2 A14B).
        num_layers: L, transformer blocks.
        num_heads: H, attention heads.
        head_dim: D, channels of a head.
        patch: latent pixels of a token, (frames, rows, columns).
        vae_temporal: video frames for a latent frame (after the first).
        vae_spatial: pixels for a latent row or column.
        rope_max: greatest number of tokens along one axis.
        image: whether a video starts from an image: `"none"`, `"optional"` or `"required"`.
        sees_image: whether the transformer also attends to an image encoder's view of the image (Wan 2.1).
    """

    name: str
    location: str
    pipeline: str
    family: str
    experts: int
    num_layers: int
    num_heads: int
    head_dim: int
    patch: tuple[int, int, int]
    vae_temporal: int
    vae_spatial: int
    rope_max: int
    image: str = "none"
    sees_image: bool = False

    def pipeline_for(self, image: bool) -> str:
        """Class name of the diffusers pipeline that makes a video with or without an image to start from."""
        if self.image == "optional":
            return IMAGE_PIPELINE if image else TEXT_PIPELINE
        return self.pipeline

    @property
    def defaults(self) -> Defaults:
        """The request defaults of this family."""
        return DEFAULTS[self.family]

    @property
    def size_step(self) -> tuple[int, int]:
        """Width and height, in pixels, are multiples of these."""
        rows, columns = self.patch[1:]
        return math.lcm(_PIPELINE_STEP, self.vae_spatial * columns), math.lcm(_PIPELINE_STEP, self.vae_spatial * rows)

    @property
    def frame_step(self) -> int:
        """Valid numbers of frames are multiples of this, plus one."""
        return self.vae_temporal * self.patch[0]

    def grid(self, width: int, height: int, num_frames: int) -> tuple[int, int, int]:
        """Number of tokens along (frames, rows, columns) for a valid size in pixels."""
        latent_frames = (num_frames - 1) // self.vae_temporal + 1
        return (
            latent_frames // self.patch[0],
            height // (self.vae_spatial * self.patch[1]),
            width // (self.vae_spatial * self.patch[2]),
        )

    def cache_bytes(self, num_tokens: int, element_bytes: int = 2) -> int:
        """Bytes of the K and V rows of all layers, one guidance branch: 2 N H D L, times the element size."""
        return 2 * num_tokens * self.num_heads * self.head_dim * self.num_layers * element_bytes


def read_facts(model: str) -> ModelFacts:
    """Read a model's sizes.

    Args:
        model: `"demo"`, a local folder in diffusers format, or a hub id such as
            `"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"` (whose small JSON files are then fetched, unless they are in
            the local hub cache).

    Raises:
        ConfigError: nothing readable is there, or it is not a model that heterostep runs.
    """
    location = locate(model)
    index = _read_json(model, location, "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in SUPPORTED_PIPELINES:
        raise ConfigError(
            f"model {model!r} is a {pipeline or 'folder without a pipeline class'}, "
            f"but heterostep runs {' and '.join(SUPPORTED_PIPELINES)} models"
        )
    transformer = _read_json(model, location, "transformer/config.json")
    vae = _read_json(model, location, "vae/config.json")
    try:
        experts = 2 if (index.get("transformer_2") or [None, None])[1] else 1
        per_token = bool(index.get("expand_timesteps"))
        image = "optional" if per_token else "required" if pipeline == IMAGE_PIPELINE else "none"
        heads, head_dim = int(transformer["num_attention_heads"]), int(transformer["attention_head_dim"])
        frames, rows, columns = (int(n) for n in transformer["patch_size"])
        facts = ModelFacts(
            name=model,
            location=location,
            pipeline=pipeline,
            family=_family(heads * head_dim, experts, per_token, image == "required"),
            experts=experts,
            num_layers=int(transformer["num_layers"]),
            num_heads=heads,
            head_dim=head_dim,
            patch=(frames, rows, columns),
            vae_temporal=int(vae.get("scale_factor_temporal", 4)),
            vae_spatial=int(vae.get("scale_factor_spatial", 8)),
            rope_max=int(transformer.get("rope_max_seq_len", 1024)),
            image=image,
            sees_image=image == "required" and transformer.get("image_dim") is not None,
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"model {model!r}: its transformer or VAE config lacks or misstates {error}") from error
    sizes = {
        "num_layers": facts.num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "patch_size": min(facts.patch),
        "scale_factor_temporal": facts.vae_temporal,
        "scale_factor_spatial": facts.vae_spatial,
        "rope_max_seq_len": facts.rope_max,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model {model!r}: its config says {name} {size}, but sizes are at least 1")
    _check_channels(facts, transformer.get("in_channels"), vae.get("z_dim", 16))
    return facts


def _check_channels(facts: ModelFacts, taken: Any, latent: Any) -> None:
    """Refuse the transformer of another pipeline: it would fail at its first step."""
    # Beside the noisy latents the image's, and a mask with a channel for each frame of a latent frame.
    given = latent if facts.image != "required" else 2 * latent + facts.vae_temporal
    if taken is not None and taken != given:
        raise ConfigError(
            f"model {facts.name!r}: its transformer takes {taken} channels, but {facts.pipeline} gives it {given}; "
            "one of the two belongs to another model"
        )


def _family(width: int, experts: int, per_token_timesteps: bool, from_image: bool) -> str:
    if width < 1024:
        return "Wan small"
    if per_token_timesteps:
        return "Wan 2.2 TI2V 5B"
    name = "Wan 2.2 A14B" if experts == 2 else "Wan 1.3B" if width < 4096 else "Wan 14B"
    return f"{name} I2V" if from_image else name


def locate(model: str) -> str:
    """Turn a model's name into a local folder or a hub id; ConfigError if it can be neither."""
    if model == "demo":
        if not (DEMO_MODEL / "model_index.json").is_file():
            raise ConfigError("the demo model is not part of this installation; name a model folder instead")
        return str(DEMO_MODEL)
    try:
        folder = Path(model).expanduser()
        found, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long; the home of nobody
        raise ConfigError(f"model {model[:80]!r} is no usable name of a folder ({first_line(error)})") from error
    if is_folder:
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"model folder {model!r} has no model_index.json, so it is not a diffusers pipeline")
        return str(folder)
    # A hub id is "owner/name"; everything else can only have been meant as a path.
    if found or model.count("/") != 1 or model[0] in "./~" or model.endswith("/"):
        raise ConfigError(f"model {model!r} is neither 'demo', nor an existing folder, nor a hub id (owner/name)")
    return model


def _read_json(model: str, location: str, name: str) -> dict[str, Any]:
    path = Path(location, name) if Path(location).is_dir() else _fetch(model, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"model {model!r} has no {name}, so it is not complete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model {model!r}: {name} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model {model!r}: {name} does not hold a JSON object")
    return content


def _fetch(model: str, name: str) -> Path:
    """Path of one small file of a hub model, from the local hub cache or the network."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, name))
    except Exception as error:  # the hub client raises some twenty types of several libraries
        raise ConfigError(
            f"model {model!r} is no local folder and cannot be had from the hub ({type(error).__name__}); "
            "check the name and the network, or name a local folder"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters, for use inside one sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
