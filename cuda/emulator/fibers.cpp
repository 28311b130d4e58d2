#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr std::size_t stack_bytes = 128 * 1024;
constexpr int blocks_at_a_time = 3;

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it waits
  bool started = false;
  char* stack;
  Here here;
  bool done = false, slow = false;
  const Barrier* waits = nullptr;  // the barrier it waits at
  void* fake_stack = nullptr;      // AddressSanitizer's
};

jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::vector<char*> free_stacks;
std::vector<Fiber*> woken;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] std::size_t scheduler_stack_bytes = 0;

char* take_stack() {
  if (!free_stacks.empty()) {
    char* const stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* const stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) std::abort();
  return static_cast<char*>(stack);
}

void to_scheduler([[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &running->fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running->fake_stack, &scheduler_stack,
                                  &scheduler_stack_bytes);
#endif
}

void to_fiber(Fiber* fiber) {
  running = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, stack_bytes);
#endif
  // Jumps are fast; only a fiber's start is a context switch, which is a system call.
  if (_setjmp(scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->place, 1);
    fiber->started = true;
    setcontext(&fiber->context);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  running->done = true;
  to_scheduler(true);
}

std::unique_ptr<Fiber> new_fiber(const Here& at) {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = take_stack();
  fiber->here = at;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = stack_bytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, begin, 0);
  return fiber;
}

// These are the delayed stores, in the order in which they were issued.
struct Store {
  const Fiber* by;
  const void* place;
  std::function<void()> perform;
  bool held;  // until all fibers wait
};
std::vector<Store> stores;
unsigned stores_issued = 0;
int stores_until_fault = 0;

void perform_store(std::size_t at) {
  for (std::size_t before = 0; before < at; ++before) {
    if (stores[before].place == stores[at].place) at = before;
  }
  stores[at].perform();
  stores.erase(stores.begin() + static_cast<std::ptrdiff_t>(at));
}

// Runs a random ready fiber until all are done; some warps run much more seldom than
// others.
void run_all(std::vector<std::unique_ptr<Fiber>>& fibers, std::mt19937& random) {
  std::vector<Fiber*> ready;
  for (const auto& fiber : fibers) ready.push_back(fiber.get());
  std::size_t left = fibers.size(), idle = 0;
  while (left > 0) {
    if (ready.empty()) {
      throw std::runtime_error("a barrier waits for threads that never come");
    }
    std::size_t at = random() % ready.size();
    while (ready[at]->slow && random() % 8 != 0) at = random() % ready.size();
    Fiber* const fiber = ready[at];
    ready[at] = ready.back();
    ready.pop_back();
    if (!stores.empty()) {
      const std::size_t one = random() % stores.size();
      if (stores[one].held ? idle > 2 * left : random() % 4 == 0) perform_store(one);
    }
    const std::size_t before = left;
    bool polled = false;
    fiber->waits = nullptr;
    to_fiber(fiber);
    if (fiber->done) {
      --left;
    } else if (!fiber->waits) {
      polled = true;
      ready.push_back(fiber);
    }
    const bool progressed = left < before || fiber->waits || !woken.empty();
    ready.insert(ready.end(), woken.begin(), woken.end());
    woken.clear();
    idle = polled && !progressed ? idle + 1 : 0;
    if (idle > 10'000'000) {
      throw std::runtime_error("every thread waits for memory that nobody writes");
    }
  }
}

std::vector<std::pair<const Barrier*, Fiber*>> waiting;

}  // namespace

void Barrier::meet() {
  if (++arrived_ < members_) {
    running->waits = this;
    waiting.emplace_back(this, running);
    to_scheduler(false);
    return;
  }
  arrived_ = 0;
  std::size_t held = 0;
  for (const auto& entry : waiting) {
    if (entry.first == this) {
      woken.push_back(entry.second);
    } else {
      waiting[held++] = entry;
    }
  }
  waiting.resize(held);
}

Block::Block(int x_, int y_, int threads, std::size_t shared_bytes)
    : x(x_),
      y(y_),
      warps(static_cast<std::size_t>(threads) / 32),
      barrier(threads),
      shared(shared_bytes, static_cast<char>(0xff)),
      cluster(nullptr) {}

Here& here() { return running->here; }

void yield_waiting() { to_scheduler(false); }

void delay_store(const void* place, std::function<void()> store) {
  // Stores of data alternate with those that mark buffers as unwritten, each in two
  // halves. For some time all stores of one kind are held back, then all of the other,
  // then none.
  const unsigned number = stores_issued++;
  if (--stores_until_fault == 0) return;
  const bool held = number / 2 % 2 == number / 512 % 4;
  stores.push_back({running, place, std::move(store), held});
}
void flush_stores() {
  for (std::size_t at = 0; at < stores.size();) {
    if (stores[at].by != running) {
      ++at;
      continue;
    }
    stores[at].perform();
    stores.erase(stores.begin() + static_cast<std::ptrdiff_t>(at));
  }
}

void run(const Grid& grid, const std::function<void()>& kernel) {
  std::mt19937 random(grid.seed);
  body = &kernel;
  const char* const fault = std::getenv("EMULATOR_LOSES_STORE");
  stores_until_fault = fault ? std::atoi(fault) : 0;
  std::vector<std::unique_ptr<Cluster>> clusters;
  for (int y = 0; y < grid.blocks_y; ++y) {
    auto cluster = std::make_unique<Cluster>(grid.threads * grid.blocks_x);
    for (int x = 0; x < grid.blocks_x; ++x) {
      cluster->blocks.push_back(
          std::make_unique<Block>(x, y, grid.threads, grid.shared_bytes));
      cluster->blocks.back()->cluster = cluster.get();
    }
    clusters.push_back(std::move(cluster));
  }
  std::vector<Block*> blocks;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) blocks.push_back(block.get());
  }
  std::size_t next = 0;
  while (next < blocks.size()) {
    const std::size_t count =
        grid.at_once ? blocks.size() - next
                     : std::min<std::size_t>(blocks_at_a_time, blocks.size() - next);
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (std::size_t b = next; b < next + count; ++b) {
      bool slow = false;
      for (int t = 0; t < grid.threads; ++t) {
        if (t % 32 == 0) slow = random() % 4 == 0;
        fibers.push_back(
            new_fiber({blocks[b], t, grid.threads, grid.blocks_x, grid.blocks_y, 0}));
        fibers.back()->slow = slow;
      }
    }
    run_all(fibers, random);
    while (!stores.empty()) perform_store(0);
    for (const auto& fiber : fibers) free_stacks.push_back(fiber->stack);
    next += count;
  }
  body = nullptr;
}

}  // namespace emulator
