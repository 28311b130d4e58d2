#include "narrow.h"

#include <cstring>

namespace fusedrnn {

index narrow_panel_bytes(const NarrowPanel& p, int width, index K) {
  const index columns = width * p.lanes;
  const index of_vectors = p.has_scales ? (p.offset ? 2 : 1) * 4 : 0;
  return columns * (round_up(K, p.grain) * p.bytes + of_vectors);
}

void pack_narrow(const NarrowPanel& p, const Matrix& of, int unit_vectors, Range panels,
                 char* to) {
  const int width = of.slots * unit_vectors;
  const index columns = width * p.lanes, bytes = narrow_panel_bytes(p, width, of.K);
  const index group = p.per * p.bytes;  // of one column
  for (index panel = panels.begin; panel < panels.end; ++panel, to += bytes) {
    std::memset(to, 0, bytes);
    float* const scales =
        reinterpret_cast<float*>(to + columns * round_up(of.K, p.grain) * p.bytes);
    std::int32_t* const starts = reinterpret_cast<std::int32_t*>(scales + columns);
    for (index column = 0; column < columns; ++column) {
      const index vector = column / p.lanes, lane = column % p.lanes;
      const index slot = vector / unit_vectors;
      const index unit = (panel * unit_vectors + vector % unit_vectors) * p.lanes + lane;
      if (unit >= of.H) continue;
      const index row = of.blocks[slot] * of.H + unit;
      const char* const from = of.weight + row * of.K * p.bytes;
      for (index k = 0; k < of.K; k += p.per) {
        const index left = (of.K - k) * p.bytes;
        std::memcpy(to + (k / p.per * columns + column) * group, from + k * p.bytes,
                    left < group ? left : group);
      }
      if (!p.has_scales) continue;
      scales[column] = of.scale[row];
      if (!p.offset) continue;
      std::int32_t sum = 0;
      for (index k = 0; k < of.K; ++k) sum += static_cast<signed char>(from[k]);
      starts[column] = -p.offset * sum;
    }
  }
}

}  // namespace fusedrnn
