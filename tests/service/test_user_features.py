"""What users set on a pipeline, through the service: the stock pipeline's video with the same, byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from safetensors.torch import save_file

from folders import complete_pipeline
from heterostep.engine.media.video import write_mp4
from tiny import lora_weights

ASKED = {"negative_prompt": "fog", "num_frames": 5, "seed": 3, "guidance_scale": 2.0, "num_inference_steps": 3}


def stock(model, lora, path):
    pipe = WanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="a")
    pipe.set_adapters("a", 0.7)
    pipe.transformer.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend("native")
    pipe.vae.enable_tiling()
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=7.0)
    arguments = {name: value for name, value in ASKED.items() if name != "seed"}
    generator = torch.Generator("cpu").manual_seed(3)
    frames = pipe("a red disc", width=320, height=32, generator=generator, output_type="np", **arguments).frames[0]
    write_mp4(path, (frames * 255).round().astype("uint8"), 8)
    return path.read_bytes()


def test_a_request_s_lora_and_the_operator_s_settings_are_the_stock_pipeline_s(start, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")
    model, folder = tmp_path / "model", tmp_path / "loras"
    pipe = complete_pipeline("unipc")
    pipe.save_pretrained(model)
    folder.mkdir()
    save_file(lora_weights(pipe.transformer), folder / "style.safetensors")
    # Blocks are compiled by nothing: it would take a minute, and here only the way of the setting matters.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    flags = ("--lora-dir", folder, "--vae-tiling", "--attention", "math", "--compile", "--offload", "group")
    server = start("--model", model, "--device", "cpu", *flags).healthy()
    card = server.http.get("/v1/models").json()["data"][0]
    assert card["loras"] == ["style"]
    fields = {**ASKED, "size": "320x32", "compute": 1.0, "flow_shift": 7, "lora": ["style:0.7"]}
    made = server.finished(server.create("a red disc", **fields))
    assert made["status"] == "completed", made["error"]
    assert (made["lora"], made["flow_shift"]) == (["style:0.7"], 7.0)
    content = server.http.get(f"/v1/videos/{made['id']}/content").content
    assert content == stock(model, folder / "style.safetensors", tmp_path / "stock.mp4")
    report = json.loads(server.http.get(f"/v1/videos/{made['id']}/content?variant=report").text)
    acting = report["acting"]
    assert (acting["kernel"], acting["compiled"], acting["vae_tiling"]) == ("math", True, True)
    assert str(folder) not in json.dumps(report)
    # A form has texts alone; without the weights it is another video.
    form = {**{name: str(value) for name, value in fields.items()}, "prompt": "a red disc", "lora": "style:0.7"}
    again = server.http.post("/v1/videos", data=form).json()
    plain = server.create("a red disc", **{**fields, "lora": []})
    assert server.http.get(f"/v1/videos/{server.finished(again['id'])['id']}/content").content == content
    assert server.http.get(f"/v1/videos/{server.finished(plain)['id']}/content").content != content
    for name, said in (
        ("absent", "there is style"),
        (str(folder / "style.safetensors"), "there is style"),
        ("a:b", "FILE"),
    ):
        answer = server.http.post("/v1/videos", json={"prompt": "x", "lora": [name]})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
    # What is gone when its turn comes is said; the service goes on.
    (folder / "style.safetensors").unlink()
    assert server.http.get("/v1/models").json()["data"][0]["loras"] == []
