"""Experts that others have trained, imported into a bank if their files show that they can be averaged.

What the files do not tell, such as the learning rate, is taken on trust: it is `unknown` in `training.json`, and a warning in
every result.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
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
from m2m_hf.training.bank import Bank, lost_to_dtype
from m2m_hf.training.fine_tune import on_main_process
from m2m_hf.training.uniformity import differing

OWN_HEAD = (
    "the average of heads that were trained on different labels has no meaning. Expected experts with the base model's head, or "
    "with none"
)
MAX_MOVED = 0.5  # of the norm of the base's weights: fine-tuning moves them by a few percent
UNTOLD = {  # what an adapter's own layers tell better: how they were chosen; and the task, which is often left out
    f"lora_config.{key}"
    for key in (
        "task_type", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
        "fan_in_fan_out",
    )
}  # fmt: skip


def check_sources(bank: Bank, sources: Mapping[str, str], key: str) -> None:
    """Refuses another source for an expert than the one it was taken from, or a source whose files have changed since.

    `sources` is what the configuration has under `key`: candidate -> where its expert is to be taken from.
    """

    def check() -> dict[str, Any]:
        for name, source in sources.items():
            record = read_json_or_empty(bank.folder / name / "training.json")
            files = sorted(Path(source).expanduser().glob("*.safetensors"))
            if record and record.get("source") != source:
                problem = f"came from {record['source']}" if record.get("source") else "was trained here"
            elif record and files and record.get("source_files") not in (None, digest_of(*files)):
                problem = "differs from it: its files have changed since it was taken"
            else:
                continue
            raise InputError(
                f"{key}.{name}: {source} is to be taken, and the one in {bank.folder / name} {problem}. Restore the source, or "
                f"delete {bank.folder / name} to take it again"
            )
        return {}

    on_main_process(check)


@dataclass(frozen=True)
class AdapterImporter:
    """Imports LoRA adapters of the base model `base`, on its `layers` that this run's are on -> (in, out) features of each."""

    plan: HeadPlan | None
    terminal: Terminal
    layers: Mapping[str, tuple[int, int]]
    base: str
    other_bases: bool  # adapters may name other base models
    key: ClassVar[str] = "adapters"  # of the configuration
    noun: ClassVar[str] = "adapter"  # what is imported
    trust: ClassVar[str] = (  # what is said of it
        "Rank, scaling and layers were checked; base weights, data, learning rate, epochs, batch size, seed and "
        "versions cannot be checked"
    )

    def stage(
        self, name: str, facts: Mapping[str, Any], folder: Path, partial: Path, where: str
    ) -> tuple[set[str], dict[str, Any]]:
        """Checks the expert in `folder`, and stages it.

        Returns:
            (which of this run's facts its files tell, what `training.json` adds)
        """
        told = self.check(name, facts, folder, where)
        if PartialState().is_main_process:
            partial.mkdir(parents=True)
            for file in ADAPTER_FILES:
                shutil.copyfile(folder / file, partial / file)
        return told, {}

    def check(self, name: str, facts: Mapping[str, Any], folder: Path, where: str) -> set[str]:
        """Refuses an adapter that cannot be averaged with this run's; returns which of this run's facts its files tell."""
        adapter = Adapter.load(folder)
        self._check_base(name, adapter.config.base_model_name_or_path, where)
        refuse_head([*adapter.parts()], self.plan, where)
        self._check_layers(adapter, where)
        told = {fact: value for fact, value in lora_facts(adapter.config).items() if fact not in UNTOLD}
        ours = {fact: value for fact, value in facts.items() if fact in told}
        if differences := differing(ours, told):
            raise InputError(
                f"{where} has another shape than this run's adapters: {'; '.join(differences)}. The final model is trained with "
                "this run's shape: configure that of the adapters"
            )
        return set(told)

    def _check_base(self, name: str, base: str | None, where: str) -> None:
        """Refuses an adapter that names another base model; the folders before a model's name may differ."""
        if not base or Path(base).name.casefold() == Path(self.base).name.casefold():
            return
        text = f"was trained on {base}, as it says, and this run's base model is {self.base}"
        if not self.other_bases:
            raise InputError(
                f"{where} {text}: adapters of different base models cannot be averaged. If both names mean the same weights, set "
                "allow_other_bases: true"
            )
        self.terminal.say(f"{name}: its adapter {text}", "yellow")

    def _check_layers(self, adapter: Adapter, where: str) -> None:
        layers = {layer: (a.shape[1], b.shape[0]) for layer, (a, b, _) in adapter.parts().items()}
        different = sorted(layer for layer in {*layers, *self.layers} if layers.get(layer) != self.layers.get(layer))
        if different:
            first = different[0]
            actual = f"of (in, out) {layers[first]}" if first in layers else "not at all"
            raise InputError(
                f"{where} adapts other layers than this run does, or those of another base model: {first} {actual}, expected "
                f"{self.layers.get(first, 'nothing there')}; {len(different)} such layers. See lora_target_modules"
            )


