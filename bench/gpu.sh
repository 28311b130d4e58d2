#!/usr/bin/env bash
# Builds, tests and measures fusedrnn on a CUDA machine, with its tables at the end:
#   bench/gpu.sh [--out DIR] [--seconds N] [--cpu] [STAGE…]
#
#   --out DIR      where the results go (bench/results): <card>-<suite>.md and .json, and logs/
#   --seconds N    the time for all of it (540); the benchmark takes what is left
#   --cpu          first the other tests on each instruction set, and the CPU's benchmark,
#                  which take some 20 minutes more: give it --seconds
#   STAGE…         of tests, memcheck, racecheck, meetings, bench; all of them if none
#
# Needs nvcc, Python with PyTorch for CUDA, NumPy and what the extra `test` and the build
# need (scikit-build-core, pybind11, cmake, ninja, pytest, hypothesis); no network. The
# package is built for this card alone into a temporary folder; build/gpu stays, so that
# another build is short. A stage that fails or takes too long is noted and the next one
# runs. The status is 1 if something was wrong, not if something was slow or is not there.
set -uo pipefail
cd "$(dirname "$0")/.."

out=bench/results total=540 cpu=false
stages=()
while (($#)); do
  case $1 in
    --out) out=$2; shift ;;
    --seconds) total=$2; shift ;;
    --cpu) cpu=true ;;
    tests | memcheck | racecheck | meetings | bench) stages+=("$1") ;;
    *) sed -n '2,16s/^# \{0,1\}//p' bench/gpu.sh >&2; exit 2 ;;
  esac
  shift
done
((${#stages[@]})) || stages=(tests memcheck racecheck meetings bench)
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

left() { echo $((total - SECONDS > 1 ? total - SECONDS : 1)); }
wanted() { [[ " ${stages[*]} " == *" $1 "* ]]; }

table=() wrong=false
note() {  # NAME WHAT
  table+=("$(printf '%-11s %s' "$1" "$2")")
  echo "[$SECONDS s] $1: $2"
}

# run NAME LIMIT COMMAND… with its output in a log, and note how it went.
run() {
  local name=$1 limit=$2 begin=$SECONDS log="$out/logs/$1.log" status
  shift 2
  ((limit < $(left))) || limit=$(left)
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  status=$?
  local last took="$((SECONDS - begin)) s"
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-100)
  case $status in
    0) note "$name" "good, $took: $last" ;;
    124 | 137)
      note "$name" "no end within $limit s: $last"
      [[ $name == *check ]] || wrong=true  # memcheck and racecheck may just be slow
      ;;
    *)
      note "$name" "FAILED with status $status, $took: $last"
      wrong=true
      [[ $name == bench-* ]] || tail -n 25 "$log"  # whose tables come at the end
      ;;
  esac
  return $status
}

# The card, and for which architecture to build.
read -r capability card < <(python3 - <<'PYTHON' 2>/dev/null || echo "90 no-card"
import re, torch
major, minor = torch.cuda.get_device_capability()
name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
print(f"{major}{minor} {name}")
PYTHON
)
[[ $capability == 90 ]] && architecture=90a || architecture=$capability
[[ $card != no-card ]] || wrong=true
note card "$card, built for sm_$architecture"

# The runtime libraries of torch's wheels first, then the compiler's.
libraries=$(python3 - <<'PYTHON'
import importlib.util, pathlib
for root in getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", ()):
    print(*pathlib.Path(root).glob("*/lib"), sep=":", end=":")
PYTHON
)
toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
export LD_LIBRARY_PATH="$libraries$toolkit/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

if wanted meetings; then  # beside the build, which has cores to spare
  nvcc -O3 -std=c++20 -gencode "arch=compute_$architecture,code=sm_$architecture" \
    bench/meetings.cu -o "$work/meetings" >"$out/logs/meetings-build.log" 2>&1 &
fi
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CMAKE_GENERATOR=Ninja run build 300 \
  python3 -m pip install --disable-pip-version-check --no-index --no-build-isolation \
  --no-deps --upgrade --target "$work/site" -C build-dir=build/gpu \
  -C cmake.define.FUSEDRNN_CUDA=ON \
  -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture-real" .
built=$?
wait
export PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1
fusedrnn="python3 -m fusedrnn"

if ((built == 0)); then  # without a GPU that it can use, the tests would be skipped
  run backend 60 python3 -c 'import sys, fusedrnn as fr
print(fr.cuda.status())
sys.exit(not fr.cuda.is_available())'
fi

if ((built == 0)) && $cpu; then
  isas=$(python3 -c 'import fusedrnn as fr; print(*fr.show_config("dict")["isas available"])')
  for isa in $isas; do
    FUSEDRNN_ISA=$isa run "cpu-$isa" 600 \
      python3 -m pytest -q -p no:cacheprovider -m "not gpu" --tb=short tests
  done
  run cpu-bench 1200 $fusedrnn bench --suite shapes --report "$out/cpu.md"
fi

if ((built == 0)) && wanted tests; then
  run tests 150 python3 -m pytest -q -p no:cacheprovider -m gpu --tb=short --maxfail=50 \
    --continue-on-collection-errors tests
fi

for tool in memcheck racecheck; do
  ((built == 0)) && wanted $tool || continue
  if command -v compute-sanitizer >/dev/null; then
    # torch's own pool would hide what lies beyond an array.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run $tool 45 \
      compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
      python3 tests/gpu_small.py
  else
    note $tool "not run: compute-sanitizer is not on the PATH"
  fi
done

if wanted meetings; then
  if [[ -x $work/meetings ]]; then
    run meetings 60 bash -c '"$1" >"$2"' - "$work/meetings" "$out/$card-meetings.json"
  elif ((capability < 90)); then
    note meetings "not run: there are no clusters before compute capability 9.0"
  else
    note meetings "FAILED to compile: see logs/meetings-build.log"
    wrong=true
  fi
fi

if ((built == 0)) && wanted bench; then
  for suite in options full; do  # what options cost first, since the other fills the time
    budget=$(($(left) - 40))
    [[ $suite == full ]] || budget=60
    ((budget > 20)) || budget=20
    run "bench-$suite" $((budget + 40)) $fusedrnn bench --device cuda --suite $suite \
      --cells LSTM GRU --dtypes bfloat16 float32 --budget $budget \
      --json "$out/$card-$suite.json" --report "$out/$card-$suite.md"
    [[ ! -f $out/$card-$suite.md ]] || cat "$out/$card-$suite.md" >>"$work/tables"
  done
fi

echo
if [[ -s $work/tables ]]; then
  cat "$work/tables"
  echo
fi
printf '%s\n' "${table[@]}"
! $wrong
