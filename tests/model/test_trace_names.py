"""Names of points: both spellings mean the same everywhere, and a name of nothing is told."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from minqwen.errors import TraceError
from minqwen.model.trace import Seen, alias_of, canonical, point_names, select

IDS = torch.tensor([[5, 300, 17, 42, 900, 11, 7]])


def test_every_alias_is_found_again():
    names = point_names(3)
    aliased = [name for name in names if alias_of(name)]
    assert [canonical(alias_of(name)) for name in aliased] == aliased
    assert len(aliased) == 2 + 18 * 3  # no other name for the weighted norms and the logits
    assert [canonical(name) for name in names] == names
    for other in ("", "hook_q", "blocks.0.hook_embed", "blocks.x.attn.hook_q", "attn.hook_q"):
        assert canonical(other) == other


def is_short_name(name):
    """Asked about whole names only, so it is never true."""
    return name == "attn.hook_z"


@pytest.mark.parametrize("ending", ["attn.hook_z", "attn.z"])
def test_a_predicate_is_asked_about_both_spellings(embedded_model, ending):
    plain = embedded_model(IDS)
    hooks = [(lambda name: name.endswith(ending), lambda z, name: z * 0)]
    changed = embedded_model.run_with_hooks(IDS, hooks)
    named = embedded_model.run_with_hooks(IDS, [("*.attn.z", lambda z, name: z * 0)])
    assert torch.equal(changed, named) and not torch.equal(changed, plain)


@pytest.mark.parametrize(
    "names, says",
    [
        ("layers.1.attn.zz", "did you mean 'layers.1.attn.z'"),
        ("blocks.1.attn.hook_zz", "did you mean 'blocks.1.attn.hook_z'"),
        ("*.attn.hook_pattrn", "did you mean '*.attn.hook_pattern'"),
        (["logits", "final_nrom"], "did you mean 'final_norm'"),
        ("layers.9.attn.q", "layers.9.attn.q"),
        (is_short_name, "'blocks.0.attn.hook_z'"),
        ([], "empty"),
        (5, "5"),
        (["logits", 5], "5"),
        (b"logits", "b'logits'"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_what_means_nothing_is_an_error_of_one_line(embedded_model, names, says):
    for use in (
        lambda: select(names, 4),
        lambda: embedded_model.run_with_cache(IDS, names),
        lambda: embedded_model.run_with_hooks(IDS, [(names, lambda x, name: None)]),
    ):
        with pytest.raises(TraceError) as caught:
            use()
        assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "hooks",
    [("logits", print), [("logits",)], ["logits"], [("logits", "print")], "logits", None, [print]],
    ids=str,
)
def test_hooks_are_pairs(embedded_model, hooks):
    with pytest.raises(TraceError, match="pairs") as caught:
        embedded_model.run_with_hooks(IDS, hooks)
    assert "\n" not in str(caught.value)


def test_names_of_any_collection_select():
    wanted = {"layers.1.attn.q", "logits"}
    for names in (wanted, tuple(wanted), iter(wanted), dict.fromkeys(wanted)):
        assert select(names, 2) == wanted


def test_a_cache_has_an_entry_under_both_of_its_names(embedded_model):
    _, seen = embedded_model.run_with_cache(IDS, ["*.attn.pattern", "logits"])
    ours, theirs = "layers.2.attn.pattern", "blocks.2.attn.hook_pattern"
    for name in (ours, theirs):
        assert name in seen and seen[name] is seen.get(name) is seen.get(name, 0) is seen[ours]
    for name in ("layers.2.attn.z", "blocks.2.attn.hook_z", "blocks.9.attn.hook_pattern", ""):
        assert name not in seen
        with pytest.raises(KeyError):
            seen[name]
    assert 7 not in seen and seen.get("blocks.2.attn.hook_z") is None and seen.get("hook_z", 7) == 7
    assert list(seen) == [*(f"layers.{i}.attn.pattern" for i in range(4)), "logits"]
    assert all(name in seen and seen[name] is x for name, x in seen.items())
    seen[theirs] = torch.zeros(1)
    assert len(seen) == 5 and torch.equal(seen[ours], torch.zeros(1))
    assert seen.pop(theirs) is not None and ours not in seen and seen.pop(theirs, None) is None
    del seen["blocks.3.attn.hook_pattern"]
    assert len(seen) == 3


def test_a_missing_entry_names_the_nearest():
    seen = Seen({"layers.0.attn.pattern": 1})
    with pytest.raises(KeyError, match="blocks.0.attn.hook_pattern"):
        seen["blocks.0.attn.hook_patern"]
    with pytest.raises(KeyError, match="layers.0.attn.z"):
        seen["blocks.0.attn.hook_z"]


def test_a_cache_is_printed_without_its_numbers(embedded_model):
    _, seen = embedded_model.run_with_cache(IDS, ["embed", "*.attn.pattern"])
    first, *lines = repr(seen).splitlines()
    assert first == "5 points traced" and len(lines) == 5
    assert lines[0] == "  embed: float32 [1, 7, 64]".replace("64", str(seen["embed"].shape[-1]))
    assert lines[1].startswith("  layers.0.attn.pattern: float32 [1, ")
    assert repr(Seen({"embed": [torch.zeros(3, 2), torch.zeros(1, 2)]})).splitlines()[1] == (
        "  embed: 2 steps, the first float32 [3, 2]"
    )


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalized_is_before_the_weight(models, arithmetic, dtype):
    """TransformerLens's hook_normalized: what is multiplied by the norm's weight."""
    model = models[arithmetic, dtype]
    logits, seen = model.run_with_cache(IDS)
    assert torch.equal(logits, model(IDS))
    norms = {"blocks.1.ln1.hook_normalized": model.model.layers[1].input_layernorm}
    norms["blocks.1.ln2.hook_normalized"] = model.model.layers[1].post_attention_layernorm
    norms["ln_final.hook_normalized"] = model.model.norm
    for name, norm in norms.items():
        after = canonical(name).removesuffix(".normalized")
        assert torch.equal(seen[name] * norm.weight, seen[after])
        square = seen[name].double().pow(2).mean(-1)
        torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-2, atol=1e-2)
        plain = model.run_with_hooks(IDS, [(after, lambda x, name: x * 0.5)])
        halved = model.run_with_hooks(IDS, [(name, lambda x, name: x * 0.5)])
        assert torch.equal(halved, plain) and not torch.equal(halved, logits)


@pytest.mark.parametrize("options", [{}, {"per_query_head": True}, {"to": "cpu"}], ids=str)
def test_a_cache_can_be_saved_as_it_is(embedded_model, tmp_path, options):
    """A file of tensors holds no two that share memory, and none with gaps."""
    for ids in (IDS, IDS.repeat(2, 1)):
        _, seen = embedded_model.run_with_cache(ids, **options)
        save_file(seen, tmp_path / "seen.safetensors")
        saved = load_file(tmp_path / "seen.safetensors")
        assert saved.keys() == seen.keys()
        assert all(torch.equal(saved[name], x) for name, x in seen.items())
    before = seen["layers.1.resid_pre"].clone()
    seen["layers.0.resid_post"].zero_()
    assert torch.equal(seen["layers.1.resid_pre"], before)
