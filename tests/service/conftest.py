from __future__ import annotations

import pytest

from serving import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One service for all tests that leave it as they found it; two keys, a queue of four, 200 steps."""
    server = Server(
        tmp_path_factory.mktemp("service") / "data", "--max-queue", 4, "--max-steps", 2000, keys=True
    ).healthy()
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
