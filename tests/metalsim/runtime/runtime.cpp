// Runs a compiled kernel with Metal's execution model: every thread of a threadgroup is a fiber,
// simdgroups are 32 fibers that meet at simdgroup functions, threadgroups run one after another.
//
// Checked kernels are compiled with clang's -fsanitize=thread instrumentation, which calls
// __tsan_* at each load and store. These callbacks are implemented here (no sanitizer library is
// involved) and check every access against the memory the kernel was given. ir.py adds a last
// argument to them: the number of the call, by which the report finds its place in the source.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <ucontext.h>


#include "abi.h"
#include "array.h"
#include "fiber.h"
#include "shadow.h"
#include "traffic.h"

namespace metalsim {
namespace {

enum class State : uint8_t { READY, AT_COLLECTIVE, AT_BARRIER, DONE };
enum class Order : int32_t { ASCENDING, DESCENDING, RANDOM };
enum class Outcome : int32_t { COMPLETED, ABORTED, DEADLOCKED };

constexpr int SLOT_BYTES = 64;             // the most a lane passes through a simdgroup function
constexpr int KIND_SIMDGROUP_BARRIER = 0;  // other kinds: include/metalsim_simdgroup.h
constexpr int FENCE_DEVICE = 1, FENCE_THREADGROUP = 2;  // mem_flags

struct Thread {
  void* stack_pointer;
  char *stack_low, *stack_high;
  State state;
  uint16_t index, simdgroup;
  uint8_t lane;
  uint32_t position[3];
  int site, kind, fences, payload_bytes;
  char payload[SLOT_BYTES];
};

struct Simdgroup {
  // What each lane brought to the latest collective, and what the first to continue made of it.
  alignas(SLOT_BYTES) char slots[SIMD_WIDTH][SLOT_BYTES];
  alignas(SLOT_BYTES) char result[SLOT_BYTES];
  bool result_ready;
  uint32_t active;  // lanes that took part
  int first_thread, size;
  uint16_t phase[2];  // simdgroup_barriers so far, per Domain
};

struct Access {
  char* address;
  uint64_t size;
  bool is_write, is_atomic;
  uint64_t call;
  int site;
};

// A stretch of named memory, for messages.
struct Place {
  const char* name;
  int64_t offset;
};

class Simulator {
 public:
  Outcome run(Launch& launch);
  uint64_t count_unwritten(int buffer, uint64_t* first) const;

  // Called from kernels
  char* buffer(int index) const { return launch_->buffers[index].data; }
  uint32_t attribute(int which, int component) const;
  void threadgroup_barrier(int fences, int site);
  const void* exchange(const void* data, int size, int kind, int fences, int site);
  void* shared_result(int* is_first);
  uint32_t active_lanes() const { return simdgroups_[current_->simdgroup].active; }
  uint32_t lane() const { return current_->lane; }
  void note(int kind, uint64_t call, int site, const char* name, int64_t offset, uint64_t size,
            int other);
  void check(const Access& access);
  bool running() const { return running_; }
  [[noreturn]] void run_current_thread();

 private:
  bool run_threadgroup();
  void start_threads();
  void run_simdgroup(Simdgroup& group);
  bool complete_collective(Simdgroup& group);
  bool release_barrier(bool* finished);
  void resume(Thread& thread);
  void suspend();
  [[noreturn]] void abort_launch() { siglongjmp(abort_jump_, 1); }
  [[noreturn]] void out_of_bounds(const Access& access, Place place);
  void check_threadgroup_memory(const Access& access);
  void check_buffer(const Access& access, int index);
  void note_race(const Access& access, Domain domain, Place place, const Moment& earlier);
  int find_buffer(const char* address);
  Place nearest(const char* address) const;
  Moment now(Domain domain) const;
  uint32_t next_random();
  void find_module();
  static void on_signal(int signal, siginfo_t* info, void* context);

