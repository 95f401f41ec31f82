"""Whether a job is finished, known before its model is loaded."""

from __future__ import annotations

from .checkpoint import identity_of
from .config import EngineConfig
from .facts import read_facts
from .job import Finished, look
from .loading import pick_device, pick_dtype
from .request import GenerateRequest, JobConfig, allocation, resolve


def find_finished(config: EngineConfig, request: GenerateRequest, job: JobConfig) -> Finished | None:
    """Look, without loading the model, whether a job is finished; if not, whether an engine could work on it.

    Raises:
        ConfigError: the job's folder cannot be used, is in use, or holds another job.
        RequestError: the request does not fit the model.
    """
    facts = read_facts(config.model)
    resolved = resolve(request, facts)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    return look(job, identity_of(facts, resolved, allocation(config, resolved), dtype, config=config))
