"""What users set on a pipeline, set by a request or an engine: the same video as the stock pipeline's with the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess

import pytest
import torch
from diffusers import LTX2Pipeline, TorchAoConfig, WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from safetensors.torch import load_file, save_file

import forked
import heterostep as hs
from folders import complete_pipeline
from folders_ltx2 import complete_ltx2
from heterostep.engine.checkpoint import differences, identity_of
from heterostep.engine.decoding import find_finished
from heterostep.engine.defaults import DEFAULTS
from heterostep.engine.facts import read_facts
from heterostep.engine.lora import Lora, parse_lora
from heterostep.engine.record import run_record
from heterostep.engine.request import resolve
from heterostep.launch.cli import main
from tiny import lora_weights
from tiny_ltx2 import GUIDANCE

SMALL = {"prompt": "a red disc", "width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, by kind."""
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = folder / kind
            pipe = complete_ltx2() if kind == "ltx2" else complete_pipeline(kind)
            pipe.save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="module")
def loras(tmp_path_factory, models):
    """Files of LoRA weights, by the kind of model and a number."""
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")
    folder = tmp_path_factory.mktemp("loras")

    def get(kind, number):
        path = folder / f"{kind}-{number}.safetensors"
        if not path.exists():
            pipe = (LTX2Pipeline if kind == "ltx2" else WanPipeline).from_pretrained(models(kind))
            save_file(lora_weights(pipe.transformer, seed=number), path)
        return path

    return get


def engine(folder, **settings):
    return hs.Engine(hs.EngineConfig(model=str(folder), device="cpu", **settings))


def request(**changes):
    return hs.GenerateRequest(**{**SMALL, "seed": 3, "compute": 1.0, **changes})


def stock(folder, change=lambda pipe: None, output_type="latent", **arguments):
    """What diffusers alone makes of `request`, once `change` has been done to its pipeline."""
    ltx = (folder / "audio_vae").exists()
    pipe = (LTX2Pipeline if ltx else WanPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    change(pipe)
    scale = DEFAULTS["LTX-2 small" if ltx else "Wan small"].guidance_scale
    more = {"frame_rate": 8.0, "audio_guidance_scale": None, **GUIDANCE["2.0"]} if ltx else {}
    asked = {"negative_prompt": "", "guidance_scale": scale, **more, **SMALL, **arguments}
    generator = torch.Generator("cpu").manual_seed(3)
    return pipe(**asked, generator=generator, output_type=output_type).frames


def scaled(path, scale, **options):
    def change(pipe):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a", **options)
        pipe.set_adapters("a", scale)

    return change


@pytest.mark.parametrize("kind", ["unipc", "ti2v5b", "ltx2"])
def test_a_lora_is_that_of_the_stock_pipeline(models, loras, kind):
    path, own = loras(kind, 1), engine(models(kind))
    plain = own.generate(request()).latents
    expected = stock(models(kind), scaled(path, 0.7))
    assert torch.equal(own.generate(request(lora=(f"{path}:0.7",))).latents, expected)
    assert not torch.equal(plain, expected)
    # One request's weights are not the next one's.
    assert torch.equal(own.generate(request()).latents, plain)
    partial = own.generate(request(lora=(f"{path}:0.7",), compute=0.75, num_inference_steps=8))
    assert partial.report.compute == pytest.approx(0.75, abs=0.03)


def test_several_loras_and_both_experts(models, loras):
    one, two, folder = loras("wan22", 1), loras("wan22", 2), models("wan22")
    own = engine(folder)

    def change(pipe):
        for path, name, second in ((one, "a", False), (two, "b", True)):
            pipe.load_lora_weights(
                path.parent, weight_name=path.name, adapter_name=name, load_into_transformer_2=second
            )
        pipe.transformer.set_adapters(["a"], [0.5])
        pipe.transformer_2.set_adapters(["b"], [1.0])

    found = own.generate(request(lora=(f"{one}:0.5:high", f"{two}:low"))).latents
    assert torch.equal(found, stock(folder, change))

    def both(pipe):
        for number, path in enumerate((one, two)):
            for second in (False, True):
                options = {"weight_name": path.name, "load_into_transformer_2": second}
                pipe.load_lora_weights(path.parent, adapter_name=str(number), **options)
        pipe.set_adapters(["0", "1"], [0.5, 0.25])

    # Without an expert the weights are for all transformers.
    found = own.generate(request(lora=(f"{one}:0.5", f"{two}:0.25"))).latents
    assert torch.equal(found, stock(folder, both))


def test_a_lora_belongs_to_the_job(models, loras, tmp_path):
    path = tmp_path / "style.safetensors"
    shutil.copy(loras("unipc", 1), path)
    own, job = engine(models("unipc")), hs.JobConfig(folder=tmp_path / "job", checkpoint_every=1)
    asked = request(lora=(f"{path}:0.7",))
    made = own.generate(asked, job)
    found = find_finished(own.config, asked, job)
    assert torch.equal(found.video.latents, made.latents)
    assert found.record["request"]["lora"] == ["style:0.7"]  # without folders
    # The same weights in another place are the same job; other weights, or another strength, are not.
    moved = shutil.copy(path, tmp_path / "moved.safetensors")
    assert find_finished(own.config, request(lora=(f"{moved}:0.7",)), job) is not None
    shutil.copy(loras("unipc", 2), path)
    for lora in ((f"{path}:0.7",), (f"{moved}:0.6",), ()):
        with pytest.raises(hs.ConfigError, match="LoRA"):
            find_finished(own.config, request(lora=lora), job)
    # The engine sees that the file is another one.
    assert not torch.equal(own.generate(asked).latents, made.latents)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", Lora("style.safetensors", 1.0, None)),
        ("a/b.safetensors:0.5", Lora("a/b.safetensors", 0.5, None)),
        ("owner/name/f.safetensors:-1:high", Lora("owner/name/f.safetensors", -1.0, 0)),
        ("x:low", Lora("x", 1.0, 1)),
    ],
)
def test_the_form_of_a_lora(text, expected):
    assert parse_lora(text) == expected


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:b", "a:nan", "a:1:middle", "a:1:2:high:low"])
def test_another_form_is_refused(text):
    with pytest.raises(hs.RequestError, match="FILE_OR_ID"):
        request(lora=(text,))


