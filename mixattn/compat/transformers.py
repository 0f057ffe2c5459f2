"""mixattn as an attention implementation of transformers: ``register()``, then ``attn_implementation="mixattn"``.

Serves ``forward``, ``generate`` and continuous batching (``generate_batch``), on every device that mixattn serves.
Masks are honoured or refused, never passed over.

Source: the contract of transformers 5.23, integrations/sdpa_attention.py and integrations/flash_attention.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching import continuous_api
from transformers.masking_utils import sdpa_mask

from mixattn.compat.arguments import Mask, accept_only, soft_cap_of, token_table
from mixattn.compat.kvcache import Rotary, kvcache_attention
from mixattn.compat.varlen import varlen_attention
from mixattn.ops.attention import attention, device_hardware
from mixattn.ops.plan import WorkPlan, plan

NAME = "mixattn"


def register() -> None:
    """Makes ``mixattn`` an attention implementation of transformers; to do so twice changes nothing.

    Continuous batching of transformers 5.23 has a closed list of implementations, so its manager is taught this one.
    """
    AttentionInterface.register(NAME, attention_forward)
    # Masks are those of sdpa: None where causality says it all, else [batch, 1, q_len, kv_len] of bool. Without a
    # function of its own, an implementation gets no mask at all, padding or not.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    manager = continuous_api.ContinuousBatchingManager
    switch = manager.switch_to_cb_friendly_attn
    if not hasattr(switch, "_knows_mixattn"):
        manager.switch_to_cb_friendly_attn = _keeping_mixattn(switch)


def _keeping_mixattn(switch: Any) -> Any:
    """The manager's choice of an implementation, which leaves models alone that have mixattn."""

    @functools.wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, auto_switch_to_flash: bool = True) -> None:
        if model.config._attn_implementation != NAME:
            switch(self, model, auto_switch_to_flash)

    switch_to_cb_friendly_attn._knows_mixattn = True  # type: ignore[attr-defined]
    return switch_to_cb_friendly_attn


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    cache: Any | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """out [batch, q_len, num_q_heads, head_dim], and None for the weights.

    Args:
        query: [batch, num_q_heads, q_len, head_dim]; key, value: [batch, num_kv_heads, kv_len, head_dim], cached ones
            included.
        attention_mask: None, or [batch, 1, q_len, kv_len]: bool, or 0 where a row sees a key and a dtype's minimum
            where not. Each sequence's rows must see one range of keys, causally and within ``sliding_window`` if so
            told: left padding and unused cache are, right padding under a causal mask is not.
        sliding_window: keys that a row sees, itself included.
        s_aux: [num_q_heads], a sink per head.
        cache: continuous batching's, which stores the new key and value, and knows where the old ones are;
            ``cu_seq_lens_q`` and ``cu_seq_lens_k`` then tell the sequences apart. The mask that transformers guesses
            from position ids is not read: it takes tokens of two requests that happen to count on for one sequence.
    Raises:
        NotImplementedError: naming an argument, or a mask, that mixattn cannot honour.
    """
    accept_only(NAME, 0.0, "leave dropout to training", dropout=dropout)
    accept_only(NAME, None, "the nearest is no bias", position_bias=position_bias)
    accept_only(NAME, False, "the nearest is attn_implementation='eager'", output_attentions=bool(output_attentions))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A window without causality has a right side too; masks tell of it, and are refused then.
    window_left = sliding_window - 1 if causal and sliding_window is not None else None
    mask, sinks = Mask(causal, window_left), None if s_aux is None else s_aux.float()
    if cache is not None or (cu_seq_lens_q is not None and attention_mask is None):
        if cache is not None:
            key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        out = _ragged(query, key, value, cu_seq_lens_q, mask, scaling, softcap, sinks, **kwargs)
        return out.unsqueeze(0), None
    if query.shape[0] != key.shape[0]:
        raise NotImplementedError(
            f"{NAME}: a query batch of {query.shape[0]} over a key batch of {key.shape[0]} is not supported; the "
            "nearest is to expand one"
        )
    batch, _, q_len, head_dim = query.shape
    rows = query.transpose(1, 2).reshape(batch * q_len, -1, head_dim)
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * q_len
    options = {
        "cu_seqlens_q": cu_seqlens_q,
        "softmax_scale": scaling,
        "causal": causal or q_len == 1,  # one row is the last, and sees all keys either way
        "window_left": window_left,
        "soft_cap": soft_cap_of(softcap),
        "sinks": sinks,
    }
    attend = _unmasked if attention_mask is None else functools.partial(_masked, attention_mask=attention_mask)
    return attend(rows, key, value, q_len=q_len, options=options).view(batch, q_len, -1, head_dim), None


