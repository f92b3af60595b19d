"""The kernel of a plain bottleneck, in Triton's interpreter; tests/test_gpu.py runs it on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmadapters.methods.kernels import fused

SCRIPT = Path(__file__).with_name("fused_by_interpreter.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_computes_the_formula() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 3 * len(fused.CODES)
    # Half precision rounds to 2^-11 = 4.9e-4.
    assert {line[0]: line for line in lines if float(line[-1]) > 1e-3} == {}


def test_kernel_is_for_half_precision_on_a_gpu_alone() -> None:
    h = torch.randn(2, 8)
    maps = (torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8))
    assert not fused.fits(h, h, maps, "relu")
