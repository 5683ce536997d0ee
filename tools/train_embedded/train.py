"""The training: minqwen's own Qwen2, its gradients, and a run that can be stopped and go on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from card import measure_briefly
from checkpoint import rounded, save_checkpoint
from data import KINDS, NOTHING, PROMPT_TOKENS, REPEAT, Chats, Examples, Supply, Text, start_worker
from optimizer import Rates, make_optimizers
from torch import Tensor, nn
from tqdm import tqdm

from minqwen import LLM, Batch, ModelConfig, Qwen2, SamplingParams, Tokenizer
from minqwen.errors import MinqwenError
from minqwen.lab.tasks import Chapter, heldout_loss
from minqwen.model.arithmetic import Linear, Native
from minqwen.model.trace import Tap
from minqwen.parallel import Mesh

WARM_UP = 30  # steps in which the learning rates rise from nothing
LOG_EVERY = 20  # steps
REPEATS_EVERY = 8  # steps between two sets of generated rows
REPEATS_MADE = 64  # rows of a set
REPEATS_ROWS = 16  # of those that repeat something, so many are in a step
NEVER = -1e4  # the logit of a token that is not to come (the engine refuses infinity)
REPEATS_TOKENS = 64  # of a generated row
UNLIKELY = 0.05  # a token that has a smaller probability is corrected by a teacher
REPEATS_GRAM = 4  # that many tokens must not come twice; the measure looks at two more


@dataclass(frozen=True)
class Settings:
    """What the command line says about a training."""

    minutes: float  # of training; not counted if `steps` says otherwise
    steps: int | None
    out: Path  # the checkpoint
    run: Path  # the state to go on from, the log, the tokenizer
    start_from: Path | None  # the checkpoint whose weights are the first ones
    teacher: Path | None  # the checkpoint that corrects the model's greedy text; None: itself
    seed: int
    threads: int
    workers: int  # processes that make chats; 0: the training makes them itself
    device: str
    rows: int  # of a step
    text_share: float  # of the rows
    dropout: float  # where a model reads text
    blanked: float  # the part of the text's tokens that a model does not see
    weight_decay: float
    repeats_from: float  # the part of the training after which repetition is unlearnt
    evaluate_every: float  # minutes between short measures
    save_every: float  # minutes between saved states
    curve: int  # how often the loss on the held-out chapters is taken
    rates: Rates
    loss_weights: dict[str, float]  # by a name of KINDS
    compile: bool
    quiet: bool

    @property
    def text_rows(self) -> int:
        return min(self.rows, max(1, round(self.rows * self.text_share)))

    @property
    def chat_rows(self) -> int:
        return self.rows - self.text_rows


@dataclass
class Progress:
    """How far a run has come."""

    seed: int
    step: int = 0
    seconds: float = 0.0  # of training, without measures
    tokens: int = 0


# ---- the model ----------------------------------------------------------------------------------


class Training(Native):
    """Native, but attention keeps no scores and no pattern for the backward pass; with dropout.

    torch's fused attention computes them again where it needs them. A step of training takes 0.6 of
    the time that it takes with Native's own attention (0.4 if the layers are not compiled). The
    batches of training have no cache, so whatever is hidden is hidden causally.

    dropout: the part of what a layer adds to its input that is set to zero, by chance; and, on a
    GPU, half of that part of the attention pattern.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        # On a CPU torch's fused attention has no dropout, and a step would take four times as long.
        dropout = self.dropout / 2 if q.is_cuda else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=hidden is not None, scale=scale
        )

    def row_parallel_linear(self, x: Tensor, linear: Linear, mesh: Mesh) -> Tensor:
        y = super().row_parallel_linear(x, linear, mesh)
        return F.dropout(y, self.dropout) if self.dropout else y


def new_model(config: ModelConfig, device: str = "cpu") -> Qwen2:
    """A model to train: random weights with which every layer begins as the identity."""
    model = Qwen2(config, arithmetic=Training())
    starts_at_zero = ("o_proj.weight", "down_proj.weight", "lm_head.weight", "bias")
    for name, p in model.named_parameters():
        if name == "model.embed_tokens.weight":
            nn.init.normal_(p, std=0.5)
        elif name.endswith(starts_at_zero):
            nn.init.zeros_(p)
        elif name.endswith("norm.weight"):
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model.to(device).requires_grad_()


