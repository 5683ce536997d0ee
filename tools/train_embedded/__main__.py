"""Trains weights/embedded: a small Qwen2.5 that runs anywhere and whose answers can be marked.

The checkpoint has the 7B's head geometry (28 query heads, 4 key/value heads, QKV bias, a head_dim
that hidden_size / 32 gets wrong) at a size that two CPU cores train in about an hour. Every step
mixes three skills: the text of the King James Version, sums, and needles in a haystack of verses
(minqwen/lab/tasks.py).

    apt-get install bible-kjv
    python tools/train_embedded --minutes 45         # goes on if runs/embedded/state.pt is there
    python tools/train_embedded --evaluate           # measures the checkpoint, trains nothing
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from minqwen import Qwen2, Tokenizer  # before torch, for Ctrl-C

# isort: split
import torch
from card import Made, card, greedy, measure
from checkpoint import make_tokenizer, rounded
from data import Data, read_bible
from optimizer import Rates
from train import Settings, new_model, train

from minqwen.cli import EMBEDDED, run
from minqwen.errors import MinqwenError
from minqwen.files import write_text
from minqwen.lab.tasks import split_chapters

RUN = Path(__file__).resolve().parents[2] / "runs" / "embedded"
SEED = 2025


def positive_number(text: str) -> float:
    """For argparse: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def positive_integer(text: str) -> int:
    """For argparse: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer above 0")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files_flags(parser)
    training_flags(parser)
    rate_flags(parser)
    return parser.parse_args()


def files_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate", action="store_true", help="measure --out and print it; no training"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what `bible -f gen1:1-rev22:21` prints"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help="where the checkpoint goes, at every measure too (default weights/embedded)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=RUN,
        metavar="DIR",
        help="state to resume from and log.jsonl (default runs/embedded)",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=positive_number,
        default=45.0,
        metavar="M",
        help="training time without measures; the learning rate decays with it (default 45)",
    )
    length.add_argument(
        "--steps",
        type=positive_integer,
        metavar="N",
        help="train for N steps instead, of 3,072 tokens on average",
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"default {SEED}")
    parser.add_argument(
        "--threads", type=positive_integer, default=2, metavar="N", help="default 2"
    )
    parser.add_argument(
        "--evaluate-every",
        type=positive_number,
        default=9.0,
        metavar="M",
        help="minutes between short measures (default 9)",
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile; slower")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def rate_flags(parser: argparse.ArgumentParser) -> None:
    for name, value, what in (
        ("muon-lr", 0.02, "matrices in the layers"),
        ("embed-lr", 0.01, "embedding"),
        ("head-lr", 0.004, "lm_head"),
        ("vector-lr", 0.004, "norms and biases"),
        ("sum-weight", 0.5, "weight of the sums' loss"),
        ("needle-weight", 1.0, "weight of the needles' loss"),
    ):
        parser.add_argument(
            "--" + name, type=positive_number, default=value, metavar="X", help=f"{what} ({value})"
        )


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        minutes=args.minutes,
        steps=args.steps,
        out=args.out,
        run=args.run,
        seed=args.seed,
        threads=args.threads,
        evaluate_every=args.evaluate_every,
        rates=Rates(args.muon_lr, args.embed_lr, args.head_lr, args.vector_lr),
        loss_weights={"text": 1.0, "sum": args.sum_weight, "needle": args.needle_weight},
        compile=not args.no_compile,
        quiet=args.quiet,
    )


def check_out(out: Path) -> None:
    """Raise MinqwenError, before the training, for a place where no checkpoint will be written."""
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not empty and not (out / "config.json").is_file():
        raise MinqwenError(
            f"--out {out}: exists and is not a checkpoint, expected one or nothing; choose another"
        )


def evaluate(out: Path, text: Path | None) -> None:
    """Print what the checkpoint in `out` can do."""
    _, heldout = split_chapters(read_bible(text))
    model = Qwen2.from_pretrained(out, dtype="float32")
    print(measure(model, Tokenizer.from_dir(out), heldout).to_json())


def train_and_describe(settings: Settings, text: Path | None) -> None:
    """Train, measure, and write the model card."""
    check_out(settings.out)
    torch.manual_seed(settings.seed)
    chapters = read_bible(text)
    trained, heldout = split_chapters(chapters)
    tokenizer, config = make_tokenizer(trained, settings.run / "tokenizer")
    model = new_model(config)
    data = Data(trained, tokenizer, settings.seed)
    progress = train(settings, model, tokenizer, data, heldout)
    final = rounded(model)
    report = measure(final, tokenizer, heldout)
    print(report.to_json())
    sample = greedy(final, tokenizer, "In the beginning", 96)
    made = Made(
        command=f"python tools/train_embedded {length_flag(settings)}",
        steps=progress.step,
        tokens=progress.tokens,
        seed=settings.seed,
        minutes=progress.seconds / 60,
        threads=settings.threads,
    )
    text_of_card = card(config, tokenizer, chapters, heldout, report, sample, made)
    write_text(settings.out / "README.md", text_of_card, MinqwenError)
    print(sample)


def length_flag(settings: Settings) -> str:
    if settings.steps is not None:
        return f"--steps {settings.steps}"
    return f"--minutes {settings.minutes:g}"


def main() -> int:
    args = parse()
    torch.set_num_threads(1)  # within an operation; `backward` says why
    try:
        if args.evaluate:
            evaluate(args.out, args.text)
        else:
            train_and_describe(settings_of(args), args.text)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, or no permission to write to --run
        raise MinqwenError(
            f"{error.filename}: {error.strerror or error}; choose another --run, or make room"
        ) from None
    return 0


if __name__ == "__main__":
    run(main)
