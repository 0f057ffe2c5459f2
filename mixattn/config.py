"""Frozen configuration objects, checked when they are made.

Nothing here reads the environment (see ``env.py``) or imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


QUANTIZATIONS = ("none", "auto", "int8", "int4")
"""How the matrices of a float32 model on the CPU are held, see ``EngineConfig.quantization``."""
ACTIVATION_DTYPES = ("float32", "int8")
"""What they are multiplied with, see ``EngineConfig.activation_dtype``."""


class PolicyName(str, Enum):
    """How a step is filled; each is a pure function in ``sched/policy.py``."""

    SARATHI = "sarathi"
    """Every running decode, then prompt chunks up to the token budget (arXiv:2403.02310, algorithm 3)."""
    TIME_BUDGET = "time_budget"
    """The same, and a chunk is no longer than the time allows that a step with decodes may take."""
    PREFILL_FIRST = "prefill_first"
    """Whole waiting prompts in a step of their own, decodes stall meanwhile (vLLM before chunked prefill)."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. Source: arXiv:2104.09864; the llama3 frequency scaling of Llama 3.1.

    Args:
        theta: base of the frequencies.
        rotary_dim: leading dimensions of a head that are rotated; even, at most head_dim.
        interleaved: True pairs (0, 1), (2, 3), ...; False (neox) pairs (i, i + rotary_dim / 2).
        frequency_factors: one divisor per rotated pair, or None (llama3, linear and GGUF ``rope_freqs`` all reduce
            to this).
        attention_factor: multiplies cos and sin (yarn's mscale); 1 when off.
    """

    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    frequency_factors: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _require(self.theta > 0, f"rope theta must be > 0, got {self.theta}")
        _require(
            self.rotary_dim >= 0 and self.rotary_dim % 2 == 0,
            f"rotary_dim must be even and >= 0, got {self.rotary_dim}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder, whatever file it came from."""

    architecture: str
    """``llama`` (also Mistral), ``qwen2`` or ``qwen3``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    """The longest context, in tokens, prompt and output together."""
    rms_norm_eps: float
    rope: RopeConfig
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_qk_norm: bool = False
    window_left: tuple[int | None, ...] = ()
    """One entry per layer: keys to the left that a row may see besides itself, or None for all."""
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads"):
            _require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")
        _require(self.max_model_len > 0, f"max_model_len must be > 0, got {self.max_model_len}")
        _require(
            self.num_q_heads % self.num_kv_heads == 0,
            f"num_q_heads ({self.num_q_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        if not self.window_left:
            object.__setattr__(self, "window_left", (None,) * self.num_layers)
        _require(
            len(self.window_left) == self.num_layers,
            f"window_left needs one entry per layer ({self.num_layers}), got {len(self.window_left)}",
        )

    def kv_bytes_per_token(self, row_bytes: int) -> int:
        """Bytes of K and V that one token takes over all layers, when a row of one head takes ``row_bytes``."""
        return 2 * self.num_layers * self.num_kv_heads * row_bytes


KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "fp8_e4m3", "fp8_e5m2", "int4")
"""What K and V may be stored as; ``auto`` is the dtype of the model."""


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV pool."""

    page_size: int = 16
    """Tokens per page."""
    num_pages: int | None = None
    """Pages in the pool; None sizes it from ``kv_cache_memory_bytes``."""
    kv_cache_memory_bytes: int | None = None
    """Memory for K and V over all layers; None takes a share of what is free."""
    kv_cache_dtype: str = "auto"
    """One of ``KV_CACHE_DTYPES``. int8, fp8 and int4 come with a scale per token and head."""

    def __post_init__(self) -> None:
        _require(self.page_size >= 1, f"page_size must be >= 1, got {self.page_size}")
        _require(self.num_pages is None or self.num_pages >= 1, f"num_pages must be >= 1, got {self.num_pages}")
        _require(
            self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes > 0,
            f"kv_cache_memory_bytes must be > 0, got {self.kv_cache_memory_bytes}",
        )
        _require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}",
        )


