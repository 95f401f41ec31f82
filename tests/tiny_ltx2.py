"""Complete tiny LTX-2 pipelines with random weights, built offline in a moment: video with sound."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image

FAMILIES = {"LTX-2 text": ("2.0", False), "LTX-2.3 image": ("2.3", True), "LTX-2.5 text": ("2.5", False)}
"""Columns of the table in docs/models.md: version, and whether it starts from an image."""
TEXT_WIDTH, TEXT_LAYERS = 16, 3
SIZE = {"height": 32, "width": 64, "num_frames": 5, "frame_rate": 8.0}  # 3 x 4 x 8 = 96 tokens, 16 of sound
GRID = (3, 4, 8)

# What the pipelines are called with, by version: 2.3 and 2.5 have two more guidance branches.
GUIDANCE = {
    "2.0": {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0,
            "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0, "use_cross_timestep": False,
            "spatio_temporal_guidance_blocks": None},
    "2.3": {"stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7, "use_cross_timestep": True,
            "spatio_temporal_guidance_blocks": [1]},
}  # fmt: skip
GUIDANCE["2.5"] = GUIDANCE["2.3"]


def tiny_transformer(version: str, seed: int = 0, *, heads: int = 2, head_dim: int = 16, layers: int = 2) -> Any:
    """Build an LTX-2 transformer whose modulation and biases matter."""
    torch.manual_seed(seed)
    new = version in ("2.3", "2.5")
    options: dict[str, Any] = {"rope_type": "split"}
    if new:
        options |= dict.fromkeys(
            ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn"), True
        )
        options["use_prompt_embeddings"] = False
    if version == "2.5":
        options |= {"ff_bias": False, "use_prompt_adaln_single": False, "use_keyframes_abs_pos_embedding": True}
    if version == "interleaved":
        options["rope_type"] = "interleaved"
    model = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=heads,
        audio_attention_head_dim=head_dim // 2,
        audio_cross_attention_dim=heads * head_dim // 2,
        num_layers=layers,
        caption_channels=TEXT_WIDTH,
        rope_double_precision=True,
        vae_scale_factors=(2, 8, 8),
        base_height=64,
        base_width=64,
        pos_embed_max_pos=2,
        audio_pos_embed_max_pos=2,
        **options,
    ).eval()
    for parameter in model.parameters():
        scale = 0.05 if parameter.ndim == 1 else 0.3 * parameter.detach().std().item()
        parameter.data.add_(scale * torch.randn_like(parameter))
    return model.requires_grad_(False)


def _connectors(version: str, transformer: Any) -> Any:
    new = version in ("2.3", "2.5")
    heads = transformer.config.num_attention_heads
    video, sound = heads * transformer.config.attention_head_dim, heads * transformer.config.audio_attention_head_dim
    options: dict[str, Any] = {}
    for name, width in (("video", video), ("audio", sound)):
        options[f"{name}_connector_num_attention_heads"] = 2
        options[f"{name}_connector_attention_head_dim"] = (width if new else TEXT_WIDTH) // 2
        options[f"{name}_connector_num_layers"] = 1
        options[f"{name}_connector_num_learnable_registers"] = None
        if new:
            options |= {f"{name}_hidden_dim": width, f"{name}_gated_attn": True}
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_LAYERS,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        per_modality_projections=new,
        proj_bias=new,
        **options,
    ).eval()


def _decoders() -> dict[str, Any]:
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    sound = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    ).eval()
    # Statistics other than 0 and 1, so that forgetting them would show.
    vae.latents_mean.fill_(0.1), vae.latents_std.fill_(1.5)
    sound.latents_mean.fill_(0.2), sound.latents_std.fill_(0.8)
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[16, 16, 8],
        upsample_factors=[8, 5, 4],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    ).eval()
    return {"vae": vae, "audio_vae": sound, "vocoder": vocoder}


def tiny_scheduler() -> Any:
    """Build the scheduler that the pipelines ship with: its shift depends on the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def tiny_ltx2(version: str = "2.0", *, image: bool = False, seed: int = 0, **transformer: Any) -> Any:
    """Build a pipeline without text encoder and tokenizer: it is given prompt embeddings.

    Args:
        version: "2.0", "2.3", "2.5", or "interleaved": 2.0 with the other rotary embeddings.
        image: the pipeline that starts from an image.
        seed: of the weights.
        transformer: arguments of `tiny_transformer`.
    """
    model = tiny_transformer(version, seed, **transformer)
    parts = {"transformer": model, "connectors": _connectors(version, model), **_decoders()}
    cls = LTX2ImageToVideoPipeline if image else LTX2Pipeline
    pipe = cls(scheduler=tiny_scheduler(), text_encoder=None, tokenizer=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(prompts: int = 1, seed: int = 5) -> dict[str, torch.Tensor]:
    """Build prompt embeddings of 8 text tokens, of which the first two are padding."""
    generator = torch.Generator().manual_seed(seed)
    shape, mask = (prompts, 8, TEXT_WIDTH * TEXT_LAYERS), torch.ones(prompts, 8, dtype=torch.int64)
    mask[:, :2] = 0
    named = {}
    for name in ("prompt", "negative_prompt"):
        named |= {f"{name}_embeds": torch.randn(shape, generator=generator), f"{name}_attention_mask": mask}
    return named


def picture(width: int = 64, height: int = 32) -> Image.Image:
    """Build an image to start from."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 3, y * 7, (x + y) * 2], axis=-1).astype(np.uint8))


def generate(
    pipe: Any, version: str = "2.0", *, steps: int = 8, seed: int = 1, prompts: int = 1, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a pipeline up to its final latents: [B, C, F, Y, X] of the video, [B, C, M, bins] of the sound."""
    image = isinstance(pipe, LTX2ImageToVideoPipeline)
    arguments: dict[str, Any] = {
        **embeddings(prompts),
        **SIZE,
        **GUIDANCE.get(version, GUIDANCE["2.0"]),
        **({"image": [picture()] * prompts if prompts > 1 else picture(), "image_crf": 0} if image else {}),
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **changes,
    }
    out = pipe(**arguments)
    return out.frames, out.audio
