#!/usr/bin/env bash
# Builds the kernels with sanitizers and runs the tests of their results:
#   tests/sanitize.sh asan     AddressSanitizer and UndefinedBehaviorSanitizer, with the tiles
#                              of AMX computed without the unit; then random calls for 20 s
#   tests/sanitize.sh tsan     ThreadSanitizer, on the tests that use threads
# on portable kernels and, to save time, one more instruction set each, AVX-512 and AVX2.
# Run it in an environment where the dev extra is installed (pip install ".[dev]").
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
case $preset in
  asan) library=libasan.so tests="tests/test_kernels.py tests/test_exactness.py tests/test_math.py tests/test_options.py tests/test_masks.py tests/test_narrow.py tests/test_bfloat16.py tests/test_onnx_provider.py tests/test_onnx_provider_errors.py"; units=ON ;;
  tsan) library=libtsan.so tests="tests/test_exactness.py tests/test_layers.py tests/test_options.py tests/test_masks.py tests/test_narrow.py tests/test_bfloat16.py"; units=OFF ;;
  *) echo "usage: tests/sanitize.sh asan|tsan" >&2; exit 2 ;;
esac
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
pip install -q cmake ninja pybind11
cmake --preset "$preset" -B "$build" -G Ninja -DFUSEDRNN_EMULATE_AMX=$units \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python)" >"$build/configure.log"
cmake --build "$build"
cp -r src/fusedrnn "$build/fusedrnn"
cp "$build"/_cpu*.so "$build/fusedrnn/"

# Python itself is not built with a sanitizer, so the sanitizer's runtime is loaded before
# Python, and leaks are not reported, because Python and NumPy leave memory allocated at exit.
# Tests that need hypothesis or torch would only add time, so they are left out, as are large
# shapes without vectors, 530 rows, and the process with small caches, which all tests have
# here. For threads the portable kernels are left out, because all instruction sets share one
# loop. Only the tests of options run cells that always need the kernels with options.
export LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1 suppressions=$PWD/tests/tsan.txt"
export PYTHONPATH="$build:tests" OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
python -c "import fusedrnn; assert fusedrnn.__file__.startswith('$build')"
# With small caches small shapes reach every order of tiles.
export FUSEDRNN_L1_BYTES=4096 FUSEDRNN_L2_BYTES=32768
left_out="any_shape or forked or 530 or small_caches or (portable and (340 or 660 or 96))"
# Of narrow weights two shapes of six layers run with every set of units, and no test measures
# the machine.
left_out+=" or (test_narrow and (against or masks or 160 or 450 or explain))"
left_out+=" or (test_bfloat16 and (vnni or definition or recomputing or memory or stored))"
left_out+=" or (test_bfloat16 and (65 or 160 or 450))"
left_out+=" or (test_masks and float32 and not compacted)"
if [ "$preset" = tsan ]; then
  left_out+=" or portable or ((test_narrow or test_bfloat16) and not exactness)"
fi
left_out+=" or ((lstm_coupled or gru_before) and not test_options)"
python -m pytest -q -n auto --capture=sys -p no:cacheprovider -k "not ($left_out)" $tests "${@:2}"
if [ "$preset" = asan ]; then  # PyTorch does not run under the sanitizer
  python tests/fuzz.py --seconds 20 --seed 26 --limit 600 --kinds op layer stream narrow wrong
fi
