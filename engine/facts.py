"""What a model folder says about itself, read from its JSON files without loading a weight."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .defaults import DEFAULTS, Defaults, negative_prompt

Files = Callable[[str], Mapping[str, Any]]
DEMO_MODEL = Path(__file__).parent / "demo_model"
_IMAGE_PIPELINES = {"WanPipeline": "WanImageToVideoPipeline", "LTX2Pipeline": "LTX2ImageToVideoPipeline"}
SUPPORTED_PIPELINES = (*_IMAGE_PIPELINES, *_IMAGE_PIPELINES.values(), "WanVACEPipeline")
# Classes of the transformer and the VAE of a pipeline's family.
_WAN_PARTS = ("WanTransformer3DModel", "AutoencoderKLWan")
_VACE_PARTS = ("WanVACETransformer3DModel", "AutoencoderKLWan")
_LTX2_PARTS = ("LTX2VideoTransformer3DModel", "AutoencoderKLLTX2Video")


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
        longest_seconds: how long its positions let one video be, where they are times; else 0.
        image: whether a video starts from an image: `"none"`, `"optional"` or `"required"`.
        last_image: likewise, whether it ends with another one.
        video: what is done with a video that is given: `"none"`, `"changed"`, or `"followed"` (VACE).
        sees_image: whether the transformer also attends to an image encoder's view of the image (Wan 2.1).
        image_crf: how much the pipeline compresses the image before it is encoded; None: not at all.
        pipeline_step: what the pipeline wants width and height to be multiples of, whatever the model's own patch is.
        audio_heads: attention heads with which sound looks at the video; 0 without sound.
        audio_head_dim: channels of such a head.
        audio_rate: latents of sound per second; 0 without sound.
        boundary_ratio: share of the training timesteps below which the second expert begins; None with one expert.
        guidance: beside that by the prompt; None: there is no other.
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
    last_image: str = "none"
    video: str = "none"
    sees_image: bool = False
    image_crf: int | None = None
    pipeline_step: int = 16
    longest_seconds: float = 0.0
    audio_heads: int = 0
    audio_head_dim: int = 0
    audio_rate: float = 0.0
    boundary_ratio: float | None = None
    guidance: Guidance | None = None

    @property
    def shared_heads(self) -> int:
        """Heads that ulysses ranks can share: their degree divides this."""
        return math.gcd(self.num_heads, self.audio_heads)

    def guidance_for(self, scale: float) -> Guidance | None:
        """Guidance of a request with this guidance scale."""
        return self.guidance if self.guidance is None or scale > 1.0 else self.guidance.off

    def passes(self, scale: float) -> int:
        """Guidance units, evaluations of the video at each dense step, of a request with this guidance scale."""
        guidance = self.guidance_for(scale)
        return (2 if scale > 1.0 else 1) + (guidance.passes if guidance is not None else 0)

    def pipeline_for(self, image: bool, last_image: bool = False, video: bool = False) -> str:
        """Class name of the diffusers pipeline for what a video is made from."""
        if last_image and self.audio_heads:
            return "LTX2ConditionPipeline"
        if video and self.video == "changed":
            return "WanVideoToVideoPipeline"
        if self.image == "optional":
            text = next(name for name, twin in _IMAGE_PIPELINES.items() if self.pipeline in (name, twin))
            return _IMAGE_PIPELINES[text] if image else text
        return self.pipeline

    @property
    def defaults(self) -> Defaults:
        """The request defaults of this family."""
        return DEFAULTS[self.family]._replace(negative_prompt=negative_prompt(self.family))

    @property
    def takes_shift(self) -> bool:
        """Whether a request may shift the noise levels; LTX-2's follow from the video's size."""
        return self.pipeline.startswith("Wan")

    @property
    def size_step(self) -> tuple[int, int]:
        """Width and height, in pixels, are multiples of these."""
        rows, columns = (self.vae_spatial * n for n in self.patch[1:])
        return math.lcm(self.pipeline_step, columns), math.lcm(self.pipeline_step, rows)

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
        """Bytes of the K and V rows of all layers, one guidance unit: 2 N d L, times the element size.

        d is H D, and with sound the width of the keys that sound looks at too.
        """
        width = self.num_heads * self.head_dim + self.audio_heads * self.audio_head_dim
        return 2 * num_tokens * width * self.num_layers * element_bytes


def read_facts(model: str, files: Files | None = None) -> ModelFacts:
    """Read a model's sizes.

    Args:
        model: `"demo"`, a local folder in diffusers format, or a hub id (its JSON files are fetched if needed).
        files: reads a JSON file of the model, for sizes only: whether diffusers can run the model is not checked.

    Raises:
        ConfigError: nothing readable is there, or it is not a model that heterostep runs.
    """
    location = model if files else locate(model)
    read = files or partial(read_json, model, location)
    index = read("model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in SUPPORTED_PIPELINES:
        raise ConfigError(
            f"model {model!r} is a {pipeline or 'folder without a pipeline class'}, "
            f"but heterostep runs {' and '.join(SUPPORTED_PIPELINES)} models"
        )
    parts = ("transformer", "vae", *(("audio_vae", "text_encoder") if pipeline.startswith("LTX2") else ()))
    transformer, vae, *others = (read(f"{part}/config.json") for part in parts)
    if files is None:
        _check_variant(model, pipeline, transformer, vae)
    try:
        sizes = ltx2_facts(transformer, vae, *others) if others else _wan_facts(pipeline, index, transformer, vae)
        facts = ModelFacts(name=model, location=location, pipeline=pipeline, **sizes)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model {model!r}: a value in its transformer or VAE config is missing or invalid ({error})"
        ) from error
    least = {
        "num_layers": facts.num_layers,
        "num_attention_heads": facts.num_heads,
        "attention_head_dim": facts.head_dim,
        "patch_size": min(facts.patch),
        "scale_factor_temporal": facts.vae_temporal,
        "scale_factor_spatial": facts.vae_spatial,
        "rope_max_seq_len": facts.rope_max,
    } | ({"audio_num_attention_heads": facts.audio_heads} if others else {})
    for name, size in least.items():
        if size < 1:
            raise ConfigError(f"model {model!r}: its config sets {name} to {size}, but it must be at least 1")
    _check_channels(facts, transformer.get("in_channels"), vae.get("latent_channels" if others else "z_dim"))
    return facts


def _wan_facts(
    pipeline: str, index: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of `ModelFacts` of Wan's models."""
    experts = 2 if (index.get("transformer_2") or [None, None])[1] else 1
    per_token = bool(index.get("expand_timesteps"))
    from_image = pipeline in _IMAGE_PIPELINES.values() and not per_token
    sees_image = from_image and transformer.get("image_dim") is not None
    both = transformer.get("pos_embed_seq_len") is not None
    vace = pipeline == "WanVACEPipeline"
    # The pipeline that changes a video has one expert, and knows the VAE's scale by its halvings of time alone.
    scales = int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))
    halvings = vae.get("temperal_downsample", (False, True, True))
    changes = pipeline == "WanPipeline" and experts == 1 and not per_token
    changes = changes and scales == (2 ** sum(halvings), 2 ** len(halvings))
    heads, head_dim = int(transformer["num_attention_heads"]), int(transformer["attention_head_dim"])
    frames, rows, columns = (int(n) for n in transformer["patch_size"])
    return {
        "family": _family(heads * head_dim, experts, per_token, from_image),
        "experts": experts,
        "num_layers": int(transformer["num_layers"]) + (len(transformer["vace_layers"]) if vace else 0),
        "num_heads": heads,
        "head_dim": head_dim,
        "patch": (frames, rows, columns),
        "vae_temporal": scales[0],
        "vae_spatial": scales[1],
        "rope_max": int(transformer.get("rope_max_seq_len", 1024)),
        "boundary_ratio": None if index.get("boundary_ratio") is None else float(index["boundary_ratio"]),
        "image": "optional" if per_token else "required" if from_image else "none",
        "last_image": "none" if not from_image else "required" if both else "none" if sees_image else "optional",
        "video": "followed" if vace else "changed" if changes else "none",
        "sees_image": sees_image,
    }


