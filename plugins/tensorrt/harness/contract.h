// What TensorRT may ask of the plugins besides running them, right answers and refusals.
#pragma once

namespace harness {

void check_contract();

}  // namespace harness
