// What the plugins must refuse, and what they must say.
#pragma once

namespace harness {

void check_refusals();

}  // namespace harness
