"""How compiled steps are placed on devices: one device, or several. But for rounding nothing here changes a result."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdistill import distributed, train
from jdistill.applying import PRECISIONS
from jdistill.errors import UsageError
from jdistill.pytrees import require_one_of, require_positive
from jdistill.registry import register
from jdistill.train import Parts, Programs
from jdistill.types import Batch, PyTree

STRATEGIES = ("auto", "loop", "block")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all options of the group `parallel` share; by itself one device.

    Attributes:
      strategy: steps one by one (`loop`), many in one call (`block`), or whichever is faster there (`auto`).
      device_bytes: the largest training set, in bytes, that is kept on the device; a larger one is sent batch by batch.
      microbatches: equal parts of a batch that are computed one after the other, for one update from the mean of their
        gradients; the memory of activations is divided by it. It must divide `optim.batch_size`.
      precision: what the student's networks compute in while they train, `float32` or `bfloat16`.
      distributed: several processes, each with its devices: `[coordinator host:port, processes, this process]`, or `auto`
        (Slurm, TPU pods), or None.

    Raises:
      UsageError: a value that is none of these.
    """

    strategy: str = "auto"
    device_bytes: float = 4e9
    microbatches: int = 1
    precision: str = "float32"
    distributed: Any = None

    stacks: ClassVar[bool] = True
    """Whether populations can be trained in one program: not where a single run's step has all devices already."""

    def __post_init__(self) -> None:
        require_one_of(STRATEGIES, strategy=self.strategy)
        require_one_of(PRECISIONS, precision=self.precision)
        require_positive(device_bytes=self.device_bytes, microbatches=self.microbatches)
        if distributed.parse(self.distributed) is not None and not isinstance(self, Data):
            raise UsageError("distributed needs parallel=data (or auto), which spread one batch over the processes")

    @property
    def mesh(self) -> Mesh | None:
        """The devices a batch is spread over, or None for one."""
        return None

    @property
    def devices(self) -> int:
        """The number of devices that the members of a population are spread over."""
        return 1

    @property
    def alone(self) -> "Layout":
        """The layout for what one of several processes computes by itself, such as a teacher."""
        return self if jax.process_count() == 1 else Single(self.strategy, self.device_bytes)

    def check_batch(self, size: int, key: str = "optim.batch_size") -> None:
        """Raises `UsageError` where a batch of `size`, the value of `key`, cannot be divided as asked for."""
        _require_multiple(size, self.microbatches, key, f"parallel.microbatches={self.microbatches}")

    def programs(self, parts: Parts, members: int | None = None) -> Programs:
        """The compiled programs of `parts`, for one run, or for a population whose state has a leading axis of members."""
        return train.programs(parts, members is not None)

    def put(self, tree: PyTree, members: int | None = None) -> PyTree:
        """`tree` (of a population: with a leading axis of members) where the programs want it."""
        del members
        return tree

    def put_data(self, data: dict[str, Any]) -> Batch:
        """The training arrays [N, ...] on the device."""
        return {name: jnp.asarray(array) for name, array in data.items()}

    def get(self, tree: PyTree) -> PyTree:
        """`tree`, which programs gave, for computing outside of them: as it is, or this process's copy."""
        return tree

    def agreed(self, value: int) -> int:
        """The largest `value` of all processes: a number that clocks or signals decide must be the same in all of them."""
        return value

    def describe(self) -> dict[str, Any]:
        """What a run's record says about its devices."""
        mesh = self.mesh
        return {
            "devices": 1 if mesh is None else mesh.size,
            "processes": jax.process_count(),
            "precision": self.precision,
            "microbatches": self.microbatches,
        }


@register("parallel", "single")
@dataclasses.dataclass(frozen=True)
class Single(Layout):
    """One device."""


@dataclasses.dataclass(frozen=True)
class _Spread(Layout):
    """All devices, each with a share of every batch."""

    stacks: ClassVar[bool] = False

    @property
    def mesh(self) -> Mesh:
        return _mesh("data")

    def check_batch(self, size: int, key: str = "optim.batch_size") -> None:
        super().check_batch(size, key)
        _require_multiple(size, self.mesh.size * self.microbatches, key, _named(self))

    def put(self, tree: PyTree, members: int | None = None) -> PyTree:
        del members
        return distributed.put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def put_data(self, data: dict[str, Any]) -> Batch:
        return self.put(data)


@register("parallel", "data")
@dataclasses.dataclass(frozen=True)
class Data(_Spread):
    """All devices, each with a share of every batch: `jax.jit` over a mesh; state and data are copied to each device.

    The step is that of one device, which the compiler divides: BatchNorm, Dropout and losses act on the whole batch. A
    batch that the devices do not divide (the last of an epoch) is computed by each of them.
    """

    def programs(self, parts: Parts, members: int | None = None) -> Programs:
        return _on_mesh(parts._replace(mesh=self.mesh), members is not None, self.mesh, None)

    def get(self, tree: PyTree) -> PyTree:
        return distributed.local(tree)

    def agreed(self, value: int) -> int:
        return distributed.largest(value)