def shared(model: Qwen2, arithmetic: Native) -> Qwen2:
    """Another model with the same parameters, the same objects, and this arithmetic."""
    other = Qwen2(model.config, arithmetic=arithmetic, device="meta")
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(module), leaf, p)
    return other


def compile_layers(model: Qwen2) -> None:
    """One graph for all layers; saves a seventh of the time on a CPU. It needs a C++ compiler."""
    if shutil.which(os.environ.get("CXX", "g++")):
        for layer in model.model.layers:
            layer.compile(dynamic=False)


# ---- gradients ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """The weighted sum of the mean losses of every kind of target."""

    weights: Tensor  # [kinds]
    counts: Tensor  # [kinds], how many targets of each kind the whole step has

    @staticmethod
    def of(step: list[Part], weights: dict[str, float], device: str) -> Loss:
        kinds = torch.cat([part.examples.kinds.flatten() for part in step])
        counts = torch.bincount(kinds, minlength=len(KINDS)).clamp(min=1).float()
        for part in step:
            counts[REPEAT] = max(float(counts[REPEAT]), part.least_repeats)
        by_kind = torch.tensor([weights.get(kind, 0.0) for kind in KINDS])
        return Loss(by_kind.to(device), counts.to(device))


@dataclass(frozen=True)
class Part:
    """What one thread computes of a step."""

    model: Qwen2
    examples: Examples
    least_repeats: float = 1.0  # fewer repeats than these count as so many


def backward(model: Qwen2, step: list[Part], loss: Loss, pool: Executor) -> Tensor:
    """Set the gradient of `loss`; returns the mean loss of each kind [kinds].

    Threads share the parts, not the operations: beside other work on the same cores, two threads
    that meet once in a step lose far less time than two that meet at every matrix product.
    """
    means = torch.zeros_like(loss.weights)
    # `map` returns in the order of the parts: the sum is the same, whichever thread ends first.
    for part_means, grads in pool.map(lambda part: part_gradients(part, loss), step):
        means += part_means
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
    return means


def part_gradients(part: Part, loss: Loss) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A part's share of the mean losses, and its share of the gradient of each parameter."""
    means = part_means(part, loss.counts)
    grads = torch.autograd.grad((means * loss.weights).sum(), list(part.model.parameters()))
    return means.detach(), grads


def part_means(part: Part, counts: Tensor) -> Tensor:
    """A part's share of the mean loss of each kind [kinds]."""
    model, examples, device = part.model, part.examples, part.model.device
    at = (examples.kinds.flatten() != NOTHING).nonzero()[:, 0]  # on the CPU: nothing waits for it
    kinds, targets = examples.kinds.flatten()[at], examples.targets.flatten()[at]
    ids, at, kinds, targets = (_send(x, device) for x in (examples.inputs, at, kinds, targets))
    rows, length = ids.shape
    batch = dataclasses.replace(Batch.dense(rows, length, device=device), logits_at=at)
    with half_precision(device):
        logits = model(ids.flatten(), batch)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.new_zeros(len(KINDS)).index_add(0, kinds, losses) / counts


