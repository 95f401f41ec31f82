"""The parts of the service that need neither HTTP nor a model."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from heterostep.engine.config import EngineConfig
from heterostep.engine.denoise.checks import rehearse
from heterostep.engine.facts import read_facts
from heterostep.engine.request import GenerateRequest, resolve
from heterostep.errors import BadField, ConfigError, RequestError
from heterostep.hsa.config import HSAConfig
from heterostep.launch.logs import LOGGER, JsonLines, say
from heterostep.launch.service import runner
from heterostep.launch.service.access import ApiKeys, check_origin
from heterostep.launch.service.bodies import CreateVideo
from heterostep.launch.service.database import Lease, is_held
from heterostep.launch.service.metrics import COUNTERS, HISTOGRAMS, Metrics
from heterostep.launch.service.requests import Asked, surely_met, to_request
from heterostep.launch.service.results import clean_up, complete, is_complete, read_manifest
from heterostep.launch.service.runner import Pauses, Runner
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings, check_degrees, limits_for, public_name
from heterostep.launch.service.store import JobStore
from heterostep.launch.workers.messages import FILES, Outcome

FACTS = read_facts("demo")


def wanted(tmp_path, settings=None, policy="joint", **fields):
    settings = settings or ServiceSettings(data_dir=tmp_path)
    engine = EngineConfig(hsa=HSAConfig(policy=policy))
    asked = Asked(CreateVideo(prompt="x", **fields), "")
    plan = {"share": {"compute": 0.5}, "engine": engine, "every": 5}
    return to_request(asked, model="demo", facts=FACTS, limits=limits_for(settings, FACTS), **plan)[0]


# Requests.


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({}, 17), ({"seconds": "2"}, 17), ({"seconds": 2}, 17), ({"seconds": "2.2"}, 19), ({"seconds": "0.01"}, 1),
        ({"seconds": "4", "fps": 4}, 17), ({"num_frames": 9}, 9), ({"seconds": "", "num_frames": 9}, 9),
    ],
)  # fmt: skip
def test_seconds_become_frames(tmp_path, fields, frames):
    assert wanted(tmp_path, **fields).num_frames == frames


def test_what_is_left_out_is_filled_in(tmp_path):
    first, second = wanted(tmp_path), wanted(tmp_path)
    assert (first.width, first.num_inference_steps, first.compute) == (64, 40, 0.5)
    assert first.seed != second.seed and 0 <= first.seed < 2**31
    assert wanted(tmp_path, seed=5, compute=1.0, size="32x48").seed == 5
    promised = wanted(tmp_path, quality="high")
    assert (promised.quality, promised.compute) == (55.0, None)
    with pytest.raises(BadField) as caught:
        wanted(tmp_path, policy="tokens", quality=40)
    assert caught.value.param == "quality"


def test_what_the_first_step_alone_costs_is_asked_for(tmp_path):
    for fields, least in (
        ({"compute": 0.001}, "0.025"),
        ({"num_inference_steps": 1, "compute": 0.5}, "1"),
        ({"compute": 0.0249}, "0.025"),
    ):
        with pytest.raises(BadField, match=rf"ask for at least compute={least}, ") as caught:
            wanted(tmp_path, **fields)
        assert caught.value.param == "compute"
    assert wanted(tmp_path, compute=0.025).compute == 0.025
    assert wanted(tmp_path, num_inference_steps=1, compute=1.0).num_inference_steps == 1


def test_limits_of_the_settings_and_of_the_model(tmp_path):
    assert limits_for(ServiceSettings(data_dir=tmp_path), FACTS).pixels == 4 * 64 * 64 * 17
    tight = ServiceSettings(data_dir=tmp_path, max_pixels=1000, max_frames=9, max_steps=10, max_prompt=5)
    for fields, param in (
        ({"num_inference_steps": 11}, "num_inference_steps"),
        ({"num_frames": 11, "num_inference_steps": 1}, "num_frames"),
        ({"num_frames": 9, "num_inference_steps": 1}, "size"),
        ({"negative_prompt": "123456"}, "negative_prompt"),
    ):
        with pytest.raises(BadField) as caught:
            wanted(tmp_path, tight, **fields)
        assert caught.value.param == param
    with pytest.raises(RequestError, match="frames"):
        wanted(tmp_path, num_frames=10**12 + 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"shard_weights": 1}, "shard_weights"), ({"ranks": 1.5}, "ranks"), ({"replicas": 0}, "replicas"),
        ({"root_path": "video"}, "such as /video"), ({"max_queue": 0}, "max_queue"),
        ({"keep_days": 0.0}, "keep_days"), ({"keep_gib": float("nan")}, "keep_gib"),
    ],
)  # fmt: skip
def test_settings_are_checked(tmp_path, fields, says):
    with pytest.raises(ConfigError, match=says):
        ServiceSettings(data_dir=tmp_path, **fields)


def test_a_data_directory_that_cannot_be_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        ServiceSettings(data_dir=tmp_path / "file" / "data")


def test_the_api_does_not_tell_where_a_model_lies(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert public_name(str(tmp_path / "my-model")) == "my-model"
    assert public_name("demo") == "demo" and public_name("owner/name") == "owner/name"


# Who may call.


def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        "# comment\n\nalice  alice-key-0123456789  # hers\nbob bob-key-0123456789abc\nunnamed-key-0123456\n"
    )
    keys = ApiKeys.read(file)
    assert keys.owner("Bearer alice-key-0123456789") == "alice" and keys.owner("bearer bob-key-0123456789abc") == "bob"
    assert len(keys.owner("Bearer unnamed-key-0123456")) == 16
    for header in (None, "", "Bearer", "Bearer ", "Bearer alice", "Basic alice-key-0123456789", "alice-key-0123456789"):
        assert keys.owner(header) is None
    assert "alice-key" not in repr(vars(keys))


@pytest.mark.parametrize("text", ["", "# only a comment", "short", "a b c", "k" * 20 + "\n" + "k" * 20, "\xff"])
def test_key_files_that_are_none(tmp_path, text):
    file = tmp_path / "keys"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        ApiKeys.read(file)
    assert "kkkk" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "origin", "allowed", "welcome"),
    [
        ("localhost:8000", None, ("localhost",), True),
        ("LOCALHOST:8000", "http://localhost:8000", ("localhost",), True),
        ("[::1]:8000", "http://[::1]:8000", ("[::1]",), True),
        ("rebound.evil.example:8000", "http://rebound.evil.example:8000", ("localhost",), False),
        ("localhost:8000", "http://localhost:9000", ("localhost",), False),
        ("localhost:8000", "null", ("localhost",), False),
        ("localhost:8000", "http://[::1", ("localhost",), False),
        ("", None, ("localhost",), False),
        ("videos.example", "https://videos.example", (), True),
        ("videos.example", "https://evil.example", (), False),
    ],
)
def test_where_a_request_may_come_from(host, origin, allowed, welcome):
    assert (check_origin(host, origin, allowed) is None) == welcome


# Leases.


def test_a_lease_is_free_as_soon_as_its_process_is_dead(tmp_path):
    mine = Lease(tmp_path)
    assert is_held(tmp_path, mine.name) and not is_held(tmp_path, "never")
    code = (
        "import sys, time; from pathlib import Path; from heterostep.launch.service.database import Lease\n"
        "lease = Lease(Path(sys.argv[1])); print(lease.name, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    name = other.stdout.readline().strip()
    assert is_held(tmp_path, name)
    other.kill()
    other.wait()
    assert not is_held(tmp_path, name)
    mine.release()
    assert not is_held(tmp_path, mine.name) and list(tmp_path.iterdir()) == []


def test_a_lease_that_is_swept_away_before_it_is_locked_is_taken_again(tmp_path, monkeypatch):
    flock, swept = fcntl.flock, []

    def unlucky(file, how):
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", unlucky)
    lease = Lease(tmp_path)
    assert swept and is_held(tmp_path, lease.name)
    lease.release()


# Results and what is kept of them.


def attempt(folder, text="v"):
    folder.mkdir()
    (folder / "video.mp4").write_text(text)
    return folder


def test_a_result_is_whole_or_not_there(tmp_path):
    target = tmp_path / "job"
    assert not is_complete(target)
    complete(attempt(tmp_path / ".job.1"), target, {"hsa": {"a": 1}, "timing": {"total": 1.0}})
    assert is_complete(target) and read_manifest(target)["hsa"] == {"a": 1}
    complete(
        attempt(tmp_path / ".job.2", "again"), target, {"hsa": {}, "timing": {"total": 1.0}}
    )  # of an attempt that could not be recorded
    assert (target / "video.mp4").read_text() == "again" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="JSON"):
        complete(attempt(tmp_path / ".job.3"), target, {"hsa": float("nan")})
    assert is_complete(target)


def finished(store, settings, id, size, age):
    request = resolve(GenerateRequest(prompt="x", compute=0.5), FACTS)
    store.create(id=id, owner="", model="demo", request=request, max_queue=100)
    job = store.claim("me", "demo")
    store.finish(job, "completed", bytes=size)
    store._db.execute("UPDATE jobs SET completed_at = ? WHERE id = ?", (time.time() - age, id))
    video = attempt(settings.results / id, "v" * size) / "video.mp4"
    os.utime(video, (time.time() - age,) * 2)
    (settings.state / id).mkdir()


def test_old_and_too_many_results_are_removed(tmp_path):
    settings = ServiceSettings(data_dir=tmp_path, keep_days=1.0, keep_gib=1e-6)  # 1073 bytes
    store = JobStore(settings.database)
    for id, size, age in (("a", 100, 90_000), ("b", 600, 300), ("c", 500, 200), ("d", 500, 100)):
        finished(store, settings, id, size, age)
    clean_up(settings, store)
    assert store.known() == {"c", "d"}  # a was too old; without b the rest has room
    assert {path.name for path in settings.results.iterdir()} == {"c", "d"}
    assert list(settings.state.iterdir()) == []
    store.delete("c", "")
    (settings.results / ".video_x.1.deadbeef").mkdir()
    living = Lease(settings.leases)
    (settings.results / f".video_y.1.{living.name}").mkdir()
    clean_up(settings, store)
    assert {path.name for path in settings.results.iterdir()} == {"d", f".video_y.1.{living.name}"}
    living.release()
    store.close()


# Metrics and logs.


def test_metrics_add_up_and_begin_anew(tmp_path):
    metrics = Metrics()
    for seconds in (0.005, 0.05, 0.5, 5000.0):
        metrics.observe("heterostep_step_seconds", seconds)
    metrics.observe("heterostep_stage_seconds", 2.0, stage='odd "name"')
    metrics.count("heterostep_recoveries", cause="died")
    metrics.count("heterostep_recoveries", cause="died")
    text = metrics.text().decode()
    assert 'heterostep_recoveries_total{cause="died"} 2.0' in text
    assert 'heterostep_step_seconds_bucket{le="0.1"} 2.0' in text
    assert 'heterostep_step_seconds_bucket{le="+Inf"} 4.0' in text
    assert "heterostep_step_seconds_sum 5000.555" in text
    assert "heterostep_recoveries_total{" not in Metrics().text().decode()


def test_replicas_behind_one_address_are_told_apart():
    texts = [Metrics(replica).text().decode() for replica in ("a", "b")]
    assert 'heterostep_step_seconds_bucket{le="0.1",replica="a"} 0.0' in texts[0]
    told = [{line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")} for text in texts]
    assert told[0] and not told[0] & told[1]


def test_pauses_grow_to_a_minute_and_no_further(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pauses = Pauses()
    assert pauses.over
    for pause in [1, 2, 4, 8, 16, 32, *[60] * 2000]:  # more than a float has powers of two
        pauses.failed()
        now[0] += pause - 0.5
        assert not pauses.over
        now[0] += 0.5
        assert pauses.over
    pauses.succeeded()
    pauses.failed()
    now[0] += 1
    assert pauses.over


def test_logs_are_one_line_of_json(caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        say("job begun", job="video_1", text="two\nlines")
    line = JsonLines().format(caplog.records[-1])
    assert "\n" not in line
    record = json.loads(line)
    assert record["event"] == "job begun" and record["job"] == "video_1" and record["level"] == "info"
    assert record["time"].endswith("+00:00")


def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path):
    store, metrics = JobStore(tmp_path / "jobs.sqlite3"), Metrics()
    for name in COUNTERS:
        metrics.count(name, **dict.fromkeys(COUNTERS[name][1], "x"))
    for name in HISTOGRAMS:
        metrics.observe(name, 0.5, **dict.fromkeys(HISTOGRAMS[name][1], "x"))
    runner = Runner(ServiceSettings(data_dir=tmp_path))
    metrics.watch(store, [runner])
    told = family(re.findall(r"^(heterostep_\w+)", metrics.text().decode(), re.M))
    store.close()
    dashboard = (Path(__file__).parents[3] / "docs" / "grafana.json").read_text()
    targets = [target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel["targets"]]
    assert family(re.findall(r"heterostep_\w+", " ".join(targets))) == told


def family(names):
    return {re.sub("_(total|bucket|sum|count)$", "", name) for name in names}


# What is refused before it costs anything.


def test_a_share_that_the_policy_cannot_meet_is_refused_when_it_is_sent(tmp_path):
    # Steps after a checkpoint are full where tokens are left out: the planner's own words, before a model is loaded.
    with pytest.raises(BadField, match=r"follow a checkpoint.*checkpoint_every than 5") as caught:
        wanted(tmp_path, policy="tokens", compute=0.15, num_inference_steps=20)
    assert caught.value.param == "compute"
    assert wanted(tmp_path, compute=0.15, num_inference_steps=20).compute == 0.15


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups", "steps"])
def test_the_planner_takes_what_is_surely_met(policy):
    """Without asking it, most requests are known to be met: PyTorch is not loaded for them."""
    known = 0
    for steps, compute, every in itertools.product((8, 21, 40), (0.25, 0.33, 0.5, 1.0), (1, 2, 5, 50)):
        for windows in ({}, {"warmup": 2, "cooldown": 1}):
            hsa = HSAConfig(policy=policy, compute=compute, **windows)
            if surely_met(hsa, steps, every):
                known += 1
                request = resolve(GenerateRequest(prompt="-", num_inference_steps=steps), FACTS)
                rehearse(FACTS, hsa, request, every)
    assert known > 20
    assert surely_met(HSAConfig(policy=policy), 40, 5)


def test_a_service_whose_usual_request_cannot_be_met_does_not_start(tmp_path):
    with pytest.raises(ConfigError, match=r"compute=0\.01 cannot be met with 40 steps"):
        VideoService(ServiceSettings(data_dir=tmp_path, engine=EngineConfig(hsa=HSAConfig(compute=0.01))))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ulysses": 3}, "ulysses 3 on 2 rank.* cfg x ring x ulysses may be 2 x 1 x 1, 1 x 1 x 2, 1 x 2 x 1"),
        ({"cfg": 2, "ring": 2}, "cfg 2 x ring 2 on 2 rank"),
        ({"windows": 3}, "windows must divide"),
    ],
)
def test_a_service_with_degrees_that_its_ranks_cannot_have_does_not_start(tmp_path, asked, says):
    with pytest.raises(ConfigError, match=says):
        VideoService(ServiceSettings(data_dir=tmp_path, ranks=2, degrees=asked))
    check_degrees(ServiceSettings(data_dir=tmp_path, ranks=4, degrees={"cfg": 2, "kernel": "auto"}), FACTS)


def test_a_video_whose_results_cannot_be_written_is_kept(tmp_path, monkeypatch, caplog):
    folder, kept = tmp_path / ".video_1.2.lease", tmp_path / "kept"
    kept.mkdir()  # the other is gone
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(kept))
    caplog.set_level(logging.INFO, LOGGER)
    outcome = Outcome(files={name: b"content" for name, _ in FILES.values()})
    with pytest.raises(RequestError, match=r"is made, but .* could not be written \(No such file") as refused:
        runner._write_files(folder, outcome)
    (path,) = kept.iterdir()
    assert path.name == "heterostep-video_1.2.lease.mp4" and path.read_bytes() == b"content"
    (record,) = [record for record in caplog.records if record.getMessage() == "results cannot be written"]
    assert record.fields["video"] == str(path) and str(path) not in str(refused.value)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):  # waited for
            runner._write_files(folder, outcome)
