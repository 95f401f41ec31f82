"""LTX-2: against the stock pipeline bit for bit, against an independent reference to 1e-5; video and sound."""

import pytest
import torch

import heterostep as hs
from reference_ltx2 import ReferenceLTX2
from tiny_ltx2 import GRID, generate, tiny_ltx2

N = 96


class FixedPlanner:
    """A user's planner: only `plan`, from a list."""

    def __init__(self, plans):
        self.plans = plans

    def plan(self, step, num_steps, sigma, num_tokens):
        assert (num_steps, num_tokens) == (len(self.plans), N)
        return self.plans[step]


def random_plans(steps, batch=None, seed=0):
    """All, none and sets of several sizes in turn; one for each of `batch` videos if that is given."""
    g = torch.Generator().manual_seed(seed)
    plans = []
    for i in range(steps):
        size = [N, 21, 0, 40, N, 0, 60, 7][i % 8]
        rows = [torch.randperm(N, generator=g)[:size].sort().values for _ in range(batch or 1)]
        plans.append(None if size == N else torch.stack(rows) if batch and size else rows[0])
    return plans


def relative(a, b):
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The other halves are cells of the table in docs/models.md.
@pytest.mark.parametrize(("version", "image"), [("2.0", True), ("2.3", False), ("2.5", True)])
def test_full_compute_is_the_stock_pipeline_and_remove_restores_it(version, image):
    pipe = tiny_ltx2(version, image=image)
    stock = generate(pipe, version)
    processors = [site.processor for block in pipe.transformer.transformer_blocks for site in block.children()
                  if hasattr(site, "processor")]  # fmt: skip
    session = hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert equal(generate(pipe, version), stock)
    assert session.report.compute == 1.0 and session.report.kv_bytes == 0
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy="tokens"))
    assert all(t.isfinite().all() for t in generate(pipe, version, steps=10))
    assert abs(session.report.compute - 0.5) <= 0.02
    assert session.report.evaluations.shape == GRID
    assert int(session.report.evaluations.sum()) == sum(r.active for r in session.report.steps)
    hs.remove(pipe)
    assert equal(generate(pipe, version), stock)
    assert processors == [site.processor for block in pipe.transformer.transformer_blocks for site in block.children()
                          if hasattr(site, "processor")]  # fmt: skip
    assert "_callback_tensor_inputs" not in vars(pipe)
    assert not any(module._diffusers_hook.hooks for module in pipe.transformer.modules()
                   if hasattr(module, "_diffusers_hook"))  # fmt: skip


@pytest.mark.parametrize(
    ("version", "image", "prompts"),
    [("2.0", False, 1), ("2.3", False, 1), ("2.5", True, 1), ("2.3", False, 2), ("interleaved", False, 1)],
)
def test_partial_run_equals_the_masked_reference(version, image, prompts):
    plans = random_plans(9, prompts if prompts > 1 else None)
    pipe = tiny_ltx2(version, image=image)
    session = hs.apply(pipe, hs.HSAConfig(), planner=FixedPlanner(plans))
    got = generate(pipe, version, steps=9, prompts=prompts)
    assert [r.active for r in session.report.steps] == [N if p is None else p.shape[-1] for p in plans]
    reference = tiny_ltx2(version, image=image)
    ReferenceLTX2(reference, plans, correct=True)
    assert relative(got, generate(reference, version, steps=9, prompts=prompts)) < 1e-5
