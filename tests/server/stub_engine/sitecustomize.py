"""Python imports this at its start when the folder is in PYTHONPATH: an engine whose model counts instead of thinking.

Without torch and weights a server is ready in a second. The scheduler, the processes and all between them are real.
"""

from __future__ import annotations

import sys
import time
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixattn.config import EngineConfig
    from mixattn.types import BatchPlan, StepResult

_MODEL_LEN = 2048
_STEP_S = 0.002


class CountingExecutor:
    """The token after the ninth is the tenth, and so on; a step takes a moment."""

    def execute(self, plan: BatchPlan) -> StepResult:
        from mixattn.types import StepResult

        time.sleep(_STEP_S)
        return StepResult({part.request_id: part.output_idx % 250 for part in plan.slices if part.is_sampled})


def build_engine(config: EngineConfig, loaded: Any) -> types.SimpleNamespace:
    from mixattn.engine.core import EngineCore
    from mixattn.engine.wall_driver import WallDriver
    from mixattn.kv.page_pool import PagePool
    from mixattn.models.tokenizer import byte_tokenizer
    from mixattn.sched.scheduler import Scheduler

    scheduler_config = replace(config.scheduler, max_model_len=_MODEL_LEN)
    num_pages = 64 * _MODEL_LEN // config.cache.page_size
    tokenizer = byte_tokenizer()
    core = EngineCore(Scheduler(scheduler_config, PagePool(num_pages, config.cache.page_size)))
    return types.SimpleNamespace(
        driver=WallDriver(core, CountingExecutor(), tokenizer.vocab_size),
        tokenizer=tokenizer,
        model_config=types.SimpleNamespace(vocab_size=tokenizer.vocab_size, eos_token_ids=frozenset()),
        scheduler_config=scheduler_config,
        page_size=config.cache.page_size,
        num_pages=num_pages,
    )


for name, functions in {
    "mixattn.engine.build": {"build_engine": build_engine},
    "mixattn.models.loader": {"load_model": lambda config: None},
}.items():
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    sys.modules[name] = module
