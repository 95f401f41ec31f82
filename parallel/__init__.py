"""Who computes what, and what moves between the ranks of one video.

Depends on torch and torch.distributed: knows neither plans (`hsa`) nor models and pipelines (diffusers).
"""
