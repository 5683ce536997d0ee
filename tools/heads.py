#!/usr/bin/env python3
"""Give a checkpoint more heads without changing the model, and prove it.

python tools/heads.py plan MODEL --tp 8                        how to run it at that degree
python tools/heads.py extend SRC DST --num-attention-heads 32  write it
python tools/heads.py verify SRC DST                           the same model? exit code 0 yes, 1 no
python tools/heads.py shrink DST BACK                          and back, byte for byte
python tools/heads.py extend-adapter LORA OUT --base DST       a LoRA adapter of SRC, for DST
python tools/heads.py explain DST                              the slot map as a picture
python tools/heads.py demo                                     every recipe, right and wrong

docs/head-extension.md says why.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from minqwen import Checkpoint, ModelConfig, Tokenizer  # before torch, for Ctrl-C

# isort: split
import torch
from torch import Tensor

from minqwen.checkpoint.weight_files import MAX_FILE_BYTES
from minqwen.checks import integer
from minqwen.cli import EMBEDDED, Parser, check_writable, read_flag, run
from minqwen.commands import as_called_here
from minqwen.errors import HeadsError, MinqwenError, TokenizerError
from minqwen.files import check_directory, write_text
from minqwen.heads import adapter, convert, packed
from minqwen.heads.layout import RECIPES, derived_head_dim, extended_config, layout, slot_map
from minqwen.heads.manifest import MANIFEST, read_manifest
from minqwen.heads.proposals import Proposal, cost, propose
from minqwen.lab.compare import Verdict
from minqwen.lab.recipes import Trial, try_recipes
from minqwen.lab.verify import Report, as_json, unlike_as_json, verify_checkpoints
from minqwen.lab.verify_configs import differing_settings, differing_sizes
from minqwen.lab.verify_page import as_html, unlike_as_html

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters. And God said, Let there be light: and there was light."
)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan_flags(parser.add_command("plan", help="how to run a model at a degree, or other counts"))
    extend_flags(parser.add_command("extend", help="write a checkpoint with more heads"))
    shrink_flags(parser.add_command("shrink", help="undo an extension"))
    adapter_flags(
        parser.add_command("extend-adapter", help="make a LoRA adapter (PEFT) fit the extension")
    )
    verify_flags(parser.add_command("verify", help="compare two checkpoints"))
    parser.add_command("explain", help="print the slot map").add_argument("model")
    command = parser.add_command("demo", help="every recipe, right and wrong")
    command.add_argument("--model", default=str(EMBEDDED))
    args = parser.parse_args()
    commands = {
        "plan": plan,
        "extend": extend,
        "shrink": shrink,
        "extend-adapter": extend_adapter,
        "verify": verify,
        "explain": explain,
        "demo": demo,
    }
    return commands[args.command](args)


# ---- plan ----------------------------------------------------------------------------------------


def plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel degree")
    count_flags(parser)
    parser.add_argument(
        "--quant-group", type=int, metavar="N", help="group size of the quantised checkpoint"
    )
    parser.add_argument("--json", action="store_true")


def count_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-attention-heads", type=int, metavar="N")
    parser.add_argument("--num-key-value-heads", type=int, metavar="N")


def plan(args: argparse.Namespace) -> int:
    config = ModelConfig.from_json(args.model)
    proposals = propose(
        config, args.num_attention_heads, args.num_key_value_heads, args.tp, args.quant_group
    )
    if args.json:
        facts = [{**asdict(p), "config": p.config.to_dict()} for p in proposals]
        print(json.dumps(facts, indent=1))
        return 0
    print(
        f"{args.model}: {config.num_attention_heads} query and {config.num_key_value_heads} KV "
        f"heads of {config.head_dim}, {config.num_parameters():,} parameters, "
        f"{config.kv_bytes_per_token('bfloat16'):,} bytes of cache per token"
    )
    for i, proposal in enumerate(proposals):
        print_proposal("proposal" if i == 0 else "alternative", proposal, config, args.model)
    return 0


def print_proposal(title: str, proposal: Proposal, source: ModelConfig, model: str) -> None:
    target, costs, flags = proposal.config, proposal.cost, flags_for(source, proposal.config)
    as_it_is = "" if flags else " (as it is)"
    print(
        f"\n{title}: {target.num_attention_heads} query and {target.num_key_value_heads} KV heads, "
        f"MLP {target.intermediate_size}{as_it_is}"
    )
    print(f"  degrees that work: {', '.join(map(str, proposal.degrees))}")
    macs = ", ".join(f"{x - 1:+.1%} at {n:,} tokens" for n, x in costs.attention_macs.items())
    print(
        f"  parameters {costs.parameters:+,}; cache {costs.kv_bytes:,} bytes per token in all; "
        f"attention's multiply-adds {macs}"
    )
    for note in proposal.notes:
        print(f"  note: {note}")
    if flags:
        print(as_called_here(f"  tools/heads.py extend {model} DST {flags}"))


def flags_for(source: ModelConfig, target: ModelConfig) -> str:
    """The flags of `extend` that make `target`; "" if that is the source."""
    flags = []
    if target.num_key_value_heads != source.num_key_value_heads:
        flags.append(f"--num-key-value-heads {target.num_key_value_heads}")
    if target.intermediate_size != source.intermediate_size:
        flags.append(f"--intermediate-size {target.intermediate_size}")
    if flags or target.num_attention_heads != source.num_attention_heads:
        flags.insert(0, f"--num-attention-heads {target.num_attention_heads}")
    return " ".join(flags)


# ---- extend, shrink, extend-adapter, explain -----------------------------------------------------


def extend_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("src")
    add("dst")
    count_flags(parser)
    add(
        "--recipe",
        choices=list(RECIPES),
        default="ghost",
        help="what new slots hold (default ghost)",
    )
    add("--alpha", type=float, default=0.5, metavar="X", help="share of the first, for weighted")
    add("--seed", type=int, default=0, metavar="N", help="of random")
    add(
        "--arch",
        choices=["qwen2", "llama"],
        default="qwen2",
        help="llama is for engines that derive head_dim",
    )
    add("--intermediate-size", type=int, metavar="N", help="pad the MLP with zero channels")
    add(
        "--intermediate-block",
        type=int,
        default=1,
        metavar="N",
        help="real channels before each zero one",
    )
    add(
        "--max-file-bytes",
        type=int,
        default=MAX_FILE_BYTES,
        metavar="N",
        help="of one weight file",
    )
    overwrite_flag(parser)


def overwrite_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is at DST"
    )


def extend(args: argparse.Namespace) -> int:
    config = ModelConfig.from_json(args.src)
    to = layout(
        config,
        args.num_attention_heads,
        args.num_key_value_heads,
        recipe=args.recipe,
        alpha=args.alpha,
        seed=args.seed,
        intermediate_size=args.intermediate_size,
        intermediate_block=args.intermediate_block,
    )
    write = convert.extend if config.quantization_config is None else packed.extend_packed
    write(
        args.src,
        args.dst,
        to,
        arch=args.arch,
        max_file_bytes=args.max_file_bytes,
        progress=True,
        overwrite=args.overwrite,
    )
    print(slot_map(to))
    target = extended_config(config, to, args.arch)
    print(f"wrote {args.dst}: parameters {cost(config, target).parameters:+,}")
    if args.arch == "qwen2" and derived_head_dim(target) != target.head_dim:
        print(
            f"warning: transformers and SGLang honour head_dim {target.head_dim} in this config; "
            f"vLLM's Qwen2 class derives {derived_head_dim(target)}, loads without an error and "
            "drops rows: for vLLM extend with --arch llama",
            file=sys.stderr,
        )
    return 0


def shrink_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src")
    parser.add_argument("dst")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="largest drift to let pass (default 0)",
    )
    overwrite_flag(parser)


def shrink(args: argparse.Namespace) -> int:
    if ModelConfig.from_json(args.src).quantization_config is None:
        other = convert.shrink(
            args.src,
            args.dst,
            tolerance=args.tolerance,
            progress=True,
            overwrite=args.overwrite,
        )
        if other:
            note = f"note: {len(other)} tensors are not the source's, the first is {other[0]}"
            print(note, file=sys.stderr)
    elif args.tolerance:
        raise HeadsError("--tolerance: packed words cannot drift, expected 0 for this checkpoint")
    else:
        packed.shrink_packed(args.src, args.dst, progress=True, overwrite=args.overwrite)
    print(f"wrote {args.dst}")
    return 0


def adapter_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src")
    parser.add_argument("dst")
    parser.add_argument(
        "--base",
        required=True,
        metavar="EXTENDED",
        help="the extended model, whose manifest says how",
    )


def extend_adapter(args: argparse.Namespace) -> int:
    check_directory(Path(args.base), HeadsError)
    manifest = read_manifest(args.base)
    if manifest is None:
        raise HeadsError(
            f"{args.base}: has no {MANIFEST}, expected a model that `tools/heads.py extend` wrote"
        )
    adapter.extend_adapter(args.src, args.dst, manifest.layout, base=args.base)
    print(f"wrote {args.dst}")
    return 0


def explain(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.model)
    if manifest is None:
        to = layout(ModelConfig.from_json(args.model))
        print("not extended by this tool; its heads are:")
    else:
        to = manifest.layout
    print(slot_map(to))
    return 0


# ---- verify --------------------------------------------------------------------------------------


def verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--text", metavar="F", help="a text to run on")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of the text")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--arithmetic", choices=["native", "exact"], default="native")
    parser.add_argument("--json", metavar="F", help="write the report")
    parser.add_argument("--html", metavar="F", help="write the page")


def verify(args: argparse.Namespace) -> int:
    for flag, path in (("--json", args.json), ("--html", args.html)):
        if path is not None:
            check_writable(path, flag)
    integer("--max-tokens", args.max_tokens, 1)
    text = None if args.text is None else read_flag("--text", args.text)
    a, b = Checkpoint(args.a), Checkpoint(args.b)
    for checkpoint in (a, b):
        checkpoint.check()
    title = f"{Path(args.a).name} and {Path(args.b).name}"
    if sizes := differing_sizes(a.config, b.config):
        settings = sizes + differing_settings(a, b)
        write_reports(args, unlike_as_json(settings), unlike_as_html(settings, title))
        print(f"different: {'; '.join(settings)}")
        return 1
    ids = read_ids(args.a, text, args.max_tokens)
    report = verify_checkpoints(a, b, ids, DTYPES[args.dtype], args.arithmetic)
    write_reports(args, as_json(report), as_html(report, title))
    print_report(report)
    return 0 if report.same else 1


def write_reports(args: argparse.Namespace, facts: str, page: str) -> None:
    """Into the files that were asked for."""
    if args.json is not None:
        write("--json", args.json, facts)
    if args.html is not None:
        write("--html", args.html, page)


def print_report(report: Report) -> None:
    """The verdict first, with the reason for it where configs or weights show one."""
    greedy = "the same" if report.greedy_match else "differs"
    outputs = (
        f"{report.outputs}: error {report.units:.3g} times the original's own in {report.dtype}, "
        f"{report.arithmetic} (largest difference {report.max_abs:.3g}, KL {report.kl:.3g}, "
        f"top-1 {report.top1:.2%}, perplexity x {report.perplexity_ratio:.4g}, "
        f"greedy text {greedy})"
    )
    if report.reasons:
        print(f"different: {report.reasons[0]}")
        outputs = f"  outputs on this text: {outputs}"
    print(outputs)
    for reason in report.reasons[1:]:
        print(f"  {reason}")
    for limit in report.not_exposed:
        print(f"  not shown by the outputs: {limit}")
    if report.first_stage:
        print(f"  first difference: layer {report.first_layer}, {report.first_stage}")
    heads, kv = (
        " ".join("." if head is None else str(head) for head in slots)
        for slots in (report.layers[0].heads, report.layers[0].kv)
    )
    print(f"  slot map of layer 0: q {heads}; kv {kv}")


def read_ids(model: str, text: str | None, max_tokens: int) -> Tensor:
    """`text`, or TEXT, as token ids [1, T] of the model in the directory `model`.

    A checkpoint without a tokenizer gets any ids, unless the user chose the text.
    """
    try:
        ids = Tokenizer.from_dir(model).encode(TEXT if text is None else text)[:max_tokens]
    except TokenizerError:
        if text is not None:
            raise
        size = ModelConfig.from_json(model).vocab_size
        ids = torch.randint(0, size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    if not ids:
        raise MinqwenError("--text: the file holds no token, expected some text")
    return torch.tensor([ids])


def write(flag: str, file: str, text: str) -> None:
    try:
        write_text(Path(file), text, MinqwenError)
    except MinqwenError as error:
        raise MinqwenError(f"{flag} {error}") from None


# ---- demo ----------------------------------------------------------------------------------------

HEADINGS = ("recipe", "float32", "bfloat16", "exact", "top-1", "ppl x", "greedy")
WIDTHS = (18, 10, 10, 9, 8, 9, 8)


def demo(args: argparse.Namespace) -> int:
    source, ids = Checkpoint(args.model), read_ids(args.model, None, 64)
    config, weights = source.config, {name: source.read(name) for name in source.names}
    print(
        f"{args.model}: {config.num_attention_heads} query and {config.num_key_value_heads} KV "
        "heads; difference in units of the original's own error"
    )
    print(f"{columns(HEADINGS)}  {'first wrong':12} what is wrong")
    surprises = 0
    for trial in try_recipes(config, weights, ids):
        print_trial(trial)
        surprises += not trial.as_expected
    return 1 if surprises else 0


def print_trial(trial: Trial) -> None:
    if trial.error is not None:
        print(f"{columns((trial.name, 'cannot run'))}{'':36}  {trial.error}")
        return
    float32, bfloat16, exact = trial.reports
    cells = (
        trial.name,
        f"{float32.units:.3g}",
        f"{bfloat16.units:.3g}",
        in_bits(exact.verdict) or f"{exact.units:.3g}",
        f"{float32.top1:.1%}",
        f"{float32.perplexity_ratio:.4g}",
        "same" if float32.greedy_match else "differs",
    )
    print(f"{columns(cells)}  {trial.first_wrong or '-':12} {'; '.join(trial.problems) or '-'}")


def in_bits(verdict: Verdict) -> str:
    return "0 bits" if verdict == "bitwise" else ""


def columns(cells: tuple[str, ...]) -> str:
    """The first cell to the left, the others to the right, in WIDTHS."""
    first, *rest = cells
    return f"{first:{WIDTHS[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(rest, WIDTHS[1:]))


if __name__ == "__main__":
    run(main)
