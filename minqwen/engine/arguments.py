"""vLLM's keyword arguments that an LLM and its calls take, so that calls of vLLM run here.

There are two kinds. Those of IDLE change nothing here, and one warning says so. Those of ONLY may
have the values that say what happens here anyway; another value would change the result, and is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from minqwen.checks import UNQUANTISED, ErrorClass, did_you_mean
from minqwen.errors import ConfigError, SamplingError, warn
from minqwen.files import quoted
from minqwen.sampling.params import SamplingParams

_NOT_CAPTURED = "with enforce_eager=False each size of a step is captured when it first comes"
_OWN_SCHEDULE = "every step is scheduled when the one before it is done"
# Argument: why it makes no difference.
IDLE = {
    "trust_remote_code": "no code of a checkpoint is ever run",
    "compilation_config": _NOT_CAPTURED,
    "cuda_graph_sizes": _NOT_CAPTURED,
    "max_context_len_to_capture": _NOT_CAPTURED,
    "max_seq_len_to_capture": _NOT_CAPTURED,
    "swap_space": "a preempted request is computed again, not swapped out",
    "preemption_mode": "a preempted request is computed again",
    "enable_chunked_prefill": "a prompt that does not fit into a step is always computed in parts",
    "long_prefill_token_threshold": _OWN_SCHEDULE,
    "max_num_partial_prefills": _OWN_SCHEDULE,
    "num_scheduler_steps": _OWN_SCHEDULE,
    "async_scheduling": _OWN_SCHEDULE,
    "use_v2_block_manager": "there is one block manager",
    "prefix_caching_hash_algo": "it is always SHA-256",
    "disable_custom_all_reduce": "torch.distributed has the only all-reduce",
    "distributed_executor_backend": "torchrun starts the ranks",
    "worker_use_ray": "torchrun starts the ranks",
    "max_parallel_loading_workers": "each rank reads its own slices",
    "use_tqdm_on_load": "progress=True shows a bar",
    "disable_log_stats": "nothing is logged",
    "disable_log_requests": "nothing is logged",
    "served_model_name": "nothing is served",
    "download_dir": "nothing is downloaded",
    "hf_token": "nothing is downloaded",
    "limit_mm_per_prompt": "prompts are text",
    "max_logprobs": "logprobs has no limit",
    "guided_decoding_backend": "llguidance is the only one",
}


class Only(NamedTuple):
    """The values that an argument may have, and what to do instead of another."""

    values: tuple[object, ...]
    instead: str


_REPLICAS = (
    "start R x N ranks with torchrun and give tensor_parallel_size=N for R copies of the model"
)
_DIRECTORY = "give the directory of the revision that is wanted"
_PARAMS = "give SamplingParams"
_ONE_WAY = "leave it out"
_CONFIG_JSON = "write it into the config.json of a copy of the directory"
_NO_SPECULATION = "every token is drawn from the model itself; leave it out"
ONLY = {
    "quantization": Only((None,), UNQUANTISED),
    "calculate_kv_scales": Only((False,), "every token and head has its own; leave it out"),
    "cpu_offload_gb": Only((0, 0.0), "use offload='memory'"),
    "pipeline_parallel_size": Only((1,), "ranks share each layer: use torchrun"),
    "data_parallel_size": Only((1,), _REPLICAS),
    "enable_expert_parallel": Only((False,), "Qwen2.5 has no experts; leave it out"),
    "load_format": Only(("auto", "safetensors"), "convert the weights to safetensors"),
    "tokenizer_mode": Only(("auto", "fast", "slow", "hf"), _ONE_WAY),
    "skip_tokenizer_init": Only((False,), "give a Qwen2 without tokenizer=..."),
    "model_impl": Only(("auto",), _ONE_WAY),
    "task": Only(("auto", "generate"), _ONE_WAY),
    "runner": Only(("auto", "generate"), _ONE_WAY),
    "convert": Only(("auto", "none"), _ONE_WAY),
    "enable_lora": Only((False,), "merge the adapter into the checkpoint (PEFT: merge_and_unload)"),
    "speculative_config": Only((None,), _NO_SPECULATION),
    "speculative_model": Only((None,), _NO_SPECULATION),
    "num_speculative_tokens": Only((None,), _NO_SPECULATION),
    "rope_scaling": Only((None,), _CONFIG_JSON),
    "rope_theta": Only((None,), _CONFIG_JSON),
    "hf_overrides": Only((None, {}), _CONFIG_JSON),
    "disable_sliding_window": Only((False,), _CONFIG_JSON),
    "generation_config": Only(("auto",), _PARAMS),
    "override_generation_config": Only((None, {}), _PARAMS),
    "structured_outputs_config": Only((None,), _PARAMS),
    "logits_processors": Only((None,), "use logit_bias, bad_words or structured_outputs"),
    "logprobs_mode": Only(("raw_logprobs",), _ONE_WAY),
    "scheduling_policy": Only(("fcfs",), "requests are served in their order; leave it out"),
    "enable_sleep_mode": Only((False,), "end a `with LLM(...) as llm:` to free the memory"),
    "revision": Only((None,), f"minqwen downloads nothing: {_DIRECTORY}"),
    "code_revision": Only((None,), f"minqwen downloads nothing: {_DIRECTORY}"),
    "tokenizer_revision": Only((None,), f"minqwen downloads nothing: {_DIRECTORY}"),
}
# The same for the keywords of generate and chat.
_TEXT_ONLY = "prompts are text or token ids; leave it out"
OF_CALLS = {
    "lora_request": ONLY["enable_lora"]._replace(values=(None,)),
    "prompt_adapter_request": Only((None,), "there are no prompt adapters; leave it out"),
    "priority": Only((None, 0), ONLY["scheduling_policy"].instead),
    "guided_options_request": Only((None,), "give SamplingParams(structured_outputs=...)"),
    "prompt_token_ids": Only((None,), "give the ids as the prompts: generate([[1, 2], [3]])"),
    "mm_processor_kwargs": Only((None,), _TEXT_ONLY),
    "chat_template_content_format": Only(("auto", "string"), _TEXT_ONLY),
}
OF_VLLM = (*IDLE, *ONLY)


def without_vllm(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are minqwen's own.

    Raises ConfigError for a value of ONLY's arguments that would change the result. The values of
    IDLE's arguments are not looked at.
    """
    _check_values(options, ONLY, ConfigError)
    return {name: value for name, value in options.items() if name not in OF_VLLM}


