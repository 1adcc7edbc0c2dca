"""What a model learns and is scored on: `Task`, a causal LM, and `Classification` carry all differences between tasks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.config.yaml_files import plain
from m2m_hf.data.causal_lm import load_causal_lm_data, target_row
from m2m_hf.data.classification import ClassificationReader, Length, label_words, questions, words_of
from m2m_hf.data.conversations import rows_of, tools_of
from m2m_hf.data.rows import Candidate, LoadedData, TargetRow
from m2m_hf.data.tokens import encode, encode_choices, render, special_in
from m2m_hf.errors import InputError
from m2m_hf.modeling.dates import pin_date
from m2m_hf.modeling.heads import LONGEST, SCALE, Head, HeadPlan, cut, head_of_names
from m2m_hf.modeling.inspection import check_model
from m2m_hf.modeling.loading import load_base, load_config
from m2m_hf.modeling.processing import image_mode, load_image_processor, load_tokenizer, patches, tokenizer_facts
from m2m_hf.run.base_model import BaseModel
from m2m_hf.scoring.make import make_scorer
from m2m_hf.scoring.scorers import Scorer, Setup
from m2m_hf.storage.files import fingerprint
from m2m_hf.storage.run_folder import RunFolder
from m2m_hf.training.experts import ExpertKind
from m2m_hf.training.trainers import Settings


class Task:
    """What a run's models learn, with its parts loaded when they are first asked for.

    As it stands, a causal LM: trained by TRL's SFTTrainer on prompts and completions, or conversations.

    Args:
        folder: the run folder, which may hold a head.
        started: when the run started, the date of chat templates that print one.
        plan: where a classifier's head comes from; None for a causal LM.
        say: prints a line.
    """

    truncation = "prompts with their answers exceed the model's context; truncated at the start"
    limit = 0  # tokens that a row is cut to; 0 where the Trainer cuts it

    def __init__(
        self,
        config: MergeToMixConfig,
        args: SFTConfig,
        model_args: ModelConfig,
        folder: RunFolder,
        started: datetime,
        plan: HeadPlan | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.args, self.model_args, self.folder, self.plan = config, args, model_args, folder, plan
        self.started, self.dated = started, False
        self.base = BaseModel(args, model_args, plan, self.prepare, say)

    @cached_property
    def tokenizer(self) -> Any:
        """Of texts: of the rows, or of the names of images' labels."""
        tokenizer = load_tokenizer(self.model_args, self.args, generates=self.plan is None)
        self.dated = self.plan is None and pin_date(tokenizer, self.args, self.started)
        return tokenizer

    @property
    def processing(self) -> Any:
        """Turns rows into the model's input: the tokenizer, or the image processor."""
        return self.tokenizer

    @property
    def head(self) -> Head | None:
        """The frozen head of a classifier."""
        return None

    def save_head(self) -> None:
        """Writes a head that is made of names to the run folder, where commands that score find it."""

    def prepare(self, model: Any) -> None:
        """Completes a freshly loaded base model."""

    def check_settings(self) -> None:
        """Refuses training arguments that this task has no use for."""

    def check_labels(self) -> None:
        """Refuses labels that the model cannot tell apart."""

    def special_tokens(self) -> Iterator[str]:
        """Says which rows hold special tokens in writing: these are read as such, in training as in scoring."""
        if self.data.format == "image":
            return
        adds = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0] == 1
        twice = "; the tokenizer begins texts with one itself, so that a text that begins with it has it twice"
        rows = {name: one.rows for name, one in self.data.candidates.items()}
        for name, content in (rows | {name: one.questions for name, one in self.data.targets.items()}).items():
            count, token = special_in(self.tokenizer, content)
            if count:
                text = f"{name}: {count} rows hold special tokens in writing, such as {token!r}, which are read as these tokens"
                yield text + (twice if adds and self.data.format == "text" else "")

    @cached_property
    def data(self) -> LoadedData:
        """The candidates and targets, loaded and checked."""
        return load_causal_lm_data(
            self.config.parsed_candidates,
            self.config.parsed_targets,
            self.tokenizer,
            seed=self.args.seed,
            max_length=None if self.args.packing else self.args.max_length,
            assistant_only_loss=self.args.assistant_only_loss,
        )

    def texts(self) -> Iterator[tuple[str, Sequence[int]]]:
        """(where, token ids) of all that is trained on or scored."""
        for name, candidate in self.data.candidates.items():
            where = f"candidates.{name}"
            for row in rows_of(candidate.rows):
                tools, turns = tools_of(row, self.data.format, where), row.get("messages")
                if turns:
                    yield where, render(self.tokenizer, turns, where, tools=tools)
                else:
                    yield where, encode(self.tokenizer, row["prompt"], row["completion"], where, tools)[0]
        for name, target in self.data.targets.items():
            where = f"targets.{name}"
            for one in target.questions:
                if not any(one.choices):
                    yield where, render(self.tokenizer, one.asked, where, True, one.tools)
                    continue
                for ids in encode_choices(self.tokenizer, one.asked, one.choices, where, one.tools)[0]:
                    yield where, ids
        yield "pad_token", [self.tokenizer.pad_token_id]
        if self.data.format == "text":
            yield "eos_token", [self.tokenizer.eos_token_id]

    def scoring_setup(self, positions: int) -> Setup:
        """What scorers are made of, for a model of so many positions."""
        return Setup(
            self.processing,
            positions,
            base=str(self.model_args.model_name_or_path),
            allow_metric_code=self.config.allow_metric_code,
            answers=self.folder.answers,
            judged=self.folder.judged,
        )

    def own_scorer(self, name: str, count: int, setup: Setup) -> Scorer | None:
        """Scores a candidate's own rows, some drawn at random, by their log-probability; None where no row fits whole."""
        where, rows = f"candidates.{name}", self.data.candidates[name].rows
        asked: list[TargetRow] = []
        drawn = rows.shuffle(seed=self.args.seed).select(range(min(len(rows), 4 * count)))
        for row in rows_of(drawn):
            with suppress(InputError):  # of a last turn that cannot be told from what is before it
                one = target_row(row, self.data.format, "loss", where)
                size = len(encode(self.tokenizer, one.prompt, one.choices[0], where, one.tools)[0])
                asked += [one] if size <= min(setup.positions, self.args.max_length or size) else []
            if len(asked) == count:
                break
        return make_scorer(TargetConfig("loss", "loglikelihood"), asked, setup) if asked else None

    def settings(self, args: SFTConfig, expert: ExpertKind) -> Settings:
        """How a model is fine-tuned."""
        return Settings(args, self.tokenizer, expert)

    def facts(self) -> dict[str, Any]:
        """What an expert depends on because of the task, beside its rows."""
        return tokenizer_facts(self.tokenizer, self.data.format in ("chat", "messages"))

    def describe_head(self) -> str:
        """What classifies, as a line for people."""
        return ""

    def row_figures(self, candidate: Candidate) -> dict[str, int]:
        """Title -> figure, for the table of candidates."""
        return {
            "rows": len(candidate.rows),
            "tokens": candidate.tokens,
            "longest": candidate.longest,
            "truncated": candidate.truncated,
        }


