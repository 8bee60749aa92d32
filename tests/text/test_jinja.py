import time

import pytest

from jaxserve.text.jinja import Jinja

USER = [{"role": "user", "content": "hi"}]
MESSAGES = [
    {"role": "system", "content": "Sé 你 <b>"},
    {"role": "user", "content": " hi "},
    {"role": "skip", "content": "never"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "bye"},
    {"role": "user", "content": "past the break"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "int"}}}}}]

# What chat templates of the families in use have in them, in one place.
EVERYTHING = """{%- set today = strftime_now("%Y-%m") %}
{{- bos_token }}
{%- set ns = namespace(found=false, count=0) %}
{% macro show(text, place=1) -%}
  [{{ text }}|{{ place }}]
{%- endmacro %}
{%- for message in messages[::-1] %}{% set ns.count = ns.count + loop.index0 %}{% endfor %}
{% for message in messages %}
    {% if message.role == "skip" %}{% continue %}{% endif %}
    {{ '<' + message['role'] + '>' }}{{ show(message.content | trim, place=loop.revindex) }}
    {% generation %}{{ loop.last }} {{ loop.length }} {{ loop.nextitem.role }}{% endgeneration %}

    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% for key, value in {'b': 1, 'a': 'é中'}.items() if key != "return" %}{{ key ~ value ~ loop.last ~ '\\n' }}{% endfor %}
{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ tools | tojson if tools else 'none' }}
{{ messages | selectattr("role", "equalto", "user") | map(attribute="content") | join(",") }}
{% set block %}{{ ns.count }} {{ 'ab' * 3 }} {{ (1 + 2) * 3 }}{% endset %}{{ block }} {{ today }}
{% if enable_thinking is defined and not enable_thinking %}no thinking{% endif %}
{% if nothing is defined %}never{% endif %}{{ nothing }}{{ 'x'.upper().split('-')[-1] }}
{% if add_generation_prompt %}<assistant>
{% endif %}
"""


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(tools, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    expected, _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=EVERYTHING, add_generation_prompt=prompt, **given
    )
    template = Jinja(EVERYTHING, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES, tools, prompt, enable_thinking=False) == expected[0]


def test_what_a_template_tells():
    template = Jinja("{% if tools %}{{ tools }}{% endif %}<|im_end|><|eot_id|>")
    assert template.takes_tools and template.stop_words == ("<|im_end|>", "<|eot_id|>")
    plain = Jinja("{{ messages[0].content }} about tools")
    assert not plain.takes_tools and plain.stop_words == ()


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[3].content.more }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ ('%s' | attr('format')).__globals__.x }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set _ = messages[0].update(role='x') %}", "SecurityError"),
        ("{% include 'file' %}", "TypeError"),
        ("{{ lipsum() }}", "UndefinedError"),
    ],
)
def test_refusals(source, reason):
    with pytest.raises(ValueError, match=reason):
        Jinja(source).render(USER, None, True)
    assert USER == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("source, reason", [("a\n{% if %}", "line 2"), ("{% for %}", "line 1"), ("{{ 'a", "line 1")])
def test_what_is_no_template(source, reason):
    with pytest.raises(ValueError, match=f"some file is no jinja template: {reason}"):
        Jinja(source, name="some file")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'some text' * 9 }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'A' * 1000000000000 }}",
        "{{ [0] * 1000000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_a_template_ends(source, monkeypatch):
    monkeypatch.setattr("jaxserve.text.jinja.MOST_STEPS", 100_000)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"more than \d+ (steps|characters)|no use for powers|Recursion"):
        Jinja(source).render(USER, None, True)
    assert time.monotonic() - start < 20  # less than a second on an idle machine


def test_a_rendering_has_an_end_in_time(monkeypatch):
    """Filters take no steps of their own, however long they work."""
    monkeypatch.setattr("jaxserve.text.jinja.MOST_SECONDS", 0.2)
    source = "{% for m in messages %}{{ messages | selectattr('role', 'equalto', 'x') | list | length }}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(ValueError, match="it takes more than 0 seconds"):
        Jinja(source).render(USER * 20_000, None, True)
    assert time.monotonic() - start < 10
