"""What a number was measured with: versions, machine, commit, compile time, memory."""

import functools
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions, device and machine of this process, and the commit of jdistill where it runs from a checkout."""
    import jax

    device = jax.devices()[0]
    packages = ("jdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "hydra-core", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": device.platform,
        "device_kind": device.device_kind,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        **commit_of(Path(__file__).resolve().parents[1]),
    }


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


class CompileClock:
    """Seconds each thread of this process has spent tracing and compiling, from JAX's own events; nested ones count once.

    `compiled` counts programs, of all threads.
    """

    compiled = 0
    _own = threading.local()

    @classmethod
    def spent(cls) -> float:
        """Seconds of this thread so far."""
        return getattr(cls._own, "seconds", 0.0)

    @classmethod
    def _listen(cls, event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        end, seconds, spans = time.perf_counter(), cls.spent(), getattr(cls._own, "spans", [])
        while spans and spans[-1][0] >= end - duration_secs:
            seconds -= spans.pop()[1]  # it happened inside this one
        cls._own.spans = [*spans[-8:], (end - duration_secs, duration_secs)]
        cls._own.seconds = seconds + duration_secs
        cls.compiled += event.endswith("backend_compile_duration")

    @classmethod
    @functools.lru_cache(maxsize=1)
    def start(cls) -> None:
        """Begins to count; later calls do nothing."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(cls._listen)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs in `folder`, all of them: compiling costs more than training a small student."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit_of(root: Path) -> dict[str, Any]:
    """`commit`: the hash that the checkout `root` is at; `dirty`: whether its tracked files differ from it. None outside one.

    `results/` does not count: it is what commands write, no run depends on it, and the second of two commands would be dirty.
    """
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":(exclude)results")),
    }
