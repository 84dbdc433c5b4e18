"""The few calls of the CUDA runtime that running an engine takes, through ctypes.

Pointers, streams, events and graphs are integers. Every call is checked.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import asdict, dataclass
from typing import Any

from dwattn.errors import DeployError

#: Names one library file instead of those that are tried.
LIBRARY_VARIABLE = "DWATTN_CUDART"
_NAMES = (
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
    "/usr/local/cuda/targets/aarch64-linux/lib/libcudart.so",
)
_OUT_OF_MEMORY = 2
_NO_DEVICE = {3, 35, 100, 101, 803, 804}
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_SPIN = 1
_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_CC_MAJOR, _CC_MINOR = 75, 76
_NAME_BYTES = 256  # the properties start with it, in every version


@dataclass(frozen=True)
class Device:
    """A GPU: name, compute capability such as ``"8.7"``, bytes of memory."""

    name: str
    compute_capability: str
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Cuda:
    """The CUDA runtime on its current device.

    Raises:
        DeployError: no library, or no usable GPU.
    """

    def __init__(self) -> None:
        self._library = _load()
        # Waits spin from now on; said before anything starts a context, as old versions want it.
        self._call("cudaSetDeviceFlags", c_uint(_SPIN))
        count = c_int()
        self._call("cudaGetDeviceCount", byref(count))
        if count.value == 0:
            raise DeployError("There is no GPU: the CUDA driver reports no device.")

    def device(self) -> Device:
        """The current device."""
        index, major, minor = c_int(), c_int(), c_int()
        self._call("cudaGetDevice", byref(index))
        self._call("cudaDeviceGetAttribute", byref(major), c_int(_CC_MAJOR), index)
        self._call("cudaDeviceGetAttribute", byref(minor), c_int(_CC_MINOR), index)
        # Larger than the structure of any version.
        properties = ctypes.create_string_buffer(8192)
        self._call("cudaGetDeviceProperties", properties, index)
        free, total = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", byref(free), byref(total))
        name = properties.raw[:_NAME_BYTES].split(b"\0")[0].decode(errors="replace")
        return Device(name, f"{major.value}.{minor.value}", total.value)

    def malloc(self, size: int) -> int:
        pointer = c_void_p()
        self._call("cudaMalloc", byref(pointer), c_size_t(max(size, 1)), size=size)
        return int(pointer.value or 0)

    def free(self, pointer: int) -> None:
        self._call("cudaFree", c_void_p(pointer))

    def upload(self, pointer: int, host: int, size: int) -> None:
        self._call(
            "cudaMemcpy", c_void_p(pointer), c_void_p(host), c_size_t(size), c_int(_HOST_TO_DEVICE)
        )

    def download(self, host: int, pointer: int, size: int) -> None:
        self._call(
            "cudaMemcpy", c_void_p(host), c_void_p(pointer), c_size_t(size), c_int(_DEVICE_TO_HOST)
        )

    def stream(self) -> int:
        return self._create("cudaStreamCreateWithFlags", c_uint(_NON_BLOCKING))

    def event(self) -> int:
        return self._create("cudaEventCreate")

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", c_void_p(event), c_void_p(stream))

    def wait(self, event: int) -> None:
        self._call("cudaEventSynchronize", c_void_p(event))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", c_void_p(stream))

    def elapsed_ms(self, start: int, stop: int) -> float:
        time = c_float()
        self._call("cudaEventElapsedTime", byref(time), c_void_p(start), c_void_p(stop))
        return time.value

    def begin_capture(self, stream: int) -> None:
        self._call("cudaStreamBeginCapture", c_void_p(stream), c_int(_CAPTURE_THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        """An executable graph of what was enqueued since :meth:`begin_capture`."""
        graph = self._create("cudaStreamEndCapture", first=c_void_p(stream))
        executable = c_void_p()
        try:
            self._call(
                "cudaGraphInstantiateWithFlags", byref(executable), c_void_p(graph), c_ulonglong(0)
            )
        finally:
            self._call("cudaGraphDestroy", c_void_p(graph))
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", c_void_p(graph), c_void_p(stream))

    def destroy(self, kind: str, handle: int) -> None:
        """Release a ``"Stream"``, ``"Event"`` or ``"GraphExec"``."""
        self._call(f"cuda{kind}Destroy", c_void_p(handle))

    def _create(self, name: str, *arguments: Any, first: Any = None) -> int:
        handle = c_void_p()
        if first is None:
            self._call(name, byref(handle), *arguments)
        else:
            self._call(name, first, byref(handle), *arguments)
        return int(handle.value or 0)

    def _call(self, name: str, *arguments: Any, size: int | None = None) -> None:
        status = getattr(self._library, name)(*arguments)
        if status == 0:
            return
        describe = self._library.cudaGetErrorString
        describe.restype = c_char_p
        reason = describe(c_int(status)).decode(errors="replace")
        if status == _OUT_OF_MEMORY:
            wanted = "" if size is None else f" {size / 2**20:.0f} MiB were asked for."
            raise DeployError(
                f"The GPU's memory is full.{wanted} Close other programs or use a smaller batch; "
                "on a Jetson the CPU's programs share this memory."
            )
        if status in _NO_DEVICE:
            raise DeployError(
                f"There is no usable GPU ({reason}). Engines run on the device they are built for; "
                "dwattn bench m.onnx --provider cpu measures a CPU."
            )
        raise DeployError(f"{name} failed: {reason} (CUDA error {status}).")


@functools.lru_cache(maxsize=1)
def _load() -> ctypes.CDLL:
    named = os.environ.get(LIBRARY_VARIABLE)
    tried = []
    for name in (named,) if named else _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:  # noqa: PERF203
            tried.append(str(error))
    raise DeployError(
        "The CUDA runtime library cannot be loaded; set "
        f"{LIBRARY_VARIABLE} to libcudart.so if it is installed. Tried: " + "; ".join(tried)
    )
