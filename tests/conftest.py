"""Shared by all tests: a compilation cache (compiling dominates), and a clean environment."""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

MAPS = Path("/proc/self/maps")
CACHE = Path(os.environ.get("JDISTILL_TEST_CACHE") or Path(tempfile.gettempdir()) / "jdistill-test-cache")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "compiled")  # before JAX is imported; subprocesses inherit it
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Most of the time goes into compiling programs that run for a moment. Of the 12 s that tests/losses/test_relations.py compiles
# unoptimised the last two flags leave 4. The last is gone from jaxlib 0.11, which ends a process over a flag unknown to it.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """After a test file compiled programs go where they take 20,000 memory maps, of the 65,530 that Linux allows a process.

    Where these cannot be counted they always go.
    """
    yield
    if "jax" in sys.modules and not (MAPS.exists() and MAPS.read_bytes().count(b"\n") <= 20_000):
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Teachers and downloads of a test stay in its own folder."""
    monkeypatch.setenv("JDISTILL_CACHE", str(tmp_path / "cache"))
