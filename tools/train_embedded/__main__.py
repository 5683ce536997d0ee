"""Trains weights/embedded: a small Qwen2.5 that runs anywhere and whose answers can be marked.

The checkpoint has the 7B's head geometry (28 query heads, 4 key/value heads, QKV bias, a head_dim
that hidden_size / 32 gets wrong) at a size that two CPU cores train in about an hour. Every step
mixes four skills: the text of the King James Version, sums, needles in a haystack of verses, and
sentences to write as JSON (minqwen/lab/tasks.py).

    apt-get install bible-kjv
    python tools/train_embedded --minutes 45         # goes on if runs/embedded/state.pt is there
    python tools/train_embedded --evaluate           # measures the checkpoint, trains nothing
    python tools/train_embedded --device cuda --rows 64 --workers 12 --minutes 4 --dropout 0.25
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from minqwen import Qwen2, Tokenizer  # before torch, for Ctrl-C

# isort: split
import torch
from card import Made, card, greedy, measure
from checkpoint import make_tokenizer, rounded
from data import read_bible
from optimizer import Rates
from train import Settings, Source, new_model, train

from minqwen.cli import EMBEDDED, run
from minqwen.errors import MinqwenError
from minqwen.files import read_text, write_text
from minqwen.lab.tasks import Chapter, heldout_loss, split_chapters

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


def part_of_one(text: str) -> float:
    """For argparse: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files_flags(parser)
    training_flags(parser)
    machine_flags(parser)
    look_flags(parser)
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
        help="train for N steps instead",
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"default {SEED}")
    parser.add_argument(
        "--rows",
        type=positive_integer,
        default=3,
        metavar="N",
        help="rows of 1,024 tokens in a step (default 3; a GPU wants 64)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="begin with the weights of this checkpoint, not with random ones",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="this checkpoint has a say in what should have come where the model's greedy text "
        "repeats itself, and corrects what is unlikely to it (default: the model's own next "
        "choice, where it repeats itself)",
    )
    parser.add_argument(
        "--trial",
        action="store_true",
        help="train on text alone and without every 50th chapter of it, print the loss on those, "
        "and write no checkpoint: to choose --dropout",
    )


