"""A job store that was damaged, lost or put back: no video is lost, and the queue runs; and files that are gone."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import sqlite3

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from heterostep.engine.request import ResolvedRequest
from heterostep.errors import ConfigError, StoreUnavailable
from heterostep.launch.cli import main
from heterostep.launch.logs import LOGGER
from heterostep.launch.service.database import Database
from heterostep.launch.service.results import MANIFEST, clean_up
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings
from heterostep.launch.service.store import JobStore
from quick import Quick, answers, finished, full_database, listed, submit


def files(data_dir):
    folder = data_dir / "results"
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A data directory with four videos, one of an older version, and a job of each other status; and an old backup."""
    folder = tmp_path_factory.mktemp("store") / "data"
    settings = ServiceSettings(data_dir=folder)
    service = VideoService(settings, Quick)
    service.start()
    done = []
    for n in range(4):
        done.append(submit(service, f"done {n} {'long ' * 300}"))
        finished(service, done[-1])
        if n == 1:
            copy = sqlite3.connect(folder.with_name("backup"))
            service._store._db._connection.backup(copy)
            copy.close()
    request = service._store.get(done[0], "").request
    service.stop()
    # As a version made it that wrote no job into the manifest.
    target = settings.results / done[3]
    manifest = json.loads((target / MANIFEST).read_text())
    del manifest["job"]
    (target / MANIFEST).write_text(json.dumps(manifest))
    (target / "report.json").write_text(json.dumps({"model": "demo", "request": {**request, "prompt": "told"}}))
    (settings.results / "holiday").mkdir()
    (settings.results / "holiday" / "film.mp4").write_text("of somebody else")
    store = JobStore(settings.database)
    for id, status in (("running", "in_progress"), ("waiting", "queued"), ("failed", "failed")):
        store.create(id=id, owner="", model="demo", request=ResolvedRequest(**request), max_queue=9)
        if status != "queued":
            job = store.claim("0123456789abcdef", "demo")
        if status == "failed":
            store.finish(job, "failed", error={"code": "invalid_request", "message": "m"})
    store.close()
    return folder, done


@pytest.fixture
def data(template, tmp_path):
    shutil.copytree(template[0], tmp_path / "data")
    return tmp_path / "data", template[1], template[0].with_name("backup")


def missing(path, backup):
    path.unlink()


def empty(path, backup):
    path.write_bytes(b"")


def older(path, backup):
    shutil.copy(backup, path)


def truncated(path, backup):
    os.truncate(path, path.stat().st_size // 2)


def header(path, backup):
    path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()[:16]) + path.read_bytes()[16:])


def flips(seed):
    def damage(path, backup):
        content, chance = bytearray(path.read_bytes()), random.Random(seed)
        for _ in range(5):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(content))

    return damage


def row(column, value, where):
    def damage(path, backup):
        with sqlite3.connect(path) as db:
            assert db.execute(f"UPDATE jobs SET {column} = ? WHERE {where}", (value,)).rowcount >= 1
        db.close()

    return damage


ONE = {
    "queued": "id = 'waiting'",
    "in_progress": "id = 'running'",
    "completed": "seq = (SELECT min(seq) FROM jobs WHERE status = 'completed')",
}
JSON = ("request", "hsa", "faults", "error", "timing")
DAMAGE = {
    **{"missing": missing, "empty": empty, "older": older, "truncated": truncated, "header": header},
    **{f"flips {seed}": flips(seed) for seed in range(5)},
    **{f"{c} of {s}": row(c, '{"half": ', where) for c in JSON for s, where in ONE.items()},
    **{f"status of {s}": row("status", "melting", where) for s, where in ONE.items()},
    "null": row("request", "null", ONE["queued"]),
    "list": row("request", "[1]", ONE["completed"]),
    "field": row("request", '{"prompt": 3}', ONE["queued"]),
    "infinite": row("timing", '{"total": 1e999}', ONE["completed"]),
    "half a character": row("faults", '[{"cause": "a", "message": "\\ud800", "step": 1, "at": 1}]', ONE["queued"]),
    "no text": row("request", b"\xff\xfe", ONE["in_progress"]),
    "number": row("progress", "half", ONE["completed"]),
    "date": row("completed_at", None, ONE["completed"]),
    "far date": row("created_at", 1e300, ONE["completed"]),
    "size": row("bytes", 2**60, ONE["completed"]),
    "id": row("id", b"\xff", ONE["queued"]),
    "path": row("id", "../results", ONE["completed"]),
    "lease": row("lease", None, ONE["in_progress"]),
    "file": row("lease", "a\0b", ONE["in_progress"]),
}
REFUSED = ("truncated", "header")


