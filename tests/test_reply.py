"""What a reply collects, and what that costs."""

from jaxserve.engine.request import Output
from jaxserve.reply import Reply, Response


class Letters:
    """In the place of a TextStream: each token is a letter."""

    stopped = False

    def push(self, token):
        return chr(token)

    def finish(self):
        return "."


class Watched(Response):
    """A Response that notes how long the texts are that are put into it."""

    def __setattr__(self, name, value):
        if name == "text":
            self.__dict__.setdefault("written", []).append(len(value))
        super().__setattr__(name, value)


def make():
    whole = Watched("", 0, 1)
    return Reply(Letters(), whole, live=True, keep_stop=False), whole


def test_a_long_answer_is_not_copied_for_every_token():
    reply, whole = make()
    for _ in range(5000):
        reply.put(Output(ord("a")))
        assert reply.take().text == "a"
    reply.put(Output(None, "length"))
    assert reply.take().text == "." and reply.finished
    assert whole.text == "a" * 5000 + "." == reply.whole.text and whole.generate_token_len == 5000
    assert sum(whole.written) == 5001


def test_the_whole_is_up_to_date_whenever_it_is_asked_for():
    reply, _ = make()
    for count, letter in enumerate("abc", 1):
        reply.put(Output(ord(letter)))
        reply.take()
        assert reply.whole.text == "abc"[:count] and len(reply.whole.token_ids) == count
