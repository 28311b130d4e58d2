#!/usr/bin/env bash
# Cross-compiles the kernels for aarch64 and runs their tests under user-mode emulation.
# Needs, on Debian: apt install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: see the head of $0" >&2; exit 3; }
done
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
compile() { aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wextra -Wshadow -Werror "$@"; }
for isa in neon portable; do
  for element in float double; do
    with=$([ $element = float ] && echo -DFUSEDRNN_WITH_ISA || true)
    compile -ffp-contract=off -DFUSEDRNN_ARCH=$isa -DFUSEDRNN_ELEMENT=$element $with \
      -c csrc/cpu/isa/kernels.cpp -o "$build/$isa-$element.o" &
  done
  wait
done
narrow() {  # set, vectors, products, flags
  compile -ffp-contract=off -DFUSEDRNN_ARCH=narrow_$1 -DFUSEDRNN_VECTORS=$2 \
    $(printf -- '-DFUSEDRNN_NARROW_%s ' $3) ${4-} \
    -c csrc/cpu/isa/narrow.cpp -o "$build/narrow-$1.o"
}
narrow portable portable "INT8 BFLOAT16 FLOAT16" &
narrow neon neon "INT8 BFLOAT16 FLOAT16" &
wait
narrow neon_dotprod neon INT8 -march=armv8.2-a+dotprod &
narrow neon_bf16 neon BFLOAT16 -march=armv8.2-a+bf16 &
wait
narrow neon_i8mm neon INT8 "-march=armv8.2-a+dotprod+i8mm -DFUSEDRNN_WITH_ROW_PAIRS"
for source in csrc/cpu/*.cpp tests/{contention,kernels,products}_test.cpp; do
  while [ "$(jobs -pr | wc -l)" -ge 2 ]; do wait -n; done
  compile -ffp-contract=off -fopenmp -DFUSEDRNN_HAS_NEON -c "$source" \
    -o "$build/$(basename "$source").o" &
done
wait
test "$(ls "$build"/*.o | wc -l)" -eq "$((9 + $(ls csrc/cpu/*.cpp | wc -l) + 3))"
compile -fopenmp "$build"/*.o -o "$build/kernels_test"
FUSEDRNN_FIXED_THREADS=1 qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu "$build/kernels_test"