  Launch* launch_ = nullptr;
  Thread threads_[MAX_THREADS];
  Simdgroup simdgroups_[MAX_SIMDGROUPS];
  Stacks stacks_;
  Thread* current_ = nullptr;
  void* scheduler_stack_ = nullptr;
  int thread_count_ = 0, simdgroup_count_ = 0;
  uint32_t full_size_[3], threadgroups_[3], threadgroup_position_[3], threadgroup_size_[3];
  uint32_t threadgroup_number_ = 0, epoch_[2] = {0, 0};
  Array<Array<ShadowCell>> buffer_shadow_;
  Array<ShadowCell> threadgroup_shadow_;
  char *threadgroup_low_ = nullptr, *threadgroup_high_ = nullptr;
  char *module_low_ = nullptr, *module_high_ = nullptr;
  TrafficRecorder traffic_;
  LaunchCounters counters_;
  int recent_buffer_ = 0;
  uint64_t random_ = 0;
  bool running_ = false;
  pthread_t owner_;
  volatile sig_atomic_t out_of_time_ = 0;
  sigjmp_buf abort_jump_;
};

Simulator simulator;

// ---- scheduling --------------------------------------------------------------------------------

void fiber_entry() { simulator.run_current_thread(); }

void Simulator::run_current_thread() {
  launch_->kernel();
  current_->state = State::DONE;
  suspend();
  abort();
}

void Simulator::resume(Thread& thread) {
  current_ = &thread;
  metalsim_switch(&scheduler_stack_, thread.stack_pointer);
}

void Simulator::suspend() { metalsim_switch(&current_->stack_pointer, scheduler_stack_); }

uint32_t Simulator::next_random() {
  random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
  return random_ >> 33;
}

void Simulator::start_threads() {
  const uint32_t* size = threadgroup_size_;
  thread_count_ = size[0] * size[1] * size[2];
  simdgroup_count_ = (thread_count_ + SIMD_WIDTH - 1) / SIMD_WIDTH;
  for (int i = 0; i < thread_count_; i++) {
    Thread& t = threads_[i];
    t.state = State::READY;
    t.index = i;
    t.lane = i % SIMD_WIDTH;
    t.simdgroup = i / SIMD_WIDTH;
    t.position[0] = i % size[0];
    t.position[1] = i / size[0] % size[1];
    t.position[2] = i / (size[0] * size[1]);
    t.stack_low = stacks_.low(i);
    t.stack_high = stacks_.high(i);
    t.stack_pointer = initial_stack(t.stack_high, fiber_entry);
  }
  for (int s = 0; s < simdgroup_count_; s++) {
    Simdgroup& g = simdgroups_[s];
    const int rest = thread_count_ - s * SIMD_WIDTH;
    g.first_thread = s * SIMD_WIDTH;
    g.size = rest < SIMD_WIDTH ? rest : SIMD_WIDTH;
    g.active = g.size == SIMD_WIDTH ? ~0u : (1u << g.size) - 1;
    g.phase[THREADGROUP] = g.phase[DEVICE] = 0;
    traffic_.synchronise(s);
  }
  counters_.threads += thread_count_;
}

// Runs every thread to its end or to a threadgroup barrier, over and over. False: deadlock.
bool Simulator::run_threadgroup() {
  threadgroup_number_++;
  epoch_[THREADGROUP]++;
  epoch_[DEVICE]++;
  if (threadgroup_low_) memset(threadgroup_low_, 0xff, threadgroup_high_ - threadgroup_low_);
  start_threads();
  counters_.threadgroups++;
  const bool descending = (Order)launch_->order == Order::DESCENDING;
  for (bool finished = false; !finished;) {
    for (int i = 0; i < simdgroup_count_; i++) {
      run_simdgroup(simdgroups_[descending ? simdgroup_count_ - 1 - i : i]);
    }
    if (!release_barrier(&finished)) return false;
  }
  return true;
}

// Runs the simdgroup until none of its threads is ready or waits at a collective.
void Simulator::run_simdgroup(Simdgroup& group) {
  do {
    int lane = 0, step = 1;
    if ((Order)launch_->order == Order::DESCENDING) {
      lane = group.size - 1;
      step = group.size - 1;  // -1 modulo the size
    } else if ((Order)launch_->order == Order::RANDOM) {
      lane = next_random() % group.size;
    }
    for (int i = 0; i < group.size; i++, lane = (lane + step) % group.size) {
      Thread& t = threads_[group.first_thread + lane];
      if (t.state == State::READY) resume(t);
    }
  } while (complete_collective(group));
}

// Lets the lanes that wait at one collective (the first in the source) pass. False: none waits.
bool Simulator::complete_collective(Simdgroup& group) {
  Thread* first = nullptr;
  int live = 0, waiting = 0;
  bool same = true;
  for (int lane = 0; lane < group.size; lane++) {
    Thread& t = threads_[group.first_thread + lane];
    live += t.state != State::DONE;
    if (t.state != State::AT_COLLECTIVE) continue;
    waiting++;
    if (first && (t.site != first->site || t.kind != first->kind)) same = false;
    if (!first || t.site < first->site) first = &t;
  }
  if (!first) return false;
  current_ = first;
  if (!same || waiting != live) {
    note(DIVERGENT_COLLECTIVE, 0, first->site, "", 0, 0, live - waiting);
  } else {
    traffic_.synchronise(first->simdgroup);
  }
  group.active = 0;
  group.result_ready = false;
  for (int lane = 0; lane < group.size; lane++) {
    Thread& t = threads_[group.first_thread + lane];
    const bool here =
        t.state == State::AT_COLLECTIVE && t.site == first->site && t.kind == first->kind;
    if (!here) continue;
    group.active |= 1u << lane;
    memcpy(group.slots[lane], t.payload, t.payload_bytes);
    t.state = State::READY;
  }
  if (first->kind == KIND_SIMDGROUP_BARRIER) {
    counters_.simdgroup_barriers++;
    if (first->fences & FENCE_THREADGROUP) group.phase[THREADGROUP]++;
    if (first->fences & FENCE_DEVICE) group.phase[DEVICE]++;
  } else {
    counters_.collectives++;
  }
  return true;
}

// All threads are done or wait at a threadgroup barrier. False: they wait at different ones.
bool Simulator::release_barrier(bool* finished) {
  Thread* first = nullptr;
  int done = 0;
  for (int i = 0; i < thread_count_; i++) {
    Thread& t = threads_[i];
    if (t.state == State::DONE) {
      done++;
      continue;
    }
    if (!first) first = &t;
    if (t.site != first->site) {
      current_ = &t;
      note(DIVERGENT_BARRIER, 0, t.site, "", 0, 0, first->index);
      return false;
    }
  }
  *finished = !first;
  if (!first) return true;
  if (done) {
    current_ = first;
    note(EXIT_BEFORE_BARRIER, 0, first->site, "", 0, 0, done);
  }
  counters_.barriers++;
  if (first->fences & FENCE_THREADGROUP) epoch_[THREADGROUP]++;
  if (first->fences & FENCE_DEVICE) epoch_[DEVICE]++;
  for (int i = 0; i < thread_count_; i++) {
    if (threads_[i].state == State::AT_BARRIER) threads_[i].state = State::READY;
  }
  for (int s = 0; s < simdgroup_count_; s++) traffic_.synchronise(s);
  return true;
}

void Simulator::threadgroup_barrier(int fences, int site) {
  current_->state = State::AT_BARRIER;
  current_->site = site;
  current_->fences = fences;
  suspend();
}

const void* Simulator::exchange(const void* data, int size, int kind, int fences, int site) {
  current_->state = State::AT_COLLECTIVE;
  current_->kind = kind;
  current_->site = site;
  current_->fences = fences;
  current_->payload_bytes = size;
  memcpy(current_->payload, data, size);
  suspend();
  return simdgroups_[current_->simdgroup].slots;
}

void* Simulator::shared_result(int* is_first) {
  Simdgroup& group = simdgroups_[current_->simdgroup];
  *is_first = !group.result_ready;
  group.result_ready = true;
  return group.result;
}

// The numbers are those of translate.ATTRIBUTES.
uint32_t Simulator::attribute(int which, int component) const {
  const Thread& t = *current_;
  const uint32_t full = full_size_[0] * full_size_[1] * full_size_[2];
  switch (which) {
    case 0: return threadgroup_position_[component] * full_size_[component] + t.position[component];
    case 1: return t.position[component];
    case 2: return threadgroup_position_[component];
    case 3: return threadgroup_size_[component];
    case 4: return launch_->grid[component];
    case 5: return threadgroups_[component];
    case 6: return full_size_[component];
    case 7: return 0;
    case 8: return t.index;
    case 9: return t.simdgroup;
    case 10: return t.lane;
    case 11: return simdgroup_count_;
    case 12: return (full + SIMD_WIDTH - 1) / SIMD_WIDTH;
    case 13: return SIMD_WIDTH;
    case 14: return t.index / 4;
    case 15: return t.index % 4;
    case 16: return (thread_count_ + 3) / 4;
    default: return (full + 3) / 4;
  }
}

// ---- checking ----------------------------------------------------------------------------------

void Simulator::note(int kind, uint64_t call, int site, const char* name, int64_t offset,
                     uint64_t size, int other) {
  for (int i = 0; i < launch_->finding_count; i++) {
    Finding& f = launch_->findings[i];
    if (f.kind == kind && f.call == call && f.site == site && !strcmp(f.name, name)) {
      f.count++;
      return;
    }
  }
  if (launch_->finding_count == launch_->max_findings) return;
  Finding& f = launch_->findings[launch_->finding_count++];
  f = {kind, site, current_ ? current_->index : -1, other, call, offset, size, {}, 1, {}};
  for (int i = 0; i < 3; i++) f.threadgroup[i] = threadgroup_position_[i];
  snprintf(f.name, sizeof f.name, "%s", name);
}

Moment Simulator::now(Domain domain) const {
  return {threadgroup_number_, epoch_[domain], current_->index,
          simdgroups_[current_->simdgroup].phase[domain]};
}

void Simulator::note_race(const Access& a, Domain domain, Place place, const Moment& earlier) {
  const bool same_threadgroup = earlier.threadgroup == threadgroup_number_;
  note(domain == DEVICE ? DEVICE_RACE : THREADGROUP_RACE, a.call, a.site, place.name, place.offset,
       a.size, same_threadgroup ? earlier.thread : OTHER_THREADGROUP);
}

void Simulator::out_of_bounds(const Access& a, Place place) {
  note(a.is_write ? OUT_OF_BOUNDS_WRITE : OUT_OF_BOUNDS_READ, a.call, a.site, place.name,
       place.offset, a.size, -1);
  abort_launch();
}

Place Simulator::nearest(const char* address) const {
  Place best = {"?", 0};
  int64_t best_distance = INT64_MAX;
  auto consider = [&](const char* name, const char* data, uint64_t nbytes) {
    const char* end = data + nbytes;
    const int64_t distance = address < data ? data - address : address < end ? 0 : address - end;
    if (distance >= best_distance) return;
    best_distance = distance;
    best = {name, address - data};
  };
  for (int i = 0; i < launch_->buffer_count; i++) {
    const Buffer& b = launch_->buffers[i];
    consider(b.name, b.data, b.nbytes);
  }
  for (int i = 0; i < launch_->variable_count; i++) {
    const ThreadgroupVariable& v = launch_->variables[i];
    consider(v.name, v.data, v.nbytes);
  }
  return best;
}

void Simulator::check_threadgroup_memory(const Access& a) {
  counters_.threadgroup_bytes[a.is_write] += a.size;
  for (int i = 0; i < launch_->variable_count; i++) {
    const ThreadgroupVariable& v = launch_->variables[i];
    const uint64_t offset = a.address - v.data;
    if (offset >= v.nbytes) continue;
    const Place place = {v.name, (int64_t)offset};
    if (offset + a.size > v.nbytes) out_of_bounds(a, place);
    bool uninitialised = false;
    const Moment moment = now(THREADGROUP);
    ShadowCell* cell = &threadgroup_shadow_[a.address - threadgroup_low_];
    for (uint64_t k = 0; k < a.size; k++, cell++) {
      uninitialised |= !a.is_write && !cell->written_in(threadgroup_number_);
      const Moment earlier = cell->access(moment, a.is_write, a.is_atomic, THREADGROUP);
      if (earlier.threadgroup) note_race(a, THREADGROUP, place, earlier);
    }
    if (uninitialised) {
      note(UNINITIALISED_THREADGROUP_READ, a.call, a.site, v.name, offset, a.size, -1);
    }
    return;
  }
  out_of_bounds(a, nearest(a.address));
}

int Simulator::find_buffer(const char* address) {
  for (int k = 0, i = recent_buffer_; k < launch_->buffer_count; k++) {
    const Buffer& b = launch_->buffers[i];
    if ((uint64_t)(address - b.data) < b.nbytes) return recent_buffer_ = i;
    i = i + 1 == launch_->buffer_count ? 0 : i + 1;
  }
  return -1;
}

void Simulator::check_buffer(const Access& a, int index) {
  const Buffer& b = launch_->buffers[index];
  const uint64_t offset = a.address - b.data;
  const Place place = {b.name, (int64_t)offset};
  if (offset + a.size > b.nbytes) out_of_bounds(a, place);
  if (a.is_write && !b.writable) {
    note(READ_ONLY_WRITE, a.call, a.site, b.name, offset, a.size, -1);
    abort_launch();
  }
  traffic_.record(current_->index, index, offset, a.size, a.is_write, a.call, a.site);
  if (!b.writable) return;
  bool uninitialised = false;
  const Moment moment = now(DEVICE);
  const uint64_t last = (offset + a.size - 1) / b.item_bytes;
  for (uint64_t item = offset / b.item_bytes; item <= last; item++) {
    ShadowCell& cell = buffer_shadow_[index][item];
    uninitialised |= !a.is_write && !b.initialised && !cell.written();
    const Moment earlier = cell.access(moment, a.is_write, a.is_atomic, DEVICE);
    if (earlier.threadgroup) note_race(a, DEVICE, place, earlier);
  }
  if (uninitialised) note(UNINITIALISED_OUTPUT_READ, a.call, a.site, b.name, offset, a.size, -1);
}

void Simulator::check(const Access& a) {
  if (!running_ || !current_) return;
  if (out_of_time_) {
    note(TIME_LIMIT, a.call, a.site, "", 0, 0, -1);
    abort_launch();
  }
  if (a.address >= current_->stack_low && a.address < current_->stack_high) return;
  if (a.address >= threadgroup_low_ && a.address < threadgroup_high_) {
    return check_threadgroup_memory(a);
  }
  const int index = find_buffer(a.address);
  if (index >= 0) return check_buffer(a, index);
  const bool constant_of_kernel = a.address >= module_low_ && a.address < module_high_;
  if (constant_of_kernel && !a.is_write) return;
  const int owner = stacks_.owner(a.address);
  if (owner >= 0) {
    note(FOREIGN_PRIVATE_ACCESS, a.call, a.site, "thread", 0, a.size, owner);
    abort_launch();
  }
  out_of_bounds(a, nearest(a.address));
}

uint64_t Simulator::count_unwritten(int buffer, uint64_t* first) const {
  if ((size_t)buffer >= buffer_shadow_.size()) return 0;
  uint64_t count = 0;
  const Array<ShadowCell>& cells = buffer_shadow_[buffer];
  for (size_t i = 0; i < cells.size(); i++) {
    if (cells[i].written()) continue;
    if (count++ == 0) *first = i;
  }
  return count;
}

// ---- a launch ----------------------------------------------------------------------------------

// SIGSEGV, SIGBUS: a fault of the kernel (or of the process, then die as usual).
// SIGVTALRM: out of time. The kernel's own code can be left at once; the simulator's cannot.
void Simulator::on_signal(int signal_number, siginfo_t* info, void* context) {
  Simulator& s = simulator;
  if (!s.running_ || !pthread_equal(s.owner_, pthread_self())) {
    if (signal_number == SIGVTALRM)
      s.out_of_time_ = 1;
    else
      signal(signal_number, SIG_DFL);
    return;
  }
  uint64_t pc = 0;
#if defined(__x86_64__)
  pc = ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  pc = ((ucontext_t*)context)->uc_mcontext.pc;
#endif
  const bool in_kernel = pc >= (uint64_t)s.module_low_ && pc < (uint64_t)s.module_high_;
  if (signal_number == SIGVTALRM) {
    s.out_of_time_ = 1;
    if (!in_kernel) return;
    s.note(TIME_LIMIT, 0, 0, "", 0, 0, -1);
  } else {
    const Place place = s.nearest((const char*)info->si_addr);
    s.note(MEMORY_FAULT, 0, 0, place.name, place.offset, 0, -1);
  }
  s.abort_launch();
}

void Simulator::find_module() {
  struct Search {
    uint64_t inside, low, high;
  } search = {(uint64_t)launch_->kernel, 0, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& s = *(Search*)data;
        uint64_t end = info->dlpi_addr;
        bool found = false;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          const uint64_t low = info->dlpi_addr + header.p_vaddr, high = low + header.p_memsz;
          if (high > end) end = high;
          found |= s.inside >= low && s.inside < high;
        }
        if (!found) return 0;
        s.low = info->dlpi_addr;
        s.high = end;
        return 1;
      },
      &search);
  module_low_ = (char*)search.low;
  module_high_ = (char*)search.high;
}

