"""The command `jdistill`: runs and multiruns through Hydra, and sub-commands that only read."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from jdistill.errors import RunError, UsageError
from jdistill.paths import cache_folder, conf_dir

HELP = """\
jdistill: which way of distilling and compressing this teacher into that student is best, and is the difference real?

  jdistill [KEY=VALUE ...]         one run: teacher (trained once, then kept), student, artifact, measurements
  jdistill -m [KEY=V1,V2 ...]      a multirun: every combination, a table and a figure at the end
  jdistill plan [KEY=V1,V2 ...]    list the jobs of a multirun and the groups that share a program; run nothing
  jdistill table SWEEP ...         the table of one or more sweep or run folders (jdistill table --help)
  jdistill ranks SWEEP ...         average ranks over seeds and a critical-difference diagram (jdistill ranks --help)
  jdistill status SWEEP            what of a sweep is done, failed, left (--watch: again and again)
  jdistill export RUN --to RUNTIME its student for stablehlo, onnx or litert, checked against JAX (jdistill export --help)
  jdistill latency RUN ...         runs and exported models, timed in turns in one process (jdistill latency --help)
  jdistill list WHAT               losses, models, teachers, data, compression, schemes, experiments, ... (one a line)
  jdistill check-loss NAME [K=V]   whether a loss, perhaps your own, does what every loss must (--all: each of them)

Overriding: a group takes the name of an option, a key takes a value.
  jdistill data=mnist student=mlp 'student.widths=[64]' loss=kd loss.temperature=4 loss.weight=0.9 task.weight=0.1
  jdistill -m loss=none,kd,hint loss.weight=0.5,1 'seed=range(0,5)'
  jdistill -m experiment=quickstart
  jdistill teacher=resnet32x4 student=resnet8x4 data=cifar100 optim=sgd optim@teacher.optim=sgd

Groups and keys (all of them: jdistill --cfg job):
{groups}
  seed, report=last|best_val|best_test, force=true (repeat a finished run), cache=FOLDER, fail_fast=true
  plugins=[my_module] or plugins=[path/to/my_losses.py]: options of your own, registered before anything is composed
  optim.lr optim.epochs optim.batch_size, teacher.optim.*, teacher.checkpoint=FOLDER, data.root=FOLDER ($JDISTILL_DATA)
  hydra.run.dir=FOLDER, hydra.sweep.dir=FOLDER