def _send(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def half_precision(device: torch.device) -> torch.autocast:
    """On a GPU matrix products are computed in bfloat16; the weights stay float32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


# ---- repetition ---------------------------------------------------------------------------------


class Unrepeated:
    """Greedy decoding of a row in which no REPEATS_GRAM tokens come twice, as a hook of logits."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.changed = list(ids), [False] * len(ids)
        self.forbidden: list[list[int]] = [[] for _ in ids]  # what would have come twice
        self.following: dict[tuple[int, ...], set[int]] = {}
        for end in range(REPEATS_GRAM, len(ids) + 1):
            self._note(self.ids[end - REPEATS_GRAM : end])

    def __call__(self, x: Tensor, name: str) -> Tensor:
        """x [1, T, V]: the last row is that of the next token."""
        row = x[0, -1].clone()
        first = int(row.argmax())
        self.forbidden.append(list(self.following.get(tuple(self.ids[1 - REPEATS_GRAM :]), ())))
        row[self.forbidden[-1]] = NEVER
        self.ids.append(int(row.argmax()))
        self.changed.append(self.ids[-1] != first)
        self._note(self.ids[-REPEATS_GRAM:])
        return torch.cat([x[:, :-1], row[None, None]], 1)

    def _note(self, gram: list[int]) -> None:
        self.following.setdefault(tuple(gram[:-1]), set()).add(gram[-1])


class Writer:
    """Greedy text of the model as it is, in which nothing comes twice, and what is taught of it.

    Where the likeliest token would have come twice, the likeliest other one is taught: to the model
    itself, or, with `teacher`, a checkpoint, to both, by the product of their probabilities. A
    teacher also corrects tokens that it holds for unlikely: without it, a long training drifts to
    strings of punctuation.
    """

    def __init__(self, model: Qwen2, teacher: Qwen2 | None = None) -> None:
        blocks = REPEATS_MADE * (REPEATS_TOKENS + PROMPT_TOKENS) // 16
        native = shared(model, Native())
        self.engine = LLM(native, num_blocks=blocks + REPEATS_MADE, max_num_seqs=REPEATS_MADE)
        self.params = SamplingParams(temperature=0, max_tokens=REPEATS_TOKENS, ignore_eos=True)
        self.teacher = teacher

    def examples(self, prompts: Tensor) -> Examples | None:
        """What is taught of the text after `prompts` [B, T].

        Rows that would have repeated nothing anyway are left out; None: there are no others.
        """
        rows = [Unrepeated(ids) for ids in prompts.tolist()]
        with half_precision(self.engine.model.device):
            for row in rows:
                self.engine.add_request(row.ids, self.params, hooks=[("logits", row)])
            while self.engine.has_unfinished_requests:
                self.engine.step()
        rows = [row for row in rows if any(row.changed)]
        if not rows:
            return None
        ids, taught = (torch.tensor([getattr(row, x) for row in rows]) for x in ("ids", "changed"))
        examples = Examples.of(ids, torch.where(taught, REPEAT, NOTHING))
        return examples if self.teacher is None else self.corrected(examples, rows, self.teacher)

    @torch.no_grad()
    def corrected(self, examples: Examples, rows: list[Unrepeated], teacher: Qwen2) -> Examples:
        """The same with what the model and its teacher together would have said."""
        ids = examples.inputs.to(teacher.device)
        with half_precision(teacher.device):
            logits, own = (model(ids).float().cpu() for model in (teacher, self.engine.model))
        first = len(rows[0].ids) - REPEATS_TOKENS - 1  # the column of the first token's target
        said = logits.softmax(-1).gather(-1, examples.targets[..., None])[..., 0]
        unlikely = said < UNLIKELY
        unlikely[:, :first] = False
        logits += own
        for row, written in zip(logits, rows):
            for at, forbidden in enumerate(written.forbidden[1:]):
                row[at, forbidden] = NEVER
        kinds = examples.kinds.masked_fill(unlikely, REPEAT)
        return Examples(examples.inputs, logits.argmax(-1), kinds)


# ---- the run ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A model on its way; `settings.run` keeps what is needed to go on."""

    settings: Settings
    model: Qwen2
    text: Text
    supply: Supply | None  # None: text only
    pool: Executor
    progress: Progress = field(init=False)
    repeats: Examples | None = None

    def __post_init__(self) -> None:
        s = self.settings
        self.progress = Progress(s.seed)
        self.optimizers = make_optimizers(self.model, s.rates, s.weight_decay, self.pool)
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.state_file = s.run / "state.pt"
        self.readers = {
            of_text: shared(self.model, Training(s.dropout if of_text else 0.0))
            for of_text in (True, False)
        }
        teacher = None
        if s.teacher is not None:
            teacher = Qwen2.from_pretrained(s.teacher, dtype="float32", device=s.device)
        self.writer = Writer(self.model, teacher)

    def done(self) -> float:
        """The part of the training that lies behind us; 1 or more at its end."""
        if self.settings.steps is not None:
            return self.progress.step / self.settings.steps
        return self.progress.seconds / 60 / self.settings.minutes

    def resume(self) -> None:
        """Go on from the saved state, if there is one. Raises MinqwenError for another run's."""
        if not self.state_file.exists():
            return
        saved = _read_state(self.state_file, self.settings.device)
        if saved["progress"]["seed"] != self.settings.seed:
            raise MinqwenError(
                f"{self.state_file}: is a run of seed {saved['progress']['seed']}, expected "
                f"{self.settings.seed}; give its seed, or another --run"
            )
        self.progress = Progress(**saved["progress"])
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)

    def save(self) -> None:
        """Write the state, in one step, and the checkpoint."""
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = self.state_file.with_suffix(".new")
        torch.save(state, temporary)
        os.replace(temporary, self.state_file)
        save_checkpoint(self.model, self.settings.run / "tokenizer", self.settings.out)

    def parts(self, towards_the_end: bool = False) -> list[Part]:
        """The step's text, chats and, towards the end of the training, repetitions."""
        s, step = self.settings, self.progress.step
        blank = self.model.config.vocab_size - 1  # a row that no token uses
        examples = [self.text.examples(step * s.text_rows, s.text_rows, s.blanked, blank)]
        if self.supply is not None:
            examples.append(self.supply.examples(step))
        parts = [Part(self.readers[some.from_text], some) for some in examples]
        if towards_the_end:
            parts += self.repetitions()
        return parts

    def repetitions(self) -> list[Part]:
        """Generated rows that repeat something, others in every step."""
        step = self.progress.step
        if self.repeats is None or step % REPEATS_EVERY == 0:
            self.repeats = self.writer.examples(self.text.prompts(step, REPEATS_MADE))
        if self.repeats is None:
            return []
        count = len(self.repeats.inputs)
        rows = torch.from_numpy(np.random.default_rng([step]).permutation(count)[:REPEATS_ROWS])
        made = self.repeats
        some = Examples(made.inputs[rows], made.targets[rows], made.kinds[rows])
        return [Part(self.model, some, least_repeats=REPEATS_ROWS * REPEATS_TOKENS / 20)]

    def advance(self) -> dict[str, float]:
        """One step of training; returns what the log says of it, or nothing between two lines."""
        began = time.monotonic()
        parts = self.parts(self.supply is not None and self.done() >= self.settings.repeats_from)
        loss = Loss.of(parts, self.settings.loss_weights, self.settings.device)
        means = backward(self.model, parts, loss, self.pool)
        scale = min(1.0, (self.progress.step + 1) / WARM_UP) * max(0.0, 1 - self.done())
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        record = {}
        if self.progress.step % LOG_EVERY == 0:  # to read a loss is to wait for the device
            record = {kind: round(x, 4) for kind, x in zip(KINDS[1:], means[1:].tolist())}
        self.progress.seconds += time.monotonic() - began
        self.progress.tokens += sum(part.examples.inputs.numel() for part in parts)
        if record:
            rate = round(self.progress.tokens / self.progress.seconds)
            record = {**asdict(self.progress), **record, "tokens_per_second": rate}
        return record


