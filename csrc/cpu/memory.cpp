#include "memory.h"

#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedrnn {

namespace {

constexpr std::size_t line = 64, huge_page = std::size_t{1} << 21;
constexpr std::size_t large = 2 * huge_page;  // from here on huge pages, kept when freed
constexpr std::size_t most_kept = std::size_t{256} << 20;

struct Block {
  void* start;
  std::size_t bytes;
};

void* allocate(std::size_t bytes) {
  if (bytes < large) return ::operator new(bytes, std::align_val_t{line});
  void* const start = ::operator new(bytes, std::align_val_t{huge_page});
#if defined(__linux__)
  madvise(start, bytes, MADV_HUGEPAGE);
#endif
  return start;
}

void release(const Block& block) {
  ::operator delete(block.start,
                    std::align_val_t{block.bytes < large ? line : huge_page});
}

class Kept {
 public:
  // A block of exactly this size, or null.
  void* take(std::size_t bytes) {
    const std::scoped_lock lock(mutex_);
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
    const std::scoped_lock lock(mutex_);
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
  if (bytes >= large) start_ = kept().take(bytes);
  if (!start_) start_ = allocate(bytes);
}

Memory::~Memory() {
  if (!start_) return;
  if (bytes_ >= large) {
    kept().put({start_, bytes_});
  } else {
    release({start_, bytes_});
  }
}

}  // namespace fusedrnn
