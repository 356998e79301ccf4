// The tables of one optimizer's parameters on one device: made on the host, copied to the device when they changed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../shapes.h"
#include "device.h"
#include "kernels.h"

namespace gam::cuda {

using Bytes = std::vector<unsigned char>;

class Tables {
 public:
  explicit Tables(const Shapes& shapes);

  // Blocks of a grid over all leaves.
  int64_t chunks() const { return static_cast<int64_t>(pieces_.size()); }

  // Begins the table of a launch: the lists of a primitive and, for an update, by leaf its place among the options.
  void begin(const List* lists, int count, const int32_t* option = nullptr);

  // Numbers of the launch. The table has those that do not fit the arguments of a kernel.
  template <class N>
  Numbers<N> numbers(const N* values, size_t count) {
    Numbers<N> result;
    if (values && count <= static_cast<size_t>(kFew)) std::copy_n(values, count, result.few);
    if (values && count > static_cast<size_t>(kFew)) result.many = append(bytes_, values, count);
    return result;
  }
  template <class N>
  Numbers<N> by_group(const N* values) {
    return numbers(values, static_cast<size_t>(shapes_.groups()));
  }

  // The table on the device, for one launch on the current stream: valid until the next.
  Table finish();

  // Where each group's chunks begin, and the end; on the device, as the last table.
  const int64_t* starts() const { return starts_on_device_; }

 private:
  // Memory of the device with what was copied to it, on a stream and perhaps for a graph.
  struct Entry {
    Bytes bytes;
    c10::DataPtr memory;
    int64_t stream = -1;
    uint64_t capture = 0;
    uint64_t used = 0;

    bool is_of(const Stream& other) const { return memory && stream == other.id && capture == other.capture; }
    const unsigned char* get() const { return static_cast<const unsigned char*>(memory.get()); }
  };

  // Appends values, aligned to 16 bytes. Returns where they begin.
  template <class T>
  static int64_t append(Bytes& bytes, const T* values, size_t count) {
    const auto offset = static_cast<int64_t>(bytes.size());
    const auto* first = reinterpret_cast<const unsigned char*>(values);
    bytes.insert(bytes.end(), first, first + count * sizeof(T));
    bytes.resize((bytes.size() + 15) / 16 * 16);
    return offset;
  }

  static Entry copied(const Bytes& bytes, const Stream& stream);

  // The table of pieces, which is the same for all launches.
  const unsigned char* fixed(const Stream& stream);
  const unsigned char* on_device(const Stream& stream);

  const Shapes& shapes_;
  std::vector<Piece> pieces_;  // in the order of groups
  std::vector<int64_t> starts_;
  const int64_t* starts_on_device_ = nullptr;
  Bytes bytes_;               // of the table of the launch
  int32_t row_bytes_ = 0;     // in it
  std::vector<Entry> fixed_;  // one a stream or capture, without bytes
  std::vector<Entry> entries_;
  Entry captured_;  // of the launch being prepared, while a graph is captured
  uint64_t clock_ = 0;
};

}  // namespace gam::cuda
