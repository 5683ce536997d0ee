"""The forward pass: transformers in every bit, float64 against numpy, RoPE, pages, ranks, gradients."""

import copy
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from support import numpy_qwen2
from support.torchrun import torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from minqwen.config import ModelConfig, RopeScaling
from minqwen.model import Batch, Native, Qwen2, attention, rope
from minqwen.model.qwen2 import Embedding, RowParallelLinear
from minqwen.parallel import Mesh, shard

transformers.utils.logging.set_verbosity_error()
HERE = Path(__file__).parent.parent
EMBEDDED = HERE.parent / "weights" / "embedded"
MODELS = json.loads((HERE / "data/configs.json").read_text())["models"]
OFFICIAL = {
    name: entry["config"] for name, entry in MODELS.items() if not name.endswith("Instruct")
}
GOLDEN = json.loads((HERE / "data/yarn_golden.json").read_text())["cases"]
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
TINY = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rope_parameters=PLAIN,
    tie_word_embeddings=False,
)


def yarn(factor, original=32768, theta=1e6, **more):
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        **more,
    }


@pytest.fixture(autouse=True)
def quiet_torch():
    """No autograd and one thread, unless a test asks for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def oracle(seed=0, kind=Qwen2ForCausalLM, config=Qwen2Config, **changes):
    """transformers' model, eager, float32, with weights that leave nothing at zero or one."""
    c = config(**({"initializer_range": 0.2} | TINY | changes))
    c._attn_implementation = "eager"
    torch.manual_seed(seed)
    hf = kind(c).eval()
    for name, p in hf.named_parameters():
        if name.endswith("bias"):
            p.normal_()
        elif "norm" in name:
            p.uniform_(0.5, 1.5)
    return hf


def cast(hf, dtype):
    """A copy in another dtype, as from_pretrained(dtype=...) makes it: `.to` alone would round inv_freq."""
    frequencies = hf.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    hf = copy.deepcopy(hf).to(dtype)
    hf.model.rotary_emb.inv_freq = frequencies
    return hf


def ours(hf, dtype=None, **options):
    """The same weights as a minqwen model."""
    dtype = dtype or hf.dtype
    model = Qwen2(ModelConfig.from_dict(hf.config.to_dict()), dtype=dtype, **options)
    model.load_state_dict(hf.state_dict())
    return model.prepare()


def tokens(model, *shape, seed=0):
    return torch.randint(
        0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)
    )


