#include "tables.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace gam::cuda {
namespace {

// Number of tables kept. A step has about eight, and the memory of gradients may alternate between a few places.
constexpr size_t kEntries = 32;

// Number of streams and captures whose table of pieces is kept.
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

void Tables::begin(const List* lists, int count, const int32_t* option) {
  const int64_t width = row_bytes(count);
  row_bytes_ = static_cast<int32_t>(width);
  bytes_.assign(shapes_.size() * static_cast<size_t>(width), 0);  // padding too: tables are compared bytewise
  for (size_t i = 0; i < shapes_.size(); ++i) {
    unsigned char* const at = bytes_.data() + static_cast<int64_t>(i) * width;
    Row row;
    std::memset(&row, 0, sizeof row);
    row.group = shapes_.leaves()[i].group;
    row.option = option ? option[i] : 0;
    row.packed = true;
    for (int k = 0; k < count; ++k) {
      void* const data = lists[k] ? lists[k][i] : nullptr;
      row.packed = row.packed && is_aligned(data);
      std::memcpy(at + row_bytes(k), &data, sizeof data);
    }
    std::memcpy(at, &row, sizeof row);
  }
  bytes_.resize((bytes_.size() + 15) / 16 * 16);
}

Table Tables::finish() {
  const Stream stream = current_stream();
  const auto* pieces = reinterpret_cast<const Piece*>(fixed(stream));
  static_assert(sizeof(Piece) % alignof(int64_t) == 0, "the starts follow the pieces in memory");
  starts_on_device_ = reinterpret_cast<const int64_t*>(pieces + pieces_.size());
  return {pieces, on_device(stream), row_bytes_};
}

Tables::Entry Tables::copied(const Bytes& bytes, const Stream& stream) {
  const auto size = static_cast<int64_t>(bytes.size());
  Entry entry;
  entry.memory = allocate(size);
  entry.stream = stream.id;
  entry.capture = stream.capture;
  upload(bytes.data(), size, entry.memory.get());
  return entry;
}

const unsigned char* Tables::fixed(const Stream& stream) {
  const auto same = [&](const Entry& entry) { return entry.is_of(stream); };
  auto found = std::find_if(fixed_.begin(), fixed_.end(), same);
  if (found == fixed_.end()) {
    Bytes bytes;
    append(bytes, pieces_.data(), pieces_.size());
    append(bytes, starts_.data(), starts_.size());
    if (fixed_.size() >= kStreams) fixed_.erase(fixed_.begin());
    found = fixed_.insert(fixed_.end(), copied(bytes, stream));
  }
  return found->get();
}

const unsigned char* Tables::on_device(const Stream& stream) {
  if (stream.capture != 0) {  // use the graph's memory; each replay copies the table anew
    captured_ = copied(bytes_, stream);
    return captured_.get();
  }
  const auto same = [&](const Entry& entry) { return entry.is_of(stream) && entry.bytes == bytes_; };
  auto found = std::find_if(entries_.begin(), entries_.end(), same);
  if (found == entries_.end()) {
    const auto older = [](const Entry& a, const Entry& b) { return a.used < b.used; };
    if (entries_.size() >= kEntries) entries_.erase(std::min_element(entries_.begin(), entries_.end(), older));
    found = entries_.insert(entries_.end(), copied(bytes_, stream));
    found->bytes = bytes_;
  }
  found->used = ++clock_;
  return found->get();
}

}  // namespace gam::cuda
