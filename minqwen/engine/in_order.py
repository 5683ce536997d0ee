"""The outputs of one call, in the order of its prompts, each as soon as its turn comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

from tqdm import tqdm

from minqwen.engine.outputs import Delta, RequestOutput
from minqwen.engine.replicas import Relay
from minqwen.engine.request import Request


class Outputs(Iterator[RequestOutput]):
    """What `LLM.iterate` returns.

    requests: those that this replica runs, by the number of their prompt; total: how many prompts
    there are. step: makes one step and returns what is new of these requests; it is told whether
    nobody can have touched the model since the last step. abort: drops those that are unfinished.

    finished: outputs whose turn has not come yet, by the number of their prompt. Whoever stops
    before the end finds there what would be lost.
    """

    def __init__(
        self,
        requests: dict[int, Request],
        total: int,
        step: Callable[[bool], Sequence[Delta]],
        abort: Callable[[], None],
        relay: Relay,
        use_tqdm: bool,
    ) -> None:
        self.finished: dict[int, RequestOutput] = {}
        self.next = 0  # the number of the prompt whose turn it is
        self._unfinished = {r.request_id: (i, r) for i, r in requests.items()}
        self._missing = total - len(requests)  # outputs of other replicas
        self._step, self._abort, self._relay = step, abort, relay
        hidden = None if use_tqdm and relay.receives else True
        self._bar = tqdm(total=total, desc="requests", leave=False, disable=hidden)
        self._tokens, self._finished, self._started = 0, 0, time.perf_counter()
        self._outputs = self._run()

    def __next__(self) -> RequestOutput:
        return next(self._outputs)

    def close(self) -> None:
        """Drop what is unfinished. With several replicas all ranks must call this."""
        self._outputs.close()
        self._end()

    def _end(self) -> None:
        self._abort()
        self._bar.close()

    def _run(self) -> Generator[RequestOutput, None, None]:
        try:
            undisturbed = False
            while self._unfinished:
                self._take_own(self._step(undisturbed))
                if self._missing and self._relay.receives:
                    self._take_others(self._relay.received())
                self._show()
                undisturbed = self._undisturbed()
                yield from self._due()
            if self._relay.mesh.replicas > 1:
                for found in self._relay.wait(self._missing):
                    self._take_others(found)
                    self._show()
                    yield from self._due()
        finally:
            self._end()

    def _due(self) -> Iterator[RequestOutput]:
        """Those whose turn has come."""
        while self.next in self.finished:
            self.next += 1
            yield self.finished.pop(self.next - 1)

    def _undisturbed(self) -> bool:
        """Whether the caller gets nothing, so that none of its code runs before the next step.

        All ranks of a replica must say the same. With several replicas they cannot: rank 0 gives
        its caller what another replica has finished.
        """
        return self._relay.mesh.replicas == 1 and self.next not in self.finished

    def _show(self) -> None:
        speed = self._tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
        self._bar.update(self._finished - self._bar.n)

    def _take_own(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._tokens += len(delta.token_ids)
            if delta.output is not None:
                index, _ = self._unfinished.pop(delta.request_id)
                self._take(index, delta.output)
        # Nothing reports an aborted request.
        for index, request in [both for both in self._unfinished.values() if both[1].finished]:
            del self._unfinished[request.request_id]
            self._take(index, request.output())

    def _take_others(self, found: Sequence[tuple[int, RequestOutput]]) -> None:
        self._missing -= len(found)
        for index, output in found:
            self._tokens += sum(len(one.token_ids) for one in output.outputs)
            self._take(index, output)

    def _take(self, index: int, output: RequestOutput) -> None:
        """Keep an output for the caller, or send it to rank 0, whose caller gets it.

        The other ranks of rank 0's replica do neither: rank 0 has the same output.
        """
        mesh = self._relay.mesh
        if mesh.replicas == 1 or self._relay.receives:
            self.finished[index] = output
            self._finished += 1
        elif mesh.replica > 0:
            self._relay.send(index, output)
