"""A field that is added to `GenerateRequest` is an input of the page's form, and what is typed there is asked for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from browser import CHROMIUM, DRIVER, Browser
from new_fields import with_new_fields

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on this machine")


def test_a_new_field_is_in_the_form(tmp_path):
    server = subprocess.Popen(
        [sys.executable, "-m", "heterostep", "serve", "--no-ray", "--port", "0", "--data-dir", "data"],
        cwd=tmp_path, env=with_new_fields(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        address = next(found for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:[0-9]+/", line)))
        browser = Browser(tmp_path / "profile")
        try:
            browser.open(address[0])
            browser.until("return document.querySelector('[name=eng_dummy]')")
            label = "return document.querySelector('[name=eng_dummy]').closest('label').textContent"
            assert browser.run(label) == "Eng dummy"
            browser.run("document.querySelector('#form details').open = true")
            browser.type("[name=eng_dummy]", "2")
            assert not browser.run("return document.querySelector('[name=eng_dummy]').checkValidity()")
            browser.type("[name=eng_dummy]", "4")
            browser.type("[name=prompt]", "a red disc")
            browser.run("document.querySelector('#form').requestSubmit()")
            videos = "return (async () => (await (await fetch('v1/videos')).json()).data.map((v) => v.eng_dummy))()"
            wait = "return (async () => (await (await fetch('v1/videos')).json()).data.length > 0)()"
            browser.until(wait, timeout=20)
            assert browser.run(videos) == [4]
        finally:
            browser.close()
    finally:
        server.terminate()
        server.wait()
