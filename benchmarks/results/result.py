"""The form that all results share: JSON, a Markdown table of it, a picture, and what changed since an older one.

A result has rows. ``what`` says what a row measured, ``metrics`` the figures, each with its value and, where it was
measured several times, the lowest and the highest. docs/benchmarks.md names the keys. Nothing here imports PyTorch.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ...engine.media.files import check_writable, replacing, write_json
from ...errors import ConfigError

SCHEMA = 2
"""Version of the form."""
NOISE = 0.03
"""Changes up to this are noise where the measurements say nothing better."""
PACKAGES = ("heterostep", "torch", "diffusers", "transformers", "numpy")
_ROOT = Path(__file__).parents[2]


def environment(device: str | None = None) -> dict[str, Any]:
    """When, on what and with which versions a result is made; the load is that of the start."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git_revision(),
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := _version(name)) is not None},
        "device": device or processor(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def new(
    verb: str, said: Sequence[str], settings: Mapping[str, Any], *, warmup: str, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """An empty result.

    Args:
        verb: of `heterostep bench`.
        said: arguments of the command.
        settings: what was asked for.
        warmup: what was done before and not counted, in words.
        seeds: of all random numbers.
        device: in words.
    """
    return {
        "schema": SCHEMA,
        "verb": verb,
        "command": shlex.join(["heterostep", *said]),
        "environment": environment(device),
        "settings": dict(settings),
        "warmup_policy": warmup,
        "seeds": list(seeds),
        "interrupted": False,
        "notes": [],
        "rows": [],
    }


def metric(values: float | Sequence[float], *, limit: float | None = None) -> dict[str, float]:
    """A figure: the median of its values and their spread; `limit` is what it may be at most."""
    found = [float(values)] if isinstance(values, int | float) else [float(value) for value in values]
    made = {"value": median(found)}
    if len(found) > 1:
        made |= {"low": min(found), "high": max(found)}
    return made if limit is None else {**made, "limit": limit}


def row(what: Mapping[str, Any], metrics: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A row; figures that are None are left out, plain numbers become metrics."""
    known = {name: value for name, value in metrics.items() if value is not None}
    made = {name: value if isinstance(value, Mapping) else metric(value) for name, value in known.items()}
    return {"what": dict(what), "metrics": made, **more}


class Files:
    """Where a result goes: a JSON file, a Markdown file beside it, and a picture where matplotlib is installed."""

    def __init__(self, output: str | None, compare: str | None) -> None:
        """Check both before anything is measured.

        Raises:
            ConfigError: the one cannot be written, or the other is no result.
        """
        self.path = None if output is None else check_writable(output, ".json")
        self.old = None if compare is None else read(compare)

    def keep(self, result: Mapping[str, Any]) -> None:
        """Write the JSON as far as it is."""
        if self.path is not None:
            write_json(self.path, result)

    def compare(self, result: dict[str, Any]) -> None:
        """Add to a result what changed since the older one, if there is one."""
        if self.old is not None:
            result["changes"] = changes(result, self.old)

    def finish(self, result: dict[str, Any], picture: tuple[str, str] | None = None) -> list[Path]:
        """Compare, and write everything; returns what was written.

        Args:
            result: all rows.
            picture: key of ``what`` along the bottom, and the metric to draw.
        """
        self.compare(result)
        if self.path is None:
            return []
        self.keep(result)
        written = [self.path, self.path.with_suffix(".md")]
        drawn = None
        if picture is not None and result["rows"] and find_spec("matplotlib") is not None:
            drawn = self.path.with_suffix(".png")
            plot(drawn, result, *picture)
            written.append(drawn)
        with replacing(written[1]) as torn:
            torn.write_text(markdown(result, None if drawn is None else drawn.name), encoding="utf-8")
        return written


def read(path: str | Path) -> dict[str, Any]:
    """A result from its file.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as a result of `heterostep bench`: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list) or found.get("schema") != SCHEMA:
        raise ConfigError(f"{str(path)!r} is not a result of `heterostep bench` in form {SCHEMA}")
    return found


def changes(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure that both have: its ratio, the noise, and whether it changed beyond that.

    Noise is the wider relative spread of the two, and at least `NOISE`.
    """
    before = {_key(row["what"]): row["metrics"] for row in old["rows"]}
    found = []
    for each in new["rows"]:
        for name, now in each["metrics"].items():
            then = before.get(_key(each["what"]), {}).get(name)
            if then is None or not then["value"] or not now["value"]:
                continue
            ratio, noise = now["value"] / then["value"], max(_spread(now), _spread(then), NOISE)
            changed = not 1 / (1 + noise) <= ratio <= 1 + noise
            found.append({"what": each["what"], "metric": name, "ratio": ratio, "noise": noise, "changed": changed})
    return found


def differing(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What of the circumstances differs, which may be the reason of a change."""
    pairs = {name: (old["environment"].get(name), new["environment"].get(name)) for name in ("device", "versions")}
    pairs["settings"] = (old["settings"], new["settings"])
    return [name for name, (then, now) in pairs.items() if then != now]


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)


def _spread(figure: Mapping[str, float]) -> float:
    low, high = figure.get("low"), figure.get("high")
    return 0.0 if low is None or high is None or not figure["value"] else (high - low) / abs(figure["value"])


def said_changes(result: Mapping[str, Any]) -> list[str]:
    """A line for each change beyond the noise."""
    found = result.get("changes", [])
    lines = [
        f"{_words(change['what'])}: {_name(change['metric'])} is {change['ratio']:.2f} times the old one "
        f"(noise {change['noise']:.0%})"
        for change in found
        if change["changed"]
    ]
    return lines or ([f"{len(found)} figures were compared, none changed beyond the noise"] if found else [])


def _words(what: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in what.items()) or "all"


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def table(result: Mapping[str, Any]) -> list[str]:
    """The rows as Markdown: one table for each set of keys of ``what``."""
    lines: list[str] = []
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for each in result["rows"]:
        groups.setdefault(tuple(each["what"]), []).append(each)
    for keys, rows in groups.items():
        names = list(dict.fromkeys(name for each in rows for name in each["metrics"]))
        heads = [*map(_name, keys), *map(_name, names)]
        lines += ["" if lines else None, f"| {' | '.join(heads)} |"]  # type: ignore[list-item]
        lines.append("|" + "---|" * len(keys) + "---:|" * len(names))
        for each in rows:
            cells = [str(each["what"][key]) for key in keys]
            cells += [_cell(each["metrics"].get(name)) for name in names]
            lines.append(f"| {' | '.join(cells)} |")
    return [line for line in lines if line is not None]


def _cell(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return ""
    text = _number(figure["value"])
    if "low" in figure:
        text += f" ({_number(figure['low'])} .. {_number(figure['high'])})"
    if "limit" in figure:
        text += (
            f", at most {figure['limit']:g}: {'holds' if figure['value'] <= figure['limit'] else '**does not hold**'}"
        )
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown(result: Mapping[str, Any], picture: str | None = None) -> str:
    """Render a result."""
    env = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    load = "" if env["load_average"] is None else f", load {env['load_average']} at the start"
    cores = f", {env['processors']} processors" if env.get("processors") else ""
    lines = [
        f"# bench {result['verb']}",
        "",
        f"{env['date']}, {env['device']}{cores}{load}. Python {env['python']}, {versions}, "
        f"git {env['git'] or 'unknown'}. Seeds {', '.join(map(str, result['seeds'])) or 'none'}.",
        "",
        "Made by:",
        "",
        f"    {result['command']}",
        "",
        f"Warm-up: {result['warmup_policy']}. A figure is the median of its measurements; the range is their spread.",
        *(["", "**Interrupted**: these are the rows that were measured until then."] if result["interrupted"] else []),
        *(line for note in result["notes"] for line in ("", note)),
        *(["", f"![{result['verb']}]({picture})"] if picture else []),
        "",
        *table(result),
    ]
    if "changes" in result:
        lines += ["", "## Since the older result", "", *(f"* {line}" for line in said_changes(result))]
    return "\n".join(lines) + "\n"


def plot(path: Path, result: Mapping[str, Any], key: str, name: str) -> None:
    """Draw a metric over one key of ``what``, a line for each value of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    series: dict[str, list[tuple[Any, float]]] = {}
    for each in result["rows"]:
        if key in each["what"] and name in each["metrics"]:
            others = _words({other: value for other, value in each["what"].items() if other != key})
            series.setdefault(others, []).append((each["what"][key], each["metrics"][name]["value"]))
    for label, points in series.items():
        points.sort()
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
    axis.set(xlabel=_name(key), ylabel=_name(name), title=f"{result['verb']}: {result['environment']['device']}")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if series:
        axis.legend(fontsize=8)
    with replacing(path) as torn:
        figure.savefig(torn, dpi=110, format="png")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on the path, not installed
        return None


def _git_revision() -> str | None:
    """Commit of the checkout, with "+" when files differ from it; None where this is an installed package."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        commit, state = (
            subprocess.run(["git", *command], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if state else "")


def processor() -> str:
    """This machine's processor in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"CPU, {platform.processor() or platform.machine()}"
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {named[0] if named else platform.machine()}"