def error(a, b):
    """Largest difference, relative to the largest magnitude of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


# ------------------------------------------------------------------------------------ transformers, every bit


def configurations():
    """(name, changes to TINY, B, T): every official shape in three scales of its own, then random ones."""
    draw = random.Random(20240919)
    for name, c in OFFICIAL.items():
        H, D = c["num_attention_heads"], c["hidden_size"]
        shape = dict(
            num_attention_heads=H,
            num_key_value_heads=c["num_key_value_heads"],
            vocab_size=509,
            tie_word_embeddings=c["tie_word_embeddings"],
            rms_norm_eps=c["rms_norm_eps"],
        )
        name = name.removeprefix("Qwen/Qwen2.5-")
        width = c["intermediate_size"] * 8 * H // D
        narrow = shape | dict(hidden_size=8 * H, head_dim=8, intermediate_size=width)
        yield f"{name}-narrow", narrow, draw.randint(1, 3), draw.randint(1, 200)
        long = narrow | dict(rope_parameters=yarn(4.0))
        yield f"{name}-yarn", long, draw.randint(1, 3), draw.randint(1, 200)
        heads = shape | dict(
            hidden_size=72, head_dim=D // H, intermediate_size=100
        )  # its own head_dim
        yield f"{name}-heads", heads, draw.randint(1, 3), draw.randint(1, 100)
    yield (
        "0.5B-one-layer",
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            head_dim=64,
            num_hidden_layers=1,
            vocab_size=1000,
            tie_word_embeddings=True,
        ),
        2,
        37,
    )
    for B, G, T, d in (
        (2, 8, 3, 128),
        (5, 7, 3, 64),
        (4, 7, 5, 128),
    ):  # where strides decide the last bits
        yield (
            f"one-kv-head-{B}-{G}",
            dict(
                num_attention_heads=G,
                num_key_value_heads=1,
                head_dim=d,
                hidden_size=64,
                vocab_size=97,
            ),
            B,
            T,
        )
    lengths = [1, 1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 199, 200]
    for i in range(50):
        K, G = draw.choice([1, 2, 3, 4]), i % 8 + 1
        theta, original = draw.choice([1e4, 5e5, 1e6, 1e7]), draw.choice([64, 512, 32768])
        plain = {"rope_type": "default", "rope_theta": theta}
        yield (
            f"random-{i}",
            dict(
                num_key_value_heads=K,
                num_attention_heads=K * G,
                head_dim=draw.choice([2, 8, 10, 16, 32, 64, 128]),
                hidden_size=draw.choice([32, 48, 49, 64, 112, 224]),
                intermediate_size=draw.choice([64, 100, 161]),
                num_hidden_layers=draw.randint(1, 3),
                vocab_size=draw.choice([97, 128, 1000]),
                rms_norm_eps=draw.choice([1e-6, 1e-5]),
                tie_word_embeddings=draw.random() < 0.5,
                initializer_range=draw.choice([0.02, 0.2]),
                rope_parameters=draw.choice(
                    [plain, yarn(2.0, original, theta), yarn(4.0, original, theta)]
                ),
            ),
            draw.randint(1, 5),
            draw.choice(lengths),
        )


CONFIGURATIONS = list(configurations())
assert len(CONFIGURATIONS) >= 60


def differences(hf, model, ids):
    """None, or a line about the first thing in which logits of the two models are not the same bits."""
    theirs, mine = hf(ids).logits, model(ids)
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and theirs.isfinite().all()
    if not torch.equal(mine, theirs):
        where = (mine != theirs).sum().item()
        return f"{where} of {mine.numel()} logits differ, by up to {error(mine, theirs):.2g} of the largest"


# A call of transformers fills a cache unless told not to, and with one query head to each key/value head its
# keys then lie in memory as no others do; use_cache=False gives other bits in a tenth of such float32 cases.
MULTI_HEAD = pytest.param(
    2,
    dict(num_attention_heads=3, num_key_value_heads=3, head_dim=128, hidden_size=64),
    3,
    3,
    id="one-query-head-per-group",
)


@pytest.mark.parametrize(
    "i, changes, B, T",
    [*(pytest.param(i, *c[1:], id=c[0]) for i, c in enumerate(CONFIGURATIONS)), MULTI_HEAD],
)
def test_logits_are_transformers_in_every_bit(i, changes, B, T):
    original = oracle(seed=B * T, **changes)
    for dtype in (torch.float32, torch.bfloat16):
        hf = cast(original, dtype)
        model, ids = ours(hf), tokens(hf, B, T)
        for threads in (1, 2) if i % 4 == 0 else (1,):
            torch.set_num_threads(threads)
            assert not (found := differences(hf, model, ids)), (
                f"{dtype}, {threads} threads: {found}"
            )


@pytest.mark.skipif(not (EMBEDDED / "model.safetensors").exists(), reason="no embedded model yet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embedded_model_is_transformers_in_every_bit(dtype):
    hf = Qwen2ForCausalLM.from_pretrained(EMBEDDED, dtype=dtype, attn_implementation="eager").eval()
    assert hf.model.rotary_emb.inv_freq.dtype == torch.float32
    model = Qwen2.from_pretrained(EMBEDDED, dtype=dtype)
    for B, T in ((1, 1), (1, 128), (4, 50)):
        assert not (found := differences(hf, model, tokens(hf, B, T))), found


def test_every_module_gives_what_transformers_module_gives():
    """A forward hook means what it means in transformers, name by name, but on packed tokens."""
    hf = oracle()
    model, ids = ours(hf), tokens(hf, 2, 9)
    seen = {}

    def watch(root, key):
        for name, module in root.named_modules():

            def hook(module, args, out, name=name):
                out = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
                if isinstance(out, torch.Tensor):
                    seen.setdefault(name, {})[key] = out.reshape(-1, out.shape[-1])

            module.register_forward_hook(hook)

    watch(hf, "theirs"), watch(model, "mine")
    hf(ids), model(ids)
    both = {name: v for name, v in seen.items() if len(v) == 2}
    only = {name.rpartition(".")[2] for name, v in seen.items() if len(v) == 1}
    assert only == {"act_fn", "model", "rotary_emb"} & only, only
    assert (
        len(both) == 1 + 1 + 2 * (1 + 2 + 1 + 4 + 1 + 3) + 1 + 1
    )  # whole, embedding, layers, norm, head
    del both[""]
    for name, v in both.items():
        assert torch.equal(v["mine"], v["theirs"]), name


def test_a_hook_may_change_what_a_module_gives():
    hf = oracle()
    model, ids = ours(hf), tokens(hf, 2, 9)
    before = model(ids)
    for root in (hf, model):
        gate = root.get_submodule("model.layers.1.mlp.gate_proj")
        gate.register_forward_hook(lambda module, args, out: out * 2)
    assert not differences(hf, model, ids) and not torch.equal(model(ids), before)


def test_llama_by_name_is_the_same_function():
    """attention_bias gives Llama's o_proj a bias, which has to be zero in a Qwen2 model."""
    hf = oracle(kind=LlamaForCausalLM, config=LlamaConfig, attention_bias=True)
    for name, p in hf.named_parameters():
        if name.endswith("o_proj.bias"):
            p.zero_()
    for dtype in (torch.float32, torch.bfloat16):
        theirs = cast(hf, dtype)
        assert not (found := differences(theirs, ours(theirs), tokens(hf, 2, 33))), found


