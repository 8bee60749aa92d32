"""Every option of the server, declared once: its default, its help and its check.  The command line follows from it.

The engine's options are in `jaxserve.config`.  Names are LMDeploy's where it has the option.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click

from jaxserve.knobs import FLAG, TEXT, Kind, accepts, check, list_of, number, one_of, option, optional, whole
from jaxserve.options import from_field

LEVELS = ("debug", "info", "warning", "error")
KEYS_VARIABLE = "JAXSERVE_API_KEYS"


def texts(words: str) -> list[str]:
    """A list as it is written on a command line."""
    return [word for part in words.split(",") if (word := part.strip())]


def level(word: str) -> str:
    """A severity, by Python's names too."""
    return {"warn": "warning", "critical": "error", "fatal": "error"}.get(word.lower(), word.lower())


WORDS = replace(list_of(TEXT), parse=texts)
PREFIX = Kind('"", or a path such as /llm', lambda v: v == "" or (v[:1] == "/" and v[-1:] != "/"), str)

# LMDeploy's options of `serve api_server` that have no use here: name -> (its default, why).
UNUSED_SERVER = {
    "qos_config_path": ("", "requests are served in the order of their arrival, and none starves"),
    "proxy_url": (None, "put any HTTP load balancer before several servers; /ready tells it whether to send"),
    "max_log_len": (None, "prompts and answers are never logged"),
    "allow_terminate_by_client": (False, "a client cannot end the server; send it SIGTERM"),
    "enable_abort_handling": (False, "a request ends when its client leaves, always"),
    "allowed_media_domains": (None, "models with a vision part are not there yet"),
    "instance_num": (None, "max_batch_size bounds the requests that run at once"),
}


def _in(section: str, default, help: str, kind: Kind):
    return option(default, help, kind, section=section)


