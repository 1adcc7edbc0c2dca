"""Callbacks for your own training scripts: score targets, or whole mixtures, while any Trainer trains."""

import copy
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from scipy.stats import kendalltau
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from m2m_hf.config.checks import check_name
from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.console import Terminal
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure
from m2m_hf.core.space import SearchSpace
from m2m_hf.data.causal_lm import load_causal_lm_data
from m2m_hf.data.classification import ClassificationReader, Length
from m2m_hf.data.rows import Target
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter, refuse_unless_averageable
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.heads import SUFFIX, Head, plan_own
from m2m_hf.modeling.inspection import positions
from m2m_hf.modeling.processing import image_mode, patches
from m2m_hf.scoring.make import make_scorer
from m2m_hf.scoring.probing import fitting_tokens, settle
from m2m_hf.scoring.scorers import Setup
from m2m_hf.storage.files import read_json_or_empty


class LiveTargets:
    """Targets that are scored with the model a Trainer is training; the callbacks describe the arguments."""

    def __init__(
        self,
        trainer: Trainer,
        targets: Mapping[str, Mapping[str, Any]],
        tokens_per_batch: int | None,
        allow_metric_code: bool,
    ) -> None:
        self.trainer = trainer
        suffix = next((end for end in SUFFIX.values() if type(self.base).__name__.endswith(end)), None)
        images = suffix == SUFFIX["image_classification"]
        self.processing: Any = trainer.processing_class
        expected = transformers.BaseImageProcessor if images else transformers.PreTrainedTokenizerBase
        if not isinstance(self.processing, expected):
            raise InputError(
                f"trainer: expected one with {'an image processor' if images else 'a tokenizer'} as its processing_class, got "
                f"{type(self.processing).__name__}"
            )
        parsed = {
            check_name(name, "target"): TargetConfig.parse(fields, f"targets.{name}", Path.cwd())
            for name, fields in targets.items()
        }
        self._refuse_unless_scorable(trainer, parsed, suffix)
        total = sum(target.weight for target in parsed.values())
        self.shares = {name: target.weight / total for name, target in parsed.items()}
        loaded, setup = self._causal(parsed) if suffix is None else self._classifiers(parsed)
        setup = replace(setup, allow_metric_code=allow_metric_code)
        self.scorers = {
            name: make_scorer(target.config, target.rows, replace(setup, where=f"targets.{name}"))
            for name, target in loaded.items()
        }
        self._tokens = tokens_per_batch
        self._settled = False

    def _refuse_unless_scorable(
        self, trainer: Trainer, targets: Mapping[str, TargetConfig], suffix: str | None
    ) -> None:
        for name, target in targets.items():
            if "data" not in SCORERS[target.kind].options:
                raise InputError(
                    f"targets.{name}.scorer: {target.kind} needs an adapter on the disk; expected another scorer"
                )
            if suffix is not None and not SCORERS[target.kind].classifies:
                raise InputError(
                    f"targets.{name}.scorer: the trainer's model is a {type(self.base).__name__}, which writes no text; expected "
                    f"classification, got {target.kind}"
                )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("trainer: its model is sharded (FSDP, DeepSpeed), and cannot be scored while it trains")
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            raise InputError("trainer: its model learns prompts, which are not part of the model that is scored")

    def _causal(self, targets: Mapping[str, TargetConfig]) -> tuple[dict[str, Target], Setup]:
        """Loads every target's rows; returns them with what scorers are made of."""
        seed = self.trainer.args.seed
        loaded = load_causal_lm_data(
            {}, targets, self.processing, seed=seed, max_length=None, assistant_only_loss=False
        ).targets
        return loaded, Setup(self.processing, positions(self.base))

    def _classifiers(self, targets: Mapping[str, TargetConfig]) -> tuple[dict[str, Target], Setup]:
        """Like `_causal` for a classifier; its own labels are those that a row may have."""
        config = self.base.config
        plan = plan_own(config, type(self.base), f"trainer: its model, a {type(self.base).__name__},")
        assert plan.own is not None
        head = Head(tuple(plan.own), plan)
        processing = copy.deepcopy(self.processing)  # which is the training's own
        if plan.task == "image_classification":
            length = Length(patches(config))
        elif processing.pad_token is None:
            raise InputError("trainer: its tokenizer has no pad_token, and texts are padded to one length; give it one")
        else:
            processing.padding_side = "right"
            length = Length(min(positions(self.base), processing.model_max_length), processing)
        reader = ClassificationReader(plan.task, head.labels, length, self.trainer.args.seed, image_mode(config))
        return reader.load({}, targets).targets, Setup(processing, head=lambda: head, length=length)

    @property
    def model(self) -> Any:
        """The model that is trained, without the wrappers of accelerate."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def base(self) -> Any:
        """The model below the adapter, or the model itself."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def scores(self, stack: GatedStack, mixtures: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Scores every mixture: target -> score. A score that fails is NaN, and a warning gives the reason."""
        scores: list[dict[str, float]] = [{} for _ in mixtures]
        tokens = self._tokens = self._tokens or fitting_tokens(stack.model)
        for name, scorer in self.scorers.items():
            if not self._settled and (found := settle(stack, mixtures[:1], scorer)):
                warnings.warn(f"targets.{name}: {found}", RuntimeWarning, stacklevel=3)
            # As many at once as fill a batch, or scorers would hold the answers of all of them.
            together = scorer.at_once(stack, tokens, scorer.examples)
            for start in range(0, len(mixtures), together):
                group = mixtures[start : start + together]
                for place, score in enumerate(scorer.score(stack, group, tokens), start=start):
                    if isinstance(score, Failure):
                        warnings.warn(f"targets.{name}: {score.reason}", RuntimeWarning, stacklevel=3)
                    scores[place][name] = math.nan if isinstance(score, Failure) else score.value
        self._settled = True
        return scores

    def mean(self, scores: Mapping[str, float]) -> float:
        """Returns the mean over the targets, by their weights."""
        return sum(share * scores[name] for name, share in self.shares.items())

    def log(self, values: Mapping[str, float]) -> None:
        """Logs numbers beside the training's own, without what a Trainer's subclass does with its own."""
        control = self.trainer.control
        should_log = control.should_log  # logging resets it, and the loss would not be logged then
        Trainer.log(self.trainer, dict(values))
        control.should_log = should_log


