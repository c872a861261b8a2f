"""A headless Chromium, driven over WebDriver's plain HTTP: what a person does with a page, and what the page did."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from helpers.servers import wait_for

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol hands out elements
ENTER, SHIFT_ENTER = "\ue007", "\ue008\ue007\ue008"
ARROW_UP, ARROW_RIGHT, ARROW_DOWN = "\ue013", "\ue014", "\ue015"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1440,900")


#: Browsers that chromedriver finds by itself.
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def is_missing() -> bool:
    """Whether there is no browser, or nothing to drive it with."""
    return shutil.which("chromedriver") is None or not any(map(shutil.which, BROWSERS))


class Browser:
    """One window. Elements are named by CSS selectors."""

    def __init__(self, driver: str, *flags: str) -> None:
        """driver: address of a chromedriver."""
        options = {"args": [*FLAGS, *flags]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self._client = httpx.Client(timeout=60)
        self._session = f"{driver}/session"
        answer = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._session += f"/{answer['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body)
        response = self._client.request(method, self._session + path, content=content)
        value = response.json()["value"]
        assert response.status_code == 200, value["message"]
        return value

    def close(self) -> None:
        """Close the window."""
        self._ask("DELETE", "")
        self._client.close()

    def open(self, url: str) -> None:
        """Load a page in a tab of its own, which keeps nothing of the tab before."""
        tab = self._ask("POST", "/window/new", {"type": "tab"})["handle"]
        self._ask("DELETE", "/window")
        self._ask("POST", "/window", {"handle": tab})
        self._ask("POST", "/url", {"url": url})

    def reload(self) -> None:
        """Load the page again."""
        self._ask("POST", "/refresh", {})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page. Returns what it does."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def _find(self, selector: str) -> str:
        return str(self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT])

    def click(self, selector: str) -> None:
        """Click an element, which must be in sight."""
        self._ask("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def clear(self, selector: str) -> None:
        """Empty a field."""
        self._ask("POST", f"/element/{self._find(selector)}/clear", {})

    def text(self, selector: str) -> str:
        """The text in sight of the first element; empty if there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def wait_for_text(self, selector: str, text: str) -> None:
        """Wait until an element has a text in it."""
        wait_for(lambda: text in self.text(selector))

    def picture(self, file: Path) -> None:
        """Save what is in sight as PNG."""
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def resize(self, width: int, height: int) -> None:
        """Make the page so large, in pixels of a phone or a screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)

    def command(self, name: str, **parameters: Any) -> Any:
        """Give Chromium one of the commands of its own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def console(self) -> list[str]:
        """What has come on the console since this was asked last."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def addresses(self) -> list[str]:
        """The addresses that were asked for since this was asked last."""
        entries = [
            json.loads(entry["message"])["message"] for entry in self._ask("POST", "/se/log", {"type": "performance"})
        ]
        return [each["params"]["request"]["url"] for each in entries if each["method"] == "Network.requestWillBeSent"]


@contextlib.contextmanager
def browsing(*flags: str) -> Iterator[Browser]:
    """Start a browser. flags: of Chromium, beside those that it needs here."""
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        port = next(
            found[1] for line in process.stdout if (found := re.search(r"started successfully on port (\d+)", line))
        )
        threading.Thread(target=process.stdout.read, daemon=True).start()
        browser = Browser(f"http://127.0.0.1:{port}", *flags)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
