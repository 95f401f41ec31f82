"""What the web page asks for: whatever its user leaves alone is as if it were left out, for every family of models."""

from __future__ import annotations

import dataclasses
import threading

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from browser import CHROMIUM, DRIVER, Browser
from heterostep.engine.defaults import DEFAULTS
from heterostep.engine.facts import read_facts
from heterostep.launch.serve import _listen
from heterostep.launch.service.app import create_app
from heterostep.launch.service.bodies import CreateVideo
from heterostep.launch.service.requests import Asked
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings, limits_for
from serving import PROMPT
from waiting import until

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on this machine")


class Page:
    """The page in a browser, of a service that makes nothing and pretends to have any model."""

    def __init__(self, folder):
        self.service = VideoService(ServiceSettings(data_dir=folder / "data"))
        self.listener = _listen("127.0.0.1", 0)
        config = uvicorn.Config(create_app(self.service), log_config=None, lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.browser = Browser(folder / "profile")

    def close(self):
        self.browser.close()
        self.server.should_exit = True
        self.thread.join()
        self.service.close()

    def open(self, family):
        facts = dataclasses.replace(read_facts("demo"), family=family, rope_max=10_000)
        self.facts = dataclasses.replace(facts, experts=1 + (facts.defaults.guidance_scale_2 is not None))
        self.limits = limits_for(self.service.settings, self.facts)
        self.service._facts, self.service._limits = self.facts, self.limits
        self.browser.open(self.address)
        self.browser.until(f"return document.querySelector('[name=width]')?.value === '{facts.defaults.width}'")

    def made(self, **typed):
        """The request of the video that the page asks for."""
        self.browser.run("document.querySelector('details').open = true")
        for name, text in {"prompt": PROMPT, **typed}.items():
            self.browser.type(f"[name={name}]", text)
        before = len(self.videos())
        self.browser.run("document.querySelector('#create').closest('form').requestSubmit()")
        until(lambda: len(self.videos()) > before, 20)
        return self.service._store.get(self.videos()[0].id, "").request

    def videos(self):
        return self.service.list("", after=None, limit=100, newest_first=True)[0]

    def wanted(self, **fields):
        """The request that the same fields make without a page."""
        video, _ = self.service.submit(Asked(CreateVideo(prompt=PROMPT, **fields), ""), "", None)
        return self.service._store.get(video.id, "").request


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.close()


@pytest.mark.parametrize("family", DEFAULTS)
def test_untouched_settings_are_the_models_own(page, family):
    page.open(family)
    made = page.made()
    assert made == page.wanted() | {"seed": made["seed"]}
    assert page.browser.run("return document.querySelector('[name=guidance_scale_2]').offsetHeight > 0") == (
        page.facts.experts == 2
    )


@pytest.mark.parametrize(
    ("typed", "fields"),
    [
        ({"num_frames": "9", "seed": "3"}, {"num_frames": 9, "seed": 3}),
        ({"height": "64", "seed": "3"}, {"size": "1280x64", "seed": 3}),
        # The page shows both guidance scales: what is seen is what is asked for.
        ({"guidance_scale": "6", "seed": "3"}, {"guidance_scale": 6.0, "guidance_scale_2": 3.0, "seed": 3}),
        ({"guidance_scale_2": "2", "seed": "3"}, {"guidance_scale": 4.0, "guidance_scale_2": 2.0, "seed": 3}),
        ({"fps": "8", "negative_prompt": "blurry", "seed": "3"}, {"fps": 8, "negative_prompt": "blurry", "seed": 3}),
    ],
)
def test_what_is_changed_is_asked_for(page, typed, fields):
    page.open("Wan 2.2 A14B")
    assert page.made(**typed) == page.wanted(**fields)


@pytest.mark.parametrize("fields", [{"guidance_scale": 6.0}, {"guidance_scale_2": 2.0}, {}])
def test_the_settings_of_a_video_make_it_again(page, fields):
    page.open("Wan 2.2 A14B")
    made = page.wanted(seed=3, compute=0.25, size="640x480", **fields)
    id = page.videos()[0].id
    page.service.cancel(id, "")
    page.browser.open(f"{page.address}#{id}")
    page.browser.until("return document.querySelector('#viewer .danger')?.innerText === 'Delete'")
    again = "[...document.querySelectorAll('#viewer button')].find((b) => b.innerText === 'Use these settings')"
    page.browser.run(f"{again}.click()")
    assert page.made() == made
