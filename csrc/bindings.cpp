// gam_fast._C: names, arguments and docstrings of the operations, nothing else.

#include <c10/util/StringUtil.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "draws.h"
#include "gradients.h"
#include "ops.h"

#if defined(GAM_CUDA)
#include "cuda/kernels.h"
#endif
#if !defined(GAM_EMULATED)
#include "cpu/dispatch.h"
#endif

namespace py = pybind11;

#if defined(__VERSION__)
#define GAM_COMPILER "C++ " __VERSION__
#else
#define GAM_COMPILER "unknown"
#endif

namespace {

using gam::Numbers;
using gam::TensorList;

gam::Block leaves_of(py::handle leaves) {
  if (!py::hasattr(leaves, "params")) throw py::type_error("leaves must be a Block of gam_fast.backends.base");
  gam::Block result;
  result.params = TensorList("params", leaves.attr("params"));
  result.saved = leaves.attr("saved").cast<bool>();
  result.backup = TensorList("backup", leaves.attr("backup"));
  return result;
}

std::vector<Numbers> table(const char* name, py::handle lists) {
  std::vector<Numbers> result;
  for (const py::object& list : gam::unpack_entries(name, lists, "lists of numbers")) {
    result.push_back(gam::unpack_numbers(std::string(name) + "[" + std::to_string(result.size()) + "]", list));
  }
  return result;
}

std::vector<TensorList> lists_of(const char* name, py::handle lists, bool optional = false) {
  std::vector<TensorList> result;
  for (const py::object& list : gam::unpack_entries(name, lists, "lists of tensors")) {
    result.emplace_back(std::string(name) + "[" + std::to_string(result.size()) + "]", list, optional);
  }
  return result;
}

// Returns `make(handle)` of an argument, or an empty optional for None.
template <class F>
auto optional(py::handle argument, F make) -> std::optional<decltype(make(argument))> {
  if (argument.is_none()) return std::nullopt;
  return make(argument);
}

std::optional<TensorList> optional_list(const char* name, py::handle list) {
  return optional(list, [&](py::handle given) { return TensorList(name, given); });
}

std::optional<Numbers> optional_numbers(const char* name, py::handle list) {
  return optional(list, [&](py::handle given) { return gam::unpack_numbers(name, given); });
}

std::optional<std::vector<Numbers>> optional_table(const char* name, py::handle lists) {
  return optional(lists, [&](py::handle given) { return table(name, given); });
}

// Norms and products: tensors, or Python numbers.
at::Tensor sums_of(const char* name, py::handle sums) {
  if (sums.is_none()) return {};
  if (THPVariable_Check(sums.ptr())) return THPVariable_Unpack(sums.ptr());
  if (PyFloat_Check(sums.ptr())) return gam::tensor_of({PyFloat_AS_DOUBLE(sums.ptr())}, {});
  Numbers numbers;
  for (const Numbers& row : table(name, sums)) numbers.insert(numbers.end(), row.begin(), row.end());
  return gam::tensor_of(numbers, {static_cast<int64_t>(numbers.size())});
}

gam::Direction direction_of(py::handle d) {
  if (!py::hasattr(d, "terms")) throw py::type_error("d must be a Direction of gam_fast.backends.base");
  return {lists_of("terms", d.attr("terms")),
          table("p", d.attr("p")),
          optional_table("q", d.attr("q")),
          sums_of("products", d.attr("products")),
          gam::unpack_numbers("gamma", d.attr("gamma")),
          optional(d.attr("limit"), [](py::handle limit) { return limit.cast<double>(); })};
}

std::optional<gam::FoldInto> optional_fold(py::handle fold) {
  return optional(fold, [](py::handle given) {
    return gam::FoldInto{TensorList("fold.into", given.attr("into")), TensorList("fold.other", given.attr("other")),
                         gam::unpack_numbers("fold.k", given.attr("k")),
                         gam::unpack_numbers("fold.l", given.attr("l"))};
  });
}

std::vector<unsigned char> bytes_of(const py::bytearray& bytes) {
  const auto* first = reinterpret_cast<const unsigned char*>(PyByteArray_AS_STRING(bytes.ptr()));
  return {first, first + bytes.size()};
}

}  // namespace

