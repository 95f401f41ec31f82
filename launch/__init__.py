"""Processes: command line (and later torchrun, Ray). The only folder that reads environment variables."""
