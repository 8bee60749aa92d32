"""`jaxserve ui`: the gradio page in a process of its own, before headless Chromium."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from jaxserve.config import EngineConfig
from jaxserve.serve import ui
from jaxserve.serve.run import HINT
from tests.serve import scripted
from tests.serve.browser import PROGRAM
from tests.serve.conftest import question
from tests.waiting import soon

HOME = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "jaxserve"]
needs_gradio = pytest.mark.skipif(
    not importlib.util.find_spec("gradio"), reason="needs gradio (the extra ui): pip install 'jaxserve[ui]'"
)
needs_chromium = pytest.mark.skipif(not PROGRAM, reason="needs Chromium (Debian and Ubuntu: apt install chromium)")


@pytest.mark.parametrize(
    "text, known",
    [
        *(("http://h", True), ("https://h:1/v1", True), ("localhost:23333", True), ("10.0.0.1:80/", True)),
        *(("./model", False), ("Qwen/Qwen2.5-0.5B-Instruct", False), ("model", False), ("a:b", False)),
    ],
)
def test_addresses(text, known):
    assert ui.is_address(text) is known


def test_the_options_of_a_config():
    assert ui.arguments(EngineConfig()) == []
    config = EngineConfig(tp=2, cache_max_entry_count=0.4, enable_prefix_caching=False, model_name="m")
    made = ui.arguments(config)
    assert sorted(made) == [
        *("--cache-max-entry-count=0.4", "--model-name=m", "--no-enable-prefix-caching", "--tp=2"),
    ]


def test_without_gradio():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from jaxserve.cli import main; main(['serve', 'gradio', 'http://127.0.0.1:9'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'jaxserve[ui]'" in done.stderr


def test_where_its_own_server_is():
    said = f"print('something'); print({HINT!r}.format('http://127.0.0.1:7/p'))"
    for code, url in ((said, "http://127.0.0.1:7/p"), ("import sys; sys.exit(3)", None)):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            if url:
                assert ui.found(child) == url
            else:
                with pytest.raises(SystemExit, match="3"):
                    ui.found(child)


def test_a_server_of_its_own_that_does_not_start(tmp_path):
    with pytest.raises(SystemExit, match="3"), ui.served(str(tmp_path / "none"), EngineConfig(), None):
        pass


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@needs_gradio
def test_no_server():
    done = subprocess.run(
        [*COMMAND, "ui", f"127.0.0.1:{free_port()}"], capture_output=True, text=True, cwd=HOME, timeout=60
    )
    assert done.returncode == 1 and "no server answers at" in done.stderr and "Traceback" not in done.stderr


class Playground:
    """The command and the server that it talks with."""

    def __init__(self, folder):
        self.say = lambda text: f"answer to **{question(text)}**"
        self.engine = scripted.Engine(say=lambda text: self.say(text), session_len=4096, delay=0.01)
        self.app = scripted.app(engine=self.engine, keys=["secret"])
        self.server = scripted.serving(self.app.__enter__())
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        command = [*COMMAND, "serve", "gradio", self.server.__enter__(), f"--server-port={self.port}"]
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=HOME, env=os.environ | {"JAXSERVE_API_KEY": "secret"}
            )
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(self.url) as response:
                    self.headers = response.headers
                    return
            except OSError:
                assert self.child.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.2)

    def close(self):
        self.child.kill()
        self.child.wait()
        for context in (self.server, self.app):
            context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    made = Playground(tmp_path_factory.mktemp("playground"))
    yield made
    made.close()


@pytest.fixture
def page(playground, browser):
    made = browser.page(height=1000)
    made.go(playground.url + "/")
    made.wait("document.querySelector('#instruction textarea')")
    made.wait("document.querySelector('#cancel')?.disabled")
    return made


def ask(page, text):
    page.click("#instruction textarea")
    page.type(text)
    page.press("Enter")


ENDED = "document.querySelector('#cancel').disabled && document.querySelector('#figures').innerText.includes('tokens')"


@needs_gradio
@needs_chromium
class TestPage:
    """What a course's reader finds, under the names that the course uses."""

    def test_what_is_there(self, playground, page):
        assert f"server is gonna mount on: {playground.url}" in playground.log.read_text()
        assert page.js("document.title") == "jaxserve Playground"
        assert page.js("document.querySelector('#instruction textarea').placeholder") == "Please input the instruction"
        text = page.js("document.body.innerText")
        for words in ("jaxserve Playground", "fake-1b", "Instruction", "Cancel", "Reset", "Top_p", "Temperature"):
            assert words in text
        ranges = page.js(
            "[...document.querySelectorAll('input[type=range]')].map((r) => [r.min, r.max, r.value].map(Number))"
        )
        assert ranges == [[1, 2048, 512], [0.01, 1, 0.8], [0.01, 1.5, 0.7]]

    def test_an_answer_streams(self, playground, page):
        ask(page, "hello <b>there</b>")
        page.wait("document.body.innerText.includes('answer to')")
        page.wait(ENDED)
        assert page.js("[...document.querySelectorAll('strong')].map((e) => e.innerText)")[-1].startswith("hello")
        assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s", page.text("#figures"))
        request = playground.engine.submitted[-1]
        assert (request.max_new_tokens, round(request.params.temperature, 2)) == (512, 0.7)
        assert page.js("document.querySelector('#instruction textarea').value") == ""

    @pytest.mark.parametrize("how", ["cancel", "stop"])
    def test_cancel(self, playground, page, how):
        playground.say, before = lambda text: "x" * 3000, len(playground.engine.aborted)
        ask(page, "go")
        page.wait("document.body.innerText.includes('xxx')")
        page.click("#cancel" if how == "cancel" else "#instruction .stop-button")
        page.wait("document.querySelector('#cancel').disabled")
        soon(lambda: len(playground.engine.aborted) > before)
        playground.say = lambda text: f"{text.count('|user|')} turns"
        ask(page, "and")
        page.wait("document.body.innerText.includes('4 turns')")

    def test_a_question_ends_the_answer_before(self, playground, page):
        playground.say = lambda text: "x" * 3000 if "go" in question(text) else f"{text.count('|user|')} turns"
        ask(page, "go")
        page.wait("document.body.innerText.includes('xxx')")
        ask(page, "and")
        page.wait("document.body.innerText.includes('4 turns')")
        page.wait(ENDED)

    def test_reset(self, playground, page):
        playground.say = lambda text: f"{text.count('|user|')} turns"
        ask(page, "one")
        page.wait("document.body.innerText.includes('2 turns')")
        page.wait(ENDED)
        page.click("#reset")
        page.wait("!document.body.innerText.includes('2 turns')")
        ask(page, "two")
        page.wait("document.body.innerText.includes('2 turns')")

    def test_an_error_is_told(self, playground, page):
        ask(page, "z" * 5000)
        page.wait("document.querySelector('#figures').innerText.includes('4096')")
        assert page.js("document.querySelector('#instruction textarea').value") == "z" * 5000

    def test_nothing_comes_from_elsewhere_and_nothing_runs(self, playground, page):
        playground.say = lambda text: (
            "<script>alert(1)</script><img src=x onerror=alert(2)> ![p](https://elsewhere.example/p.png) "
            "[a](javascript:alert(3)) <iframe src='https://elsewhere.example/'></iframe> end."
        )
        ask(page, "<img src=x onerror=alert(4)>")
        page.wait("document.body.innerText.includes('end.')")
        page.wait(ENDED)
        time.sleep(0.5)
        asked_for = [address for address in page.requests if not address.startswith((playground.url, "data:", "blob:"))]
        refused = [address for address in asked_for if any(address in complaint for complaint in page.complaints)]
        assert asked_for == refused and not page.dialogs
        assert "default-src 'self'" in playground.headers["Content-Security-Policy"]
        assert "secret" not in page.js("document.documentElement.outerHTML")


@needs_gradio
def test_sigterm_ends_it(tmp_path):
    made = Playground(tmp_path)
    try:
        made.child.send_signal(signal.SIGTERM)
        assert made.child.wait(30) == 0 and "Traceback" not in made.log.read_text()
    finally:
        made.close()