def test_bad_loras_are_refused(models, loras, tmp_path):
    own = engine(models("unipc"))
    (tmp_path / "text.safetensors").write_text("nothing")
    (tmp_path / "lora.bin").write_bytes(b"")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    foreign = {"transformer.blocks.0.attn9.to_q.lora_A.weight": torch.zeros(2, 7)}
    save_file(
        foreign | {"transformer.blocks.0.attn9.to_q.lora_B.weight": torch.zeros(7, 2)}, tmp_path / "foreign.safetensors"
    )
    before = own.generate(request()).latents
    for name, said in (
        ("absent.safetensors", "no LoRA file"),
        ("text.safetensors", "cannot be read"),
        ("lora.bin", "must be a .safetensors"),
        ("other.safetensors", "holds no LoRA weights"),
        ("foreign.safetensors", "model"),
    ):
        with pytest.raises(hs.RequestError, match=said) as error:
            own.generate(request(lora=(str(tmp_path / name),)))
        assert "\n" not in str(error.value)
    with pytest.raises(hs.RequestError, match="Hugging Face Hub"):
        own.generate(request(lora=("nobody/nothing/here.safetensors",)))
    wrong_size = {key: tensor[..., :-1] for key, tensor in load_file(loras("unipc", 1)).items()}
    save_file({key: tensor.contiguous() for key, tensor in wrong_size.items()}, tmp_path / "small.safetensors")
    with pytest.raises(hs.RequestError, match="cannot be loaded"):
        own.generate(request(lora=(str(tmp_path / "small.safetensors"),)))
    assert torch.equal(own.generate(request()).latents, before)
    with pytest.raises(hs.RequestError, match="names an expert"):
        own.generate(request(lora=("x.safetensors:1:high",)))
    # What users load into the pipeline themselves is theirs.
    own.pipeline.load_lora_weights(str(loras("unipc", 2)), adapter_name="mine")
    by_hand = own.generate(request()).latents
    assert not torch.equal(by_hand, before)
    with pytest.raises(hs.RequestError, match="by hand"):
        own.generate(request(lora=(str(loras("unipc", 1)),)))
    assert torch.equal(own.generate(request()).latents, by_hand)


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm++"])
def test_the_shift_is_that_of_the_stock_scheduler(models, kind):
    def change(pipe):
        name = "shift" if kind == "euler" else "flow_shift"
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{name: 9.0})

    own, expected = engine(models(kind)), stock(models(kind), change)
    found = own.generate(request(flow_shift=9))
    assert torch.equal(found.latents, expected)
    assert torch.equal(own.generate(request()).latents, stock(models(kind)))
    # It reaches the plan, and the scheduler that --solver puts in place of the pipeline's.
    config = hs.HSAConfig(compute=0.6, solver="euler")
    shifted = engine(models(kind), hsa=config).generate(request(compute=0.6, num_inference_steps=8, flow_shift=9))
    sigmas = [step.sigma for step in shifted.report.steps]
    assert sigmas[4] > 0.85  # with the model's own shift of 3: .75