@accepts(renamed={}, unused=UNUSED_SERVER, missing={})
@dataclass(frozen=True)
class ServerOptions:
    """How a model is put behind HTTP.  None means: chosen, or off, as the help says."""

    server_name: str = _in("Address", "127.0.0.1", "address to listen at; 0.0.0.0: every one of this machine", TEXT)
    server_port: int = _in("Address", 23333, "port to listen at (0: a free one)", whole(0, 65535))
    root_path: str = _in("Address", "", "path before all routes, where a reverse proxy adds one, such as /llm", PREFIX)
    ssl: bool = _in("Address", False, "TLS, with the files that SSL_KEYFILE and SSL_CERTFILE name", FLAG)
    http_workers: int = _in("Address", 2, "web processes; each carries some 20,000 tokens/s", whole(1, 64))

    api_keys: Sequence[str] | None = _in(
        "Access", None, f"keys of which a client must send one; better in a file or in ${KEYS_VARIABLE}", WORDS
    )
    api_key_file: str | None = _in("Access", None, "file with one key a line", optional(TEXT))
    allowed_hosts: Sequence[str] | None = _in(
        "Access",
        None,
        "names by which clients may call the server (default: any; at a loopback address only its own)",
        WORDS,
    )
    allow_origins: Sequence[str] | None = _in(
        "Access", None, "web pages' origins that may call the server, or * (default: none)", WORDS
    )
    allow_credentials: bool = _in("Access", False, "those pages may send credentials", FLAG)
    allow_methods: Sequence[str] | None = _in("Access", None, "methods that those pages may use (default: *)", WORDS)
    allow_headers: Sequence[str] | None = _in("Access", None, "headers that those pages may send (default: *)", WORDS)
    disable_fastapi_docs: bool = _in("Access", False, "no /docs and no /openapi.json", FLAG)
    disable_metrics: bool = _in("Access", False, "no /metrics", FLAG)

    max_concurrent_requests: int | None = _in(
        "Limits",
        None,
        "requests inside, running or queued; more get a 503 (default: no bound but the queue's)",
        optional(whole(1)),
    )
    max_queued_requests: int = _in("Limits", 512, "requests that wait for their turn; more get a 503", whole(1))
    max_queued_tokens: int | None = _in(
        "Limits", None, "prompt tokens that wait (default: four times what the KV cache holds)", optional(whole(1))
    )
    request_timeout: float | None = _in(
        "Limits",
        None,
        "seconds that a request may take from its arrival (default: no limit)",
        optional(number(0, above=True)),
    )
    max_body_size: float = _in("Limits", 32, "MiB of a request's body", number(0, 1024, above=True))
    graceful_timeout: float = _in(
        "Limits", 30, "seconds that running requests get when the server is stopped", number(0)
    )

    chat_template: str | None = _in(
        "Answers",
        None,
        "a .jinja file, a .json file as LMDeploy has them, or internlm2, base (default: the model's)",
        optional(TEXT),
    )
    meta_instruction: str | None = _in("Answers", None, "system message of a conversation without one", optional(TEXT))
    capability: str = _in(
        "Answers",
        "chat",
        "chat; completion goes on with the text as it stands",
        one_of("completion", "chat", later=("infilling", "python")),
    )
    generation_config: str = _in(
        "Answers",
        "auto",
        "where sampling defaults come from: auto: the model's generation_config.json; lmdeploy: LMDeploy's; "
        "or a folder or file with another generation_config.json",
        TEXT,
    )
    tool_call_parser: str | None = _in(
        "Answers",
        None,
        "how the model writes tool calls: internlm2, hermes, llama3, mistral, or LMDeploy's or vLLM's name for one of "
        "them (default: found out)",
        optional(TEXT),
    )
    reasoning_parser: str | None = _in(
        "Answers",
        None,
        "how the model marks its reasoning: think, deepseek-r1, mistral, seed_oss, or LMDeploy's or vLLM's name for "
        "one of them (default: found out)",
        optional(TEXT),
    )

    log_level: str = _in("Logs", "info", "least severity of what is logged", replace(one_of(*LEVELS), parse=level))
    log_format: str = _in("Logs", "text", "lines for people, or one JSON object a line", one_of("text", "json"))

    def __post_init__(self):
        check(self)
        if self.allow_credentials and "*" in (self.allow_origins or ()):
            raise ValueError("allow_credentials needs the origins by name: with * any web page could act as its reader")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.server_name == "localhost" or self.server_name.startswith("127.") or self.server_name == "::1"

    def keys(self) -> list[str]:
        """The keys of the options, of the file and of the environment.  ValueError for a file that cannot be used."""
        found = [*(self.api_keys or ()), *os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()]
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api_key_file: {error}") from None
            keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not keys:
                raise ValueError(f"api_key_file: {self.api_key_file} holds no key")
            found += keys
        return list(dict.fromkeys(found))

    def sampling_defaults(self) -> dict | None:
        """The generation_config.json that the options name; None: the model's own.  ValueError if it cannot be read."""
        if self.generation_config in ("auto", "lmdeploy"):
            return None if self.generation_config == "auto" else {}
        path = Path(self.generation_config).expanduser()
        path = path / "generation_config.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"generation_config: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"generation_config: {path} holds no object")
        return found


SPELLINGS = {"capability": {"option": "cap"}, "meta_instruction": {"also": "--system"}}


def server_options(command: Callable) -> Callable:
    """Adds an option for every field of ServerOptions, and hidden ones for LMDeploy's that have no use here."""
    for name, (neutral, _) in UNUSED_SERVER.items():
        words = name.replace("_", "-")
        switch = f"/--no-{words}" if isinstance(neutral, bool) else ""
        command = click.option(f"--{words}{switch}", name, default=None, hidden=True)(command)
    for knob in reversed(fields(ServerOptions)):
        add = from_field(ServerOptions, knob.name, section=knob.metadata["section"], **SPELLINGS.get(knob.name, {}))
        command = add(command)
    return command