class Classification(Task):
    """A classifier of texts or images, trained by transformers' Trainer with one frozen head."""

    truncation = "texts exceed max_length or the model's context; truncated at the end"
    plan: HeadPlan

    @property
    def images(self) -> bool:
        return self.config.task == "image_classification"

    @cached_property
    def processing(self) -> Any:
        return load_image_processor(self.model_args) if self.images else self.tokenizer

    def prepare(self, model: Any) -> None:
        if not self.images:  # some models find by it where a text ends
            model.config.pad_token_id = self.tokenizer.pad_token_id

    @cached_property
    def head(self) -> Head:
        """The model's own classifier; or made of the labels' names, read from the run folder or made by the plain base model."""
        if self.plan.own is not None:
            return Head(tuple(self.words), self.plan)
        closed, template = self.label_space is not None, self.config.label_template
        known = Head.read(self.folder.head, self.plan, closed, self.head_fingerprint)
        if known is not None:
            return known
        if self.plan.two_towers:  # the one that embeds names stands beside the base; both are loaded for a moment
            model = load_base(self.model_args, self.args, plan=replace(self.plan, model_class="AutoModel"))
        else:
            model = self.base.plain()
        return head_of_names(self.plan, self.words, template, model, self.tokenizer, closed)

    @cached_property
    def head_fingerprint(self) -> str:
        """Identifies a head that is made of names."""
        parts = [asdict(self.plan), self.words, self.config.label_template, SCALE, LONGEST]
        base = [self.base.fingerprint, self.model_args.dtype, tokenizer_facts(self.tokenizer, False)]
        return fingerprint([*base, *parts])

    def save_head(self) -> None:
        # One that is there is not written anew: its bytes would differ, and a command that is given it would count as another.
        if self.head.vectors is None:
            return
        if Head.read(self.folder.head, self.plan, self.head.closed, self.head_fingerprint) is None:
            self.head.save(self.folder.head, self.head_fingerprint)

    @cached_property
    def length(self) -> Length:
        """Counts the tokens of the model's input."""
        if self.images:
            return Length(patches(load_config(self.model_args)))
        positions = check_model(self.model_args, self.args, None, self.plan)
        limit = min(positions, self.tokenizer.model_max_length, self.args.max_length or positions)
        return Length(int(limit), self.tokenizer)

    @property
    def limit(self) -> int:  # type: ignore[override]
        return self.length.limit

    @cached_property
    def label_space(self) -> dict[str, str] | None:
        """Label -> words of the space that every row is a choice in; None where each dataset has labels of its own.

        Raises:
            InputError: labels that the model's own classifier does not have.
        """
        given = self.config.parsed_labels
        if self.plan.own is None:
            return given and {label: label_words(word) for label, word in given.items()}
        if unknown := sorted(set(given or ()) - set(self.plan.own)):
            raise InputError(
                f"labels: the model's classifier does not have {', '.join(unknown)}; it has {', '.join(self.plan.own)[:300]}"
            )
        return {label: label for label in self.plan.own if given is None or label in given}

    @cached_property
    def words(self) -> dict[str, str]:
        """Label -> words, of every label that the head knows."""
        return words_of(self.label_space, self.data.candidates, self.data.targets)

    @cached_property
    def data(self) -> LoadedData:
        space = None if self.label_space is None else tuple(self.label_space)
        mode = image_mode(load_config(self.model_args))
        reader = ClassificationReader(self.config.task, space, self.length, self.args.seed, mode)
        return reader.load(self.config.parsed_candidates, self.config.parsed_targets)

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """Candidate -> the labels of its rows."""
        return {name: sorted(one.rows.unique("label")) for name, one in self.data.candidates.items()}

    def scoring_setup(self, positions: int) -> Setup:
        return replace(super().scoring_setup(positions), head=lambda: self.head, length=self.length)

    def texts(self) -> Iterator[tuple[str, Sequence[int]]]:
        if self.images:
            return
        texts = [(f"candidates.{name}", row["text"]) for name, one in self.data.candidates.items() for row in one.rows]
        texts += [(f"targets.{name}", row.prompt) for name, one in self.data.targets.items() for row in one.questions]
        texts += [("labels", self.config.label_template.replace("{label}", words)) for words in self.words.values()]
        for where, text in texts:
            yield where, self.tokenizer(text, truncation=True, max_length=self.limit)["input_ids"]
        yield "pad_token", [self.tokenizer.pad_token_id]

    def own_scorer(self, name: str, count: int, setup: Setup) -> Scorer | None:
        every = self.data.candidates[name].rows
        rows = every.shuffle(seed=self.args.seed).select(range(min(len(every), count)))
        contents = [*map(str, range(len(rows)))] if self.images else rows["text"]
        labels = self.labels[name] if self.label_space is None else [*self.label_space]
        asked = questions(rows, contents, labels, f"candidates.{name}")
        return make_scorer(TargetConfig("classification", "logprob"), asked, setup)

    def settings(self, args: SFTConfig, expert: ExpertKind) -> Settings:
        return Settings(args, self.processing, expert, self.head, self.limit, self.labels)

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "head": fingerprint(asdict(self.plan)),
            "labels": None if self.label_space is None else fingerprint(self.label_space),
            "label_template": self.config.label_template,
        }
        if self.images:
            facts["image_processor"] = fingerprint(plain(self.processing.to_dict()))
        else:
            facts["limit"] = self.limit
            facts["sides"] = [self.tokenizer.truncation_side, self.tokenizer.padding_side]
        if not self.images or self.plan.two_towers:
            facts |= tokenizer_facts(self.tokenizer, False)
        return facts

    def describe_head(self) -> str:
        if self.plan.own is not None:
            return f"head: the model's own classifier of {len(self.plan.own)} labels, frozen"
        choice = "all of them" if self.label_space is not None else "those of its own dataset"
        tower = "the text tower" if self.plan.two_towers else "the base model"
        return f"head: {tower}'s embedding of {len(self.words)} label names, frozen; a row is a choice among {choice}"

    def row_figures(self, candidate: Candidate) -> dict[str, int]:
        figures = {"rows": len(candidate.rows)} if self.images else super().row_figures(candidate)
        return figures | {"labels": len(self.labels[candidate.name])}

    def check_labels(self) -> None:
        if self.plan.own is not None:
            return
        sets: dict[str, Sequence[str]] = {f"candidates.{name}": labels for name, labels in self.labels.items()}
        for name, target in self.data.targets.items():
            if target.questions:
                sets[f"targets.{name}"] = [str(label) for label in target.questions[0].choices]
        if self.label_space is not None:
            sets = {"labels": tuple(self.label_space)}
        for where, labels in sets.items():
            by_tokens: dict[tuple[int, ...], str] = {}
            for label in labels:
                text = self.config.label_template.replace("{label}", self.words[label])
                tokens = tuple(self.tokenizer(text, **cut(self.tokenizer))["input_ids"])
                if (other := by_tokens.setdefault(tokens, label)) != label:
                    raise InputError(
                        f"{where}: {other!r} and {label!r} are the same words to the model; rename one of them"
                    )

    def check_settings(self) -> None:
        if self.model_args.load_in_4bit or self.model_args.load_in_8bit:
            raise InputError(
                f"load_in_4bit, load_in_8bit: only for LoRA adapters of causal LMs, and task is {self.config.task}"
            )
        if self.images and self.args.max_length != SFTConfig.max_length:
            raise InputError("max_length: without effect, as images are not cut; leave it out")
        words = [label for label, word in (self.config.parsed_labels or {}).items() if label != word]
        for_names = {
            "label_template": self.config.label_template != "{label}",
            f"labels: words for {', '.join(words)}": bool(words),
            "pad_token": self.images and self.args.pad_token is not None,
        }
        for name, is_given in for_names.items():
            if is_given and self.plan.own is not None:
                raise InputError(
                    f"{name}: without effect, as the model's own classifier knows its labels by itself; leave it out"
                )
        usable = {item.name for item in fields(TrainingArguments)} | {"max_length", "pad_token"}
        defaults = SFTConfig(output_dir="out", use_cpu=self.args.use_cpu, bf16=False)
        for item in fields(SFTConfig):
            given = getattr(self.args, item.name)
            if item.init and item.name not in usable and given != getattr(defaults, item.name):
                raise InputError(f"{item.name}: belongs to task: causal_lm, got {given!r}")
        needed = {"label_smoothing_factor": 0.0, "use_liger_kernel": False, "train_sampling_strategy": "random"}
        for name, expected in needed.items():
            given = plain(getattr(self.args, name))
            if given != expected:
                raise InputError(
                    f"{name}: not for classification with a frozen head; expected {expected}, got {given!r}"
                )
