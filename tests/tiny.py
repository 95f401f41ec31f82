"""Complete tiny Wan pipelines with random weights, built offline in a few milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

KINDS = ("euler", "unipc", "dpm++", "wan22", "ti2v5b")
TEXT_WIDTH = 32
SIZE = {"height": 64, "width": 64, "num_frames": 9}  # a grid of 3 x 4 x 4 = 48 tokens


def tiny_transformer(
    seed: int = 0, *, layers: int = 2, heads: int = 2, head_dim: int = 24, in_channels: int = 16
) -> Any:
    """Build a Wan transformer whose modulation and biases matter."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=96,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()
    for parameter in model.parameters():
        # Random weights of the usual size make all tokens alike: larger ones make attention and time matter.
        scale = 0.05 if parameter.ndim == 1 else 0.3 * parameter.detach().std().item()
        parameter.data.add_(scale * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tiny_scheduler(kind: str) -> Any:
    """Build the stock scheduler of a pipeline kind."""
    if kind == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    cls = DPMSolverMultistepScheduler if kind == "dpm++" else UniPCMultistepScheduler
    return cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def tiny_pipeline(kind: str = "euler", seed: int = 0, **transformer: Any) -> WanPipeline:
    """Build a pipeline without text encoder and tokenizer: it is given prompt embeddings."""
    torch.manual_seed(seed)
    z = 16
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z,
        latents_std=[1.0] * z,
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=tiny_scheduler(kind),
        transformer=tiny_transformer(seed, **transformer),
        transformer_2=tiny_transformer(seed + 1, **transformer) if kind == "wan22" else None,
        boundary_ratio=0.875 if kind == "wan22" else None,
        expand_timesteps=kind == "ti2v5b",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_image_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """Build an image-to-video pipeline (two experts, no CLIP); it does not pass its step index."""
    text = tiny_pipeline("wan22", seed)
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=text.vae,
        scheduler=text.scheduler,
        transformer=tiny_transformer(seed, in_channels=36),
        transformer_2=tiny_transformer(seed + 1, in_channels=36),
        boundary_ratio=0.9,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(prompts: int = 1, seed: int = 5) -> dict[str, torch.Tensor]:
    """Build prompt embeddings for both guidance branches, 16 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, 16, TEXT_WIDTH)
    return {
        "prompt_embeds": torch.randn(shape, generator=generator),
        "negative_prompt_embeds": torch.randn(shape, generator=generator),
    }


def generate(pipe: Any, *, steps: int = 8, seed: int = 1, prompts: int = 1, **changes: Any) -> torch.Tensor:
    """Run a pipeline up to its final latents."""
    arguments: dict[str, Any] = {
        **embeddings(prompts),
        **SIZE,
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **changes,
    }
    return pipe(**arguments).frames


def shifted(steps, shift=3.0):
    """The flow schedule of Wan: sigma = shift * u / (1 + (shift - 1) * u)."""
    grid = [1 - i / steps for i in range(steps + 1)]
    return tuple(shift * u / (1 + (shift - 1) * u) for u in grid)
