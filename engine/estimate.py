"""What a video costs before anything is loaded: work, bytes sent, memory and time, counted from a model's sizes.

Nothing here imports PyTorch. d is the width of the model, N all tokens, A a step's active ones, L layers, and P the
ranks that share the tokens of a branch. docs/planning.md has the formulas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from ..hsa.config import HSAConfig, Schedule, affordable_full
from ..parallel import config as parallel
from ..parallel.config import ParallelConfig
from .devices import ELEMENTWISE_BYTES, GIB, Device
from .facts import Files, ModelFacts, read_facts
from .published import sizes_of

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_BYTES = {**ITEM_BYTES, "int8": 1, "fp8": 1}
_FLOAT = 4
TEXT_TOKENS = {"Wan": 512, "LTX": 1024}
"""Positions of the text that every token attends to."""
IMAGE_TOKENS = 257
"""Positions of the image encoder's view, for models that see it."""
TILE, STRIDE = 256, 192
"""Side of a tile of the VAE and distance between tiles, in pixels, where several ranks decode."""
ACTIVATION_WIDTHS, ACTIVATION_HIDDEN = 6.5, 1.6
"""Memory of a pass for each token, in rows of the model's and of the feed-forward layer's width: fitted to the peaks in
benchmarks/reports/step-wan-1.3b.json and step-wan-14b.json."""
DECODE_PIXEL_BYTES = 16_000
"""Estimate: what the VAE holds for each pixel of a frame, in float32."""
RESERVE = 2 * GIB
"""Estimate: the context of CUDA, NCCL's buffers, and memory that is free in pieces too small."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What costs follow from.

    Attributes:
        facts: the model's own sizes.
        ffn_dim: width of the feed-forward layer.
        block_parameters: weights of all blocks of one transformer.
        other_parameters: its weights outside of the blocks.
        vae_parameters: weights of the VAE.
        vae_width: channels of the VAE's last layers, for each pixel, over those of Wan 2.1.
        row: numbers of a token's velocity.
    """

    facts: ModelFacts
    ffn_dim: int
    block_parameters: int
    other_parameters: int
    vae_parameters: int
    vae_width: float
    row: int

    @property
    def width(self) -> int:
        """D."""
        return self.facts.num_heads * self.facts.head_dim

    @property
    def audio_width(self) -> int:
        """Width of the sound's tokens; 0 without sound."""
        return self.facts.audio_heads * self.facts.audio_head_dim

    @property
    def parameters(self) -> int:
        """Weights of one transformer."""
        return self.block_parameters + self.other_parameters

    @property
    def text_tokens(self) -> int:
        """Keys of the cross-attention."""
        return TEXT_TOKENS["LTX" if self.audio_width else "Wan"] + IMAGE_TOKENS * self.facts.sees_image


def read_sizes(model: str) -> Sizes:
    """Read the sizes of a published model by its name, or of any other from its JSON files.

    Raises:
        ConfigError: there is no such model, or it is not one that heterostep runs.
    """
    files = sizes_of(model)
    facts = read_facts(model, files)
    try:
        return _sizes(facts, files)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model {model!r}: a value in its configs is missing or invalid ({error})") from error


def _sizes(facts: ModelFacts, files: Files) -> Sizes:
    transformer, vae = files("transformer/config.json"), files("vae/config.json")
    d, audio, layers = facts.num_heads * facts.head_dim, facts.audio_heads * facts.audio_head_dim, facts.num_layers
    patch = math.prod(facts.patch)
    if audio:
        ffn, captions = 4 * d, int(transformer.get("caption_channels", 3840))
        # Attention to itself, to the text, of either stream to the other; feed-forward layers.
        block = 16 * (d * d + audio * audio) + 2 * (2 * d * audio + 2 * audio * audio)
        other = 15 * d * d + 14 * audio * audio + captions * (d + audio)
        vae_parameters, vae_width = 1_222_000_000, 1.0
    else:
        ffn = int(transformer["ffn_dim"])
        block = 8 * d * d + 2 * d * ffn + (2 * d * d if facts.sees_image else 0)
        other = 8 * d * d + int(transformer["text_dim"]) * d
        base = int(vae.get("base_dim", 96))
        decoder, vae_patch = int(vae.get("decoder_base_dim") or base), int(vae.get("patch_size") or 1)
        vae_width = decoder / 96 / vae_patch**2
        vae_parameters = round(127e6 * (0.28 * (base / 96) ** 2 + 0.72 * (decoder / 96) ** 2))
    channels = int(transformer.get("out_channels") or transformer.get("in_channels", 16))
    return Sizes(
        facts=facts,
        ffn_dim=ffn,
        block_parameters=block * layers,
        other_parameters=other,
        vae_parameters=vae_parameters,
        vae_width=vae_width,
        row=channels * patch,
    )


