# Sourced by quickstart.sh and test.sh: a virtual environment with the pinned dependencies.
# Needs ROOT (the checkout); sets PYTHON and VENV.

VENV="${MLLM_VENV:-$ROOT/.venv}"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# The first interpreter that starts, is 3.11 or 3.12 and can make virtual environments.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" - 2>/dev/null <<'PY'
import sys
sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PY
        then
            PYTHON="$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed. On Debian or Ubuntu: sudo apt-get install python3 python3-venv;
       or name one: PYTHON=/path/to/python3.12 $0"
}

# DeepSpeed compiles a small op on its first use; say what is missing before an hour is lost.
need_compiler() {
    command -v "${CXX:-g++}" >/dev/null ||
        fail "DeepSpeed compiles a small op and needs a C++ compiler: sudo apt-get install g++"
    "$PYTHON" -c 'import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' ||
        fail "DeepSpeed compiles a small op and needs Python's headers: sudo apt-get install python3-dev"
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# The names of CUDA packages that pip would fetch for the ordinary torch; empty for a CPU build.
cuda_packages() {
    local report
    report="$(mktemp)"
    "$VENV/bin/python" -m pip install --quiet --dry-run --ignore-installed --report "$report" \
        -c "$ROOT/constraints.txt" torch >/dev/null || { rm -f "$report"; return 1; }
    "$VENV/bin/python" - "$report" <<'PY'
import json, sys
names = [i["metadata"]["name"] for i in json.load(open(sys.argv[1]))["install"]]
print(" ".join(n for n in names if n.startswith(("nvidia-", "cuda-")) or n == "triton"))
PY
    rm -f "$report"
}

# Whether torch is there in the version of constraints.txt, whatever its build (2.13.0+cpu).
has_torch() {
    "$VENV/bin/python" -c 'import sys, torch
sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' \
        "$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")" 2>/dev/null
}

install_torch() {
    if has_torch; then
        return
    fi
    if has_gpu || [ "${MLLM_TORCH:-}" = any ]; then
        "$VENV/bin/python" -m pip install -c "$ROOT/constraints.txt" torch
        return
    fi
    echo "No GPU here (nvidia-smi does not answer): installing the CPU build of torch."
    local cuda
    cuda="$(cuda_packages)" || cuda="unknown"
    if [ -z "$cuda" ]; then
        "$VENV/bin/python" -m pip install -c "$ROOT/constraints.txt" torch
        return
    fi
    "$VENV/bin/python" -m pip install --retries 1 --timeout 20 -c "$ROOT/constraints.txt" \
        --index-url https://download.pytorch.org/whl/cpu torch && return
    fail "the CPU build of torch could not be fetched from PyTorch's CPU index, and the ordinary
       torch would bring gigabytes of CUDA with it ($cuda).
       Try again, or accept that with: MLLM_TORCH=any $0"
}

# make_venv EXTRAS: make the environment if it is not the one of this pyproject and constraints.
make_venv() {
    local extras="$1" want stamp
    find_python
    need_compiler
    want="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | sha256sum | cut -c1-16)-$extras"
    stamp="$VENV/.mllm-$(printf '%s' "$extras" | tr ',' '-')"
    if [ -x "$VENV/bin/mllm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        return
    fi
    if [ ! -x "$VENV/bin/pip" ]; then
        echo "Making the virtual environment $VENV ..."
        "$PYTHON" -m venv "$VENV" ||
            fail "no virtual environment could be made: sudo apt-get install python3-venv"
    fi
    echo "Installing the pinned dependencies (a few minutes the first time) ..."
    "$VENV/bin/python" -m pip install --upgrade "pip>=24.1"
    install_torch
    "$VENV/bin/python" -m pip install -c "$ROOT/constraints.txt" -e "$ROOT[$extras]"
    printf '%s' "$want" >"$stamp"
}
