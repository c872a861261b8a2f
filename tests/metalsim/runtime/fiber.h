// One stack per simulated thread, and the switch between them.
#pragma once
#include <sys/mman.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace metalsim {

constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t STACK_GUARD_BYTES = 64 << 10;  // a multiple of every page size in use
constexpr size_t STACK_STRIDE = STACK_BYTES + STACK_GUARD_BYTES;

// Saves the callee-saved registers on the current stack, stores the stack pointer in *save and
// continues on the stack `load`.
extern "C" void metalsim_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl metalsim_switch
.hidden metalsim_switch
.type metalsim_switch,@function
metalsim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void* initial_stack(char* top, void (*entry)()) {
  constexpr int SAVED_REGISTERS = 6;
  void** sp = (void**)(top - 16);
  *--sp = nullptr;  // a return address nobody uses; leaves rsp at 16n+8 on entry
  *--sp = (void*)entry;
  for (int i = 0; i < SAVED_REGISTERS; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl metalsim_switch
.hidden metalsim_switch
.type metalsim_switch,%function
metalsim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

inline void* initial_stack(char* top, void (*entry)()) {
  constexpr int FRAME_BYTES = 160, LINK_REGISTER = 11;
  char* sp = top - FRAME_BYTES;
  memset(sp, 0, FRAME_BYTES);
  ((void**)sp)[LINK_REGISTER] = (void*)entry;
  return sp;
}
#else
#error "metalsim runs on x86-64 and aarch64"
#endif

// The stacks of all simulated threads, each below an inaccessible gap; mapped once per process.
class Stacks {
 public:
  void map() {
    if (base_) return;
    base_ = (char*)mmap(nullptr, MAX_THREADS * STACK_STRIDE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (int i = 0; i < MAX_THREADS; i++) {
      mprotect(base_ + i * STACK_STRIDE, STACK_GUARD_BYTES, PROT_NONE);
    }
  }
  char* low(int thread) const { return base_ + thread * STACK_STRIDE + STACK_GUARD_BYTES; }
  char* high(int thread) const { return base_ + (thread + 1) * STACK_STRIDE; }
  // The thread whose stack holds `p`, or -1.
  int owner(const char* p) const {
    uint64_t distance = (uint64_t)(p - base_);
    return base_ && distance < MAX_THREADS * STACK_STRIDE ? (int)(distance / STACK_STRIDE) : -1;
  }

 private:
  char* base_ = nullptr;
};

}  // namespace metalsim
