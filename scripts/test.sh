#!/usr/bin/env bash
# The tests: installs what they need, compiles DeepSpeed's op once, runs pytest in two processes with
# the arguments given (`-n 0`: in one). The environment is kept and reused until pyproject.toml or
# constraints.txt change.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
. "$ROOT/scripts/environment.sh"

make_venv dev
has_gpu || export DS_ACCELERATOR=cpu
export PATH="$VENV/bin:$PATH"
"$VENV/bin/python" -m scripts.quickstart.warm
exec "$VENV/bin/python" -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
