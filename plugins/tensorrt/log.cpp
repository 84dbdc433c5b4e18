#include "log.h"

#include <atomic>

namespace dwattn::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() {
  nvinfer1::ILoggerFinder* const finder = logger_finder.load();
  return finder != nullptr ? finder->findLogger() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_error(const char* text) noexcept {
  try {
    if (nvinfer1::ILogger* const logger = find_logger()) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, text);
      return;
    }
  } catch (...) {
    // Neither findLogger nor a Python logger behind it is bound not to throw.
  }
  std::fprintf(stderr, "%s\n", text);
}

}  // namespace dwattn::trt
