"""Sends a work to a server through several client processes, and gathers what they recorded."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from jaxserve.bench import work
from jaxserve.bench.client import TICKET

LEAD = 0.05  # seconds from the moment that all clients are ready to the first request
STREAMS = 128  # a client process serves that many without falling behind


@dataclass
class Target:
    """A server, and how it is asked."""

    url: str
    model: str
    chat: bool = False
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout: float = 600.0
    key: str | None = None
    extra: dict = field(default_factory=dict)  # more fields of every body

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def path(self) -> str:
        return f"{self.url}/v1/{'chat/' if self.chat else ''}completions"

    def body(self, item: work.Item) -> dict:
        """The request of an item in OpenAI's terms."""
        body: dict = {"model": self.model, "max_tokens": item.output, "temperature": self.temperature}
        if self.chat:
            said = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
            body["messages"] = said
        elif item.prompt and isinstance(item.prompt[0], dict):
            raise ValueError("the work has conversations: they need the chat endpoint (--chat)")
        else:
            body["prompt"] = item.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | self.extra


def ask(url: str, path: str, body: dict | None = None, *, key: str | None = None, timeout: float = 600.0):
    """A server's JSON answer to a GET, or a POST with a body.  OSError with a message for people."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(300).decode(errors="replace").split())  # a page is not one line
        error.close()
        raise OSError(f"{url}{path} answers {error.code}: {said}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error
    except ValueError as error:
        raise OSError(f"{url}{path} does not answer with JSON: is it an OpenAI server?") from error


def first_model(url: str, key: str | None = None) -> str:
    """The name of the model that a server has."""
    names = [model["id"] for model in ask(url, "/v1/models", key=key).get("data", ())]
    if not names:
        raise OSError(f"{url} serves no model")
    return names[0]


def asked_counter(target: Target) -> work.Counter | None:
    """Counts tokens by asking the server's /tokenize; None if it has none."""

    def count(text: str) -> int:
        return ask(target.url, "/tokenize", {"model": target.model, "prompt": text}, key=target.key)["count"]

    try:
        return (lambda texts: [count(text) if text else 0 for text in texts]) if count("hello world") > 0 else None
    except (OSError, KeyError, TypeError):
        return None


def run(
    target: Target,
    items: list[work.Item],
    *,
    concurrency: int | None = None,
    plan: list[float] | None = None,
    processes: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Sends all items: {"records": [...], "busy": the busiest client's share of its time, "clients": n}.

    concurrency: requests open at a time (with a plan: at most).  plan: seconds at which they are sent.
    """
    bodies = [target.body(item) for item in items]
    open_at_once = min(concurrency or len(items), len(items))
    count = processes or max(1, min(4, (os.cpu_count() or 2) // 2, -(-open_at_once // STREAMS)))
    count = min(count, open_at_once)
    tickets, numbers = os.pipe()
    finished, done = os.pipe()
    job = {"url": target.path(), "headers": target.headers, "bodies": bodies, "timeout": target.timeout}
    job |= {"tickets": tickets, "done": done}
    clients: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-m", "jaxserve.bench.client"]
            clients.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(tickets, done))
            )
        os.close(tickets)
        os.close(done)
        send_jobs(clients, job, concurrency, plan)
        for _ in clients:
            if not os.read(finished, 1):
                break  # one has failed: its exit status tells
        begin = f"{time.perf_counter() + LEAD}\n".encode()
        for client in clients:
            assert client.stdin
            client.stdin.write(begin)
            client.stdin.close()
        offer(numbers, 0 if plan else len(items))
        while seen := os.read(finished, 4096):
            progress(len(seen))
        results = [orjson.loads(client.stdout.read()) for client in clients if client.stdout]
        if failed := [code for client in clients if (code := client.wait())]:
            raise RuntimeError(f"{len(failed)} of {count} client processes failed")
    finally:
        os.close(finished)
        for client in clients:
            client.kill()
            client.wait()
            for end in (client.stdin, client.stdout):
                if end:
                    end.close()
    records = sorted((r for result in results for r in result["records"]), key=lambda record: record["number"])
    return {"records": records, "busy": max(result["busy"] for result in results), "clients": count}


def send_jobs(clients, job: dict, concurrency: int | None, plan: list[float] | None) -> None:
    """Tells each client its part."""
    count = len(clients)
    for i, client in enumerate(clients):
        share = None if concurrency is None else concurrency // count + (i < concurrency % count)
        own: dict = {"slots": share}
        if plan:
            own["plan"] = [(due, number) for number, due in enumerate(plan) if number % count == i]
        client.stdin.write(orjson.dumps(job | own) + b"\n")
        client.stdin.flush()


def offer(numbers: int, items: int) -> None:
    """Fills the pipe from which clients draw; they empty it while it is filled."""
    with os.fdopen(numbers, "wb", buffering=0) as pipe:
        for number in range(items):
            pipe.write(number.to_bytes(TICKET))