// Takes over the signals a kernel can cause, for as long as it lives.
class SignalScope {
 public:
  SignalScope(void (*handler)(int, siginfo_t*, void*), double time_limit) {
    static char stack[64 << 10];
    stack_t own = {};
    own.ss_sp = stack;
    own.ss_size = sizeof stack;
    sigaltstack(&own, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &old_[i]);
    set_timer(time_limit);
  }
  ~SignalScope() {
    set_timer(0);
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGVTALRM};
  static constexpr int COUNT = 3;
  static void set_timer(double seconds) {
    itimerval timer = {};
    timer.it_value.tv_sec = (time_t)seconds;
    timer.it_value.tv_usec = (suseconds_t)((seconds - (time_t)seconds) * 1e6);
    timer.it_interval = timer.it_value;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
  stack_t old_stack_;
  struct sigaction old_[COUNT];
};

Outcome Simulator::run(Launch& launch) {
  launch_ = &launch;
  launch.finding_count = launch.site_count = 0;
  counters_ = LaunchCounters();
  recent_buffer_ = 0;
  threadgroup_number_ = epoch_[THREADGROUP] = epoch_[DEVICE] = 0;
  random_ = launch.seed * 0x9E3779B97F4A7C15ull;
  out_of_time_ = 0;
  stacks_.map();
  find_module();

  threadgroup_low_ = threadgroup_high_ = nullptr;
  for (int i = 0; i < launch.variable_count; i++) {
    const ThreadgroupVariable& v = launch.variables[i];
    if (!threadgroup_low_ || v.data < threadgroup_low_) threadgroup_low_ = v.data;
    if (v.data + v.nbytes > threadgroup_high_) threadgroup_high_ = v.data + v.nbytes;
  }
  threadgroup_shadow_.clear();
  buffer_shadow_.reset(launch.buffer_count);
  if (launch.checked) {
    threadgroup_shadow_.reset(threadgroup_high_ - threadgroup_low_);
    for (int i = 0; i < launch.buffer_count; i++) {
      const Buffer& b = launch.buffers[i];
      if (b.writable) buffer_shadow_[i].reset(b.nbytes / b.item_bytes);
    }
  }
  traffic_.reset(launch.buffers, launch.buffer_count, launch.checked);
  for (int i = 0; i < 3; i++) {
    const uint32_t grid = launch.grid[i], size = launch.threadgroup[i];
    full_size_[i] = size < grid ? size : grid;
    threadgroups_[i] = (grid + full_size_[i] - 1) / full_size_[i];
  }

  SignalScope signals(on_signal, launch.time_limit);
  volatile Outcome outcome = Outcome::COMPLETED;
  owner_ = pthread_self();
  running_ = true;
  if (sigsetjmp(abort_jump_, 1) == 0) {
    uint32_t* at = threadgroup_position_;
    const uint32_t total = threadgroups_[0] * threadgroups_[1] * threadgroups_[2];
    for (uint32_t n = 0; n < total && outcome == Outcome::COMPLETED; n++) {
      at[0] = n % threadgroups_[0];
      at[1] = n / threadgroups_[0] % threadgroups_[1];
      at[2] = n / (threadgroups_[0] * threadgroups_[1]);
      for (int i = 0; i < 3; i++) {
        const uint32_t rest = launch.grid[i] - at[i] * full_size_[i];
        threadgroup_size_[i] = rest < full_size_[i] ? rest : full_size_[i];
      }
      if (!run_threadgroup()) outcome = Outcome::DEADLOCKED;
    }
  } else {
    outcome = Outcome::ABORTED;
  }
  running_ = false;
  current_ = nullptr;
  launch.counters = counters_;
  traffic_.report(launch);
  return outcome;
}

}  // namespace
}  // namespace metalsim

