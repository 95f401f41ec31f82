"""Whether a request can be met, found before a weight is loaded, by the code that plans the run."""

from __future__ import annotations

from types import SimpleNamespace

from ..errors import ConfigError
from ..hsa.config import HSAConfig
from .facts import ModelFacts, first_line, read_scheduler
from .models import adapter_named, recipe_for
from .request import ResolvedRequest
from .run import Run
from .solvers import scheduler_for
from .tokens import Grid


def rehearse(facts: ModelFacts, hsa: HSAConfig | None, request: ResolvedRequest, every: int | None = None) -> None:
    """Plan a run on the model's scheduler alone, and refuse what the run would refuse.

    Args:
        facts: of the model.
        hsa: the allocation; None, the stock pipeline, needs no plan.
        request: size and steps.
        every: steps between checkpoints, of a job.

    Raises:
        ConfigError: so few steps cannot meet the share, or solver or forecast do not fit the model.
    """
    import diffusers

    if hsa is None:
        return
    adapter = adapter_named(facts.pipeline)
    kind, config = read_scheduler(facts)
    try:
        stock = getattr(diffusers, kind).from_config(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"model {facts.name!r}: its scheduler {kind} cannot be made ({first_line(error)})") from error
    scheduler = scheduler_for(hsa, stock, adapter.solvers, facts.pipeline)
    recipe_for(facts.pipeline).set_timesteps(scheduler, facts, request)
    pipeline = SimpleNamespace(scheduler=scheduler, config=SimpleNamespace(boundary_ratio=facts.boundary_ratio))
    run = Run(pipeline, adapter, hsa)
    if every is not None:
        run.save_every(every)
    run.rehearse(Grid(*facts.grid(request.width, request.height, request.num_frames)))
