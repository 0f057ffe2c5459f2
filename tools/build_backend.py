"""setuptools' build backend, which with MIXATTN_BUILD_CUDA=1 also asks for nvcc, from packages, where there is none.

pip builds wheels in an environment of its own, which sees nothing that is installed beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that stay setuptools')

sys.path.insert(0, str(Path(__file__).resolve().parent))

import nvcc


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel is built with besides pyproject.toml's."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable install is built with besides pyproject.toml's."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def _compiler() -> tuple[str, ...]:
    is_wanted = os.environ.get("MIXATTN_BUILD_CUDA") == "1"
    return nvcc.PACKAGES if is_wanted and nvcc.find_nvcc() is None else ()
