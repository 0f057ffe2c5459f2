"""Benchmarks in a process that is prepared as the engine's is, before they load torch."""

from mixattn import env

env.prepare_process()
