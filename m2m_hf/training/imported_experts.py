"""Experts that others have trained, imported into a bank if their files show that they can be averaged.

What the files do not tell, such as the learning rate, is taken on trust: it is `unknown` in `training.json`, and a warning in
every result.
"""

import math
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from m2m_hf.console import Terminal
from m2m_hf.errors import InputError, first_line
from m2m_hf.merging.adapter import ADAPTER_FILES, Adapter
from m2m_hf.merging.full_experts import DELTA_FILE, floats, save_delta
from m2m_hf.modeling.devices import broadcast
from m2m_hf.modeling.heads import SUFFIX, HeadPlan
from m2m_hf.modeling.inspection import is_trained
from m2m_hf.modeling.lora import lora_facts
from m2m_hf.storage.files import digest_of, fingerprint, read_json_or_empty, staging_path
from m2m_hf.training.bank import Bank, differing, lost_to_dtype
from m2m_hf.training.experts import ExpertKind
from m2m_hf.training.fine_tune import publish

OWN_HEAD = (
    "the average of heads that were trained on different labels has no meaning. Expected experts with the base model's head, or "
    "with none"
)
MAX_MOVED = 0.5  # of the norm of the base's weights: fine-tuning moves them by a few percent
NAMING = (  # how the layers of an adapter were chosen
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
)  # fmt: skip


def refuse_head(changed: Sequence[str], plan: HeadPlan | None, where: str) -> None:
    """Refuses an expert that changed the head; `changed` names the modules or weights that it changes."""
    kept = plan.untrained if plan is not None and plan.own is not None else None
    if head := [name for name in changed if kept and re.fullmatch(kept, name)]:
        raise InputError(f"{where} has trained {', '.join(head[:3])}: {OWN_HEAD}")


def check_sources(bank: Bank, sources: Mapping[str, str], key: str) -> None:
    """Refuses another source for an expert than the one it was taken from, or a source whose files have changed since.

    Args:
        sources: candidate -> where its expert is to be taken from.
        key: `adapters` or `experts`.
    """
    for name, source in sources.items():
        problem: str | None = None
        if PartialState().is_main_process and (record := read_json_or_empty(bank.folder / name / "training.json")):
            files = sorted(Path(source).expanduser().glob("*.safetensors"))
            if record.get("source") != source:
                problem = f"came from {record['source']}" if record.get("source") else "was trained here"
            elif files and record.get("source_files") not in (None, digest_of(*files)):
                problem = "differs from it: its files have changed since it was taken"
        if problem := broadcast(problem):
            raise InputError(
                f"{key}.{name}: {source} is to be taken, and the one in {bank.folder / name} {problem}. Restore the source, or "
                f"delete {bank.folder / name} to take it again"
            )


class Importer(ABC):
    """Imports experts of one kind into a bank.

    Args:
        plan: of the head of a classification run.
    """

    key: str  # of the configuration
    noun: str  # what is imported
    trust: str  # said of what was imported

    def __init__(self, bank: Bank, plan: HeadPlan | None, terminal: Terminal) -> None:
        self.bank, self.plan, self.terminal = bank, plan, terminal

    def run(self, others: Mapping[str, tuple[str, Path]]) -> None:
        """Imports experts.

        Args:
            others: candidate -> (source as configured, its folder).

        Raises:
            InputError: one that cannot be averaged with this run's.
        """
        for name, (source, folder) in others.items():
            partial = staging_path(self.bank.folder / name)
            if PartialState().is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            known, more = self.stage(name, folder, partial, f"{self.key}.{name}: {source}")
            files = [partial / file for file in (*ADAPTER_FILES, DELTA_FILE) if (partial / file).exists()]
            weights = broadcast(digest_of(*files) if PartialState().is_main_process else None)
            facts, candidate = self.bank.facts[name], self.bank.candidates[name]
            record = {
                "candidate": name,
                "fingerprint": fingerprint([facts, candidate.fingerprint, weights]),
                "data": candidate.fingerprint,
                "rows": len(candidate.rows),
                "data_tokens": candidate.tokens,
                "steps": 0,
                "seconds": 0.0,
                "source": source,
                "source_files": digest_of(*sorted(folder.glob("*.safetensors"))),
                "unknown": [fact for fact in facts if fact not in known],
                **more,
                "uniform": facts,
            }
            publish(self.bank.folder / name, record)
        if others:
            self.terminal.say(
                f"imported {len(others)} {self.noun}{'s' * (len(others) > 1)}: {', '.join(others)}. {self.trust}",
                "yellow",
            )

    @abstractmethod
    def stage(self, name: str, folder: Path, partial: Path, where: str) -> tuple[set[str], dict[str, Any]]:
        """Checks an expert and, on the main process, writes it to its staging path.

        Returns:
            (the facts that its files tell, what `training.json` adds)
        """


