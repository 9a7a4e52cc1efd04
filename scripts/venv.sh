# Sourced by the other scripts, from the repository's root: makes .venv if it is missing, and
# installs the project into it. Called as `install_project` or `install_project test,slow`. Does
# nothing if nothing changed.

fail() {
    echo "$*" >&2
    exit 1
}

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

install_project() {
    local extras="${1:-}" python what stamp
    if [ ! -x .venv/bin/python ]; then
        python="$(find_python)" || fail "Python 3.11 or newer is needed, and none was found."
        echo "making .venv" >&2
        "$python" -m venv .venv || fail "$python -m venv .venv failed. Is python3-venv installed?"
    fi
    what="$(cat pyproject.toml constraints.txt | cksum) [$extras]"
    stamp=".venv/installed-${extras//,/-}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$what" ]; then
        echo "installing into .venv${extras:+ (with $extras)}" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
            -e ".${extras:+[$extras]}" || fail "the installation failed."
        echo "$what" >"$stamp"
    fi
}
