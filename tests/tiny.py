"""Complete tiny Wan pipelines with random weights, built offline in a few milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

KINDS = ("euler", "unipc", "dpm++", "wan22", "ti2v5b")
IMAGE_KINDS = ("wan21 i2v", "wan22 i2v", "ti2v5b i2v")
FAMILIES = {
    "Wan 2.1 T2V": "unipc",
    "Wan 2.1 I2V": "wan21 i2v",
    "Wan 2.2 T2V": "wan22",
    "Wan 2.2 I2V": "wan22 i2v",
    "Wan 2.2 TI2V, text": "ti2v5b",
    "Wan 2.2 TI2V, image": "ti2v5b i2v",
}
"""Kind of pipeline by the name of its family."""
TEXT_WIDTH = 32
SIZE = {"height": 64, "width": 64, "num_frames": 9}  # a grid of 3 x 4 x 4 = 48 tokens


def tiny_transformer(
    seed: int = 0,
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 24,
    in_channels: int = 16,
    image_dim: int | None = None,
    pos_embed_seq_len: int | None = None,
    vace: bool = False,
) -> Any:
    """Build a Wan transformer whose modulation and biases matter; `vace`: one that is led by a video."""
    torch.manual_seed(seed)
    more = {"vace_layers": [0, 1], "vace_in_channels": 96} if vace else {}
    model = (WanVACETransformer3DModel if vace else WanTransformer3DModel)(
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
        image_dim=image_dim,
        added_kv_proj_dim=heads * head_dim if image_dim is not None else None,
        pos_embed_seq_len=pos_embed_seq_len,
        **more,
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


def image_encoder(seed: int = 0) -> Any:
    """Build what Wan 2.1 looks at an image with: 17 tokens of a 32 x 32 view."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def tiny_image_pipeline(kind: str = "wan22 i2v", seed: int = 0, **transformer: Any) -> WanImageToVideoPipeline:
    """Build an image-to-video pipeline of `IMAGE_KINDS`; it does not pass its step index.

    2.1 sees the image through CLIP too, 2.2 has two experts, TI2V-5B has timesteps for each token.
    """
    per_token, sees, two = (kind.startswith(name) for name in ("ti2v5b", "wan21", "wan22"))
    text = tiny_pipeline("unipc" if per_token else "euler", seed)
    if not per_token:
        transformer = {"in_channels": 36, "image_dim": 16 if sees else None, **transformer}
    size = {"height": 32, "width": 32}
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=text.vae,
        scheduler=text.scheduler,
        transformer=tiny_transformer(seed, **transformer),
        transformer_2=tiny_transformer(seed + 1, **transformer) if two else None,
        image_encoder=image_encoder(seed) if sees else None,
        image_processor=CLIPImageProcessor(crop_size=size, size=size) if sees else None,
        boundary_ratio=0.9 if two else None,
        expand_timesteps=per_token,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_led_pipeline(kind: str, scheduler: str = "unipc") -> Any:
    """Build a pipeline that starts from a video ("v2v"), or is led by one ("vace")."""
    text = tiny_pipeline(scheduler, **({"vace": True} if kind == "vace" else {}))
    parts = {name: part for name, part in text.components.items() if name != "transformer_2"}
    pipe = (WanVACEPipeline if kind == "vace" else WanVideoToVideoPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(frames: int = 9) -> list[Image.Image]:
    """Build a video of coloured stripes, which change from frame to frame."""
    return [picture(seed=seed) for seed in range(frames)]


def build(kind: str, **transformer: Any) -> Any:
    """Build a pipeline of `KINDS` or `IMAGE_KINDS`."""
    return (tiny_image_pipeline if kind in IMAGE_KINDS else tiny_pipeline)(kind, **transformer)


def lora_weights(model: Any, rank: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """LoRA weights for all kinds of layers, among them those whose results HSA keeps."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "net.2")):
            for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                state[f"transformer.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=g)
    return state


def picture(width: int = 64, height: int = 64, seed: int = 3) -> Image.Image:
    """Build an RGB image of coloured stripes."""
    red, green, blue = np.random.default_rng(seed).integers(60, 256, 3)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    stripes = np.stack([x * red // width, y * green // height, (x + 2 * y) % 16 * blue // 16], axis=-1)
    return Image.fromarray(stripes.astype(np.uint8))


def embeddings(prompts: int = 1, seed: int = 5, length: int = 16) -> dict[str, torch.Tensor]:
    """Build prompt embeddings for both guidance branches, `length` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, length, TEXT_WIDTH)
    return {
        "prompt_embeds": torch.randn(shape, generator=generator),
        "negative_prompt_embeds": torch.randn(shape, generator=generator),
    }


def generate(pipe: Any, *, steps: int = 8, seed: int = 1, prompts: int = 1, **changes: Any) -> torch.Tensor:
    """Run a pipeline up to its final latents; one that needs an image gets `picture()`."""
    # A transformer that sees the image counts 512 text tokens from the end, whatever it is given.
    length = 16 if pipe.transformer.config.image_dim is None else 512
    arguments: dict[str, Any] = {
        **embeddings(prompts, length=length),
        **({"image": picture()} if isinstance(pipe, WanImageToVideoPipeline) else {}),
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


class Fixed:
    """A user's planner, of given plans, all tokens by default; it learns nothing, so its state is empty."""

    def __init__(self, plans):
        self.plans = plans

    def plan(self, step, num_steps, sigma, num_tokens):
        return self.plans.get(step)

    def state(self):
        return {}

    def restore(self, state, device):
        assert state == {}
