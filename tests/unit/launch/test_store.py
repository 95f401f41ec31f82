"""The job store: what each change does, who sees what, and what two processes and a full disk do to it.

Its rows are those of launch/service/rows.py.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import subprocess
import sys
import threading

import pytest

from heterostep.engine.facts import read_facts
from heterostep.engine.request import GenerateRequest, resolve
from heterostep.errors import ConfigError, KeyReused, QueueFull, RequestError, StoreUnavailable
from heterostep.launch.service.store import JobStore

REQUEST = resolve(GenerateRequest(prompt="x", compute=0.5), read_facts("demo"))


@pytest.fixture
def ended():
    """The statuses with which jobs ended, as the store tells them."""
    return []


@pytest.fixture
def store(tmp_path, ended):
    store = JobStore(tmp_path / "jobs.sqlite3", ended.append)
    yield store
    store.close()


def add(store, id, owner="", model="demo", max_queue=100, **options):
    return store.create(id=id, owner=owner, model=model, request=REQUEST, max_queue=max_queue, **options)[0]


def test_a_job_from_queue_to_end(store, ended):
    made = add(store, "a")
    assert (made.status, made.progress, made.num_steps, made.request["prompt"]) == ("queued", 0, 40, "x")
    taken = store.claim("me", "demo")
    assert (taken.id, taken.status, taken.attempt, taken.lease) == ("a", "in_progress", 1, "me")
    assert store.claim("me", "demo") is None
    store.progress(taken, b"picture", step=3, progress=7, stage="denoising", hsa={"steps": [1.0, 0.5, 0.0]})
    seen = store.get("a", "")
    assert (seen.step, seen.progress, seen.hsa) == (3, 7, {"steps": [1.0, 0.5, 0.0]}) and seen.version > taken.version
    assert store.preview("a", 2) == (3, b"picture") and store.preview("a", 3) is None
    assert store.finish(taken, "completed", progress=100, hsa={"achieved": 0.5}, timing={"total": 1.0}, bytes=10)
    done = store.get("a", "")
    assert (done.status, done.hsa, done.bytes, done.lease) == ("completed", {"achieved": 0.5}, 10, None)
    assert done.created_at <= done.started_at <= done.completed_at and store.preview("a", -1) is None
    assert store.result_bytes() == 10 and store.counts() == {"completed": 1}
    assert ended == ["completed"]


def test_every_setting_of_a_request_is_read_again(store):
    # Beyond the demo model's length, so that the settings of windows are not left out.
    asked = GenerateRequest(prompt="x", num_frames=33, compute=0.5, roll_windows=True, prompt_schedule="0-9: a", seed=3)
    request = resolve(asked, read_facts("demo"))
    store.create(id="long", owner="", model="demo", request=request, max_queue=9)
    taken = store.claim("me", "demo")
    assert taken.id == "long" and dict(taken.request) == json.loads(json.dumps(dataclasses.asdict(request)))


def test_a_video_of_before_there_was_a_setting_is_no_damage(store, tmp_path):
    add(store, "old")
    store.finish(store.claim("me", "demo"), "completed", progress=100, hsa={}, timing={"total": 1.0}, bytes=1)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
        for name in ("seconds", "lora", "window", "roll_windows", "prompt_schedule", "guidance_scale_2"):
            db.execute("UPDATE jobs SET request = json_remove(request, ?)", (f"$.{name}",))
    db.close()
    assert store.get("old", "").status == "completed"


def test_oldest_first_and_back_to_its_place(store):
    for id in "abc":
        add(store, id)
    first = store.claim("me", "demo")
    assert first.id == "a" and [store.position(store.get(id, "")) for id in "bc"] == [0, 1]
    assert store.requeue(first, {"cause": "died", "message": "m", "step": 3, "at": 1})
    again = store.claim("me", "demo")
    assert again.id == "a" and again.attempt == 2 and again.faults[0]["cause"] == "died"
    assert store.requeue(again, None)  # saved in order: the attempt does not count
    assert store.get("a", "").attempt == 1 and len(store.get("a", "").faults) == 1


def test_only_the_attempt_that_holds_a_job_may_change_it(store, ended):
    add(store, "a")
    old = store.claim("dead", "demo")
    store.requeue(old, {"cause": "restart", "message": "m", "step": 0, "at": 1})
    new = store.claim("me", "demo")
    store.progress(old, step=30)
    assert not store.finish(old, "completed") and not store.requeue(old, None) and not store.give_up(old, {}, {})
    assert store.get("a", "").step == 0 and store.get("a", "").status == "in_progress"
    assert store.finish(new, "completed") and not store.finish(new, "failed")
    assert ended == ["completed"]


def test_each_owner_sees_its_own(store):
    add(store, "a", owner="alice")
    assert store.get("a", "bob") is None and store.cancel("a", "bob") is None and store.delete("a", "bob") is None
    assert store.page("bob", after=None, limit=10, newest_first=True) == ([], False)
    with pytest.raises(RequestError, match="after"):
        store.page("bob", after="a", limit=10, newest_first=True)


def test_pages_in_both_orders(store):
    for id in "abcde":
        add(store, id)

    def ids(**options):
        jobs, more = store.page("", **{"after": None, "limit": 2, "newest_first": True, **options})
        return "".join(job.id for job in jobs), more

    assert ids() == ("ed", True) and ids(after="d") == ("cb", True) and ids(after="b") == ("a", False)
    assert ids(newest_first=False, after="c") == ("de", False) and ids(limit=5) == ("edcba", False)


def test_pages_of_some_statuses(store):
    for id in "abcde":
        add(store, id)
    store.finish(store.claim("me", "demo"), "completed")
    store.claim("me", "demo")
    store.cancel("d", "")

    def ids(*statuses, **options):
        options = {"after": None, "limit": 2, "newest_first": True, **options}
        jobs, more = store.page("", statuses=statuses, **options)
        return "".join(job.id for job in jobs), more

    assert ids("queued") == ("ec", False) and ids("in_progress") == ("b", False) and ids("failed") == ("", False)
    assert ids("completed", "cancelled", limit=1) == ("d", True)
    assert ids("completed", "cancelled", after="d") == ("a", False)
    assert ids("queued", "in_progress", newest_first=False) == ("bc", True)


def test_an_idempotency_key_is_the_owners(store):
    options = {"idempotency_key": "k", "fingerprint": "f"}
    assert store.create(id="a", owner="x", model="demo", request=REQUEST, max_queue=9, **options)[1]
    job, new = store.create(id="b", owner="x", model="demo", request=REQUEST, max_queue=0, **options)
    assert job.id == "a" and not new  # even where the queue is full
    with pytest.raises(KeyReused):
        add(store, "c", owner="x", idempotency_key="k", fingerprint="other")
    assert add(store, "d", owner="y", idempotency_key="k", fingerprint="other").id == "d"
    store.delete("a", "x")
    assert add(store, "e", owner="x", **options).id == "e"


def test_a_full_queue_counts_waiting_jobs_only(store):
    add(store, "a")
    store.claim("me", "demo")
    add(store, "b", max_queue=1)
    with pytest.raises(QueueFull, match="1 videos are waiting"):
        add(store, "c", max_queue=1)
    store.cancel("b", "")
    assert add(store, "c", max_queue=1).status == "queued"


def test_cancel_and_delete_in_every_state(store):
    for id in "abc":
        add(store, id)
    running = store.claim("me", "demo")
    assert store.cancel("b", "").status == "cancelled"
    asked = store.cancel("a", "")
    assert asked.status == "in_progress" and asked.cancel_requested and store.cancelled(["a", "c"]) == ["a"]
    store.delete("a", "")
    assert store.get("a", "") is None and store.cancelled(["a"]) == ["a"]
    # A runner that dies meanwhile does not bring it back.
    assert store.requeue(running, {"cause": "died", "message": "m", "step": 0, "at": 1})
    assert {job.id: job.status for job in store.finished()} == {"a": "cancelled", "b": "cancelled"}
    store.remove("a")
    store.remove("c")  # not finished: stays
    assert store.known() == {"b", "c"}


def test_jobs_of_another_model_wait_for_it(store):
    add(store, "a", model="other")
    assert store.claim("me", "demo") is None and store.claim("me", "other").id == "a"


def test_giving_up_keeps_every_fault(store):
    add(store, "a")
    for n in range(2):
        store.requeue(store.claim("me", "demo"), {"cause": "died", "message": str(n), "step": n, "at": 1})
    store.give_up(
        store.claim("me", "demo"), {"cause": "died", "message": "2", "step": 2, "at": 1}, {"code": "c", "message": "m"}
    )
    job = store.get("a", "")
    assert job.status == "failed" and [fault["message"] for fault in job.faults] == ["0", "1", "2"]
    assert job.error == {"code": "c", "message": "m"}


def test_two_processes_share_the_queue_and_none_gets_a_job_twice(store, tmp_path):
    for n in range(60):
        add(store, f"job{n:02}")
    code = (
        "import sys; from pathlib import Path; from heterostep.launch.service.store import JobStore\n"
        "store = JobStore(Path(sys.argv[1]))\n"
        "while job := store.claim(sys.argv[2], 'demo'):\n"
        "    print(job.id); store.progress(job, step=1); store.finish(job, 'completed')"
    )
    path = tmp_path / "jobs.sqlite3"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, path, name], stdout=subprocess.PIPE, text=True) for name in "xyz"
    ]
    taken = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(id for ids in taken for id in ids) == [f"job{n:02}" for n in range(60)]
    assert store.counts() == {"completed": 60}


def test_threads_share_one_connection(store):
    errors = []

    def work(name):
        try:
            for n in range(20):
                add(store, f"{name}{n}", max_queue=1000)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(store.known()) == 80


def test_a_full_disk_is_said_and_survived(store):
    add(store, "a")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite does when the disk is full
    with pytest.raises(StoreUnavailable, match="full"):
        for n in range(200):
            add(store, f"b{n}", max_queue=1000)
    assert store.claim("me", "demo").id == "a"
    store._db.execute("PRAGMA max_page_count = 100000")
    with pytest.raises(StoreUnavailable, match="full"):  # refused at once, until the disk was looked at again
        add(store, "c", max_queue=1000)
    assert "full" in store.trouble
    store.probe()
    assert store.trouble is None
    assert add(store, "c", max_queue=1000).status == "queued"


def test_an_end_that_is_not_in_the_file_is_not_counted(store, ended):
    add(store, "a")
    with pytest.raises(RuntimeError), store._db.writing():
        store.cancel("a", "")
        raise RuntimeError("torn")
    assert ended == [] and store.get("a", "").status == "queued"
    store.delete("a", "")
    assert ended == ["cancelled"]


def test_a_store_that_kept_metrics_goes_on(tmp_path):
    store = JobStore(tmp_path / "old")
    add(store, "a")
    store.close()
    with sqlite3.connect(tmp_path / "old") as old:  # as version 2 left it
        old.execute("CREATE TABLE figures (name TEXT, labels TEXT, value REAL NOT NULL, PRIMARY KEY (name, labels))")
        old.execute("INSERT INTO figures VALUES ('heterostep_requests', '{', 1.0), ('x', NULL, 2.0)")
        old.execute("PRAGMA user_version = 2")
    old.close()
    for _ in range(2):
        store = JobStore(tmp_path / "old")
        assert store.get("a", "").status == "queued"
        assert store._db.execute("SELECT count(*) FROM figures").fetchone()[0] == 2  # left alone
        store.close()


def test_what_is_no_job_store_is_refused(tmp_path):
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(ConfigError, match=r"is damaged \(file is not a database\); stop the service, and restore"):
        JobStore(tmp_path / "text")
    with pytest.raises(ConfigError, match="cannot be used as a job store"):
        JobStore(tmp_path)
    store = JobStore(tmp_path / "newer")
    store._db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(ConfigError, match="newer version"):
        JobStore(tmp_path / "newer")
    with pytest.raises(StoreUnavailable):
        store.known()
