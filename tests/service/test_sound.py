"""LTX-2 over HTTP: a video with sound."""

import io

import av
import numpy as np

from folders_ltx2 import complete_ltx2


def test_a_video_with_sound(start, tmp_path):
    complete_ltx2("2.0").save_pretrained(tmp_path / "tiny")
    server = start("--model", tmp_path / "tiny", "--device", "cpu").healthy()
    id = server.create(size="64x32", num_frames=5, fps=8, seed=3)
    video = server.finished(id)
    assert video["status"] == "completed" and video["size"] == "64x32", video
    content = server.http.get(f"/v1/videos/{id}/content").content
    with av.open(io.BytesIO(content)) as file:
        assert [stream.type for stream in file.streams] == ["video", "audio"]
        frames = [frame for packet in file.demux() for frame in packet.decode()]
    pictures = [frame for frame in frames if isinstance(frame, av.VideoFrame)]
    sound = [frame.to_ndarray() for frame in frames if isinstance(frame, av.AudioFrame)]
    assert [(frame.width, frame.height) for frame in pictures] == [(64, 32)] * 5
    samples, rate = np.concatenate(sound, axis=1), 16000
    # As long as the video, but for what the codec pads; and not silent.
    assert 0.8 * 5 / 8 < samples.shape[1] / rate < 5 / 8 + 0.2
    assert np.abs(samples).max() > 1e-3
