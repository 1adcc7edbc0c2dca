"""Trainers in lock step: each as if it trained alone, but for their passes through the base, which they share.

Every Trainer runs in a greenlet. Where it would ask its model for outputs, or for gradients, it waits, and the next one runs on.
When all have come that far, one pass computes what they have asked for (`shared_pass.py`). All else is each Trainer's own: the
order of rows, the loss and its normalisation, clipping, optimizer, schedule, logs, checkpoints and random numbers.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from greenlet import getcurrent, greenlet
from torch import nn

from m2m_hf.modeling.devices import out_of_memory
from m2m_hf.scoring.probing import LEAST, MOST, MOST_EPS, SURE, changed_by, epsilon
from m2m_hf.training.shared_pass import (
    FILL,
    Layout,
    OwnDraws,
    Randomness,
    SharedAdapters,
    UnsharedError,
    apart,
    together,
)
from m2m_hf.training.trainers import BookkeepingTrainer

OUTPUTS, GRADIENTS, EVALUATION = "outputs", "gradients", "outputs without dropout"  # what a Trainer waits for
FLOPS = {"cpu": 5e10, "cuda": 1e14}  # in a second, about
LAYER_SECONDS = 1e-4  # that Python takes for one layer, forward and backward, however little it computes
LEAST_SHARED = 64  # tokens of arithmetic: if a pass costs less than this beside it, sharing gains nothing on a CPU


class AgainError(Exception):
    """Has a Trainer compute its batch again."""


class Member:
    """One Trainer of a group, in a greenlet of its own.

    Args:
        of: identifies the training.
        work: what the greenlet does, which is to train.
    """

    def __init__(self, of: str, trainer: BookkeepingTrainer, work: Callable[[], None]) -> None:
        self.of, self.trainer = of, trainer
        self.draws = Randomness(trainer.args.device)
        self.waits_for: str | None = None
        self.asked: Any = None
        self.seconds = 0.0
        self._greenlet, self._others = greenlet(lambda answer: work()), getcurrent()
        trainer.member = self
        trainer.recorder.clock = lambda: self.seconds
        trainer.accelerator.backward = self._backward
        trainer.accelerator.free_memory = lambda: (
            None
        )  # it visits all objects of the process; a group does when it ends

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def is_done(self) -> bool:
        return bool(self._greenlet.dead)

    def turn(self, answer: Any = None) -> float:
        """Lets the Trainer run on with an answer until it waits again, or is done; returns the seconds that it took."""
        start, self.waits_for = time.monotonic(), None
        computes = answer is not None  # its loss, of outputs, and then waits again
        self.draws.give(computes)
        self._greenlet.switch(answer)
        self.draws.take(computes)
        seconds = time.monotonic() - start
        self.seconds += seconds
        return seconds

    def average(self) -> None:
        """Averages the gradients over the processes, where an optimizer step follows."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1 and self.draws.accumulation["sync_gradients"]:
            gradients = [one.grad for one in self.trainer.trained if one.grad is not None]
            flat = accelerator.reduce(torch.cat([one.flatten() for one in gradients]), "mean")
            for one, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
                one.copy_(mean.view_as(one))

    def leave(self) -> None:
        """Ends the Trainer where it is."""
        self._greenlet.throw()

    def _wait(self, for_what: str, asked: Any) -> Any:
        """Called by the Trainer; whether it computes gradients is its own, too, and in which precision."""
        self.waits_for, self.asked = for_what, asked
        with torch.enable_grad(), torch.autocast(self.draws.device.type, enabled=False):
            answer = self._others.switch()
        self.asked = None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def shared(self, model: Any) -> "Shared":
        """The model, whose outputs come from a pass that others share."""
        return Shared(model, self)

    def compute(
        self, step: Callable[[Any, dict[str, Any]], torch.Tensor], model: Any, inputs: Mapping[str, Any]
    ) -> Any:
        """What `step`, a Trainer's `training_step`, gives when the passes are shared."""
        while True:
            try:
                return step(self.shared(model), dict(inputs))
            except AgainError:
                self.trainer.uncount(inputs)

    def _backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Stands for `Accelerator.backward`."""
        accelerator = self.trainer.accelerator
        loss = loss / accelerator.gradient_accumulation_steps
        self._wait(GRADIENTS, loss if accelerator.scaler is None else accelerator.scaler.scale(loss))


class Shared:
    """A Trainer's model, whose outputs come from a pass that others share."""

    def __init__(self, model: Any, member: Member) -> None:
        self._model, self._member = model, member

    def __call__(self, **inputs: Any) -> Any:
        return self._member._wait(OUTPUTS if self._model.training else EVALUATION, (inputs, torch.is_grad_enabled()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Group:
    """Members that train side by side.

    Args:
        rehearse: raises `UnsharedError` where a shared pass gives anything else than passes of each alone.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.adapters = SharedAdapters([member.trainer.model for member in members])
        for member, flat in zip(members, self.adapters.flat, strict=True):
            member.trainer.flat = flat
        first = members[0].trainer
        self.beside = tokens_beside(first.model, first.args.device.type)
        self.budget = math.inf  # tokens in one pass
        self._drops = True  # whether any layer draws random numbers

    def run(self, finished: Callable[[list[Member]], None]) -> None:
        """Trains all to their ends. `finished` is told who has ended, once the others have come as far."""
        before = Randomness(self.members[0].trainer.args.device)
        active, ended = list(self.members), []
        try:
            for member in active:
                member.turn()
            self._evaluate(active)
            while active:
                step = min(member.step for member in active)
                due = [member for member in active if member.step == step]
                for members in self._passes(due):
                    self._train(members)
                self._evaluate(due)
                ended += [member for member in active if member.is_done]
                active = [member for member in active if not member.is_done]
                if ended and all(member.step >= ended[-1].step for member in active):
                    finished(ended)
                    ended = []
        finally:
            for member in active:
                member.leave()
            before.give()

    def _evaluate(self, members: Sequence[Member]) -> None:
        """Computes outputs for those that evaluate, until none does."""
        while waiting := [member for member in members if member.waits_for == EVALUATION]:
            for some in self._passes(waiting):
                self._train(some)

    def _passes(self, members: Sequence[Member]) -> list[list[Member]]:
        """The members whose batches go into one pass each; with several processes all in one, or each in its own, in order."""
        sizes, limit = [size_of(member.asked[0]) for member in members], self.adapters.limit
        if PartialState().num_processes > 1:
            is_long = any(tokens > limit for _, tokens in sizes)
            return [[member] for member in members] if is_long else [list(members)]
        groups = cheapest(sizes, self.beside, self.budget, limit)
        return [[members[place] for place in group] for group in groups]

    def _train(self, members: list[Member]) -> None:
        """One batch of each member, forward and, in training, backward, and whatever its Trainer does then."""
        draws = [copy.copy(member.draws) for member in members]
        gradients = [None if one.grad is None else one.grad.clone() for one in self.adapters.others]
        if self._in_one_pass(members):
            return
        self.adapters.forget()
        for parameter, gradient in zip(self.adapters.others, gradients, strict=True):
            parameter.grad = gradient
        clear_device_cache(garbage_collection=True)
        for member, draw in zip(members, draws, strict=True):
            member.draws = copy.copy(draw)
            if member.waits_for == GRADIENTS:
                member.turn(AgainError())
                member.draws = draw
        self.budget = min(self.budget, sum(math.prod(size_of(member.asked[0])) for member in members) // 2)
        half = len(members) // 2
        self._train(members[:half])
        self._train(members[half:])

    def _in_one_pass(self, members: Sequence[Member]) -> bool:
        """Like `_train`; False where memory does not suffice for so many, and no Trainer has noticed."""
        clock = Clock(members)
        self.adapters.bind()
        try:
            (self._alone if len(members) == 1 else self._together)(members, clock)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or any(member.is_done for member in members):
                raise
            if len(members) == 1 or PartialState().num_processes > 1:
                members[0].turn(error)
            return False
        clock.share_out()
        for member in members:
            if member.waits_for == GRADIENTS:
                member.average()
                member.turn()
        return True

    def _alone(self, members: Sequence[Member], clock: "Clock") -> None:
        (member,) = members
        while (waits_for := member.waits_for) in (OUTPUTS, EVALUATION):
            inputs, with_gradient = member.asked
            member.draws.give()
            with torch.set_grad_enabled(with_gradient), member.trainer.accelerator.autocast():
                outputs = member.trainer.model(**inputs)
            member.draws.take()
            clock.excepted(member.turn(outputs))
            if waits_for == EVALUATION:
                return
        torch.autograd.backward(member.asked)
        self.adapters.flat[self.members.index(member)].take()

    def _together(self, members: Sequence[Member], clock: "Clock") -> None:
        places = [self.members.index(member) for member in members]
        batch, layout = together([member.asked[0] for member in members], self.adapters.taken)
        if members[0].waits_for == EVALUATION:
            autocast = members[0].trainer.accelerator.autocast()  # a model that is trained has it around its `forward`
            with self.adapters.mounted(places, layout) as model, torch.no_grad(), autocast:
                outputs = model(**batch)
            for number, member in enumerate(members):  # the Trainer may then visit its parameters
                clock.excepted(member.turn(apart(outputs, layout, number)))
            return
        with self.adapters.mounted(places, layout) as model, self._own_draws(layout, members):
            for forward in count():
                with torch.set_grad_enabled(members[0].asked[1]):
                    torch.default_generator.manual_seed(forward)  # see `OwnDraws`
                    outputs = model(**batch)
                for number, member in enumerate(members):
                    clock.excepted(member.turn(apart(outputs, layout, number)))
                if members[0].waits_for == GRADIENTS:
                    break
                batch, _ = together([one.asked[0] for one in members], self.adapters.taken)
            del outputs
            torch.autograd.backward([member.asked for member in members])
        self.adapters.share_out(places)

    def _own_draws(self, layout: Layout, members: Sequence[Member]) -> AbstractContextManager[Any]:
        return OwnDraws(layout, [member.draws for member in members]) if self._drops else nullcontext()

    def rehearse(self) -> None:
        """Compares a pass that all share with passes of single adapters, on their first rows, with random adapters.

        Raises:
            UnsharedError: they differ by more than rounding does.
        """
        if getattr(self.members[0].trainer, "aux_loss_enabled", False):
            raise UnsharedError("a part of its loss, router_aux_loss_coef, is of all rows of a pass")
        kept = [copy.copy(member.draws) for member in self.members]
        try:
            with self.adapters.random(), torch.no_grad():
                self._compare()
        except (TypeError, ValueError, IndexError) as error:
            raise UnsharedError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise UnsharedError("not even a first batch of each fits into memory") from error
            raise UnsharedError(str(error)) from error
        finally:
            for member, draws in zip(self.members, kept, strict=True):
                member.draws = draws

    def _compare(self) -> None:
        inputs, kept = [], [copy.copy(member.draws) for member in self.members]
        for number, member in enumerate(self.members):
            first = first_inputs(member.trainer, short=number == 0)
            inputs.append(
                {name: one[:, : self.adapters.limit - 1] if name in FILL else one for name, one in first.items()}
            )
        batch, layout = together(inputs, self.adapters.taken, spare=1)
        draws = OwnDraws(layout, [member.draws for member in self.members])
        torch.default_generator.manual_seed(0)
        with self.adapters.mounted(range(len(inputs)), layout) as model, draws:
            model.train()
            outputs = model(**batch)
        of_pass, calls = torch.get_rng_state(), draws.calls
        torch.default_generator.manual_seed(0)
        for _ in range(calls):
            torch.randint(2**62, ())
        if not torch.equal(of_pass, torch.get_rng_state()):
            raise UnsharedError("it draws random numbers otherwise than by dropout")
        self._drops = calls > 0
        for number in {0, len(inputs) - 1}:
            own = self.members[number].trainer.model.train()

            def alone(number: int = number, own: Any = own) -> Any:
                kept[number].give()
                return own(**inputs[number])

            expected, found = alone(), apart(outputs, layout, number)
            with changed_by(own, epsilon(own)):
                noise = gap(alone(), expected, inputs[number])
            allowed = min(max(LEAST, SURE * noise), max(MOST, MOST_EPS * epsilon(own)))
            if not (difference := gap(found, expected, inputs[number])) <= allowed:
                raise UnsharedError(f"a row's outputs differ by {difference:.2g} where rounding does by {noise:.2g}")


class Clock:
    """Time since it was made, to be shared out among members, but for their own turns."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members, self._start = members, time.monotonic()

    def excepted(self, seconds: float) -> None:
        self._start += seconds

    def share_out(self) -> None:
        for member in self._members:
            member.seconds += (time.monotonic() - self._start) / len(self._members)


def first_inputs(trainer: BookkeepingTrainer, short: bool) -> dict[str, Any]:
    """What a Trainer asks its model about its first batch, where it is `short` about one row less."""
    count = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    rows = [trainer.train_dataset[number] for number in range(max(1, count - short))]
    asked: dict[str, Any] = {}

    class AskedError(Exception):
        pass

    def ask(**inputs: Any) -> None:
        asked.update(inputs)
        raise AskedError

    with suppress(AskedError):
        trainer.compute_loss(ask, trainer._prepare_inputs(trainer.data_collator(rows)))
    return asked


def gap(found: Any, expected: Any, inputs: Mapping[str, Any]) -> float:
    """By how much outputs differ, as the root of the mean square of the one that differs most; padding aside."""
    mask, gaps = inputs.get("attention_mask"), [0.0]
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 0:
            mine, other = found[name].float(), value.float()
            if mask is not None and other.shape[:2] == mask.shape:
                mine, other = mine[mask > 0], other[mask > 0]
            gaps.append((mine - other).square().mean().sqrt().item())
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def size_of(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, tokens in each) of a batch; of images 1."""
    texts = inputs.get("input_ids")
    return (len(inputs["pixel_values"]), 1) if texts is None else (len(texts), texts.shape[1])


def tokens_beside(model: nn.Module, device: str) -> float:
    """How many tokens a model computes in the time that Python takes for a pass beside the arithmetic, about."""
    weights = {
        id(weight): weight.numel()
        for layer in model.modules()
        for weight in layer.parameters(recurse=False)
        if weight.ndim > 1
    }
    tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    numbers = sum(count for name, count in weights.items() if name not in tables)
    layers = sum(1 for layer in model.modules() if not any(True for _ in layer.children()))
    return layers * LAYER_SECONDS * FLOPS.get(device, FLOPS["cuda"]) / (6 * max(1, numbers))


def cheapest(
    sizes: Sequence[tuple[int, int]], beside: float, budget: float, limit: float = math.inf
) -> list[list[int]]:
    """Which batches, of (rows, tokens in each), share a pass, so that padding and passes together cost least.

    A pass costs as much as `beside` tokens beside its own. Where it has more than one batch it has at most `budget` tokens, and
    `limit` in a row.
    """
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place][1], place))
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for end in range(1, len(order) + 1):
        options = []
        for start in range(end):
            group = order[start:end]
            tokens = len(group) * max(sizes[place][0] for place in group) * max(sizes[place][1] for place in group)
            if len(group) == 1 or (tokens <= budget and sizes[group[-1]][1] <= limit):
                cost, groups = best[start]
                options.append((cost + tokens + beside, [*groups, sorted(group)]))
        best.append(min(options, key=lambda option: option[0]))
    return sorted(best[-1][1])
