"""Peak memory and time of decoding and encoding against the number of frames, latents given.

::

    python benchmarks/decoding.py --frames 65 129 257
    python benchmarks/decoding.py --vae ltx2 --frames 65 257
    python benchmarks/decoding.py --plain --frames 65 257     # the VAE's own `decode`, all frames in memory

Each number of frames runs in a process of its own, since a process never gives its peak back. The VAEs are small (`wan`
is the demo model's; `tiny`, of Wan's kind, and `ltx2` have random weights), the pictures large enough for the frames to
count: a video that is kept in memory anywhere shows. Lines of JSON go to stdout.

The allocator of glibc keeps freed blocks, as many as the order of calls made it keep, some 100 MiB more or less from
run to run. `MALLOC_MMAP_THRESHOLD_=1048576` gives large blocks back at once, so that the peak is what was in use.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def build(kind: str) -> tuple[Any, Any]:
    """A VAE and the adapter of its model."""
    from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan

    from heterostep.engine.facts import read_facts
    from heterostep.engine.models import LTX2Adapter, WanAdapter

    if kind == "wan":
        return AutoencoderKLWan.from_pretrained(Path(read_facts("demo").location) / "vae").eval(), WanAdapter
    torch.manual_seed(0)
    if kind == "tiny":
        pixels = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
        return AutoencoderKLWan(base_dim=4, num_res_blocks=1, **pixels).eval(), WanAdapter
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 32, 64),  # each upsampler halves them
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    return vae.eval(), LTX2Adapter


@torch.no_grad()
def measure(kind: str, frames: int, size: int, plain: bool) -> dict[str, Any]:
    """Decode random latents into two files; the peak is of the whole process."""
    from diffusers.video_processor import VideoProcessor

    from heterostep.engine.decoding import VideoDecoder
    from heterostep.engine.media.feeding import Frames, feed
    from heterostep.engine.media.video import overlay_frames, write_mp4

    torch.set_num_threads(1)
    vae, adapter = build(kind)
    spatial = vae.spatial_compression_ratio
    temporal = vae.config.get("scale_factor_temporal") or vae.temporal_compression_ratio
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    grid = ((frames - 1) // temporal + 1, size // spatial, size // spatial)
    latents = torch.randn(1, channels, *grid, generator=torch.Generator().manual_seed(0))
    evaluations = np.arange(np.prod(grid)).reshape(grid) % 20
    pipeline = SimpleNamespace(
        vae=vae,
        video_processor=VideoProcessor(vae_scale_factor=spatial),
        maybe_free_model_hooks=lambda: None,
        _execution_device=torch.device("cpu"),
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        def video(pictures: Frames) -> None:
            write_mp4(Path(folder, "video.mp4"), pictures, 16)

        def heatmap(pictures: Frames) -> None:
            write_mp4(Path(folder, "heatmap.mp4"), overlay_frames(pictures, evaluations, (frames, size, size, 3)), 16)

        if plain:
            decoded = adapter.decode(vae, adapter.decodable(vae, latents))
            pixels = pipeline.video_processor.postprocess_video(decoded, output_type="np")[0]
            feed([(pixels * 255.0).round().astype(np.uint8)], [video, heatmap])
        else:
            decoder = VideoDecoder(pipeline, adapter(), None, latents)
            decoder.decode(lambda runs: feed(runs, [video, heatmap]))
    return {
        "vae": kind,
        "frames": frames,
        "size": size,
        "plain": plain,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    """Measure each number of frames in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vae", choices=("wan", "tiny", "ltx2"), default="wan")
    parser.add_argument("--frames", type=int, nargs="+", default=[65, 257])
    parser.add_argument("--size", type=int, default=128, help="pixels along each side")
    parser.add_argument("--plain", action="store_true", help="all frames at once, as the pipelines do it")
    parser.add_argument("--here", action="store_true", help="in this process: a peak is also that of earlier runs")
    args = parser.parse_args()
    for frames in args.frames:
        if args.here:
            print(json.dumps(measure(args.vae, frames, args.size, args.plain)), flush=True)
        else:
            command = [sys.executable, __file__, "--here", "--vae", args.vae, "--frames", str(frames)]
            subprocess.run([*command, "--size", str(args.size), *(["--plain"] if args.plain else [])], check=True)


if __name__ == "__main__":
    main()
