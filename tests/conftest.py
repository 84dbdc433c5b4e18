"""Fixtures for all tests: torchvision under CPU torch, and repeatable random numbers.

Build tools that the dev extra installs are found although the environment is not activated.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support import fuzzing, torchvision_shim

torchvision_shim.install()
# A run that was started in the background ignores Ctrl-C, which tests of interruptions send.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: waking a second thread for them takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> None:
    """No compiled graphs of earlier tests."""
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: with several processes none is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases the fuzz tests ran (in this process: ``make fuzz`` uses one)."""
    if fuzzing.COUNTS:
        terminalreporter.section("fuzzed cases")
        for name, count in sorted(fuzzing.COUNTS.items()):
            terminalreporter.line(f"{count:8d}  {name}")
        terminalreporter.line(f"{fuzzing.COUNTS.total():8d}  in all")
