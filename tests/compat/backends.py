"""Running drop-ins, whose signatures have no room for a backend, on each of them."""

from __future__ import annotations

import pytest

from mixattn.ops import attention, backends, kv_cache


def run_on_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes ``name`` the backend of every call that does not ask for one; skips where it is not available."""
    status = backends.backends()[name]
    if not status.is_available:
        pytest.skip(f"backend {name} is not available here: {status.detail}")
    for module in (attention, kv_cache):
        monkeypatch.setattr(
            module,
            "choose_backend",
            lambda device_type, requested, why_not: backends.choose_backend(device_type, requested or name, why_not),
        )
