"""Settings of the Trainer that self-pruning cannot work with, refused when a trainer is made."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from fastgate.errors import Unsupported, format_error
from fastgate.pruning.trainer_compat import is_sharded

WHERE = "SelfPruningTrainer"


def refuse_settings(trainer: Trainer) -> None:
    """Raises Unsupported for settings under which no process has one whole model, or the number of steps is
    not known from the start."""
    args: Any = trainer.args
    if args.world_size > 1:
        _refuse_distributed_settings(args)
    for name, is_set, remedy in (
        ("args.n_gpu", args.n_gpu > 1, "give each process one GPU: torchrun or accelerate launch"),
        ("args.auto_find_batch_size", args.auto_find_batch_size, "set the batch size"),
        ("args.deepspeed, args.fsdp", is_sharded(trainer), "train on one device or with torchrun (DDP)"),
    ):
        if is_set:
            wanted = "one whole model a process and a number of steps known from the start"
            raise Unsupported(format_error(WHERE, name, "set", wanted, remedy))


def _refuse_distributed_settings(args: Any) -> None:
    # transformers has renamed gradient checkpointing.
    kind = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    checkpointing = getattr(args, f"{kind}_checkpointing")
    settings = getattr(args, f"{kind}_checkpointing_kwargs") or {}
    unused = args.ddp_find_unused_parameters
    for name, is_set, got, wanted, remedy in (
        (
            "args.ddp_find_unused_parameters",
            unused is False,
            unused,
            "None or True: a skipped attention has no gradient",
            "leave it out",
        ),
        (
            "args.ddp_static_graph",
            args.ddp_static_graph,
            args.ddp_static_graph,
            "None or False: which attention runs changes from step to step",
            "leave it out",
        ),
        (
            f"args.{kind}_checkpointing_kwargs",
            checkpointing and settings.get("use_reentrant", False),
            "use_reentrant=True",
            "checkpointing that is not reentrant: DistributedDataParallel looks for unused parameters",
            'pass {"use_reentrant": False}',
        ),
    ):
        if is_set:
            raise Unsupported(format_error(WHERE, name, got, wanted, remedy))