using metalsim::simulator;

#define METALSIM_EXPORT extern "C" __attribute__((visibility("default")))

// ---- for Python --------------------------------------------------------------------------------

METALSIM_EXPORT int metalsim_launch(metalsim::Launch* launch) {
  return (int)simulator.run(*launch);
}

// How many elements of a writable buffer nobody wrote in the latest launch, and the first one.
METALSIM_EXPORT uint64_t metalsim_count_unwritten(int buffer, uint64_t* first) {
  return simulator.count_unwritten(buffer, first);
}

// ---- for kernels: declared in include/metalsim_base.h ------------------------------------------

METALSIM_EXPORT void* metalsim_buffer(int index) { return simulator.buffer(index); }
METALSIM_EXPORT void* metalsim_constant_buffer(int index) { return simulator.buffer(index); }
METALSIM_EXPORT uint32_t metalsim_attribute(int which, int component) {
  return simulator.attribute(which, component);
}
METALSIM_EXPORT void metalsim_threadgroup_barrier(int fences, int site) {
  simulator.threadgroup_barrier(fences, site);
}
METALSIM_EXPORT void metalsim_simdgroup_barrier(int fences, int site) {
  simulator.exchange(nullptr, 0, metalsim::KIND_SIMDGROUP_BARRIER, fences, site);
}
METALSIM_EXPORT const void* metalsim_exchange(const void* data, int size, int kind, int site) {
  return simulator.exchange(data, size, kind, 0, site);
}
METALSIM_EXPORT void* metalsim_shared_result(int* is_first) {
  return simulator.shared_result(is_first);
}
METALSIM_EXPORT uint32_t metalsim_active_lanes() { return simulator.active_lanes(); }
METALSIM_EXPORT uint32_t metalsim_lane() { return simulator.lane(); }
METALSIM_EXPORT void metalsim_inactive_lane(int lane, int site) {
  simulator.note(metalsim::INACTIVE_LANE_READ, 0, site, "", 0, 0, lane);
}
METALSIM_EXPORT void metalsim_atomic(void* p, int size, int is_load, int is_store, int site) {
  if (is_load) simulator.check({(char*)p, (uint64_t)size, false, true, 0, site});
  if (is_store) simulator.check({(char*)p, (uint64_t)size, true, true, 0, site});
}

