"""The pages as a person meets them: headless Chromium before the whole app, whose engine says what a script says."""

import json
import re
import time

import pytest

from tests.fake_engine import USER
from tests.serve.browser import PROGRAM
from tests.serve.conftest import question
from tests.waiting import soon

pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs Chromium (Debian and Ubuntu: apt install chromium)")

RICH = """# Title

**b** *i* `c` [a](https://example.com)

- [x] x

> q

|a|
|-|
|1|

```py
if 1:  # no
    f('s')
```
"""
IDLE = "document.querySelector('#log').ariaBusy === 'false'"
ANSWERED = f"{IDLE} && document.querySelector('.message:last-child .figures')?.textContent.includes('token')"


def ask(page, text, until=ANSWERED):
    page.click("#input")
    page.type(text)
    page.press("Enter")
    page.wait(f"document.querySelector('.message.user:nth-last-child(2) .bubble')?.textContent === {json.dumps(text)}")
    page.wait(until)


def last(page):
    return page.text(".message:last-child > .text")


def test_an_answer_streams(site):
    page = site(lambda text: "one two three four five six seven eight", delay=0.02)
    assert page.js("document.activeElement.id") == "input"
    ask(page, "Count", until="document.querySelector('.message.assistant > .text')?.textContent.startsWith('one')")
    assert page.js("document.querySelector('#log').ariaBusy") == "true"
    assert page.js("document.querySelector('#go').ariaLabel") == "Stop"
    assert "eight" not in last(page)
    page.wait(ANSWERED)
    assert last(page) == "one two three four five six seven eight"
    figures = page.text(".message:last-child .figures")
    assert re.search(r"^39 tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt \d+", figures), figures
    assert page.text("#spoken") == "The answer is complete."
    assert page.js("document.querySelector('#go').ariaLabel") == "Send"
    assert not page.complaints and all(address.startswith(page.url) for address in page.requests)


def test_a_conversation_goes_on(site):
    page = site(lambda text: f"{text.count(USER)} turns")
    ask(page, "first")
    ask(page, "second")
    assert last(page) == "4 turns"


def test_a_question_before_the_models_are_known(site):
    page = site()
    page.js("document.querySelector('#model').replaceChildren()")
    page.js("document.querySelector('#model-name').textContent = 'connecting…'")
    ask(page, "soon")
    assert last(page) == "Echo: soon"


def test_a_question_without_an_answer_is_not_sent_again(site):
    page = site(lambda text: f"{text.count(USER)} turns")
    ask(page, "z" * 5000, until="document.querySelector('.failure')?.textContent")
    ask(page, "short")
    assert last(page) == "2 turns"


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(site, how):
    page = site(lambda text: "x" * 3000, delay=0.01)
    ask(page, "Go", until="document.querySelector('.message.assistant > .text')?.textContent.length > 3")
    if how == "button":
        page.click("#go")
    else:
        page.press("Escape")
    page.wait(IDLE)
    assert "stopped" in page.text(".message:last-child .figures")
    kept = last(page)
    assert 3 < len(kept) < 3000 and not page.text(".failure")
    soon(lambda: page.engine.aborted)
    ask(page, "On", until="document.querySelectorAll('.message').length === 4")
    assert page.text(".message:nth-child(2) > .text") == kept


ATTACK = """<script>alert(1)</script> <img src=x onerror="alert(2)"> <svg onload=alert(3)>
<iframe src="https://elsewhere.example/"></iframe> ![pixel](https://elsewhere.example/pixel.png)
[run](javascript:alert(4)) [run](JaVaScRiPt:alert(5)) [data](data:text/html,<script>alert(6)</script>)
<javascript:alert(7)>
[x](https://elsewhere.example/"onmouseover="alert(8)) **<b onclick=alert(9)>bold</b>**

```html" onmouseover="alert(10)
<script>alert(11)</script>
```

| <img src=x onerror=alert(12)> |
|---|
| <style>*{display:none}</style> |
"""


