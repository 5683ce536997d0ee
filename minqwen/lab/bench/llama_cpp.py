"""llama.cpp as a contestant, through the C functions that llama-cpp-python hands on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minqwen.errors import MinqwenError
from minqwen.lab.bench.gguf_file import write_gguf
from minqwen.lab.bench.jobs import Ask
from minqwen.lab.bench.peers import missing
from minqwen.lab.bench.setup import Engine, Setup
from minqwen.lab.bench.timing import Run, Stopwatch


class Piece(NamedTuple):
    """Tokens of one sequence that a step computes, the first at `position`.

    last: whether the logits of the last one are wanted.
    """

    sequence: int
    tokens: list[int]
    position: int
    last: bool


def load_llama_cpp(setup: Setup) -> Engine:
    """Write the GGUF file beside the checkpoint if it is not there yet, and load it."""
    try:
        import gguf
        import llama_cpp
    except ImportError as error:
        raise missing("llama.cpp", error) from None
    assert setup.model is not None
    file = Path(setup.model) / f"bench-{setup.contestant.form}.gguf"
    if not file.exists():
        part = file.with_suffix(".part")
        write_gguf(setup.model, part, setup.contestant.form, gguf)
        part.rename(file)
    return LlamaCpp(llama_cpp, file, setup)


class LlamaCpp:
    """A greedy loop over `llama_decode`: steps of prompts first, then of one token for each."""

    def __init__(self, library: Any, file: Path, setup: Setup):
        self.lib, self.vocab_size = library, setup.config().vocab_size
        self.step_tokens = setup.step_tokens
        # The library calls it for as long as the process lives, and does not hold it.
        self.log = library.llama_log_callback(_say_nothing)
        library.llama_log_set(self.log, None)
        library.llama_backend_init()
        model_options = library.llama_model_default_params()
        model_options.n_gpu_layers = -1 if setup.device == "cuda" else 0
        model_options.use_mmap = False
        model = library.llama_model_load_from_file(str(file).encode(), model_options)
        options = library.llama_context_default_params()
        options.n_ctx = setup.batch * (-(-setup.longest // 256) * 256)
        options.n_batch = options.n_ubatch = min(setup.step_tokens, options.n_ctx)
        options.n_seq_max = setup.batch
        options.n_threads = options.n_threads_batch = setup.threads
        options.type_k = options.type_v = _cache_type(library, setup.contestant.form)
        self.context = model and library.llama_init_from_model(model, options)
        if not self.context:
            raise MinqwenError(f"llama.cpp cannot load {file}")
        self.batch = library.llama_batch_init(options.n_batch, 0, 1)

    def run(self, asks: list[Ask]) -> Run:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        found: list[list[int]] = [[] for _ in asks]
        watch = Stopwatch("cpu")  # its functions return when the logits are there
        for pieces in self._prompt_steps(asks):
            self._step(pieces, found)
            watch.mark(sum(map(len, found)), sum(map(bool, found)))
        while pieces := _next_tokens(asks, found):
            self._step(pieces, found)
            watch.mark(sum(map(len, found)), len(found))
        return Run(watch.marks, found)

    def _prompt_steps(self, asks: Sequence[Ask]) -> list[list[Piece]]:
        """All prompts, in order, in steps of at most step_tokens tokens."""
        steps: list[list[Piece]] = [[]]
        room = self.step_tokens
        for number, ask in enumerate(asks):
            done = 0
            while done < len(ask.prompt):
                if not room:
                    steps.append([])
                    room = self.step_tokens
                some = ask.prompt[done : done + room]
                end = done + len(some)
                steps[-1].append(Piece(number, some, done, end == len(ask.prompt)))
                done, room = end, room - len(some)
        return steps

    def _step(self, pieces: list[Piece], found: list[list[int]]) -> None:
        """Compute the pieces, and append the likeliest next token of each that is complete."""
        wanted = self._fill(pieces)
        code = self.lib.llama_decode(self.context, self.batch)
        if code:
            raise MinqwenError(f"llama_decode gives {code}")
        for place, sequence in wanted:
            logits = self.lib.llama_get_logits_ith(self.context, place)
            row = np.ctypeslib.as_array(logits, shape=(self.vocab_size,))
            found[sequence].append(int(row.argmax()))

    def _fill(self, pieces: list[Piece]) -> list[tuple[int, int]]:
        """Write the pieces into the batch. Returns (place, sequence) of the logits to come."""
        batch, place, wanted = self.batch, 0, []
        for piece in pieces:
            for i, token in enumerate(piece.tokens):
                batch.token[place] = token
                batch.pos[place] = piece.position + i
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = piece.sequence
                batch.logits[place] = 0
                place += 1
            if piece.last:
                batch.logits[place - 1] = 1
                wanted.append((place - 1, piece.sequence))
        batch.n_tokens = place
        return wanted


def _next_tokens(asks: Sequence[Ask], found: Sequence[list[int]]) -> list[Piece]:
    """One token of each request that has not ended."""
    return [
        Piece(number, [own[-1]], len(ask.prompt) + len(own) - 1, True)
        for number, (ask, own) in enumerate(zip(asks, found))
        if len(own) < ask.new
    ]


def _cache_type(library: Any, form: str) -> int:
    """Keys and values in float32 for float32 weights, else in float16, which is its default."""
    kind: int = library.GGML_TYPE_F32 if form == "f32" else library.GGML_TYPE_F16
    return kind


def _say_nothing(level: int, text: bytes, data: object) -> None:
    """Instead of hundreds of lines about the file."""
