"""Full-parameter experts: what fine-tuning changed of every weight, kept in safetensors; and exact sums of several.

An expert is the difference δ = θ - θ0 of its fine-tuned weights from the base's (a task vector: Ilharco et al., 2212.04089).
A mixture's model has the weights θ0 + Σ w_i δ_i. Experts stay on the disk and are read one tensor at a time.
"""

import atexit
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from m2m_hf.errors import InputError

Part = slice | None  # rows of a tensor; None: all of it
DELTA_FILE = "delta.safetensors"
BLOCK = 1 << 20  # numbers of a tensor that are worked on at once
MAX_APART = 64  # of the largest changes of one weight, for one unit to serve all
BITS = 30  # of a sum: one less than there are, so that rounding cannot overflow


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight that training may change, once: parameters and the buffers that a checkpoint holds, under their first name."""
    kept = set(model.state_dict(keep_vars=True))
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def save_delta(
    folder: Path, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, Any]:
    """Writes what was changed as `delta.safetensors`; weights that are as they were are left out.

    The difference is taken in fp32. Of two fp32 numbers within a factor of two of each other it is exact (Sterbenz, 1974), as
    that of two bf16 numbers nearly always is, so that θ0 + δ is the fine-tuned weight again. Where a weight has changed its sign,
    or most of its size, it is so to the last digit that fp32 has of θ0. A smaller `dtype` loses more.

    Args:
        before: name -> weight of the base.
        after: the same names and shapes, fine-tuned.
        dtype: that it is written in.

    Returns:
        For `training.json`: parameters kept, and the share of the delta's norm that its dtype has lost.

    Raises:
        InputError: a change that is too large for the dtype.
    """
    kept: dict[str, torch.Tensor] = {}
    total = lost = 0.0
    for name, weight in before.items():
        delta = after[name].detach().to("cpu", torch.float32) - weight.detach().to("cpu", torch.float32)
        cast = delta.to(dtype).contiguous()
        if delta.isfinite().all() and not cast.isfinite().all():
            raise InputError(
                f"delta_dtype: {dtype} cannot hold what was learned of {name}; expected float32 or bfloat16"
            )
        total += float(delta.double().square().sum())
        lost += float((cast.double() - delta.double()).square().sum())
        if cast.any():
            kept[name] = cast
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / DELTA_FILE, metadata={"format": "pt"})
    parameters = sum(tensor.numel() for tensor in kept.values())
    return {"parameters": parameters, "lost": round(math.sqrt(lost / total), 9) if total else 0.0}


def blocks(shape: Sequence[int]) -> Iterator[Part]:
    """A tensor of this shape in parts of whole rows, so that of a large one no second copy is in memory."""
    numbers = math.prod(shape)
    if numbers <= BLOCK or not shape:
        yield None
        return
    rows = max(1, BLOCK * shape[0] // numbers)
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def read(path: Path, name: str, part: Part) -> torch.Tensor:
    """A tensor of a safetensors file, or rows of it; opened anew, or the file would stay in memory as far as it was read."""
    with safe_open(path, "pt") as file:
        found: torch.Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
    return found


class Delta:
    """A full-parameter expert on the disk.

    Args:
        folder: that holds `delta.safetensors`.

    Raises:
        InputError: no such file, or one that holds other things than numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / DELTA_FILE
        try:
            with safe_open(self.path, "pt") as file:
                # Of the file's order, since what is read in that order is read in one go.
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
                kinds = {file.get_slice(name).get_dtype() for name in self.shapes}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path}: expected the weights of a full-parameter expert ({error})") from error
        if others := kinds - {"F64", "F32", "F16", "BF16"}:
            raise InputError(f"{self.path}: expected floating-point numbers, got {', '.join(sorted(others))}")

    def delta(self, name: str, device: torch.device | str = "cpu", part: Part = None) -> torch.Tensor:
        """What was added to the weight `name`, or to rows of it, in fp32."""
        return read(self.path, name, part).to(device, torch.float32)


def largest_of(expert: Delta, name: str, shape: Sequence[int]) -> float:
    """The largest change of one weight.

    Raises:
        InputError: a number that is not finite.
    """
    found = 0.0
    for part in blocks(shape):
        largest = float(expert.delta(name, part=part).abs().max())
        if not math.isfinite(largest):
            raise InputError(f"{expert.path}: not all numbers of {name} are finite")
        found = max(found, largest)
    return found


