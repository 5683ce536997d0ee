"""Under exact arithmetic log probabilities and sampled texts are the same on every degree."""

from __future__ import annotations

import json

from support.forked import forked
from support.paths import EMBEDDED

STORY = """
import json, sys
from minqwen import LLM, SamplingParams

prompts = [list(range(100, 140)), [7], list(range(900, 960))]
drawn = dict(max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=1)
params = [
    SamplingParams(temperature=0.9, seed=1, **drawn),
    SamplingParams(temperature=1.3, top_p=0.9, min_p=0.01, seed=2, **drawn),
    SamplingParams(temperature=0.7, top_k=30, seed=3, **drawn),
]
llm = LLM(sys.argv[1], dtype="bfloat16", arithmetic=sys.argv[2], max_model_len=128, num_blocks=40)
told = []
for output in llm.generate(prompts, params, use_tqdm=False):
    (text,) = output.outputs
    entries = [e for e in (*output.prompt_logprobs, *text.logprobs) if e]
    values = [[(i, x.logprob.hex(), x.rank) for i, x in e.items()] for e in entries]
    told.append([text.token_ids, values])
if llm.mesh.rank == 0:
    print(json.dumps(told))
"""


def told(tmp_path, ranks, arithmetic):
    script = tmp_path / "story.py"
    script.write_text(STORY)
    done = forked(ranks, script, [EMBEDDED, arithmetic])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_ranks_draw_and_tell_what_one_does(tmp_path):
    assert told(tmp_path, 2, "exact") == told(tmp_path, 1, "exact")
    assert told(tmp_path, 2, "native") != told(tmp_path, 1, "native")  # the control