def _unmasked(rows: Tensor, key: Tensor, value: Tensor, *, q_len: int, options: dict[str, Any]) -> Tensor:
    """Attention over all keys; each sequence's are a page."""
    batch, num_kv_heads, kv_len, head_dim = key.shape
    if options["causal"] and 1 < q_len < kv_len:
        kv_len = q_len  # the first rows in a static cache, whose other slots are empty: there would be a mask otherwise
    device = rows.device
    work_plan = None
    if not torch.compiler.is_compiling():
        work_plan = _uniform_plan(
            batch,
            q_len,
            kv_len,
            num_q_heads=rows.shape[1],
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            kv_element_bytes=key.element_size(),
            causal=options["causal"],
            window_left=options["window_left"],
            device=device,
        )
    out: Tensor = attention(
        rows,
        key.transpose(1, 2)[:, :kv_len],
        value.transpose(1, 2)[:, :kv_len],
        seq_lens=torch.full((batch,), kv_len, dtype=torch.int32, device=device),
        block_table=torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1),
        plan=work_plan,
        **options,
    )
    return out


@functools.lru_cache(maxsize=16)
def _uniform_plan(batch: int, q_len: int, kv_len: int, *, device: torch.device, **shape: Any) -> WorkPlan:
    """The plan of sequences of one length; remembered, as the layers of a model ask for the same."""
    starts = range(0, batch * q_len + 1, q_len)
    return plan(list(starts), [kv_len] * batch, hardware=device_hardware(device), **shape)


def _masked(
    rows: Tensor, key: Tensor, value: Tensor, *, q_len: int, options: dict[str, Any], attention_mask: Tensor
) -> Tensor:
    """Attention over the range of keys that the mask shows to each sequence; keys are read where they lie."""
    batch, _, kv_len, _ = key.shape
    visible = _visible(attention_mask, batch, q_len, kv_len)
    is_seen = visible.any(dim=1)  # [batch, kv_len]
    has_keys = is_seen.any(dim=1)
    begins = torch.where(has_keys, is_seen.int().argmax(dim=1), 0)
    ends = torch.where(has_keys, kv_len - is_seen.flip(1).int().argmax(dim=1), 0)
    _check_pattern(visible, begins, ends, options["causal"], options["window_left"])
    keys, values, step = _token_pages(key, value)
    starts = torch.arange(batch, device=key.device) * step + begins
    out: Tensor = attention(
        rows,
        keys,
        values,
        seq_lens=(ends - begins).int(),
        block_table=token_table(starts.int(), kv_len),
        **options,
    )
    return out


def _visible(attention_mask: Tensor, batch: int, q_len: int, kv_len: int) -> Tensor:
    """[batch, q_len, kv_len] bool: which keys each row sees."""
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        raise NotImplementedError(
            f"{NAME}: attention_mask {list(attention_mask.shape)} is not supported; the nearest is one for all heads, "
            f"[{batch}, 1, {q_len}, {kv_len}]"
        )
    visible = attention_mask.squeeze(1)
    if visible.dtype != torch.bool:
        is_hidden = visible <= torch.finfo(visible.dtype).min / 2
        _require(
            (is_hidden | (visible == 0)).all(),
            f"{NAME}: an attention_mask that biases scores is not supported; the nearest hides keys or shows them",
        )
        visible = ~is_hidden
    return visible.expand(batch, q_len, kv_len)