def scratch_folder(folder: Path | None) -> tuple[Path, Callable[[], None]]:
    """A hidden folder for what need not be in memory, and what removes it; it is removed at the end of the process at the latest.

    Args:
        folder: where it is made (None: where temporary files go).
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".base-", dir=folder))

    def remove() -> None:
        atexit.unregister(remove)
        shutil.rmtree(place, ignore_errors=True)

    atexit.register(remove)
    return place, remove


class Shelf:
    """Tensors put aside on the disk, to be read one by one, until `close`.

    Args:
        tensors: by name.
        folder: in which a hidden folder is made for them (None: where temporary files go).
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path | None) -> None:
        place, self.close = scratch_folder(folder)
        # A file for each, since all in one would be in memory twice while it is written.
        self._paths = {name: place / f"{number}.safetensors" for number, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            save_file({name: tensor.detach().contiguous()}, self._paths[name])

    def read(self, name: str, part: Part = None) -> torch.Tensor:
        return read(self._paths[name], name, part)


class Sums:
    """Σ δ_i over a set of experts that changes by one or two at a time, for every weight; exact.

    Sums in floating point keep a trace of what was added and taken away before: the same mixture would have other weights when
    the search goes another way, and the error would grow with its length. These are of 32-bit integers, in a unit for every
    weight that no sum of all experts can overflow: a power of two, about 2^-30 of the largest sum possible. What is added can be
    taken away without a trace, so nothing accumulates, and the order plays no part. The unit is finer than fp32 is at that sum.
    What some experts change much more than others is added up anew each time, in fp32: one unit would be too coarse for these.

    Args:
        experts: by name; each reads its own tensors.
        changed: the weights of the model that any of them changes -> shape.
        folder: see `Shelf`. The sums are files there, of which one at a time is looked at: they are in memory as far as there is
            room.

    Raises:
        InputError: numbers that are not finite.
        OSError: no room for the sums.
    """

    def __init__(self, experts: Mapping[str, Delta], changed: Mapping[str, torch.Size], folder: Path | None) -> None:
        self._experts = experts
        self._units: dict[str, float] = {}
        self._shapes = changed
        self._place, self.close = scratch_folder(folder)
        self._members: frozenset[str] | None = frozenset()
        for number, name in enumerate(changed):
            largest = [largest_of(one, name, changed[name]) for one in experts.values() if name in one.shapes]
            if max(largest) > MAX_APART * min(largest):
                continue  # the unit of the largest would be too coarse for the others
            unit = max(2.0 ** (math.frexp(sum(largest))[1] - BITS), torch.finfo(torch.float32).tiny)
            self._units[name] = unit
            with open(self._place / str(number), "wb") as file:
                # Now, as a disk that is full when a mapped page is written ends the process without a word.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, 4 * changed[name].numel())
                else:
                    file.truncate(4 * changed[name].numel())

    def to(self, members: Collection[str], write: Callable[[str, Part, torch.Tensor], None]) -> None:
        """Goes to the sums over these experts, weight by weight and block by block.

        Args:
            write: is given every weight's name, which part of it, and the sum there in fp32.
        """
        wanted = frozenset(members)
        here = self._members
        added, dropped = wanted - (here or frozenset()), (here or frozenset()) - wanted
        anew = here is None or len(added) + len(dropped) > len(wanted)
        self._members = None  # until all is done: whoever interrupts this leaves some weights behind
        for number, (name, shape) in enumerate(self._shapes.items()):
            if name not in self._units:
                having = [self._experts[one] for one in sorted(wanted) if name in self._experts[one].shapes]
                for part in blocks(shape):
                    zero = torch.zeros(shape if part is None else (part.stop - part.start, *shape[1:]))
                    write(name, part, sum((one.delta(name, part=part) for one in having), zero))
                continue
            file = str(self._place / str(number))
            whole = torch.from_file(file, shared=True, size=shape.numel(), dtype=torch.int32).view(shape)
            for part in blocks(shape):
                total = whole if part is None else whole[part]
                if anew:
                    total.zero_()
                for one in sorted(wanted if anew else added):
                    self._add(total, one, name, part, 1)
                for one in () if anew else sorted(dropped):
                    self._add(total, one, name, part, -1)
                write(name, part, total.to(torch.float32).mul_(self._units[name]))
        self._members = wanted

    def _add(self, total: torch.Tensor, expert: str, name: str, part: Part, sign: int) -> None:
        if name in self._experts[expert].shapes:
            delta = self._experts[expert].delta(name, part=part)
            total.add_((delta / self._units[name]).round_().to(torch.int32), alpha=sign)
