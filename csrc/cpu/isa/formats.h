// A format is how a product reads its operands: rows on the left, and vectors of packed
// weights on the right, each of which holds `per` k of its columns.
//
//   V, Left, Right, Sum           vectors of the tile; what is held of each operand; a
//   sum bytes, per, grain             of a vector; k in it; K is padded to a multiple of
//   grain parts                         in how many steps a vector is multiplied
//   left<part>(row, n)            the row's elements that belong to vector n
//   right<part>(p)                the vector at p
//   add<part>(left, right, sum)   sum + their product
//   most_sums                     that fit the registers beside the shorter side of a
//   tile
//                                 and one vector
//   continues                     whether a sum starts at the tile's value and runs on
//   from
//                                 term to term. Otherwise each `vectors_at_once` vectors
//                                 of a term have sums of their own, from start() on,
//                                 which finished() adds to the tile.
#pragma once

#include "../../vec/math.h"
#include "../kernels.h"

namespace fusedrnn::FUSEDRNN_ARCH {

// These are the weights of the element type, and the rows as they are.
template <class V_>
struct Own {
  using V = V_;
  using S = typename V::scalar;
  using Left = V;
  using Right = V;
  using Sum = V;
  static constexpr int bytes = sizeof(V), per = 1, grain = 1, parts = 1;
  static constexpr int most_sums = V::registers == 32 ? 24 : 12;
  static constexpr bool continues = true;

  static index vectors(index K) { return K; }
  template <int part>
  static V left(const char* row, index k) {
    return V::broadcast(reinterpret_cast<const S*>(row)[k]);
  }
  template <int part>
  static V right(const char* p) {
    return V::load(reinterpret_cast<const S*>(p));
  }
  template <int part>
  static V add(V left, V right, V sum) {
    return fma(left, right, sum);
  }
};

}  // namespace fusedrnn::FUSEDRNN_ARCH
