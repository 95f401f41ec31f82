"""Complete diffusers folders of tiny random LTX-2 models, built offline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizerFast

from tiny_ltx2 import TEXT_LAYERS, TEXT_WIDTH, tiny_ltx2

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
_LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.,!?-"


def _tokenizer() -> GemmaTokenizerFast:
    # One piece a letter: nothing is trained, so every process gets the same vocabulary.
    pieces = [*_SPECIAL, *_LETTERS]
    return GemmaTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=1024)


def _text_encoder(words: int) -> Any:
    torch.manual_seed(3)
    text = {
        "vocab_size": words,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": TEXT_LAYERS - 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "sliding_window": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=7,
        boi_token_index=5,
        eoi_token_index=6,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def complete_ltx2(version: str = "2.0", **transformer: Any) -> LTX2Pipeline | LTX2ImageToVideoPipeline:
    """A tiny random pipeline with tokenizer and text encoder; versions as in `tiny_ltx2`."""
    pipe, tokenizer = tiny_ltx2(version, **transformer), _tokenizer()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=_text_encoder(len(tokenizer)))
    pipe.tokenizer_max_length = tokenizer.model_max_length
    return pipe
