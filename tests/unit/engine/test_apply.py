"""What `apply` accepts and refuses, and what it deduces."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import heterostep as hs
from heterostep.engine.denoise.schedulers import build_scheduler, forecast_for, kind_of
from heterostep.engine.models.base import Grid, Patch, pack, patchify, unpack, unpatchify
from tiny import generate, tiny_pipeline, tiny_scheduler


class Fixed:
    """A user's planner that returns one thing at every step but the first."""

    def __init__(self, result):
        self.result = result

    def plan(self, step, num_steps, sigma, num_tokens):
        return self.result


class Foreign:
    transformer = torch.nn.Linear(1, 1)


def test_unsupported_pipelines_are_refused_with_the_supported_ones():
    with pytest.raises(hs.ConfigError, match=r"Foreign is not supported.*WanPipeline"):
        hs.apply(Foreign())


def test_foreign_transformer_in_a_wan_pipeline_is_refused():
    pipe = tiny_pipeline()
    pipe.register_modules(transformer=torch.nn.Linear(1, 1))
    with pytest.raises(hs.ConfigError, match="stock transformers"):
        hs.apply(pipe)


def test_wrong_config_and_planner_are_refused():
    pipe = tiny_pipeline()
    with pytest.raises(hs.ConfigError, match="an HSAConfig is needed"):
        hs.apply(pipe, {"compute": 0.5})
    with pytest.raises(hs.ConfigError, match="no method plan"):
        hs.apply(pipe, planner=object())


def test_foreign_attention_processor_and_other_caches_are_refused():
    pipe = tiny_pipeline()

    class Mine(WanAttnProcessor):
        pass

    stock = pipe.transformer.blocks[1].attn1.processor
    pipe.transformer.blocks[1].attn1.set_processor(Mine())
    with pytest.raises(hs.ConfigError, match="Mine is set as attention processor"):
        hs.apply(pipe)
    pipe.transformer.blocks[1].attn1.set_processor(stock)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(hs.ConfigError, match="disable_cache"):
        hs.apply(pipe)
    pipe.transformer.disable_cache()
    hs.apply(pipe)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchHeunDiscreteScheduler(), DDIMScheduler(), UniPCMultistepScheduler(prediction_type="epsilon")],
)
def test_unfit_schedulers_are_refused_but_a_solver_replaces_them(scheduler):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(hs.ConfigError, match=type(scheduler).__name__):
        hs.apply(pipe)
    hs.apply(pipe, hs.HSAConfig(solver="euler"))
    generate(pipe, steps=3, guidance_scale=1.0)
    hs.remove(pipe)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("kind", ["euler", "unipc", "dpm++"])
def test_solvers(kind):
    own = build_scheduler(kind, tiny_scheduler("unipc"))
    assert kind_of(own) == kind
    pipe = tiny_pipeline("euler")
    before = pipe.scheduler
    session = hs.apply(pipe, hs.HSAConfig(solver=kind))
    assert kind_of(pipe.scheduler) == kind
    assert (pipe.scheduler is before) == (kind == "euler")
    generate(pipe, steps=6)
    assert len(session.report.steps) == 6


def test_ab2_is_refused_with_multistep_schedulers():
    for kind in ("unipc", "dpm++"):
        with pytest.raises(hs.ConfigError, match="second order twice"):
            hs.apply(tiny_pipeline(kind), hs.HSAConfig(forecast="ab2", solver=kind))
    hs.apply(tiny_pipeline("unipc"), hs.HSAConfig(forecast="ab2", solver="euler"))
    first_order = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1)
    assert forecast_for(hs.HSAConfig(forecast="ab2"), first_order) == "ab2"


def test_scheduler_changed_after_apply_is_checked_at_the_run():
    pipe = tiny_pipeline("euler")
    session = hs.apply(pipe, hs.HSAConfig(forecast="ab2"))
    pipe.scheduler = tiny_scheduler("unipc")
    with pytest.raises(hs.ConfigError, match="second order twice"):
        generate(pipe)
    pipe.scheduler = tiny_scheduler("euler")
    generate(pipe)
    assert len(session.report.steps) == 8


@pytest.mark.parametrize(("before", "after"), [("euler", "unipc"), ("unipc", "euler")])
def test_scheduler_changed_after_apply_changes_the_plan(before, after):
    """Their noise levels differ, and so do the places where steps are worth most."""
    pipe = tiny_pipeline(after)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.4))
    want, records = generate(pipe, steps=20), session.report.steps
    pipe = tiny_pipeline(before)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.4))
    generate(pipe, steps=20)
    assert [r.active for r in session.report.steps] != [r.active for r in records]
    pipe.scheduler = tiny_scheduler(after)
    assert torch.equal(generate(pipe, steps=20), want)
    assert [r.active for r in session.report.steps] == [r.active for r in records]