def _check_variant(model: str, pipeline: str, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse a variant of a supported pipeline: it would fail after loading, or its videos would be wrong."""
    vace = pipeline == "WanVACEPipeline"
    wanted = _VACE_PARTS if vace else _WAN_PARTS if pipeline.startswith("Wan") else _LTX2_PARTS
    for name, config, kind in zip(("transformer", "vae"), (transformer, vae), wanted, strict=True):
        found = config.get("_class_name", kind)
        if found != kind:
            raise ConfigError(f"model {model!r}: its {name} is a {found}, but heterostep needs {kind} for {pipeline}")
    known = _settings(wanted[0])
    # One that is off asks for nothing: newer versions of diffusers write down all that they have.
    unknown = [f"{key}={value!r:.40}" for key, value in transformer.items() if value and key not in known]
    unknown = [setting for setting in unknown if not setting.startswith("_")]
    if unknown:
        raise ConfigError(
            f"model {model!r}: its transformer sets {', '.join(sorted(unknown)[:3])}, which {wanted[0]} does not "
            "support, so its videos would be wrong; use a model without this setting"
        )


def _settings(kind: str) -> frozenset[str]:
    """Settings of a class of diffusers."""
    import diffusers  # takes seconds, and only models need it

    return frozenset(inspect.signature(getattr(diffusers, kind).__init__).parameters)


def _check_channels(facts: ModelFacts, taken: Any, latent: Any) -> None:
    """Refuse the transformer of another pipeline: it would fail at its first step."""
    latent = 16 if latent is None and not facts.audio_heads else latent
    if latent is None:
        return
    # Beside the noisy latents the image's, and a mask with a channel for each frame of a latent frame.
    given = latent if facts.image != "required" else 2 * latent + facts.vae_temporal
    if taken is not None and taken != given:
        raise ConfigError(
            f"model {facts.name!r}: its transformer takes {taken} channels, but {facts.pipeline} passes {given}; "
            "the transformer or the VAE belongs to another model"
        )


def _family(width: int, experts: int, per_token_timesteps: bool, from_image: bool) -> str:
    if width < 1024:
        return "Wan small"
    if per_token_timesteps:
        return "Wan 2.2 TI2V 5B"
    name = "Wan 2.2 A14B" if experts == 2 else "Wan 1.3B" if width < 4096 else "Wan 14B"
    return f"{name} I2V" if from_image else name


def read_scheduler(facts: ModelFacts) -> tuple[str, dict[str, Any]]:
    """Class name and config of a model's scheduler.

    Raises:
        ConfigError: one of them is missing or cannot be read.
    """
    entry = read_json(facts.name, facts.location, "model_index.json").get("scheduler")
    config = read_json(facts.name, facts.location, "scheduler/scheduler_config.json")
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise ConfigError(f"model {facts.name!r} names no scheduler in its model_index.json, so it cannot make a video")
    return entry[1], config


def locate(model: str) -> str:
    """Turn a model's name into a local folder or a hub id; ConfigError if it can be neither."""
    if model == "demo":
        if not (DEMO_MODEL / "model_index.json").is_file():
            raise ConfigError("the demo model is not part of this installation; name a model folder instead")
        return str(DEMO_MODEL)
    try:
        folder = Path(model).expanduser()
        found, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long; the home of an unknown user
        raise ConfigError(f"model {model[:80]!r} cannot be used as a folder name ({first_line(error)})") from error
    if is_folder:
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"model folder {model!r} has no model_index.json, so it is not a diffusers pipeline")
        return str(folder)
    # A hub id is "owner/name"; everything else can only have been meant as a path.
    if found or model.count("/") != 1 or model[0] in "./~" or model.endswith("/"):
        raise ConfigError(f"model {model!r} is neither 'demo', nor an existing folder, nor a hub id (owner/name)")
    return model


