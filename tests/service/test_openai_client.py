"""The official openai client against the service, unchanged: what works with OpenAI's video API works here."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from serving import PROMPT, STEPS

openai = pytest.importorskip("openai", reason="the extra 'dev' is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FAST = {"num_inference_steps": STEPS}


@pytest.fixture
def videos(server):
    return server.client().videos


def png(side=64):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_from_prompt_to_file_and_away(videos):
    video = videos.create(prompt=PROMPT, model="demo", size="64x48", seconds="1", extra_body={**FAST, "seed": 3})
    assert video.id.startswith("video_") and video.object == "video" and video.status == "queued"
    assert (video.progress, video.prompt, video.model, video.size) == (0, PROMPT, "demo", "64x48")
    assert video.seconds == "1.125" and video.num_frames == 9  # the nearest to a second that the model makes

    done = videos.poll(video.id)
    assert done.status == "completed" and done.progress == 100 and done.error is None
    assert done.created_at <= done.completed_at < done.expires_at
    assert done.hsa["achieved"] == pytest.approx(0.5, abs=0.1) and len(done.hsa["steps"]) == STEPS
    assert set(done.timing) == {"queued", "encode_text", "denoise", "checkpoint", "decode", "write", "total"}
    assert done.faults == []

    content = videos.download_content(video.id)
    with av.open(io.BytesIO(content.read())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert np.stack(frames).shape == (9, 48, 64, 3) and np.stack(frames).std() > 5

    picture = Image.open(io.BytesIO(videos.download_content(video.id, variant="thumbnail").read()))
    assert (picture.format, picture.size) == ("WEBP", (64, 48))
    sheet = Image.open(io.BytesIO(videos.download_content(video.id, variant="spritesheet").read()))
    assert sheet.size == (4 * 64, 3 * 48)  # nine frames in rows of four

    assert videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(video.id)


def test_the_same_seed_makes_the_same_video(server, videos):
    made = [videos.create_and_poll(prompt=PROMPT, extra_body={**FAST, "seed": 5, "num_frames": 5}) for _ in range(2)]
    files = [videos.download_content(video.id).read() for video in made]
    assert files[0] == files[1]
    for video in made:
        videos.delete(video.id)


def test_pages(server, videos):
    ids = [videos.create(prompt=f"number {n}", extra_body=FAST).id for n in range(4)]
    for id in ids:
        server.http.post(f"/v1/videos/{id}/cancel")
    assert [video.id for video in videos.list(limit=4)] == ids[::-1]
    first = videos.list(limit=3)
    assert [video.id for video in first.data] == ids[:0:-1] and first.has_next_page()
    second = first.get_next_page()
    assert [video.id for video in second.data] == ids[:1]
    assert [video.id for video in videos.list(limit=2, order="asc", after=ids[0]).data] == ids[1:3]
    # The client walks over all pages by itself, and ends.
    assert [video.id for video in videos.list(limit=1)][:4] == ids[::-1]
    for id in ids:
        videos.delete(id)
    with pytest.raises(openai.BadRequestError, match="after"):
        videos.list(after=ids[0])


def test_an_image_is_refused_in_one_sentence(videos):
    link = {"input_reference": {"image_url": "http://169.254.169.254/latest"}}
    for fields in ({"input_reference": ("first.png", png(), "image/png")}, {"extra_body": link}):
        with pytest.raises(openai.BadRequestError) as caught:
            videos.create(prompt=PROMPT, **fields)
        assert caught.value.param == "input_reference"
        assert "makes videos from text alone" in caught.value.body["message"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 4001}, "prompt", "at most 4000"),
        ({"prompt": "a\x00b"}, "prompt", "control characters"),
        ({"size": "13x17"}, None, "nearest size is 16x16"),
        ({"size": "large"}, "size", "pattern"),
        ({"size": "512x512"}, "size", "pixels"),
        ({"seconds": "-4"}, "seconds", "above 0"),
        ({"seconds": "nan"}, "seconds", "above 0"),
        ({"seconds": "12"}, "num_frames", "frames are more"),
        ({"model": "sora-2"}, "model", "not served here"),
        ({"extra_body": {"num_inference_steps": 5000}}, "num_inference_steps", "2000"),
        ({"extra_body": {"num_frames": 8}}, None, "multiple of 2, plus 1"),
        ({"extra_body": {"compute": 0}}, "compute", "greater than 0"),
        ({"extra_body": {"seed": -2}}, "seed", "greater than"),
        ({"extra_body": {"guidance_scale_2": 2}}, None, "two experts"),
        ({"extra_body": {"num_step": 5}}, "num_step", "no field 'num_step'"),
    ],
)
def test_bad_input(videos, fields, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        videos.create(**{"prompt": PROMPT, **fields})
    assert caught.value.param == param
    assert says in caught.value.body["message"].lower() and "\n" not in caught.value.body["message"]


def test_what_openai_has_beyond_it_is_refused_with_what_would_do(videos):
    calls = {
        "not remixed here": lambda: videos.remix("video_0", prompt=PROMPT),
        "not edited here": lambda: videos.edit(prompt=PROMPT, video=b"x"),
        "not extended here": lambda: videos.extend(prompt=PROMPT, seconds="8", video=b"x"),
        "characters are not kept here": lambda: videos.create_character(name="Mo", video=b"x"),
    }
    for says, call in calls.items():
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        assert caught.value.status_code in (404, 405)
        assert says in caught.value.body["message"] and "POST /v1/videos" in caught.value.body["message"]


def test_unknown_ids(server, videos):
    for id in ("video_0", "video_" + "0" * 32, "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a" * 5000):
        with pytest.raises(openai.NotFoundError):
            videos.retrieve(id)
        with pytest.raises(openai.NotFoundError):
            videos.delete(id)
        with pytest.raises(openai.NotFoundError):
            videos.download_content(id)
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-5")


def test_keys(server, videos):
    for key in ("wrong-0123456789abcdef", "alice-0123456789abcde", "ALICE-0123456789ABCDEF"):
        with pytest.raises(openai.AuthenticationError):
            server.client(key=key).videos.list()
    mine = videos.create(prompt=PROMPT, extra_body=FAST)
    others = server.client("bob").videos
    assert mine.id not in [video.id for video in others.list()]
    for call in (others.retrieve, others.delete, others.download_content):
        with pytest.raises(openai.NotFoundError):
            call(mine.id)
    with pytest.raises(openai.BadRequestError):
        others.list(after=mine.id)
    assert videos.delete(mine.id).deleted
    log = server.log.read_text()
    assert "0123456789abcdef" not in log and PROMPT not in log


def test_a_full_queue(server, videos):
    blocker = videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 2000, "compute": 1})
    server.running(blocker.id)
    ids = []
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(8):
            ids.append(videos.create(prompt=PROMPT, extra_body=FAST).id)
    assert len(ids) == 4
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.code == "queue_full"
    for id in (*ids, blocker.id):
        videos.delete(id)
    assert videos.create_and_poll(prompt=PROMPT, extra_body=FAST).status == "completed"


def test_models(server):
    (model,) = server.client().models.list()
    assert model.id == "demo" and model.inputs == ["text"] and model.defaults["num_frames"] == 17
    assert server.client().models.retrieve("demo").id == "demo"
