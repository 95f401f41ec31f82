"""The demo model's text side: a word tokenizer and a small UMT5 encoder, both stock transformers classes."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WIDTH = 64
MARK = 0
"""The embedding channel that starts equal for all words, so that a row of zeros can be told from a word."""
WORDS = [
    "a",
    "an",
    "the",
    "with",
    "and",
    "still",
    "stays",
    "moves",
    "slides",
    "goes",
    "to",
    "left",
    "right",
    "up",
    "down",
    "red",
    "green",
    "blue",
    "yellow",
    "disc",
    "circle",
    "ball",
    "square",
    "box",
    "triangle",
    ",",
    ".",
    "on",
    "background",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower-cased; a word that the model never saw becomes <unk>. Deterministic."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Two layers of width 64, no dropout; trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocabulary, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight[:, MARK] = 3.0
    return encoder


def encode(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> embeddings [B, L, WIDTH], zero beyond each caption's end as WanPipeline pads, and lengths [B]."""
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    device = encoder.shared.weight.device
    mask = inputs.attention_mask.to(device)
    hidden = encoder(inputs.input_ids.to(device), mask).last_hidden_state
    return hidden * mask[..., None], mask.sum(1)
