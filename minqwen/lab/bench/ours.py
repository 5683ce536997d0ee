"""minqwen as a contestant: its engine, and the bare model over one contiguous block a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from minqwen.engine.llm import LLM
from minqwen.errors import MinqwenError
from minqwen.lab.bench.jobs import Ask
from minqwen.lab.bench.setup import Engine, Setup, with_heads
from minqwen.lab.bench.timing import Run, Stopwatch
from minqwen.lab.shapes import random_model
from minqwen.model import Batch, Qwen2
from minqwen.parallel import Mesh
from minqwen.sampling.params import SamplingParams

BLOCK_SIZE = 16  # tokens
CAPTURED_BLOCK_SIZE = 64  # as many keys as a kernel of flex_attention reads at a time


def load(setup: Setup, mesh: Mesh) -> Engine:
    """The model on this rank, and the engine around it if that takes part."""
    model = load_model(setup, mesh)
    return Bare(model, setup.device) if setup.contestant.bare else Scheduled(model, setup)


def load_model(setup: Setup, mesh: Mesh) -> Qwen2:
    """From the checkpoint, or of random weights; with other numbers of heads if there are any."""
    contestant = setup.contestant
    if setup.model is not None:
        return Qwen2.from_pretrained(
            setup.model,
            dtype=contestant.form,
            device=setup.device,
            arithmetic=contestant.arithmetic,
            num_attention_heads=contestant.heads,
            mesh=mesh,
        )
    return random_model(
        with_heads(setup.config(), contestant.heads),
        dtype=getattr(torch, contestant.form),
        device=mesh.device if mesh.world.size > 1 else setup.device,
        arithmetic=contestant.arithmetic,
        mesh=mesh,
    )


class Scheduled:
    """Through the engine's steps: scheduling, blocks, sampling and text included."""

    def __init__(self, model: Qwen2, setup: Setup):
        self.captured = captured = setup.contestant.captured
        block_size = CAPTURED_BLOCK_SIZE if captured else BLOCK_SIZE
        per_seq = -(-setup.longest // block_size)
        self.device, self.vocab_size = model.device.type, model.config.vocab_size
        self.llm = LLM(
            model,
            max_model_len=setup.longest,
            block_size=block_size,
            enforce_eager=not captured,
            num_blocks=setup.batch * per_seq,
            max_num_seqs=setup.batch,
            max_num_batched_tokens=setup.step_tokens,
            enable_prefix_caching=False,
        )

    def run(self, asks: list[Ask]) -> Run:
        params = [
            SamplingParams(temperature=0, max_tokens=ask.new, ignore_eos=True) for ask in asks
        ]
        if self.llm.mesh.replicas > 1:
            return self._run_replicas(asks, params)
        watch = Stopwatch(self.device)
        found: dict[str, list[int]] = {}
        for ask, each in zip(asks, params):
            found[self.llm.add_request(ask.prompt, each)] = []
        while self.llm.has_unfinished_requests:
            # As `generate` makes steps: no code of a caller runs between two of them.
            for delta in self.llm.core.step(undisturbed=len(watch.marks) > 0):
                found[delta.request_id] += delta.token_ids
            watch.mark(sum(map(len, found.values())), sum(map(bool, found.values())))
        self._check_captured()
        return Run(watch.marks, list(found.values()))

    def _check_captured(self) -> None:
        """Raise MinqwenError if what was measured is another thing than was asked for."""
        runner = self.llm.core.runner
        if self.captured and runner.steps is None:
            raise MinqwenError(f"steps are not captured: {runner.why_eager}")

    def _run_replicas(self, asks: list[Ask], params: list[SamplingParams]) -> Run:
        """All at once: of several replicas only the first tokens and the end are known."""
        watch = Stopwatch(self.device)
        prompts = [ask.prompt for ask in asks]
        first = self.llm.generate(
            prompts,
            [SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)] * len(asks),
            use_tqdm=False,
        )
        watch.mark(len(first), len(first))
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        tokens = [output.outputs[0].token_ids for output in outputs]
        watch.mark(sum(map(len, tokens)), len(tokens))
        start = watch.marks[0]
        end = watch.marks[1]
        end = end._replace(wall=end.wall - start.wall, processor=end.processor - start.processor)
        return Run([start, end], tokens)


class Bare:
    """The forward pass and argmax alone, over a cache in which a sequence is one block."""

    def __init__(self, model: Qwen2, device: str):
        self.model, self.device, self.vocab_size = model, device, model.config.vocab_size

    @torch.inference_mode()
    def run(self, asks: list[Ask]) -> Run:
        length, new = len(asks[0].prompt), asks[0].new
        if any((len(ask.prompt), ask.new) != (length, new) for ask in asks):
            raise MinqwenError("the bare model runs requests of one length only")
        count = len(asks)
        cache = self.model.new_cache(count, length + new)
        ids = torch.tensor([ask.prompt for ask in asks], device=self.model.device)
        found: list[list[int]] = []
        watch = Stopwatch(self.device)
        for end in range(length, length + new):
            batch = Batch.paged(
                [ids.shape[1]] * count,
                [end] * count,
                [[i] for i in range(count)],
                length + new,
                num_logits=[1] * count,
                device=self.model.device,
            )
            logits: Tensor = self.model(ids.flatten(), batch, cache)
            ids = logits.argmax(-1)[:, None]
            found.append(ids[:, 0].tolist())
            watch.mark(count * len(found), count)
        return Run(watch.marks, [list(column) for column in zip(*found)])
