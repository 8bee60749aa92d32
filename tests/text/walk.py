"""Answers drawn at random, token by token, from what a grammar allows."""

import re

import numpy as np

from jaxserve.text import grammar

CLOSING = (b'"', b"}", b"]", b":", b",", b"0")  # what ends JSON soonest


def allowed(matcher):
    """The ids that may come next."""
    return np.nonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))[0].tolist()


def walk(text, tokenizer, table, rng, most=400):
    """A whole answer to the grammar `text`.  After half of `most` tokens it takes the way out wherever there is one."""
    matcher, ids = grammar.matcher(text, table), []
    assert not matcher.is_error(), matcher.get_error()
    for step in range(most):
        choices = allowed(matcher)
        assert choices and not matcher.is_error(), matcher.get_error()
        ends = [id for id in choices if id in table.eos_tokens]
        if ends and (step > most // 2 or rng.random() < 0.3 or len(ends) == len(choices)):
            return tokenizer.decode(ids, skip_special=False, continues=True)
        choices = [id for id in choices if id not in ends]
        if step > most // 4:
            wanted = [id for sign in CLOSING for id in choices if tokenizer.token_bytes[id] == sign]
            choices = wanted[:1] or choices
        ids.append(rng.choice(choices))
        assert matcher.consume_token(ids[-1])
    raise AssertionError(f"no end after {most} tokens: {tokenizer.decode(ids)!r}")


def accepts(text, answer, tokenizer, table):
    """Whether `answer`, with its special tokens as such, is one that the grammar `text` allows as a whole."""
    matcher = grammar.matcher(text, table)
    assert not matcher.is_error(), matcher.get_error()
    special = {tokenizer.token_bytes[id].decode(): id for id in tokenizer.special_ids}
    pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", answer)
    ids = [id for piece in pieces for id in ([special[piece]] if piece in special else tokenizer.spell(piece))]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
