#!/bin/sh
# aarch64.sh DIR [ARGUMENTS OF PYTEST]: tests on an emulated aarch64 CPU, of what setup.py makes of the sources for one:
# cross-compiled, under qemu. DIR gets Debian's Python for aarch64, a torch, and a copy of the sources. On Debian.
set -eu
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift
host_python=${PYTHON:-python3}
root=$dir/root site=$dir/site tree=$dir/tree

command -v apt-get >/dev/null || { echo "aarch64.sh: apt-get is needed, for packages of Debian's arm64" >&2; exit 1; }
missing=
command -v aarch64-linux-gnu-g++ >/dev/null || missing="$missing g++-aarch64-linux-gnu"
command -v qemu-aarch64-static >/dev/null || missing="$missing qemu-user-static"
if [ -n "$missing" ]; then
  [ "$(id -u)" = 0 ] || { echo "aarch64.sh: please install:$missing" >&2; exit 1; }
  apt-get update -q && apt-get install -y -q --no-install-recommends $missing
fi

# Debian's packages, unpacked and not installed: apt keeps its lists of the other architecture in DIR.
if [ ! -e "$dir/root.ready" ]; then
  mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial" "$root"
  : > "$dir/apt/status"
  cat > "$dir/apt/conf" <<EOF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
Dir::State "$dir/apt";
Dir::State::status "$dir/apt/status";
Dir::Cache "$dir/apt";
EOF
  export APT_CONFIG="$dir/apt/conf"
  apt-get update -q
  apt-get install -y -q --download-only --no-install-recommends python3 libpython3-dev libgomp1 libstdc++6
  for package in "$dir"/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  unset APT_CONFIG
  touch "$dir/root.ready"
fi

# -cpu: a smaller CPU shows what dispatch.cpp leaves out; neoverse-n1 has neon, cortex-a72 only scalar.
run() {
  PYTHONPATH=$site qemu-aarch64-static -cpu "${QEMU_CPU:-max}" -L "$root" "$root/usr/bin/python3" "$@"
}
version=$(run -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# torch 2.10's wheel for aarch64 is for CPUs alone; that of the version in constraints.txt carries CUDA.
if [ ! -e "$dir/site.ready" ]; then
  grep -v '^torch==' constraints.txt > "$dir/constraints.txt"
  "$host_python" -m pip --disable-pip-version-check install -q -c "$dir/constraints.txt" \
    --target "$site" --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 torch==2.10.0 numpy sympy mpmath networkx jinja2 markupsafe filelock fsspec \
    typing_extensions setuptools pybind11 pytest pytest-timeout pluggy iniconfig packaging pygments hypothesis \
    sortedcontainers gguf pyyaml tqdm msgspec safetensors
  touch "$dir/site.ready"
fi

# In a copy: a build without CUDA kernels takes their images away. setup.py runs emulated, the compiler does not.
mkdir -p "$tree"
{ git ls-files -z; git ls-files -z --others --exclude-standard; } | xargs -0 cp -pu --parents -t "$tree"
ninja_dir=$("$host_python" -c 'import ninja; print(ninja.BIN_DIR)')
cd "$tree"
CXX=aarch64-linux-gnu-g++ CXXFLAGS="-I$root/usr/include/python$version -I$root/usr/include" MIXATTN_BUILD_CUDA=0 \
  PATH=$ninja_dir:$PATH run setup.py -q build_ext --inplace
[ $# = 0 ] || OMP_NUM_THREADS=1 MIXATTN_NUM_THREADS=1 run -m pytest "$@"
