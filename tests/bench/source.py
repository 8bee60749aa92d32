"""A server that is nothing but a source of events: what the load's client is measured and tested against.

`python -m tests.bench.source PORT_FILE [TOKENS_A_SECOND_AND_STREAM]` in a process of its own; one thread, epoll.  How
it answers is chosen by the prompt: a text "fail" gets HTTP 503, "cut" a stream that ends early, "error" an error event.
"""

import json
import select
import socket
import sys
import time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(message, end="\n\n"):
    return f"data: {json.dumps(message)}{end}".encode()


def whole(status, message):
    body = json.dumps(message).encode()
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


def piece(chat, finish=None):
    """One chunk as servers write it, some 230 bytes."""
    said = {"delta": {"content": " word"}} if chat else {"text": " word"}
    if finish:
        said = {"delta": {}} if chat else {"text": ""}
    choice = {"index": 0, "logprobs": None, "finish_reason": finish} | said
    name = "chat.completion.chunk" if chat else "text_completion"
    head = {"id": "cmpl-0123456789abcdef0123456789abcdef", "object": name, "created": 1790000000, "model": "source"}
    return chunk(event(head | {"choices": [choice], "usage": None}))


PIECES = {chat: (piece(chat), piece(chat, "length")) for chat in (False, True)}


class Source:
    def __init__(self, rate):
        self.rate, self.poller, self.reading, self.speaking = rate, select.epoll(), {}, {}
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.poller.register(self.listener, select.EPOLLIN)
        self.port = self.listener.getsockname()[1]

    def loop(self):
        due = time.perf_counter()
        while True:
            wait = max(0.0, due - time.perf_counter()) if self.rate and self.speaking else 0 if self.speaking else 1
            for fd, _ in self.poller.poll(wait):
                if fd == self.listener.fileno():
                    self.accept()
                elif fd in self.reading:
                    self.read(fd)
            now = time.perf_counter()
            if self.speaking and now >= due:
                due = max(due + 1 / self.rate, now) if self.rate else now
                for connection in list(self.speaking):
                    self.speak(connection)

    def accept(self):
        connection, _ = self.listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reading[connection.fileno()] = (connection, bytearray())
        self.poller.register(connection, select.EPOLLIN)

    def read(self, fd):
        connection, data = self.reading[fd]
        data += connection.recv(1 << 18)
        head, found, body = bytes(data).partition(b"\r\n\r\n")
        if not data:
            self.leave(connection)
        if not found:
            return
        length = next((int(s.split(b":")[1]) for s in head.lower().split(b"\r\n") if s.startswith(b"content-len")), 0)
        if len(body) < length:
            return
        del self.reading[fd]
        self.poller.unregister(fd)
        self.answer(connection, head.split(b" ")[1].decode(), json.loads(body) if body else None)

    def answer(self, connection, path, body):
        chat = path == "/v1/chat/completions"
        prompt = (body["messages"][0]["content"] if chat else body["prompt"]) if body else ""
        usage = {"prompt_tokens": len(prompt), "completion_tokens": body.get("max_tokens", 16)} if body else None
        if path == "/v1/models":
            connection.sendall(whole(200, {"data": [{"id": "source"}]}))
        elif "completions" not in path:
            connection.sendall(whole(404, {"error": {"message": "no such route"}}))
        elif prompt == "fail":
            connection.sendall(whole(503, {"error": {"message": "the queue is full", "code": 503}}))
        elif prompt == "error":
            connection.sendall(HEAD + chunk(event({"error": {"message": "the engine has stopped"}})) + chunk(b""))
        elif not body.get("stream"):
            connection.sendall(whole(200, {"choices": [{"text": "word"}], "usage": usage}))
        else:
            connection.sendall(HEAD + chunk(b": a comment\r\n\r\n"))
            self.speaking[connection] = [chat, 2 if prompt == "cut" else usage["completion_tokens"], prompt, usage]
            return
        self.leave(connection)

    def speak(self, connection):
        state = self.speaking[connection]
        chat, left, prompt, usage = state
        try:
            if left:
                state[1] -= 1
                connection.send(PIECES[chat][0])
                return
            if prompt != "cut":
                last = (
                    chunk(event({"choices": [], "usage": usage}, "\r\n\r\n")) + chunk(b"data: [DONE]\n\n") + chunk(b"")
                )
                connection.sendall(PIECES[chat][1] + last)
        except OSError:
            pass
        del self.speaking[connection]
        self.leave(connection)

    def leave(self, connection):
        if self.reading.pop(connection.fileno(), None):
            self.poller.unregister(connection)
        connection.close()


if __name__ == "__main__":
    source = Source(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(f"{source.port}\n")
    source.loop()
