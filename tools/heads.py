#!/usr/bin/env python3
"""Give a checkpoint more heads without changing the model, and prove it. docs/head-extension.md says why.

python tools/heads.py plan MODEL --tp 8                          how to run it at that degree, and what it costs
python tools/heads.py extend SRC DST --num-attention-heads 32    write it
python tools/heads.py verify SRC DST                             is it the same model? (exit code 0 yes, 1 no)
python tools/heads.py shrink DST BACK                            and back, byte for byte
python tools/heads.py extend-adapter LORA OUT --base DST         a LoRA adapter of SRC, for DST
python tools/heads.py explain DST                                the slot map as a picture
python tools/heads.py demo                                       every recipe, right and wrong, on the embedded model
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from minqwen import Checkpoint, ModelConfig, Qwen2, Tokenizer
from minqwen.cli import EMBEDDED, run
from minqwen.errors import HeadsError, MinqwenError
from minqwen.heads import adapter, convert, packed, proposals
from minqwen.heads import layout as layouts
from minqwen.heads.tensors import extend_tensor
from minqwen.lab.faults import CONTROLS
from minqwen.lab.verify import as_html, as_json, compare, inspect_heads, inspect_layer, problems

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there "
    "be light: and there was light."
)


def plan(args: argparse.Namespace) -> int:
    config = ModelConfig.from_json(args.model)
    plans = proposals.plan(
        config, args.num_attention_heads, args.num_key_value_heads, args.tp, args.quant_group
    )
    if args.json:
        print(json.dumps([{**asdict(p), "config": p.config.to_dict()} for p in plans], indent=1))
        return 0
    H, K = config.num_attention_heads, config.num_key_value_heads
    print(
        f"{args.model}: {H} query and {K} KV heads of {config.head_dim}, "
        f"{config.num_parameters():,} parameters, {config.kv_bytes_per_token('bfloat16'):,} bytes of cache per token"
    )
    for i, p in enumerate(plans):
        c = p.config
        changed = (c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) != (
            H,
            K,
            config.intermediate_size,
        )
        print(
            f"\n{'proposal' if i == 0 else 'alternative'}: {c.num_attention_heads} query and {c.num_key_value_heads} "
            f"KV heads, MLP {c.intermediate_size}" + ("" if changed else " (as it is)")
        )
        print(f"  degrees that work: {', '.join(map(str, p.degrees))}")
        print(
            f"  parameters {p.cost.parameters:+,}; cache {p.cost.kv_bytes:,} bytes per token in all; attention's "
            "multiply-adds "
            + ", ".join(f"{x - 1:+.1%} at {n:,} tokens" for n, x in p.cost.attention_macs.items())
        )
        for note in p.notes:
            print(f"  note: {note}")
        if changed:
            flags = f"--num-attention-heads {c.num_attention_heads}"
            flags += (
                f" --num-key-value-heads {c.num_key_value_heads}"
                if c.num_key_value_heads != K
                else ""
            )
            flags += (
                f" --intermediate-size {c.intermediate_size}"
                if c.intermediate_size != config.intermediate_size
                else ""
            )
            print(f"  tools/heads.py extend {args.model} DST {flags}")
    return 0


def extend(args: argparse.Namespace) -> int:
    config = ModelConfig.from_json(args.src)
    to = layouts.layout(
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
        args.src, args.dst, to, arch=args.arch, max_shard_bytes=args.max_shard_bytes, progress=True
    )
    print(layouts.explain(to))
    target = layouts.extended_config(config, to, args.arch)
    c = proposals.cost(config, target)
    print(f"wrote {args.dst}: parameters {c.parameters:+,}")
    derived = target.hidden_size // target.num_attention_heads
    if args.arch == "qwen2" and derived != target.head_dim:
        print(
            f"warning: transformers and SGLang honour head_dim {target.head_dim} in this config; vLLM's Qwen2 class derives "
            f"{derived}, loads without an error and drops rows: for vLLM extend with --arch llama",
            file=sys.stderr,
        )
    return 0


def shrink(args: argparse.Namespace) -> int:
    if ModelConfig.from_json(args.src).quantization_config is None:
        convert.shrink(args.src, args.dst, tolerance=args.tolerance, progress=True)
    else:
        packed.shrink_packed(args.src, args.dst, progress=True)
    print(f"wrote {args.dst}")
    return 0


def extend_adapter(args: argparse.Namespace) -> int:
    manifest = convert.read_manifest(args.base)
    if manifest is None:
        raise HeadsError(
            f"{args.base}: has no {convert.MANIFEST}, expected a model that `tools/heads.py extend` wrote"
        )
    adapter.extend_adapter(args.src, args.dst, manifest["layout"], base=args.base)
    print(f"wrote {args.dst}")
    return 0


def explain(args: argparse.Namespace) -> int:
    manifest = convert.read_manifest(args.model)
    if manifest is None:
        config = ModelConfig.from_json(args.model)
        print("not extended by this tool; its heads are:")
        print(layouts.explain(layouts.layout(config)))
    else:
        print(layouts.explain(manifest["layout"]))
    return 0


def read_ids(args: argparse.Namespace, model: str) -> torch.Tensor:
    text = TEXT if args.text is None else Path(args.text).read_text(encoding="utf-8")
    try:
        ids = Tokenizer.from_dir(model).encode(text)[: args.max_tokens]
    except MinqwenError:  # a checkpoint without a tokenizer: any ids will do
        size = ModelConfig.from_json(model).vocab_size
        ids = torch.randint(0, size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([ids])


def verify(args: argparse.Namespace) -> int:
    a, b = Checkpoint(args.a), Checkpoint(args.b)
    for checkpoint in (a, b):
        checkpoint.check()
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")
    if differ := [
        f"{n} {getattr(a.config, n)} and {getattr(b.config, n)}"
        for n in same
        if getattr(a.config, n) != getattr(b.config, n)
    ]:
        print(f"different: {'; '.join(differ)}")
        return 1
    maps = inspect_heads(a, b)
    options = {"dtype": args.dtype, "arithmetic": args.arithmetic}
    report = compare(
        Qwen2.from_pretrained(args.a, **options),
        Qwen2.from_pretrained(args.b, **options),
        Qwen2.from_pretrained(args.a, dtype="float64"),
        read_ids(args, args.a),
        maps,
    )
    if args.json:
        Path(args.json).write_text(as_json(report))
    if args.html:
        Path(args.html).write_text(as_html(report, f"{Path(args.a).name} and {Path(args.b).name}"))
    print(
        f"{report.verdict}: error {report.units:.3g} times the original's own in {report.dtype}, {report.arithmetic} "
        f"(largest difference {report.max_abs:.3g}, KL {report.kl:.3g}, top-1 {report.top1:.2%}, perplexity x "
        f"{report.perplexity_ratio:.4g}, greedy text {'the same' if report.greedy_match else 'differs'})"
    )
    for problem in report.problems:
        print(f"  {problem}")
    if report.first_stage:
        print(f"  first difference: layer {report.first_layer}, {report.first_stage}")
    print(
        f"  slot map of layer 0: q {' '.join('.' if h is None else str(h) for h in maps[0].heads)}; "
        f"kv {' '.join('.' if k is None else str(k) for k in maps[0].kv)}"
    )
    return 0 if report.same and not report.problems else 1


def demo(args: argparse.Namespace) -> int:
    source = Checkpoint(args.model)
    config, ids = source.config, read_ids(args, args.model)
    weights = {name: source.read(name) for name in source.names}

    def build(c: ModelConfig, w: dict, **options) -> Qwen2:
        def read(name: str, shard):
            if tuple(w[name].shape) != tuple(c.parameter_shapes()[name]):
                raise MinqwenError(
                    f"{name.removeprefix('model.')} has shape {list(w[name].shape)}, its config says "
                    f"{list(c.parameter_shapes()[name])}"
                )
            return w[name]

        return Qwen2.from_tensors(c, read, **options)

    truth = build(config, weights, dtype=torch.float64)
    kinds = [("float32", "native"), ("bfloat16", "native"), ("float32", "exact")]
    originals = [build(config, weights, dtype=getattr(torch, d), arithmetic=a) for d, a in kinds]
    H, K = config.num_attention_heads, config.num_key_value_heads
    wide = -(-H // (2 * K)) * 2 * K
    right = [
        (f"{recipe} {wide}/{K}", {"num_attention_heads": wide, "recipe": recipe})
        for recipe in layouts.RECIPES
    ]
    right += [
        (f"ghost {wide}/{2 * K}", {"num_attention_heads": wide, "num_key_value_heads": 2 * K}),
        (f"split {2 * H}/{K}", {"num_attention_heads": 2 * H, "recipe": "split"}),
        (f"full MHA {H}/{H}", {"num_key_value_heads": H}),
    ]
    print(
        f"{args.model}: {H} query and {K} KV heads; difference in units of the original's own error"
    )
    print(
        f"{'recipe':18}{'float32':>10}{'bfloat16':>10}{'exact':>9}{'top-1':>8}{'ppl x':>9}{'greedy':>8}  {'first wrong':12} what is wrong"
    )
    wrong_right = 0
    for name, options in right + [(name, None) for name in CONTROLS]:
        try:
            if options is not None:
                to = layouts.layout(config, alpha=0.3, **options)
                to.check()
                c, w = (
                    layouts.extended_config(config, to),
                    {n: extend_tensor(n, t, to) for n, t in weights.items()},
                )
            else:
                c, w = CONTROLS[name](config, weights)
            models = [build(c, w, dtype=getattr(torch, d), arithmetic=a) for d, a in kinds]
        except MinqwenError as error:
            print(f"{name:18}{'cannot run':>10}{'':36}  {error}")
            continue
        if c.head_dim == config.head_dim:
            maps = [
                inspect_layer(config, c, weights.__getitem__, w.__getitem__, i)
                for i in range(config.num_hidden_layers)
            ]
            # Greedy text is compared once, in float32: it takes most of the time.
            reports = [
                compare(a, b, truth, ids, maps, 0 if i else 8)
                for i, (a, b) in enumerate(zip(originals, models))
            ]
            said, first = (
                problems(maps),
                reports[0].first_stage and f"{reports[0].first_layer} {reports[0].first_stage}",
            )
        else:
            reports = [
                compare(a, b, truth, ids, [], 0 if i else 8)
                for i, (a, b) in enumerate(zip(originals, models))
            ]
            said, first = (
                [
                    f"head_dim {c.head_dim} instead of {config.head_dim}: rows of every head are dropped"
                ],
                "0 q",
            )
        fine = not said and all(r.same for r in reports)
        wrong_right += fine != (options is not None)
        exact = "0 bits" if reports[2].verdict == "bitwise" else f"{reports[2].units:.3g}"
        print(
            f"{name:18}{reports[0].units:10.3g}{reports[1].units:10.3g}{exact:>9}{reports[0].top1:8.1%}"
            f"{reports[0].perplexity_ratio:9.4g}{'same' if reports[0].greedy_match else 'differs':>8}  {first or '-':12} {'; '.join(said) or '-'}"
        )
    return 1 if wrong_right else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__.replace("_", "-"), **options)
        sub.set_defaults(function=function)
        return sub

    def counts(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--num-attention-heads", type=int, metavar="N")
        sub.add_argument("--num-key-value-heads", type=int, metavar="N")

    sub = command(plan, help="how to run a model at a degree, or with other counts")
    sub.add_argument("model")
    sub.add_argument("--tp", type=int, metavar="N", help="tensor-parallel degree")
    counts(sub)
    sub.add_argument(
        "--quant-group", type=int, metavar="N", help="group size of the quantised checkpoint"
    )
    sub.add_argument("--json", action="store_true")
    sub = command(extend, help="write a checkpoint with more heads")
    sub.add_argument("src")
    sub.add_argument("dst")
    counts(sub)
    sub.add_argument(
        "--recipe",
        choices=list(layouts.RECIPES),
        default="ghost",
        help="what new slots hold (default ghost)",
    )
    sub.add_argument(
        "--alpha", type=float, default=0.5, metavar="X", help="share of the first, for weighted"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of random")
    sub.add_argument(
        "--arch",
        choices=["qwen2", "llama"],
        default="qwen2",
        help="llama is for engines that derive head_dim",
    )
    sub.add_argument(
        "--intermediate-size", type=int, metavar="N", help="pad the MLP with zero channels"
    )
    sub.add_argument(
        "--intermediate-block",
        type=int,
        default=1,
        metavar="N",
        help="real channels before each zero one",
    )
    sub.add_argument("--max-shard-bytes", type=int, default=4 * 10**9, metavar="N")
    sub = command(shrink, help="undo an extension")
    sub.add_argument("src")
    sub.add_argument("dst")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="largest drift to let pass (default 0)",
    )
    sub = command(
        extend_adapter, help="make a LoRA adapter (PEFT) of the source fit the extended model"
    )
    sub.add_argument("src")
    sub.add_argument("dst")
    sub.add_argument(
        "--base",
        required=True,
        metavar="EXTENDED",
        help="the extended model, whose manifest says how",
    )
    sub = command(verify, help="compare two checkpoints")
    sub.add_argument("a")
    sub.add_argument("b")
    sub.add_argument("--text", metavar="F", help="a text to run on")
    sub.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of the text")
    sub.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float32")
    sub.add_argument("--arithmetic", choices=["native", "exact"], default="native")
    sub.add_argument("--json", metavar="F", help="write the report")
    sub.add_argument("--html", metavar="F", help="write the page")
    sub = command(explain, help="print the slot map")
    sub.add_argument("model")
    sub = command(demo, help="every recipe, right and wrong")
    sub.add_argument("--model", default=str(EMBEDDED))
    sub.set_defaults(text=None, max_tokens=64)
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    run(main)
