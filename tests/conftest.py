"""What all tests share: property tests that repeat themselves exactly and are not failed by a busy machine."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Triton looks once, when it is imported, which transformers does too: so it is set here, before any test module.
# TRITON_INTERPRET=0 in the environment runs the Triton tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "mixattn",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("mixattn")
