// Counts device memory traffic as a simdgroup's memory instructions would cause it.
//
// Threads run one after another here, so instructions are put together again afterwards: the n-th
// execution of a load or store by each lane since the lanes last met (at a barrier or a
// simdgroup function) counts as one simdgroup instruction. Adjacent loads of one lane, as a vector
// load compiles to, are merged up to 16 bytes.
#pragma once
#include <stdint.h>
#include <string.h>

#include "abi.h"
#include "array.h"
#include "fiber.h"

namespace metalsim {

constexpr int SIMD_WIDTH = 32;
constexpr int MAX_SIMDGROUPS = MAX_THREADS / SIMD_WIDTH;
constexpr int LINE_SHIFT = 7;  // 128-byte lines
constexpr uint64_t MAX_VECTOR_BYTES = 16;

class TrafficRecorder {
 public:
  void reset(const Buffer* buffers, int count, bool enabled) {
    enabled_ = enabled;
    buffer_count_ = count;
    sites_.clear();
    counters_.reset(count);
    touched_.reset(count);
    open_.clear();
    memset(recent_, 0, sizeof recent_);
    for (uint32_t& generation : generation_) generation = 1;
    if (!enabled) return;
    for (int i = 0; i < count; i++) touched_[i].reset(buffers[i].nbytes);
    open_.reset((size_t)MAX_THREADS * count);
  }

  // All live lanes of the simdgroup met: what follows belongs to new instructions.
  void synchronise(int simdgroup) { generation_[simdgroup]++; }

  void record(int thread, int buffer, uint64_t offset, uint64_t size, bool is_write, uint64_t call,
              int site) {
    if (!enabled_) return;
    const int simdgroup = thread / SIMD_WIDTH, lane = thread % SIMD_WIDTH;
    BufferCounters& totals = counters_[buffer];
    totals.bytes[is_write] += size;
    for (uint64_t i = offset; i < offset + size; i++) touched_[buffer][i] |= 1 << is_write;

    OpenVector& open = open_[(size_t)thread * buffer_count_ + buffer];
    const uint64_t origin = origin_of(call, site);
    const bool extends = open.generation == generation_[simdgroup] && open.is_write == is_write &&
                         open.end == offset && open.first_origin != origin &&
                         offset + size - open.begin <= MAX_VECTOR_BYTES;
    if (extends) {
      open.end = offset + size;
    } else {
      const uint32_t index = site_index(buffer, is_write, call, site);
      const Execution execution = start_execution(index, simdgroup, lane);
      open.generation = generation_[simdgroup];
      open.is_write = is_write;
      open.first_origin = origin;
      open.begin = offset;
      open.end = offset + size;
      open.site = index;
      open.execution = execution.number;
      if (execution.is_new) {
        totals.instructions[is_write]++;
        sites_[index].counters.instructions++;
      }
    }
    Site& at = sites_[open.site];
    at.counters.bytes += size;
    auto& lines = at.groups[simdgroup].instructions[open.execution];
    for (uint64_t l = offset >> LINE_SHIFT; l <= (offset + size - 1) >> LINE_SHIFT; l++) {
      if (contains(lines, l)) continue;
      lines.add() = l;
      totals.lines[is_write]++;
      at.counters.lines++;
    }
  }

  // Fills in the launch's counters.
  void report(Launch& launch) {
    for (int i = 0; i < buffer_count_ && enabled_; i++) {
      count_distinct(touched_[i], counters_[i]);
      launch.buffer_counters[i] = counters_[i];
    }
    launch.site_count = 0;
    for (const Site& s : sites_) {
      if (launch.site_count == launch.max_sites) break;
      launch.site_counters[launch.site_count++] = s.counters;
    }
  }

 private:
  struct Execution {
    uint32_t number;
    bool is_new;
  };
  // A lane's latest access to a buffer, which an adjacent one may extend.
  struct OpenVector {
    uint32_t generation = 0;
    bool is_write = false;
    uint64_t first_origin = 0, begin = 0, end = 0;
    uint32_t site = 0, execution = 0;
  };
  // The executions of one site by one simdgroup since its lanes last met.
  struct Group {
    uint32_t generation = 0, used = 0;
    uint32_t executions[SIMD_WIDTH] = {};
    Array<Array<uint64_t>> instructions;  // the lines each touched
  };
  struct Site {
    uint64_t key;
    SiteCounters counters;
    Array<Group> groups;
  };
  struct Recent {
    uint64_t key;
    uint32_t index;
  };

  static bool contains(const Array<uint64_t>& lines, uint64_t line) {
    for (size_t i = lines.size(); i-- > 0;) {
      if (lines[i] == line) return true;
    }
    return false;
  }

  // Tells loads and stores apart: by their call, or by their place in the text.
  static uint64_t origin_of(uint64_t call, int site) { return call ? call : (uint64_t)site << 32; }

  uint32_t site_index(int buffer, bool is_write, uint64_t call, int site) {
    const uint64_t key = (origin_of(call, site) * 64 + buffer) * 2 + is_write + 1;
    Recent& recent = recent_[(key * 0x9E3779B97F4A7C15ull) >> 56];
    if (recent.key == key) return recent.index;
    uint32_t index = 0;
    while (index < sites_.size() && sites_[index].key != key) index++;
    if (index == sites_.size()) {
      Site& added = sites_.add();
      added.key = key;
      added.counters = {call, site, buffer, is_write, 0, 0, 0};
      added.groups.reset(MAX_SIMDGROUPS);
    }
    recent = {key, index};
    return index;
  }

  Execution start_execution(uint32_t site, int simdgroup, int lane) {
    Group& group = sites_[site].groups[simdgroup];
    if (group.generation != generation_[simdgroup]) {
      group.generation = generation_[simdgroup];
      group.used = 0;
      memset(group.executions, 0, sizeof group.executions);
    }
    const uint32_t number = group.executions[lane]++;
    if (number < group.used) return {number, false};
    group.used = number + 1;
    if (group.instructions.size() < group.used) group.instructions.add();
    group.instructions[number].clear();
    return {number, true};
  }

  static void count_distinct(const Array<uint8_t>& touched, BufferCounters& counters) {
    constexpr size_t LINE = 1 << LINE_SHIFT;
    for (size_t begin = 0; begin < touched.size(); begin += LINE) {
      const size_t end = begin + LINE < touched.size() ? begin + LINE : touched.size();
      for (int direction = 0; direction < 2; direction++) {
        uint64_t bytes = 0;
        for (size_t i = begin; i < end; i++) bytes += touched[i] >> direction & 1;
        counters.distinct_bytes[direction] += bytes;
        counters.distinct_lines[direction] += bytes != 0;
      }
    }
  }

  bool enabled_ = false;
  int buffer_count_ = 0;
  uint32_t generation_[MAX_SIMDGROUPS];
  Recent recent_[256];
  Array<Site> sites_;
  Array<BufferCounters> counters_;
  Array<Array<uint8_t>> touched_;  // per byte: bit 0 read, bit 1 written
  Array<OpenVector> open_;         // [thread][buffer]
};

}  // namespace metalsim
