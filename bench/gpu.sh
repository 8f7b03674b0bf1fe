#!/usr/bin/env bash
# All that is to be known of ChatTTS on a GPU, in one call of at most ten minutes: correctness first, then figures.
#
#     bench/gpu.sh [--dry] [RESULTS]
#
# For a bare machine with CUDA that has PyTorch, Triton and transformers of its own. What else is needed comes from
# wheels beside it (`bench/wheels.sh` fetches them where there is an index), or is there already. Each stage is a
# process with a time limit of its own; RESULTS/gpu.json has what was found so far after each, RESULTS/gpu.log what was
# said. A stage that fails or is slow costs only itself.
# With --dry it goes through all stages on a CPU, with tiny weights. STAGES="machine steps" does these alone.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda dry=()
if [[ "${1:-}" == --dry ]]; then
    device=cpu dry=(--dry)
    shift
fi
results=${1:-gpu-results}
python=${PYTHON:-python3}
export NUMBA_DISABLE_JIT=1 # upstream would compile for ten seconds, to replace a few characters
mkdir -p "$results"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

wheels=${WHEELS:-wheels}
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$parts/site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$parts/site${PYTHONPATH:+:$PYTHONPATH}"
fi

# Seconds for each, in their order of worth: with the kernels' 45 the sum is 545.
stages=(machine:35 correct:90 steps:80 burst:60 streams:50 night:45 upstream:85)
failed=0
if [[ $device == cuda ]]; then
    stages+=(upstream_compiled:55)
    # By themselves: what other tests share needs packages that are not here. `correct` decodes with all of them.
    timeout --kill-after=5 45 "$python" -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider -n 8 \
        tests/test_chattts_kernels.py -k "not decoded and not compile" >"$parts/kernels.log" 2>&1 || failed=1
    echo "kernels: $(tail -1 "$parts/kernels.log")"
    tail -40 "$parts/kernels.log" >>"$results/gpu.log"
fi
for each in "${stages[@]}"; do
    stage=${each%:*} limit=${each#*:}
    if [[ -n "${STAGES:-}" && " $STAGES " != *" $stage "* ]]; then
        continue
    fi
    timeout --kill-after=5 "$limit" "$python" -m bench.gpu "$stage" --folder "$parts" --device "$device" "${dry[@]}" \
        2>"$parts/log"
    status=$?
    if ((status)); then
        failed=1
        echo "$stage: failed ($status): $(tail -1 "$parts/log")"
    fi
    { echo "== $stage"; tail -40 "$parts/log"; } >>"$results/gpu.log"
    "$python" -m bench.gpu_report "$parts" >"$results/gpu.json"
done
echo "all of it: $results/gpu.json"
exit "$failed"
