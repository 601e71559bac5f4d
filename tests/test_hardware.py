"""Which precision a processor is fast in."""

import os
import re

import pytest
import torch

from ds_cmli.hardware import bf16_is_fast
from tests.ranks import clean_environment, python

FAST = torch.cpu.get_capabilities().get("avx512_bf16") if hasattr(torch.cpu, "get_capabilities") else None


def test_onednns_limit_counts(monkeypatch):
    if FAST and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert bf16_is_fast()
    for level in ("AVX2", "avx512_core", "AVX512_CORE_BF16"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
        assert bf16_is_fast() == bool(FAST and level == "AVX512_CORE_BF16")


@pytest.mark.slow
def test_the_default_json_takes_fp32_under_avx2():
    code = (
        "from ds_cmli import engine; from ds_cmli.config.deepspeed_config import DeepSpeedConfig as D\n"
        "found = engine.on_this_device(D.of({'fp16': {'enabled': True}, 'zero_optimization': {'stage': 2}}))\n"
        "print(found.precision)"
    )
    env = clean_environment() | {"ONEDNN_MAX_CPU_ISA": "AVX2", "DS_ACCELERATOR": "cpu"}
    done = python("-c", code, env=env, timeout=120)
    assert "\ntraining in fp32 on this device (cpu), where fp16 is slow or missing\nfp32\n" in done.stdout, done.stderr
    assert re.match(r"device: cpu, AVX2 without bf16, \d+ threads\n", done.stdout)
