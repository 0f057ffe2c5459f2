"""An engine from its configuration and a loaded model: sizes resolved, rooms connected."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from mixattn import env
from mixattn.config import EngineConfig, ModelConfig, SchedulerConfig
from mixattn.engine.core import EngineCore
from mixattn.engine.wall_driver import WallDriver
from mixattn.executor import kv_pool
from mixattn.executor.executor import LocalExecutor
from mixattn.executor.warmup import ServedModel, Warmed, warm_up
from mixattn.kv.page_pool import PagePool
from mixattn.models.loader import LoadedModel
from mixattn.models.tokenizer import Tokenizer
from mixattn.ops.backends import choose_backend
from mixattn.ops.kv_dtypes import check_kv_dtype_backend, kv_dtype_name
from mixattn.sched.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """A running engine and the sizes it settled on."""

    driver: WallDriver
    tokenizer: Tokenizer
    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    page_size: int
    num_pages: int


def build_engine(config: EngineConfig, loaded: LoadedModel) -> Engine:
    """An engine around ``loaded``, which several engines may share.

    Torch gets this process's threads (``env.num_threads``). On a GPU its kernels are compiled first.

    Raises:
        ValueError: a size is out of bounds, or the attention backend unknown; the message names it.
        NotImplementedError: the attention backend cannot run here, or not with the cache's dtype.
    """
    if torch.get_num_threads() != env.num_threads():
        torch.set_num_threads(env.num_threads())
    model_config, page_size = loaded.config, config.cache.page_size
    scheduler_config = replace(config.scheduler, max_model_len=_max_model_len(config, model_config))
    dtype, device = loaded.dtype, loaded.device
    kv_dtype = kv_pool.kv_dtype(config.cache.kv_cache_dtype, dtype)
    # These complain now rather than in the first step.
    backend = choose_backend(device.type, config.attention_backend)
    check_kv_dtype_backend(kv_dtype, "q", dtype, backend)
    num_pages = kv_pool.num_pages(
        config.cache,
        model_config,
        kv_dtype,
        scheduler_config.max_model_len,
        scheduler_config.max_num_seqs,
        kv_pool.free_memory_bytes(),
    )
    if device.type == "cuda":
        try:
            warm_up_engine(config, model_config, dtype, device)
        except NotImplementedError as error:  # torch or the reference serves what Triton cannot
            logger.warning("nothing is compiled ahead: %s", error)
    executor = LocalExecutor(
        loaded.model,
        model_config,
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=scheduler_config.max_model_len,
        kv_dtype=kv_dtype,
        device=device,
        is_recorded=backend == "cpu" and dtype == torch.float32,
    )
    core = EngineCore(Scheduler(scheduler_config, PagePool(num_pages, page_size)), config.seed)
    logger.info(
        "engine: %d threads, %s on %s, KV pool of %d pages of %d tokens in %s (%.0f MiB), context %d, budget %d tokens",
        torch.get_num_threads(),
        dtype,
        device,
        num_pages,
        page_size,
        kv_dtype_name(kv_dtype),
        num_pages * kv_pool.page_bytes(model_config, page_size, kv_dtype) / 2**20,
        scheduler_config.max_model_len,
        scheduler_config.max_num_batched_tokens,
    )
    return Engine(
        driver=WallDriver(core, executor, model_config.vocab_size),
        tokenizer=loaded.tokenizer,
        model_config=model_config,
        scheduler_config=scheduler_config,
        page_size=page_size,
        num_pages=num_pages,
    )


def warm_up_engine(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    target: tuple[int, int] | None = None,
) -> list[Warmed]:
    """``executor.warmup.warm_up`` for an engine of this configuration, each call in the log.

    Args:
        dtype: of the model. device, target: as for ``warm_up``.
    Raises: as ``warm_up``, and as ``build_engine`` for ``max_model_len``.
    """
    served = ServedModel(
        model_config,
        dtype,
        kv_pool.kv_dtype(config.cache.kv_cache_dtype, dtype),
        config.cache.page_size,
        _max_model_len(config, model_config),
        config.attention_backend,
    )
    warmed = warm_up(served, device, target)
    for one in warmed:
        logger.info("warm-up: %s, %s: %s", one.name, one.kernel, one.how)
    return warmed


def _max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """The context: the model's own, or less if configured so."""
    if config.max_model_len is None:
        return model_config.max_model_len
    if not 1 <= config.max_model_len <= model_config.max_model_len:
        raise ValueError(
            f"max_model_len must be in [1, {model_config.max_model_len}], the model's context, "
            f"got {config.max_model_len}"
        )
    return config.max_model_len