@dataclass(frozen=True)
class SchedulerConfig:
    """What a step may hold."""

    max_num_batched_tokens: int = 256
    """The token budget: query rows of one step, decodes and chunks together."""
    max_num_seqs: int = 64
    """Requests that may be running at once."""
    max_num_queued_reqs: int = 1024
    """Requests that may wait; one more is refused."""
    max_model_len: int = 2048
    policy: PolicyName = PolicyName.SARATHI
    tbt_slo_ms: float | None = None
    """``TIME_BUDGET``: milliseconds that a decode may wait for its next token, as far as chunks have a say in it."""
    max_slowdown: float | None = None
    """``TIME_BUDGET``: how many times as long as its decodes alone a step may take. The lower of both limits counts."""

    @staticmethod
    def policy_for(is_chunked: bool, tbt_slo_ms: float | None, max_slowdown: float | None) -> PolicyName:
        """The policy that is meant by whoever names no policy."""
        if not is_chunked:
            return PolicyName.PREFILL_FIRST
        return PolicyName.SARATHI if tbt_slo_ms is None and max_slowdown is None else PolicyName.TIME_BUDGET

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_num_queued_reqs", "max_model_len"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be >= max_num_seqs ({self.max_num_seqs}): "
            "every running decode needs a token of every step",
        )
        _require(self.tbt_slo_ms is None or self.tbt_slo_ms > 0, f"tbt_slo_ms must be > 0, got {self.tbt_slo_ms}")
        _require(
            self.max_slowdown is None or self.max_slowdown > 1, f"max_slowdown must be > 1, got {self.max_slowdown}"
        )
        has_limit = self.tbt_slo_ms is not None or self.max_slowdown is not None
        _require(
            has_limit == (self.policy is PolicyName.TIME_BUDGET),
            "tbt_slo_ms or max_slowdown go with policy time_budget, and one of them must; "
            f"policy is {self.policy.value}",
        )


@dataclass(frozen=True)
class EngineConfig:
    """All that an engine needs besides the weights."""

    model: str
    dtype: str = "auto"
    """``auto``, ``float32``, ``bfloat16`` or ``float16``: weights and activations, and K and V by default."""
    seed: int = 0
    max_model_len: int | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    attention_backend: str | None = None
    """None lets ``ops.backends`` choose."""
    load_format: str = "auto"
    """``auto``, ``safetensors``, ``gguf`` or ``dummy`` (random weights)."""
    chat_template: str | None = None
    quantization: str = "auto"
    """``auto``: matrices as the checkpoint stores them, blocks of GGUF included; nothing is lost. ``none``: float32.
    ``int8``, ``int4``: rounded to 8 or 4 bits in groups of 32 when they are loaded; int4 keeps 8 bits for the
    vocabulary. Arithmetic is in float32 with all of them, unless ``activation_dtype`` says otherwise."""
    activation_dtype: str = "float32"
    """``int8``: what is multiplied with a quantised matrix is rounded to int8, each 32 elements with a scale of their
    own, and products are summed in integers (CPU, float32; matrices in float32, bfloat16 and float16 stay exact).
    Beside K and V in bfloat16 or int8 attention rounds, too (``ops.attention``'s ``rounds_q``)."""

    def __post_init__(self) -> None:
        _require(
            self.quantization in QUANTIZATIONS,
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}",
        )
        _require(
            self.activation_dtype in ACTIVATION_DTYPES,
            f"activation_dtype must be one of {', '.join(ACTIVATION_DTYPES)}, got {self.activation_dtype!r}",
        )
        _require(
            self.dtype in ("auto", "float32", "bfloat16", "float16"),
            f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}",
        )
        _require(
            self.load_format in ("auto", "safetensors", "gguf", "dummy"),
            f"load_format must be auto, safetensors, gguf or dummy, got {self.load_format!r}",
        )


@dataclass(frozen=True)
class ServerConfig:
    """How a server is reached, by whom, and what it lets in."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    served_model_names: tuple[str, ...] = ()
    """What clients may call the model, the first being the name in answers; empty is ``EngineConfig.model``."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens; none leaves the server open to whoever reaches it."""
    max_request_bytes: int = 8 * 2**20
    shutdown_timeout_s: float = 10.0
    """How long running requests may go on once the server is told to stop."""
    has_vllm_metrics: bool = True
    """Export metrics under vLLM's names too."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"port must be in [0, 65535], got {self.port}")
        _require(all(self.api_keys), "api_keys must hold non-empty strings")
        _require(all(self.served_model_names), "served_model_names must hold non-empty strings")
        _require(self.max_request_bytes >= 1, f"max_request_bytes must be >= 1, got {self.max_request_bytes}")
        _require(self.shutdown_timeout_s >= 0, f"shutdown_timeout_s must be >= 0, got {self.shutdown_timeout_s}")
