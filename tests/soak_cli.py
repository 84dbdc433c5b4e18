"""Soak of the command: every step stopped at random moments by SIGINT, SIGTERM or SIGKILL.

    python tests/soak_cli.py --trials 200

After each trial the output is the old file, untouched, or a new one that loads; and unless the process was
killed outright, nothing else lies beside it. Prints a table of trials by command, signal and outcome; exit code
1 at the first violation, with the seed that repeats it. Processes are forked with torch already imported, so
that the signals fall on the work and not on the imports; Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
OLD = b"an older file"
#: Run in this process, whose path and torchvision main() has prepared.
FACTORY = "from support.models import timm_vit\n"


@dataclass(frozen=True)
class Step:
    """One command: its arguments, the file it writes, how that file is read, and its usual duration."""

    name: str
    arguments: tuple[str, ...]
    out: Path
    read: Callable[[Path], object]
    seconds: float = 0.0


def run(arguments: tuple[str, ...], said: str = os.devnull) -> int:
    """The command in this process; its exit code. What it prints goes to the file ``said``."""
    from dwattn.cli import app

    with Path(said).open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            app(list(arguments))
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def forked(arguments: tuple[str, ...]) -> int:
    """Start the command in a child process of its own; its process id."""
    # Held back until the child can catch them: it must never run on in the parent's code.
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        os._exit(run(arguments))
    except KeyboardInterrupt:
        # Before the command's own handling or after it: Python would print a traceback and end so.
        os._exit(130)
    except BaseException:
        os._exit(99)


def prepare(folder: Path) -> list[Step]:
    """Images, the files that later steps need, and the steps themselves with their durations."""
    import numpy as np
    from PIL import Image

    import dwattn
    from dwattn.scores import Scores
    from support.models import timm_vit

    (folder / "factory.py").write_text(FACTORY, encoding="utf-8")
    model = f"{folder / 'factory.py'}:timm_vit"
    images = folder / "images"
    images.mkdir()
    noise = np.random.default_rng(0)
    for index in range(16):
        pixels = noise.integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")

    scores, plan, student = (folder / f"good.{name}" for name in ("scores", "json", "safetensors"))

    def load_student(path: Path) -> None:
        dwattn.load(timm_vit(), path)

    def load_onnx(path: Path) -> None:
        import onnx

        onnx.checker.check_model(onnx.load(str(path)))

    few = ("--images", str(images), "--num-images", "16", "--batch-size", "2")
    chain = [
        ("score", ("score", model, *few), scores, Scores.load),
        ("select", ("select", str(scores), "--blocks", "2"), plan, dwattn.Plan.load),
        (
            "replace",
            ("replace", model, str(plan), "--calibrate", str(images), "--num-images", "16"),
            student,
            load_student,
        ),
        ("export", ("export", model, str(student)), folder / "good.onnx", load_onnx),
    ]
    steps = []
    for name, arguments, good, read in chain:
        if code := run((*arguments, "--out", str(good)), str(folder / "said")):
            said = (folder / "said").read_text(encoding="utf-8")
            sys.exit(f"dwattn {name} fails even when left alone (exit code {code}): {said}")
        read(good)
        start = time.perf_counter()  # the second run is what a forked child does: all is imported
        run((*arguments, "--out", str(good)))
        out = folder / "work" / good.name
        steps.append(Step(name, arguments, out, read, time.perf_counter() - start))
    return steps


def trial(step: Step, chosen: signal.Signals, delay: float) -> str:
    """Stop the step after ``delay`` seconds; the outcome, or AssertionError."""
    place = step.out.parent
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    step.out.write_bytes(OLD)
    child = forked((*step.arguments, "--out", str(step.out)))
    time.sleep(delay)
    os.kill(child, chosen)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    beside = [path.name for path in place.iterdir() if path != step.out]
    if chosen is not signal.SIGKILL:
        assert not beside, f"left behind: {beside}"
        # A signal may also arrive before the command's own handling of it.
        assert code in (0, 130, 143, -signal.SIGTERM), f"exit code {code}"
    elif beside:
        assert all(name.startswith(f".{step.out.name}.") for name in beside), beside
    if step.out.read_bytes() == OLD:
        assert code != 0, "done without a result"
        return "stopped, old file kept"
    step.read(step.out)
    return "complete" if code == 0 else "stopped, new file complete"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of a pool do not survive a fork
    import torch

    from support import torchvision_shim

    torchvision_shim.install()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    outcomes: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="dwattn-soak-") as name:
        steps = prepare(Path(name))
        for index in range(options.trials):
            step = steps[index % len(steps)]
            chosen = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            delay = chance.uniform(0, 1.1 * step.seconds)
            try:
                outcome = trial(step, chosen, delay)
            except Exception as error:
                where = f"trial {index}, dwattn {step.name}, {chosen.name} after {delay:.3f} s"
                sys.exit(f"Failed (--seed {options.seed}): {where}: {error!r}")
            outcomes[step.name, chosen.name, outcome] += 1
    for (command, sent, outcome), count in sorted(outcomes.items()):
        print(f"{count:6d}  {command:8} {sent:8} {outcome}")
    print(f"{outcomes.total():6d}  trials, no half-written file")


if __name__ == "__main__":
    main()
