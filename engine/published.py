"""Sizes of models as their makers publish them, so that a plan needs neither the files nor the network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..errors import ConfigError
from .facts import Files, locate, read_json

Published = Mapping[str, Mapping[str, Any]]

_WAN_VAE = {"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16}


def _wan(heads: int, layers: int, ffn_dim: int, *, index: Mapping[str, Any] | None = None, **sizes: Any) -> Published:
    """The files of one of Wan's models from text, as far as sizes follow from them."""
    transformer = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "rope_max_seq_len": 1024,
    }
    vae = sizes.pop("vae", _WAN_VAE)
    return {
        "model_index.json": {"_class_name": "WanPipeline", **(index or {})},
        "transformer/config.json": {**transformer, **sizes},
        "vae/config.json": vae,
    }


_EXPERTS = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
_VAE_5B = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
_LTX2: Published = {
    "model_index.json": {"_class_name": "LTX2Pipeline"},
    "transformer/config.json": {
        "in_channels": 128,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "caption_channels": 3840,
        "num_layers": 48,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKLLTX2Video",
        "latent_channels": 128,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "audio_vae/config.json": {"sample_rate": 16000, "mel_hop_length": 160},
    "text_encoder/config.json": {"model_type": "gemma3"},
}

PUBLISHED: Mapping[str, tuple[str, Published]] = {
    "wan2.1-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _wan(12, 30, 8960)),
    "wan2.1-14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", _wan(40, 40, 13824)),
    "wan2.2-a14b": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", _wan(40, 40, 13824, index=_EXPERTS)),
    "wan2.2-ti2v-5b": (
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        _wan(24, 30, 14336, index={"expand_timesteps": True}, in_channels=48, out_channels=48, vae=_VAE_5B),
    ),
    "ltx-2": ("Lightricks/LTX-2", _LTX2),
}
"""Short name -> hub id, whose files the figures are from, and these files."""


def sizes_of(model: str) -> Files:
    """A reader of a model's JSON files: a published one by its short name or hub id, or any that `read_facts` takes.

    Raises:
        ConfigError: it is none of these.
    """
    for name, (hub_id, files) in PUBLISHED.items():
        if model.lower() in (name, hub_id.lower()):
            return files.__getitem__
    try:
        return partial(read_json, model, locate(model))
    except ConfigError as error:
        raise ConfigError(f"{error}, nor one of {', '.join(PUBLISHED)}") from error
