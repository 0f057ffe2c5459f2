"""The checkpoint of mixattn's ``smollm2`` in the forms that peers read; ``setup.sh`` runs each step where it can run.

The GGUF file's blocks are expanded to float32 by transformers, so that no weight differs from what mixattn reads.
OpenVINO's own GGUF reader is not used: it rounds the blocks' minima to whole steps.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def to_hugging_face(gguf: Path, folder: Path) -> None:
    """A folder in Hugging Face's layout, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    # transformers refuses to save a model that it believes to be quantised.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**{**fields, "dtype": "float32", "architectures": ["LlamaForCausalLM"]}))
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def to_openvino_int8(source: Path, folder: Path) -> None:
    """OpenVINO's model with 8-bit weights, asymmetric per output channel: what its exporter makes of ``int8``."""
    import nncf
    import openvino

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("openvino_model.*"), dirs_exist_ok=True)
    model = openvino.Core().read_model(source / "openvino_model.xml")
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(compressed, folder / "openvino_model.xml", compress_to_fp16=False)


def to_gguf(source: Path, target: Path, form: str) -> None:
    """llama.cpp's own quantisation of a GGUF file."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 2
    params.allow_requantize = True
    params.ftype = {
        "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }[form]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize to {form} returned {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", choices=["hf", "openvino-int8", "f32", "q8_0", "q4_0"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.form == "hf":
        to_hugging_face(args.source, args.target)
    elif args.form == "openvino-int8":
        to_openvino_int8(args.source, args.target)
    else:
        to_gguf(args.source, args.target, args.form)


if __name__ == "__main__":
    main()
