"""Every knob of the engine and of a request, declared once; the command line follows from it.

Names and defaults are LMDeploy's (0.5.3, with the additions of 0.18), so that its users' code and commands work here.
Knows nothing of models or devices: what depends on them stays None until the engine has seen them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxserve.knobs import (
    FLAG,
    TEXT,
    Kind,
    accepts,
    check,
    is_real,
    is_whole,
    list_of,
    number,
    one_of,
    option,
    optional,
    whole,
)


def _share_or_pages(text: str) -> float | int:
    return int(text) if text.strip().isdecimal() else float(text)


def _mapping(value) -> bool:
    """Token ids (or their decimal strings, as JSON has them) to biases."""
    return isinstance(value, dict) and all(
        ((is_whole(k) and k >= 0) or (isinstance(k, str) and k.isdecimal())) and is_real(v) and -100 <= v <= 100
        for k, v in value.items()
    )


POLICIES = {"none": 0, "int4": 4, "int8": 8, "fp8": 16}  # LMDeploy's names and numbers
POLICY = Kind(
    "0 (or none), 4 (int4), 8 (int8) or 16 (fp8)",
    lambda v: is_whole(v) and v in POLICIES.values(),
    lambda text: POLICIES[text] if text in POLICIES else int(text),
    tuple(POLICIES.values()),
)
MEMORY = Kind(
    "a share of the free memory (a number between 0 and 1) or a number of pages (a whole number, 1 or more)",
    lambda v: (is_whole(v) and v >= 1) or (is_real(v) and not is_whole(v) and 0 < v < 1),
    _share_or_pages,
)
POWER_OF_TWO = Kind("a power of two", lambda v: is_whole(v) and v > 0 and v & (v - 1) == 0, int)
FORMAT = Kind(
    "an object with a type (or None)", lambda v: v is None or (isinstance(v, dict) and "type" in v), json.loads
)
BIAS = Kind("a mapping from token ids to numbers from -100 to 100", _mapping, json.loads)


_ONE_ENGINE = "one process drives all GPUs of a host; tp splits a model over them"
_ALWAYS_COMPILED = "every step is compiled, and captured as a CUDA graph where that helps"
_PAGES = "the prefix cache keeps whole pages for as long as nothing else needs them"

# LMDeploy's engine options that have no use here: name -> (its default, why).
UNUSED_ENGINE = {
    "trust_remote_code": (False, "code in a checkpoint is never run"),
    "max_prefill_token_num": (8192, "num_tokens_per_iter bounds the tokens of a step"),
    "max_prefill_iters": (1, "num_tokens_per_iter bounds the tokens of a step"),
    "prefill_interval": (16, "prompts and replies share every step"),
    "use_logn_attn": (False, "no supported family was trained with it"),
    "eviction_type": ("recompute", "a preempted request is always recomputed"),
    "num_cpu_blocks": (0, "pages are not swapped to host memory; a preempted request is recomputed"),
    "thread_safe": (False, "the pipeline always is"),
    "device_type": ("cuda", "JAX picks the device; JAX_PLATFORMS overrides it"),
    "eager_mode": (False, _ALWAYS_COMPILED),
    "cudagraph_capture_batch_sizes": (None, _ALWAYS_COMPILED),
    "piecewise_cudagraph_max_tokens": (None, _ALWAYS_COMPILED),
    "kernel_block_size": (-1, "a kernel reads pages of cache_block_seq_len tokens"),
    "gemm_input_dtype": (None, "dtype sets the type of activations"),
    "dp": (1, _ONE_ENGINE),
    "cp": (1, _ONE_ENGINE),
    "ep": (1, _ONE_ENGINE),
    "attn_tp_size": (None, _ONE_ENGINE),
    "attn_cp_size": (None, _ONE_ENGINE),
    "attn_dp_size": (None, _ONE_ENGINE),
    "mlp_tp_size": (None, _ONE_ENGINE),
    "moe_tp_size": (None, _ONE_ENGINE),
    "mlp_dp_size": (None, _ONE_ENGINE),
    "outer_dp_size": (None, _ONE_ENGINE),
    "device_num": (None, _ONE_ENGINE),
    "devices": (None, "CUDA_VISIBLE_DEVICES picks the GPUs"),
    "nnodes": (1, _ONE_ENGINE),
    "node_rank": (0, _ONE_ENGINE),
    "dist_init_addr": (None, _ONE_ENGINE),
    "dp_rank": (0, _ONE_ENGINE),
    "distributed_executor_backend": (None, _ONE_ENGINE),
    "enable_mp_engine": (False, _ONE_ENGINE),
    "mp_engine_backend": ("mp", _ONE_ENGINE),
    "enable_transfer_obj_ref": (False, _ONE_ENGINE),
    "communicator": ("nccl", "XLA picks how GPUs exchange data"),
    "moe_a2a_backend": ("auto", "XLA picks how GPUs exchange data"),
    "enable_microbatch": (False, "XLA overlaps communication and compute"),
    "enable_eplb": (False, _ONE_ENGINE),
    "migration_backend": ("DLSlime", "prefill and decode share one engine"),
    "kv_transfer_config": (None, "prefill and decode share one engine"),
    "async_": (1, "the next step is always dispatched before the last one is read"),
    "cache_chunk_size": (-1, _PAGES),
    "cache_checkpoint_interval": (4096, _PAGES),
    "cache_prompt": ("auto", _PAGES),
    "cache_prompt_boundary_skip": (1, _PAGES),
    "cache_generation": ("auto", _PAGES),
    "prefix_cache_state_budget": (0, _PAGES),
    "prefix_cache_decode_state_interval": (0, _PAGES),
    "vision_max_batch_size": (1, "models with a vision part are not there yet"),
    "language_model_only": (False, "only the language model is loaded"),
    "logprobs_mode": (None, "logprobs are of the model's own distribution, before temperature and penalties"),
    "enable_metrics": (True, "the engine's counters are always on"),
    "enable_return_routed_experts": (False, "which experts a token took is not reported"),
}

# Those that would change the answer, or load something else, and are not there: name -> (its default, why).
MISSING_ENGINE = {
    "adapters": (None, "LoRA adapters are not there yet; merge them into the checkpoint"),
    "custom_module_map": (None, "a model family is a file of jaxserve/models"),
    "hf_overrides": (None, "edit the checkpoint's config.json"),
    "role": ("Hybrid", "prefill and decode share one engine"),
    "dllm_block_length": (None, "diffusion language models are not there"),
    "dllm_unmasking_strategy": ("low_confidence_dynamic", "diffusion language models are not there"),
    "dllm_denoising_steps": (None, "diffusion language models are not there"),
    "dllm_confidence_threshold": (0.85, "diffusion language models are not there"),
    "empty_init": (False, "weights are always loaded"),
}


def _number_of_pages(value):
    return int(value) or None  # 0 is LMDeploy's "choose"


@accepts(
    renamed={
        "block_size": ("cache_block_seq_len", int),
        "num_gpu_blocks": ("cache_max_entry_count", _number_of_pages),
    },
    unused=UNUSED_ENGINE,
    missing=MISSING_ENGINE,
)
@dataclass(frozen=True)
class EngineConfig:
    """How a model is loaded and run.  None means: chosen for the model and the device, and said."""

    tp: int = option(1, "GPUs to split the model over", whole(1))
    dtype: str = option(
        "auto",
        "type of weights and activations; auto: the checkpoint's on a GPU, float32 on the CPU",
        one_of("auto", "float16", "bfloat16", "float32"),
    )
    session_len: int | None = option(
        None, "most tokens of a prompt and its reply together (default: the model's)", optional(whole(1))
    )
    max_batch_size: int | None = option(
        None,
        "most requests that run at once (default: 256 on a GPU, 16 on the CPU, or what fits; 1 in chat)",
        optional(whole(1)),
    )
    cache_max_entry_count: float | int | None = option(
        None,
        "memory of the KV cache: below 1, the share of what the weights leave free; from 1, a number of pages "
        "(default: 0.8 on a GPU; on the CPU 2 GiB or a quarter of the free memory)",
        optional(MEMORY),
    )
    cache_block_seq_len: int = option(64, "tokens of a page of the KV cache", POWER_OF_TWO)
    enable_prefix_caching: bool = option(True, "reuse the pages of prompts that begin alike", FLAG)
    quant_policy: int = option(
        0, "how the KV cache is kept: 0 or none (as computed), 8 or int8, 4 or int4, 16 or fp8", POLICY
    )
    num_tokens_per_iter: int = option(0, "most tokens of a step, prompts and replies together (0: chosen)", whole(0))
    rope_scaling_factor: float = option(
        0.0, "dynamic NTK scaling of positions by this factor (0: as the model says)", number(0)
    )
    model_format: str | None = option(
        None,
        "how the weights are stored (default: found out)",
        optional(one_of("hf", "llama", "awq", "gptq", "compressed-tensors", "fp8", "smooth_quant", later=("mxfp4",))),
    )
    model_name: str | None = option(None, "the name under which the model answers", optional(TEXT))
    revision: str | None = option(None, "branch, tag or commit of a model from the hub", optional(TEXT))
    download_dir: str | None = option(None, "folder for models from the hub", optional(TEXT))
    seed: int | None = option(
        None, "seeds the requests that come without a seed (default: fresh ones)", optional(whole(0, 2**32 - 1))
    )

    def __post_init__(self):
        if isinstance(self.quant_policy, str) and self.quant_policy in POLICIES:
            object.__setattr__(self, "quant_policy", POLICIES[self.quant_policy])
        check(self)


TurbomindEngineConfig = EngineConfig
PytorchEngineConfig = EngineConfig


# As above, for one request.
UNUSED_GENERATION = {
    "spaces_between_special_tokens": (True, "special tokens are printed as they stand"),
    "logprob_start_len": (-1, "get_ppl and get_logits score prompts"),
    "with_cache": (False, "pages are shared between requests by themselves"),
    "preserve_cache": (False, "pages are shared between requests by themselves"),
    "migration_request": (None, "prefill and decode share one engine"),
    "return_routed_experts": (False, "which experts a token took is not reported"),
}
MISSING_GENERATION = {
    "logits_processors": (None, "logits stay on the device; logit_bias, bad_words and penalties work there"),
    "return_ppl": (False, "pipeline.get_ppl scores a prompt"),
    "repetition_ngram_size": (0, "use repetition_penalty or frequency_penalty"),
    "repetition_ngram_threshold": (0, "use repetition_penalty or frequency_penalty"),
    "output_logits": (None, "pipeline.get_logits returns the logits of a sequence"),
    "output_last_hidden_state": (None, "hidden states of replies are not returned yet"),
}


@accepts(renamed={}, unused=UNUSED_GENERATION, missing=MISSING_GENERATION)
@dataclass(frozen=True)
class GenerationConfig:
    """How one reply is generated.  As in LMDeploy 0.5.3, the default is greedy: set top_k or do_sample to sample."""

    n: int = option(1, "replies to one prompt", whole(1, 128))
    max_new_tokens: int | None = option(512, "most tokens of a reply (None: as many as fit)", optional(whole(0)))
    do_sample: bool | None = option(
        None, "True samples, False is greedy, None: sampling if top_k is given and not 1", optional(FLAG)
    )
    top_p: float = option(1.0, "sample among the likeliest tokens that make up this probability", number(0, 1))
    top_k: int | None = option(None, "sample among this many likeliest tokens (0: all, 1: greedy)", optional(whole(0)))
    min_p: float = option(0.0, "leave out tokens less likely than this share of the likeliest", number(0, 1))
    temperature: float = option(0.8, "above 1 evens out the odds, below 1 sharpens them, 0 is greedy", number(0))
    repetition_penalty: float = option(1.0, "above 1: tokens of prompt and reply become rarer", number(0.01, 100))
    presence_penalty: float = option(0.0, "taken from the logit of a token that the reply has", number(-2, 2))
    frequency_penalty: float = option(0.0, "taken from a token's logit each time the reply has it", number(-2, 2))
    ignore_eos: bool = option(False, "go on after the model's end tokens", FLAG)
    random_seed: int | None = option(
        None, "the same seed gives the same reply (default: a fresh one)", optional(whole(0))
    )
    stop_words: Sequence[str] | None = option(None, "texts that end the reply", list_of(TEXT))
    bad_words: Sequence[str] | None = option(None, "texts that the reply must not have", list_of(TEXT))
    stop_token_ids: Sequence[int] | None = option(None, "token ids that end the reply", list_of(whole(0)))
    bad_token_ids: Sequence[int] | None = option(None, "token ids that the reply must not have", list_of(whole(0)))
    min_new_tokens: int | None = option(None, "no end token before this many tokens", optional(whole(0)))
    skip_special_tokens: bool = option(True, "leave special tokens out of the text", FLAG)
    logprobs: int | None = option(None, "log-probabilities of this many likeliest tokens", optional(whole(0, 20)))
    logit_bias: Mapping[int, float] | None = option(None, "added to the logits of these token ids", optional(BIAS))
    include_stop_str_in_output: bool = option(False, "keep the stop word in the text", FLAG)
    response_format: Mapping[str, Any] | None = option(
        None, "what the reply must look like: OpenAI's json_object or json_schema, LMDeploy's regex_schema", FORMAT
    )

    def __post_init__(self):
        for name in ("stop_words", "bad_words"):  # a single text is as clear as a list of one
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        check(self)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken at every step."""
        if self.do_sample is False or self.temperature == 0 or self.top_p == 0:
            return True
        return self.effective_top_k == 1

    @property
    def effective_top_k(self) -> int:
        """top_k with its default: 1 as in LMDeploy 0.5.3, 50 where do_sample=True asks for sampling (as in 0.18)."""
        if self.top_k is not None:
            return self.top_k
        return 50 if self.do_sample else 1

    @classmethod
    def from_hf(cls, generation: dict, **given) -> "GenerationConfig":
        """The sampling that a model's generation_config.json recommends, `given` values going before it.

        Without do_sample there, a temperature, top_p or top_k means sampling; without those, greedy.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        advice = {name: generation[name] for name in names if generation.get(name) is not None}
        choices = {"temperature", "top_p", "top_k"}
        if choices & given.keys():
            sampled = True
        else:
            sampled = generation.get("do_sample", bool(choices & advice.keys()))
        merged = {"do_sample": sampled, "temperature": 1.0, **advice, **given}
        return cls(**{**merged, "do_sample": bool(merged["do_sample"])})


@dataclass
class ChatTemplateConfig:
    """How messages become a prompt, with LMDeploy's names.

    model_name picks a built-in template ("internlm2", "base", ...) and None the checkpoint's own; the texts, where
    given, take the place of that template's; capability is completion, infilling, chat or python.
    """

    model_name: str | None = None
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    separator: str | None = None
    capability: str | None = None
    stop_words: list[str] | None = None

    def __post_init__(self):
        if self.capability not in (None, "completion", "infilling", "chat", "python"):
            raise ValueError(f"capability is 'completion', 'infilling', 'chat' or 'python', not {self.capability!r}")

    @classmethod
    def from_json(cls, path) -> "ChatTemplateConfig":
        """Reads the JSON file that --chat-template names, in LMDeploy's form."""
        with open(path, encoding="utf-8") as file:
            try:
                given = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from None
        names = {f.name for f in fields(cls)}
        if not isinstance(given, dict) or given.keys() - names:
            found = sorted(given.keys() - names) if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"{path}: a chat template has the fields {', '.join(sorted(names))}; found {found}")
        return cls(**given)
