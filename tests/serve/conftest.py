"""What tests before a browser share."""

import pytest

from tests.fake_engine import USER
from tests.serve import scripted
from tests.serve.browser import Browser


def question(text):
    """The last message of a rendered prompt."""
    return text.split(USER)[-2].partition(":")[2].removesuffix("<|end|>")


@pytest.fixture(scope="module")
def browser():
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def site(browser):
    """site(say, ...) -> a page at the chat, its server's engine as page.engine; closes all of it."""
    closing, pages = [], []

    def open(say=lambda text: "Echo: " + question(text), *, keys=(), path="/", delay=0.0, wait=True, **tab):
        engine = scripted.Engine(say=say, session_len=4096, delay=delay)
        app = scripted.app(engine=engine, keys=keys)
        flask = app.__enter__()
        server = scripted.serving(flask)
        url = server.__enter__()
        page = browser.page(**tab)
        closing.extend([app, server])
        pages.append(page)
        page.engine, page.url = engine, url
        page.go(url + path)
        if wait:
            page.wait("document.querySelector('#light-state').dataset.state === 'ready'")
        return page

    yield open
    for page in pages:  # one that is left open goes on asking
        page.close()
    for context in reversed(closing):
        context.__exit__(None, None, None)
