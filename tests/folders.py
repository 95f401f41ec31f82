"""Complete diffusers folders of tiny random Wan models, built offline, and folders with something wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from tiny import IMAGE_KINDS, TEXT_WIDTH, tiny_image_pipeline, tiny_led_pipeline
from tiny import tiny_pipeline as denoiser

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-"


def _tokenizer() -> T5TokenizerFast:
    # One piece a letter: nothing is trained, so every process gets the same vocabulary.
    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def complete_pipeline(kind: str = "unipc") -> WanPipeline | WanImageToVideoPipeline:
    """A tiny random pipeline with tokenizer and text encoder, of `tiny.KINDS`, `tiny.IMAGE_KINDS`, or "vace"."""
    if kind == "vace":
        pipe = tiny_led_pipeline(kind)
    else:
        pipe = tiny_image_pipeline(kind) if kind in IMAGE_KINDS else denoiser(kind)
    parts = pipe.components
    tokenizer = _tokenizer()
    torch.manual_seed(3)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    # Statistics other than 0 and 1, so that forgetting them would show.
    parts["vae"].register_to_config(latents_mean=[0.1] * 16, latents_std=[1.5] * 16)
    parts |= {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config).eval()}
    options = {name: pipe.config[name] for name in ("boundary_ratio", "expand_timesteps") if name in pipe.config}
    return type(pipe)(**parts, **options)


def broken_copies(model: Path, folder: Path) -> dict[str, Path]:
    """Copies of a model's folder, each with one thing wrong; by a name that says what."""
    copies = {}
    for name in (
        "truncated weights",
        "truncated json",
        "no vae",
        "foreign",
        "no index",
        "bad sizes",
        "no weights",
        "no text encoder",
        "lacking a weight",
        "lacking a text weight",
        "lacking text embeddings",
        "lacking a VAE weight",
        "lacking much",
        "torn shards",
        "zero patch",
        "endless layers",
        "odd expert",
        "wrong channels",
    ):
        copies[name] = folder / name.replace(" ", "-")
        shutil.copytree(model, copies[name])
    weights = copies["truncated weights"] / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    index = copies["truncated json"] / "model_index.json"
    index.write_text(index.read_text()[:40])
    shutil.rmtree(copies["no vae"] / "vae")
    foreign = copies["foreign"] / "model_index.json"
    foreign.write_text(json.dumps({**json.loads(foreign.read_text()), "_class_name": "FluxPipeline"}))
    (copies["no index"] / "model_index.json").unlink()
    for name, changes in (
        ("bad sizes", {"ffn_dim": 100}),
        ("zero patch", {"patch_size": [1, 0, 2]}),
        ("wrong channels", {"in_channels": 36}),
        ("endless layers", {"num_layers": math.inf}),
    ):
        sizes = copies[name] / "transformer" / "config.json"
        sizes.write_text(json.dumps({**json.loads(sizes.read_text()), **changes}))
    odd = copies["odd expert"] / "model_index.json"
    odd.write_text(json.dumps({**json.loads(odd.read_text()), "transformer_2": 5}))
    transformer, vae = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))
    for name, file, key in (
        ("lacking a weight", transformer, "blocks.0.attn1.to_q.weight"),
        ("lacking a text weight", "text_encoder/model.safetensors", "encoder.final_layer_norm.weight"),
        ("lacking text embeddings", "text_encoder/model.safetensors", "shared.weight"),
        ("lacking a VAE weight", vae, "decoder.conv_in.weight"),
        ("lacking much", transformer, "blocks.1."),
    ):
        tensors = load_file(copies[name] / file)
        kept = {k: tensor for k, tensor in tensors.items() if not k.startswith(key)}
        save_file(kept, copies[name] / file, metadata={"format": "pt"})
    # The index of shards promises a tensor that no shard holds.
    shards = copies["torn shards"] / "transformer"
    WanTransformer3DModel.from_pretrained(shards).save_pretrained(shards, max_shard_size="100KB")
    for shard in shards.glob("*-of-*.safetensors"):
        kept = {k: tensor for k, tensor in load_file(shard).items() if k != "proj_out.weight"}
        save_file(kept, shard, metadata={"format": "pt"})
    shutil.rmtree(copies["no text encoder"] / "text_encoder")
    (copies["no weights"] / "text_encoder" / "model.safetensors").unlink()
    return copies
