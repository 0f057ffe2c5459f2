"""Drop-ins: other libraries' attention calls, by their own names, argument orders, defaults and layouts.

Each module is named after what it stands in for and imports nothing of it: ``flash_attn`` (FlashAttention-2),
``flash_attn_interface`` (FlashAttention-3), ``vllm``, ``flashinfer``; ``transformers`` registers ``mixattn`` as an
attention implementation. What each argument does here is listed in docs/compat.md.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("flash_attn", "flash_attn_interface", "flashinfer", "transformers", "vllm")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module 'mixattn.compat' has no attribute {name!r}")
    return importlib.import_module(f"mixattn.compat.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
