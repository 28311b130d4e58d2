#!/usr/bin/env bash
# Proves what docs/extending.md says: a cell needs its definition and row in the reference,
# one header, and its include and name in the list of cells. The script adds only these, for
# the two cells of tests/extending/, to a copy of the tree, and runs the tests of those cells,
# on the CPU and on the CUDA backend compiled for the host (cuda/emulator/). Run it in an
# environment where the test extra is installed; no installed fusedrnn is used.
#   tests/extending.sh [DIR]   DIR, which must not exist, holds the copy and is removed
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(realpath -m "${1:-$(mktemp -du)}")
mkdir "$work"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/tree" "$work/site"
git ls-files -z | tar -c --null -T - | tar -x -C "$work/tree"
cd "$work/tree"

cp tests/extending/*.h csrc/cells/
sed -i -e '0,/^#include/s//#include "gated.h"\n#include "ligru.h"\n&/' \
  -e 's/^using AllCells = CellList<.*Rnn/&, Gated, LiGru/' csrc/cells/all.h
sed -i 's/^Nonlinearity = Literal\[.*"identity"/&, "gated", "ligru"/' \
  src/fusedrnn/reference/types.py
cat tests/extending/cells.py >>src/fusedrnn/reference/cells.py

# Builds the portable kernels and the best others that this processor supports.
isa=avx2
if grep -qw avx512dq /proc/cpuinfo; then isa=avx512; fi
if [ "$(uname -m)" = aarch64 ]; then isa=neon; fi
pip install -q cmake ninja pybind11
cmake --preset emulated -B "$work/build" -G Ninja -DFUSEDRNN_ISAS="$isa" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python)" >"$work/configure.log"
cmake --build "$work/build"
cp -r src/fusedrnn "$work/site/"
cp "$work"/build/_cpu*.so "$work"/build/_cuda*.so "$work/site/fusedrnn/"

export PYTHONPATH="$work/site" OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
python - "$work/site" "$isa" <<'CHECK'
import sys, fusedrnn
from fusedrnn import _cpu, cells, cuda
assert fusedrnn.__file__.startswith(sys.argv[1]), fusedrnn.__file__
assert {"rnn_gated", "rnn_ligru"} <= set(cells.CELLS), list(cells.CELLS)
assert cuda.status().startswith("emulator"), cuda.status()
print("instruction sets:", *(name for name, has in _cpu.isas().items() if has))
CHECK
run_tests() {
  python -m pytest -q -n auto -p no:cacheprovider --capture=sys -k "gated or ligru" "$@" | tee "$work/log"
  grep -Eq '^[0-9]+ passed' "$work/log"  # not all skipped
}
run_tests tests/test_reference.py tests/test_kernels.py tests/test_options.py
run_tests -m gpu tests/test_cuda*.py
