#!/usr/bin/env bash
# All that is to be known of ChatTTS on a GPU, in one call of at most ten minutes: correctness first, then figures.
#
#     bench/gpu.sh [--dry] [RESULTS]
#
# For a bare machine with CUDA that has PyTorch, Triton and transformers of its own. What else is needed comes from
# wheels beside it (`bench/wheels.sh` fetches them where there is an index), or is there already. Each stage is a
# process with a time limit of its own and leaves RESULTS/STAGE.json; one that fails or is slow costs only itself.
# With --dry it goes through all stages on a CPU, with tiny weights.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda dry=()
if [[ "${1:-}" == --dry ]]; then
    device=cpu dry=(--dry)
    shift
fi
results=${1:-gpu-results}
python=${PYTHON:-python3}
mkdir -p "$results"

wheels=${WHEELS:-wheels}
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

# Seconds for each, in their order of worth: with the kernels' 60 the sum is below ten minutes.
stages=(machine:40 correct:100 steps:90 burst:75 streams:60 night:50 upstream:50)
if [[ $device == cuda ]]; then
    stages+=(upstream_compiled:70)
fi

failed=0
if [[ $device == cuda ]]; then
    # By themselves: what other tests share needs packages that are not here. `correct` decodes with all of them.
    timeout --kill-after=5 60 "$python" -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider \
        tests/test_chattts_kernels.py -k "not decoded" >"$results/kernels.log" 2>&1 || failed=1
    echo "kernels: $(tail -1 "$results/kernels.log")"
fi
for each in "${stages[@]}"; do
    stage=${each%:*} limit=${each#*:}
    timeout --kill-after=5 "$limit" "$python" -m bench.gpu "$stage" --folder "$results" --device "$device" "${dry[@]}" \
        2>"$results/$stage.log"
    status=$?
    if ((status)); then
        failed=1
        echo "$stage: failed ($status), see $results/$stage.log: $(tail -1 "$results/$stage.log")"
    fi
done
rm -rf "$results/checkpoint"
"$python" -m bench.gpu report --folder "$results" >"$results/gpu.json"
echo "all of it: $results/gpu.json"
exit "$failed"
