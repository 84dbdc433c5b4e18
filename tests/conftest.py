"""Fixtures for all tests: torchvision under CPU torch, and repeatable random numbers.

Build tools that the dev extra installs are found although the environment is not activated.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from support import torchvision_shim

torchvision_shim.install()
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> None:
    """No compiled graphs of earlier tests."""
    torch._dynamo.reset()
