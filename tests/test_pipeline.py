"""The Python API, on an engine without a model."""

import random
import signal
import threading
import time

import numpy as np
import pytest

from jaxserve import GenerationConfig, Response, pipeline
from jaxserve.reply import sampling_params
from tests import fake_engine
from tests.waiting import soon


@pytest.fixture
def pipe():
    with fake_engine.make() as made:
        yield made


def idle(engine):
    """Waits until the engine has nobody left."""
    soon(lambda: not engine.stats()["running"])


def test_the_public_names():
    import jaxserve
    import jaxserve.pipeline as module  # the function stays what it is

    assert callable(jaxserve.pipeline) and jaxserve.pipeline is pipeline and module is pipeline
    for name in jaxserve.__all__:
        assert getattr(jaxserve, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        jaxserve.nothing  # noqa: B018


def test_single_in_single_out(pipe):
    response = pipe("Hi")
    assert isinstance(response, Response)
    assert (response.text, response.finish_reason) == ("answer 1: Hi", "stop")
    assert response.generate_token_len == len("answer 1: Hi") == len(response.token_ids)
    assert response.input_token_len == len(pipe.tokens("Hi"))


def test_the_repr_of_the_tutorial(pipe):
    expected = (
        "Response(text='answer 1: Hi', generate_token_len=12, input_token_len=7, session_id=0, finish_reason='stop', "
        f"token_ids={list(b'answer 1: Hi')}, logprobs=None)"
    )
    assert repr(pipe("Hi")) == expected


def test_list_in_list_out_in_order(pipe):
    prompts = [f"{i}" * (1 + i % 7) for i in range(200)]
    responses = pipe(prompts)
    assert [response.text for response in responses] == [f"answer 1: {prompt}" for prompt in prompts]
    assert [response.index for response in responses] == list(range(200))
    assert [response.session_id for response in responses] == list(range(200))
    assert pipe.engine.most <= pipe.window
    assert pipe([]) == [] and [r.text for r in pipe(["x"])] == ["answer 1: x"]


def test_messages_and_token_ids(pipe):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert pipe(messages).text == "answer 2: c"
    assert [r.text for r in pipe([messages, "d", messages[:1]])] == ["answer 2: c", "answer 1: d", "answer 1: a"]
    assert pipe("raw", do_preprocess=False).text == "answer 0: raw"
    ids = list(b"ids")
    assert pipe(ids).text == "answer 0: ids" and pipe(np.array(ids).tolist()).text == "answer 0: ids"
    assert [r.text for r in pipe([ids, np.array(ids).tolist()])] == ["answer 0: ids"] * 2


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("look", b"image"), "images"),
        ([("look", b"image")], "prompt 0 .*images"),
        ([5.5], "prompt 0 is a text"),
        (5, "a prompt is a text, .* not 5"),
        (None, "a prompt is a text, .* not None"),
        ([{"role": "user"}], "message 0"),
        ([[1, 100_000]], "0 to 257, not 100000"),
        ([[-1]], "not -1"),
        ([[]], "empty"),
        (["a", {"role": "user", "content": "x"}], "prompt 1"),
        ("\ud800", "surrogate"),
    ],
    ids=repr,
)
def test_what_is_no_prompt(pipe, wrong, said):
    with pytest.raises(ValueError, match=said):
        pipe(wrong)
    idle(pipe.engine)
    assert pipe("still there").text == "answer 1: still there"


def test_one_config_or_one_each(pipe):
    short, long = GenerationConfig(max_new_tokens=3), GenerationConfig(max_new_tokens=8)
    assert [r.text for r in pipe(["a", "b"], short)] == ["ans", "ans"]
    assert [r.text for r in pipe(["a", "b"], [short, long])] == ["ans", "answer 1"]
    assert all(r.finish_reason == "length" for r in pipe(["a", "b"], short))
    with pytest.raises(ValueError, match="1 generation configs came with 2"):
        pipe(["a", "b"], [short])
    with pytest.raises(ValueError, match="GenerationConfig, not 3"):
        pipe(["a"], [3])
    for wrong in (3, {"top_k": 3, "temperature": 0.5}):
        for call in (pipe, pipe.session(wrong), lambda prompt, config: list(pipe.stream_infer(prompt, config))):
            with pytest.raises(ValueError, match="GenerationConfig, not"):
                call("a", wrong)


