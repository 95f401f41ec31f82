"""What is computed: scores, budgets, plans, and the caches of velocities and of keys and values.

Depends on torch alone: no diffusers, no torch.distributed.
"""
