"""`heterostep bench serving` against services that work, answer errors, stall, and die."""

import itertools
import json
import math
import os
import signal
import statistics
import threading

import pytest

from heterostep.benchmarks.results.result import environment
from heterostep.benchmarks.serving.report import result
from heterostep.benchmarks.serving.run import measure
from heterostep.benchmarks.serving.settings import LoadSettings
from heterostep.benchmarks.serving.workload import arrivals, bodies, units, warmups
from heterostep.errors import ConfigError
from heterostep.launch.cli import main
from video_service import fake_service

QUICK = ["--poll-interval", "0.01", "--warmup-requests", "0"]


def bench(service, tmp_path, *flags, code=0):
    """The result file of a run of the command."""
    file = tmp_path / "result.json"
    assert main(["bench", "serving", "--base-url", service.url, *QUICK, *flags, "--output-file", str(file)]) == code
    return json.loads(file.read_text())


def measured(service, **settings):
    made = LoadSettings(base_url=service.url, **{"poll_interval": 0.01, "warmup_requests": 0, **settings})
    return result(made, measure(made, lambda text: None), "heterostep bench serving", environment())


def test_a_closed_loop_has_so_many_requests_at_a_time(tmp_path, capsys):
    with fake_service(seconds=0.2) as service:
        found = bench(
            service, tmp_path, "--num-prompts", "6", "--max-concurrency", "3", "--width", "64", "--height", "48"
        )
        assert 2 <= service.most <= 3
        assert {body["size"] for body in service.bodies} == {"64x48"}
    assert (found["completed_requests"], found["completed_outputs"], found["failed_requests"]) == (6, 6, 0)
    assert found["throughput_qps"] == pytest.approx(6 / found["duration"])
    assert found["latency_mean"] > 0.2 and found["latency_p50"] == found["latency_median"]
    assert found["latency_p50"] <= found["latency_p90"] <= found["latency_p95"] <= found["latency_p99"]
    assert found["queue_time_mean"] == 0.25 and found["inference_time_mean"] == 2.0
    assert found["peak_memory_mb_max"] == 105.0 and found["peak_memory_mb_mean"] == 102.5
    assert found["stage_durations_mean"] == {"denoise": 1.5, "decode": 0.5}
    assert found["server"] == {"data": [{"id": "fake"}]} and found["schema"] == 2
    assert found["command"].startswith("heterostep bench serving --base-url")
    assert len(found["requests"]) == 6 and found["slo_attainment_rate"] is None
    shown = capsys.readouterr().out
    assert "completed requests   6" in shown and "videos per hour" in shown and "peak memory          105 MiB" in shown


def test_an_open_loop_sends_when_requests_arrive():
    with fake_service(seconds=0.3) as service:
        found = measured(service, num_prompts=8, request_rate="40")
        assert service.most >= 4  # nobody waits for another's end
    started = sorted(request["started"] for request in found["requests"])
    assert started[-1] > 0.05 and found["completed_requests"] == 8


KINDS = ("ok", "500", "429", "text", "list", "failed", "cancelled", "stall", "slow", "hang up", "lost")


def test_errors_are_counted_by_kind(tmp_path, capsys):
    with fake_service(behaviours=KINDS) as service:
        found = bench(service, tmp_path, "--num-prompts", str(len(KINDS)), "--timeout", "2", "--max-concurrency", "1")
        assert service.deleted == [str(KINDS.index("slow"))]  # a video that nobody waits for is given up
    assert found["completed_requests"] == 1 and found["failed_requests"] == len(KINDS) - 1
    assert found["errors"].pop("timeout", 0) + found["errors"].pop("stalled", 0) == 2
    assert found["errors"] == {
        "http 500": 1, "http 429": 1, "bad answer": 2, "failed": 1, "cancelled": 1, "connection": 2,
    }  # fmt: skip
    assert found["error_messages"]["failed"] == "the disk is full"
    assert "  http 429" in capsys.readouterr().out
    assert found["latency_mean"] < 1.5  # of completed requests only