#if defined(GAM_EMULATED)
void bind_emulator(py::module_& m);  // in tests/cuda_emulator
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() =  // Python reads the version from a file that cannot be loaded
      "The compiled core. gam_fast.backends.base states what each operation computes. "
      "Built for torch " TORCH_VERSION ".";
  gam::learn_counts();

  py::class_<gam::Tensors, std::shared_ptr<gam::Tensors>>(
      m, "Tensors", py::module_local(),
      "A list of tensors for several operations, which keeps the results of checking them.")
      .def("__len__", &gam::Tensors::size)
      .def("__getitem__",
           [](const gam::Tensors& tensors, int64_t i) {
             const auto size = static_cast<int64_t>(tensors.size());
             if (i < -size || i >= size) throw py::index_error(c10::str("there are ", size, " tensors, got index ", i));
             return tensors[static_cast<size_t>(i < 0 ? i + size : i)];
           })
      .def("__iter__",  // without it, a loop would end by an exception of C++
           [](const gam::Tensors& tensors) {
             py::list list(tensors.size());
             for (size_t i = 0; i < tensors.size(); ++i) list[i] = tensors[i];
             return py::iter(list);
           })
      .def_property_readonly("owned", &gam::Tensors::owned, "True if no code outside the engine can reach the memory.");

  m.def(
      "hold",
      [](py::handle tensors, const std::shared_ptr<gam::Tensors>& before) {
        const TensorList list("tensors", tensors);
        std::vector<at::Tensor> values;
        values.reserve(list.size());
        for (size_t i = 0; i < list.size(); ++i) values.push_back(*list[i]);
        if (!before) return std::make_shared<gam::Tensors>(std::move(values), false);
        before->take(std::move(values));
        return before;
      },
      py::arg("tensors"), py::arg("before") = nullptr);

  m.def("let_go", [](gam::Tensors& tensors) { tensors.let_go(); }, py::arg("tensors"));

  py::class_<gam::Versions>(m, "Versions", py::module_local())
      .def("first_changed", &gam::Versions::first_changed, py::arg("tensors"));

  py::class_<gam::Draws>(m, "Draws", py::module_local())
      .def(py::init<>())
      .def("begin", &gam::Draws::begin)
      .def("end", &gam::Draws::end)
      .def("pause", &gam::Draws::pause)
      .def("resume", &gam::Draws::resume)
      .def("can_undo", &gam::Draws::can_undo)
      .def("keep", &gam::Draws::keep);

  m.def(
      "kinds",
      [](const gam::Tensors& tensors) {
        std::vector<std::tuple<at::Device, at::ScalarType, bool>> found;  // few, mostly one entry
        for (size_t i = 0; i < tensors.size(); ++i) {
          const at::Tensor& tensor = tensors[i];
          const std::tuple kind(tensor.device(), tensor.scalar_type(), tensor.is_non_overlapping_and_dense());
          if (std::find(found.begin(), found.end(), kind) == found.end()) found.push_back(kind);
        }
        return found;
      },
      py::arg("tensors"));

  m.def("versions", [](const gam::Tensors& tensors) { return gam::Versions(tensors); }, py::arg("tensors"));

  m.def(
      "count_steps", [](py::handle steps, bool write) { return gam::count_steps(TensorList("steps", steps), write); },
      py::arg("steps"), py::arg("write"));

  m.def(
      "survey_gradients",
      [](const gam::Tensors& params, const py::bytearray& flags) {
        return gam::survey_gradients(params, bytes_of(flags));
      },
      py::arg("params"), py::arg("flags"));

  m.def("clear_gradients", &gam::clear_gradients, py::arg("params"), py::arg("recycle"), py::arg("keep_parts") = true);

  m.def(
      "take_all_gradients",
      [](const std::shared_ptr<gam::Tensors>& params, const gam::Versions& versions, const py::bytearray& flags,
         bool keep) { return gam::take_all_gradients(params, versions, bytes_of(flags), keep); },
      py::arg("params"), py::arg("versions"), py::arg("flags"), py::arg("keep"));

  m.def("take_gradients", &gam::take_gradients, py::arg("params"), py::arg("keep"));

  py::class_<gam::Plan>(m, "Plan", py::module_local(), "The shapes of a block of parameters, and its tables.")
      .def(py::init([](py::handle params, py::handle group) {
             return gam::Plan(TensorList("params", params), gam::unpack_integers("group", group));
           }),
           py::arg("params"), py::arg("group"))
      .def(
          "fits",
          [](gam::Plan& plan, py::handle params, py::handle group) {
            return plan.fits(TensorList("params", params), gam::unpack_integers("group", group));
          },
          py::arg("params"), py::arg("group"), "Return whether the plan can be used for these parameters.")
      .def(
          "takes_state",
          [](const gam::Plan& plan, py::handle state) { return plan.takes_state(lists_of("state", state, true)); },
          py::arg("state"), "Return whether lists of such tensors can be the state of a base optimizer.");

  m.def(
      "square_norm",
      [](gam::Plan& plan, py::handle leaves, py::handle a, py::handle b, py::handle eta) {
        return gam::square_norm(plan, leaves_of(leaves), TensorList("a", a), optional_list("b", b),
                                optional_numbers("eta", eta));
      },
      py::arg("plan"), py::arg("leaves"), py::arg("a"), py::arg("b"), py::arg("eta"));

  m.def(
      "perturb",
      [](gam::Plan& plan, py::object leaves, py::handle a, py::handle b, py::handle radius, py::handle square,
         bool from_start, py::handle eta, py::handle fold, py::handle multiple) {
        gam::perturb(plan, leaves_of(leaves), TensorList("a", a), optional_list("b", b),
                     gam::unpack_numbers("radius", radius), sums_of("square", square), from_start,
                     optional_numbers("eta", eta), optional_fold(fold), optional_numbers("multiple", multiple));
        leaves.attr("saved") = true;  // set here, so that no signal handler can come between
      },
      py::arg("plan"), py::arg("leaves"), py::arg("a"), py::arg("b"), py::arg("radius"), py::arg("square"),
      py::arg("from_start"), py::arg("eta"), py::arg("fold"), py::arg("multiple") = py::none(),
      "Perturb the parameters; set leaves.saved.");

  m.def(
      "inner_products",
      [](gam::Plan& plan, py::handle terms, py::handle p, py::handle m, int64_t groups) {
        gam::Direction u;
        u.terms = lists_of("terms", terms);
        u.p = table("p", p);
        return gam::inner_products(plan, u, optional_table("m", m), groups);
      },
      py::arg("plan"), py::arg("terms"), py::arg("p"), py::arg("m"), py::arg("groups"));

  m.def(
      "restore", [](gam::Plan& plan, py::handle leaves) { gam::restore(plan, leaves_of(leaves)); }, py::arg("plan"),
      py::arg("leaves"));

  m.def(
      "direction",
      [](gam::Plan& plan, py::handle leaves, py::handle d, py::handle out) {
        gam::direction(plan, leaves_of(leaves), direction_of(d), TensorList("out", out));
      },
      py::arg("plan"), py::arg("leaves"), py::arg("d"), py::arg("out"));

  m.def(
      "update",
      [](gam::Plan& plan, py::handle leaves, py::handle d, const std::string& formula, py::handle state,
         py::handle groups, py::handle options, py::handle option) {
        gam::update(plan, leaves_of(leaves), direction_of(d), formula, lists_of("state", state, true),
                    table("groups", groups), table("options", options), gam::unpack_integers("option", option));
      },
      py::arg("plan"), py::arg("leaves"), py::arg("d"), py::arg("formula"), py::arg("state"), py::arg("groups"),
      py::arg("options"), py::arg("option"));

  m.def(
      "empty_like", [](py::handle tensors) { return gam::empty_like(TensorList("tensors", tensors)); },
      py::arg("tensors"), "Return an uninitialised tensor like each.");

#if defined(GAM_EMULATED)
  bind_emulator(m);
#else
  m.def("instruction_sets", &gam::cpu::instruction_sets,
        "Return the compiled instruction sets that this processor supports, best first.");
  m.def("instruction_set", [] { return gam::cpu::kernels().isa; }, "Return the instruction set in use.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!gam::cpu::use_instruction_set(name.c_str())) {
          throw py::value_error("name must be one of instruction_sets(), got '" + name + "'");
        }
      },
      py::arg("name"), "Select an instruction set for the whole process.");
#endif

#if defined(GAM_CUDA)
  m.def("launches", &gam::cuda::launches, "Return the number of kernels launched.");
#else
  m.def("launches", [] { return 0; }, "Return the number of kernels launched.");
#endif

  m.def("device_types", &gam::device_types, "Return the device types that the core was built for.");

#if defined(GAM_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = GAM_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = GAM_COMPILER;
}
