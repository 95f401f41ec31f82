"""`heterostep serve`: the video service under uvicorn, or on Ray Serve.

On a Ray cluster that runs already: `serve run heterostep.launch.serve:app model=demo data-dir=/srv/videos`.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .gang.config import threads_asked

if TYPE_CHECKING:
    from .service.settings import ServiceSettings

# Connections at once; more are answered 503.
_MAX_CONNECTIONS = 512
# An event stream or a download occupies a replica's slot as long as it lasts.
_MAX_ONGOING = 512
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def serve(arguments: argparse.Namespace) -> int:
    """Run the command with parsed arguments; returns the exit code."""
    _require("fastapi", "uvicorn", "prometheus_client", "python_multipart", extra="serve")
    settings = settings_from(arguments)
    if arguments.no_ray:
        if settings.ranks > 1:
            raise ConfigError(
                f"--gpus-per-replica {settings.ranks} with --no-ray: several ranks for one video need Ray; leave out "
                "one of the two"
            )
        return _serve_here(settings, arguments.host, arguments.port)
    _require("ray", extra="ray", otherwise=", or serve without Ray: --no-ray")
    return _serve_on_ray(settings, arguments)


def settings_from(arguments: argparse.Namespace) -> ServiceSettings:
    """The settings that flags ask for; ConfigError says what is wrong with them."""
    from .service.settings import ServiceSettings

    hosts: tuple[str, ...] = ()
    if _is_loopback(arguments.host) and arguments.api_key_file is None:
        # A page that calls itself by a name of its own could otherwise send jobs to this machine.
        hosts = (*_LOOPBACK, *(name.lower() for name in arguments.allow_host))
    names = (
        *("model", "compute", "policy", "dtype", "device", "replicas", "checkpoint_every", "root_path"),
        *("max_queue", "max_prompt", "max_pixels", "max_frames", "max_steps", "keep_days", "keep_gib"),
    )
    return ServiceSettings(
        data_dir=Path(arguments.data_dir),
        api_key_file=Path(arguments.api_key_file) if arguments.api_key_file is not None else None,
        allowed_hosts=hosts,
        ranks=max(1, arguments.gpus_per_replica or 1),
        threads=threads_asked(),
        **{name: getattr(arguments, name) for name in names},
    )


def _serve_here(settings: ServiceSettings, host: str, port: int) -> int:
    """One process with the HTTP API, and a worker process for each replica."""
    import uvicorn

    from .service.app import create_app
    from .service.connection import BoundedConnection
    from .service.logs import log_json_lines, say
    from .service.service import VideoService

    log_json_lines()
    listener = _listen(host, port)  # before anything is written
    service = VideoService(settings)
    if not _is_loopback(host) and service.keys is None:
        say("everybody who reaches this machine may use the service: --api-key-file is not given", logging.WARNING)
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
        handle_exit(number, frame)

    server.handle_exit = stop_soon  # type: ignore[assignment, method-assign]

    def give_up() -> None:
        while not server.should_exit:
            if service.hopeless is not None:
                server.should_exit = True
            stopped.wait(0.5)

    stopped = threading.Event()
    threading.Thread(target=give_up, daemon=True).start()
    print(f"heterostep serves {service.model} at {_address(listener)}", flush=True)
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


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
    from .cli import build_parser

    _require("ray", extra="ray")
    flags = [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    parsed = build_parser().parse_args(["serve", *flags])
    return _application(settings_from(parsed), parsed.gpus_per_replica)


def _application(settings: ServiceSettings, gpus: int | None) -> Any:
    """The deployment: each replica is the whole service with one runner; the job store is what they share."""
    import dataclasses

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
            from .service.gang_runner import GangRunner
            from .service.logs import log_json_lines
            from .service.process_runner import ProcessRunner
            from .service.service import VideoService

            log_json_lines()
            self._service = VideoService(settings, GangRunner if settings.ranks > 1 else ProcessRunner)

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


def _serve_on_ray(settings: ServiceSettings, arguments: argparse.Namespace) -> int:
    """Deploy on a cluster, or on one of this machine alone, until a signal comes."""
    import ray
    from ray import serve

    from .gang.cluster import cluster_address, init

    ranks = settings.ranks if settings.ranks > 1 else 0
    init(cluster_address(arguments.ray_address), settings.replicas * (1 + ranks), settings.device)
    try:
        serve.start(http_options={"host": arguments.host, "port": arguments.port})
        serve.run(_application(settings, arguments.gpus_per_replica), name="heterostep", route_prefix="/")
        stop = threading.Event()
        # Not before: Ray sets handlers of its own when it starts.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"heterostep serves {settings.model} at http://{arguments.host}:{arguments.port}/ on Ray", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0