@dataclass(frozen=True, kw_only=True)
class Video:
    """What is to be made.

    Attributes:
        width, height, num_frames: in pixels and frames.
        steps: T.
        branches: guidance branches of a step.
        tokens: N.
        audio_tokens: tokens of sound; each rank computes all of them.
    """

    width: int
    height: int
    num_frames: int
    steps: int
    branches: int
    tokens: int
    audio_tokens: int = 0

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.width * self.height * self.num_frames


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """Steps by what they evaluate, and the tokens that partial ones have.

    Attributes:
        full, partial, skipped: numbers of steps.
        share: mean A / N of the partial ones.
    """

    full: int
    partial: int
    skipped: int
    share: float

    @property
    def compute(self) -> float:
        """Share of the dense work."""
        steps = self.full + self.partial + self.skipped
        return (self.full + self.partial * self.share) / steps


def allot(hsa: HSAConfig, steps: int, experts: int = 1) -> Allotment:
    """What a policy makes of a share of the work: the numbers of `hsa.policies`, without the places of the steps.

    Raises:
        ConfigError: the share cannot be met with so few steps.
    """
    sigmas = tuple(1 - i / steps for i in range(steps + 1))
    forced = frozenset({0, steps // 3} if experts > 1 else {0})
    required = len(affordable_full(Schedule(sigmas=sigmas, num_tokens=1 << 20, forced_full=forced), hsa))
    budget = hsa.compute * steps + 1e-9
    if hsa.compute == 1.0:
        return Allotment(full=steps, partial=0, skipped=0, share=0.0)
    if hsa.policy == "steps":
        full, partial = max(math.ceil(budget - 0.5 - 1e-6), required), 0
    elif hsa.policy == "joint":
        full, tolerance = max(int(budget), required), 0.02 * steps
        if budget - full > tolerance >= full + 1 - budget:
            full += 1
        partial = 1 if budget - full > tolerance else 0
    elif hsa.policy == "tokens":
        evaluated = min(max(round(budget / 0.77), math.ceil(budget - 1e-6)), steps)
        windows = max(2, round(0.1 * evaluated)) + 1
        full = max(required, min(windows, int(0.6 * budget)))
        partial = min(max(evaluated - full, math.ceil(budget) - full), steps - full)
    else:
        full = max(required, 1)
        partial = min(steps - full, max(round(2 * budget) - full, 1))
    full = min(full, steps)
    partial = min(partial, steps - full)
    share = min(max(budget - full, 0.0) / partial, 1.0) if partial else 0.0
    return Allotment(full=full, partial=partial, skipped=steps - full - partial, share=share)


def sent_by_layer(
    config: ParallelConfig, sizes: Sizes, tokens: int, item_bytes: int, *, everything: bool = True
) -> dict[str, int]:
    """Bytes that a rank sends in one layer of a pass over so many active tokens, by collective.

    ``ring_cache`` "auto" is taken for sharded. Where some tokens are left out (not `everything`), their keys are sent
    to the rank that keeps them: up to once over for sharded caches, which is what is counted.
    """
    ring, ulysses = config.ring, config.ulysses
    group, rows = tokens / ring, tokens / ring / ulysses
    heads = sizes.facts.num_heads / ulysses
    width, keys = sizes.width / ulysses, (sizes.width + sizes.audio_width) / ulysses
    sent: dict[str, float] = {}
    if ulysses > 1:
        sent["heads_out"] = rows * (width + 2 * keys) * (ulysses - 1) * item_bytes
        sent["heads_home"] = (group - rows) * width * item_bytes
    if ring > 1 and config.ring_cache == "gathered":
        sent["keys_values"] = 2 * group * keys * (ring - 1) * item_bytes
    elif ring > 1:
        moved = 0.0 if everything else group * (ring - 1) / ring
        sent["queries_keys_values"] = (group * width * (ring - 1) + 2 * moved * keys) * item_bytes
        sent["partial_outputs"] = (tokens - group) * (width * item_bytes + _FLOAT * heads)
    return {name: round(count) for name, count in sent.items()}


def velocity_bytes(config: ParallelConfig, sizes: Sizes, tokens: int, branches: int, item_bytes: int) -> int:
    """Bytes of velocity rows that a rank sends at the end of a step."""
    ranks = config.world_size if config.cfg > 1 else config.sequence_size
    passes = branches // config.cfg
    return round(tokens / config.sequence_size * sizes.row * item_bytes * passes * (ranks - 1))


def pass_flops(sizes: Sizes, video: Video, active: float, parts: int) -> tuple[float, float]:
    """FLOPs of one rank in a pass over `active` of the tokens: of matrix multiplications, and of attention."""
    d, audio, layers = sizes.width, sizes.audio_width, sizes.facts.num_layers
    rows, sound = active / parts, video.audio_tokens
    # Keys and values of the text are computed once a video, so only queries and results count here.
    linear = rows * (12 * d * d + 4 * d * sizes.ffn_dim)
    attention = 4 * rows * d * (video.tokens + sizes.text_tokens)
    if audio:
        linear += rows * 8 * d * audio + sound * (28 * audio * audio + 8 * audio * audio)
        attention += 4 * rows * audio * sound + 4 * sound * audio * (sound + video.tokens / parts + sizes.text_tokens)
    return linear * layers, attention * layers


@dataclass(frozen=True, kw_only=True)
class Links:
    """How ranks reach each other.

    Attributes:
        machine: GPUs of a machine.
        inside, outside: bytes per second that a GPU sends to others of its machine, and to other machines.
    """

    machine: int
    inside: float
    outside: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything but the degrees: the model, the video, the share of the work, and the machine.

    Attributes:
        item_bytes: of a weight or activation.
        shard_weights: whether each rank keeps a part of every block.
    """

    sizes: Sizes
    video: Video
    hsa: HSAConfig
    device: Device
    links: Links
    item_bytes: int = 2
    shard_weights: bool = False

    @property
    def allotment(self) -> Allotment:
        """Steps by what they evaluate."""
        return allot(self.hsa, self.video.steps, self.sizes.facts.experts)


def memory(case: Case, config: ParallelConfig) -> dict[str, int]:
    """Bytes of each rank by part. Decoding takes the place of K/V and activations."""
    sizes, video, item_bytes, shard_weights = case.sizes, case.video, case.item_bytes, case.shard_weights
    ranks = config.world_size
    blocks = sizes.block_parameters / (ranks if shard_weights else 1)
    layer = sizes.block_parameters / sizes.facts.num_layers if shard_weights and ranks > 1 else 0
    weights = (blocks + sizes.other_parameters) * sizes.facts.experts * item_bytes + 2 * layer * item_bytes
    weights += sizes.vae_parameters * _FLOAT
    rows = video.tokens / config.sequence_size
    activations = rows * (ACTIVATION_WIDTHS * sizes.width + ACTIVATION_HIDDEN * sizes.ffn_dim) * item_bytes
    text = 2 * sizes.text_tokens * sizes.width * sizes.facts.num_layers * item_bytes * video.branches / config.cfg
    state = 8 * video.tokens * sizes.row * _FLOAT
    if config.ring > 1:
        activations += 2 * video.tokens * sizes.width / config.ulysses * item_bytes
    plane, frames = video.width * video.height, 3 * _FLOAT * video.pixels
    if ranks > 1 and plane > TILE * TILE:
        decode = DECODE_PIXEL_BYTES * sizes.vae_width * TILE * TILE + frames * (1 + (TILE / STRIDE) ** 2)
    else:
        decode = DECODE_PIXEL_BYTES * sizes.vae_width * plane + 2 * frames
    return {
        "weights": round(weights),
        "kv": kv_bytes(case, config),
        "activations": round(activations + text + state),
        "decode": round(decode),
    }


def kv_bytes(case: Case, config: ParallelConfig) -> int:
    """Bytes of keys and values on a rank's device: none where no step is partial, two layers' if the host has them."""
    sizes, video, hsa = case.sizes, case.video, case.hsa
    if not case.allotment.partial:
        return 0
    item = KV_BYTES.get(hsa.kv_dtype or "", case.item_bytes)
    whole = sizes.facts.cache_bytes(video.tokens, item) * (2 if hsa.kv_forecast else 1)
    shards = config.ulysses * (config.ring if config.ring_cache == "sharded" else 1)
    if hsa.kv_host:  # that of the layer which computes, and of the next one
        return 2 * whole // sizes.facts.num_layers // shards
    return whole * (video.branches // config.cfg) // shards


def peak(parts: Mapping[str, int]) -> int:
    """Bytes that a rank needs at most."""
    return parts["weights"] + max(parts["kv"] + parts["activations"], parts["decode"]) + RESERVE


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one layout of ranks does; times in seconds, sizes in bytes, of one rank.

    Attributes:
        config: the degrees.
        rows: tokens of a rank at a full step.
        sent: bytes at a full step, by collective.
        memory: bytes by part.
        peak: bytes at most.
        fits: whether the GPU has them.
        full_step, partial_step: seconds.
        communication: share of a full step's time that is spent on sending.
        denoise, decode, text: seconds of a video.
    """

    config: ParallelConfig
    rows: int
    sent: Mapping[str, int]
    memory: Mapping[str, int]
    peak: int
    fits: bool
    full_step: float
    partial_step: float
    communication: float
    denoise: float
    decode: float
    text: float

    @property
    def video(self) -> float:
        """Seconds of a video."""
        return self.text + self.denoise + self.decode


def estimate(case: Case, config: ParallelConfig) -> Estimate:
    """Estimate one video on `config.world_size` ranks.

    Raises:
        ConfigError: the share of the work cannot be met with so few steps.
    """
    sizes, video, allotted = case.sizes, case.video, case.allotment
    config = _placed(case, config)
    parts = memory(case, config)
    full, sending = _step(case, config, video.tokens)
    partial = _step(case, config, allotted.share * video.tokens)[0] if allotted.partial else 0.0
    sent = sent_by_layer(config, sizes, video.tokens, case.item_bytes)
    layers = sizes.facts.num_layers * (video.branches // config.cfg)
    needed = peak(parts)
    return Estimate(
        config=config,
        rows=-(-video.tokens // config.sequence_size),
        sent={name: count * layers for name, count in sent.items()}
        | {"velocity": velocity_bytes(config, sizes, video.tokens, video.branches, case.item_bytes)},
        memory=parts,
        peak=needed,
        fits=needed <= case.device.memory,
        full_step=full,
        partial_step=partial,
        communication=sending / full,
        denoise=allotted.full * full + allotted.partial * partial,
        decode=_decode_seconds(sizes, video, case.device, config.world_size),
        text=case.device.text,
    )


def _placed(case: Case, config: ParallelConfig) -> ParallelConfig:
    """Let ring ranks keep what the engine would let them keep."""
    if config.ring == 1 or config.ring_cache != "auto":
        return config
    whole = dataclasses.replace(config, ring_cache="gathered")
    free = case.device.memory - memory(case, whole)["weights"] - RESERVE
    every = kv_bytes(case, dataclasses.replace(whole, cfg=1, ulysses=1))
    return parallel.resolve(config, kv_bytes=every, free_bytes=max(int(free), 0))[0]


def _step(case: Case, config: ParallelConfig, active: float) -> tuple[float, float]:
    """Seconds of a step over `active` tokens, and those of them that are spent on sending."""
    sizes, video, device, links = case.sizes, case.video, case.device, case.links
    layers, parts, partly = sizes.facts.num_layers, config.sequence_size, active < video.tokens
    linear, attention = pass_flops(sizes, video, active, parts)
    moved = active / parts * sizes.width * layers * ELEMENTWISE_BYTES * case.item_bytes / 2
    working = linear / device.linear + attention / device.attention + moved / device.bandwidth
    working = max(working, layers * device.layer_floor) + partly * layers * device.partial_layer
    sent = sent_by_layer(config, sizes, round(active), case.item_bytes, everything=not partly)
    sending = 0.0
    for name, count in sent.items():
        ranks, stride = (config.ulysses, 1) if name.startswith("heads") else (config.ring, config.ulysses)
        sending += layers * _send_seconds(count, ranks, stride, device, links)
    end = 0.0
    if config.world_size > 1:
        if case.shard_weights:
            gathered = sizes.block_parameters * case.item_bytes * (config.world_size - 1) / config.world_size
            sending += _send_seconds(gathered, config.world_size, 1, device, links)
        rows = velocity_bytes(config, sizes, round(active), video.branches, case.item_bytes)
        end = _send_seconds(rows, config.world_size, 1, device, links)
    passes = video.branches // config.cfg
    return passes * (working + sending) + end, passes * sending + end


def _send_seconds(count: float, ranks: int, stride: int, device: Device, links: Links) -> float:
    """Seconds in which each of `ranks` ranks, `stride` apart, sends so many bytes in all to the others."""
    near = min(max(links.machine // stride, 1), ranks)
    if near == ranks:
        return count / links.inside + device.latency
    outside = count * (ranks - near) / (ranks - 1)
    return max((count - outside) / links.inside, outside / links.outside) + device.network_latency


def _decode_seconds(sizes: Sizes, video: Video, device: Device, ranks: int) -> float:
    seconds = video.pixels * device.decode * sizes.vae_width
    if ranks == 1 or video.width * video.height <= TILE * TILE:
        return seconds
    tiles = math.ceil(video.width / STRIDE) * math.ceil(video.height / STRIDE)
    return seconds * (TILE / STRIDE) ** 2 * math.ceil(tiles / ranks) / tiles
