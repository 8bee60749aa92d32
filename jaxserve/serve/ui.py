"""`jaxserve ui`: a playground in the browser, made with gradio, that talks HTTP with a server.

A process of its own: it holds no model.  Where it is given a model instead of a server, it starts the server too.
"""

import html
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import click

from jaxserve.config import FLAG, EngineConfig
from jaxserve.serve.client import APIClient, ServerError, address
from jaxserve.serve.options import KEYS_VARIABLE
from jaxserve.serve.run import HINT
from jaxserve.terminal import Pace, note

TITLE = "jaxserve Playground"
PATIENCE = 10  # seconds for an answer to end that was stopped
LAST_WORDS = 40  # seconds that the server gets to end its answers
MISSING = "the page is made with gradio, which is not installed: pip install 'jaxserve[ui]'"
FONTS: dict[str, Any] = {
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["ui-monospace", "monospace"],
}  # none from elsewhere
CSS = "#page { max-width: 960px; margin: 0 auto } #figures { min-height: 1.5em; opacity: 0.8; font-size: 0.9em }"
# What a model writes may name pictures; nothing is fetched from elsewhere, whatever is in the page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; "
    "frame-ancestors 'none'"
)


def run(
    model_or_url: str | None,
    config: EngineConfig | None = None,
    *,
    server_name: str = "127.0.0.1",
    server_port: int = 6006,
    api_key: str | None = None,
) -> None:
    """Shows the page until Ctrl-C or SIGTERM.

    model_or_url: a server's address, or a model, with its options in config, for which a server is started.  Whoever
    reaches the page talks with the model; api_key is sent by this process and is not in the page.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio  # noqa: F401  before a model is loaded in vain
    except ImportError:
        raise click.ClickException(MISSING) from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with served(model_or_url, config or EngineConfig(), api_key) as (url, key, child), APIClient(url, key) as client:
        try:
            models = client.models
        except ServerError as error:
            raise click.ClickException(str(error)) from error
        show(client, models[0]["id"], server_name, server_port, child)


def show(client: APIClient, model: str, server_name: str, server_port: int, child=None) -> None:
    """Serves the page until the process, or the server that it started, ends."""
    click.echo(f"server is gonna mount on: http://{server_name}:{server_port}")
    page, look = build(client, model)
    try:
        page.launch(
            server_name=server_name,
            server_port=server_port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            app_kwargs={"middleware": [(Headers, (), {})]},
            **look,
        )
    except OSError as error:
        raise click.ClickException(f"port {server_port} at {server_name} cannot be had: {error}") from error
    try:
        if child:
            raise click.ClickException(f"the server has ended with status {child.wait()}")
        page.block_thread()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


class Headers:
    """Adds the page's security headers to every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def labelled(message):
            if message["type"] == "http.response.start":
                own = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
                own |= {"x-content-type-options": "nosniff", "x-frame-options": "DENY"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in own.items())]
            await send(message)

        await self.app(scope, receive, labelled if scope["type"] == "http" else send)


# The page -------------------------------------------------------------------------------------------------------------


def build(client: APIClient, model: str):
    """The page, and what `launch` needs for its look."""
    import gradio as gr

    busy, idle = gr.Button(interactive=True), gr.Button(interactive=False)
    runs: dict[str, Run] = {}  # of each open page, by its session's name

    def answer(question: str, messages: list, tokens: float, top_p: float, temperature: float, request: gr.Request):
        """Puts the question into the conversation, empties its box, and streams the answer."""
        if not question.strip():
            yield gr.skip()
            return
        stop(request)  # a question ends the answer to the one before
        if messages and messages[-1]["role"] == "user":  # it was cancelled before the answer began
            messages = messages[:-1]
        asked = [*messages, {"role": "user", "content": question.strip()}]
        sampling = {"max_tokens": int(tokens), "top_p": top_p, "temperature": temperature}
        run = runs[str(request.session_hash)] = Run(stream(client, model, asked, **sampling))
        try:
            yield "", asked, shown(asked), "", busy
            for text, line in run:
                grown = [*asked, {"role": "assistant", "content": text}]
                yield gr.skip(), grown, shown(grown), line, gr.skip()
            yield *(gr.skip() for _ in range(4)), idle
        except ServerError as error:
            yield question, messages, shown(messages), f"**error:** {html.escape(str(error))}", idle
        finally:
            if runs.get(str(request.session_hash)) is run:
                del runs[str(request.session_hash)]
            run.over.set()

    def stop(request: gr.Request):
        """Ends an answer that is under way; once this returns, nothing more comes of it."""
        if run := runs.get(str(request.session_hash)):
            run.stopped.set()
            run.over.wait(PATIENCE)
        return idle

    def clear(request: gr.Request):
        """Begins anew."""
        return [], [], "", stop(request)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        conversation = gr.State([])
        with gr.Column(elem_id="page"):
            gr.Markdown(f"## {TITLE}")
            chatbot = gr.Chatbot(
                label=model,
                height="58vh",
                buttons=["copy"],
                sanitize_html=True,
                allow_tags=False,
                feedback_options=None,
            )
            figures = gr.Markdown(elem_id="figures")
            instruction = gr.Textbox(
                label="Instruction",
                placeholder="Please input the instruction",
                submit_btn=True,
                stop_btn=True,
                autofocus=True,
                elem_id="instruction",
            )
            with gr.Row():
                cancel = gr.Button("Cancel", interactive=False, elem_id="cancel")
                reset = gr.Button("Reset", elem_id="reset")
            with gr.Row():
                tokens = gr.Slider(1, 2048, value=512, step=1, label="Maximum new tokens")
                top_p = gr.Slider(0.01, 1, value=0.8, step=0.01, label="Top_p")
                temperature = gr.Slider(0.01, 1.5, value=0.7, step=0.01, label="Temperature")

        parts = [conversation, chatbot, figures, cancel]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        instruction.submit(
            answer,
            [instruction, conversation, tokens, top_p, temperature],
            [instruction, *parts],
            trigger_mode="multiple",
            **quiet,
        )
        for event in (cancel.click, instruction.stop):
            event(stop, None, cancel, **quiet)
        for event in (reset.click, chatbot.clear):
            event(clear, None, parts, **quiet)
    return page, {"theme": gr.themes.Default(primary_hue="indigo", **FONTS), "css": CSS}


