"""What the baselines must know about a transformer: Wan's, or LTX-2's, whose blocks carry video and sound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from diffusers import LTX2VideoTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from torch import Tensor


class Part(NamedTuple):
    """Work of one layer.

    Attributes:
        cost: operations for a row that enters it.
        rows: of each sample, in a dense call.
        blocks: that run it in this call.
    """

    cost: float
    rows: int
    blocks: int


class Wan:
    """Blocks that take and return the hidden states of the video.

    Attributes:
        streams: the arguments of a block that it returns anew.
    """

    streams: ClassVar[tuple[str, ...]] = ("hidden_states",)

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """In the order in which they run."""
        return list(transformer.blocks)

    @staticmethod
    def layers(block: Any) -> dict[str, Any]:
        """By part, the layer whose rows are counted; of the feed-forward an inner one: caches hook the whole."""
        return {"self": block.attn1.to_q, "cross": block.attn2.to_q, "feed-forward": block.ffn.net[2]}

    @staticmethod
    def parts(transformer: Any, arguments: Mapping[str, Any]) -> dict[str, Part]:
        """Work of a call of the transformer."""
        config, layers = transformer.config, len(transformer.blocks)
        width = config.num_attention_heads * config.attention_head_dim
        tokens = arguments["hidden_states"][0, 0].numel() // math.prod(config.patch_size)
        text = arguments["encoder_hidden_states"].shape[1]
        return {
            "self": Part(8.0 * width**2 + 4.0 * tokens * width, tokens, layers),
            "cross": Part(4.0 * width**2 + 4.0 * text * width, tokens, layers),
            "feed-forward": Part(4.0 * width * config.ffn_dim, tokens, layers),
        }

    @staticmethod
    def attentions(block: Any) -> tuple[list[Any], list[Any]]:
        """Self-attention, and attention to something else."""
        return [block.attn1], [block.attn2]

    @staticmethod
    def modulated_input(block: Any, arguments: Mapping[str, Any]) -> Tensor:
        """What the first self-attention sees, float32 [B, N, d]: normalised, shifted and scaled by the timestep."""
        temb = arguments["temb"]  # [B, 6, d], or [B, N, 6, d] with timesteps of the tokens
        shift, scale = (block.scale_shift_table + temb.float()).unbind(-2)[:2]
        if temb.ndim == 3:
            shift, scale = shift[:, None], scale[:, None]
        return block.norm1(arguments["hidden_states"].float()) * (1 + scale) + shift


class LTX2:
    """Blocks that take and return the hidden states of video and sound; see `Wan` for what the methods mean."""

    streams: ClassVar[tuple[str, ...]] = ("hidden_states", "audio_hidden_states")

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """See `Wan`."""
        return list(transformer.transformer_blocks)

    @staticmethod
    def layers(block: Any) -> dict[str, Any]:
        """See `Wan`. Where one stream looks at the other, the rows of both are counted."""
        return {
            "self": block.attn1.to_q,
            "cross": block.attn2.to_q,
            "feed-forward": block.ff.net[2],
            "sound self": block.audio_attn1.to_q,
            "sound cross": block.audio_attn2.to_q,
            "sound feed-forward": block.audio_ff.net[2],
            "sound heard": block.audio_to_video_attn.to_q,
            "sound told": block.audio_to_video_attn.to_k,
            "video seen": block.video_to_audio_attn.to_q,
            "video shown": block.video_to_audio_attn.to_k,
        }

    @staticmethod
    def parts(transformer: Any, arguments: Mapping[str, Any]) -> dict[str, Part]:
        """See `Wan`. A block with perturbed attention has no self-attention, isolated streams do not meet."""
        config, layers = transformer.config, len(transformer.transformer_blocks)
        width = config.num_attention_heads * config.attention_head_dim
        thin = config.audio_num_attention_heads * config.audio_attention_head_dim
        tokens, samples = arguments["hidden_states"].shape[1], arguments["audio_hidden_states"].shape[1]
        text = arguments["encoder_hidden_states"].shape[1]
        attending = layers - len(arguments.get("spatio_temporal_guidance_blocks") or ())
        meeting = 0 if arguments.get("isolate_modalities") else layers
        return {
            "self": Part(8.0 * width**2 + 4.0 * tokens * width, tokens, attending),
            "cross": Part(4.0 * width**2 + 4.0 * text * width, tokens, layers),
            "feed-forward": Part(16.0 * width**2, tokens, layers),
            "sound self": Part(8.0 * thin**2 + 4.0 * samples * thin, samples, attending),
            "sound cross": Part(4.0 * thin**2 + 4.0 * text * thin, samples, layers),
            "sound feed-forward": Part(16.0 * thin**2, samples, layers),
            "sound heard": Part(4.0 * width * thin + 4.0 * samples * thin, tokens, meeting),
            "sound told": Part(4.0 * thin**2, samples, meeting),
            "video seen": Part(4.0 * thin**2 + 4.0 * tokens * thin, samples, meeting),
            "video shown": Part(4.0 * width * thin, tokens, meeting),
        }

    @staticmethod
    def attentions(block: Any) -> tuple[list[Any], list[Any]]:
        """See `Wan`."""
        others = [block.attn2, block.audio_attn2, block.audio_to_video_attn, block.video_to_audio_attn]
        return [block.attn1, block.audio_attn1], others

    @staticmethod
    def modulated_input(block: Any, arguments: Mapping[str, Any]) -> Tensor:
        """See `Wan`. Of the video, as for the first LTX-Video: sound is a small part."""
        states, temb = arguments["hidden_states"], arguments["temb"]
        shift, scale = block.get_mod_params(block.scale_shift_table, temb, len(states))[:2]
        return block.norm1(states.float()) * (1 + scale) + shift


Model = type[Wan] | type[LTX2]


def model_of(transformer: Any) -> Model:
    """Which model a transformer is of."""
    return LTX2 if isinstance(transformer, LTX2VideoTransformer3DModel) else Wan


class _TwoStreams(TransformerBlockMetadata):
    """Diffusers' caches know one second stream, the text; LTX-2 calls something else ``encoder_hidden_states``."""

    def _get_parameter_from_args_kwargs(self, identifier: str, args: Any = (), kwargs: Any = None) -> Any:
        name = "audio_hidden_states" if identifier == "encoder_hidden_states" else identifier
        return super()._get_parameter_from_args_kwargs(name, args, kwargs)


# Diffusers registers the blocks of the first LTX-Video alone, without which its caches refuse a model.
TransformerBlockRegistry.register(
    LTX2VideoTransformerBlock, _TwoStreams(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
)
