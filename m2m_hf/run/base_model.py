"""The base model of a run: loaded once, lent to trainings and to one stack of experts at a time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trl import ModelConfig, SFTConfig

from m2m_hf.merging.dense_stack import Stack, open_stack
from m2m_hf.merging.expert import Expert
from m2m_hf.merging.methods import AVERAGE, MergeMethod
from m2m_hf.modeling.devices import is_sharded
from m2m_hf.modeling.heads import HeadPlan
from m2m_hf.modeling.loading import base_fingerprint, load_base
from m2m_hf.scoring.probing import fitting_tokens


class BaseModel:
    """Loads the base model when it is first needed.

    Args:
        plan: where a classifier's head comes from; None for a causal LM.
        prepare: completes the model once it is loaded.
        say: prints a line.
    """

    def __init__(
        self,
        args: SFTConfig,
        model_args: ModelConfig,
        plan: HeadPlan | None,
        prepare: Callable[[Any], None],
        say: Callable[[str], None],
    ) -> None:
        self._args, self._model_args, self._prepare, self._say = args, model_args, prepare, say
        self.plan = plan
        self._model: Any = None
        self._stack: Stack | None = None
        self._method = AVERAGE

    @cached_property
    def fingerprint(self) -> str:
        return base_fingerprint(self._model_args)

    def _load(self, to_train: bool = False) -> Any:
        self._say(f"loading {self._model_args.model_name_or_path} ({self._model_args.dtype})")
        return load_base(self._model_args, self._args, to_train, self.plan)

    @property
    def model(self) -> Any:
        """The model as it is now, perhaps with a stack on it."""
        if self._model is None:
            self._model = self._load()
            self._prepare(self._model)
        return self._model

    def plain(self) -> Any:
        """The model without a stack on it."""
        self.close_stack()
        return self.model

    def to_train(self) -> Any:
        """The model for a training: the plain one, or a copy of its own where the training shards it (FSDP, DeepSpeed)."""
        return self._load(to_train=True) if is_sharded() else self.plain()

    def load_other(self, folder: Path) -> Any:
        """Another model, loaded as the base model is."""
        other = replace(self._model_args, model_name_or_path=str(folder), model_revision="main")
        return load_base(other, self._args, plan=self.plan)

    def stack(self, experts: Callable[[], Mapping[str, Expert]], method: MergeMethod) -> Stack:
        """The experts on the model, ready to be merged by `method`; they are read only when no such stack is open."""
        wanted = AVERAGE if method.gated else method
        if self._stack is None or self._method != wanted:
            self._stack = open_stack(self.plain(), experts(), wanted)
            self._method = wanted
        return self._stack

    def close_stack(self) -> None:
        if self._stack is not None:
            self._stack.detach()
            self._stack = None

    def release(self) -> None:
        """Frees the memory; the next use loads the model again."""
        self.close_stack()
        self._model = None

    @cached_property
    def tokens_per_batch(self) -> int:
        """Tokens in one forward pass of scoring, measured once (collective)."""
        if self._stack is not None:
            self._stack.set({})
        return fitting_tokens(self.model)

    @property
    def batch_divisor(self) -> int:
        """By how much scoring had to divide the token budget to fit into memory; 1 where it never did."""
        return 1 if self._stack is None else self._stack.shrink
