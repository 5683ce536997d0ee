"""An installed wheel has every room, the embedded model and the commands, outside the checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import EMBEDDED, ROOT

from minqwen.checkpoint import embedded

SCRIPT = """
import minqwen
from minqwen import LLM, SamplingParams
print(minqwen.__file__)
params = SamplingParams(temperature=0, max_tokens=8)
with LLM(max_model_len=64, num_blocks=8) as llm:
    print(llm.name, llm.generate("In the beginning", params)[0].outputs[0].token_ids)
"""


# Every command's help, and what a mistake says, in one process.
HELPS = """
import runpy, sys
from minqwen.commands import TOOLS
names = sys.argv[1:]
for name in names:
    sys.argv = ["minqwen", name, "--help"]
    try:
        runpy.run_path(str(TOOLS / "_minqwen.py"), run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name
from minqwen.model.trace import select
try:
    select(["nothing"], 1)
except ValueError as error:
    print(error)
"""


def test_the_checkout_has_the_model_in_weights():
    assert embedded.EMBEDDED == EMBEDDED


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: building leaves files beside what it builds."""
    missing = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"building a wheel needs {' and '.join(missing)}")
    source = tmp_path_factory.mktemp("source")
    for folder in ("minqwen", "tools", "weights/embedded"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "-w", str(source / "dist"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", *offline, str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_a_wheel_has_every_file_of_the_package_and_of_the_model(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [path for path in (ROOT / "minqwen").rglob("*") if path.is_file()]
    want = {str(path.relative_to(ROOT)) for path in sources if path.suffix != ".pyc"}
    want |= {f"minqwen/embedded/{path.name}" for path in EMBEDDED.iterdir()}
    assert files == want | {f"minqwen_tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}


def test_a_wheel_has_the_licence_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    described = next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    about = archive.read(described).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in about
    licence = archive.read(described.replace("METADATA", "licenses/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()
    scripts = archive.read(described.replace("METADATA", "entry_points.txt")).decode()
    assert scripts == "[console_scripts]\nminqwen = minqwen_tools._minqwen:main\n"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(path: Path, elsewhere: Path, script: str, *args: str) -> list[str]:
    """The lines that a script prints in another directory; `path` is where minqwen is."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=elsewhere,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_an_installed_engine_without_an_argument_runs_the_embedded_model(installed, tmp_path):
    file, output = run(installed, tmp_path, SCRIPT)
    assert Path(file).is_relative_to(installed)
    assert output == run(ROOT, tmp_path, SCRIPT)[1]


def test_an_installed_command_lists_all_without_torch_and_knows_its_version(installed, tmp_path):
    script = "import sys; from minqwen_tools._minqwen import main; main(); print(*sys.modules)"
    *told, loaded = run(installed, tmp_path, script, "--help")
    names = [path.stem.replace("_", "-") for path in sorted((ROOT / "tools").glob("[a-z]*.py"))]
    assert [line.split()[0] for line in told if re.match(r"  \S", line)] == names
    assert not {"torch", "minqwen"} & set(loaded.split())
    version, _ = run(installed, tmp_path, script, "--version")
    assert version.startswith("minqwen 0.1.0 (torch ")


def test_installed_commands_do_not_speak_of_files_of_a_checkout(installed, tmp_path):
    names = [path.stem for path in (ROOT / "tools").glob("[a-z]*.py")]
    *helps, mistake = run(installed, tmp_path, HELPS, *names)
    for name in names:
        assert any(line.startswith(f"usage: minqwen {name} ") for line in helps), name
    assert not [line for line in [*helps, mistake] if "tools/" in line]
    assert "`minqwen trace points` lists them" in mistake