class Sabotaged(Native):
    """Native with mistakes that have been made elsewhere, one by name."""

    def __init__(self, how):
        self.how = how

    def rotary_table(self, config, length, dtype):
        if self.how == "unrounded rope":
            dtype = torch.float32
        cos, sin = super().rotary_table(config, length, dtype)
        if self.how == "1 ulp in cos":
            cos = cos.clone()
            cos[5, 0] = torch.nextafter(cos[5, 0], torch.tensor(2.0, dtype=dtype))
        if self.how == "positions from 1":
            cos, sin = super().rotary_table(config, length + 1, dtype)
            cos, sin = cos[1:], sin[1:]
        return cos, sin

    def linear(self, x, linear):
        if self.how == "no bias":
            return F.linear(x, linear.weight)
        if self.how == "bias after rounding" and linear.bias is not None:
            return F.linear(x, linear.weight) + linear.bias
        return super().linear(x, linear)

    def rms_norm(self, x, weight, eps):
        if self.how == "weight before the cast":
            return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)
        return super().rms_norm(x, weight, 0 if self.how == "no eps" else eps)

    def rotate(self, x, cos, sin):
        if self.how == "interleaved rope":
            pairs = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            return (
                super().rotate(pairs, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            )
        return super().rotate(x, cos, sin).to(x.dtype)

    def silu_mul(self, gate, up):
        if self.how == "silu unrounded":
            return (F.silu(gate.float()) * up.float()).to(gate.dtype)
        return super().silu_mul(gate, up)

    def attend(self, q, k, v, hidden, scale, tap):
        if self.how == "tiled heads":
            k, v = (x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2) for x in (k, v))
        if self.how == "sees the future":
            hidden = hidden & hidden.roll(1, 0)
        if self.how == "scaled queries":
            q, scale = q * scale, 1.0
        if self.how == "scores unrounded":
            pattern = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(
                hidden, float("-inf")
            )
            return pattern.softmax(-1).to(v.dtype) @ v
        return super().attend(q, k, v, hidden, scale, tap)


WRONG = [
    "1 ulp in cos",
    "positions from 1",
    "no bias",
    "no eps",
    "interleaved rope",
    "tiled heads",
    "sees the future",
    "scaled queries",
]
WRONG_ROUNDING = [
    "unrounded rope",
    "bias after rounding",
    "weight before the cast",
    "silu unrounded",
    "scores unrounded",
]


