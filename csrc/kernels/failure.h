// A failed kernel in words. Host code.
#pragma once

#include <string>

#include "kernels/params.h"

namespace dwattn {

// What CUDA said of this thread's last launch that it refused; empty where none was.
inline thread_local const char* launch_error = "";

inline std::string failure_text(Status status) {
  const bool said = status == Status::kLaunchFailed && *launch_error != '\0';
  return status_text(status) + (said ? " (CUDA: " + std::string(launch_error) + ")" : "");
}

}  // namespace dwattn