def test_what_a_model_writes_is_inert(site):
    page = site(lambda text: ATTACK)
    ask(page, "<img src=x onerror=alert(13)><script>alert(14)</script>")
    made = page.js(
        "[...document.querySelectorAll('#log *, #conversations *')]"
        ".filter((e) => /^(script|img|iframe|style|svg|b|object)$/i.test(e.tagName) && !e.closest('button')).length"
    )
    assert made == 0
    attributes = page.js(
        "[...document.querySelectorAll('#log *')].flatMap((e) => e.getAttributeNames()).filter((n) => /^on/.test(n))"
    )
    assert attributes == []
    assert "<script>alert(1)</script>" in last(page) and '<img src=x onerror="alert(2)">' in last(page)
    links = page.js("[...document.querySelectorAll('#log a')].map((a) => a.protocol)")
    assert set(links) == {"https:"}
    page.js("document.querySelectorAll('#log *').forEach((e) => e.dispatchEvent(new MouseEvent('mouseover')))")
    time.sleep(0.2)
    assert not page.dialogs and not page.complaints
    assert all(address.startswith(page.url) for address in page.requests)


def test_the_policy_holds_where_the_page_would_not(site):
    """What is put into the page in spite of its scripts neither runs nor loads."""
    page = site()
    assert "TrustedHTML" in page.js(
        "(() => { try { document.body.innerHTML = '<i>'; } catch (e) { return e.message; } })()"
    )
    page.js(
        """(() => {
          const image = new Image();
          image.src = "https://elsewhere.example/x.png";
          document.body.append(image);
          window.reached = fetch("https://elsewhere.example/").then(() => "reached", () => "refused");
        })()"""
    )
    assert page.js("reached") == "refused"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


WIDE = "w" * 400 + "\n\n```\n" + "c" * 400 + "\n```\n\n" + "|" + "|".join(["head" * 6] * 8) + "|\n" + "|---" * 8 + "|\n"


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_has_no_sideways_scroll(site, width):
    page = site(lambda text: WIDE, width=width, height=740, phone=True)
    page.click("#input")
    page.type("u" * 300)
    page.click("#go")
    page.wait(ANSWERED)
    sizes = "[document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth, innerWidth]"
    assert page.js(sizes) == [width, width, width]
    for opener, panel in (("#open-settings", "#settings"), ("#open-sidebar", "#sidebar")):
        page.click(opener)
        page.wait(f"document.querySelector('{panel}').matches(':modal')")
        box = page.js(
            f"(b => [b.left >= 0, b.right <= innerWidth])(document.querySelector('{panel}').getBoundingClientRect())"
        )
        assert box == [True, True] and page.js(sizes) == [width, width, width]
        page.press("Escape")
        page.wait(f"!document.querySelector('{panel}').open")
    small = page.js(
        "[...document.querySelectorAll('header button, .go')].filter((b) => b.checkVisibility())"
        ".map((b) => b.getBoundingClientRect()).filter((b) => b.width < 32 || b.height < 32).length"
    )
    assert small == 0


def test_on_a_phone_enter_is_a_new_line(site):
    page = site(width=390, height=740, phone=True)
    page.click("#input")
    page.type("a")
    page.press("Enter")
    assert page.js("document.querySelector('#input').value") == "a\n"


def test_shift_enter_and_composing_do_not_send(site):
    page = site()
    page.type("a")
    page.press("Enter", shift=True)
    page.type("b")
    page.js(
        "document.querySelector('#input')"
        ".dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
    )
    assert page.js("document.querySelector('#input').value") == "a\nb"
    page.press("Enter")
    page.wait(ANSWERED)
    assert last(page) == "Echo: a\nb"


def test_a_key_is_asked_for(site):
    page = site(keys=["secret"], wait=False)
    page.wait("document.querySelector('#key-dialog').matches(':modal')")
    assert page.text("#model-name") == "needs a key"
    page.type("wrong")
    page.press("Enter")
    page.wait("document.querySelector('#key-reason').textContent === 'The server refused this key.'")
    page.js("document.querySelector('#key-input').select()")
    page.type("secret")
    page.press("Enter")
    page.wait("document.querySelector('#light-state').dataset.state === 'ready'")
    ask(page, "hello")
    assert last(page) == "Echo: hello"
    assert page.js("[sessionStorage['jaxserve.key'], localStorage['jaxserve.key'] ?? null]") == ["secret", None]
    page.js("sessionStorage['jaxserve.key'] = 'stale'")
    page.type("again")
    page.press("Enter")
    page.wait("document.querySelector('#key-dialog').matches(':modal')")
    assert "key" in page.text(".message:last-child .failure")


