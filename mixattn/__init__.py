"""Mixed prefill-chunk/decode paged attention in one launch, and a stall-free engine on top of it.

Names are loaded when they are first used: ``import mixattn`` imports neither torch nor the server's packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "attention": "mixattn.ops.attention",
    "append_kv": "mixattn.ops.kv_cache",
    "merge_states": "mixattn.ops.merge",
    "tree_mask": "mixattn.ops.tree_mask",
    "plan": "mixattn.ops.plan",
    "WorkPlan": "mixattn.ops.plan",
    "DevicePlan": "mixattn.ops.plan_cuda",
    "device_hardware": "mixattn.ops.attention",
    "Hardware": "mixattn.ops.plan",
    "backends": "mixattn.ops.backends",
    "LLM": "mixattn.engine.llm",
    "SamplingParams": "mixattn.types",
}

__all__ = [
    "LLM",
    "DevicePlan",
    "Hardware",
    "SamplingParams",
    "WorkPlan",
    "append_kv",
    "attention",
    "backends",
    "device_hardware",
    "merge_states",
    "plan",
    "tree_mask",
]

if TYPE_CHECKING:
    from mixattn.engine.llm import LLM
    from mixattn.ops.attention import attention, device_hardware
    from mixattn.ops.backends import backends
    from mixattn.ops.kv_cache import append_kv
    from mixattn.ops.merge import merge_states
    from mixattn.ops.plan import Hardware, WorkPlan, plan
    from mixattn.ops.plan_cuda import DevicePlan
    from mixattn.ops.tree_mask import tree_mask
    from mixattn.types import SamplingParams


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'mixattn' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
