// What TensorRT asks of the plugins besides running them.
#pragma once

namespace harness {

void check_contract();

}  // namespace harness
