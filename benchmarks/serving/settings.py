"""What `bench serving` is told; names and meanings of flags are those of SGLang's `bench_serving` where it has them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...settings import check, like, setting
from ..speed.settings import ResultFiles

DATASETS = ("random", "manifest", "vbench")
SHAPE = ("width", "height", "num_frames", "fps", "num_inference_steps")
"""Settings of a request that a mix may set."""


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Which service is measured, with which requests.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    base_url: str | None = setting(None, metavar="URL", help="address of the service; left out, that of host and port")
    host: str = setting("127.0.0.1", metavar="H", help="host of the service")
    port: int = setting(8000, least=1, most=65535, help="port of the service")
    api_key_file: str | None = setting(None, metavar="FILE", help="file whose first line is the key to send")
    model: str | None = setting(None, metavar="M", help="model to name in each request")
    dataset: str = setting(
        "random",
        choices=DATASETS,
        help="prompts: ours in a random order; manifest, the lines of a file (a text, or a JSON object with the fields "
        "of a request); vbench, VBench's JSON list",
    )
    dataset_path: str | None = setting(None, metavar="FILE", help="file of manifest or vbench")
    num_prompts: int = setting(10, least=1, help="number of requests; a shorter file is read again")
    num_outputs_per_prompt: int = setting(1, least=1, help="videos of a request")
    max_concurrency: int | None = setting(
        None, least=1, help="requests at a time; left out, 1, or with --request-rate no limit"
    )
    request_rate: str = setting(
        "inf", metavar="R", help="requests per second that arrive on average; inf sends the next one as soon as it may"
    )
    burstiness: float = setting(
        1.0, above=0, help="shape of the times between arrivals: 1 is a Poisson process, below 1 comes in bursts"
    )
    width: int | None = setting(None, least=1, unit="pixels", help="of each video")
    height: int | None = setting(None, least=1, unit="pixels", help="of each video")
    num_frames: int | None = setting(None, least=1, help="frames of each video")
    fps: int | None = setting(None, least=1, help="frames per second of each video")
    num_inference_steps: int | None = setting(None, least=1, help="denoising steps of each video")
    random_request_config: str | None = setting(
        None,
        metavar="JSON",
        help='mix of requests, such as [{"weight": 3, "width": 832, "height": 480}, {"weight": 1, "num_frames": 121}]',
    )
    random_request_seed: int = setting(42, least=0, help="seed of arrivals, prompts and the mix")
    extra_body: str | None = setting(None, metavar="JSON", help="object of more fields for each request")
    form: bool = setting(False, help="send forms in place of JSON, which vLLM-Omni wants")
    warmup_requests: int = setting(1, least=0, help="requests before the measurement, one after the other")
    warmup_inference_steps: int | None = setting(
        1, least=1, help="denoising steps of these; a model that refuses so few needs more here"
    )
    slo: bool = setting(
        False, help="count requests that are as fast as the warm-up, scaled by their size, times a factor"
    )
    slo_scale: float = setting(3.0, above=0, help="that factor")
    slo_seconds: float | None = setting(
        None, above=0, help="the same limit for each request in place of the scaled one"
    )
    download: bool = setting(False, help="fetch each video; its latency includes that")
    timeout: float = setting(3600.0, above=0, unit="seconds", help="after which a request has failed")
    poll_interval: float = setting(0.5, above=0, unit="seconds", help="between two questions for a video's state")
    output_file: str | None = like(
        ResultFiles, "output_file", help="JSON file of the result; a Markdown file is written beside it"
    )
    compare: str | None = like(ResultFiles, "compare")

    def __post_init__(self) -> None:
        check(self)
        if math.isnan(self.rate):
            raise ConfigError(f"request_rate must be inf or a number above 0, not {self.request_rate!r}")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https://, not {self.base_url!r:.80}")
        if self.dataset != "random" and self.dataset_path is None:
            raise ConfigError(f"--dataset {self.dataset} needs a file; name it with --dataset-path")
        if (self.width is None) != (self.height is None):
            raise ConfigError("width and height belong together; give both or none")
        if self.slo_seconds is None and self.slo and not self.warmup_requests:
            raise ConfigError("--slo needs a warm-up request to scale; give --warmup-requests, or --slo-seconds")
        _ = self.extra, self.mix

    @property
    def url(self) -> str:
        """Address of the service, without a slash at its end."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def rate(self) -> float:
        """Requests per second; NaN for a text that says none."""
        try:
            rate = float(self.request_rate)
        except ValueError:
            return math.nan
        return rate if rate > 0 else math.nan

    @property
    def at_a_time(self) -> int:
        """Requests at a time at most."""
        if self.max_concurrency is not None:
            return self.max_concurrency
        return 1 if math.isinf(self.rate) else self.num_prompts

    @property
    def extra(self) -> Mapping[str, Any]:
        """More fields for each request."""
        found = _json("extra_body", self.extra_body) if self.extra_body is not None else {}
        if not isinstance(found, dict):
            raise ConfigError(f"extra_body must be a JSON object, not {self.extra_body!r:.80}")
        return found

    @property
    def mix(self) -> list[dict[str, Any]]:
        """Kinds of requests with their weights; empty where all are of one kind."""
        if self.random_request_config is None:
            return []
        found = _json("random_request_config", self.random_request_config)
        if not isinstance(found, list) or not all(_is_kind(kind) for kind in found):
            raise ConfigError(
                "random_request_config must be a JSON list of objects with numbers above 0 for "
                f"weight, {', '.join(SHAPE)}, width and height together, not {self.random_request_config!r:.80}"
            )
        return list(found)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} must be JSON, but {text!r:.80} is not: {error}") from error


def _is_kind(kind: Any) -> bool:
    """Whether this is a kind of a mix."""
    if not isinstance(kind, dict) or ("width" in kind) != ("height" in kind):
        return False
    return all(
        name in ("weight", *SHAPE) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for name, value in kind.items()
    )
