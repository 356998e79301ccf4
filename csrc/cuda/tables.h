// The tables of one optimizer's parameters on one device: built on the host, and copied when they change.
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

  // Number of blocks in a grid over all leaves.
  int64_t chunks() const { return static_cast<int64_t>(pieces_.size()); }

  // Begins the table of a launch: the lists of a primitive and, for an update, each leaf's index among the options.
  void begin(const List* lists, int count, const int32_t* option = nullptr);

  // Adds numbers of the launch. Those that do not fit the kernel's arguments go into the table.
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

  // Returns the table on the device, for one launch on the current stream; valid until the next call.
  Table finish();

  // First chunk of each group, and the end, on the device; valid as long as the last table.
  const int64_t* starts() const { return starts_on_device_; }

 private:
  // Device memory and the bytes copied to it, on a stream and perhaps for a graph.
  struct Entry {
    Bytes bytes;
    c10::DataPtr memory;
    int64_t stream = -1;
    uint64_t capture = 0;
    uint64_t used = 0;

    bool is_of(const Stream& other) const { return memory && stream == other.id && capture == other.capture; }
    const unsigned char* get() const { return static_cast<const unsigned char*>(memory.get()); }
  };

  // Appends values, aligned to 16 bytes. Returns their offset.
  template <class T>
  static int64_t append(Bytes& bytes, const T* values, size_t count) {
    const auto offset = static_cast<int64_t>(bytes.size());
    const auto* first = reinterpret_cast<const unsigned char*>(values);
    bytes.insert(bytes.end(), first, first + count * sizeof(T));
    bytes.resize((bytes.size() + 15) / 16 * 16);
    return offset;
  }

  static Entry copied(const Bytes& bytes, const Stream& stream);

  // Returns the table of pieces, which all launches share.
  const unsigned char* fixed(const Stream& stream);
  const unsigned char* on_device(const Stream& stream);

  const Shapes& shapes_;
  std::vector<Piece> pieces_;  // ordered by group
  std::vector<int64_t> starts_;
  const int64_t* starts_on_device_ = nullptr;
  Bytes bytes_;               // table of the present launch
  int32_t row_bytes_ = 0;     // bytes per row of bytes_
  std::vector<Entry> fixed_;  // one per stream or capture, without bytes
  std::vector<Entry> entries_;
  Entry captured_;  // for the launch being prepared during a capture
  uint64_t clock_ = 0;
};

}  // namespace gam::cuda
