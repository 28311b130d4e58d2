#include "memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedrnn {

namespace {

constexpr std::size_t line = 64, huge_page = std::size_t{1} << 21;
constexpr std::size_t on_huge_pages = huge_page / 2;      // from this size on
constexpr std::size_t least_kept = std::size_t{1} << 16;  // smaller blocks malloc keeps
constexpr std::size_t most_kept = std::size_t{256} << 20;

struct Block {
  void* start;
  std::size_t bytes;
};

void* allocate(std::size_t bytes) {
  if (bytes < on_huge_pages) return ::operator new(bytes, std::align_val_t{line});
  // The last page is a huge one if at least three quarters of it are used.
  const std::size_t pages = (bytes + huge_page / 4) / huge_page;
  const std::size_t whole = std::max(bytes, pages * huge_page);
  void* const start = ::operator new(whole, std::align_val_t{huge_page});
#if defined(__linux__)
  madvise(start, pages * huge_page, MADV_HUGEPAGE);
#endif
  return start;
}

void release(const Block& block) {
  const auto alignment = block.bytes < on_huge_pages ? line : huge_page;
  ::operator delete(block.start, std::align_val_t{alignment});
}

// Where the lock is not free at once it does without: a child forked from a thread that
// waited for it would wait for ever.
class Kept {
 public:
  Kept() { blocks_.reserve(most_kept / least_kept + 1); }

  // A block of exactly this size, or null.
  void* take(std::size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      if (block->bytes != bytes) continue;
      void* const start = block->start;
      total_ -= bytes;
      blocks_.erase(std::next(block).base());
      return start;
    }
    return nullptr;
  }

  void put(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > most_kept) return release(block);
    blocks_.push_back(block);
    total_ += block.bytes;
    while (total_ > most_kept) {  // the oldest goes first
      total_ -= blocks_.front().bytes;
      release(blocks_.front());
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
  std::size_t total_ = 0;
};

// Never destroyed: arrays may be freed after static destructors ran.
Kept& kept() {
  static Kept& blocks = *new Kept;
  return blocks;
}

}  // namespace

Memory::Memory(std::size_t bytes) : bytes_(bytes) {
  if (bytes >= least_kept) start_ = kept().take(bytes);
  if (!start_) start_ = allocate(bytes);
}

Memory::~Memory() {
  if (!start_) return;
  if (bytes_ >= least_kept) {
    kept().put({start_, bytes_});
  } else {
    release({start_, bytes_});
  }
}

}  // namespace fusedrnn
