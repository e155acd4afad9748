"""A Hydra callback that forgets all compiled programs before each job: a code whose hyperparameters are constants."""

from typing import Any

from hydra.experimental.callback import Callback


class Recompile(Callback):
    """Each job traces and compiles anew, as each does where its numbers are written into the program."""

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        import jax

        from jdistill import train

        train.programs.cache_clear()
        train.forward.cache_clear()
        jax.clear_caches()
