"""The service as a user starts it: a process of its own with a worker process, real model, real videos."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

import forked
from waiting import until

KEYS = {"alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdef"}
PROMPT = "a red disc moves right"
STEPS = 6


class Server:
    """A running service.

    Attributes:
        url: where it listens.
        http: a client for requests that the openai client cannot make; as alice where there are keys.
        scratch: its working and temporary directory.
        log: what it wrote to stderr: JSON lines.
    """

    def __init__(self, data_dir: Path, *flags: object, keys: bool = False, port: int = 0, popen=forked.Popen):
        for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "openai"):
            pytest.importorskip(module, reason="the extras 'serve' and 'dev' are not installed")
        self.data_dir, self.log = data_dir, data_dir.with_name(f"{data_dir.name}.log")
        if keys:
            key_file = data_dir.with_name("keys.txt")
            key_file.write_text("# who may call\n" + "".join(f"{name} {key}\n" for name, key in KEYS.items()))
            flags = (*flags, "--api-key-file", key_file)
        # Working and temporary directory: whatever is written there was written where it should not be.
        self.scratch = data_dir.with_name("scratch")
        self.scratch.mkdir(exist_ok=True)
        self.process = popen(
            [
                *(sys.executable, "-m", "heterostep", "serve", "--no-ray"),
                *("--port", str(port), "--data-dir", str(data_dir), *map(str, flags)),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(self.scratch)},
            cwd=self.scratch,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("heterostep serves"), self.log.read_text()
        self.url = line.split()[-1].rstrip("/")
        headers = {"authorization": f"Bearer {KEYS['alice']}"} if keys else {}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=60.0)

    def client(self, name: str = "alice", key: str | None = None):
        """The official openai client, which does not try again by itself: every error is seen."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or KEYS[name], max_retries=0)

    def healthy(self) -> Server:
        """Wait until a job could run."""
        until(lambda: self.http.get("/health").status_code == 200, 280)
        return self

    def create(self, prompt: str = PROMPT, **fields: object) -> str:
        """Queue a short video; returns its id."""
        answer = self.http.post("/v1/videos", json={"prompt": prompt, "num_inference_steps": STEPS, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def video(self, id: str) -> dict:
        return self.http.get(f"/v1/videos/{id}").json()

    def finished(self, id: str, timeout: float = 240) -> dict:
        """Wait for the end of a video; returns it."""
        until(lambda: self.video(id)["status"] not in ("queued", "in_progress"), timeout)
        return self.video(id)

    def running(self, id: str, step: int = 1, timeout: float = 200) -> None:
        """Wait until `step` steps of a video are done."""
        until(lambda: self.video(id)["step"] >= step, timeout)

    def logged(self, event: str) -> list[dict]:
        """Records of an event."""
        records = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [record for record in records if record["event"] == event]

    def workers(self) -> list[int]:
        """Process ids of the workers that live."""
        pids = dict.fromkeys(pid for record in self.logged("runner ready") for pid in record["pids"])
        return [pid for pid in pids if alive(pid)]

    def kill_everything(self) -> None:
        """Kill -9, workers first or last as it comes."""
        for pid in (*self.workers(), self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.http.close()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.http.close()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