def refusal(settings):
    try:
        JobStore(settings.database).close()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_costs_a_video_or_stops_the_queue(damage, data, caplog):
    folder, done, backup = data
    caplog.set_level(logging.INFO, LOGGER)
    before = files(folder)
    settings = ServiceSettings(data_dir=folder)
    DAMAGE[damage](settings.database, backup)
    refused = refusal(settings)
    if refused is not None:
        assert (damage in REFUSED or "flips" in damage) and files(folder) == before
        assert re.search(r"is damaged \(.*\); stop the service, and restore a backup of it or move it away", refused)
        settings.database.rename(folder / "away")  # as it says
    else:
        assert damage not in REFUSED
    service = VideoService(settings, Quick)
    service.start()
    try:
        new = submit(service, "new")
        assert finished(service, new).status == "completed"  # the queue runs
        videos = listed(service)
        assert {videos[id].status for id in done} == {"completed"}
        assert all(service.file(id, "video")[0].read_text() == f"video.mp4 of {id}" for id in done)
        ours = [id for id, video in videos.items() if video.model == "demo"]  # a flipped bit makes it another's
        assert all(finished(service, id) for id in ours)
        assert service.trouble is None and service.metrics.text()
    finally:
        service.stop()
    after = files(folder)
    for path, content in before.items():
        assert after[path] == content or path.name == MANIFEST
    events = [record.getMessage() for record in caplog.records]
    assert events.count("job damaged") == len({r.fields["job"] for r in caplog.records if r.msg == "job damaged"}) <= 5
    assert events.count("folders belong to no job and stay") <= 1
    assert not any(record.exc_info for record in caplog.records)


def test_what_a_failed_row_says(data):
    folder, _, _ = data
    row("hsa", '{"half": ', ONE["queued"])(folder / "jobs.sqlite3", None)
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    video = service.find("waiting", "")
    assert (video.status, video.error.code, video.step) == ("failed", "damaged", 0)
    assert video.error.message == "the entry of this video in the job store is damaged: the column hsa is not JSON"
    assert video.prompt.startswith("done 0 long")  # what is left of it stays
    assert service._store.claim("me", "demo").id != "waiting"
    service.close()


def test_a_finished_video_of_other_rules_stays(data):
    folder, done, _ = data
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    row("request", json.dumps({**service._store.get(done[0], "").request, "prompt": " ", "mood": 1}), ONE["completed"])(
        folder / "jobs.sqlite3", None
    )
    assert service.find(done[0], "").status == "completed"
    service.close()


def test_a_bad_row_while_the_disk_is_full_is_shown_all_the_same(data, monkeypatch, caplog):
    folder, _, _ = data
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    row("request", "{", ONE["queued"])(folder / "jobs.sqlite3", None)
    monkeypatch.setattr(Database, "_transaction", full_database)
    for _ in range(3):
        assert listed(service)["waiting"].status == "failed"
    assert [record.getMessage() for record in caplog.records].count("job damaged") == 1
    service.close()


