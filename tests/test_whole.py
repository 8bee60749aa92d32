"""Python API and commands on the real engine, with a tiny random model that has a folder like any other's."""

import json
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve import EngineConfig, GenerationConfig, pipeline
from jaxserve.cli import main
from scripts import tiny_checkpoint
from tests import fake_engine

PROMPTS = ["Hi", "a longer prompt, of several words", "x" * 70, "é🙂"] * 3
SAMPLED = GenerationConfig(do_sample=True, top_k=0, temperature=1.0, random_seed=5, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny.1b"
    tokenizer = fake_engine.tokenizer()
    tiny_checkpoint.write(folder, tiny_checkpoint.config("LlamaForCausalLM", vocab_size=258, eos_token_id=257))
    tokenizer.core.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": fake_engine.END, "chat_template": fake_engine.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    with pipeline(
        str(folder), EngineConfig(max_batch_size=4, cache_max_entry_count=24, cache_block_seq_len=16)
    ) as made:
        yield made


def answers(responses):
    return [(response.token_ids, response.finish_reason) for response in responses]


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=12), SAMPLED], ids=["greedy", "sampled"])
def test_the_batch_does_not_matter(pipe, config):
    together = pipe(PROMPTS, config)
    assert answers(together) == answers(pipe(prompt, config) for prompt in PROMPTS)
    streamed = [""] * len(PROMPTS)
    for piece in pipe.stream_infer(PROMPTS, config):
        streamed[piece.index] += piece.text
    assert streamed == [response.text for response in together]


def test_n_answers_have_seeds_in_a_row(pipe):
    three = pipe(
        "Hi", GenerationConfig(n=3, do_sample=True, top_k=0, temperature=1.0, random_seed=4, max_new_tokens=12)
    )
    assert len({tuple(response.token_ids) for response in three}) == 3
    assert three[1].token_ids == pipe("Hi", SAMPLED).token_ids


def test_scores_agree(pipe):
    tokens = list(b"some text to score")
    logits = pipe.get_logits(tokens)[0].astype(np.float64)
    assert logits.shape == (len(tokens), 258)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -chances[np.arange(len(tokens) - 1), tokens[1:]].mean()
    assert pipe.get_ppl(tokens) == [pytest.approx(expected, abs=1e-5)]
    response = pipe(tokens, GenerationConfig(max_new_tokens=1, logprobs=3, ignore_eos=True))
    ((first, *others),) = [list(chances.items()) for chances in response.logprobs]
    assert first[0] == logits[-1].argmax() and first[1] == pytest.approx(chances[-1].max(), abs=1e-5)
    assert [token for token, _ in others] == np.argsort(-logits[-1])[1:3].tolist()


def test_answers_have_the_shape_that_was_asked_for(pipe):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "maxProperties": 1}
    asked = GenerationConfig(
        response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema}},
        do_sample=True, top_k=0, temperature=1.0, random_seed=7, max_new_tokens=60, n=3,
    )  # fmt: skip
    word = GenerationConfig(response_format={"type": "regex_schema", "regex_schema": "(yes|no)!"})
    answers = pipe(PROMPTS[:3], [asked, word, GenerationConfig(max_new_tokens=5)])
    for answer in answers[0]:
        assert answer.finish_reason == "stop" and list(json.loads(answer.text)) == ["n"]
    assert answers[1].text in ("yes!", "no!") and answers[1].finish_reason == "stop"
    assert "".join(piece.text for piece in pipe.stream_infer(PROMPTS[1], word)) == answers[1].text
    assert answers[2].token_ids == pipe(PROMPTS[2], GenerationConfig(max_new_tokens=5)).token_ids
    with pytest.raises(ValueError, match="unclosed group"):
        pipe("Hi", GenerationConfig(response_format={"type": "regex_schema", "regex_schema": "(yes"}))


def test_stop_words_and_aborts_give_everything_back(pipe):
    text = pipe("Hi", GenerationConfig(max_new_tokens=30, ignore_eos=True, skip_special_tokens=False)).text
    cut = pipe("Hi", GenerationConfig(max_new_tokens=30, ignore_eos=True, stop_words=[text[5:9]]))
    assert cut.finish_reason == "stop" and text.startswith(cut.text) and len(cut.text) <= 5
    stream = pipe.stream_infer(PROMPTS, GenerationConfig(ignore_eos=True))
    next(stream)
    stream.close()
    pipe(PROMPTS[:1])  # the aborts are done before it
    stats = pipe.engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["pages_used"] == 0


def test_length(pipe):
    response = pipe([65] * (pipe.session_len - 3), GenerationConfig(ignore_eos=True))
    assert (response.finish_reason, response.generate_token_len) == ("length", 3)
    assert pipe([65] * pipe.session_len).generate_token_len == 0


def test_threads(pipe):
    config, expected, wrong = GenerationConfig(max_new_tokens=12), {}, []
    for prompt, response in zip(PROMPTS, pipe(PROMPTS, GenerationConfig(max_new_tokens=12)), strict=True):
        expected[prompt] = response.token_ids

    def work(prompt):
        if pipe(prompt, config).token_ids != expected[prompt]:
            wrong.append(prompt)

    threads = [threading.Thread(target=work, args=[prompt]) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_chat_finds_its_own_pages(pipe):
    session = pipe.session(GenerationConfig(max_new_tokens=8))
    session("a question that is longer than a page")
    assert session("and one more").cached_tokens >= 16


def test_the_commands(pipe, folder, tmp_path):
    """They give what the pipeline gives."""
    options = ["--cache-max-entry-count", "24", "--cache-block-seq-len", "16", "--max-batch-size", "4"]
    (tmp_path / "in").write_text(
        "".join(
            json.dumps({"custom_id": f"{i}", "url": "/v1/chat/completions", "body": {"messages": [
                {"role": "user", "content": prompt}], "max_tokens": 12}}) + "\n"
            for i, prompt in enumerate(PROMPTS)
        )
    )  # fmt: skip
    run = CliRunner().invoke
    done = run(main, ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(folder), *options])
    assert done.exit_code == 0, done.output
    bodies = [json.loads(line)["response"]["body"] for line in (tmp_path / "out").read_text().splitlines()]
    expected = pipe(PROMPTS, GenerationConfig(max_new_tokens=12))
    assert [body["choices"][0]["message"]["content"] for body in bodies] == [r.text for r in expected]
    assert {body["model"] for body in bodies} == {str(folder)}
    done = run(main, ["chat", str(folder), "--max-new-tokens", "12", *options], input="Hi\n\nexit\n\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == expected[0].text + "\n"
    for text in ("KV cache", "stays free", "tokens/s"):
        assert text in done.stderr
