"""Reward models: sequence classifiers with one output that rate an answer to a prompt, such as TRL's `RewardTrainer` trains."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from m2m_hf.data.rows import Prompt, Tools, text_of
from m2m_hf.data.tokens import templated
from m2m_hf.errors import InputError, first_line
from m2m_hf.modeling.loading import base_fingerprint, load_config, pin_revision
from m2m_hf.modeling.processing import tokenizer_facts
from m2m_hf.storage.files import fingerprint


class RewardModel:
    """Loads a reward model, in safetensors, when it first rates.

    A conversation is read in the reward model's own chat template, else as a pair of texts: prompt and answer.

    Args:
        name: a folder, or a Hub id.
        where: the target, for messages.
    """

    def __init__(self, name: str, where: str) -> None:
        self._name, self._where = name, f"{where}.reward_model"
        try:
            self._args = pin_revision(ModelConfig(model_name_or_path=name))
            config = load_config(self._args)
            self.tokenizer = load_config(self._args, AutoTokenizer)
            facts = tokenizer_facts(self.tokenizer, True)
            self.fingerprint = fingerprint([base_fingerprint(self._args), facts])
        except InputError as error:
            raise InputError(f"{self._where}: {str(error).removeprefix('model_name_or_path: ')}") from error
        if config.num_labels != 1:
            raise InputError(f"{self._where}: expected a model with one output, and {name!r} has {config.num_labels}")
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        limits = self.tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)
        self.positions = min(limit for limit in limits if limit)
        self._model: Any = None

    def encode(self, prompt: Prompt, answer: str, tools: Tools) -> dict[str, list[int]]:
        """A prompt and an answer as the model reads them; where they do not fit, the beginning is lost."""
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            said = [*turns, {"role": "assistant", "content": answer}]
            read = templated(self.tokenizer, said, self._where, tools, tokenize=True, return_dict=True)
        else:
            text = prompt if isinstance(prompt, str) else "\n".join(text_of([turn]) for turn in prompt)
            read = self.tokenizer(text, answer)
        return {name: list(ids)[-self.positions :] for name, ids in read.items()}

    def rate(self, read: Sequence[dict[str, list[int]]], like: Any) -> list[float]:
        """The rewards of one batch, from a model on the same device and of the same type as the model `like`."""
        if self._model is None:
            self._model = self._load(like)
        inputs = self.tokenizer.pad(list(read), return_tensors="pt").to(like.device)
        rewards: list[float] = self._model(**inputs).logits[:, 0].double().tolist()
        return rewards

    def _load(self, like: Any) -> Any:
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self._name,
                revision=self._args.model_revision,
                dtype=like.dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise InputError(f"{self._where}: {self._name!r} cannot be loaded ({first_line(error)})") from error
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"{self._where}: {self._name!r} has no weights for {missing[0]}, which would be random numbers; expected a "
                "reward model, such as TRL's RewardTrainer saves"
            )
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # by which it finds the last token
        return model.to(like.device).eval().requires_grad_(False)
