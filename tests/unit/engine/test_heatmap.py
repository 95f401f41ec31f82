from __future__ import annotations

import av
import matplotlib
import numpy as np
import pytest

from heterostep.engine.media.video import heatmap_frames, overlay_frames, scale_for, spread_tokens, write_mp4


def clip(num_frames=5, height=32, width=48):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_tokens_are_spread_over_their_pixels():
    values = np.arange(3 * 2 * 2).reshape(3, 2, 2)
    spread = spread_tokens(values, 9, 4, 6)
    assert spread.shape == (9, 4, 6)
    # Causal VAE: latent frame 0 is video frame 0, latent frame 1 is 1..4, latent frame 2 is 5..8.
    assert [int(frame[0, 0]) for frame in spread] == [0, 4, 4, 4, 4, 8, 8, 8, 8]
    assert spread[0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    assert spread_tokens(values, 3, 2, 2).tolist() == values.tolist()
    assert spread_tokens(values[:1], 1, 2, 2).tolist() == values[:1].tolist()


def test_heatmap_shows_the_video_and_marks_the_busy_tokens():
    frames = clip(5, 32, 48)
    evaluations = np.full((2, 2, 3), 5)
    evaluations[:, 0, 0] = 20
    picture = np.stack(list(heatmap_frames(frames, evaluations, [1.0] + [0.0] * 3 + [0.3] * 16)))
    assert picture.dtype == np.uint8 and len(picture) == 5
    assert picture.shape[1] % 2 == 0 and picture.shape[2] % 2 == 0
    scale = scale_for(32, 48)
    large = frames.repeat(scale, 1).repeat(scale, 2)
    unit = max(20, 32 * scale // 16)
    height, width = large.shape[1:3]
    left = picture[:, 2 * unit : 2 * unit + height, unit : unit + width]
    assert (left == large).all()
    right = picture[:, 2 * unit : 2 * unit + height, 2 * unit + width : 2 * unit + 2 * width].astype(int)
    busy, idle = right[:, : height // 2, : width // 3], right[:, height // 2 :, width // 3 :]
    assert busy.mean() > idle.mean() + 40
    strip = picture[0, 2 * unit + height + unit + 2, unit : unit + width].astype(int).sum(-1)
    first, second = strip[width // 40], strip[3 * width // 40]
    assert first > second > 0  # a full step is brighter than a skipped one, which is still drawn


def test_heatmap_of_equal_counts():
    (page,) = heatmap_frames(clip(1, 16, 16), np.full((1, 1, 1), 7), [1.0] * 7)
    assert page.dtype == np.uint8


def test_the_map_is_what_the_formula_says():
    # 7/10 of matplotlib's viridis, the rest the video's luma; integer arithmetic may round differently.
    frames = clip(9, 32, 48)
    evaluations = np.random.default_rng(1).integers(4, 21, (3, 4, 6))
    heat = (spread_tokens(evaluations, 9, 32, 48) - evaluations.min()) / np.ptp(evaluations)
    luma = frames.astype(np.float64) @ np.array([0.2126, 0.7152, 0.0722])
    expected = 0.7 * 255.0 * matplotlib.colormaps["viridis"](heat)[..., :3] + 0.3 * luma[..., None]
    drawn = np.stack(list(overlay_frames(frames, evaluations)))
    assert (drawn.dtype, drawn.shape) == (np.uint8, frames.shape)
    assert np.abs(drawn - expected).max() <= 1.1


def places(picture, height, width, scale):
    """The map's panel and the legend's bar in pages [F, H, W, 3] of a video."""
    unit = max(20, min(height, width) * scale // 16)
    rows, second = 2 * unit + height * scale, 2 * unit + width * scale
    panel = picture[:, 2 * unit : rows, second : second + width * scale]
    return panel, picture[:, rows + unit : rows + unit + unit // 2, second : second + width * scale]


@pytest.mark.parametrize("brightness", [0, 255])
@pytest.mark.parametrize("equal", [False, True])
def test_panel_and_legend_have_the_same_colours(tmp_path, brightness, equal):
    frames = np.full((3, 32, 48, 3), brightness, np.uint8)
    evaluations = np.full((3, 2, 3), 20)
    if not equal:
        evaluations[:, 0, 0] = 5
    pages = np.stack(list(heatmap_frames(frames, evaluations, [1.0] * 20)))
    write_mp4(tmp_path / "h.mp4", pages, 8)
    with av.open(str(tmp_path / "h.mp4")) as container:
        seen = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    scale = scale_for(32, 48)
    row = 0 if brightness else -1  # white above, black below
    # As it is drawn; and as it is seen, away from the edges, over which chroma is smeared.
    for picture, edge, tolerance in ((pages, 0, 0), (seen, 4, 20)):
        panel, legend = (part.astype(int) for part in places(picture, 32, 48, scale))
        high, low = legend[:, row, -1 - edge], legend[:, row, edge]
        assert np.abs(panel[:, -5, -5] - high).max() <= tolerance
        if not equal:
            assert np.abs(panel[:, 5, 5] - low).max() <= tolerance
            assert np.abs(high - low).max() > 50


def test_the_legend_holds_every_colour_of_the_map():
    frames = np.full((1, 320, 320, 3), 255, np.uint8)
    frames[:, :160] = 0
    pages = np.stack(list(heatmap_frames(frames, np.arange(400).reshape(1, 20, 20), [1.0])))
    panel, legend = places(pages, 320, 320, 1)
    shown, explained = ({tuple(pixel) for pixel in part.reshape(-1, 3).tolist()} for part in (panel, legend))
    assert len(shown) > 200
    assert shown <= explained