def _check_pattern(visible: Tensor, begins: Tensor, ends: Tensor, causal: bool, window_left: int | None) -> None:
    """Raises NotImplementedError unless the rows are the last of the keys [begin, end), and see them as told."""
    _, q_len, kv_len = visible.shape
    device = visible.device
    key = torch.arange(kv_len, device=device)
    position = ends.view(-1, 1, 1) - q_len + torch.arange(q_len, device=device).view(1, -1, 1)
    expected = (key >= begins.view(-1, 1, 1)) & (key < ends.view(-1, 1, 1))
    if causal:
        expected = expected & (key <= position)
    if window_left is not None:
        expected = expected & (key >= position - window_left)
    _require(
        (expected == visible).all(),
        f"{NAME}: this attention_mask is not supported; the nearest shows each sequence one range of keys, "
        f"{'causally' if causal else 'all rows alike'}, with a sliding window of "
        f"{'none' if window_left is None else window_left + 1}: pad prompts on the left, do not pack them",
    )


def _require(condition: Tensor, message: str) -> None:
    """Raises NotImplementedError with the message unless the condition, [] bool, holds; RuntimeError where compiled."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise NotImplementedError(message)


def _token_pages(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both [batch, num_heads, len, head_dim] as pages of one token, and how many pages on the next sequence begins.

    Token t of sequence b is page b * step + t. Where a sequence's heads lie apart, a page's heads do too: the pages
    interleave, and nothing is copied.
    """
    batch, num_heads, length, head_dim = key.shape
    batch_stride, head_stride, token_stride, element_stride = key.stride()
    is_regular = element_stride == 1 and token_stride > 0 and batch_stride % token_stride == 0
    if torch.compiler.is_compiling() or not is_regular or key.stride() != value.stride():
        shape = (batch * length, 1, num_heads, head_dim)
        return key.transpose(1, 2).reshape(shape), value.transpose(1, 2).reshape(shape), length
    step = batch_stride // token_stride if batch > 1 else 0
    size = ((batch - 1) * step + length, 1, num_heads, head_dim)
    strides = (token_stride, token_stride, head_stride, 1)
    return (
        key.as_strided(size, strides, key.storage_offset()),
        value.as_strided(size, strides, value.storage_offset()),
        step,
    )


def _ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor | None,
    mask: Mask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    cu_seq_lens_k: Tensor,
    max_length_k: int,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """out [total_q, num_q_heads, head_dim] of sequences that lie one after another in a batch of 1.

    With ``block_table`` each sequence has one new row, whose key and value are stored here.
    """
    assert cu_seq_lens_q is not None, "continuous batching passes cu_seq_lens_q"
    rows, keys, values = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if block_table is None or k_cache is None or v_cache is None:
        out, _lse = varlen_attention(
            NAME,
            rows,
            keys,
            values,
            cu_seqlens_q=cu_seq_lens_q.int(),
            cu_seqlens_k=cu_seq_lens_k.int(),
            seqused_k=None,
            max_seqlen_k=max_length_k,
            block_table=None,
            softmax_scale=scaling,
            mask=mask,
            softcap=softcap or 0.0,
            sinks=sinks,
        )
        return out
    out, _lse = kvcache_attention(
        NAME,
        rows.unsqueeze(1),
        k_cache,
        v_cache,
        keys.unsqueeze(1),
        values.unsqueeze(1),
        rotary=Rotary(None, None, False),
        cache_seqlens=cu_seq_lens_k.diff().int() - 1,
        cache_batch_idx=None,
        block_table=block_table,
        softmax_scale=scaling,
        mask=mask,
        softcap=softcap or 0.0,
        sinks=sinks,
    )
    return out.squeeze(1)
