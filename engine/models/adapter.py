"""What a model must say about itself for the hook to run it on some of its tokens: one small class for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from ..attention import AttentionCall
from ..registry import OwnHook
from ..tokens import Grid


class Site(NamedTuple):
    """An attention module whose keys and values come from the video's tokens, and so are cached.

    Attributes:
        attention: the module; its processor is replaced.
        everywhere: its queries are no video tokens, but something that every rank has whole (sound).
    """

    attention: Any
    everywhere: bool = False


class Adapter(Protocol):
    """A model and its diffusers pipelines; `docs/adding_a_model.md` shows how one is written.

    `arguments` are those of a call of the transformer, by name, without ``return_dict``; ``hidden_states`` is always
    among them, its first dimension is the batch. A *branch* is what a pipeline names by
    ``transformer.cache_context(name)``. Its call evaluates one guidance unit, or several that are stacked in its batch,
    each with all B videos: `units` names them. What has a body here suits most models.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Class names of the pipelines."""
    stock_processors: ClassVar[tuple[type, ...]]
    """Types of the attention processors that may be replaced."""
    moving: ClassVar[tuple[str, ...]]
    """Arguments that change from step to step; where another one changes, forecasts of its branch begin anew."""
    solvers: ClassVar[tuple[str, ...]]
    """Schedulers that may replace the pipeline's own."""
    step_tensors: ClassVar[tuple[str, ...]]
    """Tensors besides the latents that the pipeline's loop carries from step to step, by the names it gives them."""
    output: ClassVar[Any]
    """What the transformer returns where it is not asked for a tuple."""

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        """Whether `pipe` is one of `pipelines` (or derived from one) with stock transformers."""

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        """Return (expert, transformer) pairs; expert 0 does the high noise, 1 the low noise."""

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """The layers, in the order in which they run."""

    @staticmethod
    def sites(transformer: Any) -> list[Site]:
        """All places where tokens meet, in a fixed order."""

    @staticmethod
    def processor(call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> Any:
        """Return what stands in for the stock processor `replaced` at a site."""

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Cross-attention modules whose keys and values are those of the prompt, constant until that changes."""
        return []

    @staticmethod
    def text_processor(replaced: Any) -> Any:
        """Return what stands in for the stock processor of one of `text_attentions`."""
        raise NotImplementedError

    @staticmethod
    def hooks(transformer: Any, call: AttentionCall) -> list[tuple[Any, OwnHook]]:
        """(module, hook) for modules that must know which tokens are active, such as rotary embeddings."""
        return []

    @staticmethod
    def conditioned(timestep: Tensor) -> Tensor | None:
        """Indices int64 [C] of the tokens that are given, by the timesteps [B] or [B, N] of a first call; or None.

        An image is the first latent frame of most models, whose tokens stand at timestep 0 from the start.
        """
        return (timestep == 0).all(0).nonzero()[:, 0] if timestep.ndim == 2 else None

    @staticmethod
    def experts(pipe: Any) -> list[int]:
        """Expert that the pipeline will call at each step."""
        return [0] * len(pipe.scheduler.timesteps)

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        """Names of the branches of the running pipeline call, in the order of its calls."""

    @staticmethod
    def units(pipe: Any, branch: str) -> tuple[str, ...]:
        """Guidance units in the batch of a branch's call, in their order there; names unique among all branches."""

    @staticmethod
    def guidance(pipe: Any, units: Sequence[str], expert: int) -> dict[str, float]:
        """Weights with which the pipeline mixes the units' velocities into the guided one."""

    @staticmethod
    def grid(module: Any, arguments: Mapping[str, Any]) -> Grid:
        """Tokens of the video of a call."""

    @staticmethod
    def video(module: Any, arguments: Mapping[str, Any]) -> Tensor:
        """The noisy latents of a call [batch, C, F, Y, X], without what else the model gets as channels."""

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        """The call for the active tokens [A] or [batch, A] alone."""

    @staticmethod
    def rows(module: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the transformer returned: velocity rows [batch, A, D] of the tokens in the call, and all else."""

    @staticmethod
    def answer(module: Any, grid: Grid, rows: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inverse of `rows` for all tokens [batch, N, D]."""

    @staticmethod
    def nothing(module: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Zeros in the form of the transformer's answer, which cost no memory."""