class AdapterImporter(Importer):
    """Imports LoRA adapters that are on the layers `adapted`, as this run's are."""

    key = "adapters"
    noun = "adapter"
    trust = (
        "Rank, scaling and layers were checked; base weights, data, learning rate, epochs, batch size, seed and "
        "versions cannot be checked"
    )

    def __init__(
        self, bank: Bank, plan: HeadPlan | None, terminal: Terminal, adapted: Mapping[str, tuple[int, int]]
    ) -> None:
        super().__init__(bank, plan, terminal)
        self.adapted = adapted

    def stage(self, name: str, folder: Path, partial: Path, where: str) -> tuple[set[str], dict[str, Any]]:
        adapter = Adapter.load(folder)
        refuse_head([*adapter.parts()], self.plan, where)
        self._check_layers(adapter, where)
        # The layers themselves tell more than how they were named; the task is often left out.
        ignored = {f"lora_config.{key}" for key in ("task_type", *NAMING)}
        shape = {fact: value for fact, value in lora_facts(adapter.config).items() if fact not in ignored}
        ours = {fact: value for fact, value in self.bank.facts[name].items() if fact in shape}
        if differences := differing(ours, shape):
            raise InputError(
                f"{where} has another shape than this run's adapters: {'; '.join(differences)}. The final model is trained with "
                "this run's shape: configure that of the adapters"
            )
        if base := adapter.config.base_model_name_or_path:
            self.terminal.say(f"  {name}: says that it was trained on {base}", "dim")
        if PartialState().is_main_process:
            partial.mkdir(parents=True)
            for file in ADAPTER_FILES:
                shutil.copyfile(folder / file, partial / file)
        return set(shape), {}

    def _check_layers(self, adapter: Adapter, where: str) -> None:
        layers = {layer: (a.shape[1], b.shape[0]) for layer, (a, b, _) in adapter.parts().items()}
        different = sorted(layer for layer in {*layers, *self.adapted} if layers.get(layer) != self.adapted.get(layer))
        if different:
            first = different[0]
            actual = f"of (in, out) {layers[first]}" if first in layers else "not at all"
            raise InputError(
                f"{where} adapts other layers than this run does, or those of another base model: {first} {actual}, expected "
                f"{self.adapted.get(first, 'nothing there')}; {len(different)} such layers. See lora_target_modules"
            )


