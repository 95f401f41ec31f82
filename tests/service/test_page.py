"""The web page in a real browser: submit, progress, the video plays, cancel, history, keys, keyboard, phone."""

from __future__ import annotations

import pytest

from browser import CHROMIUM, DRIVER, Browser
from serving import KEYS, PROMPT

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on this machine")

CONTROL, TAB, ENTER = "\ue009", "\ue004", "\ue007"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    """The page with alice's key, without videos; afterwards the console must be clean."""
    for video in server.http.get("/v1/videos", params={"limit": 100}).json()["data"]:
        server.http.delete(f"/v1/videos/{video['id']}")
    browser.open(server.url)
    browser.run(f"sessionStorage.setItem('heterostep-key', '{KEYS['alice']}')")
    browser.open(server.url)
    browser.until("return document.querySelector('#model').textContent")
    browser.complaints()  # of the first look, without a key
    yield browser
    assert browser.complaints() == []


def set_steps(page, steps):
    page.run("document.querySelector('details').open = true")
    page.type("[name=num_inference_steps]", str(steps))


def test_submit_follow_play_and_delete(page):
    assert "demo" in page.text("#model") and page.text("#health") == "ready"
    set_steps(page, 40)
    page.type("#prompt", PROMPT)
    page.click("#create")
    # Progress is seen: steps, time left, a bar that grows, a picture.
    page.until("return /Step \\d+ of 40, about .* left/.test(document.querySelector('#viewer .state')?.innerText)")
    seen = [page.run("return parseFloat(document.querySelector('#viewer .bar > div').style.width)")]
    page.until("return document.querySelector('.live img:not([hidden])')?.naturalWidth === 64", timeout=60)
    seen.append(page.run("return parseFloat(document.querySelector('#viewer .bar > div').style.width)"))
    assert 0 <= seen[0] < seen[1] < 100
    assert page.count("#viewer .steps > i") == 40
    assert page.run("return document.querySelector('#running li .bar:not([hidden])') !== null")
    # The video plays, and the map beside it at the same place.
    page.until("return document.querySelectorAll('.panes video').length === 2", timeout=60)
    page.until("return [...document.querySelectorAll('.panes video')].every((v) => v.currentTime > 0.3 && !v.paused)")
    both = "const [v, m] = document.querySelectorAll('.panes video'); return "
    width, duration, map_width, error = page.run(both + "[v.videoWidth, v.duration, m.videoWidth, v.error]")
    assert width == 64 and duration == pytest.approx(2.125, abs=0.1) and map_width == 320 and error is None
    page.run("document.querySelector('.panes video').pause()")
    page.until(both + "m.paused && Math.abs(v.currentTime - m.currentTime) < 0.2")
    assert "of the dense work" in page.text("#viewer .state")
    assert page.run("return document.querySelector('a.primary').download") == "a-red-disc-moves-right.mp4"
    assert page.run("return document.querySelector('a.primary').href").startswith(f"blob:{page.run('return origin')}")
    page.until("return document.querySelector('#list img')?.naturalWidth > 0")
    # Its settings can be taken over, and it can be removed.
    facts = "[...document.querySelectorAll('#viewer dl div')]"
    seed = page.run(f"return {facts}.find((d) => d.innerText.startsWith('Seed')).lastChild.innerText")
    page.click("#viewer .actions button:not(.danger)")
    assert page.run("return document.querySelector('[name=seed]').value") == seed
    page.click("#viewer .danger")
    page.until("return document.querySelectorAll('#history li').length === 0")
    assert page.run("return document.activeElement.id") == "prompt"


def test_cancel_from_the_page(page):
    set_steps(page, 1500)
    page.type("#prompt", PROMPT)
    page.click("#create")
    page.until("return /Step/.test(document.querySelector('#viewer .state')?.innerText)")
    page.click("#viewer .danger")
    page.until(
        "return /Cancelled after step \\d+/.test(document.querySelector('#viewer .state')?.innerText)", timeout=10
    )
    assert page.text("#list .picture") == "cancelled"


