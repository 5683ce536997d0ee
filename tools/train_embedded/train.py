"""The training: minqwen's own Qwen2, its gradients, and a run that can be stopped and go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from card import measure_briefly
from checkpoint import rounded, save_checkpoint
from data import ANSWER, NOTHING, TEXT, Data, Examples
from optimizer import Rates, make_optimizers
from torch import Tensor, nn
from tqdm import tqdm

from minqwen import ModelConfig, Qwen2, Tokenizer
from minqwen.errors import MinqwenError
from minqwen.lab.tasks import Chapter, logits_where
from minqwen.model.arithmetic import Native
from minqwen.model.trace import Tap

WARM_UP = 30  # steps in which the learning rates rise from nothing

Means = dict[str, float]  # mean loss by what counts: "text", "sum", "needle"


@dataclass(frozen=True)
class Settings:
    """What the command line says about a training."""

    minutes: float  # of training; not counted if `steps` says otherwise
    steps: int | None
    out: Path  # the checkpoint
    run: Path  # the state to go on from, the log, the tokenizer
    seed: int
    threads: int
    evaluate_every: float  # minutes between short measures
    rates: Rates
    loss_weights: dict[str, float]  # of "text", "sum" and "needle"
    compile: bool
    quiet: bool


@dataclass
class Progress:
    """How far a run has come."""

    seed: int
    step: int = 0
    seconds: float = 0.0  # of training, without measures
    tokens: int = 0


# ---- the model ----------------------------------------------------------------------------------


class Training(Native):
    """Native, but attention keeps no scores and no pattern for the backward pass.

    torch's fused attention computes them again where it needs them. A step of training takes 0.6 of
    the time that it takes with Native's own attention (0.4 if the layers are not compiled). The
    batches of training have no cache, so whatever is hidden is hidden causally.
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, tap: Tap
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=hidden is not None, scale=scale)


def new_model(config: ModelConfig) -> Qwen2:
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
    return model.requires_grad_()


def compile_layers(model: Qwen2) -> None:
    """One graph for all layers; saves a seventh of the time on a CPU. It needs a C++ compiler."""
    if shutil.which(os.environ.get("CXX", "g++")):
        for layer in model.model.layers:
            layer.compile(dynamic=False)


# ---- gradients ----------------------------------------------------------------------------------


def backward(
    model: Qwen2, step: list[Examples], loss_weights: dict[str, float], pool: Executor
) -> Means:
    """Set the gradient of the weighted sum of the mean losses of text, sums and needles.

    Threads share the batches, not the operations: beside other work on the same cores, two threads
    that meet once in a step lose far less time than two that meet at every matrix product.
    """
    counts = dict.fromkeys(loss_weights, 0)
    for examples in step:
        counts["text"] += int((examples.kinds == TEXT).sum())
        counts[examples.skill] += int((examples.kinds == ANSWER).sum())

    def gradients(examples: Examples) -> tuple[Means, tuple[Tensor, ...]]:
        return part_gradients(model, examples, loss_weights, counts)

    total = dict.fromkeys(loss_weights, 0.0)
    # `map` returns in the order of the batches: the sum is the same, whichever thread ends first.
    for means, grads in pool.map(gradients, step):
        for name, mean in means.items():
            total[name] += mean
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
    return total


def part_gradients(
    model: Qwen2, examples: Examples, loss_weights: dict[str, float], counts: dict[str, int]
) -> tuple[Means, tuple[Tensor, ...]]:
    """One batch's share of the mean losses, and its share of the gradient of each parameter.

    counts: how many targets of each kind the whole step has.
    """
    scored = examples.kinds != NOTHING
    logits = logits_where(model, examples.inputs, scored)
    losses = F.cross_entropy(logits, examples.targets[scored], reduction="none")
    kinds, skill = examples.kinds[scored], examples.skill
    text = losses[kinds == TEXT].sum() / max(counts["text"], 1)
    answers = losses[kinds == ANSWER].sum() / max(counts[skill], 1)
    loss = loss_weights["text"] * text + loss_weights[skill] * answers
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return {"text": float(text.detach()), skill: float(answers.detach())}, grads


# ---- the run ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A model on its way; `settings.run` keeps what is needed to go on."""

    settings: Settings
    model: Qwen2
    data: Data
    pool: Executor
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(self.settings.seed)
        self.optimizers = make_optimizers(self.model, self.settings.rates, self.pool)
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.state_file = self.settings.run / "state.pt"

    def done(self) -> float:
        """The part of the training that lies behind us; 1 or more at its end."""
        if self.settings.steps is not None:
            return self.progress.step / self.settings.steps
        return self.progress.seconds / 60 / self.settings.minutes

    def resume(self) -> None:
        """Go on from the saved state, if there is one. Raises MinqwenError for another run's."""
        if not self.state_file.exists():
            return
        saved = _read_state(self.state_file)
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

    def advance(self) -> dict[str, float]:
        """One step of training; returns what the log says of it."""
        began = time.monotonic()
        step = self.data.step(self.progress.step)
        means = backward(self.model, step, self.settings.loss_weights, self.pool)
        scale = min(1.0, (self.progress.step + 1) / WARM_UP) * (1 - self.done())
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens = sum(examples.inputs.numel() for examples in step)
        seconds = time.monotonic() - began
        self.progress.step += 1
        self.progress.seconds += seconds
        self.progress.tokens += tokens
        return {**asdict(self.progress), **means, "tokens_per_second": round(tokens / seconds)}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        saved: Any = torch.load(path, weights_only=True)
    except Exception:  # torch.load raises whatever the damage leads to
        raise MinqwenError(f"{path}: is damaged; remove it, or give another --run") from None
    if not isinstance(saved, dict) or set(saved) != {"progress", "model", "optimizers"}:
        raise MinqwenError(
            f"{path}: is not a state of this program; remove it, or give another --run"
        )
    return saved


def warm_up(model: Qwen2, data: Data) -> None:
    """Compile for every shape of a batch; here, because torch.compile is not for threads."""
    for examples in data.step(0) + data.step(1):
        logits_where(model, examples.inputs, examples.kinds != NOTHING).sum().backward()
    model.zero_grad(set_to_none=True)


def train(
    settings: Settings, model: Qwen2, tokenizer: Tokenizer, data: Data, heldout: list[Chapter]
) -> Progress:
    """Train to the end, from the beginning or from the saved state; returns how far it came."""
    with ThreadPoolExecutor(settings.threads) as pool:
        run = Run(settings, model, data, pool)
        run.resume()
        if settings.compile:
            compile_layers(model)
        warm_up(model, data)
        bar = _progress_bar(run)
        next_look = run.progress.seconds + 60 * settings.evaluate_every
        while run.done() < 1:
            record = run.advance()
            _show(bar, run, record)
            with open(settings.run / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            if run.progress.seconds >= next_look and run.done() < 1:
                run.save()
                _look(run, tokenizer, heldout)
                next_look = run.progress.seconds + 60 * settings.evaluate_every
        bar.close()
        run.save()
        return run.progress


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
    for name in run.settings.loss_weights:
        shown[name] = f"{record[name]:.3f}"
    bar.set_postfix(shown)


def _look(run: Run, tokenizer: Tokenizer, heldout: list[Chapter]) -> None:
    """Print a short measure of the model as it is now."""
    began = time.monotonic()
    report = measure_briefly(rounded(run.model), tokenizer, heldout)
    took = time.monotonic() - began
    minutes, step = run.progress.seconds / 60, run.progress.step
    tqdm.write(f"{minutes:.1f} min, step {step}: {report.to_json()} ({took:.0f} s)")
