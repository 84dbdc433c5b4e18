"""Fixtures for all tests: torchvision under CPU torch, and repeatable random numbers."""

from __future__ import annotations

import pytest
import torch

from support import torchvision_shim

torchvision_shim.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> None:
    """No compiled graphs of earlier tests."""
    torch._dynamo.reset()