def test_a_service_that_is_not_there_is_counted_and_said(tmp_path, capsys):
    with fake_service() as service:
        service.close()
        found = bench(service, tmp_path, "--num-prompts", "3", "--warmup-requests", "1", code=1)
    assert found["errors"] == {"connection": 3} and found["latency_mean"] is None and found["throughput_qps"] == 0.0
    assert [warm["error"] for warm in found["warmup"]] == ["connection"]
    assert capsys.readouterr().err.splitlines()[-1] == "heterostep: no request was completed: connection"


def test_a_service_may_die_on_the_way(tmp_path):
    with fake_service(behaviours=["ok", "slow", "slow"]) as service:
        threading.Timer(0.7, service.close).start()
        found = bench(service, tmp_path, "--num-prompts", "4", "--timeout", "20")
    assert found["completed_requests"] == 1 and found["errors"] == {"connection": 3}


def test_ctrl_c_writes_what_there_is(tmp_path, capsys):
    with fake_service(behaviours=["ok", "slow", "slow"]) as service:
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        found = bench(service, tmp_path, "--num-prompts", "9", "--max-concurrency", "2", code=130)
        assert sorted(service.deleted) == ["1", "2"]
    assert found["interrupted"] and found["completed_requests"] == 1 and found["failed_requests"] == 0
    assert (found["interrupted_requests"], found["unsent_requests"]) == (2, 6)
    output = capsys.readouterr()
    assert "2 in flight, 6 not sent" in output.out
    assert output.err.splitlines()[-1] == "heterostep: interrupted; the result has what was measured until then"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_the_warm_up(tmp_path):
    with fake_service(behaviours=["slow"]) as service:
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
        found = bench(service, tmp_path, "--warmup-requests", "1", code=130)
    assert found["interrupted"] and found["unsent_requests"] == 10 and found["warmup"][0]["error"] == "interrupted"


def test_a_limit_scales_with_the_size_of_a_request():
    mix = '[{"width": 64, "height": 64, "num_inference_steps": 4}]'
    with fake_service(seconds=0.1) as service:
        common = dict(num_prompts=2, warmup_requests=1, random_request_config=mix)
        found = measured(service, slo=True, slo_scale=5.0, **common)
        assert service.bodies[0]["num_inference_steps"] == 1 and service.bodies[1]["num_inference_steps"] == 4
        assert found["slo_attainment_rate"] == 1.0 and found["slo_met_success"] == 2
        assert measured(service, slo=True, slo_scale=0.01, **common)["slo_attainment_rate"] == 0.0
        assert measured(service, slo_seconds=30.0, num_prompts=2)["slo_attainment_rate"] == 1.0
    with fake_service(behaviours=["500"]) as service:  # no warm-up to scale
        assert measured(service, slo=True, **common)["slo_attainment_rate"] is None
    with fake_service(behaviours=["ok", "500"]) as service:
        assert measured(service, slo_seconds=30.0, num_prompts=2)["slo_attainment_rate"] == 0.5