def test_ltx2_has_no_shift(models):
    with pytest.raises(hs.RequestError, match="follow from the video's size"):
        engine(models("ltx2")).generate(request(flow_shift=3))


def test_the_default_negative_prompt_is_the_maker_s(models, tmp_path):
    folder = tmp_path / "as 1.3B"
    shutil.copytree(models("unipc"), folder)
    facts = dataclasses.replace(read_facts(str(folder)), family="Wan 1.3B")
    assert "低质量" in resolve(request(), facts).negative_prompt
    assert resolve(request(negative_prompt=""), facts).negative_prompt == ""
    assert resolve(request(negative_prompt="fog"), facts).negative_prompt == "fog"
    ltx = dataclasses.replace(read_facts(str(models("ltx2"))), family="LTX-2")
    assert "blurry" in resolve(request(), ltx).negative_prompt
    # Small models have nobody's.
    assert resolve(request(), read_facts("demo")).negative_prompt == ""


@pytest.mark.parametrize("kind", ["unipc", "ltx2"])
def test_an_attention_kernel_is_that_of_the_stock_pipeline(models, kind):
    def change(pipe):
        pipe.transformer.set_attention_backend("_native_math")
        _AttentionBackendRegistry.set_active_backend("native")  # diffusers changes it for all models

    expected = stock(models(kind), change)
    own = engine(models(kind), attention="math")
    assert torch.equal(own.generate(request()).latents, expected)
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"
    own.generate(request(compute=0.75, num_inference_steps=8))
    assert not torch.equal(stock(models(kind)), expected)


