"""Chat templates written in jinja, rendered as transformers does, in a sandbox with bounds on loops and length.

Templates come with checkpoints, so they are foreign code: they reach no Python internals, change nothing that they are
given, and cannot run or write for ever.
"""

import datetime
import json
import time

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_STEPS = 2_000_000  # turns of loops and calls of macros in one rendering: one to ten seconds
MOST_SECONDS = 10.0  # of one rendering, as far as it is looked at: at each step
MOST_CHARACTERS = 1 << 25  # of a prompt, or of a text that the template puts together
_STEPS = " steps"  # a variable that no template can name

# Tokens that end a turn in common templates.  A checkpoint whose configs do not name the one that its template uses
# would never stop.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>")


class Jinja:
    """A compiled template.  `variables` are there in every rendering ("bos_token" and the like)."""

    adds_bos = False  # the template writes bos_token where it wants it

    def __init__(self, source: str, variables: dict[str, str] | None = None, name: str = "the model's chat template"):
        self.name = name
        self.variables = dict(variables or {})
        self.stop_words = tuple(word for word in END_OF_TURN if word in source)
        self.source = source
        try:
            tree = _environment.parse(source)
            self.takes_tools = any(node.name == "tools" for node in tree.find_all(nodes.Name))
            tree = _Bounds().visit(tree)
            tree.set_environment(_environment)
            self._template = jinja2.Template.from_code(
                _environment, _environment.compile(tree), _environment.make_globals(None)
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name} is no jinja template: line {error.lineno}: {error.message}") from None
        except Exception as error:  # an expression that fails while it is compiled
            raise ValueError(f"{name} cannot be compiled: {type(error).__name__}: {error}") from None

    def render(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool, **variables) -> str:
        """The prompt; ValueError with the template's reason where it refuses the messages or runs out of bounds."""
        variables = {
            **self.variables,
            "documents": None,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            _STEPS: _Budget(),
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                _bounded(size)
        except Refusal as error:
            raise ValueError(f"{self.name} refuses these messages: {error}") from None
        except Exception as error:
            raise ValueError(f"{self.name} fails on these messages: {type(error).__name__}: {error}") from None
        return "".join(pieces)


class Refusal(jinja2.TemplateError):
    """What a template raises itself, through raise_exception."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context, operator, left, right):
        if operator == "**":
            raise OverflowError("a chat template has no use for powers")
        if isinstance(left, str) and isinstance(right, str):
            _bounded(len(left) + len(right))
        for text, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(text, str | list | tuple) and isinstance(times, int):
                _bounded(len(text) * times)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks the model's own words for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja's interface)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounds(NodeTransformer):
    """Makes every turn of a loop and every call of a macro take one of a rendering's steps, and measures texts."""

    def visit_For(self, loop):
        self.generic_visit(loop)
        loop.iter = _filter(loop.iter, "counted")
        return loop

    def visit_Macro(self, macro):
        self.generic_visit(macro)
        macro.body.insert(0, nodes.Output([_filter(nodes.Const("", lineno=macro.lineno), "step")], lineno=macro.lineno))
        return macro

    def visit_Concat(self, text):
        return _filter(self.generic_visit(text), "measured")


def _filter(node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Budget:
    """What one rendering may take."""

    def __init__(self):
        self.steps = MOST_STEPS
        self.end = time.monotonic() + MOST_SECONDS

    def take(self) -> None:
        """One step; OverflowError when there is none left."""
        self.steps -= 1
        if self.steps < 0:
            raise OverflowError(f"it takes more than {MOST_STEPS} steps")
        if time.monotonic() > self.end:
            raise OverflowError(f"it takes more than {MOST_SECONDS:.0f} seconds")


def _bounded(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise OverflowError(f"it writes more than {MOST_CHARACTERS} characters")


@jinja2.pass_context  # which also keeps jinja from computing it while it compiles
def _measured(context, text):
    _bounded(len(text))
    return text


@jinja2.pass_context
def _step(context, value):
    context.resolve(_STEPS).take()
    return value


@jinja2.pass_context
def _counted(context, values):
    for value in values:
        yield _step(context, value)


def _raise_exception(message):
    raise Refusal(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format):
    return datetime.datetime.now().strftime(format)


_environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
_environment.filters |= {"tojson": _to_json, "counted": _counted, "step": _step, "measured": _measured}
_environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _now}
del _environment.globals["lipsum"]