def test_n_answers_are_a_list(pipe):
    config = GenerationConfig(n=3, top_k=5, random_seed=7)
    expected = [f"answer 1: x (seed {seed})" for seed in (7, 8, 9)]
    assert [r.text for r in pipe("x", config)] == expected
    assert [[r.text for r in answers] for answers in pipe(["x", "x"], config)] == [expected] * 2
    assert [r.choice for r in pipe("x", config)] == [0, 1, 2]
    groups = {request.group for request in pipe.engine.submitted[-3:]}
    assert len(groups) == 1 and groups != {None}


def test_no_room_is_finish_length_and_no_tokens(pipe):
    full, almost = [65] * pipe.session_len, [65] * (pipe.session_len - 1)
    responses = pipe([full, [65] * 1000, almost])
    assert [(r.generate_token_len, r.finish_reason, r.text) for r in responses[:2]] == [(0, "length", "")] * 2
    assert (responses[2].generate_token_len, responses[2].finish_reason) == (1, "length")
    assert pipe("a", GenerationConfig(max_new_tokens=0)).finish_reason == "length"
    assert len(pipe.engine.submitted) == 1


def test_max_new_tokens_none_is_what_fits(pipe):
    response = pipe("a", GenerationConfig(max_new_tokens=None, ignore_eos=True))
    assert response.input_token_len + response.generate_token_len == pipe.session_len


def test_a_request_that_never_fits_is_an_error_of_its_own(pipe):
    responses = pipe([[0], "b"])
    assert (responses[0].finish_reason, responses[0].error_message) == ("error", "it never fits")
    assert responses[1].text == "answer 1: b"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_words(pipe, stream):
    def run(**given):
        config = GenerationConfig(**given)
        if not stream:
            return pipe("abcabd", config).text
        return "".join(piece.text for piece in pipe.stream_infer("abcabd", config))

    assert run(stop_words=["abd"]) == "answer 1: abc"
    assert run(stop_words=["er 1"]) == "answ"
    assert run(stop_words=["er 1"], include_stop_str_in_output=True) == "answer 1"
    assert run(stop_words=["zzz"]) == "answer 1: abcabd"
    assert run(stop_token_ids=[ord(":")]) == "answer 1"
    assert run(stop_token_ids=[ord(":")], include_stop_str_in_output=True) == "answer 1:"
    assert run(stop_words=["<|end|>"], ignore_eos=True) == "answer 1: abcabd"


def test_a_stop_word_ends_the_request(pipe):
    response = pipe("abc", GenerationConfig(stop_words=["er 1"], ignore_eos=True, max_new_tokens=200))
    assert (response.text, response.finish_reason) == ("answ", "stop")
    idle(pipe.engine)
    assert [request.id.rpartition("-")[2] for request in pipe.engine.aborted] == ["0.0"]
    assert len(pipe.engine.aborted[0].output) < 200


def test_ignore_eos_runs_to_the_end(pipe):
    response = pipe("abc", GenerationConfig(ignore_eos=True, max_new_tokens=50))
    assert (response.generate_token_len, response.finish_reason) == (50, "length")


def test_logprobs(pipe):
    response = pipe("a", GenerationConfig(logprobs=2, max_new_tokens=3))
    assert response.logprobs == [{t: -0.5, t + 1: -1.5} for t in b"ans"]
    assert pipe("a", GenerationConfig(logprobs=0, max_new_tokens=2)).logprobs == [{t: -0.5} for t in b"an"]


def test_streams_add_up(pipe):
    prompts = ["é中🙂", "b" * 20, "c"]
    texts, ids, last = [""] * 3, [[], [], []], [None] * 3
    for piece in pipe.stream_infer(prompts):
        texts[piece.index] += piece.text
        ids[piece.index] += piece.token_ids
        assert last[piece.index] is None
        assert piece.generate_token_len == len(ids[piece.index])
        last[piece.index] = piece.finish_reason
    whole = pipe(prompts)
    assert texts == [response.text for response in whole] and ids == [response.token_ids for response in whole]
    assert last == ["stop"] * 3


def test_a_stream_that_is_closed_aborts_its_requests():
    with fake_engine.make(delay=0.01) as pipe:
        stream = pipe.stream_infer(["a" * 50, "b" * 50])
        next(stream)
        stream.close()
        idle(pipe.engine)
        assert len(pipe.engine.aborted) == 2
        pipe.stream_infer("never read")  # nothing is asked before it is read
        assert len(pipe.engine.submitted) == 2


def test_control_c_in_a_batch_leaves_the_pipeline_usable():
    with fake_engine.make(delay=0.01) as pipe:

        def interrupt():
            while not pipe.engine.stats()["running"]:
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            pipe(["a" * 100] * 40)
        thread.join()
        idle(pipe.engine)
        assert pipe.engine.aborted
        assert pipe("b").text == "answer 1: b"


