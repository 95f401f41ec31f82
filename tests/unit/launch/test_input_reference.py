"""The way of an uploaded image through the service, from the bytes of a form to the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import io
import sqlite3

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from starlette.exceptions import HTTPException
from starlette.requests import Request

import heterostep as hs
from folders import complete_pipeline
from heterostep.engine.facts import read_facts
from heterostep.engine.media.image import fingerprint, png, read_image
from heterostep.engine.request import GenerateRequest
from heterostep.errors import BadField, RequestError
from heterostep.launch.service.bodies import CreateVideo
from heterostep.launch.service.database import SCHEMA
from heterostep.launch.service.requests import Asked, read_create, to_request
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings, limits_for
from heterostep.launch.service.store import JobStore
from heterostep.launch.workers.messages import GroupConfig, Place, Work
from heterostep.launch.workers.rank import Rank
from tiny import picture
from waiting import until

PLAN = {"share": {"compute": 0.5}, "engine": hs.EngineConfig(), "every": 5}
FACTS = dataclasses.replace(read_facts("demo"), image="optional")


def form(content, name="input_reference"):
    parts = [
        b'Content-Disposition: form-data; name="prompt"\r\n\r\nit jumps',
        f'Content-Disposition: form-data; name="{name}"; filename="../x.png"\r\n\r\n'.encode() + content,
    ]
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"


def read(body, kind="multipart/form-data; boundary=b", takes_images=True):
    pieces = [body[i : i + 65536] for i in range(0, len(body), 65536)]

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_create(Request(scope, receive), takes_images))


def wanted(asked, facts=FACTS, **limits):
    settings = limits_for(ServiceSettings(data_dir=limits.pop("data_dir")), facts)
    return to_request(asked, model="demo", facts=facts, limits=dataclasses.replace(settings, **limits), **PLAN)


def test_a_file_of_a_form_becomes_a_request_and_a_picture(tmp_path):
    content = png(picture(300, 300)) + b"\0" * (2 << 20)  # more than fits into one piece
    asked = read(form(content))
    assert asked.image == content and asked.body.input_reference == "file"
    request, image = wanted(asked, data_dir=tmp_path)
    assert (request.width, request.height) == (64, 64)
    assert Image.open(io.BytesIO(image)).size == (64, 64)
    assert fingerprint(read_image(image)) == request.image
    other = read(form(png(picture(300, 300, seed=9))))
    assert len({asked.fingerprint, other.fingerprint, read(form(content)).fingerprint}) == 2
    # Nothing is kept for a model that takes none.
    assert read(form(content), takes_images=False).image is None


def asked_for(image=None, **fields):
    return Asked(CreateVideo(prompt="x", **fields), "", image)


@pytest.mark.parametrize(
    ("asked", "facts", "says"),
    [
        (asked_for(b"torn", input_reference="file"), {}, "is not a PNG, JPEG or WebP image"),
        (asked_for(png(picture())[:-99], input_reference="file"), {}, "truncated or damaged"),
        (asked_for(input_reference={"image_url": "http://169.254.169.254/"}), {}, "links are not followed"),
        (asked_for(input_reference={"file_id": "file-1"}), {}, "must be a file in a form"),
        (asked_for(), {"image": "required"}, "makes videos from an image; send one as input_reference"),
        (asked_for(b"x", input_reference="file"), {"image": "none"}, "makes videos from text alone"),
    ],
)
def test_what_is_refused_names_the_field(tmp_path, asked, facts, says):
    with pytest.raises(BadField, match=says) as caught:
        wanted(asked, dataclasses.replace(FACTS, **facts), data_dir=tmp_path)
    assert caught.value.param == "input_reference"


def test_an_image_is_not_scaled_to_a_size_that_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("it was scaled")

    monkeypatch.setattr("heterostep.engine.sources.fit_image", refuse)
    asked = asked_for(png(picture()), input_reference="file", size="512x512")
    with pytest.raises(BadField, match="pixels, and at most"):
        wanted(asked, data_dir=tmp_path)


def test_a_file_can_only_be_the_image():
    with pytest.raises(BadField, match="'seed' must be a text, not a file"):
        read(form(b"x", name="seed"))


def test_the_store_keeps_the_image_until_the_job_is_finished(tmp_path):
    path = tmp_path / "jobs.sqlite3"
    JobStore(path).close()
    with sqlite3.connect(path) as old:  # as an older version left it
        old.execute("DROP TABLE images")
        old.execute("PRAGMA user_version = 1")
    store = JobStore(path)
    assert store._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA
    request, image = wanted(asked_for(png(picture()), input_reference="file"), data_dir=tmp_path)
    for name, content in (("a", image), ("b", None)):
        store.create(id=name, owner="", model="demo", request=request, max_queue=9, image=content)
    jobs = [store.claim("me", "demo") for _ in range(2)]
    assert [store.image(job) for job in jobs] == [image, None]
    assert store.requeue(jobs[0], None) and store.image(jobs[0]) == image
    store.finish(store.claim("me", "demo"), "failed", error={})
    assert store.image(jobs[0]) is None
    store.close()


class Refusing:
    """A runner that looks at its task and refuses it."""

    ready, trouble, hopeless, heartbeat_age = True, None, False, 0.0

    def __init__(self, settings, index):
        self.tasks = []

    def run(self, task):
        self.tasks.append((task, task.image.read_bytes() if task.image else None))
        raise RequestError("not today")
        yield

    def tend(self): ...
    def cancel(self): ...
    def stop(self): ...
    def close(self): ...


def test_the_dispatcher_hands_the_image_to_the_runner(tmp_path, monkeypatch):
    monkeypatch.setattr("heterostep.launch.service.service.read_facts", lambda model: FACTS)
    service = VideoService(ServiceSettings(data_dir=tmp_path), Refusing)
    assert service.takes_images and service.card().inputs == ["text", "image"] and service.card().image == "optional"
    service.start()
    try:
        asked = asked_for(png(picture()), input_reference="file")
        ids = [service.submit(each, "", None)[0].id for each in (asked, asked_for())]
        until(lambda: all(service.find(id, "").status == "failed" for id in ids))
    finally:
        service.stop()
    (first, content), (second, nothing) = service._dispatcher.runners[0].tasks
    assert fingerprint(read_image(content)) == first.request.image
    assert second.image is None and nothing is None and second.request.image is None
    assert not list((tmp_path / "state").iterdir())


def test_the_worker_starts_from_the_image(tmp_path):
    complete_pipeline("ti2v5b").save_pretrained(tmp_path / "model")
    engine = hs.Engine(hs.EngineConfig(model=str(tmp_path / "model"), device="cpu"))
    body = CreateVideo(prompt="x", input_reference="file", num_frames=5, num_inference_steps=4, seed=1)
    limits = limits_for(ServiceSettings(data_dir=tmp_path / "data"), engine.facts)
    request, image = to_request(
        Asked(body, "", png(picture())), model="demo", facts=engine.facts, limits=limits, **PLAN
    )
    asked = GenerateRequest(**dataclasses.asdict(request) | {"image": read_image(image)})
    place = Place(rank=0, size=1, machines=(1,), neighbours=1, gpu=None, rendezvous=1, address="", port=0)
    rank = Rank([].append, lambda: None)
    rank.do("join", place, GroupConfig(size=1), engine.config, None)
    work = Work(request=asked, folder=str(tmp_path / "state"), checkpoint_every=2, files=True)
    made = rank.do("make", work)
    assert made.hsa["achieved"] == pytest.approx(0.5) and made.files["video.mp4"]
    again = engine.generate(asked)
    assert again.request == request and again.report.conditioned == 16
    assert torch.isfinite(again.latents).all()


def test_a_form_that_the_disk_has_no_room_for(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    assert read(form(b"\0" * 1000)).image == b"\0" * 1000  # is kept in memory
    with pytest.raises(HTTPException, match=r"cannot be taken now \(No space left on device\); try again") as caught:
        read(form(b"\0" * (2 << 20)))
    assert caught.value.status_code == 503
