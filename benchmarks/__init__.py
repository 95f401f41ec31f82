"""Measurements: scripts, and the packages `baselines` and `quality`, which users have too."""
