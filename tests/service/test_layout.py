"""The page with many videos, at every width: each can be reached and seen, and the address says which is shown."""

from __future__ import annotations

import pytest
from gallery import Gallery

from browser import CHROMIUM, DRIVER, Browser
from serving import KEYS

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on this machine")

WIDTHS = {390: 844, 820: 1180, 1280: 900, 1920: 1080}
NARROW = 800
ESCAPE, ENTER = "\ue00c", "\ue007"
LINKS = "const links = document.querySelectorAll('#history a')"
# Whether a link can be clicked where it is, wholly inside the list's column.
HIT = """
    const link = document.querySelectorAll('#history a')[arguments[0]];
    link.scrollIntoView({ block: 'center' });
    const box = link.getBoundingClientRect();
    const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const column = document.querySelector('#side').getBoundingClientRect();
    return link.contains(hit) && box.left >= column.left && box.right <= column.right + 0.5;
"""
SHOWN = """
    const inside = (element) => {
      const box = element?.getBoundingClientRect();
      return box && box.width && box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
    };
    const stage = document.querySelector('#stage');
    const picture = stage.querySelector('figure video, .placeholder') ?? stage.querySelector('.state');
    return stage.querySelector('.title')?.innerText === arguments[0] && inside(document.querySelector('#viewer'))
      && inside(picture) && inside(stage.querySelector('.title'));
"""


@pytest.fixture(scope="module")
def gallery(server):
    gallery = Gallery(server.data_dir, "bob", finished=26, waiting=25)
    yield gallery
    gallery.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory, server):
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    browser.open(f"{server.url}/docs")  # needs no key
    browser.run(f"sessionStorage.setItem('heterostep-key', '{KEYS['bob']}')")
    yield browser
    browser.close()


@pytest.fixture(params=WIDTHS)
def width(request, browser):
    browser.resize(request.param, WIDTHS[request.param])
    return request.param


@pytest.fixture
def page(browser, server, gallery):
    """The page with all videos listed and none chosen; afterwards the console must be clean."""
    reload(browser, server.url)
    yield browser
    assert browser.complaints() == []


def reload(browser, url):
    browser.open("about:blank")  # else another fragment of the same page is no new page
    browser.open(url)
    browser.until("return document.querySelectorAll('#list li').length >= 24")
    browser.until("return document.querySelector('#health').innerText === 'ready'", timeout=60)


def number(page, part):
    """Places in the list's order of the links in a part of it."""
    script = "return [...document.querySelectorAll('#history a')].flatMap((a, k) => a.closest(arguments[0]) ? [k] : [])"
    return page.run(script, part)


def prompt(page, place):
    return page.run(f"{LINKS}; return links[arguments[0]].querySelector('.prompt').innerText", place)


def click(page, place):
    """A click with the mouse, where the link is on the screen."""
    page.run(f"{LINKS}; links.forEach((link, k) => link.toggleAttribute('data-here', k === arguments[0]))", place)
    page.click("a[data-here]")


def test_every_video_can_be_clicked_and_is_then_seen(page, width):
    page.run("document.querySelector('#waiting').open = true")
    assert page.run("return document.documentElement.scrollWidth") <= width
    links = page.count("#history a")
    assert links == 1 + 25 + 24
    assert [place for place in range(links) if not page.run(HIT, place)] == []
    cards = number(page, "#list")
    for place in (number(page, "#running")[0], number(page, "#waiting")[-1], *cards[:3], *cards[11:14], cards[-1]):
        wanted = prompt(page, place)
        page.run(HIT, place)
        before = page.run("return scrollY")
        click(page, place)
        page.until(SHOWN, wanted, timeout=10)
        assert page.run("return scrollY") == before, "the page jumps"
        assert page.run("return document.documentElement.scrollWidth") <= width
        if width < NARROW:
            assert page.run("return document.activeElement.id") == "close"
            page.keys(ESCAPE)
            page.until("return !document.querySelector('#viewer').offsetHeight")
            assert page.run("return scrollY") == before
            assert page.run("return document.activeElement.hasAttribute('data-here')")


