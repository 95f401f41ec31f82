"""Videos that start from a video or are led by one, and those between two images: parity with the stock pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

import heterostep as hs
import tiny_ltx2
from tiny import embeddings, film, generate, picture, tiny_image_pipeline, tiny_led_pipeline


def from_video(scheduler):
    """A pipeline that changes a video, and how it is called: of 10 steps the last 7 are made."""
    pipe = tiny_led_pipeline("v2v", scheduler)

    def run(**changes):
        arguments = {**embeddings(), "video": film(), "height": 64, "width": 64}
        arguments |= {"strength": 0.7, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(**arguments | {"generator": torch.Generator().manual_seed(1)} | changes).frames

    return pipe, run, 7


def led():
    """VACE with a video, a mask over a part of it, and an image of what shall be seen."""
    pipe = tiny_led_pipeline("vace")
    mask = [picture().convert("L").point(lambda value: 255 if value > 90 else 0).convert("RGB")] * 9
    more = {"video": film(), "mask": mask, "reference_images": [picture(seed=9)]}
    return pipe, lambda **changes: generate(pipe, **more, **changes), 8


def between():
    """From a first to a last image, by the model of Wan 2.1 that sees both."""
    pipe = tiny_image_pipeline("wan21 i2v", pos_embed_seq_len=34)
    return pipe, lambda **changes: generate(pipe, last_image=picture(seed=8), **changes), 8


def conditions():
    """LTX-2 with a clip at its beginning, and an image at half strength and one at full strength later on."""
    pipe = LTX2ConditionPipeline(**tiny_ltx2.tiny_ltx2().components)
    pipe.set_progress_bar_config(disable=True)
    image = tiny_ltx2.picture()
    given = [
        LTX2VideoCondition(frames=[image] * 3, index=0),
        LTX2VideoCondition(frames=image, index=1, strength=0.5, crf=0),
        LTX2VideoCondition(frames=image, index=-1, crf=0),
    ]
    return pipe, lambda **changes: tiny_ltx2.generate(pipe, conditions=given, **changes)[0], 8


CASES = {
    "v2v euler": lambda: from_video("euler"),
    "v2v unipc": lambda: from_video("unipc"),
    "vace": led,
    "last image": between,
    "ltx2": conditions,
}


@pytest.mark.parametrize("name", CASES)
def test_all_tokens_are_the_stock_pipeline_and_half_of_them_is_half_of_the_work(name):
    pipe, run, steps = CASES[name]()
    stock = run()
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(run(), stock)
    # Whole steps are taken again in hindsight, by a scheduler that need not have begun at its first step.
    for policy in ("tokens", "joint") if name == "v2v unipc" else ("tokens",):
        session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy=policy))
        found, report = run(), session.report
        assert [record.step for record in report.steps] == list(range(steps))
        assert abs(report.compute - 0.5) < 0.08
        assert 1e-4 < (found - stock).norm() / stock.norm() < 0.5


def test_a_video_that_breaks_off_leaves_nothing_behind():
    pipe, run, _ = from_video("unipc")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy="tokens"))
    want = run()

    def fail(*arguments):
        raise RuntimeError("between the two branches")

    handle = pipe.transformer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="branches"):
        run()
    handle.remove()
    assert torch.equal(run(), want)
    # One prompt for both branches: they are told apart by their order.
    same = embeddings()["prompt_embeds"]
    run(prompt_embeds=same, negative_prompt_embeds=same)
    assert [record.step for record in session.report.steps] == list(range(7))
