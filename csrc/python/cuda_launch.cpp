#include "python/cuda_launch.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels/failure.h"

namespace dwattn::python {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or it would be reported again by the next call
  throw std::runtime_error(what + " failed: " + cudaGetErrorString(error) + ".");
}

// The device whose memory all arrays are in.
int device_of(const std::vector<CudaArray>& arrays) {
  int device = -1;
  const char* first = nullptr;
  for (const CudaArray& array : arrays) {
    if (array.numel() == 0) continue;
    cudaPointerAttributes memory{};
    check(cudaPointerGetAttributes(&memory, array.data),
          std::string("Looking up the memory of ") + array.name);
    if (memory.type != cudaMemoryTypeDevice && memory.type != cudaMemoryTypeManaged) {
      fail(array.name, " is not in GPU memory.");
    }
    if (device >= 0 && memory.device != device) {
      fail(array.name, " is on GPU ", memory.device, " but ", first, " is on GPU ", device, ".");
    }
    device = memory.device;
    if (first == nullptr) first = array.name;
  }
  return device;
}

class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&before_), "Asking for the current GPU");
    check(cudaSetDevice(device), "Choosing the GPU");
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

cudaStream_t stream_of(uintptr_t handle) {
  return handle == 0 ? cudaStreamLegacy : reinterpret_cast<cudaStream_t>(handle);
}

// What `later` is given from now on runs after what `earlier` holds now.
void order(cudaStream_t earlier, cudaStream_t later) {
  if (earlier == later) return;
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "Creating an event");
  cudaError_t error = cudaEventRecord(event, earlier);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(later, event, 0);
  cudaEventDestroy(event);  // once it has been reached
  check(error, "Ordering two streams");
}

// Memory for one call, in the order of its stream. A device without memory pools gets it from
// cudaMalloc, and giving that back waits for the work.
class Workspace {
 public:
  Workspace(int64_t bytes, cudaStream_t stream) : stream_(stream) {
    if (bytes <= 0) return;
    const auto size = static_cast<size_t>(bytes);
    cudaError_t error = cudaMallocAsync(&data_, size, stream);
    if (error == cudaErrorNotSupported) {
      cudaGetLastError();  // or the next launch would report it
      pooled_ = false;
      error = cudaMalloc(&data_, size);
    }
    check(error, "Taking " + std::to_string(bytes) + " bytes of GPU memory");
  }
  void* data() const { return data_; }
  void give_back() {
    if (data_ == nullptr) return;
    check(pooled_ ? cudaFreeAsync(data_, stream_) : cudaFree(data_), "Returning GPU memory");
  }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
  bool pooled_ = true;
};

}  // namespace

void launch(const Launch& work) {
  const DeviceScope scope(device_of(work.arrays));
  const cudaStream_t stream =
      stream_of(work.stream.value_or(work.arrays.back().stream.value_or(0)));
  for (const CudaArray& array : work.arrays) {
    if (array.stream.has_value()) order(stream_of(*array.stream), stream);
  }
  if (work.copy.bytes > 0) {
    const RowCopy& rows = work.copy;
    check(cudaMemcpy2DAsync(rows.to, static_cast<size_t>(rows.to_pitch), rows.from,
                            static_cast<size_t>(rows.from_pitch), static_cast<size_t>(rows.bytes),
                            static_cast<size_t>(rows.count), cudaMemcpyDeviceToDevice, stream),
          "Copying the prefix rows");
  }
  Workspace workspace(work.workspace_bytes, stream);
  const Status status = work.kernel(workspace.data(), stream);
  workspace.give_back();
  if (status != Status::kOk) {
    throw std::runtime_error("The CUDA kernel failed: " + failure_text(status) + ".");
  }
  for (size_t i = work.arrays.size() - work.written; i < work.arrays.size(); ++i) {
    if (work.arrays[i].stream.has_value()) order(stream, stream_of(*work.arrays[i].stream));
  }
}

}  // namespace dwattn::python
