"""A headless Chromium, driven by its own DevTools protocol: no driver is needed."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from itertools import count

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip

# Text of a page with all that its components hide in shadow trees.
DEEP_TEXT = """(() => {
  const texts = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return texts.join(" ");
})()"""


class Page:
    """One tab.

    Args:
        folder: Holds the browser's profile.
        size: Width and height of the window.
    """

    def __init__(self, folder, size=(1200, 1600)):
        if CHROMIUM is None:
            pytest.skip("no Chromium here: apt-get install chromium")
        aiohttp = pytest.importorskip("aiohttp", reason="speaks to the browser; datasets brings it")
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = folder / "DevToolsActivePort"
        wait_until(lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2, "the browser to start")
        self._port = port_file.read_text().splitlines()[0]
        self._numbers, self.requests = count(1), []
        self._loop.run_until_complete(self._connect(aiohttp))
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        async def close():
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(20)

    async def _connect(self, aiohttp):
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{self._port}/json/list") as answer:
            (tab,) = [tab for tab in await answer.json() if tab["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method, **parameters):
        """A command of the protocol."""

        async def ask():
            number = next(self._numbers)
            await self._socket.send_json({"id": number, "method": method, "params": parameters})
            while True:
                message = json.loads(await self._socket.receive_str(timeout=60))
                if message.get("method") == "Network.requestWillBeSent":
                    self.requests.append(message["params"]["request"]["url"])
                if message.get("id") == number:
                    return message

        message = self._loop.run_until_complete(ask())
        assert "error" not in message, message["error"]
        return message["result"]

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition, seconds=60):
        wait_until(lambda: self.evaluate(condition), condition, seconds)

    def wait_for_text(self, *texts, seconds=60):
        """Wait until all texts are on the page, in components too; returns its whole text."""
        wait_until(lambda: all(text in self.evaluate(DEEP_TEXT) for text in texts), texts, seconds)
        return self.evaluate(DEEP_TEXT)

    def screenshot(self, path):
        picture = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(picture)
        return path


def wait_until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)
