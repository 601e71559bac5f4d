"""Which precision a processor is fast in."""

import os
import re
import subprocess
import sys

import pytest
import torch

from ds_cmli.hardware import bf16_is_fast
from tests.ranks import clean_environment

FAST = torch.cpu.get_capabilities().get("avx512_bf16") if hasattr(torch.cpu, "get_capabilities") else None


def test_onednns_limit_counts(monkeypatch):
    for level in ("AVX2", "avx512_core", "AVX512_CORE_VNNI"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
        assert not bf16_is_fast()


@pytest.mark.skipif(not FAST or "ONEDNN_MAX_CPU_ISA" in os.environ, reason="a processor without avx512_bf16")
def test_a_processor_with_the_instructions_is_fast_with_or_without_a_limit_that_has_them(monkeypatch):
    assert bf16_is_fast()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert bf16_is_fast()


@pytest.mark.slow
def test_the_default_json_takes_fp32_under_avx2():
    code = (
        "from ds_cmli import engine; from ds_cmli.config.deepspeed_config import DeepSpeedConfig as D\n"
        "found = engine.on_this_device(D.of({'fp16': {'enabled': True}, 'zero_optimization': {'stage': 2}}))\n"
        "print(found.precision)"
    )
    env = clean_environment() | {"ONEDNN_MAX_CPU_ISA": "AVX2", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "\ntraining in fp32 on this device (cpu), where fp16 is slow or missing\nfp32\n" in done.stdout, done.stderr
    assert re.match(r"device: cpu, AVX2 without bf16, \d+ threads\n", done.stdout)
