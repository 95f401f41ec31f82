"""`EngineConfig`: what an engine loads, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from ..settings import check, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = (
    *("native", "cudnn", "efficient", "math", "flash", "flash3", "sage", "xformers", "flex"),
    *("flash_hub", "flash3_hub", "sage_hub"),
)
"""diffusers' attention kernels; the last three are downloaded from the Hugging Face Hub."""
OFFLOADS = ("auto", "none", "model", "group")
QUANTIZATIONS = ("none", "int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine loads, and where it runs.

    Attributes:
        hsa: how steps are allocated to tokens, for every request that does not override `compute`; None runs
            the stock pipeline, every token at every step.
        parallel: degrees of a job of several ranks, each of which makes an engine with the same settings, and is asked
            for the same videos; None for one rank.

    `dtype` is that of text encoder and transformer; the VAE always runs in float32, as Wan's makers advise.

    Raises:
        ConfigError: a value is not one of these.
    """

    model: str = setting("demo", metavar="M", help="'demo', a folder in diffusers format, or a Hugging Face Hub id")
    hsa: HSAConfig | None = field(default_factory=HSAConfig)
    dtype: str = setting(
        "auto", choices=DTYPES, metavar="T", help="data type; auto is bfloat16 on a GPU and float32 on the CPU"
    )
    device: str = setting("auto", metavar="D", help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")
    parallel: ParallelConfig | None = None
    attention: str | None = setting(
        None,
        choices=ATTENTION,
        metavar="K",
        help="attention kernel of diffusers, on one rank (ranks that share a video have --kernel); left out, native: "
        "PyTorch's own choice",
    )
    compile: bool = setting(
        False,
        help="compile the transformer's blocks with torch.compile: the first steps of a process take a minute or more, "
        "later ones less time",
    )
    offload: str = setting(
        "auto",
        choices=OFFLOADS,
        metavar="O",
        help="where weights wait that are not in use: none keeps all on the GPU; model brings each part in its turn "
        "(text encoder, transformer, VAE); group brings the transformer block by block; auto takes the first that fits",
    )
    quantize: str = setting(
        "none",
        choices=QUANTIZATIONS,
        metavar="Q",
        help="type in which the transformer's weights are kept: int8 or fp8 (needs torchao) halve their memory",
    )
    vae_tiling: bool = setting(
        False, help="let the VAE decode large videos in overlapping tiles: less memory, more time, faint differences"
    )
    shard_weights: bool = setting(
        False,
        help="each rank keeps a part of the transformer's weights and gathers one layer at a time, for models too "
        "large for one device; LoRA weights cannot be loaded then",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.parallel is not None and not isinstance(self.parallel, ParallelConfig):
            raise ConfigError(
                f"parallel must be a ParallelConfig such as ParallelConfig(ulysses=2), not {self.parallel!r}"
            )
        if self.shard_weights and (self.parallel is None or self.parallel.world_size == 1):
            raise ConfigError(
                "shard_weights needs several ranks to share the weights; set parallel=ParallelConfig(...)"
            )
        if self.shard_weights and self.parallel is not None and self.parallel.windows > 1:
            raise ConfigError(
                f"shard_weights does not work with windows={self.parallel.windows}: ranks that gather each layer must "
                "make the same number of passes, and groups of windows may not; use windows=1"
            )
        if self.shard_weights and self.parallel is not None and self.parallel.cut == "measured":
            raise ConfigError(
                "shard_weights does not work with cut='measured': ranks that gather each layer wait for each other, so "
                "their speeds cannot be measured; use cut='equal'"
            )
        if self.parallel is not None and self.parallel.world_size > 1:
            check_with_ranks(self, self.shard_weights)
        if not self.model.strip():
            raise ConfigError("model must be 'demo', a folder, or a hub id (owner/name), not an empty name")
        if self.hsa is not None and not isinstance(self.hsa, HSAConfig):
            raise ConfigError(f"hsa must be an HSAConfig such as HSAConfig(compute=0.5), or None, not {self.hsa!r}")
        if self.compile and self.hsa is not None and self.hsa.kv_host:
            raise ConfigError("compile does not work with kv_host, whose copies cannot be part of a graph; give one")
        if not self.device:
            raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {self.device!r}")


def check_with_ranks(config: EngineConfig, shard_weights: bool) -> None:
    """Refuse what several ranks that share a video cannot have.

    Raises:
        ConfigError: likewise.
    """
    if config.attention is not None:
        raise ConfigError(
            f"attention={config.attention!r} chooses the kernel of one rank; ranks that share a video have "
            "kernel (--kernel) instead"
        )
    if shard_weights and config.quantize != "none":
        raise ConfigError("quantize does not work with shard_weights: quantized weights cannot be gathered; give one")
    if shard_weights and config.offload not in ("auto", "none"):
        raise ConfigError("offload does not work with shard_weights, which keeps each rank's part in place; give one")
    if config.compile and shard_weights:
        raise ConfigError("compile does not work with shard_weights, which gathers each layer as it is reached")