def read_json(model: str, location: str, name: str) -> dict[str, Any]:
    """One JSON file of the model that `locate` found; ConfigError if it is missing or damaged."""
    path = Path(location, name) if Path(location).is_dir() else _fetch(model, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"model {model!r} has no {name}, so it is incomplete") from error
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
            f"model {model!r} is not a local folder and could not be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}); check the name and the network, or name a local folder"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters, for use inside one sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


_SMALL = 1024
_MEL_COMPRESSION = 4
"""Spectrogram frames of a latent one: the same in all of diffusers' audio VAEs."""
_UNBOUNDED = 1 << 30
_BLOCKS = (4, 6, 6, 2, 2)
"""Layers of diffusers' video VAE where its config does not say them."""


class Guidance(NamedTuple):
    """Guidance of models that have more of it than by the prompt.

    Attributes:
        audio_scale: of sound by the prompt; 0: as of the video.
        perturbed: of a pass in which a layer's tokens do not look at each other; 0 is off.
        block: that layer.
        isolated: of a pass in which video and sound do not notice each other; 1 is off.
        rescale: how much the guided result is brought back to the spread of the unguided one.
        cross_timestep: whether each of video and sound sees the other's noise level.
    """

    audio_scale: float
    perturbed: float
    block: int
    isolated: float
    rescale: float
    cross_timestep: bool

    @property
    def passes(self) -> int:
        """Evaluations of each step beside those by the prompt."""
        return int(self.perturbed > 0.0) + int(self.isolated > 1.0)

    @property
    def off(self) -> Guidance:
        """The same model without guidance."""
        return self._replace(audio_scale=0.0, perturbed=0.0, isolated=1.0, rescale=0.0)


