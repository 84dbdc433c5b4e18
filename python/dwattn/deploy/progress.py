"""Progress on stderr: a bar where rich and a terminal are there, else a line every few seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_PERIOD = 5.0


class Progress:
    """Steps of one task at a time; ``steps`` may be unknown (0)."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._last = self._started = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps are over."""
        now = time.monotonic()
        if now - self._last < _PERIOD:
            return
        self._last = now
        spent = now - self._started
        left = f", about {spent / done * (total - done):.0f} s left" if done and total else ""
        print(f"{self._task}: {done} of {total}, {spent:.0f} s{left}", file=sys.stderr)


class _Bar(Progress):
    def __init__(self, task: str, bar: Any) -> None:
        super().__init__(task)
        self._bar = bar
        self._id = bar.add_task(task, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._id, completed=done, total=total or None)


@contextlib.contextmanager
def progress(task: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the steps done and in all."""
    if not shown:
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as RichProgress
    except ImportError:
        yield Progress(task)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Progress(task)
        return
    with RichProgress(console=console, transient=True) as bar:
        yield _Bar(task, bar)


def make_monitor(trt: Any, report: Callable[[int, int], None], stop: Callable[[], object]) -> Any:
    """TensorRT's progress monitor: the outermost phase is what is shown.

    Args:
        report: gets its steps done and in all.
        stop: true once the build shall end early.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, tuple[bool, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = (not parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            outermost, steps = self._steps.get(phase_name, (False, 0))
            if outermost:
                report(step + 1, steps)
            return not stop()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
