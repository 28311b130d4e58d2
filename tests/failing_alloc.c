// Preloaded into a process, this library makes one allocation fail (tests/exhaust.py).
//
// Between fail_at(n) and fired(), the n-th request for memory, of any thread, fails. It
// also counts the blocks of malloc and the bytes of mmap that are in use, so that a leak
// shows.
#define _GNU_SOURCE
#include <errno.h>
#include <execinfo.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// The functions of glibc that those below replace.
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* block, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void* block);

static atomic_long left;  // requests until one fails; 0 or less: none fails
static atomic_long blocks, mapped;
static atomic_int prints;

void fail_at(long n) { atomic_store(&left, n); }
// Returns whether a request failed since fail_at, and lets none fail any more.
int fired(void) { return atomic_exchange(&left, 0) <= 0; }
long blocks_in_use(void) { return atomic_load(&blocks); }
long mapped_bytes(void) { return atomic_load(&mapped); }
// Prints the stack of calls at each failure from now on.
void print_stacks(void) {
  void* frames[1];
  backtrace(frames, 1);  // loads what it needs
  atomic_store(&prints, 1);
}

static int fails(void) {
  if (atomic_load(&left) <= 0 || atomic_fetch_sub(&left, 1) != 1) return 0;
  if (atomic_load(&prints)) {
    void* frames[40];
    backtrace_symbols_fd(frames, backtrace(frames, 40), 2);
  }
  errno = ENOMEM;
  return 1;
}

static void* counted(void* block) {
  if (block) atomic_fetch_add(&blocks, 1);
  return block;
}

void* malloc(size_t bytes) { return fails() ? NULL : counted(__libc_malloc(bytes)); }
void* calloc(size_t count, size_t bytes) {
  return fails() ? NULL : counted(__libc_calloc(count, bytes));
}
void* realloc(void* block, size_t bytes) {
  if (fails()) return NULL;
  void* const moved = __libc_realloc(block, bytes);
  if (!block) return counted(moved);
  if (!moved && bytes == 0) atomic_fetch_sub(&blocks, 1);
  return moved;
}
void* memalign(size_t alignment, size_t bytes) {
  return fails() ? NULL : counted(__libc_memalign(alignment, bytes));
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** to, size_t alignment, size_t bytes) {
  void* const block = memalign(alignment, bytes);
  if (!block) return ENOMEM;
  *to = block;
  return 0;
}
void free(void* block) {
  if (block) atomic_fetch_sub(&blocks, 1);
  __libc_free(block);
}

void* mmap(void* at, size_t bytes, int access, int flags, int file, off_t offset) {
  if (fails()) return MAP_FAILED;
  void* const start = (void*)syscall(SYS_mmap, at, bytes, access, flags, file, offset);
  if (start != MAP_FAILED) atomic_fetch_add(&mapped, (long)bytes);
  return start;
}
void* mmap64(void* at, size_t bytes, int access, int flags, int file, off_t offset) {
  return mmap(at, bytes, access, flags, file, offset);
}
int munmap(void* start, size_t bytes) {
  const int failed = (int)syscall(SYS_munmap, start, bytes);
  if (!failed) atomic_fetch_sub(&mapped, (long)bytes);
  return failed;
}