@register("parallel", "pmap")
@dataclasses.dataclass(frozen=True)
class Pmap(_Spread):
    """As `data`, by `jax.pmap`: every device runs the networks on its share, then the losses on all outputs.

    BatchNorm and Dropout of Flax Linen act on the whole batch; a layer of your own that draws random numbers draws the
    same ones on every device.
    """

    def programs(self, parts: Parts, members: int | None = None) -> Programs:
        return _by_pmap(parts._replace(axis="data"), members is not None, self.mesh.size)


@register("parallel", "members")
@dataclasses.dataclass(frozen=True)
class Members(Layout):
    """A population's members spread over all devices, each with all of its batches; a single run uses one device."""

    @property
    def devices(self) -> int:
        return len(jax.devices())

    def programs(self, parts: Parts, members: int | None = None) -> Programs:
        if members is None or members % self.devices:
            return super().programs(parts, members)
        return _on_mesh(parts, True, _mesh("members"), "members")

    def put(self, tree: PyTree, members: int | None = None) -> PyTree:
        if members is None or members % self.devices:
            return tree
        return distributed.put(tree, NamedSharding(_mesh("members"), PartitionSpec("members")))


@register("parallel", "auto")
@dataclasses.dataclass(frozen=True)
class Auto(Data):
    """What the devices suggest: one alone as `single`; of several as `members` for a population, as `data` for a run.

    A batch that the devices do not divide is not refused: each of them computes it.
    """

    stacks: ClassVar[bool] = True

    @property
    def devices(self) -> int:
        return len(jax.devices())

    def check_batch(self, size: int, key: str = "optim.batch_size") -> None:
        _require_multiple(size, self.microbatches, key, f"parallel.microbatches={self.microbatches}")

    def programs(self, parts: Parts, members: int | None = None) -> Programs:
        chosen = self._chosen(members)
        return super().programs(parts, members) if chosen is None else chosen.programs(parts, members)

    def put(self, tree: PyTree, members: int | None = None) -> PyTree:
        chosen = self._chosen(members)
        return super().put(tree, members) if chosen is None else chosen.put(tree, members)

    def put_data(self, data: dict[str, Any]) -> Batch:
        return super().put_data(data) if self.devices > 1 else Layout.put_data(self, data)

    def describe(self) -> dict[str, Any]:
        reason = "there is one device" if self.devices == 1 else f"there are {self.devices} devices"
        return {**super().describe(), "reason": reason}

    def _chosen(self, members: int | None) -> Layout | None:
        """Another layout, or None for this one's own base."""
        if self.devices == 1:
            return Single()
        return Members() if members is not None and members % self.devices == 0 else None


def _named(layout: Layout) -> str:
    micro = f" and parallel.microbatches={layout.microbatches}" if layout.microbatches > 1 else ""
    count = 1 if layout.mesh is None else layout.mesh.size
    return f"{count} devices{micro}"


def _require_multiple(size: int, of: int, key: str, named: str) -> None:
    if size % of:
        near = [n for n in (size // of * of, (size // of + 1) * of) if n]
        raise UsageError(f"{key} is {size}, which {named} do not divide; take {' or '.join(map(str, near))}")


def _mesh(axis: str) -> Mesh:
    """All devices; axes of type Auto, since Linen's Dropout refuses a mesh of explicit ones."""
    return Mesh(np.array(jax.devices()), (axis,))


@functools.lru_cache(maxsize=64)
def _on_mesh(parts: Parts, stacked: bool, mesh: Mesh, split: str | None) -> Programs:
    """`train.programs` with a place for every argument: members along the mesh's axis `split`, all else on every device."""
    whole, own = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (split,) if split else ()))
    frozen = {name: own if name == "initial" else whole for name, _ in parts.targets}
    frozen |= {"tables": whole} if parts.sampler is not None else {}
    made = train.programs(parts, stacked)
    single = (own, own, frozen, own, own, own, whole)
    block = (own, own, frozen, whole, own, whole, whole, own, own, whole)

    def placed(program: Any, places: tuple[Any, ...]) -> Any:
        return jax.jit(program, in_shardings=places, out_shardings=(own, own), donate_argnums=(0, 1))

    return Programs(placed(made.single, single), placed(made.block, block))


@functools.lru_cache(maxsize=64)
def _by_pmap(parts: Parts, stacked: bool, devices: int) -> Programs:
    """`train.programs` on every device at once; `parts.axis` makes each take its share of the batch."""
    made = train.programs(parts, stacked)

    def mapped(program: Any, arguments: int) -> Any:
        places = (0, *(None,) * arguments)  # pmap wants one argument to map: the number of the device, which is not read
        call = jax.pmap(
            lambda _, *given: program(*given), axis_name=parts.axis, in_axes=places, out_axes=None, donate_argnums=(1, 2)
        )
        return functools.partial(call, np.arange(devices))

    return Programs(mapped(made.single, 7), mapped(made.block, 10))


__all__ = ["STRATEGIES", "Auto", "Data", "Layout", "Members", "Pmap", "Single"]
