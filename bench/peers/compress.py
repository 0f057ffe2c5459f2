"""compress.py FOLDER TARGET: OpenVINO's model with weights rounded to int8, asymmetric, one scale per channel."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nncf
import openvino

source, target = map(Path, sys.argv[1:])
shutil.copytree(source, target, ignore=shutil.ignore_patterns("openvino_model.*", ".made"), dirs_exist_ok=True)
model = openvino.Core().read_model(source / "openvino_model.xml")
model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
openvino.save_model(model, target / "openvino_model.xml", compress_to_fp16=False)