def test_parameters_reach_the_engine(site):
    page = site()
    page.click("#open-settings")
    page.click("#system")
    page.type("Be brief.")
    for name, value in (("temperature", "0.35"), ("max_tokens", "17")):
        page.click(f"#parameter-{name}")
        page.type(value)
    page.click("#input")
    ask(page, "a rather long question", until=IDLE)
    page.wait("document.querySelector('.message:last-child .figures')?.textContent.includes('cut at')")
    request = page.engine.submitted[-1]
    assert (request.max_new_tokens, request.params.temperature) == (17, pytest.approx(0.35))
    prompt = page.engine.tokenizer.decode(request.tokens[: len(request.tokens) - 17], skip_special=False)
    assert prompt.startswith("<|user|>s:Be brief.<|end|><|user|>u:a rather long question")
    page.click("#reset")
    ask(page, "b")
    assert page.engine.submitted[-1].max_new_tokens > 17


def test_conversations_are_kept(site):
    page = site()
    ask(page, "keep this")
    page.click("#new")
    ask(page, "and this")
    page.go(page.url + "/?")
    page.wait("document.querySelectorAll('#conversations li').length === 2")
    assert page.text(".message.user") == "and this"
    page.click("#conversations li:last-child button")
    page.wait("document.querySelector('.message.user').textContent === 'keep this'")
    page.js("document.querySelector('#conversations li:last-child button:last-child').click()")
    page.wait("document.querySelectorAll('#conversations li').length === 1")
    page.click("#toast button")
    page.wait("document.querySelectorAll('#conversations li').length === 2")


def test_again_and_edit(site):
    count = iter(range(100))
    page = site(lambda text: f"{next(count)}: {question(text)}")
    ask(page, "one")
    ask(page, "two")
    assert page.js("document.querySelectorAll('[title=Regenerate]').length") == 1
    page.click("[title=Regenerate]")
    page.wait("document.querySelector('.message:last-child > .text')?.textContent === '2: two'")
    page.wait(ANSWERED)
    page.js("document.querySelector('.message.user [title=Edit]').click()")
    page.js("document.querySelector('.edit textarea').select()")
    page.type("three")
    page.press("Enter")
    page.wait("document.querySelector('.message:last-child > .text')?.textContent === '3: three'")
    page.wait(ANSWERED)
    assert page.js("document.querySelectorAll('.message').length") == 2


def test_a_button_that_is_pressed_stays(site):
    """What is still drawn when an answer has ended does not take the click from under the mouse."""
    count = iter(range(100))
    page = site(lambda text: f"{next(count)}: {question(text)}")
    page.js("window.requestAnimationFrame = (draw) => setTimeout(() => (draw(), (window.drawn = true)), 500)")
    ask(page, "one")
    page.mouse("Pressed", *(where := page.where("[title=Regenerate]")))
    page.wait("window.drawn")
    page.mouse("Released", *where)
    page.wait("document.querySelector('.message:last-child > .text')?.textContent === '1: one'")


def test_a_conversation_that_is_pressed_opens(site):
    """Although an answer in another one ends while it is."""
    page = site(lambda text: "z" * (80 if question(text) == "slow" else 3), delay=0.02)
    ask(page, "first")
    page.click("#new")
    ask(page, "slow", until="document.querySelector('.message.assistant > .text')?.textContent.length > 2")
    page.mouse("Pressed", *(where := page.where("#conversations li:last-child > button")))
    page.wait("!document.querySelector('#conversations li.live')")
    page.mouse("Released", *where)
    page.wait("document.querySelector('.message.user .bubble').textContent === 'first'")


