// What tests ask of the emulator, as functions of the module.

#include <torch/csrc/utils/pybind.h>

#include "cuemu.h"
#include "emulated.h"

namespace py = pybind11;

void bind_emulator(py::module_& m) {
  m.def("set_order", [](const std::string& order) { cuemu::block().set_order(order); }, py::arg("order"));
  m.def("use_stream", &gam::cuda::use_stream, py::arg("id"));
  m.def("capture", &gam::cuda::capture, py::arg("id"));
  m.def("uploads", &gam::cuda::upload_count);
  m.def("was_recorded", &gam::cuda::was_recorded, py::arg("address"));
  m.def("forget_records", &gam::cuda::forget_records);
}
