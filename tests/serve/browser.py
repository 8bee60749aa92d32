"""Headless Chromium by the DevTools protocol over a pipe: no driver, no port, no library.

`Browser` is the process, `Page` a tab with a profile of its own; a page remembers each address that was asked for, each
exception and complaint (such as of the content security policy), and each dialog.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, Queue

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--disable-extensions", "--disable-default-apps", "--font-render-hinting=none", "--remote-debugging-pipe"),
)
PATIENCE = 30.0  # seconds: a busy machine is slow
# Chromium reads commands from descriptor 3 and answers on 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


class Browser:
    """A Chromium without windows."""

    def __init__(self):
        self._profile = tempfile.mkdtemp(prefix="jaxserve-chromium-")
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        ours = str(read_commands), str(write_answers)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *ours, PROGRAM, *FLAGS, f"--user-data-dir={self._profile}"],
            pass_fds=(read_commands, write_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": self._profile},
        )
        os.close(read_commands)
        os.close(write_answers)
        self._lock = threading.Lock()
        self._number = 0
        self._waiting: dict[int, Queue] = {}
        self._listeners: dict[str, callable] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, method, session=None, **params):
        """Sends a command and returns its result."""
        with self._lock:
            self._number += 1
            number, answer = self._number, Queue()
            self._waiting[number] = answer
            message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            os.write(self._commands, json.dumps(message).encode() + b"\0")
        try:
            found = answer.get(timeout=PATIENCE)
        except Empty:
            raise TimeoutError(f"Chromium did not answer {method}") from None
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']['message']}")
        return found["result"]

    def _read(self):
        rest = b""
        while part := os.read(self._answers, 1 << 16):
            *messages, rest = (rest + part).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._waiting.pop(message["id"]).put(message)
                elif listener := self._listeners.get(message.get("sessionId")):
                    listener(message["method"], message["params"])

    def page(self, width=1280, height=800, *, phone=False, dark=False):
        """A new tab that shares nothing with the others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        self._listeners[session] = page.heard
        page.set_up(width, height, phone, dark)
        return page

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        shutil.rmtree(self._profile, ignore_errors=True)


class Page:
    """One tab."""

    def __init__(self, browser, session, context):
        self.browser, self.session, self.context = browser, session, context
        self.requests, self.complaints, self.dialogs = [], [], []

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def set_up(self, width, height, phone, dark):
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height, phone)
        if phone:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        self.colours(dark)

    def size(self, width, height, phone=False):
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def colours(self, dark):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def heard(self, method, params):
        """On the thread that reads."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            threading.Thread(target=self.call, args=("Page.handleJavaScriptDialog",), kwargs={"accept": False}).start()

    def go(self, url):
        """Opens an address and waits until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def js(self, code):
        """The value of an expression, awaited."""
        done = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", str(done)))
        return done["result"].get("value")

    def wait(self, code, seconds=PATIENCE):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := self.js(f"Promise.resolve({code}).then(x => x instanceof Node || x)"):
                    return found
            except RuntimeError:
                pass  # the page is being changed
            if time.monotonic() > end:
                seen = self.js("document.body.innerText")
                raise TimeoutError(f"never true: {code}\n{seen}\ncomplaints: {self.complaints}")
            time.sleep(0.02)

    def text(self, selector):
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? null")

    def click(self, selector):
        """With the mouse, where a person would: the element must be what is on top there."""
        self.mouse("Pressed", *(where := self.where(selector)))
        self.mouse("Released", *where)

    def where(self, selector):
        """The middle of an element that is at rest, and on top there; scrolled to if it must be."""
        name = json.dumps(selector)
        return self.wait(
            f"""(async () => {{
              const element = document.querySelector({name});
              if (!element) return null;
              element.scrollIntoView({{block: "nearest"}});
              const before = element.getBoundingClientRect();
              await new Promise((go) => setTimeout(go, 20));
              const box = element.getBoundingClientRect();
              if (["x", "y", "width", "height"].some((side) => before[side] !== box[side])) return null;
              const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
              return element.contains(document.elementFromPoint(x, y)) && [x, y];
            }})()"""
        )

    def mouse(self, what, x, y):
        """what: "Pressed" or "Released", of its left button."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{what}", x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, shift=False):
        code, text = KEYS[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, file):
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.browser._listeners.pop(self.session, None)
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)