# What the models' makers publish. The first version has no layers that could be perturbed.
_GUIDANCE = {
    "2.0": Guidance(0.0, 0.0, 0, 1.0, 0.0, False),
    "2.3": Guidance(7.0, 1.0, 28, 3.0, 0.7, True),
    "2.5": Guidance(7.0, 1.0, 28, 3.0, 0.7, True),
}
# Their images were compressed like frames of a video, by as much as this in H.264.
_IMAGE_CRF, _IMAGE_CRF_GEMMA_4 = 33, 18


def ltx2_facts(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], audio_vae: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    """Return fields of `ModelFacts` from the configs of a model's parts.

    Raises:
        KeyError, TypeError, ValueError: a config lacks or misstates something.
    """
    version = _version(transformer)
    heads, head_dim = int(transformer["num_attention_heads"]), int(transformer["attention_head_dim"])
    layers, across = int(transformer["num_layers"]), int(transformer.get("patch_size", 1))
    family = "LTX-2" if version == "2.0" else f"LTX-{version}"
    guidance = _GUIDANCE[version]
    spatial, temporal = _compression(vae)
    mel_rate = float(audio_vae.get("sample_rate", 16000)) / float(audio_vae.get("mel_hop_length", 160))
    return {
        "family": "LTX-2 small" if heads * head_dim < _SMALL else family,
        "experts": 1,
        "num_layers": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "audio_heads": int(transformer["audio_num_attention_heads"]),
        "audio_head_dim": int(transformer["audio_attention_head_dim"]),
        "patch": (int(transformer.get("patch_size_t", 1)), across, across),
        "vae_temporal": temporal,
        "vae_spatial": spatial,
        "rope_max": _UNBOUNDED,
        "longest_seconds": float(transformer.get("pos_embed_max_pos", 20)),
        "image": "optional",
        "last_image": "optional",
        "image_crf": _IMAGE_CRF_GEMMA_4 if "gemma4" in str(text.get("model_type")) else _IMAGE_CRF,
        "pipeline_step": 32,
        "audio_rate": mel_rate / _MEL_COMPRESSION,
        "guidance": guidance._replace(block=min(guidance.block, layers - 1)),
    }


def _version(transformer: Mapping[str, Any]) -> str:
    if not transformer.get("cross_attn_mod"):
        return "2.0"
    return "2.3" if transformer.get("use_prompt_adaln_single", True) else "2.5"


def _compression(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels for a latent row or column, and frames for a latent frame, as diffusers' VAE deduces them."""
    halvings = vae.get("spatio_temporal_scaling", True)
    if isinstance(halvings, bool):
        halvings = [halvings] * (len(vae.get("layers_per_block", _BLOCKS)) - 1)
    factor = 2 ** sum(halvings)
    spatial, temporal = vae.get("spatial_compression_ratio"), vae.get("temporal_compression_ratio")
    return int(spatial or vae.get("patch_size", 4) * factor), int(temporal or vae.get("patch_size_t", 1) * factor)
