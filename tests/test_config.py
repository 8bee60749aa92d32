"""The doors of the config classes: what passes, what does not, and what is said."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import ChatTemplateConfig, EngineConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from jaxserve.config import MISSING_ENGINE, MISSING_GENERATION, UNUSED_ENGINE, UNUSED_GENERATION

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2)
)


@pytest.mark.parametrize("cls", [EngineConfig, GenerationConfig])
def test_every_knob_has_help_and_its_default_is_legal(cls):
    for knob in fields(cls):
        assert knob.metadata["help"] and knob.metadata["kind"].holds(knob.default), knob.name


@pytest.mark.parametrize("cls", [EngineConfig, GenerationConfig])
@given(data=st.data())
def test_any_value_is_taken_as_it_is_or_refused_by_name(cls, data):
    name = data.draw(st.sampled_from([knob.name for knob in fields(cls)]))
    value = data.draw(ANYTHING)
    try:
        config = cls(**{name: value})
    except ValueError as error:
        assert str(error).startswith(name) and repr(value) in str(error)
    else:
        kept = getattr(config, name)
        assert kept is value or kept == value or kept == [value]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tp": 0},
        {"tp": True},
        {"tp": 1.0},
        {"tp": "2"},
        {"dtype": "fp16"},
        {"cache_max_entry_count": 0.0},
        {"cache_max_entry_count": 1.0},
        {"cache_max_entry_count": 0},
        {"cache_max_entry_count": math.nan},
        {"cache_block_seq_len": 48},
        {"quant_policy": 3},
        {"quant_policy": "int3"},
        {"quant_policy": 8.0},
        {"quant_policy": False},
        {"model_format": "mxfp4"},
        {"session_len": 0},
        {"enable_prefix_caching": 1},
        {"num_tokens_per_iter": -1},
        {"model_name": ""},
    ],
    ids=str,
)
def test_engine_config_refuses(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        EngineConfig(**wrong)


def test_what_is_not_there_yet_is_said():
    for wrong in ({"model_format": "mxfp4"},):
        with pytest.raises(ValueError, match="not there yet"):
            EngineConfig(**wrong)


@pytest.mark.parametrize("name, policy", [("none", 0), ("int4", 4), ("int8", 8), ("fp8", 16)])
def test_a_quant_policy_has_a_name(name, policy):
    assert EngineConfig(quant_policy=name).quant_policy == EngineConfig(quant_policy=policy).quant_policy == policy


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_p": 1.1},
        {"min_p": -1},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"logprobs": 21},
        {"logprobs": True},
        {"n": 0},
        {"stop_words": [""]},
        {"stop_words": [1]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {1: 101}},
        {"logit_bias": {-1: 1}},
        {"random_seed": -1},
        {"ignore_eos": 1},
        {"stop_token_ids": [-1]},
    ],
    ids=str,
)
def test_generation_config_refuses(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        GenerationConfig(**wrong)


def test_names_of_lmdeploy():
    assert TurbomindEngineConfig is EngineConfig and PytorchEngineConfig is EngineConfig
    config = PytorchEngineConfig(block_size=32, num_gpu_blocks=100, tp=2)
    assert (config.cache_block_seq_len, config.cache_max_entry_count, config.tp) == (32, 100, 2)
    assert PytorchEngineConfig(num_gpu_blocks=0).cache_max_entry_count is None
    with pytest.raises(ValueError, match="another name of cache_block_seq_len"):
        EngineConfig(block_size=32, cache_block_seq_len=64)
    with pytest.raises(TypeError, match="no_such_option"):
        EngineConfig(no_such_option=1)


def test_one_warning_names_what_is_ignored_and_why():
    with pytest.warns(UserWarning) as caught:
        config = TurbomindEngineConfig(tp=1, max_prefill_iters=4, use_logn_attn=True, session_len=100)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(text in str(caught[0].message) for text in ("max_prefill_iters=4", "use_logn_attn=True", "num_tokens"))
    assert config.session_len == 100


def test_neutral_values_of_lmdeploy_pass_in_silence():
    for table in (UNUSED_ENGINE, MISSING_ENGINE):
        EngineConfig(**{name: neutral for name, (neutral, _) in table.items()})
        EngineConfig(**dict.fromkeys(table))
    for table in (UNUSED_GENERATION, MISSING_GENERATION):
        GenerationConfig(**{name: neutral for name, (neutral, _) in table.items()})


def test_what_would_change_the_answer_is_refused():
    with pytest.raises(ValueError, match=r"adapters=.*merge"):
        PytorchEngineConfig(adapters={"a": "path"})
    with pytest.raises(ValueError, match="return_ppl.*get_ppl"):
        GenerationConfig(return_ppl=True)


def test_configs_are_frozen_and_compare():
    with pytest.raises(FrozenInstanceError):
        EngineConfig().tp = 2
    assert EngineConfig(tp=2) == EngineConfig(tp=2) != EngineConfig()
    hash(EngineConfig())


@pytest.mark.parametrize(
    "given, greedy, top_k",
    [
        ({}, True, 1),
        ({"temperature": 1.0, "top_p": 0.5}, True, 1),  # as in 0.5.3: top_k decides
        ({"top_k": 40}, False, 40),
        ({"top_k": 0}, False, 0),
        ({"do_sample": True}, False, 50),
        ({"do_sample": True, "top_k": 3}, False, 3),
        ({"do_sample": True, "top_k": 1}, True, 1),
        ({"do_sample": False, "top_k": 40}, True, 40),
        ({"top_k": 40, "temperature": 0}, True, 40),
        ({"top_k": 40, "top_p": 0.0}, True, 40),
    ],
)
def test_greedy_or_sampled(given, greedy, top_k):
    config = GenerationConfig(**given)
    assert (config.greedy, config.effective_top_k) == (greedy, top_k)


@pytest.mark.parametrize(
    "advice, given, expected",
    [
        ({}, {}, {"greedy": True}),
        ({"eos_token_id": 2}, {}, {"greedy": True}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {},
            {"greedy": False, "temperature": 0.6, "top_p": 0.9},
        ),
        ({"do_sample": True}, {}, {"greedy": False, "temperature": 1.0, "effective_top_k": 50}),
        ({"do_sample": False, "temperature": 0.6}, {}, {"greedy": True}),
        ({"temperature": 0.15}, {}, {"greedy": False, "temperature": 0.15}),
        ({}, {"temperature": 0.7}, {"greedy": False, "temperature": 0.7}),
        ({}, {"top_p": 0.7}, {"greedy": False, "top_p": 0.7}),
        ({"do_sample": True}, {"temperature": 0}, {"greedy": True}),
        ({"do_sample": True, "top_k": 20}, {"top_k": 1}, {"greedy": True}),
        ({"repetition_penalty": 1.1}, {}, {"greedy": True, "repetition_penalty": 1.1}),
        ({"do_sample": True, "top_k": 20}, {"max_new_tokens": 7}, {"top_k": 20, "max_new_tokens": 7}),
    ],
)
def test_advice_of_the_model(advice, given, expected):
    config = GenerationConfig.from_hf(advice, **given)
    assert {name: getattr(config, name) for name in expected} == expected


def test_numpy_numbers_and_single_words_are_fine():
    config = GenerationConfig(max_new_tokens=np.int64(5), temperature=np.float32(0.5), stop_words="end")
    assert config.max_new_tokens == 5 and config.stop_words == ["end"]


def test_chat_template_config_from_json(tmp_path):
    file = tmp_path / "template.json"
    file.write_text(json.dumps({"model_name": "internlm2", "meta_instruction": "Be kind.", "stop_words": ["<e>"]}))
    config = ChatTemplateConfig.from_json(file)
    assert (config.model_name, config.meta_instruction, config.stop_words) == ("internlm2", "Be kind.", ["<e>"])
    file.write_text("{")
    with pytest.raises(ValueError, match=r"template\.json is not JSON"):
        ChatTemplateConfig.from_json(file)
    file.write_text('{"modelname": 1}')
    with pytest.raises(ValueError, match=r"found \['modelname'\]"):
        ChatTemplateConfig.from_json(file)
    with pytest.raises(ValueError, match="capability"):
        ChatTemplateConfig(capability="singing")
