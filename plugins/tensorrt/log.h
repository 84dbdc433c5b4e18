// Where messages go, and the guard around every override that TensorRT declares noexcept.
#pragma once

#include <NvInferRuntime.h>

#include <cstdio>
#include <exception>

namespace dwattn::trt {

// TensorRT calls this through setLoggerFinder; null goes back to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// An error, to the logger of the running builder or context, else to stderr.
void log_error(const char* text) noexcept;

// What `body` returns; where it throws, the exception is logged after `who` and `on_error`
// returned.
template <class Result, class Body>
Result guarded(const char* who, Result on_error, const Body& body) noexcept {
  char text[2048];  // nothing is allocated: the exception may be bad_alloc
  try {
    return body();
  } catch (const std::exception& error) {
    std::snprintf(text, sizeof text, "[dwattn] %s: %s", who, error.what());
  } catch (...) {
    std::snprintf(text, sizeof text, "[dwattn] %s: unknown exception", who);
  }
  log_error(text);
  return on_error;
}

}  // namespace dwattn::trt
