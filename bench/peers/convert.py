"""convert.py FILE.gguf FOLDER: the file's values, exactly, as a Hugging Face checkpoint in float32."""

from __future__ import annotations

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, target = sys.argv[1:]
folder, name = os.path.split(os.path.abspath(source))
loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
# A model that was read from GGUF refuses to be saved: its values go into a plain one.
fields = {
    key: value for key, value in loaded.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")
}
model = LlamaForCausalLM(LlamaConfig(**fields))
model.load_state_dict(loaded.state_dict(), strict=False)
model.float().save_pretrained(target)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
