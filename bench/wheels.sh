#!/usr/bin/env bash
# Fetches what `bench/gpu.sh` needs on a bare CUDA machine that reaches no index: wheels beside its own PyTorch.
#
#     bench/wheels.sh [FOLDER] [PYTHON VERSION]
#
# Versions are those of constraints.txt. What has no wheel there is pure Python, and is built here.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-wheels} version=${2:-3.12}
python=${PYTHON:-python3}
names=(
    annotated-types chattts einx encodec frozendict googleapis-common-protos grpcio grpcio-status msgspec orjson protobuf
    pybase16384 pydantic pydantic-core pydantic-settings python-dotenv structlog typing-inspection vector-quantize-pytorch vocos
)
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

mkdir -p "$folder"
for name in "${names[@]}"; do
    pinned=$(grep -iE "^${name//-/[-_]}==" constraints.txt) || { echo "constraints.txt pins no $name"; exit 1; }
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        "${platforms[@]}" --dest "$folder" "$pinned" 2>/dev/null ||
        "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$pinned"
done
du -sh "$folder"