@pytest.mark.parametrize("how", WRONG + WRONG_ROUNDING)
def test_the_comparison_sees(how):
    """What the bit comparison is worth: each classic mistake makes it fail."""
    original = oracle()
    for dtype in (torch.float32, torch.bfloat16):
        hf = cast(original, dtype)
        ids = tokens(hf, 2, 33)
        assert not differences(hf, ours(hf, arithmetic=Sabotaged("nothing")), ids)
        if dtype == torch.bfloat16 or how in WRONG:
            assert differences(hf, ours(hf, arithmetic=Sabotaged(how)), ids), dtype


def test_repeats_itself_on_other_shapes_in_between():
    """No state but the rotary table, which grows: short, long and short again give the same bits."""
    hf = oracle(rope_parameters=yarn(4.0, original=64))
    model = ours(hf)
    for T in (3, 150, 7, 64, 3):
        assert not differences(hf, model, tokens(hf, 2, T))
    as_bfloat16 = copy.deepcopy(model).to(torch.bfloat16)
    assert not differences(cast(hf, torch.bfloat16), as_bfloat16, tokens(hf, 2, 20))


# ----------------------------------------------------------------------------------------- float64 and errors


@pytest.mark.parametrize(
    "changes, B, T", [c[1:] for c in CONFIGURATIONS[::6]], ids=[c[0] for c in CONFIGURATIONS[::6]]
)
def test_float64_is_the_truth(changes, B, T):
    hf = oracle(
        seed=T, **changes | dict(initializer_range=0.05)
    )  # larger weights only magnify the roundings
    ids = tokens(hf, B, T)
    weights = {name: p.double().numpy() for name, p in hf.state_dict().items()}
    truth = np.stack([numpy_qwen2.qwen2(hf.config.to_dict(), weights, row) for row in ids.numpy()])
    truth = torch.from_numpy(truth)
    mine = ours(hf, torch.float64)(ids)
    assert mine.dtype == torch.float64 and error(mine, truth) < 1e-12
    # What the narrower types lose: rounding, and no more than a few dozen of their units.
    assert 1e-9 < error(ours(hf)(ids), truth) < 32 * torch.finfo(torch.float32).eps
    hf = cast(hf, torch.bfloat16)  # rounding the weights too is another function
    truth = ours(hf, torch.float64)(ids)
    assert 1e-5 < error(ours(hf)(ids), truth) < 6 * torch.finfo(torch.bfloat16).eps


