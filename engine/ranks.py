"""What ranks must have in common to make one video together."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .models import Adapter
from .sharding import Sharding
from .solvers import adds_noise
from .state import random_state


def check_degrees(sharding: Sharding, adapter: Adapter, pipe: Any) -> None:
    """Refuse degrees of parallelism that do not suit a model, or what guides a call of `pipe`.

    Raises:
        ConfigError: on all ranks alike.
    """
    sites = adapter.sites(adapter.transformers(pipe)[0][1])
    units = [unit for name in adapter.branches(pipe) for unit in adapter.units(pipe, name)]
    sharding.check(math.gcd(*(site.attention.heads for site in sites)), len(units))


def check_ranks(sharding: Sharding, adapter: Adapter, pipe: Any, latents: Tensor) -> None:
    """Refuse ranks that cannot work on one video together; `latents` are those that a run begins with.

    Raises:
        ConfigError: on all ranks alike.
    """
    check_degrees(sharding, adapter, pipe)
    if not sharding.agreement.same(latents):
        raise ConfigError(
            "The ranks begin with different latents: they must make the same video, so give the pipeline the same "
            "prompt and size and a generator with the same seed on every rank."
        )
    if adds_noise(pipe.scheduler) and not sharding.agreement.same(random_state(latents.device)):
        raise ConfigError(
            f"{type(pipe.scheduler).__name__} adds random noise at each step, and the ranks' random numbers differ: "
            "call torch.manual_seed with one seed on every rank."
        )