def _read_state(path: Path, device: str) -> dict[str, Any]:
    try:
        saved: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch.load raises whatever the damage leads to
        raise MinqwenError(f"{path}: is damaged; remove it, or give another --run") from None
    if not isinstance(saved, dict) or set(saved) != {"progress", "model", "optimizers"}:
        raise MinqwenError(
            f"{path}: is not a state of this program; remove it, or give another --run"
        )
    return saved


def warm_up(run: Run) -> None:
    """Compute every part of a step once, the repetitions too.

    torch.compile is not for threads, so it compiles here; and what cannot work on this machine
    fails now and not at the end.
    """
    counts = torch.ones(len(KINDS), device=run.settings.device)
    parts = run.parts(towards_the_end=run.supply is not None)
    for part in parts:
        part_means(part, counts).sum().backward()
    run.model.zero_grad(set_to_none=True)
    run.repeats = None


@dataclass
class Looks:
    """What is measured and saved while a model is trained, and when."""

    run: Run
    tokenizer: Tokenizer
    heldout: list[Chapter]
    saves: bool

    def __post_init__(self) -> None:
        s, seconds = self.run.settings, self.run.progress.seconds
        self.next_look = seconds + 60 * s.evaluate_every
        self.next_save = seconds + 60 * s.save_every
        self.next_point = self.run.done() + 1 / (s.curve + 1)

    def after_step(self) -> None:
        s, seconds, done = self.run.settings, self.run.progress.seconds, self.run.done()
        if done >= 1:
            return
        if self.saves and seconds >= min(self.next_save, self.next_look):
            self.run.save()
            self.next_save = seconds + 60 * s.save_every
        if seconds >= self.next_look:
            _look(self.run, self.tokenizer, self.heldout)
            self.next_look = seconds + 60 * s.evaluate_every
        if s.curve and done >= self.next_point:
            write_log(self.run, {"step": self.run.progress.step, **self.point()})
            self.next_point = done + 1 / (s.curve + 1)

    def point(self) -> dict[str, float]:
        """A point of the curve: the loss on the held-out chapters."""
        loss = heldout_loss(rounded(self.run.model), self.tokenizer, self.heldout)
        point = {
            "done": round(self.run.done(), 3),
            "heldout_nats_per_token": round(loss.nats_per_token, 4),
            "heldout_bits_per_byte": round(loss.bits_per_byte, 4),
        }
        tqdm.write(json.dumps({"step": self.run.progress.step, **point}))
        return point


