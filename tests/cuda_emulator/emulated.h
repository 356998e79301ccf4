// What tests ask of the emulated device.
#pragma once

#include <cstdint>

namespace gam::cuda {

void use_stream(int64_t id);
void capture(uint64_t id);  // 0: none
int64_t upload_count();
bool was_recorded(int64_t address);
void forget_records();

}  // namespace gam::cuda
