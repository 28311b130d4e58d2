#!/usr/bin/env bash
# Builds the sdist and a wheel as a release does, with the CUDA backend if there is nvcc, checks
# them, and uses the wheel without a compiler: tests/wheel.sh [DIR]. They go to DIR (build/wheels).
# Everything that builds them comes from requirements/build.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-build/wheels}")
most_bytes=4000000
most_seconds=10
work=$(mktemp -d)
trap 'rm -rf "$work" "$out/sdist" "$out/tools"' EXIT
rm -rf "$out"

python -m venv "$out/tools"
"$out/tools/bin/pip" install -q --require-hashes -r requirements/build.txt
export PATH="$out/tools/bin:$PATH"

# The sdist must hold the files of this tree unchanged.
python -m build -q --no-isolation --sdist --outdir "$out" .
mkdir "$out/sdist"
tar -xzf "$out"/*.tar.gz -C "$out/sdist" --strip-components=1
git ls-files CMakeLists.txt pyproject.toml README.md LICENSE csrc cuda src tests |
  while read -r file; do cmp "$file" "$out/sdist/$file"; done

# The sdist builds without a network, and a wheel is the same bit for bit in another folder, at
# another time, under another umask and time zone. A compile cache may supply the objects, but
# not those of nvcc, whose backend these two wheels leave out.
cpu=(-C cmake.define.FUSEDRNN_CUDA=OFF)
python -m build -q --no-isolation --wheel "${cpu[@]}" --outdir "$work/first" .
(
  umask 077
  export TZ=Asia/Tokyo
  find "$out/sdist" -exec touch -d 2021-03-04 {} +
  unshare --map-root-user --net pip wheel -q --no-index --no-build-isolation --no-deps \
    "${cpu[@]}" -w "$work/second" "$out/sdist"
)
cmp "$work"/first/*.whl "$work"/second/*.whl

if command -v "${CUDACXX:-nvcc}" >/dev/null; then
  SKBUILD_CMAKE_DEFINE="FUSEDRNN_CUDA=ON${SKBUILD_CMAKE_DEFINE:+;$SKBUILD_CMAKE_DEFINE}"
  export SKBUILD_CMAKE_DEFINE
fi
python -m build -q --no-isolation --wheel --outdir "$work" .
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
python tests/elf.py "$wheel"
python - "$wheel" <<'PYTHON'
import json
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    boms = [json.loads(wheel.read(n)) for n in wheel.namelist() if n.endswith(".cdx.json")]
named = sorted(c["name"] for bom in boms for c in bom["components"])
print("named in the wheel's SBOMs:", *named)
assert "pybind11" in named
assert any(name.startswith("libgomp") for name in named)
PYTHON
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
