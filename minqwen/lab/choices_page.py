"""A comparison of `lab/choices.py` as text: a table of the memory, and one of speeds for each card.

Sentences below each table say which choice is best for what.
"""

from __future__ import annotations

from itertools import combinations

from minqwen.commands import as_called_here
from minqwen.config import ModelConfig
from minqwen.lab.choices import Assessment, Best, Comparison, Speed
from minqwen.lab.planner import GB

SPEEDS_LEAVE_OUT = (
    "\nNot in these figures: the time of collectives. GPUs wait for each other in every all-reduce "
    "of a\nstep; TP 1 has none."
)
NO_SPEEDS = "\nNo card with this memory is known here, so no speeds are told."


def as_text(seen: Comparison) -> str:
    lines = [*_memory(seen), *_remarks(seen)]
    for card, best in seen.best.items():
        lines += [*_speeds(seen, card), *_best_for(seen, card, best)]
    lines.append(SPEEDS_LEAVE_OUT if seen.best else NO_SPEEDS)
    return "\n".join(lines)


def _way(each: Assessment) -> str:
    """The first columns of both tables: the degree, the replicas, and the heads."""
    degree = f"{each.tensor_parallel_size} x {each.replicas}"
    per_gpu = f"{each.heads_per_gpu}/{each.kv_heads_per_gpu}"
    return f"{degree:10}{f'{each.heads}/{each.kv_heads}':7}{per_gpu:6}"


def _memory(seen: Comparison) -> list[str]:
    return [
        "TP x      heads  on a  GB per GPU                   memory holds       "
        "beyond the checkpoint    all-",
        "replicas  Q/KV   GPU   weights  cache   total       tokens sequences  "
        "weights  FLOPs  cache  reduces",
        *(_memory_row(each) for each in seen.found),
    ]


def _memory_row(each: Assessment) -> str:
    return (
        f"{_way(each)}"
        f"{each.weights / GB:7.2f}{each.kv_cache / GB:7.2f}{each.total / GB:8.2f}"
        f"{each.longest_in_memory:14,}{each.most_sequences:9,}"
        f"{each.extra_weights / GB:+9.2f}{each.extra_flops:+7.1%}{f'x {each.kv_copies}':>7}"
        f"{each.all_reduces:9}"
    )


def _remarks(seen: Comparison) -> list[str]:
    """What the columns mean, and how to get the heads that the checkpoint does not have."""
    config = seen.checkpoint.config
    lines = [
        f"tokens: that each of the {seen.batch:,} sequences may have, as far as memory goes. The "
        "model ends at",
        f"  {config.context_length:,}; --context N says which YaRN more needs.",
        f"sequences: of {seen.context:,} tokens, in all replicas together.",
        "beyond the checkpoint: in each replica; cache x N: it holds each KV head N times.",
    ]
    lines += [f"{a.name}: {_remedy(config, a)}." for a in seen.found if not a.own_heads]
    for one, other in combinations(seen.found, 2):
        if one.equals_on_each_gpu(other):
            lines += [
                f"{one.name} and {other.name} are the same on each GPU:",
                "  the ranks copy KV heads, or the model has copies.",
            ]
    return lines


def _remedy(config: ModelConfig, each: Assessment) -> str:
    flags = f"--num-attention-heads {each.heads}"
    if each.kv_heads != config.num_key_value_heads:
        flags += f" --num-key-value-heads {each.kv_heads}"
    if each.intermediate_size == config.intermediate_size:
        return f"load with {flags}"
    extend = as_called_here("tools/heads.py extend")
    return f"{extend} {flags} --intermediate-size {each.intermediate_size}"


def _speeds(seen: Comparison, card: str) -> list[str]:
    of_batch = f"of {seen.batch:,}"
    return [
        f"\n{card}",
        "TP x      heads  on a           at least, in ms            at most, tokens per second",
        f"replicas  Q/KV   GPU   a prompt  a token of 1{'a step ' + of_batch:>16}"
        f"{of_batch:>11}  with the memory full",
        *(_way(each) + _speeds_of(each, each.speeds[card]) for each in seen.found),
    ]


def _speeds_of(each: Assessment, speed: Speed) -> str:
    """The other columns of the second table; "-" for what does not fit."""
    if not each.most_sequences:
        return f"{'-':>8}{'-':>14}{'-':>16}{'-':>11}{'-':>22}"
    together = f"{speed.step_seconds * 1e3:16.2f}{speed.tokens_per_second:11,.0f}"
    if not each.fits:
        together = f"{'-':>16}{'-':>11}"
    return (
        f"{speed.first_token_seconds * 1e3:8.1f}{speed.token_seconds * 1e3:14.2f}{together}"
        f"{speed.full_tokens_per_second:22,.0f}"
    )


def _best_for(seen: Comparison, card: str, best: Best) -> list[str]:
    if not best.alone:
        return [f"No choice holds a sequence of {seen.context:,} tokens."]
    alone, full = best.alone[0].speeds[card], best.full[0].speeds[card]
    lines = [
        f"One sequence alone is fastest at {_names(best.alone)}: "
        f"{alone.token_seconds * 1e3:.2f} ms a token.",
        f"No choice holds {seen.batch:,} sequences of {seen.context:,} tokens at once.",
        f"With the memory full the most tokens per second come from {_names(best.full)}: "
        f"{full.full_tokens_per_second:,.0f}.",
    ]
    if best.together:
        lines[1] = (
            f"{seen.batch:,} sequences make the most tokens per second at {_names(best.together)}: "
            f"{best.together[0].speeds[card].tokens_per_second:,.0f}."
        )
    return lines


def _names(found: list[Assessment]) -> str:
    return " or ".join(each.name for each in found)