def test_threads_share_a_pipeline(pipe):
    wrong = []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(20):
            prompts = [f"{seed}:{draw.random()}" for _ in range(draw.randint(1, 5))]
            if [r.text for r in pipe(prompts)] != [f"answer 1: {p}" for p in prompts]:
                wrong.append(prompts)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    sessions = [request.id for request in pipe.engine.submitted]
    assert len(set(sessions)) == len(sessions)


def test_chat_keeps_the_conversation(pipe):
    session = pipe.chat("first")
    assert session.response.text == "answer 1: first"
    session = pipe.chat("second", session)
    assert session.history == [("first", "answer 1: first"), ("second", "answer 2: second")]
    assert "".join(piece.text for piece in pipe.chat("third", session, stream_response=True)) == "answer 3: third"
    assert session("fourth").text == "answer 4: fourth"
    session.close()
    assert session("again").text == "answer 1: again"
    with pytest.raises(ValueError, match="n is 1 in a conversation"):
        session("x", GenerationConfig(n=2))


def test_an_answer_cut_short_stays_in_the_history():
    with fake_engine.make(delay=0.005) as pipe:
        session = pipe.session()
        stream = session.stream("x" * 80)
        heard = "".join(next(stream).text for _ in range(5))
        stream.close()
        assert session.history == [("x" * 80, heard)] and session.response.finish_reason == "abort"
        untouched = session.stream("y")
        untouched.close()
        assert len(session.history) == 1


def test_a_turn_without_room_leaves_the_history(pipe):
    session = pipe.chat("first")
    response = session("x" * 300)
    assert (response.finish_reason, response.generate_token_len) == ("length", 0)
    assert len(session.history) == 1
    assert session("second").text == "answer 2: second"


def test_ppl_is_the_mean_cross_entropy(pipe):
    assert pipe.get_ppl([10, 20, 30]) == [25.0]
    assert pipe.get_ppl([[10, 20], [1, 2, 3]]) == [20.0, 2.5]
    assert pipe.get_ppl("\x01\x02\x04") == [3.0]
    with pytest.raises(ValueError, match="two tokens or more, not 1"):
        pipe.get_ppl([[1]])


def test_logits_are_padded(pipe):
    logits = pipe.get_logits([[1, 2], [3]])
    assert logits.shape == (2, 2, pipe.engine.config.vocab)
    assert logits[:, :, 0].tolist() == [[1, 2], [3, 0]]


def test_seeds():
    config = GenerationConfig(top_k=5)
    with fake_engine.make() as pipe:
        assert pipe("x", GenerationConfig(top_k=5, random_seed=3)).text == "answer 1: x (seed 3)"
        assert pipe("x", config).text != pipe("x", config).text
    texts = []
    for _ in range(2):
        with fake_engine.make() as pipe:
            pipe.author.__init__(pipe.tokenizer, pipe.session_len, pipe.author._stop_ids, seed=11)
            texts.append([r.text for r in pipe(["x", "y"], config)])
    assert texts[0] == texts[1]


def test_sampling_params(pipe):
    params = sampling_params(GenerationConfig(), pipe.tokenizer, 1)
    assert params.plain and params.temperature == 0
    given = GenerationConfig(do_sample=True, temperature=0.5, bad_words=["ab"], bad_token_ids=[9], logit_bias={"7": 2})
    params = sampling_params(given, pipe.tokenizer, 1)
    assert (params.temperature, params.top_k, params.logit_bias) == (0.5, 50, ((7, 2.0),))
    assert params.bad_words == ((9,), tuple(b" ab"), tuple(b"ab"))
    with pytest.raises(ValueError, match="'abcdef' is 6 tokens long; 5"):
        sampling_params(GenerationConfig(bad_words=["abcdef"]), pipe.tokenizer, 1)


def test_a_progress_bar_where_it_is_asked_for(pipe, capsys):
    pipe(["a", "b"], use_tqdm=True)
    assert "2/2" in capsys.readouterr().err
    pipe(["a", "b"])
    assert capsys.readouterr().err == ""


def test_a_closed_pipeline_says_so(pipe):
    pipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipe("x")
    pipe.close()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="model_path is another name"):
        pipeline("a", model_path="b")
    with pytest.raises(ValueError, match="backend_config is an EngineConfig"):
        pipeline("a", {"tp": 1})
    with pytest.raises(ValueError, match="nothing exists at this path"):
        pipeline("/no/such/model")
