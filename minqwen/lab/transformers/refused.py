"""What transformers takes and this adapter does not: each name with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minqwen.checks import did_you_mean
from minqwen.config.generation_config import NOT_IMPLEMENTED
from minqwen.errors import MinqwenError
from minqwen.files import quoted

NO_QUANTISING = "a directory that holds AWQ or GPTQ weights is read as it is; LLM computes in int8"
ONE_DIRECTORY = "give the directory of what you want as the first argument"
OF_LOADING = {
    "quantization_config": NO_QUANTISING,
    "load_in_8bit": NO_QUANTISING,
    "load_in_4bit": NO_QUANTISING,
    "config": "the directory's config.json counts: write what you want into it",
    "state_dict": "make a minqwen.Qwen2, call its load_state_dict, and give it to Qwen2ForCausalLM",
    "revision": ONE_DIRECTORY,
    "subfolder": ONE_DIRECTORY,
    "variant": ONE_DIRECTORY,
    "gguf_file": ONE_DIRECTORY,
    "max_memory": "LLM has offload=",
    "offload_folder": "LLM has offload=",
    "tp_plan": "LLM runs under torchrun",
    "output_loading_info": "a directory that lacks a weight, or has one too many, is never loaded",
}
# They change nothing where one directory of safetensors is read, and no code.
IDLE_IN_LOADING = (
    "trust_remote_code",
    "low_cpu_mem_usage",
    "use_safetensors",
    "local_files_only",
    "force_download",
    "cache_dir",
    "token",
    "use_cache",
)
OF_FORWARD = {
    "past_key_values": "give the whole text; generate has a cache",
    "cache": "give the whole text; generate has a cache",
    "use_cache": "give the whole text; generate has a cache",
    "cache_position": "give the whole text; generate has a cache",
    "num_items_in_batch": "scale the loss yourself",
    "shift_labels": "give labels, which are shifted here",
    "token_type_ids": "Qwen2 has none",
}
NO_BEAMS = "there is no beam search; num_return_sequences draws several"
OF_GENERATE = {
    "num_beams": NO_BEAMS,
    "num_beam_groups": NO_BEAMS,
    "length_penalty": NO_BEAMS,
    "early_stopping": NO_BEAMS,
    "past_key_values": "the engine has a cache of its own, paged",
    "cache_implementation": "the engine has a cache of its own, paged",
    "inputs_embeds": "give input_ids",
    "position_ids": "positions follow from attention_mask",
    "logits_processor": "use LLM, with logit_bias, bad_words or structured_outputs",
    "stopping_criteria": "give eos_token_id, or use LLM with stop",
    "stop_strings": "use LLM with stop",
    "bad_words_ids": "use LLM with bad_words",
    "sequence_bias": "use LLM with logit_bias",
    "suppress_tokens": "use LLM with logit_bias",
    "prefix_allowed_tokens_fn": "use LLM with structured_outputs",
    "streamer": "use LLM.stream",
    "assistant_model": "there is no speculative decoding",
    "output_attentions": "call the model with the sequences, or LLM.generate with trace",
    "output_hidden_states": "call the model with the sequences, or LLM.generate with trace",
    "min_length": "give min_new_tokens",
    "max_tokens": "it is called max_new_tokens here",
}
# They say how something is computed, or by whom a file was written, and change no token.
IDLE_IN_GENERATE = ("synced_gpus", "tokenizer", "transformers_version", "_from_model_config")


def refuse(
    what: str, given: Mapping[str, Any], instead: Mapping[str, str], known: tuple[str, ...] = ()
) -> None:
    """Raise MinqwenError for an argument of `what` that is not taken and would change something.

    instead: what to do in its place. known: the names that are taken.
    """
    for name, value in given.items():
        if changes_nothing(name, value):
            continue
        if name in instead:
            raise MinqwenError(f"{what}: {name} is {quoted(value)}, not taken: {instead[name]}")
        near = did_you_mean(name, [*known, *instead])
        raise MinqwenError(f"{what} has no argument {name!r} here{near or ': leave it out'}")


def changes_nothing(name: str, value: object) -> bool:
    """Whether this is the value that transformers has where nothing is asked for."""
    if value is None or value is False:
        return True
    if not isinstance(value, (bool, int, float, str, list, dict)):
        return False
    return value in NEUTRAL.get(name, ())


NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NOT_IMPLEMENTED,
    "revision": ("main",),
    "variant": ("",),
    "subfolder": ("",),
    "length_penalty": (1,),
    "min_length": (0,),
}
