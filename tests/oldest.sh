#!/usr/bin/env bash
# Runs tests with the oldest NumPy and PyTorch that pyproject.toml allows, on a wheel:
# tests/oldest.sh WHEEL [TEST…]
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "$1")
shift
tests=("$@")
if [ $# = 0 ]; then
  tests=(tests/test_{errors,layers,stream,torch,torch_modules}.py)
fi
if ! python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))'; then
  echo "skipped: the oldest NumPy is for Python 3.10 and 3.11"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work"
export PATH="$work/bin:$PATH"
oldest() { sed -n "s/.*\"$1>=\([0-9.]*\)\".*/$1==\1/p" pyproject.toml | head -n 1; }

# For x86-64 PyPI has PyTorch with CUDA alone, whose libraries are 3 GB that no test here calls:
# functions that fail stand for them, except for those of the CUDA runtime, which finds no GPU.
pip install -q --no-deps "$(oldest torch)"
python - >"$work/needs.txt" <<'PYTHON'
from importlib.metadata import requires

for needed in requires("torch") or []:
    name, _, condition = needed.partition(";")
    left_out = name.startswith(("nvidia-", "triton")) and "cuda-runtime" not in name
    if "extra" not in condition and not left_out:
        print(needed)
PYTHON
pip install -q --no-warn-conflicts -r "$work/needs.txt" "$(oldest numpy)" "$wheel" \
  "expecttest>=0.2" "hypothesis>=6.100" "pytest>=8" "pytest-xdist>=3.6"
lib=$(echo "$work"/lib/python3*/site-packages/torch/lib)
if [ -e "$lib/libtorch_cuda.so" ]; then
  users=("$lib"/lib{c10_cuda,torch_cpu,torch_cuda,torch_python}.so)
  nm -D --undefined-only "${users[@]}" | sed -n 's/.* U \(\(cu[a-zS]\|nccl\)[^@]*\).*/\1/p' |
    sort -u | sed 's/.*/int &(void) { return 1; }/' >"$work/absent.c"
  readelf -dW "${users[@]}" | sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nccl\).*\)\]/\1/p' | sort -u |
    grep -v libcudart | while read -r name; do
      echo "$name { *; };" >"$work/versions"
      gcc -shared -w -o "$lib/$name" "$work/absent.c" \
        -Wl,-soname,"$name",--version-script="$work/versions"
    done
fi

python -c "import numpy, torch; print('NumPy', numpy.__version__, 'PyTorch', torch.__version__)"
pytest -q -n auto -p no:cacheprovider "${tests[@]}"
