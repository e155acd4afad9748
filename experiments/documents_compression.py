"""The documents' pipeline on CIFAR-10: distillation, pruning and quantization of a small network, alone and in every order.

Source: the source documents' comparison of distillation, pruning and quantization by accuracy, size and running time, for a
network of 10^8 and one of 10^7 parameters, of which no numbers are published. Here 10 : 1 too, at sizes that can be trained.

    python experiments/documents_compression.py [--seeds 3] [--methods plain,distilled]
    python experiments/documents_compression.py --full      with a GPU: ResNet-56 into ResNet-8, all images, 200 epochs

needs CIFAR-10 in $JDISTILL_DATA (or a network). Without --full: MLPs of 1,707,274 and 167,902 parameters, all 50,000 training
images, 10 epochs: a size that two CPU cores finish. Finished runs are kept in sweeps/ and not repeated.
"structure" removes neurons (channels) physically; "global" is one scale a layer, "local" one a channel. In the orders D is
distillation (10 epochs), P pruning of half of the weights, Q int8 weights with quantization-aware training; P and Q are trained
on for 5 epochs each, or by D where it follows; where D is not first, the network is trained on the labels before (10 epochs).
Expected and time: results/documents_compression/README.md.
"""

from itertools import permutations

from _common import (
    Method,
    add_choice,
    arguments,
    make,
    run_methods,
    teacher_accuracy,
    with_column,
    with_notes,
    write_tables,
)
from _records import write_records

from jdistill.report import scatter_figure

NAME = "documents_compression"
FULL = (
    "teacher=resnet56", "student=resnet8", "data.augment=[crop,flip]",
    "optim.epochs=200", "optim.batch_size=128", "teacher.optim.epochs=200", "teacher.optim.batch_size=128",
)  # fmt: skip
STEPS = {"D": "distill", "P": "{name: prune, sparsity: 0.5}", "Q": "qat"}


def sequence(*steps: str) -> tuple[str, str]:
    """The overrides of a sequence of steps."""
    return ("compression=pipeline", f"compression.steps=[{','.join(steps)}]")


METHODS = (
    Method("plain", ("loss=none",)),
    Method("distilled, teacher first", ()),
    Method("distilled, teacher jointly", ("scheme=joint",)),
    Method("half of the weights", ("compression=prune", "compression.sparsity=0.5")),
    Method("half of the structure", ("compression=structured", "compression.sparsity=0.5")),
    Method("int8, global", ("compression=int8", "compression.granularity=tensor")),
    Method("int8, local", ("compression=int8",)),
    Method("binary", ("compression=binary",)),
    *(Method("".join(order), sequence(*(STEPS[step] for step in order))) for order in permutations("DPQ")),
    Method("D, structure, Q", sequence("distill", "structured", "qat")),
)


def main() -> None:
    """Runs the sweeps and writes table, figure and records."""
    parser = arguments(NAME, __doc__, seeds=3)
    add_choice(parser, "--methods", (m.label for m in METHODS), always="plain", separator=";")
    parser.add_argument("--full", action="store_true", help="the size for a GPU")
    given = parser.parse_args()
    wanted = [method for method in METHODS if method.label in given.methods]
    if given.full:
        wanted = [Method(method.label, (*FULL, *method.overrides)) for method in wanted]
        given.sweeps, given.out = given.sweeps / "full", given.out / "full"
    frame = run_methods(NAME, wanted, given)
    shown = ("n", "metric", "difference", "p", "parameters", "nonzero", "bytes", "flops", "cpu_1", "cpu_256", "train_s")
    table = make(frame, columns=shown)
    table = with_column(table, "teacher (%)", teacher_accuracy(frame), "teacher", 100.0)
    write_tables(given.out, with_notes(table, "train (s): seconds of training and compression, without the frozen teacher's."))
    scatter_figure(frame, path=given.out / "accuracy_bytes.png", by="method")
    write_records(given.out, frame)


if __name__ == "__main__":
    main()
