"""What the command lines in tools/ share: the model's flags, one-line errors, one voice under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minqwen.errors import MinqwenError
from minqwen.parallel import Mesh

EMBEDDED = Path(__file__).resolve().parent.parent / "weights" / "embedded"


def model_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device, --arithmetic, --offload, --check-finite: what `checkpoint.load_pretrained` takes."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=str(EMBEDDED),
        metavar="DIR",
        help="a Hugging Face safetensors directory (default: the embedded model)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "float64"],
        help="of weights, activations and logits (default: the checkpoint's own)",
    )
    group.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: GPUs if there is one for each rank"
    )
    group.add_argument(
        "--arithmetic",
        default="native",
        choices=["native", "exact"],
        help="exact: the same bits whatever the batch, the degree, the machine (default: native)",
    )
    group.add_argument(
        "--offload",
        choices=["memory", "disk"],
        help="layers' weights stay there and come when needed: for a device that is too small",
    )
    group.add_argument(
        "--check-finite", action="store_true", help="refuse weights that hold NaN or infinity"
    )


def check_writable(path: str | Path, flag: str) -> None:
    """Raise MinqwenError, before any work is done, if `flag` names a file that cannot be written.

    Nothing is created. A file that exists may be replaced; its directory must exist.
    """
    path = Path(path)
    if path.is_dir():
        problem = "is a directory, expected the name of a file"
    elif not path.parent.is_dir():
        problem = f"has no directory to lie in ({path.parent}); create that, or choose another"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "cannot be written (permission denied); choose another"
    else:
        return
    raise MinqwenError(f"{flag} {path}: {problem}")


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[], int | None]) -> None:
    """Run a command line: a user's mistake is one line on stderr, from rank 0, and exit code 2."""
    try:
        sys.exit(main())
    except MinqwenError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def share_text(mesh: Mesh, text: str | None) -> str | None:
    """Rank 0's text on every rank. None, the end of input, is shared too."""
    if mesh.size == 1:
        return text
    raw = b"" if text is None else text.encode("utf-8", "surrogatepass")
    size = mesh.broadcast(torch.tensor([-1 if text is None else len(raw)], device=mesh.device))
    if int(size) < 0:
        return None
    data = torch.zeros(int(size), dtype=torch.uint8, device=mesh.device)
    if mesh.rank == 0:
        data.copy_(torch.tensor(list(raw), dtype=torch.uint8))
    return bytes(mesh.broadcast(data).tolist()).decode("utf-8", "surrogatepass")
