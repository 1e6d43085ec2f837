"""A headless Chromium for a test, driven by the DevTools protocol, and a TensorBoard to look at."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from tensorboard import program

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-proxy-server", "--remote-debugging-port=0", "--hide-scrollbars"),
]
# All text of the page, through shadow roots, as a reader finds it.
TEXT = """(() => {
  const of = node => node.nodeType === 3 ? node.data
    : ['SCRIPT', 'STYLE', 'TEMPLATE', 'DOM-MODULE'].includes(node.nodeName) ? ''
    : [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes].map(of).join('') + ' ';
  return (document.body ? of(document.body) : '').replace(/\\s+/g, ' ');
})()"""
# Every element that a selector finds, through shadow roots.
ALL = """(selector => {
  const found = [];
  const walk = root => { found.push(...root.querySelectorAll(selector));
    for (const element of root.querySelectorAll('*')) if (element.shadowRoot) walk(element.shadowRoot); };
  walk(document);
  return found;
})"""


def tensorboard(folder: Path) -> str:
    """The address of a TensorBoard over these runs; it ends with the test's process."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1", "--load_fast", "false"])
    return board.launch()


class Browser:
    """One page. What it complains of, and every dialog that a script opens, is kept."""

    def __init__(self) -> None:
        assert CHROMIUM
        self.profile = Path(tempfile.mkdtemp(prefix="p3o-chromium-"))
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.loop = asyncio.new_event_loop()
        self.complaints: list[str] = []
        self.dialogs: list[str] = []
        self._number = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.loop.run_until_complete(asyncio.wait_for(self._connect(), 60))
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self._disconnect())
        self.process.terminate()
        self.process.wait(30)
        self.loop.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    # ---- what a test does

    def open(self, address: str, width: int = 1400, height: int = 900) -> None:
        """Go there, in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")  # a change of #fragment alone loads nothing
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression on the page; of a promise, what it comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        """All of the page's text."""
        return self.run(TEXT)

    def wait(self, condition: str, seconds: float = 60) -> Any:
        """Until an expression is true on the page; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"never came true: {condition}\n{self.text()[:2000]}"
            self.loop.run_until_complete(asyncio.sleep(0.1))
        return value

    def wait_for_text(self, *wanted: str, seconds: float = 60) -> str:
        """Until the page has all of these texts, in any case of letters."""
        conditions = " && ".join(f"text.includes({json.dumps(text.lower())})" for text in wanted)
        self.wait(f"(text => {conditions})({TEXT}.toLowerCase())", seconds)
        return self.text()

    def rest(self, seconds: float) -> None:
        """Let the page go on."""
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def picture(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol."""
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    # ---- the protocol

    async def _connect(self) -> None:
        port_file = self.profile / "DevToolsActivePort"
        while not port_file.is_file() or "\n" not in port_file.read_text():
            assert self.process.poll() is None, "Chromium has ended"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = asyncio.ensure_future(self._read())

    async def _disconnect(self) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._session.close()

    async def _call(self, method: str, parameters: dict[str, Any]) -> Any:
        self._number += 1
        number = self._number
        self._answers[number] = self.loop.create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await self._answers[number]

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                waiting = self._answers.pop(said["id"])
                if not waiting.done():
                    waiting.set_exception(RuntimeError(said["error"])) if "error" in said else waiting.set_result(said["result"])
                continue
            method, given = said.get("method"), said.get("params", {})
            if method == "Page.javascriptDialogOpening":
                self.dialogs.append(given["message"])
                self._number += 1
                await self._socket.send_json({"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
                self._answers[self._number] = self.loop.create_future()
            elif method == "Runtime.exceptionThrown":
                self.complaints.append(str(given["exceptionDetails"].get("exception", given["exceptionDetails"]))[:500])