@pytest.mark.parametrize(("attention", "said"), [("cudnn", "needs a GPU"), ("flash", "needs a GPU")])
def test_a_kernel_that_is_not_here_is_refused_before_loading(models, attention, said, monkeypatch):
    monkeypatch.setattr("heterostep.engine.loading._load_networks", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(hs.ConfigError, match=said):
        engine(models("unipc"), attention=attention)


@pytest.mark.parametrize("settings", [{"attention": "math"}, {"attention": "nothing"}])
def test_kernels_of_one_rank_are_refused_on_several(settings):
    with pytest.raises(hs.ConfigError, match="attention"):
        hs.EngineConfig(parallel=hs.ParallelConfig(ulysses=2), **settings)


@pytest.mark.parametrize("ranks", [(), ("--nproc", "2", "--ulysses", "2")])
def test_the_command_has_them_too(models, loras, tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)
    path, folder = loras("unipc", 1), models("unipc")
    asked = ["--prompt", SMALL["prompt"], "--size", "64x32", "--frames", "5", "--steps", "3", "--seed", "3"]
    flags = ["--lora", f"{path}:0.7", "--flow-shift", "9", "--negative-prompt", "fog", "--compute", "1", "--vae-tiling"]
    flags += [] if ranks else ["--attention", "math"]
    files = ["--latents", str(tmp_path / "l.safetensors"), "--output", str(tmp_path / "v.mp4")]
    assert main(["generate", "--model", str(folder), "--device", "cpu", *asked, *flags, *files, *ranks]) == 0

    def change(pipe):
        scaled(path, 0.7)(pipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=9.0)
        if not ranks:
            pipe.transformer.set_attention_backend("_native_math")
            _AttentionBackendRegistry.set_active_backend("native")

    found = load_file(tmp_path / "l.safetensors")["latents"]
    expected = stock(folder, change, negative_prompt="fog")
    assert torch.equal(found, expected) if not ranks else torch.allclose(found, expected, atol=1e-4)


def test_tiles_are_those_of_the_stock_vae(models):
    wide = {"width": 320, "height": 32}
    expected = stock(models("unipc"), lambda pipe: pipe.vae.enable_tiling(), "np", **wide)
    own = engine(models("unipc"), vae_tiling=True)
    assert (own.generate(request(**wide)).frames == (expected[0] * 255).round()).all()
    plain = stock(models("unipc"), output_type="np", **wide)
    assert not (plain == expected).all()


def test_compiled_blocks_are_those_of_the_stock_pipeline(models, monkeypatch):
    torch._dynamo.reset()
    compiled = []
    monkeypatch.setattr(
        "diffusers.WanTransformer3DModel.compile_repeated_blocks",
        lambda model, **options: (
            compiled.append(options) or [block.compile(backend="eager", **options) for block in model.blocks]
        ),
    )
    try:
        expected = stock(models("unipc"), lambda pipe: pipe.transformer.compile_repeated_blocks(dynamic=True))
        own = engine(models("unipc"), compile=True)
        assert compiled == [{"dynamic": True}] * 2
        assert torch.allclose(own.generate(request()).latents, expected, atol=1e-5)
        own.generate(request(compute=0.7, num_inference_steps=4))
    finally:
        torch._dynamo.reset()


def test_compilation_without_a_compiler_is_refused(models, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(hs.ConfigError, match="C\\+\\+ compiler"):
        engine(models("unipc"), compile=True)


def test_what_changes_values_is_part_of_the_job(models):
    facts = read_facts(str(models("unipc")))

    def identity(**settings):
        config = hs.EngineConfig(model=str(models("unipc")), **settings)
        found = identity_of(facts, resolve(request(), facts), None, torch.float32, config=config)
        return json.loads(json.dumps(found))

    usual = identity()
    older = {name: value for name, value in usual.items() if name != "engine"}
    assert differences(older, usual) == []
    for settings in ({"attention": "math"}, {"compile": True}, {"vae_tiling": True}):
        (said,) = differences(usual, identity(**settings))
        assert next(iter(settings)) in said
    record = run_record(own := engine(models("unipc"), attention="math"), own.generate(request()))
    assert record["acting"]["kernel"] == "math"


@pytest.mark.parametrize("kind", ["unipc", "wan22", "ti2v5b", "ltx2"])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloaded_weights_change_nothing(models, loras, kind, offload):
    own = engine(models(kind), offload=offload)
    expected = stock(models(kind))
    assert torch.equal(own.generate(request()).latents, expected)
    partial = own.generate(request(compute=0.75, num_inference_steps=8))
    assert partial.report.compute == pytest.approx(0.75, abs=0.03)
    # LoRA weights come and go.
    if kind == "unipc":
        path = loras(kind, 1)
        found = own.generate(request(lora=(f"{path}:0.7",))).latents
        assert torch.equal(found, stock(models(kind), scaled(path, 0.7)))
    assert torch.equal(own.generate(request()).latents, expected)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_weights_are_those_of_the_stock_pipeline(models, loras, kind):
    reason = "torchao is not installed, and no part of the extra 'dev'"
    ao = pytest.importorskip("torchao.quantization", reason=reason)
    folder, path = models("unipc"), loras("unipc", 1)
    how = TorchAoConfig(ao.Int8WeightOnlyConfig() if kind == "int8" else ao.Float8WeightOnlyConfig())

    def change(pipe):
        pipe.transformer = WanTransformer3DModel.from_pretrained(
            folder / "transformer", dtype=torch.float32, quantization_config=how
        )

    own, expected = engine(folder, quantize=kind), stock(folder, change)
    assert torch.equal(own.generate(request()).latents, expected)
    assert not torch.equal(stock(folder), expected)
    both = own.generate(request(lora=(f"{path}:0.7",))).latents
    assert torch.equal(both, stock(folder, lambda pipe: (change(pipe), scaled(path, 0.7)(pipe))))
    # The same settings are the same job, in another engine too.
    found = []
    for one in (own, engine(folder, quantize=kind)):
        one.generate(request())
        asked = resolve(request(), one.facts)
        found.append(identity_of(one.facts, asked, None, one.dtype, one.pipeline, one.config))
    assert differences(*found) == []


def test_quantization_without_its_package_is_refused(models, monkeypatch):
    monkeypatch.setattr("heterostep.engine.features.find_spec", lambda name: None)
    with pytest.raises(hs.ConfigError, match=r"needs torchao.*heterostep\[quantize\]"):
        engine(models("unipc"), quantize="int8")


@pytest.mark.parametrize("settings", [{"quantize": "int8"}, {"offload": "group"}, {"compile": True}])
def test_what_sharded_weights_cannot_have_is_refused(settings):
    with pytest.raises(hs.ConfigError, match=f"{next(iter(settings))} does not work with shard_weights"):
        hs.EngineConfig(parallel=hs.ParallelConfig(ulysses=2), shard_weights=True, **settings)