def test_a_conversation_in_the_background(site):
    page = site(lambda text: "y" * 60, delay=0.02)
    ask(page, "slow", until="document.querySelector('.message.assistant > .text')?.textContent.length > 2")
    page.click("#new")
    assert page.js("document.querySelectorAll('.message').length") == 0
    page.wait("!document.querySelector('#conversations li.live')")
    page.click("#conversations li button")
    assert last(page) == "y" * 60


def test_errors_are_told(site):
    page = site()
    ask(page, "z" * 5000, until="document.querySelector('.failure')?.textContent")
    assert "4096" in page.text(".failure")
    page.engine.close()
    page.type("more")
    page.press("Enter")
    page.wait("document.querySelector('.message:last-child .failure')?.textContent.includes('engine')")


def test_colours(site):
    page = site(dark=True)
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.js(ground)
    page.js("document.querySelector('[name=theme][value=light]').click()")
    light = page.js(ground)
    assert dark != light == "rgb(255, 255, 255)"
    page.go(page.url + "/?")
    assert page.js(ground) == light


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(site, dark):
    """WCAG AA: text of every kind against its ground, 4.5 to 1."""
    page = site(lambda text: RICH, dark=dark)
    ask(page, "Show")
    page.click("#open-settings")
    poor = page.js(
        """(() => {
          const parts = (colour) => { // any notation, by painting it
            const paint = new OffscreenCanvas(1, 1).getContext("2d");
            paint.fillStyle = colour;
            paint.fillRect(0, 0, 1, 1);
            return [...paint.getImageData(0, 0, 1, 1).data];
          };
          const light = ([r, g, b]) => {
            const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * x + 0.7152 * y + 0.0722 * z;
          };
          const ground = (element) => {
            for (; element; element = element.parentElement) {
              const colour = parts(getComputedStyle(element).backgroundColor);
              if (colour[3] === 255) return colour;
            }
            return [255, 255, 255];
          };
          return [...document.querySelectorAll("body *")]
            .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
            .filter((e) => !e.disabled && !e.closest(".unseen, .skip"))
            .map((e) => {
              const [a, b] = [light(parts(getComputedStyle(e).color)), light(ground(e))];
              const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
              return [`${e.tagName} ${e.className} ${e.textContent.slice(0, 20)}`, ratio];
            })
            .filter(([, ratio]) => ratio < 4.5);
        })()"""
    )
    assert poor == []


def test_everything_has_a_name(site):
    """What a screen reader says of each control."""
    page = site(lambda text: RICH)
    ask(page, "Show")
    page.click("#open-settings")
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "combobox", "checkbox", "radio", "link", "spinbutton", "slider", "dialog", "log"}
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    named = [(role, name) for role, name in found if role in controls]
    nameless = [role for role, name in named if not name and role != "checkbox"]
    assert len(named) > 20 and nameless == []


def test_export(site, browser, tmp_path):
    page = site()
    ask(page, "Say **this**")
    browser.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), browserContextId=page.context
    )
    page.click("#exports summary")
    page.click("[data-export=md]")
    file = tmp_path / "Say-this-.md"
    soon(file.exists)
    assert file.read_text() == "# Say **this**\n\n## You\n\nSay **this**\n\n## Model\n\nEcho: Say **this**\n"


def test_documentation(site):
    page = site(keys=["secret"], path="/docs", wait=False)
    page.wait("document.querySelector('[id$=chat_completions] .opblock-summary, .opblock-summary-path')")
    paths = page.js(
        "[...document.querySelectorAll('.opblock-summary-path')].map((e) => e.textContent.replaceAll('\\u200b', ''))"
    )
    assert {"/v1/chat/completions", "/v1/models"} <= set(paths)
    assert page.js("document.querySelector('#base').textContent") == page.url + "/v1"
    page.click("#key-input")
    page.type("wrong")
    page.press("Enter")
    page.wait("document.querySelector('#key-state').textContent.includes('refused')")
    page.js("document.querySelector('#key-input').select()")
    page.type("secret")
    page.press("Enter")
    page.wait("document.querySelector('#key-state').textContent.includes('carry it')")
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    assert not page.dialogs and not [text for text in page.complaints if "401" not in text]
    assert all(address.startswith((page.url, "data:")) for address in page.requests)
