"""One to four tokens against transformers: there PyTorch chooses other kernels for its products."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.qwen2 import cast, differences, oracle, ours, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from minqwen import Qwen2

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default")
CORNER = list(itertools.product(range(1, 5), range(1, 5)))  # B, T
SHAPES = [  # hidden, intermediate, head_dim
    (224, 64, 32),
    (224, 304, 32),
    (64, 161, 10),
    (49, 33, 2),
    (8, 7, 16),
    (33, 100, 64),
]


def narrow(shape, group, kv_heads=1):
    hidden, intermediate, head_dim = shape
    return oracle(
        seed=hidden + group,
        hidden_size=hidden,
        intermediate_size=intermediate,
        head_dim=head_dim,
        num_attention_heads=group * kv_heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
    )


class Products(TorchDispatchMode):
    """Notes every matrix product: its name, and the shapes and strides of what it multiplies."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in PRODUCTS:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.calls.append((str(func), [(tuple(x.shape), x.stride()) for x in tensors]))
        return func(*args, **(kwargs or {}))


def products_of(model, ids):
    with Products() as products:
        model(ids)
    return products.calls


@pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"threads{n}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_tokens_are_transformers_in_every_bit(shape, dtype, threads):
    torch.set_num_threads(threads)
    for group in (1, 2, 3, 4, 5, 6, 7, 8):
        hf = cast(narrow(shape, group), dtype)
        model = ours(hf)
        for B, T in CORNER:
            found = differences(hf, model, tokens(hf, B, T))
            assert not found, f"{B} x {T}, {group} query heads: {found}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_products_are_those_of_transformers(shape):
    """The same kernels on any machine: the same calls, of the same shapes, equally laid out."""
    for group, kv_heads in ((1, 1), (7, 1), (1, 3), (4, 2)):
        hf = narrow(shape, group, kv_heads)
        model = ours(hf)
        for B, T in CORNER:
            ids = tokens(hf, B, T)
            theirs, mine = products_of(hf, ids), products_of(model, ids)
            assert len(theirs) == 10 and mine == theirs, (B, T, group, kv_heads)


def moved(hf, count):
    """A copy of the model whose weights begin `count` float32 numbers after a multiple of 64 bytes.

    transformers does not copy what it loads: its weights lie where the file has them, at any
    multiple of 8 bytes.
    """
    copy = cast(hf, torch.float32)
    for p in copy.parameters():
        room = torch.empty(p.numel() + 32)
        first = -room.data_ptr() // 4 % 16 + count
        p.data = room[first : first + p.numel()].view(p.shape).copy_(p)
        assert p.data_ptr() % 64 == 4 * count % 64
    return copy


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_transformers_is_equal_where_its_weights_lie_at_multiples_of_16_bytes(shape):
    """A product of one float32 row can round otherwise where the weights lie at other addresses.

    That is MKL's, and differs from machine to machine. Ours always lie at multiples of 64 bytes.
    """
    hf = narrow(shape, 2)
    model = ours(hf)
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    for B, T in CORNER:
        ids = tokens(hf, B, T)
        for count in (0, 4, 8, 12):
            assert not differences(moved(hf, count), model, ids), (B, T, count)
        if B * T > 1:
            assert not differences(moved(hf, 2), model, ids), (B, T)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_tensors_at_any_address_make_the_same_model(shape):
    """`safe_open` hands out tensors that lie in the mapped file, at any multiple of 8 bytes."""
    hf = narrow(shape, 2)
    model, ids = ours(hf), tokens(hf, 1, 1)
    state = moved(hf, 2).state_dict()
    again = Qwen2.from_tensors(model.config, lambda name, shard: state[name])
    assert torch.equal(again(ids), model(ids))
