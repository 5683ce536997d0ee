"""This machine: what may decide the last bits of native arithmetic, and this process's memory."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from minqwen.errors import MinqwenError


def cpu_name() -> str:
    """The processor's name as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def described_cpu() -> str:
    """Its name and the vector instructions that torch uses."""
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def this_machine() -> dict[str, str]:
    """The versions and the processor."""
    return {
        "minqwen": package_version("minqwen"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": described_cpu(),
        "threads": str(torch.get_num_threads()),
    }


def same_bits_expected(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether native arithmetic must give the same bits on these two machines."""
    return all(a.get(key) == b.get(key) for key in ("torch", "cpu", "threads"))


def resident_bytes(field: str) -> int:
    """VmRSS: main memory that this process has now. VmHWM: the most since the mark was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise MinqwenError(f"/proc/self/status: has no {field}, expected Linux's; measure on Linux")


def forget_high_water_mark() -> None:
    """VmHWM begins again at what this process has now."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS
