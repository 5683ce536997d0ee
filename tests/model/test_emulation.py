"""float64 products on a GPU must be float64 products: an emulation is refused."""

from __future__ import annotations

import pytest
import torch
from support.paths import EMBEDDED

from minqwen import Qwen2
from minqwen.errors import ConfigError
from minqwen.model.emulation import EMULATE, library_settings, refuse_emulation


def test_an_emulation_that_was_asked_for_is_refused(monkeypatch):
    monkeypatch.setenv(EMULATE, "1")
    with pytest.raises(ConfigError, match=f"{EMULATE} is '1': .* unset it"):
        refuse_emulation()


@pytest.mark.parametrize("value", [None, "", "0", " 0 "])
def test_nothing_is_refused_where_it_is_off(monkeypatch, value):
    monkeypatch.delenv(EMULATE, raising=False)
    if value is not None:
        monkeypatch.setenv(EMULATE, value)
    refuse_emulation()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_exact_arithmetic_refuses_it_on_a_gpu(monkeypatch):
    monkeypatch.setenv(EMULATE, "1")
    with pytest.raises(ConfigError, match="unset it"):
        Qwen2.from_pretrained(EMBEDDED, dtype="float32", device="cuda", arithmetic="exact")


def test_the_settings_of_nvidias_libraries_can_be_shown(monkeypatch):
    monkeypatch.setenv("CUBLAS_EMULATION_STRATEGY", "eager")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    found = library_settings()
    assert found["CUBLAS_EMULATION_STRATEGY"] == "eager" and found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "PATH" not in found