// ---- called by the instrumentation -------------------------------------------------------------

namespace {
inline void check_access(char* address, uint64_t size, bool is_write, uint64_t call) {
  simulator.check({address, size, is_write, false, call, 0});
}
inline void check_aligned(char* address, uint64_t size, bool is_write, uint64_t call) {
  const uint64_t excess = (uint64_t)address & (size - 1);
  if (excess && simulator.running()) {
    simulator.note(metalsim::MISALIGNED_ACCESS, call, 0, "", (int64_t)excess, size, -1);
  }
  check_access(address, size, is_write, call);
}
}  // namespace

#define METALSIM_ACCESS(SIZE)                                                 \
  METALSIM_EXPORT void __tsan_read##SIZE(char* p, uint64_t call) {            \
    check_aligned(p, SIZE, false, call);                                      \
  }                                                                           \
  METALSIM_EXPORT void __tsan_write##SIZE(char* p, uint64_t call) {           \
    check_aligned(p, SIZE, true, call);                                       \
  }                                                                           \
  METALSIM_EXPORT void __tsan_unaligned_read##SIZE(char* p, uint64_t call) {  \
    check_access(p, SIZE, false, call);                                       \
  }                                                                           \
  METALSIM_EXPORT void __tsan_unaligned_write##SIZE(char* p, uint64_t call) { \
    check_access(p, SIZE, true, call);                                        \
  }
