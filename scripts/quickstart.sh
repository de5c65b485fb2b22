#!/usr/bin/env bash
# From a fresh checkout to a trained multimodal model: environment, weights, data, three stages.
# Arguments go to `python -m scripts.quickstart` (--small, --fraction, --budget, --no-apt,
# --no-train). Safe to interrupt: typed again, it goes on where it was.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
. "$ROOT/scripts/environment.sh"

trap 'echo; echo "Interrupted. The same command goes on where it was: ./scripts/quickstart.sh"; exit 130' INT

# The [gpu] extra is not needed here: torch brings its own packed attention on CUDA.
make_venv quickstart
has_gpu || export DS_ACCELERATOR=cpu
export PATH="$VENV/bin:$PATH"
trap - INT
exec "$VENV/bin/python" -m scripts.quickstart "$@"
