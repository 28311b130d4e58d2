#!/usr/bin/env bash
# Runs the tests of the CUDA backend without a GPU, on its kernels compiled for the host
# (cuda/emulator/), in an environment where fusedrnn and its test extra are installed:
#   tests/emulate.sh         without sanitizers
#   tests/emulate.sh asan    with AddressSanitizer and UndefinedBehaviorSanitizer
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
options=()
if [ "${1:-}" = asan ]; then
  shift
  options=(-DFUSEDRNN_SANITIZE=address,undefined)
  # A rehearsal of the script for a GPU is about its processes and clock.
  set -- --deselect tests/test_cuda_script.py "$@"
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
fi
pip install -q cmake ninja pybind11
cmake --preset emulated -B "$build" -G Ninja "${options[@]}" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python)" >"$build/configure.log"
cmake --build "$build" --target _cuda
mkdir "$build/site"
cp -r "$(cd / && python -c 'import fusedrnn; print(*fusedrnn.__path__)')" "$build/site/"
cp -r src/fusedrnn/. "$build/site/fusedrnn/"
rm -f "$build"/site/fusedrnn/_cuda*.so
cp "$build"/_cuda*.so "$build/site/fusedrnn/"
export PYTHONPATH="$build/site" OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
# The rehearsals mostly wait, so they come first, and there is one process more than cores.
LD_PRELOAD="${preload:-}" python -m pytest -q -n "$(($(nproc) + 1))" -m gpu -p no:cacheprovider \
  --capture=sys tests/test_cuda_script.py tests/test_cuda*.py "$@"
