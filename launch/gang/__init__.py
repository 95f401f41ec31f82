"""A gang: ranks that are Ray actors, make one video at a time, and are replaced when they die."""
