"""Writes a random checkpoint of any Qwen2.5 shape: the real layout and size, none of the knowledge.

    python tools/make_checkpoint.py --size 7B DST                      15.2 GB in four shards
    python tools/make_checkpoint.py --size 0.5B --num-hidden-layers 4 DST
    python tools/make_checkpoint.py --config some/config.json --dtype float32 --tokenizer weights/embedded DST

Matrices, embeddings and biases are drawn from N(0, 0.02^2), as initializer_range says; norm weights are 1.
One block of 16,777,213 numbers (a prime, so that no two rows of a matrix are equal) is drawn from the seed,
and every tensor repeats it from an offset of its own, given by the seed and its name: as fast as the disk,
and good for tests of speed, size and format; do not look for statistics in it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from minqwen.checkpoint import write_checkpoint
from minqwen.config import ModelConfig
from minqwen.errors import CheckpointError, MinqwenError
from minqwen.lab.shapes import SIZES, official_config, random_tensors

OVERRIDES = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "rope_theta": float,
    "rms_norm_eps": float,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--size", choices=SIZES, help="an official Qwen2.5 shape")
    shape.add_argument(
        "--config", metavar="FILE", help="a config.json, or the directory that holds one"
    )
    parser.add_argument("dst", metavar="DST", help="the directory to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is at DST"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="copy the tokenizer and other small files of DIR"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        help="of the weights (default: the config's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random numbers (default %(default)s)"
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=4 * 10**9,
        metavar="N",
        help="start a new file beyond this many bytes (default %(default)s)",
    )
    parser.add_argument(
        "--tie-word-embeddings", action=argparse.BooleanOptionalAction, default=None
    )
    for field, kind in OVERRIDES.items():
        parser.add_argument(
            "--" + field.replace("_", "-"), type=kind, metavar="N" if kind is int else "X"
        )
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: {args.seed}; expected 0 to 2**63 - 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    changes = {
        k: v
        for k, v in vars(args).items()
        if k in (*OVERRIDES, "dtype", "tie_word_embeddings") and v is not None
    }
    config = official_config(args.size) if args.size else ModelConfig.from_json(args.config)
    config = config.replace(**changes)
    if config.quantization_config is not None:
        raise CheckpointError(
            f"{args.config}: quantization_config is set, but only unquantised weights are "
            "written; remove the key"
        )
    dst = Path(args.dst)
    if dst.exists() and not args.overwrite and not (dst.is_dir() and not any(dst.iterdir())):
        raise CheckpointError(f"{dst}: exists; choose another directory or pass --overwrite")

    with tqdm(total=config.weight_bytes(), unit="B", unit_scale=True, desc=str(dst)) as bar:

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in random_tensors(config, args.seed):
                yield name, tensor
                bar.update(tensor.nbytes)

        write_checkpoint(dst, config, counted(), args.max_shard_bytes, sources=args.tokenizer)
    print(
        json.dumps(
            {
                "path": str(dst),
                "parameters": config.num_parameters(),
                "bytes": config.weight_bytes(),
                "dtype": config.dtype,
                "files": len(list(dst.glob("*.safetensors"))),
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except MinqwenError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
