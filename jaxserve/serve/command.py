"""The commands around the server: serve, with LMDeploy's names of what it does, client and ui.

What they do is imported when they run.
"""

from dataclasses import fields

import click

from jaxserve.options import Command, Option, absent, engine_config, engine_options, mistakes, together, without_use
from jaxserve.serve.options import UNUSED_SERVER, WORDS, ServerOptions, server_options

LISTS = {f"--{knob.name.replace('_', '-')}" for knob in fields(ServerOptions) if knob.metadata["kind"] is WORDS}


class ServerCommand(Command):
    """A command whose lists may be written as LMDeploy's: --api-keys ONE TWO."""

    def parse_args(self, ctx, args):
        valued = {name for option in self.params if not getattr(option, "is_flag", True) for name in option.opts}
        return super().parse_args(ctx, gather(args, LISTS, valued))


def gather(args: list[str], lists: set[str], valued: set[str]) -> list[str]:
    """The same arguments with each list in one place: --api-keys ONE,TWO.

    What follows a list's first value belongs to the list only where MODEL has been given already; else MODEL may be it.
    valued: options that take one value.
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    left, model = list(args), False
    while left:
        word = left.pop(0)
        name, given, value = word.partition("=")
        name = name.replace("_", "-")
        if word == "--":
            rest += [word, *left]
            break
        if name in lists:
            values = [value] if given else []
            while left and not left[0].startswith("-") and (model or not values):
                values.append(left.pop(0))
            if not values:
                rest.append(word)  # which is then found to lack its value
            found.setdefault(name, []).extend(values)
            continue
        rest.append(word)
        model = model or not word.startswith("-")
        if name in valued and not given and left:
            rest.append(left.pop(0))
    return [word for name, values in found.items() if values for word in (name, ",".join(values))] + rest


class Serve(click.Group):
    """`serve MODEL` is `serve api_server MODEL`."""

    command_class = Command

    def make_context(self, info_name, args, parent=None, **extra):
        if args and args[0].replace("_", "-") in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return api_server.make_context(info_name, args, parent, **extra)


@click.group(cls=Serve)
def serve():
    """Put MODEL behind HTTP: OpenAI's API, a chat page, metrics."""


@serve.command("api-server", cls=ServerCommand)
@click.argument("model", required=False)
@server_options
@engine_options
@click.pass_context
def api_server(ctx, model, **given):
    """Put MODEL behind HTTP: OpenAI's API, Anthropic's and LMDeploy's, a chat page, documentation, metrics.

    SIGTERM or Ctrl-C lets running requests end, a second one stops at once.  `serve api_server MODEL` is the same,
    `serve api_client URL` (or `client URL`) talks with a server, `serve gradio MODEL_OR_URL` (or `ui`) is a web page
    for one.

    Exit statuses: 0 stopped, 2 options, 3 the model, 4 the device, 5 the port, 1 anything else.
    """
    options = server_config(given)
    config = engine_config(given)
    from jaxserve.serve.run import run

    ctx.exit(run(model, config, options))


def server_config(given: dict) -> ServerOptions:
    """The ServerOptions of what `server_options` added, which it takes out of `given`."""
    known = {knob.name: given.pop(knob.name) for knob in fields(ServerOptions) if knob.name in given}
    without_use(given, UNUSED_SERVER, {})
    with mistakes():
        return ServerOptions(**known)


CLIENT_OPTIONS = (
    click.argument("url", default="http://127.0.0.1:23333"),
    click.option("--api-key", metavar="KEY", envvar="JAXSERVE_API_KEY", help="the server's key ($JAXSERVE_API_KEY)"),
    click.option("--session-id", type=int, default=1, show_default=True, help="number of the conversation"),
)


@click.command(cls=Command)
@together(CLIENT_OPTIONS)
def client(url, api_key, session_id):
    """Talk in the terminal with the server at URL.

    An empty line ends the input; `exit` leaves, `end` starts a new conversation.
    """
    from jaxserve.serve.client import run

    run(url, api_key=api_key, session_id=session_id)


UI_OPTIONS = (
    click.argument("model_or_url", required=False),
    click.option(
        "--server-name",
        cls=Option,
        section="Address",
        default="127.0.0.1",
        show_default=True,
        help="address to listen at",
    ),
    click.option(
        "--server-port",
        cls=Option,
        section="Address",
        type=click.IntRange(0, 65535),
        default=6006,
        show_default=True,
        help="port to listen at",
    ),
    click.option(
        "--api-key",
        cls=Option,
        section="Address",
        metavar="KEY",
        envvar="JAXSERVE_API_KEY",
        help="key of the server at the URL ($JAXSERVE_API_KEY)",
    ),
    click.option("--share", is_flag=True, hidden=True),
)


@click.command(cls=Command)
@together(UI_OPTIONS)
@engine_options
def ui(model_or_url, server_name, server_port, api_key, share, **given):
    """A web page (gradio) for the server at a URL, or for MODEL.

    A MODEL is served, too, until the page ends.
    """
    config = engine_config(given)
    if share:
        click.echo("warning: --share is ignored: the page is not sent through another's computer", err=True)
    from jaxserve.serve.ui import run

    run(model_or_url, config, server_name=server_name, server_port=server_port, api_key=api_key)


serve.add_command(client, "api-client")
serve.add_command(ui, "gradio")
serve.add_command(
    absent("proxy", "there is none: put any load balancer for HTTP before several servers; /ready is for it")
)
serve.add_command(absent("triton-client", "there is no Triton server: `serve api_client URL` talks with `serve MODEL`"))