def test_unreachable_target_is_said_at_the_run_and_leaves_the_pipeline_usable():
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(compute=0.1))
    with pytest.raises(hs.ConfigError, match=r"at least compute=0\.2"):
        generate(pipe, steps=5)
    assert generate(pipe, steps=10).isfinite().all()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1, 2], "int64"),
        (torch.tensor([1.0]), "int64"),
        (torch.tensor([[[1]]]), "int64"),
        (torch.tensor([1, 1]), "twice"),
        (torch.tensor([48]), "out of range"),
        (torch.tensor([-1, 3]), "out of range"),
        (torch.tensor([[1], [2]]), "2 samples"),
    ],
)
def test_wrong_plans_are_refused(result, message):
    pipe = tiny_pipeline()
    hs.apply(pipe, planner=Fixed(result))
    with pytest.raises(hs.ConfigError, match=message):
        generate(pipe, steps=3)


@pytest.mark.parametrize(
    ("result", "active"),
    [
        (None, 48),
        (torch.randperm(48), 48),
        (torch.empty(0, dtype=torch.int64), 0),
        (torch.tensor([[5, 2]]), 2),
        (torch.tensor([[47, 0, 3]]), 3),
    ],
)
def test_what_a_users_planner_may_return(result, active):
    pipe = tiny_pipeline()
    session = hs.apply(pipe, planner=Fixed(result))
    generate(pipe, steps=3)
    assert [r.active for r in session.report.steps] == [48, active, active]
    assert session.report.steps[0].reason == "first step"


def test_plans_that_belie_their_counts_are_refused():
    """With counts that promise whole steps no keys and values are kept, and a partial one would read stale ones."""
    pipe = tiny_pipeline()
    hs.apply(pipe, planner=Fixed(torch.arange(5)))
    generate(pipe, steps=3)
    planner = Fixed(torch.arange(5))
    planner.counts = [48, 48, 48]
    hs.apply(pipe, planner=planner)
    with pytest.raises(hs.ConfigError, match="counts say 48 tokens at step 1, but its plan has 5"):
        generate(pipe, steps=3)
    planner.counts = [48, 5, 5]
    assert generate(pipe, steps=3).isfinite().all()


def test_transformer_called_outside_a_pipeline_is_stock():
    pipe = tiny_pipeline()
    x, t, e = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 32)
    want = pipe.transformer(x, t, e).sample
    hs.apply(pipe)
    assert torch.equal(pipe.transformer(x, t, e).sample, want)
    assert torch.equal(pipe.transformer(x, t, e, return_dict=False)[0], want)


def test_backend_chosen_after_apply_stays():
    pipe = tiny_pipeline()
    hs.apply(pipe)
    for block in pipe.transformer.blocks:
        block.attn1.processor._attention_backend = "native"
    hs.remove(pipe)
    assert type(pipe.transformer.blocks[0].attn1.processor) is WanAttnProcessor
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == "native"


def test_processor_set_after_apply_is_refused_where_tokens_are_left_out():
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(policy="tokens"))
    pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
    with pytest.raises(hs.ConfigError, match=r"WanAttnProcessor was set .* after hs\.apply"):
        generate(pipe)
    hs.apply(pipe, hs.HSAConfig(policy="tokens"))
    want = generate(pipe)
    hs.apply(pipe, hs.HSAConfig(policy="steps"))
    whole = generate(pipe)
    pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
    assert torch.equal(generate(pipe), whole)  # whole steps need nothing of it
    hs.apply(pipe, hs.HSAConfig(policy="tokens"))
    assert torch.equal(generate(pipe), want)


def test_processor_set_after_apply_stays_through_remove():
    pipe = tiny_pipeline()
    stock = [block.attn1.processor for block in pipe.transformer.blocks]

    class Mine:  # not even an attention backend
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    mine = Mine()
    hs.apply(pipe)
    pipe.transformer.blocks[1].attn1.set_processor(mine)
    hs.remove(pipe)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == [stock[0], mine]


@pytest.mark.parametrize("patch", [Patch(1, 2, 2), Patch(2, 2, 1), Patch(1, 1, 1)])
def test_tokens_and_latents_are_inverse(patch):
    latents = torch.randn(2, 3, 4, 6, 8)
    grid = patch.grid_of(latents)
    tokens = patchify(latents, patch)
    assert tokens.shape[1] == grid.num_tokens
    assert torch.equal(unpatchify(tokens, patch, grid), latents)
    assert torch.equal(unpack(pack(tokens, patch), patch), tokens)


def test_packed_tokens_embed_as_in_the_whole_video():
    embed, patch = tiny_pipeline().transformer.patch_embedding, Patch(1, 2, 2)
    latents = torch.randn(1, 16, 3, 8, 8)
    whole = embed(latents).flatten(2).transpose(1, 2)
    chosen = torch.tensor([3, 40, 17])
    packed = embed(pack(patchify(latents, patch)[:, chosen], patch)).flatten(2).transpose(1, 2)
    assert torch.allclose(packed, whole[:, chosen], atol=1e-6)
    assert patch.grid_of(latents) == Grid(3, 4, 4)
