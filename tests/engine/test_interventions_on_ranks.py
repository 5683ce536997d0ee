"""Models that change on one rank, and hooks by name, on two ranks: all make the same steps."""

from __future__ import annotations

import json

import torch
from support.forked import forked
from support.paths import EMBEDDED

from minqwen import LLM, SamplingParams

IDS = list(range(100, 140))
STORY = """
import json, sys
import torch
from minqwen import LLM, SamplingParams

ids = list(range(100, 140))
few = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
llm = LLM(sys.argv[1], dtype="float64", max_model_len=128, num_blocks=40)
mine = llm.mesh.rank

def ask(**options):
    output = llm.generate([ids], few, use_tqdm=False, **options)[0]
    told.append([output.outputs[0].token_ids, output.num_cached_tokens])

told = []
ask()
ask(hooks=[("layers.1.attn.z", lambda x, name: x * 3)])
ask()
if mine == 1:  # a change that the other rank cannot see
    llm.model.model.layers[0].self_attn.o_proj.weight.zero_()
ask()
running = llm.add_request(ids, few)
for _ in range(5):
    llm.step()
if mine == 1:
    llm.model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: y * 1)
while llm.has_unfinished_requests:
    outputs = [d.output for d in llm.step() if d.output]
told.append([outputs[0].outputs[0].token_ids, outputs[0].num_cached_tokens])
ask()

def broken(x, name):
    if mine == 1 and x.shape[1] == 1:
        raise KeyError("no such feature")

failed = llm.add_request(ids, few, hooks=[("layers.0.mlp.out", broken)])
beside = llm.add_request(ids, few)
outputs = {}
while llm.has_unfinished_requests:
    outputs |= {d.request_id: d.output for d in llm.step() if d.output}
assert outputs[failed].error and len(outputs[failed].outputs[0].token_ids) == 1, outputs
told.append([outputs[beside].outputs[0].token_ids, 0])
sys.stdout.write(f"rank {mine}: {json.dumps(told)}\\n")  # at once: the other rank writes too
"""


def test_a_change_on_one_rank_is_a_change_for_all():
    run = forked(2, STORY, [EMBEDDED])
    assert run.returncode == 0, run.stderr
    told = {
        line[:6]: json.loads(line[8:]) for line in run.stdout.splitlines() if line[:4] == "rank"
    }
    assert told["rank 0"] == told["rank 1"]

    few = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = LLM(EMBEDDED, dtype="float64", max_model_len=128, num_blocks=40)

    def ask(**options):
        output = llm.generate([IDS], few, use_tqdm=False, **options)[0]
        return [output.outputs[0].token_ids, output.num_cached_tokens]

    want = [ask(), ask(hooks=[("layers.1.attn.z", lambda x, name: x * 3)]), ask()]
    weight = llm.model.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, weight.shape[1] // 2 :].zero_()
    changed = ask()
    # The running request had begun with the changed model's blocks, and was computed again.
    # The last one ran beside a request whose hook failed on one rank, and so on both.
    want += [changed, [changed[0], 0], [changed[0], 0], [changed[0], 0]]
    assert told["rank 0"] == want
    assert want[0][0] != want[1][0] and want[0][0] != changed[0] and want[2][1] == 32
