from __future__ import annotations

import io
import pty
import sys
import threading
import types

import diffusers
import pytest
import tqdm.auto
import transformers
from huggingface_hub import utils as hub

from heterostep import Engine, EngineConfig, GenerateRequest
from heterostep.engine.progress import Progress
from heterostep.engine.request import Decoding, Started, StepDone

SWITCHES = (diffusers.utils.logging, transformers.utils.logging)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def events(num_steps, seconds, clock, *, resumed_at=None, eta_seconds=None):
    """A run whose steps take `seconds`."""
    request = types.SimpleNamespace(num_inference_steps=num_steps)
    yield Started(request=request, num_tokens=8, resumed_at=resumed_at, eta_seconds=eta_seconds)
    for step in range((resumed_at or 0) + 1, num_steps + 1):
        clock[0] += seconds
        yield StepDone(
            step=step, num_steps=num_steps, sigma=0.5, active=4, total=8, seconds=seconds,
            eta_seconds=(num_steps - step) * seconds,
        )  # fmt: skip
    yield Decoding(seconds=clock[0])


def shown(num_steps, seconds, stream=None, **more):
    stream, clock = stream or io.StringIO(), [100.0]
    progress = Progress(True, stream=stream, clock=lambda: clock[0])
    assert len(list(progress.follow(events(num_steps, seconds, clock, **more)))) > 1
    return stream.getvalue().split("\n")[:-1] if type(stream) is io.StringIO else stream.getvalue()


@pytest.mark.parametrize(("num_steps", "seconds", "lines"), [(50, 0.1, 0), (50, 1.0, 5), (1000, 1.0, 100), (5, 60, 5)])
def test_a_line_a_step_or_every_ten_seconds_whichever_is_rarer(num_steps, seconds, lines):
    first, *steps, last = shown(num_steps, seconds)
    assert first == f"encoding the prompt, then denoising in {num_steps} steps ..."
    assert last == "decoding ..."
    assert len(steps) == lines


def test_what_a_line_says():
    assert shown(100, 20.0)[1:3] == [
        "denoising: step 1 of 100, 20 s so far, 0:33:00 left",
        "denoising: step 2 of 100, 40 s so far, 0:32:40 left",
    ]
    assert shown(8, 20.0, resumed_at=6)[:2] == [
        "encoding the prompt, then denoising in 2 steps ...",
        "denoising: step 7 of 8, 20 s so far, 20 s left",
    ]
    assert shown(8, 20.0, resumed_at=8) == ["decoding ..."]


def test_a_terminal_shows_a_bar_that_passes():
    line = shown(5, 60.0, Terminal())
    assert "\n" not in line
    assert "0/5 steps, encoding, then step 1" in line and "5/5 steps, decoding" in line
    assert line.endswith("\r")


def test_stages_in_a_terminal_replace_each_other():
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress.stage("loading")
        progress.stage("writing")
    assert stream.getvalue() == "loading ...\r\x1b[Kwriting ...\r\x1b[K"


def test_lines_that_stay(capsys):
    stream, clock = Terminal(), [0.0]
    progress = Progress(stream=stream, clock=lambda: clock[0])
    for event in progress.follow(events(3, 1.0, clock)):
        if isinstance(event, Started):
            progress.say("going on")
    assert capsys.readouterr().out == "going on\n"
    Progress(False).say("nothing")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_nobody_to_show_it_to(kind):
    class Broken(kind):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    assert not shown(3, 60.0, Broken())
    # Bars of other threads wait for no lock of one that failed.
    other = threading.Thread(target=lambda: list(tqdm.tqdm(range(2), file=io.StringIO())), daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()
    closed, clock = kind(), [0.0]
    closed.close()
    progress = Progress(True, stream=closed, clock=lambda: clock[0])
    progress.stage("loading")
    assert len(list(progress.follow(events(3, 60.0, clock)))) == 5


def test_a_process_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    clock = [0.0]
    assert len(list(Progress(True, clock=lambda: clock[0]).follow(events(3, 60.0, clock)))) == 5


def test_by_default_only_people_see_it(monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        Progress(stream=stream).stage("loading")
        assert bool(stream.getvalue()) == stream.isatty()
    stream = io.StringIO()
    Progress(False, stream=stream).stage("loading")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("config", [{"IPKernelApp": {}}, {}])
def test_a_notebook_gets_a_bar_of_its_own(monkeypatch, config):
    shell = types.SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    bars = []
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda **options: bars.append(options) or tqdm.std.tqdm(**options))
    clock = [0.0]
    list(Progress(stream=io.StringIO(), clock=lambda: clock[0]).follow(events(3, 1.0, clock)))
    assert len(bars) == bool(config)
    assert all("|{bar}|" in bar["bar_format"] and bar["leave"] for bar in bars)  # its widget replaces this very text


@pytest.mark.parametrize("before", [True, False])
def test_loading_shows_no_bars_and_leaves_the_libraries_as_they_were(tiny_model, capfd, before):
    was = [switch.is_progress_bar_enabled() for switch in SWITCHES]
    try:
        for switch in SWITCHES:
            switch.enable_progress_bar() if before else switch.disable_progress_bar()
        Engine(EngineConfig(model=str(tiny_model), device="cpu"))
        assert capfd.readouterr() == ("", "")
        assert [switch.is_progress_bar_enabled() for switch in SWITCHES] == [before, before]
        assert hub.are_progress_bars_disabled() is not before
    finally:
        for switch, enabled in zip(SWITCHES, was, strict=True):
            switch.enable_progress_bar() if enabled else switch.disable_progress_bar()


def test_downloads_of_others_stay_hidden_where_they_were(tiny_model):
    transformers.utils.logging.enable_progress_bar()
    hub.disable_progress_bars()
    try:
        Engine(EngineConfig(model=str(tiny_model), device="cpu"))
        assert hub.are_progress_bars_disabled() and transformers.utils.logging.is_progress_bar_enabled()
    finally:
        hub.enable_progress_bars()


@pytest.mark.parametrize(("progress", "lines"), [(None, 0), (False, 0), (True, 2)])
def test_python_shows_it_when_asked(tiny_model, capsys, progress, lines):
    engine = Engine(EngineConfig(model=str(tiny_model), device="cpu"))
    engine.generate(GenerateRequest(prompt="x", num_frames=5, num_inference_steps=2), progress=progress)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == lines


def test_a_terminal_without_a_size():
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as stream, open(ours, "rb", buffering=0) as end:
        clock = [0.0]
        list(Progress(stream=stream, clock=lambda: clock[0]).follow(events(3, 60.0, clock)))
        shown = b""
        while b"3/3 steps" not in shown:
            shown += end.read(65536)


def test_what_is_expected_is_said_before_the_first_step():
    assert shown(8, 1.0, eta_seconds=57.4)[0] == "encoding the prompt, then denoising in 8 steps, about 57 s ..."
    assert "encoding, then about 57 s" in shown(8, 1.0, Terminal(), eta_seconds=57.4)
