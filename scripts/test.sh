#!/usr/bin/env bash
# The one command for a change: format, lint, types, floors and tests. `--slow` runs the slow tests
# too. Makes .venv if it is missing.

cd "$(dirname "$0")/.." || exit 1
. scripts/venv.sh

extras=test
select="not slow and not gpu"
case "${1:-}" in
    "") ;;
    --slow) extras=test,slow,examples select="not gpu" ;;
    *) fail "usage: bash scripts/test.sh [--slow]" ;;
esac
install_project "$extras"

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
status=0
run() {
    echo "+ $*" >&2
    "$@" || status=1
}
run .venv/bin/ruff format --check .
run .venv/bin/ruff check .
run .venv/bin/mypy
run .venv/bin/python scripts/house.py
run .venv/bin/pytest -q -n 2 --dist loadfile -m "$select"
exit "$status"