A run's folder is named after its config: the same command continues a stopped run, and shows a finished one.
Exit codes: 0 done, 1 a run failed, 2 the request is wrong, 130/143 interrupted (a checkpoint was written).
"""

SUBCOMMANDS = ("table", "ranks", "plan", "status", "export", "latency", "list", "check-loss")


def main(arguments: list[str] | None = None) -> None:
    """The entry point; exits with 0, 1 (a run failed), 2 (wrong request) or 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = dispatch(arguments)
    except UsageError as error:
        code = complain(error, 2)
    except RunError as error:
        code = complain(error, _interrupted_by() or 1)
    except KeyboardInterrupt:
        code = complain(RunError("interrupted"), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `| head` does
        code = 0
    except OSError as error:
        code = complain(RunError(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")), 1)
    except Exception as error:
        if os.environ.get("JDISTILL_DEBUG"):
            raise
        code = complain(RunError(f"{type(error).__name__}: {error} (JDISTILL_DEBUG=1 shows the traceback)"), 1)
    sys.exit(code)


def complain(error: Exception, code: int) -> int:
    """One line on standard error; returns `code`."""
    print(f"jdistill: error: {' '.join(str(error).split(' '))}", file=sys.stderr)
    return code


def dispatch(arguments: list[str]) -> int:
    """Does what the arguments say; returns the exit code."""
    first = arguments[0] if arguments else ""
    if first in ("--help", "-h", "help"):
        print(HELP.format(groups=_groups(arguments[1:])), end="")
        return 0
    if first == "--version":
        from importlib.metadata import version

        print(f"jdistill {version('jdistill')}")
        return 0
    if first == "plan":
        return hydra(["-m", *[a for a in arguments[1:] if a not in ("-m", "--multirun")], "hydra.launcher.plan=true"])
    if first in ("table", "ranks", "status", "export", "latency"):
        from jdistill import commands

        return getattr(commands, first)(arguments[1:])
    if first == "list":
        from jdistill.listing import list_command

        return list_command(arguments[1:])
    if first == "check-loss":
        from jdistill.checking import check_command

        return check_command(arguments[1:])
    if bad := next((a for a in arguments if a.startswith("=")), None):
        raise UsageError(f"'{bad}' names no key; write KEY=VALUE")
    if first and not first.startswith("-") and "=" not in first and not first.startswith("~"):
        from jdistill.errors import did_you_mean

        raise UsageError(f"unknown command '{first}'{did_you_mean(first, SUBCOMMANDS)} (jdistill --help shows all)")
    return hydra(arguments)


_stop: Any = None


def _interrupted_by() -> int | None:
    return 128 + _stop.received if _stop is not None and _stop.received else None


def hydra(arguments: list[str]) -> int:
    """A run or multirun."""
    global _stop
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, where they become one line
    import hydra as hydra_library
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from jdistill.environment import use_compilation_cache
    from jdistill.hydra_errors import explain
    from jdistill.plugins import load_plugins, named
    from jdistill.progress import StopSignal
    from jdistill.sweep.jobs import make_task, resolve_fingerprint, resolve_sweep

    load_plugins(named(arguments))
    _check_plugin()
    OmegaConf.register_new_resolver("jdistill.fingerprint", resolve_fingerprint, replace=True)
    OmegaConf.register_new_resolver("jdistill.sweep", resolve_sweep, replace=True)
    cache = next((a.partition("=")[2] for a in arguments if a.startswith("cache=")), "")
    use_compilation_cache(cache_folder(cache) / "compiled")
    _stop = StopSignal()
    inner = make_task(_stop)

    caught: list[Exception] = []

    def task(config: Any) -> float | None:
        if _is_multirun(arguments):
            return inner(config)
        try:  # Hydra would print lines of its own about an exception of a single run
            value = inner(config)
        except Exception as error:
            caught.append(error)
            return None
        _report_single()
        return value

    task.stop = _stop  # type: ignore[attr-defined]  # the launcher asks it, as it carries jobs out itself
    sys.argv = ["jdistill", *arguments]
    decorated = hydra_library.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")(task)
    try:
        decorated()
    except (UsageError, RunError):
        raise
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        raise UsageError("a group takes the name of an option, not null (jdistill --help names them)") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    if caught:
        raise caught[0]
    return 0


def _is_multirun(arguments: list[str]) -> bool:
    return any(a in ("-m", "--multirun") for a in arguments)


def _report_single() -> None:
    import json

    from hydra.core.hydra_config import HydraConfig

    from jdistill.sweep.jobs import describe

    folder = Path(HydraConfig.get().runtime.output_dir)
    print(describe(json.loads((folder / "result.json").read_text())))
    print(f"results in {os.path.relpath(folder)}")


def _check_plugin() -> None:
    if importlib.util.find_spec("hydra_plugins.jdistill_plugins") is None:
        raise RunError("the Hydra plug-in of jdistill is not installed; install jdistill again (pip install -e .)")


def _groups(arguments: list[str]) -> str:
    from jdistill.plugins import help_rows

    files = {p.stem for p in (conf_dir() / "experiment").glob("*.yaml")}
    rows = {
        "data": "digits mnist fashion_mnist cifar10 cifar100 breast_cancer synthetic synthetic_shop"
        " citeulike movielens amazon retailrocket interactions"
        " online_shoppers credit_default movielens_ratings retailrocket_behaviour icecat_price ctr"
        " icecat lambdarank wands ranking",
        "teacher, student": "mlp lenet resnet20 resnet8x4 resnet32x4 wrn_40_2 vgg8 mobilenetv2 ..."
        " bpr neumf lightgcn cdae sasrec gru4rec two_tower wide_mlp deepfm dcnv2 ltr_mlp (jdistill list models)",
        "loss": "none cross_entropy label_smoothing teacher_free kd logit_mse huber soft_mse teacher_bounded hard_label"
        " reverse_kl js skew_kl total_variation bce_soft dkd nkd dist mlkd wsld ctkd logit_std residual sum"
        " hint attention fsp ft ab nst vid ofd review simkd mgd kdsvd encoder_decoder"
        " sp cc rkd pkt irg crd cocord input_gradient jacobian gradient_attention"
        " bpr sampled_softmax pointwise_bce mse list_softmax list_mle pairwise_logistic margin_mse listwise_kd rank_distil"
        " rd cd rrd ir_rrd de de_rrd entity_hint ftd htd unkd bd",
        "scheme": "offline two_stage fine_tune multi_teacher assistant online joint self semi continual",
        "task": "classification binary click regression recommend next_item ranking",
        "compression": "none pipeline prune nm_prune movement_prune soft_threshold lottery structured int8 int4 qat binary"
        " ternary mixed_precision activations low_rank weight_sharing hash_embedding qr_embedding pq_embedding row_int8"
        " row_int4 embedding_rows embedding_dims",
        "parallel": "auto single data pmap members",
        "optim": "adam adamw sgd",
        "tracker": "jsonl tensorboard wandb mlflow",
        "experiment": " ".join(sorted(files)),
    }
    lines = [*rows.items(), *(("plug-in", row) for row in help_rows(arguments))]
    return "\n".join(f"  {group:17}{names}" for group, names in lines)
