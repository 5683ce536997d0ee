"""A forward pass in transformers' shape: every bit of transformers' eager attention, or one line.

test_transformers_generate.py has `generate`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.qwen2 import cast, oracle, ours, tokens, yarn
from transformers import AutoModelForCausalLM as Theirs

from minqwen import MinqwenError, Qwen2
from minqwen.errors import ConfigError
from minqwen.lab.transformers import AutoModelForCausalLM, CausalLMOutput, Qwen2ForCausalLM

DTYPES = (torch.float32, torch.bfloat16)
ALL = dict(output_hidden_states=True, output_attentions=True)
T = 9


@pytest.fixture(scope="module")
def pairs():
    """{dtype: (transformers' model, ours)}: 6 query heads on 2 KV heads, 2 layers, YaRN."""
    with torch.no_grad():
        hf = oracle(rope_parameters=yarn(4.0, original=8))
        casts = {dtype: cast(hf, dtype) for dtype in DTYPES}
        return {dtype: (hf, Qwen2ForCausalLM(ours(hf))) for dtype, hf in casts.items()}


def masks():
    """Padding on the left, on the right, a hole, and all of one row hidden."""
    left = torch.ones(3, T, dtype=torch.int64)
    left[0, :4] = left[1, :2] = 0
    hole = torch.ones_like(left)
    hole[1, 3:5] = 0
    nothing = torch.ones_like(left)
    nothing[2] = 0
    return {"left": left, "right": left.flip(1), "hole": hole, "nothing": nothing}


def same(ours, theirs):
    """Whether all that theirs has is in ours too, to the bit."""
    for name in ("logits", "loss", "hidden_states", "attentions"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if b is None:
            assert a is None, name
            continue
        rows = zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]
        for x, y in rows:
            assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_loss_hidden_states_and_attentions_are_transformers(pairs, dtype):
    hf, model = pairs[dtype]
    ids = tokens(hf, 3, T)
    labels = ids.masked_fill(torch.arange(T) % 3 == 0, -100)
    with torch.no_grad():
        same(model(ids), hf(ids))
        same(model(ids, labels=labels, **ALL), hf(ids, labels=labels, **ALL))
    assert model(ids).logits.shape == (3, T, 61) and model.dtype == dtype


@pytest.mark.parametrize("padding", masks())
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_hidden_as_in_transformers(pairs, dtype, padding):
    hf, model = pairs[dtype]
    ids, mask = tokens(hf, 3, T), masks()[padding]
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        same(
            model(ids, attention_mask=mask, labels=labels, **ALL),
            hf(ids, attention_mask=mask, labels=labels, **ALL),
        )
        same(model(ids, mask.bool()), model(ids, mask.double() * 2))


def test_what_is_hidden_does_not_matter(pairs):
    _, model = pairs[torch.float32]
    ids, mask = tokens(model, 3, T), masks()["left"]
    other = ids.where(mask == 1, 7)
    with torch.no_grad():
        a, b = (model(x, attention_mask=mask).logits for x in (ids, other))
        alone = model(ids[:1, 4:]).logits
    assert torch.equal(a[mask == 1], b[mask == 1])
    torch.testing.assert_close(a[:1, 4:], alone)  # RoPE sees distances only


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_are_those_that_are_given(pairs, dtype):
    hf, model = pairs[dtype]
    ids, mask = tokens(hf, 3, T), masks()["left"]
    from_mask = (mask.cumsum(-1) - 1).clamp(min=0)
    packed = (torch.arange(T) % 4)[None]  # three texts in a row
    cases = [
        dict(position_ids=torch.arange(T)[None] + 1000),
        dict(position_ids=from_mask, attention_mask=mask),
        dict(position_ids=packed),
        dict(position_ids=packed, use_cache=False),
        dict(position_ids=from_mask, use_cache=False),
    ]
    with torch.no_grad():
        for case in cases:
            same(model(ids, **case, **ALL), hf(ids, **case, **ALL))
        apart = model(ids[:, :4]).logits
        together = model(ids, position_ids=packed, use_cache=False).logits
        torch.testing.assert_close(together[:, 4:8], model(ids[:, 4:8]).logits)
    torch.testing.assert_close(together[:, :4], apart)


def of_the_loss(model, ids):
    """Of padded rows. Their first label would be predicted from padding, which sees nothing."""
    mask = masks()["left"]
    labels = ids.masked_fill(mask.roll(1, 1) * mask == 0, -100)
    return model(ids, attention_mask=mask, labels=labels).loss


def of_everything(model, ids):
    output = model(ids, labels=ids, **ALL)
    return output.loss + output.hidden_states[1].square().sum() + output.attentions[1][..., 0].sum()


@pytest.mark.parametrize("scalar", [of_the_loss, of_everything])
def test_gradients_are_transformers(pairs, scalar):
    hf, model = (copy.deepcopy(x) for x in pairs[torch.float32])
    ids = tokens(hf, 3, T)
    hf.requires_grad_()
    for x in (hf, model):
        scalar(x, ids).backward()
    theirs = dict(hf.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(theirs)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name


def test_embeddings_may_stand_for_ids(pairs):
    hf, model = pairs[torch.float32]
    ids = tokens(hf, 3, T)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=masks()["left"], **ALL)
    same(output, model(ids, attention_mask=masks()["left"], **ALL))
    output.logits.sum().backward()
    assert embeds.grad.shape == embeds.shape and embeds.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_the_last_tokens_only(pairs, dtype):
    hf, model = pairs[dtype]
    ids = tokens(hf, 3, T)
    with torch.no_grad():
        for count in (1, 4):
            kept = model(ids, logits_to_keep=count)
            assert kept.logits.shape == (3, count, 61)
            same(kept, hf(ids, logits_to_keep=count))
        both = model(ids, logits_to_keep=2, output_hidden_states=True)
    assert both.hidden_states[-1].shape == (3, T, 24) and both.logits.shape == (3, 2, 61)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedded_model_has_the_same_bits(embedded, dtype):
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=dtype)
    hf = Theirs.from_pretrained(embedded, dtype=dtype, attn_implementation="eager")
    ids, mask = tokens(hf, 3, T), masks()["left"]
    with torch.no_grad():
        same(
            model(ids, attention_mask=mask, labels=ids, **ALL),
            hf(ids, attention_mask=mask, labels=ids, **ALL),
        )


@pytest.mark.parametrize("arithmetic", ["fast", "exact"])
def test_other_arithmetics_agree_and_have_no_gradients(pairs, arithmetic):
    hf, model = pairs[torch.float32]
    other = Qwen2ForCausalLM(ours(hf, arithmetic=arithmetic))
    ids, mask = tokens(hf, 3, T), masks()["left"]
    with torch.no_grad():
        a, b = (x(ids, attention_mask=mask, labels=ids, **ALL) for x in (other, model))
    for x, y in ((a.logits, b.logits), (a.attentions[1].float(), b.attentions[1])):
        torch.testing.assert_close(x[0, ..., 4:, 4:], y[0, ..., 4:, 4:], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_an_output_is_an_object_a_dict_and_a_tuple(pairs):
    _, model = pairs[torch.float32]
    ids = tokens(model, 2, 5)
    out = model(ids, labels=ids)
    assert isinstance(out, dict) and list(out) == ["loss", "logits"]
    assert out[0] is out.loss is out["loss"] and out[1] is out.logits
    assert out[:2] == out.to_tuple() == (out.loss, out.logits)
    assert out.hidden_states is None and out.past_key_values is None
    assert "attentions" not in out and out.get("attentions") is None
    assert isinstance(model(ids, return_dict=False), tuple)
    out.loss = out.loss.detach() * 2
    assert out["loss"] is out.loss
    again = pickle.loads(pickle.dumps(CausalLMOutput(logits=torch.ones(1))))
    assert type(again) is CausalLMOutput and again.logits == 1
    with pytest.raises(AttributeError, match="CausalLMOutput has no 'logit', only loss, logits"):
        _ = out.logit


def test_a_directory_becomes_a_model_with_transformers_names(embedded):
    model = AutoModelForCausalLM.from_pretrained(
        str(embedded), torch_dtype="float32", device_map={"": "cpu"}, trust_remote_code=True
    )
    hf = Theirs.from_pretrained(embedded, dtype=torch.float32)
    assert set(model.state_dict()) == set(hf.state_dict())
    assert model.num_parameters() == hf.num_parameters()
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(model.config, name) == getattr(hf.config, name)
    theirs = hf.generation_config.to_dict()
    said = model.generation_config.said()
    assert said and said == {name: theirs[name] for name in said}
    assert model.device == hf.device and model.dtype == hf.dtype
    assert model.get_output_embeddings() is model.lm_head
    assert torch.equal(model.get_input_embeddings().weight, hf.get_input_embeddings().weight)
    hf.load_state_dict(model.state_dict())
    assert AutoModelForCausalLM.from_pretrained(embedded).dtype == torch.bfloat16


def test_to_and_eval_and_module_hooks_work(pairs):
    model = copy.deepcopy(pairs[torch.float32][1])
    ids = tokens(model, 2, 5)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        handle.remove()
        assert torch.equal(model.model.norm(seen[0]).view(2, 5, -1), output.hidden_states[-1])
        wide = model.eval().to(torch.float64)
        assert wide is model and model.dtype == model(ids).logits.dtype == torch.float64
        torch.testing.assert_close(model(ids).logits.float(), output.logits)
    assert model.qwen2.dtype == torch.float64


def test_what_is_saved_loads_in_transformers(pairs, tmp_path):
    _, model = pairs[torch.bfloat16]
    model.save_pretrained(tmp_path / "model")
    hf = Theirs.from_pretrained(tmp_path / "model", dtype="auto", attn_implementation="eager")
    ids = tokens(model, 2, 5)
    with torch.no_grad():
        same(model(ids), hf(ids))


REFUSED = {
    "a cache": (dict(past_key_values=object()), "past_key_values is .*give the whole text"),
    "use_cache": (dict(use_cache=True), "use_cache is True, not taken.*generate has a cache"),
    "a slip": (dict(output_hidden_state=True), "no argument 'output_hidden_state' here.*output_hi"),
    "a mask of four dimensions": (dict(attention_mask=torch.ones(2, 1, 5, 5)), "expected a number"),
    "a mask that is a list": (dict(attention_mask=[[1] * 5] * 2), "attention_mask is list"),
    "labels of another shape": (dict(labels=torch.ones(2, 4).long()), "labels are not .2, 5."),
    "labels that are a list": (dict(labels=[[1] * 5] * 2), "give such a tensor"),
    "embeddings of no batch": (dict(input_ids=None, inputs_embeds=torch.ones(5, 24)), "no tensor"),
    "labels and few logits": (dict(labels=torch.ones(2, 5).long(), logits_to_keep=1), "no logits"),
    "negative positions": (dict(position_ids=torch.arange(5)[None] - 1), "no integer >= 0"),
    "positions of another shape": (dict(position_ids=torch.arange(4)), "are no tensor .2, 5."),
    "ids and embeddings": (dict(inputs_embeds=torch.ones(2, 5, 24)), "one of the two"),
    "logits of -1 tokens": (dict(logits_to_keep=-1), "logits_to_keep is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_is_one_line(pairs, case):
    _, model = pairs[torch.float32]
    options, message = REFUSED[case]
    with pytest.raises(MinqwenError, match=message) as error:
        model(**{"input_ids": tokens(model, 2, 5), **options})
    assert "\n" not in str(error.value)


def test_neutral_values_of_what_is_not_taken_pass(pairs):
    _, model = pairs[torch.float32]
    ids = tokens(model, 2, 5)
    options = dict(past_key_values=None, use_cache=False, token_type_ids=None, return_dict=True)
    with torch.no_grad():
        same(model(ids, **options), model(ids))


NOT_LOADED = {
    "attn_implementation": ("sdpa", "expected 'eager'"),
    "load_in_4bit": (True, "load_in_4bit is True, not taken: a directory that holds AWQ"),
    "device_map": ({"model": 0, "lm_head": "cpu"}, "device_map names 2 devices"),
    "output_loading_info": (True, "is never loaded"),
    "revision": ("v2", "give the directory"),
    "dtyp": ("float32", "no argument 'dtyp' here.*dtype"),
}


@pytest.mark.parametrize("name", NOT_LOADED)
def test_loading_options_that_would_change_something_are_refused(embedded, name):
    value, message = NOT_LOADED[name]
    with pytest.raises(MinqwenError, match=message):
        AutoModelForCausalLM.from_pretrained(embedded, **{name: value})


def test_a_name_that_is_no_directory_is_one_line():
    with pytest.raises(MinqwenError, match="Qwen/Qwen2.5-7B"):
        AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-7B")


def test_gradients_of_an_arithmetic_without_them_are_refused(pairs):
    hf, _ = pairs[torch.float32]
    model = Qwen2ForCausalLM(ours(hf, arithmetic="exact"))
    embeds = torch.ones(1, 3, 24, requires_grad=True)
    model.requires_grad_()
    with pytest.raises(ConfigError, match="no gradients"):
        model(inputs_embeds=embeds)
    assert isinstance(model.qwen2, Qwen2)
