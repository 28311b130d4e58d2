#!/usr/bin/env bash
# Builds what bench/gpu/run.py needs on a Hopper GPU for another Linux machine of this
# architecture, whose time is dear or which has no compiler or network:
#   bench/gpu/carry.sh PYTHON [DIR]
# PYTHON is an interpreter of that machine's version. DIR (build/gpu-site) gets the package,
# whose waits on the GPU are bounded, the program meetings, and libgomp. Then it is checked as
# far as a machine without a GPU can. Needs nvcc and network.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 site=$(realpath -m "${2:-build/gpu-site}")
most_bytes=$((60 << 20))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
"$work/env/bin/pip" install -q numpy scikit-build-core pybind11 cmake ninja
rm -rf "$site"
PATH="$work/env/bin:$PATH" "$work/env/bin/pip" install -q --no-deps --no-build-isolation \
  --target "$site" -C build-dir="$work/build" -C cmake.define.FUSEDRNN_CUDA=ON \
  -C cmake.define.FUSEDRNN_WAIT_LIMIT=4 \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real .
nvcc -O3 -std=c++20 -gencode arch=compute_90a,code=sm_90a bench/gpu/meetings.cu \
  -o "$site/meetings"
mkdir "$site/lib"
cp -L "$(g++ -print-file-name=libgomp.so.1)" "$site/lib/"

toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1
export LD_LIBRARY_PATH="$site/lib:$toolkit/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
"$work/env/bin/python" tests/smoke.py
"$work/env/bin/python" - <<'PYTHON'
import sys
import fusedrnn as fr
from fusedrnn import _cuda

assert fr.__file__.startswith(sys.path[1]), fr.__file__
print(f"Python {sys.version.split()[0]}; cells {', '.join(_cuda.cells())}; {fr.cuda.status()}")
PYTHON
# Without a driver it says so, and nothing about a library or an architecture.
("$site/meetings" 2>&1 || true) | grep -q "cudaSetDevice: CUDA driver version\|stage"
bytes=$(du -sb "$site" | cut -f 1)
echo "$site: $bytes bytes of $most_bytes"
test "$bytes" -le "$most_bytes"
