"""Markdown as the chat page shows it, in headless Chromium."""

import json

import pytest

from tests.serve.browser import PROGRAM

pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs Chromium (Debian and Ubuntu: apt install chromium)")

MARKDOWN = """# Title

Some **bold**, *slanted*, ~~gone~~ and `code`; see [a page](https://example.com/a_(b)) or https://example.com/x.

1. one
2. two
   - inner

| a | b |
|---|--:|
| 1 | 2 |

> said

```python
print("<b>")  # note
```
"""


def test_a_whole_text(site):
    page = site()
    page.js(
        f"import('/static/markdown.js')"
        f".then(({{ render }}) => render(document.querySelector('#log'), {json.dumps(MARKDOWN)}))"
    )
    shown = page.js(
        """(() => {
          const text = document.querySelector("#log");
          const count = (what) => text.querySelectorAll(what).length;
          return {
            counts: ["h3", "strong", "em", "del", "ol > li", "ol ul li", "td.right", "blockquote", "pre"].map(count),
            links: [...text.querySelectorAll("a")].map((a) => [a.href, a.rel, a.target]),
            code: text.querySelector("pre").textContent,
            colours: [...text.querySelectorAll("pre span")].map((span) => span.className),
          };
        })()"""
    )
    assert shown["counts"] == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    rest = ["noopener noreferrer nofollow", "_blank"]
    assert shown["links"] == [["https://example.com/a_(b)", *rest], ["https://example.com/x", *rest]]
    assert shown["code"] == 'print("<b>")  # note' and shown["colours"] == ["f", "s", "c"]
    page.js("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }; 0")
    page.click(".copy")
    page.wait("document.querySelector('.copy').textContent === 'Copied'")
    assert page.js("copied") == 'print("<b>")  # note'


CASES = {
    "a\nb": "<p>a<br>b</p>",
    "a\n\nb": "<p>a</p><p>b</p>",
    "# a #\n## C#": "<h3>a</h3><h4>C#</h4>",
    "#a": "<p>#a</p>",
    "***a*** **b *c* d**": "<p><em><strong>a</strong></em> <strong>b <em>c</em> d</strong></p>",
    "_e_ f_g_h *i": "<p><em>e</em> f_g_h *i</p>",
    "**a* b": "<p>*<em>a</em> b</p>",
    "2 * 3 * 4 ** 5": "<p>2 * 3 * 4 ** 5</p>",
    "**中文**字": "<p><strong>中文</strong>字</p>",
    "~~a~~ ~b~ ~~~~": "<p><del>a</del> <del>b</del> ~~~~</p>",
    "`a` ``b`c`` `d": "<p><code>a</code> <code>b`c</code> `d</p>",
    "\\*a\\* \\(x\\)": "<p>*a* \\(x\\)</p>",
    "<b>a</b> &lt; <br> x": "<p>&lt;b&gt;a&lt;/b&gt; &amp;lt; <br> x</p>",
    "- a\n- b\n  - c\n\nd": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "3. a\n4. b\n   c": '<ol start="3"><li>a</li><li>b<br>c</li></ol>',
    "1. a\n   ```\n   x\n   ```\n2. b": "<ol><li>aTEXTx</li><li>b</li></ol>",
    "a\n- b": "<p>a</p><ul><li>b</li></ul>",
    "a\n\n---\n\n* * *": "<p>a</p><hr><hr>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "- [x] a\n- [ ] b": '<ul><li class="task">☑a</li><li class="task">☐b</li></ul>',
    "```c\nint x;": "cint x;",
    "~~~\n```\n~~~": "TEXT```",
    "a | b": "<p>a | b</p>",
    "|a|b|\n|-|-|\n|1 \\| 2|`3`|": "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1 | 2</td>"
    "<td><code>3</code></td></tr></tbody></table>",
    "[a](https://b.c/d)": "<p><a>a</a></p>",
    "[**a** b](<https://b.c> 'title')": "<p><a><strong>a</strong> b</a></p>",
    "[![a](https://b.c/i.png)](https://b.c)": "<p><a>a</a></p>",
    "[a](ftp://b.c) [d] [e](": "<p>[a](ftp://b.c) [d] [e](</p>",
    "<https://b.c> xhttps://b.c (https://b.c).": "<p>&lt;<a>https://b.c</a>&gt; xhttps://b.c (<a>https://b.c</a>).</p>",
    "https:// http://": "<p>https:// http://</p>",
}


def test_rules(site):
    """Attributes of links, and what frames code and tables, are left out of what is compared."""
    page = site()
    shown = page.js(
        f"""import("/static/markdown.js").then(({{ render }}) => {json.dumps(list(CASES))}.map((text) => {{
          const box = document.createElement("div");
          render(box, text);
          for (const a of box.querySelectorAll("a")) for (const name of a.getAttributeNames()) a.removeAttribute(name);
          for (const frame of box.querySelectorAll(".table")) frame.replaceWith(...frame.childNodes);
          for (const tick of box.querySelectorAll("input")) tick.replaceWith(tick.checked ? "☑" : "☐");
          for (const code of box.querySelectorAll(".code")) {{
            const name = code.querySelector("span").textContent.replace("text", "TEXT");
            code.replaceWith(name + code.querySelector("pre").textContent);
          }}
          return box.innerHTML;
        }}))"""
    )
    assert dict(zip(CASES, shown)) == CASES


def test_streaming_ends_where_a_whole_text_does(site):
    """Piece by piece, blocks that did not change keep their nodes, and the end is the same."""
    page = site()
    kept, grown, whole = page.js(
        f"""import("/static/markdown.js").then(({{ render }}) => {{
          const text = {json.dumps(MARKDOWN)};
          const [box, other] = [document.createElement("div"), document.createElement("div")];
          let first = null, kept = true;
          for (let end = 1; end <= text.length; end++) {{
            render(box, text.slice(0, end));
            if (end > 12) {{ first ??= box.firstChild; kept &&= first === box.firstChild; }}
          }}
          render(other, text);
          return [kept, box.innerHTML, other.innerHTML];
        }})"""
    )
    assert kept and grown == whole and "<h3>" in whole


HOSTILE = [
    *("*a " * 30_000, "**a" * 30_000, "[" * 60_000, "[](" * 30_000, "`" * 300 + " `` ` ``` " * 9000, ">" * 30_000),
    *("- " * 30_000, "|" * 60_000 + "\n" + "|-" * 30_000, "\n" * 60_000 + "- a\n" + "\n" * 60_000, "https://" * 10_000),
    *("\n".join(" " * n + "- x" for n in range(400)), "```js\n" + "'\\" * 9000, "```py\n" + '"""' * 6000),
    *("_*~" * 20_000, "![" * 30_000 + "](https://b.c)" * 3000, "a\n" * 30_000, "1. " * 20_000),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:8])
def test_no_text_takes_long(site, text):
    """What is quadratic takes minutes at these lengths, and misses the browser's time limit."""
    page = site()
    js = f"""import("/static/markdown.js").then(({{ render }}) => {{
      const box = document.createElement("div");
      render(box, {json.dumps(text)});
      return box.childNodes.length;
    }})"""
    assert page.js(js) >= 0