class Spy(TorchDispatchMode):
    """Collects the floating-point dtypes of every tensor that any operation takes or gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.seen.add(x.dtype)
        return out


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_nothing_in_a_float64_forward_is_narrower(paged):
    hf = oracle(rope_parameters=yarn(4.0))
    narrow = torch.bfloat16  # where the spy has to see float32 too
    for dtype, expected in ((torch.float64, {torch.float64}), (narrow, {narrow, torch.float32})):
        model = ours(hf, dtype)
        with Spy() as spy:
            if paged:
                run_paged(model, [tokens(model, 9)], 4)
            else:
                model(tokens(model, 2, 9))
        assert spy.seen == expected


# ---------------------------------------------------------------------------------------------- RoPE and YaRN


def rope_config(head_dim, rope_parameters, **more):
    hf = Qwen2Config(**(TINY | dict(head_dim=head_dim, rope_parameters=rope_parameters) | more))
    return hf, ModelConfig.from_dict(hf.to_dict())


@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda c: f"d{c['head_dim']}-{c.get('factor', 'plain')}"
)
def test_frequencies_are_the_golden_ones(case):
    d, theta = case["head_dim"], case["rope_theta"]
    scaling = None
    if "factor" in case:
        scaling = RopeScaling(case["factor"], case["original_max_position_embeddings"])
    _, config = rope_config(d, PLAIN)
    config = dataclasses.replace(config, rope_theta=theta, rope_scaling=scaling)
    frequencies, factor = rope.inverse_frequencies(config)
    assert frequencies.dtype == torch.float32 and frequencies.tolist() == case["inv_freq"]
    assert factor == case.get("attention_factor", 1.0)
    if scaling:
        assert rope.yarn_range(d, theta, scaling) == (case["low"], case["high"])
        unrounded = dataclasses.replace(scaling, truncate=False)
        assert rope.yarn_range(d, theta, unrounded) == pytest.approx(
            (case["low_raw"], case["high_raw"]), rel=1e-14
        )


@pytest.mark.parametrize(
    "head_dim, parameters, dtype",
    [
        (128, yarn(4.0), torch.float32),
        (128, yarn(4.0), torch.bfloat16),
        (64, yarn(2.0), torch.float32),
        (64, PLAIN, torch.bfloat16),
    ],
    ids=["d128-yarn4-float32", "d128-yarn4-bfloat16", "d64-yarn2", "d64-plain"],
)
def test_tables_are_transformers_up_to_131072_positions(head_dim, parameters, dtype):
    hf, config = rope_config(head_dim, parameters)
    theirs = Qwen2RotaryEmbedding(hf)(torch.empty(0, dtype=dtype), torch.arange(131072)[None])
    for mine, expected in zip(rope.rotary_table(config, 131072, dtype), theirs):
        assert mine.dtype == dtype and torch.equal(mine, expected[0])


def test_float64_tables_are_numpys_up_to_131072_positions():
    """A rounded frequency, times a position of 2^17, leaves an error of about 2^-36 in an angle."""
    hf, config = rope_config(64, yarn(4.0))
    some = np.array([*range(0, 131072, 97), 131071])
    frequencies, factor = numpy_qwen2.frequencies(hf.to_dict())
    angles = some[:, None] * np.concatenate([frequencies, frequencies])
    cos, sin = rope.rotary_table(config, 131072, torch.float64)
    assert abs(cos.numpy()[some] - factor * np.cos(angles)).max() < 2**-34
    assert abs(sin.numpy()[some] - factor * np.sin(angles)).max() < 2**-34


def test_every_yarn_option_is_transformers():
    draw = random.Random(0)
    for _ in range(200):
        options = dict(
            beta_fast=draw.choice([32.0, 16, 4]),
            beta_slow=draw.choice([1.0, 2, 4]),
            truncate=draw.random() < 0.5,
            attention_factor=draw.choice([None, None, 0.9]),
            mscale=draw.choice([None, 0, 0.707, 1.0]),
            mscale_all_dim=draw.choice([None, 0, 0.5, 1.0]),
        )
        options = {k: v for k, v in options.items() if v is not None}
        parameters = yarn(
            draw.choice([1.0, 1.5, 2.0, 4.0, 40.0]),
            draw.choice([8, 64, 4096, 32768]),
            draw.choice([1e4, 1e6]),
            **options,
        )
        hf, config = rope_config(draw.choice([2, 8, 10, 64, 128]), parameters)
        theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, "cpu")
        mine = rope.inverse_frequencies(config)
        assert torch.equal(mine[0], theirs) and mine[1] == factor, parameters


# ------------------------------------------------------------------------------------------------------ pages


def run_paged(model, sequences, block_size, seed=0, largest_chunk=10**9, stale=0.0):
    """Logits of every token of every sequence [T_i] through the cache.

    Random sequences bring a random chunk in every step. Blocks are handed out in no order; they
    held `stale` before, and block tables are padded with any block.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    needed = [-(-len(ids) // block_size) for ids in sequences]
    cache = model.new_cache(sum(needed) + 1, block_size)
    cache.pool.fill_(stale)
    tables = torch.randperm(sum(needed) + 1, generator=generator)[: sum(needed)].split(needed)
    done, logits = [0] * len(sequences), [[] for _ in sequences]
    while unfinished := [i for i, ids in enumerate(sequences) if done[i] < len(ids)]:
        step = draw.sample(unfinished, draw.randint(1, len(unfinished)))
        chunks = [
            min(draw.choice([1, 1, 2, 5, 50, 10**9]), largest_chunk, len(sequences[i]) - done[i])
            for i in step
        ]
        ends = [done[i] + n for i, n in zip(step, chunks)]
        own = [tables[i].tolist() for i in step]
        batch = Batch.paged(chunks, ends, own, block_size)
        padded = torch.randint(sum(needed) + 1, batch.block_tables.shape, generator=generator)
        for row, i in zip(padded, step):
            row[: needed[i]] = tables[i]
        batch = dataclasses.replace(batch, block_tables=padded)
        new = [sequences[i][end - n : end] for i, n, end in zip(step, chunks, ends)]
        out = model(torch.cat(new), batch, cache)
        for i, n, rows in zip(step, chunks, out.split(chunks)):
            logits[i].append(rows)
            done[i] += n
    return [torch.cat(rows) for rows in logits]


LENGTHS = (1, 5, 16, 17, 131)


@pytest.fixture(scope="module")
def dense():
    """Models in float64 and float32, sequences, and the dense float64 logits and float32 error of each."""
    with torch.no_grad():
        hf = oracle(num_attention_heads=8, rope_parameters=yarn(4.0, original=64))
        wide, narrow = ours(hf, torch.float64), ours(hf)
        sequences = [tokens(hf, T, seed=T) for T in LENGTHS]
        truths = [wide(ids[None])[0] for ids in sequences]
        errors = [error(narrow(ids[None])[0], truth) for ids, truth in zip(sequences, truths)]
        return wide, narrow, sequences, truths, errors


def check_pages(dense, page_size, seed, chunk, stale=0.0):
    """Over pages only the order of the sums may differ: nothing in float64's first 12 digits, and in float32
    an error of the size that dense attention has itself (both are rounded sums of the same terms)."""
    wide, narrow, sequences, truths, native_errors = dense
    for logits, truth in zip(run_paged(wide, sequences, page_size, seed, chunk, stale), truths):
        assert error(logits, truth) < 1e-12
    paged = run_paged(narrow, sequences, page_size, seed, chunk, stale)
    for logits, truth, native_error in zip(paged, truths, native_errors):
        assert error(logits, truth) < 4 * max(native_error, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("rows", [10**9, 16, 3, 1], ids=lambda n: f"rows{n}")
@pytest.mark.parametrize("page_size", [1, 7, 16, 128])
def test_pages_change_nothing(dense, page_size, rows, monkeypatch):
    """Decodes, chunks and prompts mixed, several sequences at a time, in any order and any pages."""
    monkeypatch.setattr(attention, "tile_rows", lambda device, scores_per_row: rows)
    check_pages(dense, page_size, seed=page_size, chunk=10**9, stale=1e30)


@pytest.mark.parametrize("chunk", [1, 3])  # 1: nothing but decodes
def test_small_steps_change_nothing(dense, chunk):
    check_pages(dense, 16, seed=chunk, chunk=chunk)


def test_what_pages_held_before_is_never_seen(dense):
    """Not even a NaN that a failed request left behind, or that a neighbour in the batch suffers from."""
    check_pages(dense, 16, seed=0, chunk=1, stale=float("nan"))


def test_sequences_may_share_pages():
    """What prefix caching does: a second sequence starts after the first one's full pages."""
    hf = oracle()
    model, first = ours(hf, torch.float64), tokens(hf, 19)
    second = torch.cat([first[:12], tokens(hf, 9, seed=1)])
    cache = model.new_cache(9, 4)

    def step(ids, start, *tables):
        n, B = len(ids) // len(tables), len(tables)
        return model(ids, Batch.paged([n] * B, [start + n] * B, tables, 4), cache)

    mine, theirs = [5, 0, 7, 2, 3, 3], [5, 0, 7, 8, 1, 6]
    assert error(step(first, 0, mine[:5]), model(first[None])[0]) < 1e-12
    whole = model(second[None])[0]
    assert error(step(second[12:16], 12, theirs), whole[12:16]) < 1e-12
    both = step(
        torch.stack([tokens(hf, 1, seed=2)[0], second[19]]), 19, [5, 0, 7, 2, 3], [5, 0, 7, 8, 1]
    )
    assert both.shape == (2, 61)


def test_only_the_wanted_logits():
    hf = oracle()
    model, ids = ours(hf), tokens(hf, 2, 9)
    wanted = torch.tensor([8, 17, 0])
    logits = model(ids.flatten(), dataclasses.replace(Batch.dense(2, 9), logits_at=wanted))
    assert error(logits, model(ids).flatten(0, 1)[wanted]) < 1e-6


# ----------------------------------------------------------------------------------------- tensor parallelism

RANK = """
import json, sys, torch
from minqwen.config import ModelConfig
from minqwen.model import Batch, Qwen2
from minqwen.parallel import Mesh

torch.set_grad_enabled(False)
mesh = Mesh.from_env("cpu")

def error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()

def prefill_and_decode(model, ids):
    T, cache = len(ids), model.new_cache(4, 16)
    logits = []
    for start, end in ((0, T - 2), (T - 2, T - 1), (T - 1, T)):
        batch = Batch.paged([end - start], [end], [[2, 0, 3]], 16)
        logits.append(model(ids[start:end], batch, cache))
    return torch.cat(logits)

def greedy(model, ids):
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids

report = {}
for case, changes in json.loads(sys.argv[1]).items():
    config = ModelConfig(**changes)
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
               for name, shape in config.parameter_shapes().items()}
    ids = torch.randint(config.vocab_size, (2, 33), generator=generator)
    def read(name, mine):
        w = weights[name]
        return w if mine is None else w.narrow(mine.dim, mine.start, mine.stop - mine.start)
    report[case] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        part = Qwen2.from_tensors(config, read, dtype=dtype, mesh=mesh)
        dense, paged = part(ids), prefill_and_decode(part, ids[0])
        text = greedy(part, ids[:, :5]) if dtype == torch.float32 else None
        high, low = mesh.all_reduce(dense.clone(), "max"), -mesh.all_reduce(-dense, "max")
        if mesh.rank == 0:  # alone from here
            whole = Qwen2.from_tensors(config, read, dtype=dtype)
            right = whole(ids)
            truth = right if dtype == torch.float64 else truth
            report[case][str(dtype)] = dict(
                dense=error(dense, right), paged=error(paged, right[0]),
                same_greedy=text is None or torch.equal(text, greedy(whole, ids[:, :5])),
                same_on_all_ranks=torch.equal(high, low),
                shape_and_dtype=dense.shape == right.shape and dense.dtype == dtype,
                lost=error(dense, truth), lost_by_one=error(right, truth))
mesh.barrier()
if mesh.rank == 0:
    print(json.dumps(report))
mesh.close()
"""
SMALL = dict(vocab_size=101, hidden_size=24, intermediate_size=48, num_hidden_layers=2, head_dim=8)
RANKS = {
    2: {
        "14/2": dict(num_attention_heads=14, num_key_value_heads=2),
        "6/6 llama": dict(num_attention_heads=6, num_key_value_heads=6, model_type="llama"),
    },
    4: {
        "28/4": dict(num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=True),
        "16/2 replicated": dict(num_attention_heads=16, num_key_value_heads=2),
    },
    8: {"32/4 replicated": dict(num_attention_heads=32, num_key_value_heads=4)},
}


@pytest.mark.parametrize("size", RANKS)
def test_ranks_agree_with_one_process(size):
    """Only the order of the row-parallel sums differs; the vocabulary does not divide by the ranks."""
    run = torchrun(
        size, RANK, [json.dumps({name: SMALL | changes for name, changes in RANKS[size].items()})]
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report.keys() == RANKS[size].keys()
    for case, by_dtype in report.items():
        for dtype, found in by_dtype.items():
            assert found["same_on_all_ranks"] and found["shape_and_dtype"], (case, dtype, found)
            if dtype != "torch.bfloat16":
                tolerance = {"torch.float64": 1e-12, "torch.float32": 2e-5}[dtype]
                assert found["dense"] < tolerance and found["paged"] < tolerance, (
                    case,
                    dtype,
                    found,
                )
                assert found["same_greedy"], (case, dtype, found)
        # Partial sums meet in float32: splitting must not add to what bfloat16 loses anyway.
        found = by_dtype["torch.bfloat16"]
        assert found["lost"] < 2 * found["lost_by_one"], (case, found)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_partial_sums_meet_in_float32_at_least(dtype):
    mesh, asked = Mesh(), []
    mesh.size, mesh.all_reduce = 2, lambda t, op="sum", dtype=None: asked.append((op, dtype)) or t
    linear = RowParallelLinear(Native(), mesh, 8, 4, dtype=dtype)
    assert linear(torch.zeros(3, 8, dtype=dtype)).dtype == dtype
    assert asked == [("sum", torch.float64 if dtype == torch.float64 else torch.float32)]


def test_a_rank_may_hold_no_row_of_the_vocabulary():
    """17 rows in pieces of ceil(17 / 8) leave the last two of 8 ranks without any."""
    mesh, config = Mesh(), ModelConfig(**SMALL | RANKS[8]["32/4 replicated"] | dict(vocab_size=17))
    mesh.size, mesh.all_reduce = 8, lambda t: t
    mine = shard("model.embed_tokens.weight", config, 7, 8)
    assert mine.start == mine.stop
    embedding = Embedding(mesh, range(mine.start, mine.stop), 4)
    assert torch.equal(embedding(torch.tensor([0, 16])), torch.zeros(2, 4))


# ---------------------------------------------------------------------------------- gradients and determinism


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_transformers(tied):
    hf = oracle(tie_word_embeddings=tied, rope_parameters=yarn(2.0))
    model, ids = ours(hf), tokens(hf, 2, 33)
    assert not any(p.requires_grad for p in model.parameters())
    with (
        torch.inference_mode()
    ):  # what it leaves behind, the rotary table, must not stop a backward pass
        model(ids)
    with torch.enable_grad():
        for m in (hf, model.requires_grad_(True)):
            logits = getattr(m(ids), "logits", None) if m is hf else m(ids)
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs, mine = dict(hf.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == mine.keys()
    for name, p in theirs.items():
        assert p.grad.abs().max() > 0 and error(mine[name].grad, p.grad) < 1e-5, name


def test_deterministic_mode_changes_nothing(dense):
    """There torch also fills fresh memory with NaN, so nothing that is read was left unwritten."""
    _, model, sequences, _, _ = dense
    whole, paged = model(sequences[-1][None]), run_paged(model, sequences, 7)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.equal(model(sequences[-1][None]), whole)
        assert all(torch.equal(a, b) for a, b in zip(run_paged(model, sequences, 7), paged))
    finally:
        torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------------- names and mistakes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_names_are_transformers(tied):
    hf = oracle(tie_word_embeddings=tied)
    theirs, model = hf.state_dict(), Qwen2(ModelConfig.from_dict(hf.config.to_dict()))
    assert model.state_dict().keys() == theirs.keys()
    assert {
        k: tuple(v.shape) for k, v in model.named_parameters()
    } == model.config.parameter_shapes()
    assert not model.load_state_dict(theirs, strict=True).missing_keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        model.load_state_dict({k: v for k, v in theirs.items() if k != "model.norm.weight"})
    with pytest.raises(RuntimeError, match="o_proj.bias"):
        model.load_state_dict(theirs | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(24)})


def test_a_tied_head_has_two_names_in_a_state_dict_and_one_in_a_checkpoint():
    """load_state_dict wants both, as transformers' does; from_tensors and from_pretrained want the one."""
    hf = oracle(tie_word_embeddings=True)
    model = ours(hf)
    assert "lm_head.weight" not in model.config.parameter_shapes()
    for m in (hf, model):
        with pytest.raises(RuntimeError, match='Missing key.*"lm_head.weight"'):
            m.load_state_dict(
                {name: hf.state_dict()[name] for name in model.config.parameter_shapes()}
            )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_tensors_asks_once_for_every_tensor(tied):
    hf = oracle(tie_word_embeddings=tied)
    weights, asked = hf.state_dict(), []

    def read(name, shard):
        asked.append(name)
        assert shard is None
        return weights[name]

    config = ModelConfig.from_dict(hf.config.to_dict())
    model = Qwen2.from_tensors(config, read)
    assert asked == list(config.parameter_shapes())
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not differences(hf, model, tokens(hf, 2, 9))


@pytest.mark.parametrize("shape", [(5,), (1, 5, 1), ()])
def test_ids_of_another_shape_are_refused(shape):
    model = ours(oracle())
    with pytest.raises(ValueError, match=r"ids have shape \(.*\), expected \[B, T\]") as refusal:
        model(torch.zeros(shape, dtype=torch.long))
    assert "\n" not in str(refusal.value)


def test_the_rotary_table_follows_the_model_to_its_device():
    model = ours(oracle())
    model(tokens(model, 1, 5))
    model.to("meta")
    assert model(torch.zeros(1, 5, dtype=torch.long, device="meta")).shape == (1, 5, 61)
