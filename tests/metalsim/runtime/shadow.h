// What is known about a piece of memory: who wrote and read it last. Finds races.
#pragma once
#include <stdint.h>

namespace metalsim {

enum Domain { THREADGROUP = 0, DEVICE = 1 };

// When and by whom an access happens. Two accesses of one threadgroup are ordered if a
// threadgroup_barrier for their memory lies between them (epoch), or, inside one simdgroup, a
// simdgroup_barrier (phase). Nothing orders device memory between threadgroups.
struct Moment {
  uint32_t threadgroup = 0;  // counts from 1; 0: never
  uint32_t epoch = 0;
  uint16_t thread = 0;
  uint16_t phase = 0;
  int simdgroup() const { return thread / 32; }
};

class ShadowCell {
 public:
  bool written() const { return write_.threadgroup != 0; }
  bool written_in(uint32_t threadgroup) const { return write_.threadgroup == threadgroup; }

  // Records an access; returns the moment of an earlier one it races with (threadgroup 0: none).
  Moment access(const Moment& now, bool is_write, bool is_atomic, Domain domain) {
    Moment earlier;
    if (races_with_write(now, domain) && !(is_atomic && atomic_write_)) earlier = write_;
    if (is_write) {
      if (!is_atomic && races_with_reads(now, domain)) earlier = read_;
      write_ = now;
      atomic_write_ = is_atomic;
    } else if (!is_atomic) {
      note_read(now);
    }
    return earlier;
  }

 private:
  bool races_with_write(const Moment& now, Domain domain) const {
    if (!written()) return false;
    if (write_.threadgroup != now.threadgroup) return domain == DEVICE;
    if (write_.epoch != now.epoch || write_.thread == now.thread) return false;
    return write_.simdgroup() != now.simdgroup() || write_.phase == now.phase;
  }
  bool races_with_reads(const Moment& now, Domain domain) const {
    if (read_.threadgroup == 0) return false;
    if (read_.threadgroup != now.threadgroup) return domain == DEVICE;
    if (read_.epoch != now.epoch) return false;
    if (several_simdgroups_ || read_.simdgroup() != now.simdgroup()) return true;
    return read_.phase == now.phase && (several_threads_ || read_.thread != now.thread);
  }
  void note_read(const Moment& now) {
    if (read_.threadgroup != now.threadgroup || read_.epoch != now.epoch) {
      read_ = now;
      several_threads_ = several_simdgroups_ = false;
    } else if (read_.simdgroup() != now.simdgroup()) {
      several_simdgroups_ = true;
    } else if (read_.phase != now.phase) {
      read_ = now;
      several_threads_ = false;
    } else if (read_.thread != now.thread) {
      several_threads_ = true;
    }
  }

  Moment write_, read_;
  bool atomic_write_ = false, several_threads_ = false, several_simdgroups_ = false;
};

}  // namespace metalsim
