"""How the work on an archive is shared out: what a user may say of it, and what follows for a machine or a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from anatomaly.errors import ConfigError, check


@dataclass(frozen=True)
class Plan:
    """What a user may say.

    Attributes:
        address: Of an existing cluster, or None for this machine.
        actors: Processes that judge; None takes one for each GPU, else two, or one for every four processors.
        readers: Processes that read, each with up to four decoders; None takes one for two that judge, and two for each
            that judges on a GPU.
        chunk: Rows of the list of images that make a partition of the table.
        batch_size: Images of a forward pass, and of what passes between two processes.
        device: "auto", "cpu" or "cuda".
        maps: Write maps.
    """

    address: str | None = None
    actors: int | None = None
    readers: int | None = None
    chunk: int = 256
    batch_size: int = 16
    device: str = "auto"
    maps: bool = False

    def __post_init__(self) -> None:
        for name, most in (("actors", 10_000), ("readers", 10_000), ("chunk", 65_536), ("batch_size", 10_000)):
            value = getattr(self, name)
            check(name, value, value is None or 1 <= value <= most, f"a whole number from 1 to {most:,}")


class Shares(NamedTuple):
    """What follows.

    Attributes:
        actors: Processes that judge.
        readers: Processes that read, each on one processor.
        threads: Processors of an actor.
        gpus: GPUs of an actor, 0 or 1.
    """

    actors: int
    readers: int
    threads: int
    gpus: int

    @property
    def processors(self) -> int:
        """All that are needed."""
        return self.actors * self.threads + self.readers


def share_out(plan: Plan, processors: int, gpus: int) -> Shares:
    """Share a machine or a cluster out.

    Args:
        plan: What the user says.
        processors: There are; on a machine of our own, readers may take turns with those that judge.
        gpus: There are.

    Raises:
        ConfigError: A cluster has fewer than are needed.
    """
    if gpus and plan.device != "cpu":
        actors = plan.actors or gpus
        shares = Shares(actors, plan.readers or 2 * actors, 1, 1)
    else:
        free = processors if plan.address is None else max(1, processors - (plan.readers or 1))
        actors = plan.actors or max(min(free, 2), free // 4)
        readers = plan.readers or max(1, actors // 2)
        if plan.address is not None:
            free = processors - readers
        shares = Shares(actors, readers, max(1, free // actors), 0)
    if shares.gpus * shares.actors > gpus:
        raise ConfigError(f"actors: got {shares.actors}, there are {gpus} GPUs. Give at most as many --actors.")
    if plan.address is not None and shares.processors > processors:
        raise ConfigError(
            f"actors: {shares.actors} and {shares.readers} readers take {shares.processors} processors, the cluster at "
            f"{plan.address} has {processors}. Give fewer --actors or --readers."
        )
    return shares
