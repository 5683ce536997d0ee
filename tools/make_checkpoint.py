"""Writes a random checkpoint of any Qwen2.5 shape: the real layout and size, none of the knowledge.

python tools/make_checkpoint.py --size 7B DST                15.2 GB in four weight files
python tools/make_checkpoint.py --size 0.5B --num-hidden-layers 4 DST
python tools/make_checkpoint.py --config some/config.json --tokenizer weights/embedded DST

Matrices, embeddings and biases are drawn from N(0, 0.02^2), as initializer_range says; norm weights
are 1. A row of 16,777,213 numbers is drawn from the seed. Every tensor repeats it from an offset of
its own, given by the seed and the tensor's name. The length is a prime, so that no two rows of a
matrix are equal. This is as fast as the disk, and good for tests of speed, size and format; do not
look for statistics in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from minqwen.checkpoint import write_checkpoint  # before torch, for Ctrl-C

# isort: split
from torch import Tensor
from tqdm import tqdm

from minqwen.checkpoint.weight_files import MAX_FILE_BYTES
from minqwen.checkpoint.writer import check_other_directory, check_replaceable
from minqwen.cli import Parser, run
from minqwen.config import BYTES_PER_ELEMENT, ModelConfig
from minqwen.errors import CheckpointError
from minqwen.files import check_directory
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


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--size", choices=SIZES, help="an official Qwen2.5 shape")
    shape.add_argument(
        "--config", metavar="FILE", help="a config.json, or the directory that holds one"
    )
    parser.add_argument("dst", metavar="DST", type=Path, help="the directory to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is at DST"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="copy the tokenizer and other small files of DIR"
    )
    parser.add_argument(
        "--dtype", choices=BYTES_PER_ELEMENT, help="of the weights (default: the config's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random numbers (default %(default)s)"
    )
    parser.add_argument(
        "--max-file-bytes",
        type=int,
        default=MAX_FILE_BYTES,
        metavar="N",
        help="start a new weight file beyond this many bytes (default %(default)s)",
    )
    parser.add_argument(
        "--tie-word-embeddings", action=argparse.BooleanOptionalAction, default=None
    )
    for field, kind in OVERRIDES.items():
        flag = "--" + field.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar="N" if kind is int else "X")
    args: argparse.Namespace = parser.parse_args()
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: {args.seed}; expected 0 to 2**63 - 1")
    return args


def config_of(args: argparse.Namespace) -> ModelConfig:
    """The shape that the flags describe."""
    config = official_config(args.size) if args.size else ModelConfig.from_json(args.config)
    fields = (*OVERRIDES, "dtype", "tie_word_embeddings")
    changes = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    config = config.replace(**changes)
    if config.quantization_config is not None:
        raise CheckpointError(
            f"{args.config}: quantization_config is set, but only unquantised weights are "
            "written; remove the key"
        )
    return config


def directory_of(config: Path) -> Path:
    return config if config.is_dir() else config.parent


def main() -> int:
    args = parse_args()
    config = config_of(args)
    if args.config is not None:
        check_other_directory(directory_of(Path(args.config)), args.dst)
    if args.tokenizer is not None:
        check_directory(Path(args.tokenizer), CheckpointError)
    check_replaceable(args.dst, args.overwrite)
    with tqdm(total=config.weight_bytes(), unit="B", unit_scale=True, desc=str(args.dst)) as bar:

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in random_tensors(config, args.seed):
                yield name, tensor
                bar.update(tensor.nbytes)

        write_checkpoint(
            args.dst,
            config,
            counted(),
            max_file_bytes=args.max_file_bytes,
            sources=args.tokenizer,
            overwrite=args.overwrite,
        )
    said = {
        "path": str(args.dst),
        "parameters": config.num_parameters(),
        "bytes": config.weight_bytes(),
        "dtype": config.dtype,
        "files": len(list(args.dst.glob("*.safetensors"))),
    }
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    run(main)
