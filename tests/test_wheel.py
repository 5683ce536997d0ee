"""An installed wheel has every room and the embedded model, outside the checkout too."""

from __future__ import annotations

import importlib.util
import os
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


def test_the_checkout_has_the_model_in_weights():
    assert embedded.EMBEDDED == EMBEDDED


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: building leaves files beside what it builds."""
    missing = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"building a wheel needs {' and '.join(missing)}")
    source = tmp_path_factory.mktemp("source")
    for folder in ("minqwen", "weights/embedded"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source / file)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "-w", str(source / "dist"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", *offline, str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_a_wheel_has_every_file_of_the_package_and_of_the_model(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = [ROOT / "minqwen/py.typed", ROOT / "minqwen/serve/page.html"]
    sources = [*(ROOT / "minqwen").rglob("*.py"), *data]
    want = {str(path.relative_to(ROOT)) for path in sources}
    assert files == want | {f"minqwen/embedded/{path.name}" for path in EMBEDDED.iterdir()}


def test_an_installed_engine_without_an_argument_runs_the_embedded_model(wheel, tmp_path):
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()

    def run(path: Path) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONPATH": str(path)},
            cwd=elsewhere,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines()

    file, output = run(installed)
    assert Path(file).is_relative_to(installed)
    assert output == run(ROOT)[1]