def test_by_keyboard_alone(page):
    page.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.keys(TAB)
    assert page.run("return document.activeElement.className") == "skip"
    page.keys(ENTER)
    page.until("return document.activeElement.id === 'prompt' || location.hash === '#prompt'")
    page.run("document.querySelector('#prompt').focus()")
    page.keys("a green disc")
    page.keys(TAB)
    assert page.run("return document.activeElement.id") == "compute"
    page.keys("\ue014\ue014")  # arrow right, twice
    assert page.text("#compute-text") == "60%"
    page.keys(TAB + ENTER)  # opens the settings
    assert page.run("return document.querySelector('details').open")
    page.run("document.querySelector('#prompt').focus()")
    page._do("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": [
        {"type": "keyDown", "value": CONTROL}, {"type": "keyDown", "value": ENTER},
        {"type": "keyUp", "value": ENTER}, {"type": "keyUp", "value": CONTROL},
    ]}]})  # fmt: skip
    page.until("return document.querySelectorAll('#history li').length === 1")
    assert page.run("return document.querySelector('#history .prompt').textContent") == "a green disc"
    page.run("document.querySelector('#waiting').open = true; document.querySelector('#history li a').focus()")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) != "none"
    # The focus follows the video from one list to the next.
    page.until("return document.querySelector('#list li') !== null")
    assert page.run("return document.activeElement.closest('#list li') !== null")


def test_what_the_service_refuses_is_shown(page):
    page.run("document.querySelector('details').open = true")
    page.type("[name=width]", "512")
    page.type("[name=height]", "512")
    page.type("#prompt", PROMPT)
    page.click("#create")
    page.until("return /pixels/.test(document.querySelector('#form-error').innerText)")
    assert page.count("#history li") == 0
    page.complaints()  # the console notes every answer of 400 by itself


def test_a_prompt_is_text_not_html(page, server):
    server.create(prompt="<img src=x onerror=\"document.title='owned'\"><script>1</script>")
    page.until("return document.querySelectorAll('#history li').length === 1")
    page.click("#history a")
    page.until("return /<img src=x/.test(document.querySelector('#viewer .title')?.innerText)")
    assert page.count("#viewer .title img") == 0 and "owned" not in page.run("return document.title")


def test_on_a_phone_and_in_the_dark(page, server, tmp_path):
    server.finished(server.create(num_frames=5))
    try:
        page.resize(360, 740)
        page.until("return document.querySelectorAll('#history li').length === 1")
        page.click("#history a")
        page.until("return document.querySelectorAll('.panes video').length === 2")
        assert page.run("return document.documentElement.scrollWidth") <= 360
        buttons = "[...document.querySelectorAll('button, .button')].filter((b) => b.offsetHeight)"
        assert page.run(f"return Math.min(...{buttons}.map((b) => b.offsetHeight))") >= 40  # a finger needs room
        light = page.run("return getComputedStyle(document.body).backgroundColor")
        page.dark(True)
        assert page.run("return getComputedStyle(document.body).backgroundColor") != light
        page.picture(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 10_000
    finally:
        page.dark(False)
        page.resize(1280, 900)


def test_the_key_is_asked_for(browser, server):
    browser.open(server.url)
    browser.run("sessionStorage.clear()")
    browser.open(server.url)
    browser.until("return document.querySelector('#key-dialog').open")
    for key, asked_again in (("not-a-key-0123456789", True), (KEYS["bob"], False)):
        browser.type("#key", key)
        browser.click("#key-dialog .primary")
        if asked_again:
            browser.until("return document.querySelector('#key-dialog').open")
    browser.until("return document.querySelector('#model').textContent")
    assert not browser.run("return document.querySelector('#key-dialog').open")
    assert browser.run("return localStorage.length") == 0
    browser.complaints()


def test_the_description_of_the_api(browser, server):
    browser.open(f"{server.url}/docs")
    browser.until("return document.querySelectorAll('#operations section').length > 10")
    headings = browser.run("return [...document.querySelectorAll('h2')].map((h) => h.innerText.replace(/\\s+/g, ' '))")
    assert "POST /v1/videos" in headings and "GET /v1/videos/{video_id}/events" in headings
    fields = browser.run("return [...document.querySelectorAll('th')].map((h) => h.innerText)")
    assert {"prompt *", "compute", "num_inference_steps", "idempotency-key", "timing"} <= set(fields)
    assert browser.complaints() == []
