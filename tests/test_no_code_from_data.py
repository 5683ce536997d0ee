"""Nothing that is read can become code: what could do that is not used, or for a stated reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support.paths import ROOT

FOLDERS = ("minqwen", "tools", "benchmarks")

# Modules that make objects or code of bytes.
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "imp"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "import_module", "run_path", "run_module"),
    *("exec_module", "load_module", "spec_from_file_location"),
    # These send pickles between ranks.
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
    # A shell runs what it is given. `system` also is platform.system.
    *("os.system", "popen", "getoutput", "getstatusoutput"),
    # Templates outside of jinja2's sandbox, and modules out of files.
    *("jinja2.Template", "jinja2.Environment", "torch.jit.load", "hub.load", "load_inline"),
}
WORDS = {"shell", "allow_pickle", "trust_remote_code"}  # keywords that must not be true

# (file, what) -> why it is no way in.
ALLOWED = {
    ("minqwen/__main__.py", "run_path"): "the tools of the package itself",
    ("tools/_minqwen.py", "exec"): "a tool of the package, by a name from the list of its files",
    ("tools/_minqwen.py", "compile"): "the same",
    ("minqwen/confined.py", "run_path"): "programs of the package itself",
    ("minqwen/tokenizer/chat_template.py", "import_module"): "names that stand in the file",
    ("benchmarks/mutants.py", "import_module"): "names that stand in the file",
    ("benchmarks/planted.py", "run_path"): "files of the tests",
    ("benchmarks/audited.py", "run_path"): "files of the tests",
    ("benchmarks/ranks.py", "run_path"): "the tool that is disturbed",
    ("benchmarks/signals.py", "run_path"): "the tool that is disturbed",
}


def ways_in(source: str) -> list[str]:
    """What a file uses of the above, in the order of its lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        else:
            names = []
        found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += _of_call(node)
    return found


def _of_call(node: ast.Call) -> list[str]:
    if not isinstance(node.func, ast.Name | ast.Attribute):
        return []
    called = ast.unparse(node.func)
    last = called.rpartition(".")[2]
    # model.eval() and re.compile() are something else: of these names only the built-in is meant.
    found = [last] if last in CALLS and (called == last or last not in {"eval", "compile"}) else []
    if any(called == name or called.endswith(f".{name}") for name in CALLS if "." in name):
        found.append(called)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    found += [word for word in WORDS & given.keys() if given[word] == "True"]
    if called == "torch.load" and given.get("weights_only") != "True":
        found.append(called)
    return found


FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_can_make_code_of_data():
    assert len(FILES) > 200
    found = set()
    for path in FILES:
        name = str(path.relative_to(ROOT))
        found |= {(name, way) for way in ways_in(path.read_text(encoding="utf-8"))}
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    "source, way",
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import yaml.x", "yaml.x"),
        ("eval(x)", "eval"),
        ("builtins.exec(x)", "exec"),
        ("importlib.import_module(name)", "import_module"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("dist.broadcast_object_list(x)", "broadcast_object_list"),
        ("subprocess.run(x, shell=True)", "shell"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("jinja2.Template(x)", "jinja2.Template"),
        ("os.system(x)", "os.system"),
    ],
)
def test_each_way_in_is_seen(source, way):
    assert ways_in(source) == [way]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "re.compile(x)",
        "np.load(path)",
        "platform.system()",
        "x = 'pickle'",
    ],
)
def test_what_is_no_way_in_is_not(source):
    assert ways_in(source) == []


def test_dependencies_are_those_that_the_page_names():
    """docs/reliability.md says what each of them reads."""
    page = Path(ROOT, "docs", "reliability.md").read_text(encoding="utf-8")
    project = Path(ROOT, "pyproject.toml").read_text(encoding="utf-8")
    needed = project.partition("dependencies = [")[2].partition("]")[0]
    for line in needed.split("\n"):
        name = line.strip(' ",').partition(">")[0]
        assert name == "" or f"| {name} |" in page, name
        assert name == "" or ">=" in line, f"{name} is not pinned by a range"
