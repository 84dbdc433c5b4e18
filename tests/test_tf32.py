"""Whether the kernels for GPUs may take fp32 products in TF32 is PyTorch's setting; read without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from dwattn import library

pytestmark = pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error())


@pytest.fixture
def fp32_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("fp32_precision")
def test_the_kernels_are_told_what_pytorch_allows_in_fp32() -> None:
    allowed = torch.ops.dwattn._allow_tf32.default
    assert allowed() is False  # PyTorch's default
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert allowed() is True
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert allowed() is False
    torch.set_float32_matmul_precision("high")
    assert allowed() is True
    torch.set_float32_matmul_precision("highest")
    assert allowed() is False


def test_without_python_there_is_no_tf32() -> None:
    spec = importlib.util.find_spec("dwattn._C")
    assert spec is not None
    code = f"""
import torch
torch.ops.load_library({spec.origin!r})
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert torch.ops.dwattn._allow_tf32.default() is False
"""
    subprocess.run([sys.executable, "-c", code], check=True)
