"""A headless Chromium, driven by the W3C WebDriver protocol: JSON over HTTP to chromedriver, nothing else."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import httpx2

from waiting import until

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-device-scale-factor=1",
)  # fmt: skip
DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One window with a profile of its own."""

    def __init__(self, profile: Path, *flags: str, width: int = 1280, height: int = 900):
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            if "successfully on port" in line:
                port = line.rstrip(".\n").split()[-1]
                break
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False)
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS, *flags, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
        self.session = f"/session/{made['sessionId']}"

    def close(self) -> None:
        try:
            self.http.delete(self.session)
        finally:
            self.driver.terminate()
            self.driver.wait(10)
            self.http.close()

    def _do(self, path: str, body: dict | None = None) -> object:
        answer = (
            self.http.post(self.session + path, json=body) if body is not None else self.http.get(self.session + path)
        )
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self._do("/url", {"url": url})

    def run(self, script: str, *arguments: object) -> object:
        """Run JavaScript; returns what it returns."""
        return self._do("/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """Visible text of the first element that matches, empty if none does."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def click(self, selector: str) -> None:
        self._do(f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type as a person does, key by key."""
        element = self._find(selector)
        self._do(f"/element/{element}/clear", {})
        self._do(f"/element/{element}/value", {"text": text})

    def keys(self, text: str) -> None:
        """Press keys wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._do("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._do("/screenshot")))

    def resize(self, width: int, height: int) -> None:
        # A window has a least width; the page is told another.
        command = {"cmd": "Emulation.setDeviceMetricsOverride"}
        params = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._do("/goog/cdp/execute", {**command, "params": params})

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self._do("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def complaints(self) -> list[str]:
        """What the console says that it should not: errors, and anything that the policy refused."""
        logs = self._do("/se/log", {"type": "browser"})
        return [entry["message"] for entry in logs if entry["level"] == "SEVERE"]

    def until(self, script: str, *arguments: object, timeout: float = 30) -> object:
        """Wait until a script returns something true; returns it."""
        return until(lambda: self.run(script, *arguments), timeout)

    def _find(self, selector: str) -> str:
        return self._do("/element", {"using": "css selector", "value": selector})[_ELEMENT]
