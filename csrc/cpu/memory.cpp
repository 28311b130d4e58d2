#include "memory.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace fusedrnn {

namespace {

constexpr std::size_t line = 64, page = 4096, huge_page = std::size_t{1} << 21;
constexpr std::size_t least_kept = std::size_t{1}
                                   << 16;  // smaller blocks stay with malloc
// Blocks of so many bytes are kept in all, or of three times the largest of the last
// requests, but never of more than `most_kept`.
constexpr std::size_t always_kept = std::size_t{80} << 20;
constexpr std::size_t most_kept = std::size_t{256} << 20;
constexpr std::uint64_t most_idle = 32;  // requests
constexpr std::size_t most_blocks = 1024;
constexpr std::size_t most_scratch = std::size_t{1} << 20;

// Sanitizers check malloc's blocks only.
#if (defined(__linux__) || defined(__APPLE__)) && !defined(__SANITIZE_ADDRESS__)
constexpr bool maps = true;
#else
constexpr bool maps = false;
#endif

// Rounds a request up in steps of an eighth, so that requests of similar size share
// blocks.
std::size_t block_size(std::size_t bytes) {
  if (bytes < least_kept) return bytes;
  const std::size_t step = std::max(std::bit_floor(bytes) / 8, page);
  return (bytes + step - 1) / step * step;
}

void* map([[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) || defined(__APPLE__)
  const auto reserve = [](std::size_t size) {
    void* const start =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw OutOfMemory(size);
    return static_cast<char*>(start);
  };
  // The last page is a huge one if at least three quarters of it are used.
  const std::size_t huge = (bytes + huge_page / 4) / huge_page * huge_page;
  if (huge == 0) return reserve(bytes);
  const std::size_t whole = bytes + huge_page;
  char* const start = reserve(whole);
  const auto at = reinterpret_cast<std::uintptr_t>(start);
  const std::size_t before = (huge_page - at % huge_page) % huge_page;
  const std::size_t after = huge_page - before;
  if (before > 0) munmap(start, before);
  munmap(start + before + bytes, after);
#if defined(__linux__)
  madvise(start + before, std::min(huge, bytes), MADV_HUGEPAGE);
#endif
  return start + before;
#else
  return nullptr;
#endif
}

void* allocate(std::size_t bytes) {
  if (maps && bytes >= least_kept) return map(bytes);
  void* const start = ::operator new(bytes, std::align_val_t{line}, std::nothrow);
  if (!start) throw OutOfMemory(bytes);
  return start;
}

void release(void* start, std::size_t bytes) {
#if defined(__linux__) || defined(__APPLE__)
  if (maps && bytes >= least_kept) {
    munmap(start, bytes);
    return;
  }
#endif
  ::operator delete(start, std::align_val_t{line});
}

// FreeBlocks has the freed blocks that are kept. If its lock is not free at once, the
// request is served without it: a child forked from a thread that waits for the lock
// would wait for ever.
class FreeBlocks {
 public:
  struct Block {
    void* start;
    std::size_t bytes;
    std::uint64_t freed;  // the number of requests at that time
  };

  // Destructors free blocks, so put() must not allocate.
  FreeBlocks() { blocks_.reserve(most_blocks); }

  // Returns the smallest block that fits and is at most half as large again, or an empty
  // one.
  Block take(std::size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    ++requests_;
    if (bytes >= largest_ || largest_at_ + most_idle < requests_) {
      largest_ = bytes;
      largest_at_ = requests_;
    }
    std::size_t best = blocks_.size();
    for (std::size_t n = blocks_.size(); n-- > 0;) {
      const std::size_t size = blocks_[n].bytes;
      if (size < bytes || size > bytes + bytes / 2) continue;
      if (best == blocks_.size() || size < blocks_[best].bytes) best = n;
    }
    if (best == blocks_.size()) return {};
    const Block found = blocks_[best];
    erase(best);
    return found;
  }

  void put(void* start, std::size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || bytes > most_kept) return release(start, bytes);
    if (blocks_.size() == most_blocks) drop();
    blocks_.push_back({start, bytes, requests_});
    total_ += bytes;
    const std::size_t most = bound();
    while (total_ > most || blocks_.front().freed + most_idle < requests_) drop();
  }

  void clear() {
    std::unique_lock lock(mutex_, std::defer_lock);
    for (int tries = 0; tries < 1000 && !lock.try_lock(); ++tries) {
      std::this_thread::yield();
    }
    while (lock && !blocks_.empty()) drop();
  }

 private:
  std::size_t bound() const { return std::clamp(3 * largest_, always_kept, most_kept); }
  void erase(std::size_t n) {
    total_ -= blocks_[n].bytes;
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(n));
  }
  void drop() {  // frees the oldest block
    release(blocks_.front().start, blocks_.front().bytes);
    erase(0);
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  std::size_t total_ = 0;
  std::uint64_t requests_ = 0, largest_at_ = 0;
  std::size_t largest_ = 0;
};

// It is never destroyed, because arrays may be freed after static destructors ran.
FreeBlocks& free_blocks() {
  static FreeBlocks& blocks = *new FreeBlocks;
  return blocks;
}

thread_local Memory scratch;
thread_local bool uses_scratch = false;

}  // namespace

OutOfMemory::OutOfMemory(std::size_t bytes) {
  if (bytes == 0) {
    std::snprintf(message_, sizeof message_, "more memory than can be addressed");
  } else {
    std::snprintf(message_, sizeof message_, "%zu bytes of memory cannot be allocated",
                  bytes);
  }
}

std::size_t bytes_of(std::span<const index> shape, index item) {
  constexpr std::size_t most = std::numeric_limits<index>::max();
  auto bytes = static_cast<std::size_t>(item);
  for (const index n : shape) {
    const auto size = static_cast<std::size_t>(n);
    if (size > 0 && bytes > most / size) throw OutOfMemory(0);
    bytes *= size;
  }
  return bytes;
}

Memory::Memory(std::size_t bytes) : bytes_(bytes), block_(block_size(bytes)) {
  if (bytes >= least_kept) {
    if (const auto found = free_blocks().take(block_); found.start) {
      start_ = found.start;
      block_ = found.bytes;
      return;
    }
  }
  start_ = allocate(block_);
}

Memory::~Memory() {
  if (!start_) return;
  if (block_ >= least_kept) {
    free_blocks().put(start_, block_);
  } else {
    release(start_, block_);
  }
}

Workspace::Workspace(std::size_t bytes) {
  if (bytes > most_scratch || uses_scratch) {
    own_ = Memory(bytes);
    start_ = own_.as<char>();
    return;
  }
  if (bytes > scratch.bytes()) {
    scratch = {};
    scratch = Memory(bytes);
  }
  start_ = scratch.as<char>();
  uses_scratch = shares_ = true;
}

Workspace::~Workspace() {
  if (shares_) uses_scratch = false;
}

void release_memory() {
  if (!uses_scratch) scratch = {};
  free_blocks().clear();
}

}  // namespace fusedrnn
