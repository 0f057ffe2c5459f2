"""requantise.py SOURCE.gguf TARGET.gguf FORM: llama.cpp's own conversion to f32, q8_0 or q4_0."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

source, target, form = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.nthread = 2
params.allow_requantize = True
params.ftype = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}[form]
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
