"""The serving benchmarks of others, unmodified, against `heterostep serve`: every request must be completed.

    python benchmarks/clients.py --work /tmp/clients --output benchmarks/reports/clients.md

Fetches SGLang's `bench_serving`, vLLM-Omni's `diffusion_benchmark_serving` and AIPerf, each into a folder of its own
below `--work`, and needs the network for that. The first two import PyTorch, which they take from this environment;
what else they need comes without its dependencies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
import urllib.request
import venv
from pathlib import Path

from heterostep.engine.facts import DEMO_MODEL

SGLANG, VLLM_OMNI, AIPERF = "0.5.23", "0.20.0", "0.13.0"
# What SGLang's module imports on its way, whatever the verb needs of it.
SGLANG_NEEDS = (
    *("aiohttp", "aiosignal", "aiohappyeyeballs", "frozenlist", "multidict", "yarl", "propcache", "attrs", "requests"),
    *("urllib3", "charset_normalizer", "orjson", "pybase64", "triton", "msgspec", "pyzmq", "ipython", "traitlets"),
    *("opencv-python-headless", "httpx", "httpcore", "h11", "anyio", "certifi", "idna"),
)
REQUESTS = 4
SIZE = ("--width", "64", "--height", "64", "--num-frames", "17", "--fps", "8", "--num-inference-steps", "10")


def pip(*arguments: object, python: str = sys.executable) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", *map(str, arguments)], check=True)


def sglang(work: Path, url: str) -> dict[str, float]:
    """Returns completed requests, outputs, mean seconds and peak MiB."""
    code, needs, found = work / "sglang", work / "sglang-needs", work / "sglang.json"
    if not code.exists():
        pip("--no-deps", "--target", needs, *SGLANG_NEEDS)
        pip("--no-deps", "--target", code, f"sglang=={SGLANG}")
    verb = ("-m", "sglang.multimodal_gen.benchmarks.bench_serving", "--task", "text-to-video")
    run([sys.executable, *verb, "--base-url", url, *flags(found)], PYTHONPATH=f"{code}{os.pathsep}{needs}")
    result = json.loads(found.read_text())
    return {
        "completed": result["completed_requests"],
        "outputs": result["completed_outputs"],
        "seconds": result["latency_mean"],
        "peak": result["peak_memory_mb_max"],
    }


def vllm_omni(work: Path, url: str) -> dict[str, float]:
    """The same for vLLM-Omni's script, which is in its source archive only."""
    code, found = work / f"vllm_omni-{VLLM_OMNI}", work / "vllm-omni.json"
    if not code.exists():
        with urllib.request.urlopen("https://pypi.org/simple/vllm-omni/") as answer:
            found_at = re.search(rf'href="([^"#]+vllm_omni-{VLLM_OMNI}\.tar\.gz)', answer.read().decode())
        archive = work / "vllm-omni.tar.gz"
        urllib.request.urlretrieve(found_at.group(1), archive)
        with tarfile.open(archive) as content:
            content.extractall(work, filter="data")
    script = code / "benchmarks" / "diffusion" / "diffusion_benchmark_serving.py"
    verb = (script, "--backend", "v1/videos", "--task", "t2v", "--model", "demo")
    run([sys.executable, *verb, "--base-url", url, *flags(found)], PYTHONPATH=str(work / "sglang-needs"))
    result = json.loads(found.read_text())
    return {
        "completed": result["completed_requests"],
        "outputs": result["completed_requests"],
        "seconds": result["latency_mean"],
        "peak": result["peak_memory_mb_max"],
    }


def aiperf(work: Path, url: str) -> dict[str, float]:
    """The same for AIPerf, with the video's own times and memory that it reads from our answers."""
    folder, found = work / "aiperf", work / "aiperf-result"
    if not (folder / "bin" / "aiperf").exists():
        venv.create(folder, with_pip=True)
        pip(f"aiperf=={AIPERF}", python=str(folder / "bin" / "python"))
    verb = ("profile", "--model", "demo", "--endpoint-type", "video_generation", "--url", url, "--concurrency", "1")
    extra = ("--extra-inputs", "size:64x64", "--extra-inputs", "num_inference_steps:10", "--ui", "none")
    where = ("--tokenizer", DEMO_MODEL / "tokenizer", "--output-artifact-dir", found)
    run([folder / "bin" / "aiperf", *verb, *extra, *where, "--request-count", REQUESTS])
    result = json.loads((found / "profile_export_aiperf.json").read_text())
    return {
        "completed": result["request_count"]["avg"],
        "outputs": result["request_count"]["avg"],
        "seconds": result["request_latency"]["avg"] / 1000,
        "peak": result["video_peak_memory"]["max"],
    }


def flags(found: Path) -> tuple[object, ...]:
    return ("--dataset", "random", "--num-prompts", REQUESTS, *SIZE, "--output-file", found)


def run(command: list[object], **environment: str) -> None:
    subprocess.run(list(map(str, command)), env={**os.environ, **environment}, check=True, timeout=600)


@contextlib.contextmanager
def service(work: Path):
    """Start `heterostep serve --no-ray` with the demo model; its address."""
    command = [Path(sysconfig.get_path("scripts")) / "heterostep", "serve", "--no-ray", "--port", "0"]
    command += ["--data-dir", work / "data"]
    with (work / "service.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        url = process.stdout.readline().split()[-1].rstrip("/")
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health") as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, "the service ended; see service.log"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the clients and their results")
    parser.add_argument("--output", type=Path, required=True, help="the report, Markdown")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clients = {
        f"SGLang {SGLANG}, `bench_serving`": sglang,
        f"vLLM-Omni {VLLM_OMNI}, `diffusion_benchmark_serving.py`": vllm_omni,
        f"AIPerf {AIPERF}, `--endpoint-type video_generation`": aiperf,
    }
    rows = []
    with service(args.work) as url:
        for name, client in clients.items():
            found = client(args.work.resolve(), url)
            assert found["completed"] == found["outputs"] == REQUESTS and found["peak"] > 0, (name, found)
            told = f"{found['completed']:.0f} of {REQUESTS} | {found['seconds']:.2f} | {found['peak']:.0f}"
            rows.append(f"| {name} | {told} |")
    args.output.write_text(
        "# Benchmark clients of others against `heterostep serve --no-ray`\n\n"
        f"Made by `python benchmarks/clients.py --work DIR --output {args.output}`. Demo model, 64 x 64 x 17, 10\n"
        "steps, compute .5, one request at a time. The clients are unmodified. "
        f"Load average: {os.getloadavg()[0]:.1f}.\n\n"
        "| client | completed | mean latency, s | peak memory as it reports it, MiB |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nSGLang's and vLLM-Omni's clients ask for the state every second or two, which their latencies show.\n"
    )


if __name__ == "__main__":
    main()