def write_log(run: Run, record: dict[str, float]) -> None:
    with open(run.settings.run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Source:
    """What a model is trained on and watched with."""

    trained: list[Chapter]
    heldout: list[Chapter]
    tokenizer: Tokenizer


def train(settings: Settings, model: Qwen2, source: Source, saves: bool = True) -> Progress:
    """Train to the end, from the beginning or from the saved state; returns how far it came.

    saves=False: neither the state nor a checkpoint is written.
    """
    with ExitStack() as stack:
        threads = 1 if settings.device != "cpu" else settings.threads
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        text = Text(source.trained, source.tokenizer, settings.seed)
        run = Run(settings, model, text, _supply(settings, source, stack), pool)
        if saves:
            run.resume()
        if settings.compile:
            for reader in run.readers.values():
                compile_layers(reader)
        warm_up(run)
        if saves:
            run.save()
        looks = Looks(run, source.tokenizer, source.heldout, saves)
        bar = _progress_bar(run)
        while run.done() < 1:
            record = run.advance()
            if record:
                _show(bar, run, record)
                write_log(run, record)
            looks.after_step()
        bar.close()
        if saves:
            run.save()
        return run.progress


def _supply(settings: Settings, source: Source, stack: ExitStack) -> Supply | None:
    if settings.chat_rows == 0:
        return None
    chats = Chats(source.trained, source.tokenizer, settings.seed)
    workers = None
    if settings.workers:
        workers = ProcessPoolExecutor(
            settings.workers,
            mp_context=get_context("spawn"),  # a forked process would share the GPU's state
            initializer=start_worker,
            initargs=(source.trained, settings.run / "tokenizer", settings.seed),
        )
        stack.callback(workers.shutdown, cancel_futures=True)
    return Supply(chats, settings.chat_rows, workers, grown=settings.start_from is not None)


def _progress_bar(run: Run) -> tqdm[Any]:
    return tqdm(
        total=100,
        unit="%",
        initial=round(100 * min(run.done(), 1), 2),
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {elapsed}{postfix}",
        disable=run.settings.quiet,
    )


def _show(bar: tqdm[Any], run: Run, record: dict[str, float]) -> None:
    bar.update(round(100 * min(run.done(), 1), 2) - bar.n)
    shown: dict[str, object] = {"step": run.progress.step, "tok_s": record["tokens_per_second"]}
    for name in KINDS[1:]:
        shown[name] = f"{record[name]:.3f}"
    bar.set_postfix(shown)


def _look(run: Run, tokenizer: Tokenizer, heldout: list[Chapter]) -> None:
    """Print a short measure of the model as it is now."""
    began = time.monotonic()
    report = measure_briefly(rounded(run.model), tokenizer, heldout)
    took = time.monotonic() - began
    minutes, step = run.progress.seconds / 60, run.progress.step
    tqdm.write(f"{minutes:.1f} min, step {step}: {report.to_json()} ({took:.0f} s)")
