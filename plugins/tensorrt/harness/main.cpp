// Drives the plugin library without TensorRT: its contract, and golden cases.
//   harness [FOLDER...]      folders of golden cases (golden.h)
#include <cstdio>

#include "checks.h"
#include "contract.h"
#include "golden.h"
#include "refusals.h"

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  setLoggerFinder(&harness::logger);
  harness::check_contract();
  harness::check_refusals();
  for (int i = 1; i < count; ++i) harness::check_golden(arguments[i]);
  std::printf("%d failure(s)\n", harness::failures);
  return harness::failures == 0 ? 0 : 1;
}