def without_vllm_of_calls(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a call of generate or chat, with SamplingError."""
    _check_values(options, OF_CALLS, SamplingError)
    return {name: value for name, value in options.items() if name not in OF_CALLS}


def refuse_keywords(options: Mapping[str, Any], own: Iterable[str]) -> None:
    """Raise SamplingError for a keyword that generate or add_request does not have.

    own: those that it has.
    """
    own = list(own)
    for name in without_vllm_of_calls(options):
        if name in SamplingParams.__dataclass_fields__:
            raise SamplingError(f"there is no keyword {name!r}: give SamplingParams({name}=...)")
        raise SamplingError(
            f"there is no keyword {name!r}, expected one of {', '.join(own)}"
            f"{did_you_mean(name, [*own, *OF_CALLS])}"
        )


def _check_values(options: Mapping[str, Any], table: Mapping[str, Only], error: ErrorClass) -> None:
    """Raise `error` for a value that the table does not allow."""
    for name, value in options.items():
        if name in table and not _is_one_of(value, table[name].values):
            expected = " or ".join(map(repr, table[name].values))
            raise error(
                f"argument {name!r} is {quoted(value, 100)}, expected {expected}: "
                f"{table[name].instead}"
            )


def _is_one_of(value: object, allowed: Iterable[object]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


def warn_of_idle(options: Mapping[str, Any]) -> None:
    """One warning, on rank 0, that names what makes no difference."""
    idle = [f"{name} ({IDLE[name]})" for name in options if name in IDLE]
    if idle:
        verb = "makes" if len(idle) == 1 else "make"
        warn(f"{', '.join(idle)} {verb} no difference here", stacklevel=3)