@dataclass(frozen=True)
class ModelImporter:
    """Imports full fine-tunes: what each has changed of the base becomes an expert. `load` loads as the base was loaded."""

    plan: HeadPlan | None
    terminal: Terminal
    base: PreTrainedModel
    load: Callable[[Path], PreTrainedModel]
    key: ClassVar[str] = "experts"
    noun: ClassVar[str] = "fine-tune"
    trust: ClassVar[str] = (
        "Architecture and distance from the base were checked; data, learning rate, epochs, batch size, seed "
        "and versions cannot be checked"
    )

    def _weights(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The weights of a model, without a pooler, which nothing reads."""
        unread = self.plan.untrained if self.plan is not None and self.plan.own is None else None
        return {
            name: weight.detach()
            for name, weight in floats(model).items()
            if unread is None or not re.fullmatch(unread, name)
        }

    def stage(
        self, name: str, facts: Mapping[str, Any], folder: Path, partial: Path, where: str
    ) -> tuple[set[str], dict[str, Any]]:
        """See `AdapterImporter.stage`."""
        before, after = self._weights(self.base), self._weights(self._load_other(folder, where))
        if [(key, one.shape) for key, one in before.items()] != [(key, one.shape) for key, one in after.items()]:
            different = sorted({*before} ^ {*after}) or ["shapes"]
            raise InputError(f"{where} has other weights than the base model: {', '.join(different[:3])}")
        changed = [key for key, weight in before.items() if not torch.equal(weight, after[key])]
        self._check_changed(changed, facts["trained_parameters"], where)
        size = math.sqrt(sum(float(weight.double().square().sum()) for weight in before.values()))
        squares = (float((after[key].double() - before[key].double()).square().sum()) for key in changed)
        moved = math.sqrt(sum(squares)) / size
        if not changed or not moved < MAX_MOVED:
            reason = "expected a fine-tune of the base model" if changed else "it is the base itself"
            raise InputError(f"{where} differs from the base weights by {100 * moved:.0f} % of their norm: {reason}")
        self.terminal.say(
            f"  {name}: {len(changed)} of {len(before)} weights changed, by {moved:.2%} of the base's", "dim"
        )

        def save() -> dict[str, Any]:
            try:
                return {"kept": save_delta(partial, before, after, facts["delta_dtype"])}
            except InputError as error:
                raise InputError(f"{where}: {error}") from error

        record = on_main_process(save)
        if warning := lost_to_dtype(record):
            self.terminal.say(f"  {name}: {warning}", "yellow")
        return {"base_model", "dtype", "data_format"}, record

    def _load_other(self, folder: Path, where: str) -> PreTrainedModel:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = self.load(folder)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
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


def refuse_head(changed: Sequence[str], plan: HeadPlan | None, where: str) -> None:
    """Refuses an expert that changed the head; `changed` names the modules or weights that it changes."""
    kept = plan.untrained if plan is not None and plan.own is not None else None
    if head := [name for name in changed if kept and re.fullmatch(kept, name)]:
        raise InputError(f"{where} has trained {', '.join(head[:3])}: {OWN_HEAD}")


def import_experts(
    bank: Bank, others: Mapping[str, tuple[str, Path]], importer: AdapterImporter | ModelImporter, terminal: Terminal
) -> None:
    """Imports experts into the bank. `others`: candidate -> (source as configured, its folder).

    Raises:
        InputError: one that cannot be averaged with this run's.
    """
    if not others:
        return
    for name, (source, folder) in others.items():
        facts, partial = bank.facts[name], staging_path(bank.folder / name)
        if PartialState().is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        told, more = importer.stage(name, facts, folder, partial, f"{importer.key}.{name}: {source}")
        files = [partial / file for file in (*ADAPTER_FILES, DELTA_FILE) if (partial / file).exists()]
        weights = broadcast(digest_of(*files) if PartialState().is_main_process else None)
        record = {
            "steps": 0,
            "seconds": 0.0,
            "source": source,
            "source_files": digest_of(*sorted(folder.glob("*.safetensors"))),
            "unknown": [fact for fact in facts if fact not in told],
            **more,
        }
        bank.publish(name, fingerprint([facts, bank.candidates[name].fingerprint, weights]), record)
    noun = f"{importer.noun}s" if len(others) > 1 else importer.noun
    terminal.say(f"imported {len(others)} {noun}: {', '.join(others)}. {importer.trust}", "yellow")
