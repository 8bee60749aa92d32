"""A client of the server, with LMDeploy's names, and `jaxserve client`: a conversation that the server keeps.

Imports neither jax nor the server.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import click
import httpx2

from jaxserve import terminal
from jaxserve.terminal import FULL, Pace, note

TOKENS = 512  # of one turn, as LMDeploy's client has it
CONNECT = 10  # seconds
NOBODY = (httpx2.ConnectError, httpx2.ConnectTimeout)
DIRECT = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))  # not through a proxy of the environment


class ServerError(RuntimeError):
    """What a server said against a request, or that none answered (status 0)."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class APIClient:
    """One server.  What a parameter leaves open is the server's default; unknown parameters are sent as they are.

    The methods that answer are generators: of one object, or with stream=True of one for each piece.  Closing one early
    ends the request.  They raise ServerError, also in the middle of a stream.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, **kwargs):
        """api_server_url: http://HOST:PORT, with or without /v1.  kwargs: taken and not used, as LMDeploy has it."""
        self.api_server_url = address(api_server_url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # An answer takes as long as it takes; a machine that does not answer at all is found out when connecting.
        self._http = httpx2.Client(headers=headers, timeout=httpx2.Timeout(None, connect=CONNECT), mounts=DIRECT)
        self._models: list[dict] | None = None

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "APIClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def models(self) -> list[dict]:
        """What the server says of its models, asked once."""
        if self._models is None:
            with self._told():
                response = self._http.get(f"{self.api_server_url}/v1/models")
                self._models = _checked(response)["data"]
        return self._models

    @property
    def available_models(self) -> list[str]:
        """The names of the models."""
        return [model["id"] for model in self.models]

    def chat_completions_v1(self, model: str, messages: str | list[dict], **parameters) -> Generator[dict, None, None]:
        """OpenAI's chat completions.  messages: a list, or a text that is the whole prompt."""
        return self._answers("chat/completions", {"model": model, "messages": messages, **parameters})

    def completions_v1(self, model: str, prompt: str | list, **parameters) -> Generator[dict, None, None]:
        """OpenAI's completions.  prompt: a text, token ids, or a list of either."""
        return self._answers("completions", {"model": model, "prompt": prompt, **parameters})

    def chat_interactive_v1(
        self,
        prompt: str | list[dict],
        session_id: int = -1,
        interactive_mode: bool = False,
        stream: bool = False,
        **parameters,
    ) -> Generator[dict, None, None]:
        """One turn of a conversation that, with interactive_mode, the server keeps under session_id.

        Objects with text, tokens, input_tokens, history_tokens and finish_reason.
        """
        own = {"session_id": session_id, "interactive_mode": interactive_mode, "stream": stream}
        return self._answers("chat/interactive", {"prompt": prompt, **own, **parameters})

    def chat(
        self, prompt: str, session_id: int, stream: bool = False, **parameters
    ) -> Iterator[tuple[str, int, str | None]]:
        """One turn of a kept conversation: (text, tokens, finish_reason)."""
        for piece in self.chat_interactive_v1(prompt, session_id, interactive_mode=True, stream=stream, **parameters):
            yield piece["text"], piece["tokens"], piece["finish_reason"]

    def end_session(self, session_id: int) -> None:
        """Ends a conversation that the server keeps."""
        for _ in self.chat_interactive_v1("", session_id, request_output_len=0):
            pass

    def encode(self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple:
        """(token ids, their number); of a list of texts, lists of both."""
        given = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        (found,) = self._answers("encode", given)
        return found["input_ids"], found["length"]

    def _answers(self, route: str, body: dict) -> Generator[dict, None, None]:
        body = {name: value for name, value in body.items() if value is not None}
        with self._told(), self._http.stream("POST", f"{self.api_server_url}/v1/{route}", json=body) as response:
            if response.is_error or not body.get("stream"):
                response.read()
                yield _checked(response)
                return
            for line in _lines(response):
                line = line.removeprefix(b"data:").strip()
                if line == b"[DONE]":
                    return
                if line and not line.startswith(b":"):
                    piece = json.loads(line)
                    if "error" in piece:
                        raise ServerError(piece["error"]["message"], 500)
                    yield piece

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns the library's errors into words for a person."""
        form = f"{self.api_server_url!r} is no address: it has the form http://HOST:PORT"
        try:
            urlsplit(self.api_server_url).port  # noqa: B018  the library takes any number and asks at another port
        except ValueError as error:
            raise ServerError(f"{form} ({error})") from error
        try:
            yield
        except NOBODY as error:
            raise ServerError(f"no server answers at {self.api_server_url} ({error})") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise ServerError(form) from error
        except httpx2.TransportError as error:
            raise ServerError(f"the connection to {self.api_server_url} broke off ({error})") from error


def address(url: str) -> str:
    """A server's address as people write it: with or without http://, a slash or /v1 at its end."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")


def _lines(response: httpx2.Response) -> Iterator[bytes]:
    """Lines end with a line feed and nothing else: JSON may hold the other ends of lines that Unicode knows."""
    rest = b""
    for part in response.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest


def _checked(response: httpx2.Response) -> dict:
    """The answer's JSON.  ServerError says what the server has against the request."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if response.is_success and isinstance(found, dict):
        return found
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        raise ServerError(str(found["error"].get("message")), response.status_code)
    raise ServerError(f"{response.url} answered {response.status_code}: it is no server of ours", response.status_code)


# `jaxserve client` ----------------------------------------------------------------------------------------------------


def run(url: str, api_key: str | None = None, session_id: int = 1) -> None:
    """Talks with a server in the terminal until the input ends; the server keeps the conversation until then."""
    terminal.tolerant()
    with APIClient(url, api_key) as client:
        try:
            model, *_ = client.models
        except ServerError as error:
            raise click.ClickException(_advice(error, api_key)) from error
        note(f"{model['id']} at {urlsplit(client.api_server_url).netloc}, session {session_id}")
        talk = Talk(client, session_id, model.get("max_model_len"))
        try:
            terminal.converse(terminal.asker(), talk.turn, talk.end)
        finally:
            talk.end()


def _advice(error: ServerError, api_key: str | None) -> str:
    if error.status == 401:
        return "the server refused the key" if api_key else "the server asks for a key: --api-key or $JAXSERVE_API_KEY"
    hint = "; `jaxserve serve MODEL` starts one" if isinstance(error.__cause__, NOBODY) else ""
    return f"{error}{hint}"


class Talk:
    """A conversation that the server keeps.  most: tokens that it may hold, where known."""

    def __init__(self, client: APIClient, session_id: int, most: int | None):
        self.client, self.session_id, self.most = client, session_id, most
        self.begun = False

    def end(self) -> None:
        """Lets the server forget the conversation."""
        if self.begun:
            self.begun = False
            try:
                self.client.end_session(self.session_id)
            except ServerError as error:
                note(f"(the server may still keep the conversation: {error})")

    def turn(self, prompt: str) -> None:
        """Prints one reply as it comes; Ctrl-C ends it."""
        pace, last, stopped = Pace(), None, False
        pieces = self.client.chat_interactive_v1(
            prompt, self.session_id, interactive_mode=True, stream=True, request_output_len=TOKENS
        )
        try:
            with closing(pieces):
                for last in pieces:
                    if not self.begun and last["history_tokens"]:
                        note("(goes on with what the server kept; end and an empty line start a new conversation)")
                    self.begun = True
                    pace.reached(last["tokens"])
                    terminal.say(last["text"])
        except KeyboardInterrupt:
            stopped = True
        except ServerError as error:
            click.echo(f"\nerror: {error}" if last else f"error: {error}", err=True)
            return
        print(flush=True)
        if last and not stopped and last["finish_reason"] == "length" and self._full(last):
            click.echo(FULL, err=True)
        if last and last["tokens"]:
            note(self._figures(last, pace, stopped))

    def _full(self, last: dict) -> bool:
        held = last["input_tokens"] + last["history_tokens"] + last["tokens"]
        return self.most is not None and held >= self.most

    def _figures(self, last: dict, pace: Pace, stopped: bool) -> str:
        """One line about a reply."""
        made = last["tokens"]
        parts = [f"{made} tokens" + (" (stopped; the server keeps nothing of this turn)" if stopped else "")]
        if last["finish_reason"] == "length" and not self._full(last):
            parts[0] += f" (cut at {TOKENS})"
        parts += pace.figures()
        held = last["input_tokens"] + last["history_tokens"] + made
        parts.append(f"session {held:,}" + (f"/{self.most:,}" if self.most else ""))
        return "[" + ", ".join(parts) + "]"
