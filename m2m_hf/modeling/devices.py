"""Processes and memory."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size


def out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what an error means, on any device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))


def is_sharded() -> bool:
    """Whether the launcher has training cut the model into pieces, one per process (FSDP, DeepSpeed)."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def broadcast(value: Any) -> Any:
    """What the main process has; all must ask."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value
