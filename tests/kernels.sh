#!/usr/bin/env bash
# Builds the kernels' tests without Python (tests/kernels_test.cpp) for this machine and
# runs them. tests/aarch64.sh does the same for aarch64, under an emulator.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
pip install -q cmake ninja pybind11
cmake --preset release -B "$build" -G Ninja -DFUSEDRNN_CUDA=OFF \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python)" >"$build/configure.log"
cmake --build "$build" --target kernels_test
FUSEDRNN_FIXED_THREADS=1 "$build/kernels_test"
