"""Where `JobConfig` was in 0.1.0: now it is imported from `heterostep`, as every public name."""

from .request import JobConfig as JobConfig
