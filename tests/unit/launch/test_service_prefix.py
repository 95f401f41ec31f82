"""The service under a path of a site: the routes, the description and the links of the page."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urljoin

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
httpx2 = pytest.importorskip("httpx2", reason="the extra 'dev' is not installed")

from heterostep.errors import ConfigError
from heterostep.launch.service.app import create_app
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings

HOST = "http://host"


@pytest.fixture
def ask(tmp_path):
    """`ask(path, root_path="", **headers)`: the answer of a service with that setting."""
    services = {}

    def get(path, root_path="", **headers):
        if root_path not in services:
            services[root_path] = VideoService(ServiceSettings(data_dir=tmp_path, root_path=root_path))

        sent = {name.replace("_", "-"): value for name, value in headers.items()}

        async def answer():
            transport = httpx2.ASGITransport(app=create_app(services[root_path]))
            async with httpx2.AsyncClient(transport=transport, base_url=HOST) as client:
                return await client.get(path, headers=sent)

        return asyncio.run(answer())

    yield get
    for service in services.values():
        service.close()


def test_the_header_and_the_setting_give_the_same(ask):
    for options in ({"x_forwarded_prefix": "/video"}, {"x_forwarded_prefix": "/video/"}, {"root_path": "/video/"}):
        assert ask("/v1/models", **options).json()["data"][0]["id"] == "demo"
        assert ask("/openapi.json", **options).json()["servers"] == [{"url": "/video"}]
        moved = ask("/docs/", **options)
        assert moved.status_code == 307 and moved.headers["location"] == f"{HOST}/video/docs"
    assert "servers" not in ask("/openapi.json").json()  # and nothing stays of another request's prefix


def test_a_proxy_may_leave_the_path_on_where_a_setting_gives_it(ask):
    assert ask("/video/v1/models", root_path="/video").status_code == 200
    assert ask("/video/", root_path="/video").status_code == 200
    moved = ask("/video", root_path="/video")
    assert moved.status_code == 307 and moved.headers["location"] == f"{HOST}/video/"
    assert ask("/videos", root_path="/video").status_code == 404
    assert ask("/video/v1/models").status_code == 404


def test_the_setting_wins_over_the_header(ask):
    answer = ask("/openapi.json", root_path="/mine", x_forwarded_prefix="/theirs")
    assert answer.json()["servers"] == [{"url": "/mine"}]


@pytest.mark.parametrize(
    "prefix", ["//evil.example", "https://evil.example", "video", "/a/../b", "/a b", "/a?b", "/" + "a" * 300, "/a//b"]
)
def test_what_is_no_path_is_ignored_in_a_header_and_refused_as_a_setting(ask, tmp_path, prefix):
    answer = ask("/openapi.json", x_forwarded_prefix=prefix)
    assert answer.status_code == 200 and "servers" not in answer.json()
    with pytest.raises(ConfigError, match="root_path must be a path such as /video"):
        ServiceSettings(data_dir=tmp_path, root_path=prefix)


@pytest.mark.parametrize("page", ["", "docs"])
def test_every_link_of_the_page_stays_under_the_path(ask, page):
    base = f"{HOST}/video/{page}"
    options = {"x_forwarded_prefix": "/video"}
    links = re.findall(r'(?:href|src)="([^"#]+)', ask(f"/{page}", **options).text)
    scripts = [link for link in links if link.endswith(".js")]
    assert scripts
    while scripts:  # what scripts import, and what they fetch
        script = scripts.pop()
        text = ask(urljoin(base, script).removeprefix(f"{HOST}/video"), **options).text
        new = {urljoin(script, name) for name in re.findall(r'from "(\./[^"]+)"', text)} - set(links)
        links += new
        scripts += new
        links += [name.split("$")[0] for name in re.findall(r'(?:fetch|json|call)\(["`]([^"`$?]+)["`?]', text)]
    assert len(links) > 5
    for link in links:
        url = urljoin(base, link)
        assert url.startswith(f"{HOST}/video/"), link
        assert ask(url.removeprefix(f"{HOST}/video"), **options).status_code in (200, 503), link  # /health: not started
