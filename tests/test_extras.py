"""What is not installed is asked for in one line that says which extra brings it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool_here

from minqwen import LLM, SamplingParams, StructuredOutputs
from minqwen.errors import MinqwenError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli along
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]} | {"minqwen"}
SOURCES = [
    path for folder in ("minqwen", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
]
# Who imports these catches what is missing: tools/serve.py, minqwen/sampling/structured.py,
# tools/evaluate.py.
GUARDED = (
    "minqwen/serve/",
    "minqwen/sampling/grammar_program.py",
    "minqwen/sampling/text_check.py",
    "minqwen/lab/evaluate.py",
    "minqwen/lab/harness.py",
)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if it were not installed, for what is imported from now on."""
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("minqwen.serve"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_server_without_its_extra(monkeypatch, package):
    without(monkeypatch, package)
    done = run_tool_here("serve.py")
    assert (done.code, done.out) == (2, "")
    assert done.err == f'error: a server needs {package}: pip install "minqwen[serve]"\n'


@pytest.mark.parametrize("package", ["llguidance", "jsonschema"])
def test_structured_outputs_without_their_extra(monkeypatch, package):
    without(monkeypatch, package)
    llm = LLM(EMBEDDED, max_model_len=64, num_blocks=8)
    assert llm.generate("In the", SamplingParams(max_tokens=1), use_tqdm=False)  # needs none
    params = SamplingParams(structured_outputs=StructuredOutputs(choice=["a"]))
    line = f'structured_outputs needs {package}: pip install "minqwen[json]"'
    with pytest.raises(MinqwenError, match=re.escape(line)):
        llm.generate("In the", params, use_tqdm=False)


def test_a_plot_without_its_extra(monkeypatch, tmp_path):
    without(monkeypatch, "matplotlib")
    done = run_tool_here("plan.py", "--size", "0.5B", "--plot", tmp_path / "memory.svg")
    assert (done.code, done.out) == (2, "")
    assert done.err == 'error: --plot needs matplotlib: pip install "minqwen[plot]"\n'


def test_every_extra_that_is_named_exists():
    pages = [*SOURCES, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"minqwen\[(\w+)\]", page.read_text())}
    assert {"serve", "json", "plot"} <= named <= set(EXTRAS)


def is_careful(node: ast.AST) -> bool:
    """Whether what is in the body of this node may be missing."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if not isinstance(node, ast.Try):
        return False
    caught = {ast.unparse(handler.type) for handler in node.handlers if handler.type}
    return bool(caught & {"ImportError", "ModuleNotFoundError"})


def packages_of(node: ast.AST) -> set[str]:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names += [item.name for item in node.names] if isinstance(node, ast.Import) else []
    return {name.split(".")[0] for name in names}


def optional_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Packages that may be missing, and whether the file is prepared for it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    bodies = [statement for node in nodes if is_careful(node) for statement in node.body]
    prepared = {child for statement in bodies for child in ast.walk(statement)}
    known = sys.stdlib_module_names | CORE | {file.stem for file in path.parent.glob("*.py")}
    for node in nodes:
        for package in packages_of(node) - known:
            yield package, node in prepared


def test_no_optional_package_is_imported_without_a_word_for_who_lacks_it():
    bare = []
    for path in SOURCES:
        where = str(path.relative_to(ROOT))
        for package, guarded in optional_imports(path):
            if not guarded and not where.startswith(GUARDED):
                bare.append(f"{where}: {package}")
    assert bare == []


def test_an_import_without_a_try_is_seen(tmp_path):
    source = "import json\nimport torch\nimport rich\ntry:\n    import yaml\nexcept ImportError:\n"
    (tmp_path / "new.py").write_text(source + "    raise\n")
    assert sorted(optional_imports(tmp_path / "new.py")) == [("rich", False), ("yaml", True)]
