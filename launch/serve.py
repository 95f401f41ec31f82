"""`heterostep serve`: the video service under uvicorn, or on Ray Serve.

On a Ray cluster that runs already: `serve run heterostep.launch.serve:app model=demo data-dir=/srv/videos`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig
from ..errors import ConfigError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from .logs import log_json_lines, say
from .options import Serving, is_loopback, read_settings, service_settings
from .service.results import remove_unknown
from .service.settings import ServiceSettings
from .service.store import JobStore

# Connections at once; more are answered 503.
_MAX_CONNECTIONS = 512
# An event stream or a download occupies a replica's slot as long as it lasts.
_MAX_ONGOING = 512


def serve(settings: ServiceSettings, serving: Serving) -> int:
    """Run the command; returns the exit code."""
    _require("fastapi", "uvicorn", "prometheus_client", "python_multipart", extra="serve")
    if serving.remove_unknown:
        return _remove_unknown(settings)
    if serving.no_ray:
        return _serve_here(settings, serving.host, serving.port)
    _require("ray", extra="ray", otherwise=", or serve without Ray: --no-ray")
    return _serve_on_ray(settings, serving)


def _remove_unknown(settings: ServiceSettings) -> int:
    """Remove what a service keeps in its data directory though it belongs to no job."""
    store = JobStore(settings.database)
    try:
        removed = remove_unknown(settings, store)
    finally:
        store.close()
    count = f"{len(removed)} folder{'s' * (len(removed) != 1)}"
    if removed:
        print(f"deleted {count} that belonged to no video: {', '.join(map(str, removed))}")
    else:
        print(f"deleted nothing: every folder in {settings.results} and {settings.state} belongs to a video")
    return 0


def _serve_here(settings: ServiceSettings, host: str, port: int) -> int:
    """One process with the HTTP API, and a worker process for each replica."""
    import uvicorn

    from ..engine.memory import Room
    from .service.access import BoundedConnection
    from .service.app import create_app
    from .service.service import VideoService

    log_json_lines()
    listener = _listen(host, port)  # before anything is written
    room = Room.here(settings.engine.device, settings.ranks * settings.replicas)  # before models take theirs
    service = VideoService(settings, room=room)
    if not is_loopback(host) and service.keys is None:
        say(
            "anyone who can reach this machine may use the service, because no --api-key-file is given", logging.WARNING
        )
    config = uvicorn.Config(
        create_app(service),
        http=BoundedConnection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    handle_exit = server.handle_exit

    def stop_soon(number: int, frame: Any) -> None:
        # uvicorn waits for open connections before it tells the application: streams would last until they are cut.
        service.stop_soon()
        if number == signal.SIGTERM:
            server.should_exit = True  # uvicorn's own handler would end the process by the signal, once all is in order
        else:
            handle_exit(number, frame)

    server.handle_exit = stop_soon  # type: ignore[assignment, method-assign]

    def give_up() -> None:
        while not server.should_exit:
            if service.hopeless is not None:
                server.should_exit = True
            stopped.wait(0.5)

    stopped = threading.Event()
    threading.Thread(target=give_up, daemon=True).start()
    print(f"heterostep serves {service.model} at {_addresses(*listener.getsockname()[:2])}", flush=True)
    reason = None
    try:
        server.run(sockets=[listener])
    finally:
        stopped.set()
        reason = service.hopeless
    if reason is not None:
        raise ConfigError(reason)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on port {port} of {host} ({reason}); take another --host or --port"
        ) from error


def _addresses(host: str, port: int) -> str:
    """What to open in a browser: all addresses of a machine are none that can be opened."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            near = "[::1]" if ":" in host else "127.0.0.1"
            return f"http://{socket.gethostname()}:{port}/ and, on this machine, http://{near}:{port}/"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _require(*modules: str, extra: str, otherwise: str = "") -> None:
    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        raise ConfigError(f"{absent[0]} is not installed; pip install '.[{extra}]' in heterostep's folder{otherwise}")


def app(arguments: Mapping[str, Any]) -> Any:
    """Build the Ray Serve application: `serve run heterostep.launch.serve:app NAME=VALUE ...`.

    Args:
        arguments: the flags of `heterostep serve`, without their dashes, and their values. Where Ray listens is set by
            Ray's own configuration, not by host and port.

    Returns:
        A `ray.serve.Application`.

    Raises:
        ConfigError: a value is wrong.
    """
    _require("ray", extra="ray")
    flags = read_settings(arguments, EngineConfig, HSAConfig, ParallelConfig, Serving, ServiceSettings)
    return _application(service_settings(flags), flags.get("gpus_per_replica"))


def _application(settings: ServiceSettings, gpus: int | None) -> Any:
    """The deployment: each replica is the whole service with one runner; the job store is what they share."""
    import ray
    from ray import serve

    from .service.service import VideoService

    VideoService(settings).close()  # says what is wrong with model, keys and data directory before anything starts
    replicas, settings = settings.replicas, dataclasses.replace(settings, replicas=1)
    if settings.ranks > 1:
        gpus = 0  # the ranks have them
    elif gpus is None:
        # `serve run` builds the application before it starts a cluster, which is then one of this machine.
        found = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else Path("/dev/nvidiactl").exists()
        gpus = 1 if found else 0

    class VideoReplica:
        def __init__(self, settings: ServiceSettings) -> None:
            from .service.runner import Runner
            from .service.service import VideoService

            log_json_lines()
            replica = serve.get_replica_context().replica_id.unique_id if replicas > 1 else ""
            make_runner = functools.partial(Runner, on_ray=settings.ranks > 1)
            self._service = VideoService(settings, make_runner, replica)

        def __serve_build_asgi_app__(self) -> Any:
            from .service.app import create_app

            return create_app(self._service)

        def check_health(self) -> None:
            if self._service.broken:
                raise RuntimeError("a thread of the dispatcher has died")

    deployment = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=15,
    )
    return deployment(serve.ingress()(VideoReplica)).bind(settings)


def _serve_on_ray(settings: ServiceSettings, serving: Serving) -> int:
    """Deploy on a cluster, or on one of this machine alone, until a signal comes."""
    import ray
    from ray import serve

    from .workers.ray_cluster import cluster_address, init

    ranks = settings.ranks if settings.ranks > 1 else 0
    init(cluster_address(serving.ray_address), settings.replicas * (1 + ranks), settings.engine.device)
    try:
        serve.start(http_options={"host": serving.host, "port": serving.port})
        serve.run(_application(settings, serving.gpus_per_replica), name="heterostep", route_prefix="/")
        stop = threading.Event()
        # Not before: Ray sets handlers of its own when it starts.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        address = _addresses(serving.host, serving.port)
        print(f"heterostep serves {settings.engine.model} on Ray at {address}", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0