def test_what_was_deleted_is_not_found_again(data):
    folder, done, _ = data
    settings = ServiceSettings(data_dir=folder)
    service = VideoService(settings, Quick)
    assert service.delete(done[0], "")
    # A kill in the middle of it, before the row is gone.
    service._store._db.execute("UPDATE jobs SET deleted = 1 WHERE id = ?", (done[1],))
    (settings.results / done[2]).rename(settings.results / f".{done[2]}.forgotten")
    for _ in range(2):
        clean_up(settings, service._store)
    assert {*done[:2]}.isdisjoint(service._store.known())
    assert {path.name for path in settings.results.iterdir()} == {done[3], "holiday"}
    service.close()


def test_only_a_command_removes_what_is_unknown(data, capsys):
    folder, done, _ = data
    (folder / "jobs.sqlite3").unlink()
    (folder / "results" / "copy of a video").mkdir()
    shutil.copytree(folder / "results" / done[0], folder / "results" / "copy of a video", dirs_exist_ok=True)
    command = ["serve", "--no-ray", "--data-dir", str(folder), "--remove-unknown"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("deleted 2 folders that belonged to no video: ") and "holiday" in said and "copy of" in said
    assert {path.name for path in (folder / "results").iterdir()} == {*done}  # these were found again before
    assert main(command) == 0 and capsys.readouterr().out.startswith("deleted nothing: every folder in ")


def test_results_of_an_older_version_are_described_while_the_store_knows_them(data):
    folder, done, _ = data
    settings = ServiceSettings(data_dir=folder)
    (settings.results / done[3] / "report.json").unlink()
    for _ in range(2):  # the second time without the store
        service = VideoService(settings, Quick)
        service.start()
        video = listed(service)[done[3]]
        assert video.status == "completed" and video.prompt.startswith("done 3") and video.timing["total"] == 1.0
        service.stop()
        settings.database.unlink()


def edited(target, change):
    manifest = json.loads((target / MANIFEST).read_text())
    change(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest))


def without(name):
    return lambda manifest: manifest["job"].pop(name)


def with_job(**columns):
    return lambda manifest: manifest["job"].update(columns)


@pytest.mark.parametrize(
    "change",
    [
        *map(without, ("id", "owner", "model", "request", "faults", "created_at", "started_at", "completed_at")),
        *(with_job(**{name: "\ud800"}) for name in ("owner", "model")),
        *(with_job(created_at=value) for value in (None, "now", [], 2**63, float("nan"), float("inf"))),
        with_job(request={"num_inference_steps": 2**63}),
        with_job(faults={}),
        lambda manifest: manifest.update(job=[]),
        lambda manifest: manifest.update(timing=[]),
        lambda manifest: manifest["timing"].update(total=None),
        lambda manifest: manifest.update(hsa=3),
    ],
)
def test_a_result_with_a_damaged_manifest_stays_and_costs_no_other(data, caplog, change):
    folder, done, _ = data
    settings = ServiceSettings(data_dir=folder)
    edited(settings.results / done[0], change)
    before = files(folder)
    settings.database.unlink()
    service = VideoService(settings, Quick)
    service.start()
    for _ in range(2):
        service._dispatcher._clean_up()
    assert {*listed(service)} == {*done[1:]}
    service.stop()
    assert all(content == files(folder)[path] for path, content in before.items() if path.parts[0] == done[0])
    assert not any(record.exc_info for record in caplog.records)
    (record,) = [record for record in caplog.records if record.msg == "folders belong to no job and stay"]
    assert done[0] in record.fields["first"]


def test_a_damaged_manifest_of_a_running_job_lets_the_service_start(data, caplog):
    folder, done, _ = data
    settings = ServiceSettings(data_dir=folder)
    shutil.copytree(settings.results / done[0], settings.results / "running")
    edited(settings.results / "running", lambda manifest: manifest["timing"].clear())
    service = VideoService(settings, Quick)
    service.start()
    assert finished(service, "running").status == "completed"  # it is made again
    service.stop()
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("version", ["older", "this"])
def test_a_job_that_is_found_again_keeps_what_its_row_says(data, version):
    folder, done, _ = data
    id = done[3 if version == "older" else 0]
    for column, value in {
        "owner": "ann",
        "idempotency_key": "k",
        "fingerprint": "f",
        "created_at": 5.0,
        "hsa": "{",
    }.items():
        row(column, value, f"id = '{id}'")(folder / "jobs.sqlite3", None)
    if version == "this":
        edited(folder / "results" / id, with_job(owner="ann"))
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    service.start()
    job = service._store.get(id, "ann")
    assert (job.status, job.idempotency_key, job.fingerprint) == ("completed", "k", "f")
    assert job.hsa == {"steps": []} and (job.created_at == 5.0) == (version == "older")
    service.stop()


