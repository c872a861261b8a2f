// Structures shared with Python: abi.py declares the same layouts with ctypes.
#pragma once
#include <stdint.h>

namespace metalsim {

// The values are those of report.FindingKind.
enum FindingKind : int32_t {
  OUT_OF_BOUNDS_READ = 1,
  OUT_OF_BOUNDS_WRITE,
  READ_ONLY_WRITE,
  UNINITIALISED_THREADGROUP_READ,
  UNINITIALISED_OUTPUT_READ,
  THREADGROUP_RACE,
  DEVICE_RACE,
  DIVERGENT_BARRIER,
  EXIT_BEFORE_BARRIER,
  DIVERGENT_COLLECTIVE,
  INACTIVE_LANE_READ,
  FOREIGN_PRIVATE_ACCESS,
  MEMORY_FAULT,
  UNDEFINED_BEHAVIOUR,
  MISALIGNED_ACCESS,
  TIME_LIMIT,
};

constexpr int32_t OTHER_THREADGROUP = -2;

struct Buffer {
  char* data;
  uint64_t nbytes;
  int32_t writable;
  int32_t item_bytes;
  int32_t initialised;
  char name[44];
};

struct ThreadgroupVariable {
  char* data;
  uint64_t nbytes;
  char name[48];
};

struct Finding {
  int32_t kind;
  int32_t site;    // line << 8 | column where the source told, else 0
  int32_t thread;  // index in its threadgroup
  int32_t other;   // the other thread of a race, OTHER_THREADGROUP, or a count
  uint64_t call;   // number of the instrumented call, from 1; 0 where the site is known or nothing is
  int64_t offset;  // byte offset into the named memory
  uint64_t size;
  uint32_t threadgroup[3];
  uint64_t count;
  char name[48];
};

struct BufferCounters {
  uint64_t bytes[2];  // [0] read, [1] written: the sum over threads
  uint64_t distinct_bytes[2];
  uint64_t instructions[2];  // simdgroup memory instructions
  uint64_t lines[2];         // 128-byte lines, counted once per simdgroup instruction
  uint64_t distinct_lines[2];
};

struct SiteCounters {
  uint64_t call;
  int32_t site, buffer, is_write;
  uint64_t instructions, lines, bytes;
};

struct LaunchCounters {
  uint64_t threadgroups, threads;
  uint64_t barriers, simdgroup_barriers, collectives;
  uint64_t threadgroup_bytes[2];
};

struct Launch {
  void (*kernel)();
  const Buffer* buffers;
  const ThreadgroupVariable* variables;
  Finding* findings;
  BufferCounters* buffer_counters;  // one per buffer
  SiteCounters* site_counters;
  int32_t buffer_count, variable_count, max_findings, max_sites;
  uint32_t grid[3], threadgroup[3];
  int32_t order;  // 0 ascending, 1 descending, 2 random
  int32_t checked;
  uint64_t seed;
  double time_limit;  // seconds of CPU time
  // results
  int32_t finding_count, site_count;
  LaunchCounters counters;
};

}  // namespace metalsim