def test_the_running_and_the_finished_are_seen_with_many_waiting(page, gallery, width):
    assert page.text("#waiting summary") == "25 videos waiting"
    assert not page.run("return document.querySelector('#waiting').open")
    running, waiting, cards = (number(page, part) for part in ("#running", "#waiting", "#list"))
    assert len(running) == 1 and running < waiting < cards
    tops = page.run(
        "return ['#history-title', '#running', '#waiting', '#list']"
        ".map((s) => document.querySelector(s).getBoundingClientRect().top)"
    )
    assert tops == sorted(tops) and tops[3] - tops[0] < 250
    ids = "return [...document.querySelectorAll('#list li')].map((li) => li.dataset.id)"
    assert page.run(ids) == gallery.finished[:24]
    page.click("#more")
    page.until("return document.querySelectorAll('#list li').length === 26")
    assert page.run(ids) == gallery.finished and not page.run("return document.querySelector('#more').offsetHeight")


def test_the_whole_picture_is_on_the_card(page):
    page.until("return document.querySelectorAll('#list img').length === 24")
    loaded = "return [...document.querySelectorAll('#list img')].every((i) => i.complete && i.naturalWidth > 0)"
    page.until(loaded)
    cut = """
        return [...document.querySelectorAll('#list img')].filter((image) => {
          const box = image.parentElement.getBoundingClientRect(), own = image.getBoundingClientRect();
          const outside = own.height > box.height + 0.5 || own.width > box.width + 0.5;
          return outside || getComputedStyle(image).objectFit !== 'contain';
        }).length
    """
    assert page.run(cut) == 0


def test_the_address_says_which_video_is_shown(page, server, gallery, width):
    # By a link, also to one that is not on the first page of the list.
    names = gallery.prompts
    for id in (gallery.finished[4], gallery.finished[25], gallery.waiting[3]):
        reload(page, f"{server.url}/#{id}")
        page.until(SHOWN, names[id], timeout=10)
    # By a click and a changed address, back and forward.
    reload(page, server.url)
    first, second = gallery.finished[4], gallery.finished[9]
    page.click(f'[data-id="{first}"] a')
    page.until(SHOWN, names[first])
    page.run("location.hash = arguments[0]", second)
    page.until(SHOWN, names[second])
    page.run("history.back()")
    page.until(SHOWN, names[first])
    page.run("history.back()")
    page.until("return location.hash === '' && !document.querySelector('#stage .title')")
    page.run("history.forward()")
    page.until(SHOWN, names[first])
    # Closed, where it covers the list, it gives back the list.
    if width < NARROW:
        page.click("#close")
        page.until("return location.hash === '' && !document.querySelector('#viewer').offsetHeight")


def test_a_link_to_a_video_that_is_gone(page, server):
    reload(page, f"{server.url}/#video_{'f' * 32}")
    page.until("return /there is no video/.test(document.querySelector('#stage').innerText)")
    page.complaints()  # the console notes every answer of 404 by itself


def test_cards_by_keyboard(page):
    page.run("document.querySelectorAll('#list a')[5].focus()")
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    wanted = page.run("return document.activeElement.querySelector('.prompt').innerText")
    page.keys(ENTER)
    page.until(SHOWN, wanted)


def test_the_description_fits_a_phone(page, server, width):
    page.open(f"{server.url}/docs")
    page.until("return document.querySelectorAll('#operations section').length > 10")
    assert page.run("return document.documentElement.scrollWidth") <= width
    # No name is broken inside.
    heights = page.run("return [...document.querySelectorAll('th code')].map((c) => c.getClientRects().length)")
    assert set(heights) == {1}
    text = page.text("#operations")
    assert "`" not in text and "1 to 255 characters" in text and "below 2^63" in text
    assert "num_frames" in page.run("return [...document.querySelectorAll('td code')].map((c) => c.innerText)")
    left = page.run("return [...document.querySelectorAll('header > *')].map((e) => e.getBoundingClientRect().left)")
    assert min(left) == left[0] and page.text("header").count("\n") < 8