def test_fields_go_out_as_they_are_asked_for(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    with fake_service() as service:
        measured(
            service, num_prompts=1, model="m", num_frames=9, fps=8, num_inference_steps=3, num_outputs_per_prompt=2,
            extra_body='{"seed": 5}', api_key_file=str(key), download=True,
        )  # fmt: skip
        body = service.bodies[0]
        assert service.headers[0]["Authorization"] == "Bearer secret"
        measured(service, num_prompts=1, form=True, width=64, height=48)
        assert "size=64x48" in service.bodies[1]["form"]
    assert isinstance(body.pop("prompt"), str)
    assert body == {
        "model": "m", "num_frames": 9, "fps": 8, "num_inference_steps": 3, "num_outputs_per_prompt": 2, "seed": 5,
    }  # fmt: skip


def test_prompts_come_from_a_file(tmp_path):
    manifest, vbench = tmp_path / "lines", tmp_path / "full.json"
    manifest.write_text('a cat\n\n{"prompt": "a dog", "seed": 3, "width": 32, "height": 16}\n')
    settings = dict(dataset="manifest", dataset_path=str(manifest), num_prompts=3)
    assert bodies(LoadSettings(**settings)) == [
        {"prompt": "a cat"}, {"prompt": "a dog", "seed": 3, "size": "32x16"}, {"prompt": "a cat"},
    ]  # fmt: skip
    vbench.write_text('[{"prompt_en": "a boat", "dimension": ["scene"]}]')
    assert bodies(LoadSettings(dataset="vbench", dataset_path=str(vbench), num_prompts=1)) == [{"prompt": "a boat"}]
    for content in ("", '{"text": 1}', "{", "\0[1]"):
        vbench.write_text(content)
        with pytest.raises(ConfigError, match="dataset_path"):
            bodies(LoadSettings(dataset="vbench", dataset_path=str(vbench)))
    with pytest.raises(ConfigError, match="cannot be read"):
        bodies(LoadSettings(dataset="manifest", dataset_path=str(tmp_path / "none")))


def test_arrivals_have_the_rate_and_are_the_same_for_a_seed():
    settings = LoadSettings(request_rate="2", num_prompts=4000)
    times = arrivals(settings)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0 and times == arrivals(settings)
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.1)  # a Poisson process
    bursts = arrivals(LoadSettings(request_rate="2", num_prompts=4000, burstiness=0.25))
    assert statistics.stdev([b - a for a, b in itertools.pairwise(bursts)]) == pytest.approx(1.0, rel=0.2)
    assert arrivals(LoadSettings(num_prompts=3)) == [0.0, 0.0, 0.0]


def test_a_mix_follows_its_weights():
    mix = json.dumps([{"weight": 3, "width": 64, "height": 64}, {"weight": 1, "num_frames": 121}])
    made = bodies(LoadSettings(num_prompts=400, random_request_config=mix, num_frames=81))
    assert 60 < sum(body["num_frames"] == 121 for body in made) < 140
    assert units({"size": "64x64", "num_frames": 9}) == 64 * 64 * 9 and units({}) is None
    assert warmups(LoadSettings(warmup_requests=2), {"prompt": "x"}) == [{"prompt": "x", "num_inference_steps": 1}] * 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"request_rate": "fast"}, "request_rate must be inf or a number above 0"),
        ({"request_rate": "-1"}, "request_rate must be inf"),
        ({"dataset": "vbench"}, "needs a file"),
        ({"width": 64}, "belong together"),
        ({"slo": True, "warmup_requests": 0}, "--slo needs a warm-up"),
        ({"extra_body": "[1]"}, "must be a JSON object"),
        ({"extra_body": "{"}, "must be JSON"),
        ({"random_request_config": '[{"steps": 3}]'}, "must be a JSON list"),
        ({"random_request_config": '[{"width": 3}]'}, "width and height together"),
        ({"random_request_config": "3"}, "must be a JSON list"),
        ({"base_url": "gpu1:8000"}, "must begin with http"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ConfigError, match=says):
        LoadSettings(**settings)


def test_defaults_of_the_loops():
    assert LoadSettings().at_a_time == 1 and math.isinf(LoadSettings().rate)
    assert (
        LoadSettings(request_rate="3").at_a_time == 10
        and LoadSettings(request_rate="3", max_concurrency=2).at_a_time == 2
    )
    assert LoadSettings(host="gpu1", port=30000).url == "http://gpu1:30000"


def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path):
    with fake_service() as service:
        flags = ["bench", "serving", "--base-url", service.url, "--output-file", str(tmp_path / "none" / "r.json")]
        assert main(flags) == 2
        assert not service.bodies
        assert main(["bench", "serving", "--base-url", service.url, "--api-key-file", str(tmp_path / "none")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
