"""The version of heterostep."""

__version__ = "0.1.0"