class ModelImporter(Importer):
    """Imports full fine-tunes: what each has changed of the base becomes an expert. `load` loads as the base was loaded."""

    key = "experts"
    noun = "fine-tune"
    trust = (
        "Architecture and distance from the base were checked; data, learning rate, epochs, batch size, seed "
        "and versions cannot be checked"
    )

    def __init__(
        self,
        bank: Bank,
        plan: HeadPlan | None,
        terminal: Terminal,
        base: PreTrainedModel,
        load: Callable[[Path], PreTrainedModel],
    ) -> None:
        super().__init__(bank, plan, terminal)
        self.base, self.load = base, load
        self.before = self._weights(base)

    def _weights(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The weights of a model, without a pooler, which nothing reads."""
        unread = self.plan.untrained if self.plan is not None and self.plan.own is None else None
        return {
            name: weight.detach()
            for name, weight in floats(model).items()
            if unread is None or not re.fullmatch(unread, name)
        }

    def stage(self, name: str, folder: Path, partial: Path, where: str) -> tuple[set[str], dict[str, Any]]:
        after = self._weights(self._load(folder, where))
        if [(key, one.shape) for key, one in self.before.items()] != [(key, one.shape) for key, one in after.items()]:
            different = sorted({*self.before} ^ {*after}) or ["shapes"]
            raise InputError(f"{where} has other weights than the base model: {', '.join(different[:3])}")
        changed = [key for key, weight in self.before.items() if not torch.equal(weight, after[key])]
        self._check_changed(changed, self.bank.facts[name]["trained_parameters"], where)
        moved = self._distance(after, changed, where)
        self.terminal.say(
            f"  {name}: {len(changed)} of {len(self.before)} weights changed, by {moved:.2%} of the base's", "dim"
        )
        kept: dict[str, Any] = {}
        if PartialState().is_main_process:
            try:
                kept = save_delta(partial, self.before, after, self.bank.facts[name]["delta_dtype"])
            except InputError as error:  # the other processes must hear of it
                kept = {"reason": str(error)}
        kept = broadcast(kept)
        if "reason" in kept:
            raise InputError(f"{where}: {kept['reason']}")
        if warning := lost_to_dtype(kept):
            self.terminal.say(f"  {name}: {warning}", "yellow")
        return {"base_model", "dtype", "data_format"}, {"kept": kept}

    def _load(self, folder: Path, where: str) -> PreTrainedModel:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = self.load(folder)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, InputError) as error:
            reason = first_line(error)
            raise InputError(f"{where} cannot be loaded as the base model is ({reason[:300]})") from error
        architecture = next(iter(config.architectures or ()), "")
        if self.plan is not None and self.plan.own is None and architecture.endswith(SUFFIX[self.plan.task]):
            raise InputError(f"{where} is a {architecture}, whose classifier was trained with it: {OWN_HEAD}")
        return model

    def _check_changed(self, changed: Sequence[str], pattern: str | None, where: str) -> None:
        """Refuses a model that changed weights which this run's own experts do not train."""
        refuse_head(changed, self.plan, where)
        learned = {key for key, _ in self.base.named_parameters()}
        if frozen := [key for key in changed if key in learned and not is_trained(key, self.plan, pattern)]:
            raise InputError(
                f"{where} has changed {len(frozen)} weights that trained_parameters {pattern!r} does not train in this run, such "
                f"as {', '.join(frozen[:3])}; set the pattern that it was trained with"
            )

    def _distance(self, after: Mapping[str, torch.Tensor], changed: Sequence[str], where: str) -> float:
        """Returns how far the weights moved, as a share of the base's norm; refuses what is no fine-tune of the base."""
        size = math.sqrt(sum(float(weight.double().square().sum()) for weight in self.before.values()))
        squares = (float((after[key].double() - self.before[key].double()).square().sum()) for key in changed)
        moved = math.sqrt(sum(squares)) / size
        if not changed or not moved < MAX_MOVED:
            reason = "expected a fine-tune of the base model" if changed else "it is the base itself"
            raise InputError(f"{where} differs from the base weights by {100 * moved:.0f} % of their norm: {reason}")
        return moved


def make_importer(
    kind: ExpertKind,
    bank: Bank,
    plan: HeadPlan | None,
    terminal: Terminal,
    adapted: Callable[[LoraConfig], Mapping[str, tuple[int, int]]],
    base: Callable[[], PreTrainedModel],
    load: Callable[[Path], PreTrainedModel],
) -> Importer:
    """Makes what imports experts of this kind; `adapted` gives the layers that a LoRA shape adapts."""
    if kind.lora is not None:
        return AdapterImporter(bank, plan, terminal, adapted(kind.lora))
    return ModelImporter(bank, plan, terminal, base(), load)