METALSIM_ACCESS(1)
METALSIM_ACCESS(2)
METALSIM_ACCESS(4)
METALSIM_ACCESS(8)
METALSIM_ACCESS(16)

METALSIM_EXPORT void __tsan_init() {}
METALSIM_EXPORT void* __tsan_memcpy(char* to, char* from, size_t size, uint64_t call) {
  if (size) check_access(from, size, false, call);
  if (size) check_access(to, size, true, call);
  return memcpy(to, from, size);
}
METALSIM_EXPORT void* __tsan_memmove(char* to, char* from, size_t size, uint64_t call) {
  if (size) check_access(from, size, false, call);
  if (size) check_access(to, size, true, call);
  return memmove(to, from, size);
}
METALSIM_EXPORT void* __tsan_memset(char* to, int value, size_t size, uint64_t call) {
  if (size) check_access(to, size, true, call);
  return memset(to, value, size);
}

// clang's minimal undefined behaviour runtime: one function per check.
#define METALSIM_UNDEFINED(WHAT)                                             \
  METALSIM_EXPORT void __ubsan_handle_##WHAT##_minimal(uint64_t call) {      \
    if (!simulator.running()) return;                                        \
    simulator.note(metalsim::UNDEFINED_BEHAVIOUR, call, 0, #WHAT, 0, 0, -1); \
  }
METALSIM_UNDEFINED(type_mismatch)
METALSIM_UNDEFINED(add_overflow)
METALSIM_UNDEFINED(sub_overflow)
METALSIM_UNDEFINED(mul_overflow)
METALSIM_UNDEFINED(negate_overflow)
METALSIM_UNDEFINED(divrem_overflow)
METALSIM_UNDEFINED(shift_out_of_bounds)
METALSIM_UNDEFINED(out_of_bounds)
METALSIM_UNDEFINED(builtin_unreachable)
METALSIM_UNDEFINED(missing_return)
METALSIM_UNDEFINED(float_cast_overflow)
METALSIM_UNDEFINED(alignment_assumption)
