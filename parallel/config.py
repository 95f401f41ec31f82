"""`ParallelConfig`: how many ranks make one video, and along which axes they share the work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ..errors import ConfigError
from ..settings import check as check_settings
from ..settings import setting

RING_CACHES = ("auto", "gathered", "sharded")
KERNELS = ("auto", "sdpa", "flash", "flash3", "xfuser")
CUTS = ("equal", "measured")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the four axes, and how attention is placed on them.

    ``ring_cache`` says what a rank keeps where ring > 1: ``gathered``, the K/V of all tokens (least traffic, ring times
    the memory), or ``sharded``, those of its own range of tokens (queries travel). ``auto`` takes ``gathered`` where
    `resolve` found it to fit into memory. With ``cut="measured"`` sums are rounded otherwise from run to run, so
    two runs agree to rounding only.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    windows: int = setting(
        1,
        least=1,
        metavar="W",
        help="number of groups of ranks, each of which runs its windows of a long video",
    )
    cfg: int = setting(
        1, least=1, metavar="C", help="number of groups of ranks, each of which runs its share of the guidance branches"
    )
    ring: int = setting(1, least=1, metavar="R", help="number of ranks that share the tokens of a layer")
    ulysses: int = setting(
        1,
        least=1,
        metavar="U",
        help="number of ranks that share the attention heads of a layer; must divide the number of heads",
    )
    ring_cache: str = setting(
        "auto",
        choices=RING_CACHES,
        help="gathered keeps all keys and values on every ring rank, sharded keeps a part on each",
    )
    kernel: str = setting("auto", choices=KERNELS, help="attention kernel")
    cut: str = setting(
        "equal",
        choices=CUTS,
        help="how tokens are cut into slices: equal, or measured, which gives faster ranks more tokens",
    )
    weights: tuple[float, ...] | None = setting(
        None, flag="", help="relative speeds of the ring * ulysses ranks of a sequence group, ring-major"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.weights is not None:
            object.__setattr__(self, "weights", _speeds(self.weights, self.ring * self.ulysses))
            if self.cut != "equal":
                raise ConfigError(f"weights with cut={self.cut!r}: only the cut 'equal' can follow the ranks' speeds.")

    @property
    def world_size(self) -> int:
        """Ranks in all: windows * cfg * ring * ulysses."""
        return self.windows * self.cfg * self.ring * self.ulysses

    @property
    def product(self) -> str:
        """The degrees in words; windows only where there are several groups for them."""
        inside = f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"
        return inside if self.windows == 1 else f"windows {self.windows} x {inside}"

    @property
    def sequence_size(self) -> int:
        """Ranks that share the tokens of one branch: ring * ulysses."""
        return self.ring * self.ulysses


def check(config: ParallelConfig, *, world_size: int, num_heads: int, num_branches: int) -> None:
    """Refuse degrees that this job or this model cannot have.

    Args:
        config: what was asked for.
        world_size: ranks of the job.
        num_heads: attention heads of a layer.
        num_branches: guidance branches: 1 without guidance, 2 for cond and uncond.

    Raises:
        ConfigError: with the valid choices.
    """
    if num_branches % config.cfg:
        raise ConfigError(
            f"cfg={config.cfg} with {num_branches} guidance branch(es): it must divide their number, "
            f"so one of {_listed(divisors(num_branches))}."
        )
    if num_heads % config.ulysses:
        raise ConfigError(
            f"ulysses={config.ulysses} with {num_heads} attention heads: it must divide their number, "
            f"so one of {_listed(divisors(num_heads))}; ring takes any degree."
        )
    if config.world_size != world_size:
        inside, rest = divmod(world_size, config.windows)
        found = () if rest else degrees(world_size=inside, num_heads=num_heads, num_branches=num_branches)
        valid = listed_degrees(found)
        would_do = f"cfg x ring x ulysses may be {valid}" if valid else "windows must divide it"
        raise ConfigError(
            f"{config.product} makes {config.world_size} rank(s) of a job of {world_size}: the product must be equal "
            f"to it, so {would_do}."
        )


def degrees(
    *, world_size: int, num_heads: int, num_branches: int, asked: Mapping[str, int] | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yield every valid (cfg, ring, ulysses) for a job that has those `asked` for, by the names of their axes.

    The largest cfg and then the largest ulysses come first.
    """
    wanted = [(asked or {}).get(axis) for axis in ("cfg", "ring", "ulysses")]
    for cfg in reversed(divisors(math.gcd(world_size, num_branches))):
        ranks = world_size // cfg
        for ulysses in reversed(divisors(math.gcd(ranks, num_heads))):
            found = (cfg, ranks // ulysses, ulysses)
            if all(degree in (None, own) for degree, own in zip(wanted, found, strict=True)):
                yield found


def listed_degrees(found: Iterable[tuple[int, int, int]]) -> str:
    """Degrees (cfg, ring, ulysses) in words; empty if there are none."""
    return ", ".join(f"{c} x {r} x {u}" for c, r, u in found)


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _speeds(weights: Any, count: int) -> tuple[float, ...]:
    """Return weights as floats, or refuse them."""
    try:
        speeds = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ConfigError(f"weights={weights!r}: a tuple of numbers is needed, one for each rank.") from None
    if len(speeds) != count:
        raise ConfigError(f"weights={weights!r}: ring * ulysses = {count} number(s) are needed, one for each rank.")
    if not all(math.isfinite(w) and w > 0.0 for w in speeds):
        raise ConfigError(f"weights={weights!r}: speeds are finite and above 0.")
    return speeds


def _listed(numbers: list[int]) -> str:
    """Return "1, 2, 4"."""
    return ", ".join(str(n) for n in numbers)


# The inputs of the automatic choice must be the same on every rank (the least free memory of all, for instance): the
# choice is then, too.

GIB = 2**30
KV_SHARE = 0.7
"""Part of the free memory that K/V may take; activations need the rest."""


def choose(
    world_size: int,
    num_heads: int,
    num_branches: int,
    *,
    num_windows: int = 1,
    kv_bytes: int | None = None,
    free_bytes: int | None = None,
    topology: Topology | None = None,
    machines: Sequence[int] = (),
) -> tuple[ParallelConfig, str]:
    """Choose cfg, ring and ulysses for a job, and what a ring rank keeps.

    As many windows of a long video side by side as leave no rank without work, and as many guidance branches: both
    exchange velocities only, once a step, windows each row once and branches each row of both. Then as many ranks
    on ulysses as the heads allow, the rest on ring. On one machine, of all valid degrees these send the fewest bytes
    and keep the fewest, whatever its links.

    A ulysses group stays inside a machine, and ring goes across: one message in a layer instead of two. P ranks on r
    machines send 2 (r-1) A d / P elements out of theirs so, r/2 times as many as by ulysses across.

    Args:
        world_size: ranks of the job.
        num_heads: attention heads of a layer.
        num_branches: guidance branches, 1 without guidance.
        num_windows: of the video.
        kv_bytes: K/V of all tokens, layers, heads and branches (`kv_bytes`); None: not known.
        free_bytes: memory that is free on the fullest rank, weights loaded; None: not known.
        topology: links of this machine; only says in the reason whether ulysses groups have fast ones.
        machines: how many ranks each machine has, in the order of the ranks; empty: all are on one.

    Returns:
        The degrees and one sentence that says why.
    """
    if min(world_size, num_heads, num_branches) < 1:
        raise ConfigError("The choice of degrees needs at least one rank, one head and one guidance branch.")
    windows = math.gcd(world_size, num_windows)
    cfg = math.gcd(world_size // windows, num_branches)
    ulysses = math.gcd(world_size // windows // cfg, num_heads, *machines)
    ring = world_size // windows // cfg // ulysses
    where = f" on {len(machines)} machines" if len(machines) > 1 else ""
    reasons = [f"{world_size} rank(s){where}, {num_branches} guidance branch(es), {num_heads} heads"]
    if windows > 1:
        reasons.append(f"windows {windows}: of {num_windows}, without any traffic of attention")
    if cfg > 1:
        reasons.append(f"cfg {cfg}: branches side by side exchange velocities only")
    if ulysses > 1:
        inside = " inside a machine" if len(machines) > 1 else ""
        most = f"the most of the {ring * ulysses} ranks of a branch that share the heads"
        reasons.append(f"ulysses {ulysses}: {most}{inside}")
    if ring > 1:
        across = "one exchange in a layer, as it goes across machines" if len(machines) > 1 else ""
        reasons.append(f"ring {ring}: {across or 'the ranks that the heads leave over'}")
    if topology is not None and ulysses > 1 and len(topology.order) >= ulysses:
        where = "spans GPUs without NVLink" if topology.split(ulysses) else "has NVLink inside"
        reasons.append(f"a ulysses group {where}")
    config = ParallelConfig(windows=windows, cfg=cfg, ring=ring, ulysses=ulysses)
    config, why = resolve(config, kv_bytes=kv_bytes, free_bytes=free_bytes)
    return config, "; ".join([*reasons, why] if why else reasons)


def resolve(
    config: ParallelConfig, *, kv_bytes: int | None = None, free_bytes: int | None = None
) -> tuple[ParallelConfig, str]:
    """Replace ``ring_cache="auto"`` by what fits: gathered sends less, sharded keeps less.

    Returns:
        The configuration, unchanged where nothing is to choose, and why; the reason also says where K/V do not fit at
        all. Without these numbers sharded is taken: it needs no more memory than any other placement.
    """
    if kv_bytes is None or free_bytes is None:
        if config.ring == 1 or config.ring_cache != "auto":
            return config, ""
        return replace(config, ring_cache="sharded"), "ring cache sharded: free memory is not known"
    room = int(free_bytes * KV_SHARE)
    gathered = kv_bytes // (config.windows * config.cfg * config.ulysses)
    sharded = gathered // config.ring
    form = config.ring_cache
    if form == "auto":
        form = "gathered" if gathered <= room else "sharded"
    needed = gathered if form == "gathered" else sharded
    figures = f"K/V {needed / GIB:.2f} GiB per rank, room for {room / GIB:.2f} GiB"
    if config.ring > 1:
        figures = f"ring cache {form}: {figures}"
        if form == "sharded" and gathered > room:
            figures = f"{figures}, not for {gathered / GIB:.2f} GiB gathered"
    if needed > room:
        figures = f"{figures}: too little, so take more ranks or a narrower kv_dtype"
    return (replace(config, ring_cache=form) if config.ring > 1 else config), figures


def kv_bytes(
    *, num_tokens: int, num_layers: int, width: int, num_branches: int, itemsize: int, history: bool = False
) -> int:
    """Bytes of K and V of a whole video: 2 N d L per branch, twice that with the history of the K/V forecast."""
    return 2 * num_tokens * width * num_layers * num_branches * itemsize * (2 if history else 1)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """GPUs of one machine, numbered as CUDA numbers the visible ones.

    Attributes:
        islands: GPUs that reach each other over NVLink (or NVSwitch), ascending; a GPU without is an island.
        free_bytes: free memory of each GPU.
    """

    islands: tuple[tuple[int, ...], ...]
    free_bytes: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Order in which local ranks should take the GPUs: islands are consecutive, as ulysses groups are."""
        return tuple(gpu for island in self.islands for gpu in island)

    def split(self, group_size: int) -> bool:
        """Whether, in this order, a group of that many consecutive ranks spans two islands."""
        ranks = [i for i, island in enumerate(self.islands) for _ in island]
        groups = (ranks[i : i + group_size] for i in range(0, len(ranks), group_size))
        return any(len(set(group)) > 1 for group in groups)


def read(uuids: Sequence[str] | None = None, nvml: Any = None) -> Topology:
    """Ask NVML.

    Args:
        uuids: of the GPUs, in CUDA's order; by default those visible to this process. NVML knows nothing of
            CUDA_VISIBLE_DEVICES, so numbers would not do.
        nvml: the module ``pynvml`` of nvidia-ml-py; imported when needed.

    Raises:
        ConfigError: nvidia-ml-py is not installed, or there is no NVIDIA driver or GPU.
    """
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError as error:
            raise ConfigError("The topology of GPUs is read with nvidia-ml-py: install heterostep[gpu].") from error
    if uuids is None:
        import torch  # not above: the service reads settings, and does without

        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if not uuids:
        raise ConfigError("The topology of GPUs was asked for, but no NVIDIA GPU is visible to this process.")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise ConfigError(f"The topology of GPUs was asked for, but the NVIDIA driver says: {error}.") from error
    try:
        handles = [nvml.nvmlDeviceGetHandleByUUID(u if u.startswith("GPU-") else f"GPU-{u}") for u in uuids]
        free = tuple(int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles)
        return Topology(islands=_islands(handles, nvml), free_bytes=free)
    finally:
        nvml.nvmlShutdown()


def _islands(handles: Sequence[Any], nvml: Any) -> tuple[tuple[int, ...], ...]:
    """Join GPUs between which NVLink works; through a switch too."""
    islands: list[list[int]] = []
    for gpu in range(len(handles)):
        joined = [island for island in islands if any(_linked(handles[gpu], handles[other], nvml) for other in island)]
        islands = [island for island in islands if island not in joined]
        islands.append(sorted([gpu, *(other for island in joined for other in island)]))
    return tuple(tuple(island) for island in sorted(islands))


def _linked(one: Any, other: Any, nvml: Any) -> bool:
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:  # a GPU that knows no NVLink at all
        return False
    return bool(status == nvml.NVML_P2P_STATUS_OK)
