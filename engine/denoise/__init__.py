"""The denoising loop: a hook on the stock pipeline, the run that it drives, and what the run remembers."""
