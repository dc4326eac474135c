"""A headless Chromium, driven through its debugging pipe: pages as pictures, on paper, and as their scripts see them.

Nothing but the standard library and a Chromium that is installed; where there is none, `chromium` says so.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb")
_SECONDS = 120.0


def chromium() -> str | None:
    """The first installed Chromium; the variable BITSMOE_BROWSER names another. None where there is none."""
    named = os.environ.get("BITSMOE_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page in the browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._read, self._sent, self._session = b"", 0, ""
        self.said: list[str] = []  # messages of the console, and errors
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            if time.monotonic() > until:
                raise TimeoutError("the browser does not answer")
            more = os.read(self._from, 1 << 20)
            if not more:
                raise EOFError("the browser ended")
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        heard: dict[str, Any] = json.loads(message)
        if heard.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(heard["params"]))
        return heard

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while (answer := self._message(until)).get("id") != self._sent:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def open(self, file: Path, width: int, dark: bool = False, paper: bool = False) -> None:
        """Show a file in a window of so many pixels of CSS, as tall as the page, light or dark, or as it is printed."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=features)
        self._size(width, 800)
        self._call("Page.navigate", url=file.as_uri())
        until = time.monotonic() + _SECONDS
        while self._message(until).get("method") != "Page.loadEventFired":
            pass
        self._size(width, max(800, int(self.run("document.documentElement.scrollHeight"))))

    def _size(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page on A4 paper."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        return base64.b64decode(self._call("Page.printToPDF", **size)["data"])


@contextmanager
def opened(executable: str) -> Iterator[Page]:
    """A browser with one empty page, until the block ends."""
    from_us, to_browser = os.pipe()
    to_us, from_browser = os.pipe()

    def connect() -> None:  # Chromium reads from 3 and writes to 4
        os.dup2(os.dup2(from_us, 100), 3)
        os.dup2(os.dup2(from_browser, 101), 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable, *_OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(from_browser)
        try:
            yield Page(to_browser, to_us)
        finally:
            os.close(to_browser)  # it ends when nobody talks to it any more
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            os.close(to_us)
