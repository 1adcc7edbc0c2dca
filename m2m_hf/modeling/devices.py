"""Processes and memory."""

from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size

T = TypeVar("T")


def out_of_memory(error: BaseException | None) -> bool:
    """True if an error means that memory ran out, on any device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))


def is_sharded() -> bool:
    """True if the launcher makes training shard the model over the processes (FSDP, DeepSpeed)."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def broadcast(value: T) -> T:
    """Broadcasts the main process's value (collective)."""
    values = [value]
    if PartialState().num_processes > 1:
        broadcast_object_list(values)  # in place
    return values[0]
