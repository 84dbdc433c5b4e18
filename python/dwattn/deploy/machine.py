"""What a measurement ran on: board, power mode, clocks, CPU."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_FILES = {
    "board": "/proc/device-tree/model",
    "l4t": "/etc/nv_tegra_release",
}
_GOVERNOR = "/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
_FREQUENCY = "/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"


def describe(core: int = 0) -> dict[str, Any]:
    """Plain data; on a Jetson with the board, the L4T release and the power mode."""
    info: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
    }
    for key, path in _FILES.items():
        text = _read(path)
        if text:
            info[key] = text.splitlines()[0]
    mode = _power_mode()
    if mode:
        info["power_mode"] = mode
    governor, frequency = _read(_GOVERNOR.format(core=core)), _read(_FREQUENCY.format(core=core))
    if governor:
        info["cpu_governor"] = governor
    if frequency.isdigit():
        info["cpu_mhz"] = int(frequency) // 1000
    return info


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith(("model name", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _power_mode() -> str:
    """``nvpmodel -q`` in one line, for example ``NV Power Mode: MAXN_SUPER``."""
    try:
        answer = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line for line in answer.stdout.splitlines() if "Power Mode" in line), "")
