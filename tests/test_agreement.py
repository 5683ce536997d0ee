"""Ranks that were given different things say so, all of them, before anything is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FILE, rewrite, tiny, write
from support.ranks import on_ranks

from minqwen import LLM, Mesh, SamplingParams
from minqwen.agreement import agree
from minqwen.checkpoint import load_pretrained
from minqwen.errors import ParallelError


def refusals(size: int, act) -> list[str]:
    """What act(mesh) was refused with, on each rank; "" where it was not."""

    def one(mesh: Mesh) -> str:
        try:
            act(mesh)
        except ParallelError as error:
            return str(error)
        return ""

    return on_ranks(size, one)


def test_ranks_agree_or_all_are_told_who_has_what():
    assert refusals(3, lambda mesh: agree(mesh, {"a": 1, "b": [2]})) == ["", "", ""]
    said = refusals(4, lambda mesh: agree(mesh, {"a": 1, "b": [mesh.rank == 2], "c": "x"}))
    line = "the ranks must agree, but b is [False] on ranks 0, 1, 3, but [True] on rank 2"
    assert said == [line] * 4


def test_what_only_some_have_and_what_is_long_is_told_too():
    def act(mesh):
        facts = {f"f{i}": mesh.rank for i in range(5)} if mesh.rank else {"f0": 0}
        agree(mesh, facts | {"prompt": [1] * 500 + [mesh.rank]})

    (line, other) = refusals(2, act)
    assert line == other and len(line) < 480
    assert "f0 is 0 on rank 0, but 1 on rank 1; prompt is [1, 1, 1" in line and "digest" in line
    assert "f1 is not given on rank 0, but 1 on rank 1; and 3 more" in line


def test_one_rank_agrees_with_itself():
    agree(Mesh(), {"a": 1})


# ---- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> list[Path]:
    """A checkpoint, and a copy of it."""
    found = [tmp_path_factory.mktemp("checkpoints") / name for name in "ab"]
    write(found[0], tiny(dtype="float32"))
    shutil.copytree(found[0], found[1])
    return found


def test_copies_of_one_checkpoint_are_the_same(directories):
    def act(mesh):
        load_pretrained(directories[mesh.rank], mesh=mesh)

    assert refusals(2, act) == ["", ""]


def one_other_number(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1


def test_one_other_weight_is_named_with_its_file(directories, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(directories[0], other)
    rewrite(other, one_other_number)
    paths = [directories[0], other]
    line, _ = said = refusals(2, lambda mesh: load_pretrained(paths[mesh.rank], mesh=mesh))
    assert said == [line, line]
    assert f"but {FILE} is of digest " in line
    assert all(f"({path}) on rank {r}" in line for r, path in enumerate(paths))


def test_a_large_file_is_compared_by_samples(directories, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(directories[0], other)
    tensors = load_file(other / FILE)
    save_file({n: torch.randn_like(t) for n, t in tensors.items()}, other / FILE)
    monkeypatch.setattr("minqwen.agreement.WHOLE", 0)
    monkeypatch.setattr("minqwen.agreement.SAMPLE_BYTES", 16)
    for paths, differ in (([directories[0], other], True), (directories, False)):
        said = refusals(2, lambda mesh: load_pretrained(paths[mesh.rank], mesh=mesh))  # noqa: B023
        assert [FILE in line for line in said] == [differ] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([{"dtype": "float32"}, {"dtype": "bfloat16"}], "dtype is torch.float32 on rank 0"),
        ([{}, {"arithmetic": "exact"}], "arithmetic is native on rank 0, but exact on rank 1"),
        ([{}, {"offload": "memory"}], "offload is None on rank 0, but memory on rank 1"),
    ],
)
def test_other_options_of_loading_are_named(directories, options, said):
    def act(mesh):
        load_pretrained(directories[0], mesh=mesh, **options[mesh.rank])

    assert all(said in line for line in refusals(2, act))


def test_another_config_is_named_by_its_field(directories, tmp_path):
    write(tmp_path / "c", tiny(dtype="float32", intermediate_size=44))
    paths = [directories[0], tmp_path / "c"]
    for line in refusals(2, lambda mesh: load_pretrained(paths[mesh.rank], mesh=mesh)):
        assert "config.json's intermediate_size is 40 on rank 0, but 44 on rank 1" in line


# ---- the engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": (16, 32)}, "block_size is 16 on rank 0, but 32 on rank 1"),
        ({"max_num_seqs": (4, 5)}, "max_num_seqs is 4 on rank 0, but 5 on rank 1"),
        ({"seed": (1, None)}, "seed is 1 on rank 0, but None on rank 1"),
    ],
)
def test_other_options_of_the_engine_are_named(embedded, options, said):
    def act(mesh):
        LLM(embedded, mesh=mesh, **{name: values[mesh.rank] for name, values in options.items()})

    assert refusals(2, act) == [f"the ranks must agree, but {said}"] * 2


def test_another_tokenizer_is_named_with_its_directory(embedded, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(embedded, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + " ")
    paths = [embedded, other]
    for line in refusals(2, lambda mesh: LLM(paths[mesh.rank], mesh=mesh)):
        assert "tokenizer.json is of digest" in line and f"({other}) on rank 1" in line


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda r: (["And", "God"][r], {}), "the prompt is ["),
        (lambda r: (["And", "God"][: r + 1], {}), "the number of prompts is 1 on rank 0, but 2"),
        (
            lambda r: (["And", "God"], {"max_tokens": 5 + r}),
            "max_tokens of prompt 0 is 5 on rank 0, but 6 on rank 1; max_tokens of prompt 1 is",
        ),
        (lambda r: ("And", {"seed": r}), "seed is 0 on rank 0, but 1 on rank 1"),
        (lambda r: ("And", {"stop": ["x"] * r}), "stop is not given on rank 0, but ('x',) on rank"),
    ],
)
def test_other_requests_are_named(llms, asked, said):
    def act(mesh):
        prompts, fields = asked(mesh.rank)
        params = SamplingParams(**{"max_tokens": 1, "seed": 7, **fields})
        llm = llms[mesh.rank]
        llm.mesh = mesh
        llm.generate(prompts, params, use_tqdm=False)

    for line in refusals(2, act):
        assert f"the ranks must agree, but {said}" in line
    assert not any(llm.has_unfinished_requests for llm in llms)


def test_a_request_that_is_added_is_compared_too(llms):
    def act(mesh):
        llm = llms[mesh.rank]
        llm.mesh = mesh
        llm.add_request([1, 2 + mesh.rank], SamplingParams(max_tokens=1))

    for line in refusals(2, act):
        assert "the prompt is [1, 2] on rank 0, but [1, 3] on rank 1" in line
    assert not any(llm.has_unfinished_requests for llm in llms)


@pytest.fixture(scope="module")
def llms(embedded_model, embedded_tokenizer) -> list[LLM]:
    """An engine for each of two ranks. They do not get so far as to make a step together."""
    options = {"max_model_len": 64, "num_blocks": 16, "seed": 0}
    return [LLM(embedded_model, tokenizer=embedded_tokenizer, **options) for _ in range(2)]
