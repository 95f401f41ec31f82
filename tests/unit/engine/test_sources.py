"""Videos from a video, or between two images, through engine and command: against the stock pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from diffusers.pipelines.ltx2 import LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from safetensors.torch import load_file

import heterostep as hs
import tiny_ltx2
from folders import complete_pipeline
from folders_ltx2 import complete_ltx2
from heterostep.engine.facts import read_facts
from heterostep.engine.media.video import write_mp4
from heterostep.engine.request import prepare, resolve
from heterostep.errors import Interrupted
from heterostep.launch.cli import main
from tiny import film, picture

COMMON = {"prompt": "a cat", "negative_prompt": "", "width": 64, "height": 64, "num_frames": 9}
KINDS = {"v2v": "unipc", "vace": "vace", "between": "wan22 i2v"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, by what they are used for."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in KINDS.items():
        complete_pipeline(kind).save_pretrained(folder / name)
    complete_ltx2().save_pretrained(folder / "ltx2")
    return folder


def stock(folder, name):
    """The latents that diffusers makes alone."""
    classes = {"v2v": WanVideoToVideoPipeline, "vace": WanVACEPipeline, "between": WanImageToVideoPipeline}
    pipe = classes.get(name, LTX2ConditionPipeline).from_pretrained(folder / name)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**COMMON, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    first, last = picture(), picture(seed=8)
    if name == "v2v":  # of 6 steps the pipeline makes 4
        del arguments["num_frames"]
        arguments |= {"video": film(), "strength": 0.7, "num_inference_steps": 6}
    elif name == "vace":
        arguments |= {"video": film()}
    elif name == "between":
        arguments |= {"image": first, "last_image": last}
    else:
        places = ((first, 0), (last, -1))
        given = [LTX2VideoCondition(frames=image, index=place, crf=33) for image, place in places]
        guidance = {**tiny_ltx2.GUIDANCE["2.0"], "audio_guidance_scale": 3.0}
        arguments |= {**guidance, "conditions": given, "frame_rate": 8.0, "num_frames": 5}
    return pipe(**arguments, generator=torch.Generator("cpu").manual_seed(3)).frames


def asked(name, **changes):
    given = {"video": film()} if name in ("v2v", "vace") else {"image": picture(), "last_image": picture(seed=8)}
    given |= {"strength": 0.7} if name == "v2v" else {}
    given |= {"num_frames": 5, "fps": 8} if name == "ltx2" else {}
    more = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0}
    return hs.GenerateRequest(**COMMON | more | given | changes)


@pytest.mark.parametrize("name", [*KINDS, "ltx2"])
def test_dense_is_the_stock_pipeline_and_a_part_of_the_work_is_done(models, name):
    hsa = hs.HSAConfig(compute=1.0, policy="tokens")
    engine = hs.Engine(hs.EngineConfig(model=str(models / name), device="cpu", hsa=hsa))
    dense = engine.generate(asked(name))
    assert torch.equal(dense.latents, stock(models, name))
    events = list(engine.stream(asked(name, compute=0.6, num_inference_steps=8)))
    output, steps = events[-1], events[1:-2]
    assert abs(output.report.compute - 0.6) < 0.1
    assert output.report.evaluations.shape == dense.report.evaluations.shape
    assert [event.step for event in steps] == list(range(1, 9))
    assert max(event.share for event in steps) == 1.0
    levels = [event.sigma for event in steps]
    assert (levels == [record.sigma for record in output.report.steps] and levels[0] < 1.0) or name != "v2v"


def test_a_job_that_changes_a_video_goes_on_bit_for_bit(models, tmp_path):
    source = tmp_path / "source.mp4"
    write_mp4(source, np.stack([np.asarray(frame) for frame in film(40)]), 32)
    flags = ["--model", str(models / "v2v"), "--prompt", "x", "--video", str(source), "--size", "64x64", "--fps", "8"]
    flags += ["--steps", "6", "--compute", "0.7", "--device", "cpu", "--output", str(tmp_path / "v.mp4"), "--quiet"]

    def made(name, *more):
        path = tmp_path / f"{name}.safetensors"
        assert main(["generate", *flags, "--latents", str(path), *more]) == 0
        return load_file(path)["latents"]

    whole = made("whole", "--job-dir", str(tmp_path / "whole"), "--checkpoint-every", "2")
    assert whole.shape[2] == 3  # 40 frames at 32 per second are 10 at 8, of which the model can make 9
    asked = resolve(
        hs.GenerateRequest(
            prompt="x", video=source, width=64, height=64, fps=8, num_inference_steps=6, seed=0, compute=0.7
        ),
        read_facts(str(models / "v2v")),
    )
    assert (asked.num_frames, asked.strength) == (9, 0.8)
    engine = hs.Engine(hs.EngineConfig(model=str(models / "v2v"), device="cpu", hsa=hs.HSAConfig(compute=0.7)))
    job = hs.JobConfig(folder=tmp_path / "broken", checkpoint_every=2)
    request = hs.GenerateRequest(prompt="x", video=source, width=64, height=64, fps=8, num_inference_steps=6)
    with pytest.raises(Interrupted):
        for event in engine.stream(request, job):
            if getattr(event, "step", 0) == 3:
                engine.save_and_stop()
    assert torch.equal(engine.generate(request, job).latents, whole)


def test_frames_of_a_file_are_those_that_are_seen(models, tmp_path):
    source, grey = tmp_path / "grey.mp4", np.arange(24, dtype=np.uint8)[:, None, None, None] * 10
    write_mp4(source, np.broadcast_to(grey, (24, 32, 64, 3)).copy(), 24)
    facts = read_facts(str(models / "v2v"))
    _, sources = prepare(hs.GenerateRequest(prompt="x", video=source, fps=8), facts)
    seen = [round(np.asarray(frame).mean() / 10) for frame in sources.video]
    assert seen == [0, 3, 6, 9, 12]  # of the 8 the model makes 5
    assert sources.video[0].size == (80, 32)  # of twice the width, in steps of 16


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("v2v", {"image": picture()}, "from text alone; leave out the image"),
        ("v2v", {"video": "absent.mp4"}, "cannot be read"),
        ("v2v", {"video": __file__}, "name a video file"),
        ("v2v", {"video": []}, "video must be the path"),
        ("v2v", {"video": film(5), "num_frames": 9}, "has 5 frames at"),
        ("v2v", {"video": film(), "window": 5}, "starts from an image or a video"),
        ("v2v", {"strength": 0.5}, "strength says how much"),
        ("v2v", {"video": film(), "strength": 1.5}, "strength must be a finite number"),
        ("vace", {"video": film(), "strength": 0.5}, "strength says how much"),
        ("v2v", {"last_image": picture()}, "no image to end with"),
        ("between", {"image": picture(), "video": film()}, "takes no video"),
        ("ltx2", {"last_image": picture()}, "give that too"),
    ],
)
def test_what_cannot_be_is_said(models, name, changes, says):
    with pytest.raises(hs.RequestError, match=says):
        resolve(hs.GenerateRequest(prompt="x", **changes), read_facts(str(models / name)))


def test_info_tells_what_a_model_takes(models, capsys):
    said = {}
    for name in ("v2v", "vace", "between"):
        assert main(["info", "--model", str(models / name)]) == 0
        rows = (line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line)
        said[name] = {row[0] + (row[1] if row[0] == "last" else ""): row[-1] for row in rows}
    assert "is changed" in said["v2v"]["video"] and "is followed" in said["vace"]["video"]
    assert "--last-image FILE" in said["between"]["lastimage"] and said["between"]["video"] == "no"
