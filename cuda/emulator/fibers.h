// Threads of a grid as fibers of one CPU thread: the kernels of cuda/ compile for the
// host against emulator/device.h, which is written over this. It is a test tool: it finds
// wrong indices (with AddressSanitizer), missing barriers and hand-shakes that depend on
// an order, because it runs the fibers in an order drawn from a seed, some warps seldom,
// and delays the stores that other blocks wait for, in any order. It says nothing about
// time, and it does not reorder a thread's other accesses.
//
// A fiber runs until it waits. Shared memory of every block starts as NaN.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

// Where so many fibers wait for each other, again and again.
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
  } fragments[2][32];  // of one matrix product and the next
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
  unsigned products;  // of the matrix unit, so far
};
Here& here();

// Makes a store later, but after those to the same place before it; a fiber's own no
// later than when it calls settle().
void later(const void* place, std::function<void()> store);
void settle();

// Lets the others run. What waits for memory to change calls it again and again; where
// all fibers do so for long, the program ends with a message.
void yield_waiting();

struct Grid {
  int blocks_x, blocks_y, threads;
  std::size_t shared_bytes;
  bool at_once;  // all blocks run together; else a few at a time, as on a small device
  unsigned seed;
};
void run(const Grid& grid, const std::function<void()>& kernel);

}  // namespace emulator
