"""One declaration for each setting: what is made from it, and that nothing else needs an edit."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import settings_page
from heterostep.engine.config import EngineConfig
from heterostep.engine.request import GenerateRequest, JobConfig
from heterostep.errors import ConfigError, RequestError
from heterostep.hsa.config import HSAConfig
from heterostep.launch.cli import build_parser
from heterostep.launch.options import Serving, add_flags, commands_of, given, read_settings, service_settings
from heterostep.launch.service.settings import ServiceSettings
from heterostep.parallel.config import ParallelConfig
from heterostep.settings import check, like, setting, settings_of
from new_fields import with_new_fields


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int = setting(2, least=1, most=9, help="a count")
    share: float | None = setting(None, above=0, help="a share of 100 %")
    name: str = setting("a", choices=("a", "b"), flag="called", help="a name")
    fast: bool = setting(False, help="a switch")
    careful: bool | None = setting(None, help="a switch that is deduced")
    file: Path | None = setting(None, help="a file")
    more: tuple[str, ...] = setting((), help="may be repeated")
    hidden: int = setting(0, flag="", help="has no flag")


def parse(*flags):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, Sample)
    return given(Sample, vars(parser.parse_args(flags)))


def test_flags_become_values_and_what_is_left_out_keeps_its_default():
    assert parse() == {}
    flags = ["--count", "3", "--share", "1e-2", "--called", "b", "--fast", "--no-careful", "--more", "x", "--more", "y"]
    flags += ["--file", "keys.txt"]
    values = {
        "file": Path("keys.txt"),
        "count": 3,
        "share": 0.01,
        "name": "b",
        "fast": True,
        "careful": False,
        "more": ["x", "y"],
    }
    assert parse(*flags) == values
    assert Sample(**parse("--count", "3")) == Sample(count=3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--count", "10"], "must be a whole number from 1 to 9, not '10'"),
        (["--count", "1.0"], "must be a whole number from 1 to 9, not '1.0'"),
        (["--share", "0"], "must be a finite number above 0, not '0'"),
        (["--share", "nan"], "must be a finite number above 0, not 'nan'"),
        (["--called", "c"], "must be one of a, b, not 'c'"),
    ],
)
def test_a_flag_and_a_field_break_the_same_rule_in_the_same_words(flags, says):
    with pytest.raises(argparse.ArgumentError, match=says.replace("(", r"\(")):
        parse(*flags)
    item = next(item for item in settings_of(Sample) if f"--{item.flag}" == flags[0])
    assert item.rule in says


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"count": True}, "count must be a whole number from 1 to 9, not True"),
        ({"count": None}, "count must be a whole number from 1 to 9, not None"),
        ({"share": "1"}, "share must be a finite number above 0, not '1'"),
        ({"name": 1}, "name must be one of a, b, not 1"),
        ({"fast": 1}, "fast must be True or False, not 1"),
    ],
)
def test_a_wrong_value_is_refused_with_the_class_of_error_that_is_asked_for(value, says):
    with pytest.raises(RequestError) as caught:
        check(Sample(**value), RequestError)
    assert str(caught.value) == says


def test_whole_numbers_for_a_float_become_floats():
    sample = Sample(share=1)
    check(sample)
    assert isinstance(sample.share, float)


def test_like_is_the_same_setting_but_for_its_changes():
    @dataclass(frozen=True)
    class Other:
        count: int = like(Sample, "count", default=5)

    (one,), two = list(settings_of(Other)), next(settings_of(Sample))
    assert (one.default, one.help, one.rule) == (5, two.help, two.rule) and Other().count == 5


def test_every_setting_of_computing_is_a_flag_of_generate_and_of_serve():
    parsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    flags = {
        name: {flag for action in parser._actions for flag in action.option_strings} for name, parser in parsers.items()
    }
    for cls in (EngineConfig, HSAConfig, ParallelConfig):
        wanted = {f"--{item.flag}" for item in settings_of(cls) if item.flag}
        assert wanted <= flags["generate"] and wanted <= flags["serve"], cls
    assert {f"--{item.flag}" for item in settings_of(GenerateRequest) if item.flag} <= flags["generate"]


def test_flags_reach_the_settings(tmp_path):
    flags = [
        "--prompt", "x", "--solver", "euler", "--forecast", "ab2", "--max-age", "4", "--guidance-2", "3", "--ring", "2",
        "--kernel", "sdpa", "--size", "64x48", "--job-dir", str(tmp_path), "--kv-dtype", "bfloat16",
        "--dtype", "float16",
    ]  # fmt: skip
    (command,) = commands_of(build_parser().parse_args(["generate", *flags]))
    assert command.engine == EngineConfig(
        dtype="float16", hsa=HSAConfig(solver="euler", forecast="ab2", max_age=4, kv_dtype="bfloat16")
    )
    assert command.request == GenerateRequest(prompt="x", guidance_scale_2=3.0, width=64, height=48)
    assert command.degrees == {"ring": 2, "kernel": "sdpa"} and command.job == JobConfig(folder=str(tmp_path))


def test_a_service_is_set_up_by_flags_or_by_a_mapping(tmp_path):
    flags = {"data-dir": str(tmp_path), "policy": "tokens", "solver": "euler", "ulysses": 2, "shard_weights": "true",
             "max-queue": "7", "ranks": 2}  # fmt: skip
    read = read_settings(flags, EngineConfig, HSAConfig, ParallelConfig, Serving, ServiceSettings)
    settings = service_settings(read)
    assert settings.engine.hsa == HSAConfig(policy="tokens", solver="euler")
    assert (settings.degrees, settings.shard_weights, settings.max_queue, settings.ranks) == (
        {"ulysses": 2},
        True,
        7,
        2,
    )
    with pytest.raises(ConfigError, match=r"'speed' is not a setting; it must be one of .*compute.*data-dir"):
        read_settings({"speed": 1}, HSAConfig, ServiceSettings)
    with pytest.raises(ConfigError, match="compute: must be a finite number above 0 and at most 1, not '2'"):
        read_settings({"compute": 2}, HSAConfig)


def test_the_page_of_settings_is_up_to_date():
    assert settings_page.PAGE.read_text() == settings_page.page(), "run `python tests/settings_page.py`"


def test_a_new_field_needs_no_other_edit(tmp_path):
    environment = with_new_fields(tmp_path)

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    for command, flags in (("generate", ["--eng-dummy N", "--hsa-dummy N"]), ("serve", ["--hsa-dummy N"])):
        status, said = run("-m", "heterostep", command, "--help")
        assert status == 0 and all(flag in said for flag in flags) and "a setting for this test" in said
    status, said = run("-m", "heterostep", "generate", "--prompt", "x", "--eng-dummy", "2")
    assert status == 2 and "--eng-dummy: must be a whole number of at least 3, not '2'" in said


def test_a_new_field_is_in_the_http_api_both_ways(tmp_path):
    script = (
        "from heterostep.launch.service.app import create_app\n"
        "from heterostep.launch.service.service import VideoService\n"
        "from heterostep.launch.service.settings import ServiceSettings\n"
        "import json\n"
        "service = VideoService(ServiceSettings())\n"
        "print(json.dumps(create_app(service).openapi()))\n"
        "service.close()\n"
    )
    environment, command = with_new_fields(tmp_path), [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=True)
    api = json.loads(done.stdout)
    body = api["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["eng_dummy"]["anyOf"][0] == {"type": "integer", "minimum": 3}
    assert api["components"]["schemas"]["Video"]["properties"]["eng_dummy"]["description"] == "A setting for this test."
