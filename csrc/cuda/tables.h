// The tables of one optimizer's parameters on one device: made on the host, copied to the device when they changed.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../shapes.h"
#include "device.h"
#include "kernels.h"

namespace gam::cuda {

// A piece of memory that is put together on the host.
class Bytes {
 public:
  // Appends, aligned to 16 bytes; the offset.
  template <class T>
  int64_t add(const T* values, size_t count) {
    const auto offset = static_cast<int64_t>(bytes_.size());
    const auto* first = reinterpret_cast<const unsigned char*>(values);
    bytes_.insert(bytes_.end(), first, first + count * sizeof(T));
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    return offset;
  }

  unsigned char* at(int64_t offset) { return bytes_.data() + offset; }
  const std::vector<unsigned char>& all() const { return bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

// The lists of one primitive, and what kernels must know of each leaf beside them.
struct Lists {
  std::vector<List> lists;          // null where the primitive has none
  const int32_t* option = nullptr;  // by leaf
};

class Tables {
 public:
  explicit Tables(const Shapes& shapes);

  // Blocks of a grid over all leaves.
  int64_t chunks() const { return static_cast<int64_t>(pieces_.size()); }

  // The table for one launch on the current stream. It is valid until the next call.
  class Prepared {
   public:
    Table table;
    const int64_t* starts;  // of each group's chunks, and the end

    // Numbers by group, of which the table holds those that do not fit the arguments of a kernel.
    template <class N>
    const N* many(size_t i) const {
      return many_[i] < 0 ? nullptr : reinterpret_cast<const N*>(base_ + many_[i]);
    }

   private:
    friend class Tables;
    const unsigned char* base_ = nullptr;
    std::vector<int64_t> many_;
  };

  // Numbers to travel with a table.
  struct Span {
    const void* data;
    size_t count, bytes;
  };
  template <class N>
  static Span span(const std::vector<N>& numbers) {
    return {numbers.data(), numbers.size(), numbers.size() * sizeof(N)};
  }

  Prepared prepare(const Lists& lists, std::initializer_list<Span> numbers = {});

 private:
  // Memory of the device with what was copied to it, on a stream and perhaps for a graph.
  struct Entry {
    std::vector<unsigned char> bytes;
    c10::DataPtr memory;
    int64_t stream = -1;
    uint64_t capture = 0;
    uint64_t used = 0;

    bool is_of(const Stream& other) const { return memory && stream == other.id && capture == other.capture; }
    const unsigned char* get() const { return static_cast<const unsigned char*>(memory.get()); }
  };

  static Entry copied(const std::vector<unsigned char>& bytes, const Stream& stream);

  // The table of pieces, which is the same for all launches.
  const unsigned char* fixed(const Stream& stream);
  const unsigned char* on_device(const std::vector<unsigned char>& bytes, const Stream& stream);

  const Shapes& shapes_;
  std::vector<Piece> pieces_;  // in the order of groups
  std::vector<int64_t> starts_;
  int64_t starts_offset_ = 0;
  std::vector<Entry> fixed_;  // one a stream or capture, without bytes
  std::vector<Entry> entries_;
  Entry captured_;  // of the launch being prepared, while a graph is captured
  uint64_t clock_ = 0;
};

}  // namespace gam::cuda
