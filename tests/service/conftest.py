from __future__ import annotations

import subprocess

import pytest

from serving import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One service for all tests that leave it as they found it, as a user starts it; two keys, a queue of four."""
    folder = tmp_path_factory.mktemp("service") / "data"
    flags = ("--max-queue", 4, "--max-steps", 2000)
    server = Server(folder, *flags, keys=True, popen=subprocess.Popen).healthy()
    yield server
    assert server.process.poll() is None, "the service must outlive every test"
    server.stop()


@pytest.fixture
def start(tmp_path):
    """Start services of a test's own, in one data directory."""
    started = []

    def begin(*flags: object, **options: object) -> Server:
        started.append(Server(tmp_path / "data", *flags, **options))
        return started[-1]

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.kill_everything()
