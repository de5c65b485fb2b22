#!/usr/bin/env bash
# On a machine with a GPU: what it has, the tests that need it, and the figures taken on it.
# Results go to benchmarks/results/ (or to $OUT when it is set); commit them with their date.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
"$PYTHON" - <<'PY'
import torch, transformers
from mllm.models.attention import available_backends, chosen_backend
print("torch", torch.__version__, "transformers", transformers.__version__)
print("attention back ends:", ", ".join(available_backends()), "- in use:", chosen_backend("cuda"))
PY
"$PYTHON" -m pytest -m gpu -q