def shown(messages: list[dict]) -> list[dict]:
    """A conversation as the chatbot takes it: a question is no markdown."""
    return [
        {**one, "content": html.escape(one["content"]).replace("\n", "<br>")} if one["role"] == "user" else one
        for one in messages
    ]


def stream(client: APIClient, model: str, messages: list[dict], **sampling) -> Generator[tuple[str, str], None, None]:
    """The answer so far and a line about it, piece by piece; closing it early ends the request."""
    pace, text, counted = Pace(), "", 0
    usage: dict = {}
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = client.chat_completions_v1(model, messages, stream=True, stream_options=options, **sampling)
    with closing(pieces):
        for piece in pieces:
            usage = piece.get("usage") or usage
            delta = piece["choices"][0]["delta"] if piece["choices"] else {}
            if new := (delta.get("content") or ""):
                text, counted = text + new, counted + 1
            if text:
                made = usage.get("completion_tokens", counted)
                pace.reached(made)
                yield text, " · ".join([f"{made} tokens", *pace.figures()])
    if not text:
        yield "", ""


class Run:
    """An answer under way, which another thread may stop; iterated over, it is its pieces.

    The request itself ends with its next piece: nothing can interrupt the wait for one.
    """

    def __init__(self, pieces: Generator[tuple[str, str], None, None]):
        self.pieces, self.come = pieces, SimpleQueue[tuple[str, str] | ServerError | None]()
        self.stopped, self.over = Event(), Event()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        Thread(target=self._read, daemon=True).start()
        try:
            while not self.stopped.is_set():
                try:
                    piece = self.come.get(timeout=0.1)
                except Empty:
                    continue
                if piece is None:
                    return
                if isinstance(piece, ServerError):
                    raise piece
                yield piece
        finally:
            self.stopped.set()

    def _read(self) -> None:
        try:
            with closing(self.pieces):
                for piece in self.pieces:
                    self.come.put(piece)
                    if self.stopped.is_set():
                        return
        except ServerError as error:
            self.come.put(error)
        finally:
            self.come.put(None)


# The server -----------------------------------------------------------------------------------------------------------


@contextmanager
def served(model_or_url: str | None, config: EngineConfig, api_key: str | None):
    """(address, key, process) of the server: the one that is there, process being None, or one that is started."""
    if model_or_url is not None and is_address(model_or_url):
        yield address(model_or_url), api_key, None
        return
    key = api_key or secrets.token_urlsafe(16)  # nobody else is to use this server
    command = [sys.executable, "-m", "jaxserve", "serve", "api_server", *arguments(config), "--server-port=0"]
    with subprocess.Popen(
        [*command, "--", *([model_or_url] if model_or_url else [])],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {KEYS_VARIABLE: key},
        start_new_session=True,  # Ctrl-C reaches this process, which then lets the server end
    ) as child:
        try:
            yield found(child), key, child
        finally:
            end(child)


def is_address(text: str) -> bool:
    """Whether it names a server: http://HOST or HOST:PORT, and no file."""
    host, _, port = text.partition(":")
    return "://" in text or (bool(host) and port.rstrip("/").isdecimal() and not Path(text).exists())


def arguments(config: EngineConfig) -> list[str]:
    """The command line options that make a config."""
    made = []
    for knob in fields(config):
        value, name = getattr(config, knob.name), knob.name.replace("_", "-")
        if value != knob.default:
            made.append(f"--{'' if value else 'no-'}{name}" if knob.metadata["kind"] is FLAG else f"--{name}={value}")
    return made


def found(child: subprocess.Popen) -> str:
    """Where the server listens, once it does.  On standard error it says how far it is, or why it ends."""
    note("starting a server for the page")
    before, _, after = HINT.partition("{}")
    for line in child.stdout or ():
        if line.startswith(before):
            return line.strip().removeprefix(before).removesuffix(after)
    sys.exit(child.wait())


def end(child: subprocess.Popen) -> None:
    """Lets a process that was started end, and ends it where it does not."""
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(LAST_WORDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        child.wait()
