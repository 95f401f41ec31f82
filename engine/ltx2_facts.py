"""What the JSON files of an LTX-2 folder say; PyTorch is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
        "image": "optional",
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
