"""All answers to one body on their way: submitted, read as they come, aborted together.

Knows neither HTTP nor any protocol's JSON.
"""

import queue
import time
from collections import deque

from jaxserve.engine.request import Output, Overloaded
from jaxserve.protocol import Ask
from jaxserve.reply import Reply
from jaxserve.serve.errors import CLIENT_GONE, ApiError, of, of_finish
from jaxserve.serve.heartbeat import beating
from jaxserve.voice import Call, CallDelta, Delta, Message, Voice, best

__all__ = ["Answer", "Call", "CallDelta", "Delta", "Message", "Voice", "failure"]

TRY_AGAIN = 0.2  # seconds until a full engine is asked again for the rest of a long list of prompts


class Answer:
    """All answers to one body.  Iterating yields (choice, Delta); (-1, None) when nothing came for `heartbeat` seconds.

    choice: the prompt's number times n, plus which of its n.  `close`, from anywhere, aborts what still runs.
    """

    def __init__(
        self, engine, ask: Ask, prompts: list[list[int]], voices: list[Voice], *, window: int, heartbeat: float
    ):
        """Submits, as many as `window` at once; raises what the engine raises of the first, with nothing left behind.

        prompts: their token ids.
        """
        self.ask, self.prompts, self.closed = ask, prompts, False
        self._engine, self._heartbeat = engine, heartbeat
        self._voices = {voice.reply: voice for voice in voices}
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._running: set[Reply] = set()
        self._waiting = deque(voice.reply for voice in voices)
        self._window = window
        self._responses = [voice.reply.whole for voice in voices]
        self._pause = 0.0  # until then a full engine is not asked again
        try:
            self._submit(self._waiting[0])  # the others may wait for it
            self._waiting.popleft()
            self._submit_waiting()
        except BaseException:
            self.close()
            raise

    def _submit(self, reply: Reply) -> None:
        reply.news = self._news
        self._running.add(reply)
        if reply.request is None:  # no room for a single token
            reply.put(Output(None, "length"))
            return
        try:
            self._engine.submit(reply.request)
        except BaseException as error:
            self._running.discard(reply)
            if isinstance(error, ValueError):
                raise ApiError(400, str(error)) from None
            raise

    def _submit_waiting(self) -> None:
        """The rest of what was asked for, as far as there is room; what can never be served ends in an error."""
        while self._waiting and len(self._running) < self._window:
            reply = self._waiting[0]
            try:
                self._submit(reply)
            except Overloaded:
                self._pause = time.monotonic() + TRY_AGAIN
                return
            except Exception as error:
                failed = of(error)
                reply.whole.error_code = failed.status
                self._running.add(reply)
                reply.put(Output(None, "error", error=failed.message))
            self._waiting.popleft()

    def __iter__(self):
        with beating(self._news, self._heartbeat) as beat:
            yield from self._read(beat)

    def _read(self, beat):
        while (self._running or self._waiting) and not self.closed:
            if self._waiting and time.monotonic() >= self._pause:
                self._submit_waiting()
            try:
                reply = self._news.get(timeout=TRY_AGAIN) if self._waiting else self._news.get()
            except queue.Empty:
                continue
            if self.closed:
                return
            if reply is beat:
                yield -1, None
                continue
            voice = self._voices[reply]
            delta = voice.take()
            if delta is None:
                continue
            if delta.finish:
                self._running.discard(reply)
                self._pause = 0.0
                if reply.request and not reply.request.finish:  # ended by a stop word, which the engine does not know
                    self._engine.abort(reply.request)
            beat.last = time.monotonic()
            yield voice.choice, delta

    def collect(self) -> list[Message]:
        """The whole answers, in the order of their choices.  ApiError if one of them failed, or the client left."""
        deltas: list[list[Delta]] = [[] for _ in self._voices]
        for choice, delta in self:
            if delta is not None:
                deltas[choice].append(delta)
                if delta.finish in ("error", "abort"):
                    self.close()
                    raise failure(delta)
        if self.closed:
            raise ApiError(CLIENT_GONE, "the client has left")
        return best(list(map(Message.of, deltas)), self.ask)

    def close(self) -> None:
        """Aborts what still runs.  From any thread; twice is fine."""
        if self.closed:
            return
        self.closed = True
        self._waiting.clear()
        for reply in list(self._running):
            if reply.request:
                self._engine.abort(reply.request)
        self._news.put(None)

    @property
    def prompt_tokens(self) -> int:
        return sum(response.input_token_len for response in self._responses if response.choice == 0)

    @property
    def cached_tokens(self) -> int:
        return sum(response.cached_tokens for response in self._responses if response.choice == 0)

    @property
    def reasoning_tokens(self) -> int:
        return sum(voice.reasoning_tokens for voice in self._voices.values())

    @property
    def completion_tokens(self) -> int:
        return sum(response.generate_token_len for response in self._responses)


def failure(delta: Delta) -> ApiError:
    """The error that an answer ended in."""
    if delta.finish == "abort":
        return ApiError(503, "the answer was ended by the server, which is shutting down", retry_after=5)
    return of_finish(delta.response.error_message, delta.response.error_code)
