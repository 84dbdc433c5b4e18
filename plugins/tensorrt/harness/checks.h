// Expectations, and a logger that keeps what the plugin says.
#pragma once

#include <NvInferRuntime.h>

#include <cstdio>
#include <string>
#include <utility>

// What the library exports; the harness is linked with it.
extern "C" {
void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
}

namespace harness {

inline int failures = 0;

inline void expect(bool condition, const std::string& sentence) {
  if (condition) return;
  ++failures;
  std::printf("FAIL %s\n", sentence.c_str());
}

class KeepingLogger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity severity, const nvinfer1::AsciiChar* text) noexcept override {
    if (severity <= Severity::kERROR) text_ += std::string(text) + '\n';
  }
  nvinfer1::ILogger* findLogger() override { return this; }

  std::string take() { return std::exchange(text_, {}); }

 private:
  std::string text_;
};

inline KeepingLogger logger;

// That nothing was logged since the last look.
inline void expect_silence(const std::string& what) {
  const std::string said = logger.take();
  expect(said.empty(), what + " logged: " + said);
}

// That an error was logged that contains `words`.
inline void expect_said(const std::string& words, const std::string& what) {
  const std::string said = logger.take();
  expect(said.find(words) != std::string::npos,
         what + ": expected a message with \"" + words + "\", got \"" + said + '"');
}

}  // namespace harness
