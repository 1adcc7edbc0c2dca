"""Callbacks for training scripts of one's own: a target of ours, scored while any Trainer trains."""

import math
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import TargetConfig, check_name
from .data import load_all
from .errors import InputError
from .external import CallableScorer
from .merging import GatedStack
from .mixture import Failure
from .scoring import Scorer, make_scorer


class TargetScoreCallback(TrainerCallback):
    """Scores targets of ours during a training of yours, TRL's or transformers' own, whenever it evaluates.

    The scores are logged, and stand among the metrics of that evaluation as `eval_<target>`, higher is better. So
    `metric_for_best_model="eval_<target>"` with `greater_is_better=True` and `load_best_model_at_end` keeps the best checkpoint,
    and an `EarlyStoppingCallback` that is added after this one stops by it. A run without evaluation is scored at the end of
    every epoch. The training is left as it would be without it: same random numbers, same weights.

    ```python
    quiz = {"data": {"path": "json", "data_files": "quiz.jsonl"}, "scorer": "choice"}
    trainer.add_callback(TargetScoreCallback(trainer, {"quiz": quiz}))
    ```

    Args:
        trainer: whose model and tokenizer are scored with.
        targets: name -> what stands under `targets:` in a configuration (scorers `choice`, `classification`, `loss`,
            `generation`, and Python functions). Relative paths are relative to the working directory.
        tokens_per_batch: tokens in one forward pass (default: 1024 on a CPU, else 16384).
        allow_metric_code: load metrics of one's own, which runs the code in them.

    Raises:
        InputError: a target that cannot be read, or a scorer that needs more than a model.
    """

    def __init__(
        self,
        trainer: Trainer,
        targets: Mapping[str, Mapping[str, Any]],
        tokens_per_batch: int | None = None,
        allow_metric_code: bool = False,
    ) -> None:
        self._trainer = trainer
        tokenizer = trainer.processing_class
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise InputError(
                f"trainer: expected one with a tokenizer as its processing_class, got {type(tokenizer).__name__}"
            )
        parsed = {
            check_name(name, "target"): TargetConfig.parse(given, f"targets.{name}", Path.cwd())
            for name, given in targets.items()
        }
        for name, one in parsed.items():
            if one.kind in ("command", "lm_eval"):
                raise InputError(
                    f"targets.{name}.scorer: {one.kind} needs an adapter on the disk; expected another one"
                )
        _, _, loaded = load_all(
            {}, parsed, tokenizer, seed=trainer.args.seed, max_length=None, assistant_only_loss=False
        )
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise InputError("trainer: its model learns prompts, which are not part of the model that is scored")
        self._weights = {name: one.weight for name, one in parsed.items()}
        self._scorers: dict[str, Scorer] = {
            name: CallableScorer(one.config.scorer, one.rows, tokenizer)
            if one.config.kind == "callable"
            else make_scorer(
                one.config, one.rows, tokenizer, positions, allow_metric_code=allow_metric_code, where=f"targets.{name}"
            )
            for name, one in loaded.items()
        }
        self._tokens = tokens_per_batch or (1024 if trainer.args.device.type == "cpu" else 16384)

    @property
    def _model(self) -> Any:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def scores(self) -> dict[str, float]:
        """`eval_<target>` -> score of the model as it is now; with several targets their weighted mean too, as `eval_targets`.

        One that cannot be scored now is not a number, and why is a warning: the training goes on.
        """
        model, found = self._model, {}
        with undisturbed(model):
            stack = GatedStack(model, {})
            try:
                for name, scorer in self._scorers.items():
                    (score,) = scorer.score(stack, [{}], self._tokens)
                    if isinstance(score, Failure):
                        warnings.warn(f"targets.{name}: {score.reason}", RuntimeWarning, stacklevel=2)
                    found[f"eval_{name}"] = math.nan if isinstance(score, Failure) else score.value
            finally:
                stack.detach()
        if len(found) > 1:
            total = sum(self._weights.values())
            found["eval_targets"] = sum(self._weights[name] * found[f"eval_{name}"] for name in self._scorers) / total
        return found

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        found = self.scores()
        kwargs["metrics"].update(found)
        Trainer.log(self._trainer, dict(found))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == "no":
            Trainer.log(self._trainer, self.scores())


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Leaves mode, random numbers and gradients as they were."""
    training = {module: module.training for module in model.modules()}
    cache = getattr(model.config, "use_cache", None)
    states = random.getstate(), np.random.get_state()
    for layer in model.modules():
        if isinstance(
            layer, Linear4bit
        ):  # or inference would repack it, and no gradient pass through it (adapters.load_base)
            layer.support_avx512bf16_for_cpu = False
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = cache
            random.setstate(states[0])
            np.random.set_state(states[1])