def test_the_owner_in_a_result_makes_up_for_that_of_a_row(data):
    folder, done, _ = data
    for column, value in {"owner": b"\xff", "idempotency_key": "k", "fingerprint": "f"}.items():
        row(column, value, f"id = '{done[0]}'")(folder / "jobs.sqlite3", None)
    edited(folder / "results" / done[0], with_job(owner="ann"))
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    service.start()
    job = service._store.get(done[0], "ann")
    assert job.status == "completed" and job.idempotency_key is None  # it may be another's by now
    service.stop()


def said(caplog):
    """What was logged, but for the requests: whether these are depends on the level that other tests set."""
    return [record.getMessage() for record in caplog.records if record.msg != "request"]


def test_damage_that_is_found_later_is_said(data, caplog):
    folder, _, _ = data
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    size = (folder / "jobs.sqlite3").stat().st_size
    with open(folder / "jobs.sqlite3", "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    service._store._db.execute("PRAGMA shrink_memory")  # of pages that it has read before
    requests = [("GET", "/v1/videos", {}), ("POST", "/v1/videos", {"json": {"prompt": "x"}}), ("GET", "/health", {})]
    for _ in range(3):
        videos, created, health = answers(service, *requests)
        assert [videos.status_code, created.status_code, health.status_code] == [503] * 3
        assert str(folder) not in videos.text
        assert "is damaged (" in videos.json()["error"]["message"] == created.json()["error"]["message"]
        assert health.json()["reason"] == videos.json()["error"]["message"]
    service._store.probe()
    with pytest.raises(StoreUnavailable):
        service._store.mend()
    assert said(caplog) == ["store unavailable"]
    service.close()


# Files that somebody removed.


def test_a_file_that_is_gone_is_said_to_be(data, caplog):
    folder, done, _ = data
    service = VideoService(ServiceSettings(data_dir=folder), Quick)
    video = folder / "results" / done[0] / "video.mp4"
    content = video.read_bytes()
    get = [("GET", f"/v1/videos/{done[0]}/content", {}), ("GET", f"/v1/videos/{done[0]}", {})]
    for spoil in (video.unlink, video.touch):  # the second leaves an empty one
        spoil()
        for _ in range(2):
            answer, shown = answers(service, *get)
            assert answer.status_code == 410 and answer.json()["error"]["code"] == "file_gone"
            assert f"video.mp4 of video {done[0]} is gone" in answer.json()["error"]["message"]
            assert shown.json()["status"] == "completed"
            assert shown.json()["error"] == {"code": "files_gone", "message": "gone from the service's disk: video.mp4"}
    assert answers(service, ("GET", f"/v1/videos/{done[0]}/content?variant=report", {}))[0].status_code == 200
    assert said(caplog) == ["files gone"]
    video.write_bytes(content)  # from a backup
    answer, shown = answers(service, *get)
    assert answer.status_code == 200 and shown.json()["error"] is None
    service.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_that_is_removed_while_the_service_runs_takes_no_more_jobs(tmp_path, replaced):
    """Rows that go into a removed file are lost with the last process that has it open."""
    path = tmp_path / "jobs.sqlite3"
    database = Database(path)
    database.condition.check()
    for file in tmp_path.iterdir():
        file.unlink()
    if replaced:
        path.write_bytes(b"another")
    with pytest.raises(StoreUnavailable, match="was removed or replaced while the service ran; restart it"):
        database.condition.check()
    assert database.condition.damaged
    database.close()
