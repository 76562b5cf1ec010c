#!/bin/sh
# On a GPU machine with torch, Triton, numpy and pytest, from a checkout: the GPU tests, then the kernel benchmark.
#
#     benchmarks/gpu_session.sh FOLDER [SECONDS] [argument of benchmarks/kernels.py ...]
#
# FOLDER receives tests.log, tests.xml, kernels.log and kernels.json. SECONDS (default 540) bound the two together: the tests may
# take half, the benchmark starts no case after the rest. PYTHON names another interpreter than python3. The exit status is 0 when
# all tests passed and every kernel was right.
set -u
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
folder=$1; limit=${2:-540}; shift; [ $# -eq 0 ] || shift
case $limit in ''|*[!0-9]*) echo "gpu_session.sh: error: SECONDS is '$limit', not a whole number" >&2; exit 2;; esac
python=${PYTHON:-python3}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_session.sh: error: $python has no torch that sees a GPU; set PYTHON to one that has" >&2; exit 2; }
begin=$(date +%s)
echo "== tests/kernels and tests/gpu, at most $((limit / 2)) s"
timeout -k 10 $((limit / 2)) "$python" -m pytest tests/kernels tests/gpu -q --continue-on-collection-errors --junitxml "$folder/tests.xml" > "$folder/tests.log" 2>&1
tests=$?
tail -n 15 "$folder/tests.log"
rest=$((limit - $(date +%s) + begin - 20)) # a case that began may still end
[ $rest -gt 0 ] || rest=0
echo "== benchmarks/kernels.py, no case after $rest s"
timeout -k 10 $((rest + 60)) "$python" -u benchmarks/kernels.py --time-limit $rest --out "$folder/kernels.json" "$@" > "$folder/kernels.log" 2>&1
kernels=$?
tail -n 40 "$folder/kernels.log"
echo "== tests $tests, kernels $kernels (0 is good, 124 ran out of time), results in $folder"
[ $tests -eq 0 ] && [ $kernels -eq 0 ]
