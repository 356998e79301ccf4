#include "tables.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace gam::cuda {
namespace {

// Tables that are kept. A step has about eight; the memory of gradients may alternate between a few places.
constexpr size_t kEntries = 32;

// Streams, and captures, whose table of pieces is kept.
constexpr size_t kStreams = 4;

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

Tables::Tables(const Shapes& shapes) : shapes_(shapes) {
  std::vector<int32_t> order(shapes.size());
  std::iota(order.begin(), order.end(), 0);
  const auto group_of = [&](int32_t i) { return shapes.leaves()[static_cast<size_t>(i)].group; };
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return group_of(i) < group_of(j); });
  for (const int32_t i : order) {
    while (static_cast<int>(starts_.size()) <= group_of(i)) starts_.push_back(chunks());
    const int64_t numel = shapes.leaves()[static_cast<size_t>(i)].numel;
    for (int64_t begin = 0; begin < numel; begin += kChunk) {
      pieces_.push_back({begin, i, static_cast<int32_t>(std::min<int64_t>(numel - begin, kChunk))});
    }
  }
  while (static_cast<int>(starts_.size()) <= shapes.groups()) starts_.push_back(chunks());
}

Tables::Prepared Tables::prepare(const Lists& lists, std::initializer_list<Span> numbers) {
  const Stream stream = current_stream();
  const size_t leaves = shapes_.size();
  const auto count = static_cast<int>(lists.lists.size());
  const int64_t width = row_bytes(count);
  Bytes bytes;
  {
    const std::vector<unsigned char> room(leaves * static_cast<size_t>(width));
    bytes.add(room.data(), room.size());
  }
  for (size_t i = 0; i < leaves; ++i) {
    unsigned char* const at = bytes.at(static_cast<int64_t>(i) * width);
    Row row;
    std::memset(&row, 0, sizeof row);  // padding too: tables are compared byte by byte
    row.group = shapes_.leaves()[i].group, row.option = lists.option ? lists.option[i] : 0, row.packed = true;
    for (int k = 0; k < count; ++k) {
      const List list = lists.lists[static_cast<size_t>(k)];
      void* const data = list ? list[i] : nullptr;
      row.packed = row.packed && is_aligned(data);
      std::memcpy(at + row_bytes(k), &data, sizeof data);
    }
    std::memcpy(at, &row, sizeof row);
  }
  Prepared result;
  for (const Span& span : numbers) {
    const bool fits = span.count <= static_cast<size_t>(kFew);
    result.many_.push_back(fits ? -1 : bytes.add(static_cast<const unsigned char*>(span.data), span.bytes));
  }
  const unsigned char* pieces = fixed(stream);
  result.base_ = on_device(bytes.all(), stream);
  result.table = {reinterpret_cast<const Piece*>(pieces), result.base_, static_cast<int32_t>(width)};
  result.starts = reinterpret_cast<const int64_t*>(pieces + starts_offset_);
  return result;
}

Tables::Entry Tables::copied(const std::vector<unsigned char>& bytes, const Stream& stream) {
  const auto size = static_cast<int64_t>(bytes.size());
  Entry entry;
  entry.memory = allocate(size);
  entry.stream = stream.id, entry.capture = stream.capture;
  upload(bytes.data(), size, entry.memory.get());
  return entry;
}

const unsigned char* Tables::fixed(const Stream& stream) {
  for (const Entry& entry : fixed_) {
    if (entry.is_of(stream)) return entry.get();
  }
  Bytes bytes;
  bytes.add(pieces_.data(), pieces_.size());
  starts_offset_ = bytes.add(starts_.data(), starts_.size());
  if (fixed_.size() >= kStreams) fixed_.erase(fixed_.begin());
  fixed_.push_back(copied(bytes.all(), stream));
  return fixed_.back().get();
}

const unsigned char* Tables::on_device(const std::vector<unsigned char>& bytes, const Stream& stream) {
  if (stream.capture != 0) {  // in the memory of the graph, which copies it anew each time
    captured_ = copied(bytes, stream);
    return captured_.get();
  }
  ++clock_;
  for (Entry& entry : entries_) {
    if (entry.is_of(stream) && entry.bytes == bytes) {
      entry.used = clock_;
      return entry.get();
    }
  }
  Entry made = copied(bytes, stream);
  made.bytes = bytes, made.used = clock_;
  if (entries_.size() < kEntries) {
    entries_.push_back(std::move(made));
    return entries_.back().get();
  }
  const auto older = [](const Entry& a, const Entry& b) { return a.used < b.used; };
  Entry& oldest = *std::min_element(entries_.begin(), entries_.end(), older);
  oldest = std::move(made);
  return oldest.get();
}

}  // namespace gam::cuda
