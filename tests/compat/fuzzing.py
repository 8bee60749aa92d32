"""What schemathesis does with the bodies that it has made, before it sends them: hooks, loaded by its own process.

A random model is always a 404, and a small CPU is for long busy with what is allowed: so a model's name becomes the
server's, and counts within what the document allows become small.  Everything else stays as it was made.
"""

import zlib

import schemathesis

from tests.compat.conftest import MODEL

TOKENS = 1  # of an answer; a stream has one more
STREAMS = 4  # one of so many answers is streamed, where the body leaves it open
MANY = 2  # prompts or texts of a body, and answers to each
LENGTHS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
    "/generate": "max_tokens",
    "/v1/chat/interactive": "request_output_len",
}
# One of these must be there, which the document cannot say; where all may be empty, an empty one asks for nothing.
PROMPTS = {
    "/generate": ("prompt", "input_ids"),
    "/tokenize": ("prompt", "messages"),
    "/v1/chat/interactive": ("prompt",),
}


@schemathesis.hook
def before_call(context, case, kwargs):
    """Changes a body in its place."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    length = LENGTHS.get(case.operation.path)
    if length and (length in body or case.operation.path != "/v1/messages"):  # there it must be given
        given = body.get(length)
        if body.get("stream") is None and zlib.crc32(repr(body).encode()) % STREAMS == 0:
            body["stream"] = True
        most = TOKENS + bool(body.get("stream"))
        if given is None or (type(given) is int and given > most):
            body[length] = most
    names = PROMPTS.get(case.operation.path)
    if names and all(body.get(name) is None or body[name] == "" for name in names):
        body["prompt"] = "Hi"
    for name in ("n", "best_of"):
        if type(body.get(name)) is int and MANY < body[name] <= 128:
            body[name] = MANY
    for name, most in (("prompt", 1024), ("input", 2048)):
        given = body.get(name)
        if isinstance(given, list) and MANY < len(given) <= most and not isinstance(given[0], int):
            body[name] = given[:MANY]