def machine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument(
        "--threads", type=positive_integer, default=2, metavar="N", help="on a CPU (default 2)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that make chats while a GPU trains (default 0: none)",
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile; slower")


def look_flags(parser: argparse.ArgumentParser) -> None:
    for name, value, what in (
        ("evaluate-every", 9.0, "minutes between short measures"),
        ("save-every", 9.0, "minutes between saved states"),
    ):
        parser.add_argument(
            "--" + name, type=positive_number, default=value, metavar="M", help=f"{what} ({value})"
        )
    parser.add_argument(
        "--curve",
        type=int,
        default=0,
        metavar="N",
        help="take the loss on the held-out chapters N times (default 0)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def rate_flags(parser: argparse.ArgumentParser) -> None:
    for name, value, what in (
        ("muon-lr", 0.02, "matrices in the layers"),
        ("embed-lr", 0.01, "embedding"),
        ("head-lr", 0.004, "lm_head"),
        ("vector-lr", 0.004, "norms and biases"),
        ("sum-weight", 0.3, "weight of the sums' loss"),
        ("needle-weight", 1.0, "weight of the needles' loss"),
        ("json-weight", 0.3, "weight of the objects' loss"),
        ("repeat-weight", 0.5, "weight of what unlearns repetition, towards the end"),
    ):
        parser.add_argument(
            "--" + name, type=positive_number, default=value, metavar="X", help=f"{what} ({value})"
        )
    for name, value, what in (
        ("text-share", 0.4, "part of the rows that is text"),
        ("dropout", 0.0, "part of what a layer adds that is dropped in text"),
        ("blanked", 0.0, "part of the text's tokens that is not seen"),
        ("weight-decay", 0.1, "weight decay"),
        ("repeats-from", 0.6, "part of the training after which repetition is unlearnt"),
    ):
        parser.add_argument(
            "--" + name, type=part_of_one, default=value, metavar="X", help=f"{what} ({value})"
        )


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        minutes=args.minutes,
        steps=args.steps,
        out=args.out,
        run=args.run,
        start_from=args.start_from,
        teacher=args.teacher,
        seed=args.seed,
        threads=args.threads,
        workers=args.workers,
        device=args.device,
        rows=args.rows,
        text_share=1.0 if args.trial else args.text_share,
        dropout=args.dropout,
        blanked=args.blanked,
        weight_decay=args.weight_decay,
        repeats_from=args.repeats_from,
        evaluate_every=args.minutes if args.trial else args.evaluate_every,
        save_every=args.save_every,
        curve=args.curve,
        rates=Rates(args.muon_lr, args.embed_lr, args.head_lr, args.vector_lr),
        loss_weights={
            "text": 1.0,
            "sum": args.sum_weight,
            "needle": args.needle_weight,
            "json": args.json_weight,
            "repeat": args.repeat_weight,
        },
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


def check_device(device: str) -> None:
    """Raise MinqwenError for a device that is not here."""
    if device != "cpu" and not (device.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise MinqwenError(f"--device {device}: is not here, expected cpu, or cuda and a GPU")


def evaluate(out: Path, text: Path | None, device: str) -> None:
    """Print what the checkpoint in `out` can do."""
    check_device(device)
    _, heldout = split_chapters(read_bible(text))
    model = Qwen2.from_pretrained(out, dtype="float32", device=device)
    print(measure(model, Tokenizer.from_dir(out), heldout).to_json())


def try_out(settings: Settings, text: Path | None) -> None:
    """Train on text alone, and print the loss on chapters which were left out of it.

    They are others than the held-out ones, which say nothing about settings that were chosen by
    them.
    """
    check_device(settings.device)
    torch.manual_seed(settings.seed)
    trained, _ = split_chapters(read_bible(text))
    rest = [chapter for i, chapter in enumerate(trained) if i % 50 != 24]
    left_out: list[Chapter] = trained[24::50]
    tokenizer, config = make_tokenizer(trained, settings.run / "tokenizer")
    model = new_model(config, settings.device)
    progress = train(settings, model, Source(rest, left_out, tokenizer), saves=False)
    loss = heldout_loss(rounded(model), tokenizer, left_out)
    found = {
        "dropout": settings.dropout,
        "blanked": settings.blanked,
        "steps": progress.step,
        "tokens": progress.tokens,
        "bits_per_byte": round(loss.bits_per_byte, 4),
    }
    print(json.dumps(found))


def train_and_describe(settings: Settings, text: Path | None) -> None:
    """Train, measure, and write the model card."""
    check_out(settings.out)
    check_device(settings.device)
    torch.manual_seed(settings.seed)
    chapters = read_bible(text)
    trained, heldout = split_chapters(chapters)
    tokenizer, config = make_tokenizer(trained, settings.run / "tokenizer")
    model = new_model(config, settings.device)
    if settings.start_from is not None:
        take_weights(model, settings.start_from, settings.run / "tokenizer")
    progress = train(settings, model, Source(trained, heldout, tokenizer))
    final = rounded(model)
    report = measure(final, tokenizer, heldout)
    print(report.to_json())
    sample = greedy(final, tokenizer, "In the beginning", 96)
    command = shlex.join(["python", "tools/train_embedded", *flags_without_places(sys.argv[1:])])
    made = Made(
        commands=[*earlier_commands(settings.start_from), command],
        steps=progress.step,
        tokens=progress.tokens,
        seed=settings.seed,
        minutes=progress.seconds / 60,
        where=machine(settings),
    )
    text_of_card = card(config, tokenizer, chapters, heldout, report, sample, made)
    write_text(settings.out / "README.md", text_of_card, MinqwenError)
    print(sample)


def take_weights(model: Qwen2, start: Path, tokenizer: Path) -> None:
    """Give `model` the weights of the checkpoint `start`. Raises MinqwenError for another model."""
    loaded = Qwen2.from_pretrained(start, dtype="float32", device=str(model.device))
    files = [read_text(folder / "tokenizer.json", MinqwenError) for folder in (start, tokenizer)]
    if loaded.config.to_dict() != model.config.to_dict() or files[0] != files[1]:
        raise MinqwenError(
            f"--start-from {start}: has another shape or tokenizer than this program makes; "
            "expected a checkpoint that it made"
        )
    model.load_state_dict(loaded.state_dict())


def earlier_commands(start: Path | None) -> list[str]:
    """For the card: the commands in the card of the checkpoint that a training began with."""
    if start is None or not (start / "README.md").is_file():
        return []
    lines = read_text(start / "README.md", MinqwenError).splitlines()
    return [line.strip() for line in lines if line.startswith("    python tools/train_embedded")]


def flags_without_places(flags: list[str]) -> list[str]:
    """For the card: the flags that say how the model was trained, not where files lie."""
    places = ("--text", "--out", "--run")
    found, rest = [], iter(flags)
    for flag in rest:
        if flag in ("--start-from", "--teacher"):
            next(rest, None)
            found += [flag, "DIR"]
        elif flag in places:
            next(rest, None)
        elif flag.partition("=")[0] not in places:
            found.append(flag)
    return found


def machine(settings: Settings) -> str:
    """What the training ran on, for the card."""
    if settings.device == "cpu":
        return f"{settings.threads} CPU threads"
    return torch.cuda.get_device_name(settings.device)


def main() -> int:
    args = parse()
    torch.set_num_threads(1)  # within an operation; `backward` says why
    try:
        if args.evaluate:
            evaluate(args.out, args.text, args.device)
        elif args.trial:
            try_out(settings_of(args), args.text)
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
