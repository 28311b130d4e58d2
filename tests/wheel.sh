#!/usr/bin/env bash
# Builds the sdist and a wheel, with the CUDA backend if there is nvcc, repairs the wheel as a
# release does, and uses it without a compiler: tests/wheel.sh [DIR]. The wheel goes to DIR
# (build/wheels).
# Run it in an environment where the dev extra is installed (pip install ".[dev]").
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-build/wheels}")
most_bytes=4000000
most_seconds=10
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"

# The sdist must hold the files of this tree unchanged.
python -m build -q --sdist --outdir "$out" .
mkdir "$work/sdist"
tar -xzf "$out"/*.tar.gz -C "$work/sdist" --strip-components=1
git ls-files CMakeLists.txt pyproject.toml README.md LICENSE csrc cuda src tests |
  while read -r file; do cmp "$file" "$work/sdist/$file"; done

if command -v "${CUDACXX:-nvcc}" >/dev/null; then
  SKBUILD_CMAKE_DEFINE="FUSEDRNN_CUDA=ON${SKBUILD_CMAKE_DEFINE:+;$SKBUILD_CMAKE_DEFINE}"
  export SKBUILD_CMAKE_DEFINE
fi
pip wheel -q --no-deps -w "$work" .
repair=$(python - <<'PYTHON'
import pathlib
try:
    import tomllib
except ImportError:
    import tomli as tomllib
settings = tomllib.loads(pathlib.Path("pyproject.toml").read_text("utf-8"))["tool"]
print(settings["cibuildwheel"]["linux"]["repair-wheel-command"])
PYTHON
)
repair=${repair//"{dest_dir}"/"$out"}
eval "${repair//"{wheel}"/"$work"/*.whl}"
wheel=$(echo "$out"/*.whl)
bytes=$(stat -c %s "$wheel")
echo "$(basename "$wheel"): $bytes bytes of $most_bytes"
test "$bytes" -le "$most_bytes"

python -m venv "$work/env"
pip wheel -q -w "$work/needed" "$wheel[demo]"
(
  # The path has the environment and one command, and no compiler.
  mkdir "$work/bin"
  ln -s "$(command -v env)" "$work/bin/"
  export PATH="$work/env/bin:$work/bin"
  cd /
  begin=$SECONDS
  pip install -q --no-index --find-links "$work/needed" "$wheel"
  echo "installed in $((SECONDS - begin)) s of $most_seconds"
  test "$((SECONDS - begin))" -le "$most_seconds"
  python "$OLDPWD/tests/smoke.py"
  pip install -q --no-index --find-links "$work/needed" "$wheel[demo]"
  fusedrnn demo --output "$work/forecast.png"
  test -s "$work/forecast.png"
)
