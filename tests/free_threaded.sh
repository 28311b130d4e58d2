#!/usr/bin/env bash
# Builds the package for a free-threaded Python and tests it there:
#   tests/free_threaded.sh python3.14t        as users install it
#   tests/free_threaded.sh PYTHON tsan        under ThreadSanitizer, by a PYTHON that was
#                                             configured with --disable-gil and
#                                             --with-thread-sanitizer, by the same compiler
# FUSEDRNN_ROUNDS=20 repeats the tests of threads.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 mode=${2:-plain}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/free"
export PATH="$work/free/bin:$PATH" OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
packages=(numpy pytest hypothesis threadpoolctl)
tests=(tests/test_threads.py tests/test_exactness.py tests/test_layers.py)
case $mode in
  plain)
    pip install -q --only-binary numpy,hypothesis . "${packages[@]}"
    python tests/smoke.py
    ;;
  tsan)
    pip install -q --only-binary numpy,hypothesis cmake ninja pybind11 "${packages[@]}"
    cmake --preset tsan -B "$work/build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" \
      -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >"$work/configure.log"
    cmake --build "$work/build"
    cp -r src/fusedrnn "$work/build/fusedrnn"
    cp "$work/build"/_cpu*.so "$work/build/fusedrnn/"
    export PYTHONPATH="$work/build"
    # NumPy's wheel is not instrumented, so that its own accesses are not seen.
    export TSAN_OPTIONS="halt_on_error=1 suppressions=$PWD/tests/tsan.txt"
    # ThreadSanitizer ends forked children that start threads, and CPython 3.13 has a race
    # of its own at its end beside daemon threads (PyThreadState_Clear, drop_gil).
    tests+=(-k "not (fork or python_ends)")
    ;;
  *) echo "usage: tests/free_threaded.sh PYTHON [tsan]" >&2; exit 2 ;;
esac
python -m pytest -q -p no:cacheprovider "${tests[@]}"
