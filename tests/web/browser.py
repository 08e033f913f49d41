"""A Chromium that tests drive through chromedriver's own protocol (W3C WebDriver), which is JSON over HTTP."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from app.embedded import free_port
from tests.support import wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
PATIENCE_SECONDS = 30.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window. Elements are named by CSS selectors; what is not there yet is waited for."""

    def __init__(self, driver: httpx.Client) -> None:
        self.driver = driver

    def command(self, path: str, **body: Any) -> Any:
        """One command of the protocol. Raises RuntimeError with the driver's message."""
        value = self.driver.post(path, json=body).json()["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(value["message"].partition("\n")[0])
        return value

    def open(self, url: str) -> None:
        self.command("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page."""
        return self.command("execute/sync", script=script, args=list(arguments))

    def text(self, selector: str = "body") -> str:
        """The text a reader sees in all such elements; empty while there is none."""
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.innerText).join('\\n')"
        return str(self.run(script, selector))

    def count(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def see(self, text: str, selector: str = "body") -> None:
        """Wait until the text is seen."""
        wait_until(lambda: text in self.text(selector), PATIENCE_SECONDS, f"{text!r} in {selector}")

    def wait_for(self, selector: str, count: int = 1) -> None:
        wait_until(lambda: self.count(selector) >= count, PATIENCE_SECONDS, f"{count} x {selector}")

    def _element(self, selector: str) -> str:
        self.wait_for(selector)
        element: str = self.command("element", using="css selector", value=selector)[ELEMENT]
        return element

    def click(self, selector: str) -> None:
        self.command(f"element/{self._element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.command(f"element/{self._element(selector)}/value", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        self.click(f'{selector} option[value="{value}"]')

    def resize(self, width: int, height: int) -> None:
        self.command("window/rect", width=width, height=height)

    def complaints(self) -> list[str]:
        """What the page wrote to the console as errors since the last question, refused loads among them."""
        return [entry["message"] for entry in self.command("se/log", type="browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.driver.get("screenshot").json()["value"]))


@contextmanager
def browser(downloads: Path, *arguments: str) -> Iterator[Browser]:
    """A headless Chromium that keeps its downloads in a directory."""
    port = free_port()
    driver = subprocess.Popen(
        [str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    options = [
        "--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1200,900", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", *arguments,
    ]  # fmt: skip
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses root with one
    wish = {
        "goog:chromeOptions": {
            "binary": CHROMIUM, "args": options, "prefs": {"download.default_directory": str(downloads)},
        },
        "goog:loggingPrefs": {"browser": "ALL"},
    }  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            _wait_for_driver(http)
            begun = http.post("/session", json={"capabilities": {"alwaysMatch": wish}}).json()["value"]
            http.base_url = f"http://127.0.0.1:{port}/session/{begun['sessionId']}/"
            try:
                yield Browser(http)
            finally:
                http.request("DELETE", f"http://127.0.0.1:{port}/session/{begun['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(timeout=10)


def _wait_for_driver(http: httpx.Client) -> None:
    for _ in range(100):
        try:
            if http.get("/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("chromedriver does not start")
