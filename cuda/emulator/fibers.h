// This header runs the threads of a grid as fibers of one CPU thread. The kernels of
// cuda/ compile for the host with emulator/device.h, which is written over it. It is a
// test tool: it finds wrong indices (with AddressSanitizer), missing barriers and
// handshakes that depend on an order, because it runs the fibers in an order drawn from a
// seed, some warps seldom, and delays the stores that other blocks wait for, in any
// order. It says nothing about time, and it does not reorder a thread's other accesses.
//
// A fiber runs until it waits. Shared memory of every block starts as NaN.
//
// EMULATOR_LOSES_STORE=n in the environment is a fault: the n-th delayed store of a grid
// never arrives.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

// At a Barrier `members` fibers wait for each other, again and again.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}
  void meet();

 private:
  int members_, arrived_ = 0;
};

struct Warp {
  Barrier barrier{32};
  struct Fragments {
    unsigned a[4], b[2];
  } fragments[2][32];  // of two matrix products in alternation
};

struct Cluster;

struct Block {
  int x, y;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<char> shared;
  Cluster* cluster;
  Block(int x_, int y_, int threads, std::size_t shared_bytes);
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  explicit Cluster(int members) : barrier(members) {}
};

// The fiber that runs now.
struct Here {
  Block* block;
  int thread, threads, blocks_x, blocks_y;
  unsigned products;  // matrix products so far
};
Here& here();

// delay_store performs a store later, but after earlier ones to the same place. A fiber's
// own stores are performed at the latest in flush_stores().
void delay_store(const void* place, std::function<void()> store);
void flush_stores();

// Lets other fibers run. A fiber that waits for memory to change calls it repeatedly.
void yield_waiting();

struct Grid {
  int blocks_x, blocks_y, threads;
  std::size_t shared_bytes;
  bool at_once;  // all blocks run together; else a few at a time, as on a small device
  unsigned seed;
};
// Throws std::runtime_error if every fiber waits for another for ever.
void run(const Grid& grid, const std::function<void()>& kernel);

}  // namespace emulator
