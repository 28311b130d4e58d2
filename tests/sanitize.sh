#!/usr/bin/env bash
# Builds the kernels with sanitizers and runs the tests of what they compute on them:
#   tests/sanitize.sh asan     AddressSanitizer and UndefinedBehaviorSanitizer
#   tests/sanitize.sh tsan     ThreadSanitizer, on the tests that use threads
# on portable kernels and one more instruction set each, AVX-512 and AVX2, for the time it takes.
# Run it in an environment where the dev extra is installed (pip install ".[dev]").
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
case $preset in
  asan) library=libasan.so tests="tests/test_kernels.py tests/test_exactness.py tests/test_math.py tests/test_options.py" ;;
  tsan) library=libtsan.so tests="tests/test_exactness.py tests/test_layers.py tests/test_options.py" ;;
  *) echo "usage: tests/sanitize.sh asan|tsan" >&2; exit 2 ;;
esac
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
pip install -q cmake ninja pybind11
cmake --preset "$preset" -B "$build" -G Ninja \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python)" >"$build/configure.log"
cmake --build "$build"
cp -r src/fusedrnn "$build/fusedrnn"
cp "$build"/_cpu*.so "$build/fusedrnn/"

# Python itself is not built with a sanitizer: its runtime is loaded before Python, and what
# Python and NumPy leave allocated at exit is not ours. hypothesis and torch add nothing here
# but time, so the tests that need them are left out, as are large shapes without vectors, 530
# rows, the process with small caches, which every test has here, and, for threads, whose loop
# all instruction sets share, the portable kernels. Cells that always run the kernels with
# options are left to the tests of options.
export LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1 suppressions=$PWD/tests/tsan.txt"
export PYTHONPATH="$build:tests" OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
python -c "import fusedrnn; assert fusedrnn.__file__.startswith('$build')"
# With small caches small shapes reach every order of tiles.
export FUSEDRNN_L1_BYTES=4096 FUSEDRNN_L2_BYTES=32768
left_out="any_shape or forked or 530 or small_caches or (portable and (340 or 660 or 96))"
if [ "$preset" = tsan ]; then left_out+=" or portable"; fi
left_out+=" or ((lstm_coupled or gru_before) and not test_options)"
python -m pytest -q -n auto --capture=sys -p no:cacheprovider -k "not ($left_out)" $tests "${@:2}"