class TargetScoreCallback(TrainerCallback):
    """Scores targets during your own training, with TRL's or transformers' Trainer, whenever it evaluates.

    The scores are logged, and join the metrics of that evaluation as `eval_<target>`; higher is better. So
    `metric_for_best_model="eval_<target>"` with `greater_is_better=True` and `load_best_model_at_end` keeps the best checkpoint,
    and an `EarlyStoppingCallback` added after this one uses it. A run without evaluation is scored at the end of every epoch.
    The training does not change: same random numbers, same weights.

    ```python
    quiz = {"data": {"path": "json", "data_files": "quiz.jsonl"}, "scorer": "choice"}
    trainer.add_callback(TargetScoreCallback(trainer, {"quiz": quiz}))
    ```

    Args:
        trainer: trains a causal LM, or a classifier (`...ForSequenceClassification`, `...ForImageClassification`), and has its
            tokenizer or image processor.
        targets: name -> a target as under `targets:` in a configuration (scorers `choice`, `classification`, `loss`,
            `generation`, `preference`, and Python functions; with a classifier `classification` of rows text/label or
            image/label, whose labels are the names in the model's `id2label`). Relative paths are relative to the working
            directory.
        tokens_per_batch: tokens in one forward pass (default: 1024 on a CPU; what fills a GPU and fits into its memory).
        allow_metric_code: load your own metrics, which runs their code.

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
        self._targets = LiveTargets(trainer, targets, tokens_per_batch, allow_metric_code)

    def scores(self) -> dict[str, float]:
        """Returns `eval_<target>` -> score of the model as it is now, and with several targets their mean as `eval_targets`.

        A score that fails is NaN, and a warning gives the reason; the training goes on.
        """
        model = self._targets.base
        with undisturbed(model):
            stack = GatedStack(model, {})
            try:
                (scores,) = self._targets.scores(stack, [{}])
            finally:
                stack.detach()
        values = {f"eval_{name}": value for name, value in scores.items()}
        return values | ({"eval_targets": self._targets.mean(scores)} if len(scores) > 1 else {})

    def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        scores = self.scores()
        metrics.update(scores)
        self._targets.log(scores)

    def on_epoch_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "no":
            self._targets.log(self.scores())


class MergeProbeCallback(TrainerCallback):
    """Ranks mixtures while an adapter is trained, and tells when their ranking is stable.

    Every `every` steps it averages the adapter as it is now with those of other candidates at the same share of their own
    training (their last checkpoint up to there, or the finished adapter if there are none), and scores the mixtures on targets.
    It compares each ranking with the one before, by Kendall's τ-b. The ranking is stable once τ-b has been at least `agreement`
    for `patience` times, with the same best mixture: adapters that are all trained that far lead to the same choice. Logged are
    `probe_best` (the best mixture's score) and `probe_kendall`. The training does not change.

    ```python
    for name, rows in candidates.items():
        trainer = SFTTrainer(model, SFTConfig(f"bank/{name}", save_steps=20), train_dataset=rows, peft_config=lora)
        others = {other: f"bank/{other}" for other in candidates if other != name}
        probe = MergeProbeCallback(trainer, name, others, {"quiz": quiz}, every=20)
        trainer.add_callback(probe)
        trainer.train()
    print(probe.settled)  # the share of the training after which the ranking was stable; None if it never was
    ```

    Args:
        trainer: trains a LoRA adapter, on the same base and with the same settings as the others.
        name: of the candidate that it is trained on.
        others: name -> an adapter folder, or the `output_dir` of its training. A folder that does not exist yet is left out.
        targets, tokens_per_batch, allow_metric_code: see `TargetScoreCallback`.
        every: steps between two probes.
        patience: probes in a row that must agree with the ones before.
        agreement: the least τ-b of two rankings that agree, up to 1.
        stop: end the training when the ranking is stable. All adapters of a bank must be trained equally far, so end all there.

    Raises:
        InputError: no LoRA adapter that can be averaged is trained, or a sharded one; or see `TargetScoreCallback`.
    """

    def __init__(
        self,
        trainer: Trainer,
        name: str,
        others: Mapping[str, str | Path],
        targets: Mapping[str, Mapping[str, Any]],
        every: int,
        patience: int = 3,
        agreement: float = 0.9,
        stop: bool = False,
        tokens_per_batch: int | None = None,
        allow_metric_code: bool = False,
    ) -> None:
        self._targets = LiveTargets(trainer, targets, tokens_per_batch, allow_metric_code)
        if name in others:
            raise InputError(f"others: {name!r} is what this trainer trains; expected the other candidates")
        if every < 1 or patience < 1 or not agreement <= 1:
            raise InputError(
                f"expected every and patience of at least 1 and agreement of at most 1, got {every}, {patience}, {agreement:g}"
            )
        model = self._targets.model
        if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, LoraConfig):
            raise InputError(
                f"trainer: expected one that trains a LoRA adapter (peft_config), got {type(model).__name__}"
            )
        refuse_unless_averageable(model.active_peft_config, "trainer")
        if len(model.active_adapters) != 1:
            raise InputError(f"trainer: expected one adapter that is trained, got {', '.join(model.active_adapters)}")
        if any("lora_embedding" in name for name, _ in model.named_parameters()):
            raise InputError("trainer: an adapter on embeddings cannot be probed; expected target_modules without them")
        self._name = check_name(name, "candidate")
        self._others = {check_name(other, "candidate"): Path(folder) for other, folder in others.items()}
        self._every, self._patience, self._agreement, self._stop = every, patience, agreement, stop
        self.ranking: list[tuple[Mixture, float]] = []
        self.settled: float | None = None
        self._first, self._agreed = 0, 0  # the step of a ranking, and how many in a row agreed with it

    def probe(self, share: float) -> list[tuple[Mixture, float]]:
        """Returns the mixtures of the adapters at this share of their training with their scores, best first."""
        model = self._targets.model
        paths = {name: adapter_at(folder, share) for name, folder in self._others.items()}
        adapters = {name: Adapter.load(path) for name, path in paths.items() if path is not None}
        adapters[self._name] = live_adapter(model)
        mixtures = few_mixtures(tuple(adapters))
        with undisturbed(model), model.disable_adapter():
            stack = GatedStack(self._targets.base, adapters)
            try:
                scores = self._targets.scores(stack, [mixture.weights for mixture in mixtures])
            finally:
                stack.detach()
        ranking = [(mixture, self._targets.mean(values)) for mixture, values in zip(mixtures, scores, strict=True)]
        return sorted(ranking, key=lambda pair: (math.isnan(pair[1]), -pair[1], len(pair[0]), pair[0].items))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every:
            return
        before, self.ranking = dict(self.ranking), self.probe(state.global_step / state.max_steps)
        now = dict(self.ranking)
        values = {"probe_best": self.ranking[0][1]}
        tau = 0.0
        if before.keys() == now.keys() and len(now) > 1:
            tau = float(kendalltau([before[mixture] for mixture in now], list(now.values())).statistic)
            values["probe_kendall"] = tau
        self._targets.log(values)
        same_best = bool(before) and max(before, key=before.__getitem__) == self.ranking[0][0]
        if not (tau >= self._agreement and same_best):
            self._first, self._agreed, self.settled = state.global_step, 0, None
            return
        self._agreed += 1
        if self._agreed == self._patience:
            self.settled = self._first / state.max_steps
            Terminal(quiet=not state.is_world_process_zero).say(
                f"the ranking of {len(now)} mixtures has been stable since step {self._first:,} of {state.max_steps:,}, the best "
                f"one {self.ranking[0][0]}: adapters trained that far already lead to the same choice"
            )
        if self.settled is not None and self._stop:
            control.should_training_stop = True


def live_adapter(model: PeftModel) -> Adapter:
    """Copies the adapter that is trained, on the CPU like those that are loaded, so that a stack can join them."""
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    return Adapter(model.active_peft_config, tensors)


def few_mixtures(names: tuple[str, ...]) -> list[Mixture]:
    """Returns all subsets of up to six candidates; of more, the singles, the pairs, all together and all but one."""
    space = SearchSpace(tuple(sorted(names)))
    if len(names) <= 6:
        return list(space.subsets())
    sizes = (1, 2, len(names) - 1, len(names))
    return [Mixture.subset(members) for size in sizes for members in combinations(space.names, size)]


def adapter_at(folder: Path, share: float) -> Path | None:
    """Returns the folder of the adapter that a training in `folder` had at a share of its steps; None if there is none yet."""
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder))] if folder.is_dir() else []
    for path in reversed(checkpoints):
        state = read_json_or_empty(path / TRAINER_STATE_NAME)
        step, steps = state.get("global_step"), state.get("max_steps")
        if isinstance(step, int) and isinstance(steps, int) and step <= share * steps * (1 + 1e-9):
            return path
    return folder if not checkpoints and (folder / "adapter_config.json").exists() else None


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Restores mode, random numbers, and `requires_grad` at the end."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    cache = getattr(model.config, "use_cache", None)
    states = random.getstate(), np.random.get_state()
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":  # inference would repack it, and no gradient pass through it then
            layer.support_avx512bf16_for_cpu = False
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            for parameter, value in requires_grad.items():
                parameter.requires_grad_(value)
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = cache
            random.setstate(states[0])
            np.random.set_state(states[1])
