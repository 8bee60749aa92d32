"""Steps that wait for their masks on a GPU: the tokens are those of masks that the host hands over."""

import pytest
from llguidance import LLMatcher

from jaxserve import ops
from jaxserve.engine.request import SamplingParams
from scripts import tiny_checkpoint
from tests.engine import build
from tests.engine.test_guided import STOP, regex, schema

PATTERNS = [regex("[a-z ]{40}"), regex("(yes|no)(, [a-f]{3,9})*"), schema(), None]
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=5, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    tiny_checkpoint.write(folder, tiny_checkpoint.config("LlamaForCausalLM", **heads))
    return folder


def answers(folder, ahead):
    """(tokens, ending) of requests alone, and of many at once, some of which are preempted, or given up."""
    knobs = dict(max_batch_size=48, num_tokens_per_iter=256, cache_block_seq_len=16, cache_max_entry_count=48)
    with build.engine(folder, guide=build.table, session_len=128, **knobs) as engine:
        engine.turns.ahead = ahead
        assert (engine.runner.gate is not None) == ops.waits()

        def ask(i):
            params = SAMPLED if i % 3 == 0 else build.GREEDY
            prompt = [3 + (7 * i + j) % 90 for j in range(3 + i % 20)]
            return build.submit(engine, prompt, 50, params, stop_ids=STOP, grammar=PATTERNS[i % 4])

        alone = [(answer.wait(), answer.finish) for answer in map(ask, range(8))]
        made = [ask(i) for i in range(60)]
        given_up = build.submit(engine, [5, 6], 90, stop_ids=STOP, grammar=regex("[a-z]{90}"))
        given_up.get(timeout=60)
        engine.abort(given_up.request)
        together = [(answer.wait(), answer.finish) for answer in made]
        assert given_up.wait() is not None and given_up.finish == "abort"
        stats = engine.stats()
        assert stats["pages_used"] == 0 and stats["preemptions"] > 0 and stats["failed_steps"] == 0
        return alone, together


def follows(tokens, finish, grammar):
    """Whether an answer is a text of the grammar, or the beginning of one."""
    matcher, text = LLMatcher(build.table(), grammar), [token for token in tokens if token not in STOP]
    whole = matcher.validate_tokens(text) == len(text) and matcher.consume_tokens(text)
    return whole and (finish == "length" or (finish == "stop" and matcher.is_accepting()))


@pytest.mark.gpu
def test_tokens_are_those_of_masks_from_the_host(folder, monkeypatch):
    waited = [answers(folder, ahead) for ahead in (1, 2)]
    monkeypatch.setattr(ops, "waits", lambda: False)
    expected = answers(folder, 1)
    # Among others a sum may round otherwise, as steps have other sizes, so there only the grammar tells right from
    # wrong: an answer of random weights leaves it with the first token whose mask is another's.
    assert [alone for alone, _ in waited] == [expected[0]] * 2
    for alone, together in (*waited, expected):
        for found in (alone, together):
            for i, (tokens, finish) in enumerate(found):
                grammar = PATTERNS[i % 4]
                assert tokens and (grammar is None or follows(tokens, finish, grammar))
