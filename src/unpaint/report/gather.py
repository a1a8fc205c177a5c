"""Records from a folder, and which of them may be compared. Nothing that cannot be read or compared is dropped unsaid.

Runs are measured alike if no fact about their measuring differs: model, kind of concept, sampler, prompts, numbers of
pictures, detectors. Alike runs share a `Protocol`; the others are kept apart, and the facts that differ are the reason.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unpaint.errors import UserError
from unpaint.results import FILE_NAME, RunRecord

# What a concept's config says to methods only; the rest of it decides which pictures are painted and what counts.
_FOR_METHODS = ("anchor", "templates", "erase", "name", "_target_", "kind")


@dataclass(frozen=True)
class Fault:
    """Something that is not in the tables as it should be: in one line, and of which kind.

    kind: `unreadable`, `failed`, `interrupted`, `not evaluated`, `twice` or `missing`.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Run:
    """A record and its folder. facts: how it was measured. settings: what its edit depends on beside the seed."""

    record: RunRecord
    folder: Path
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass
class Protocol:
    """Runs that were measured alike. facts: all that is known of how; `name`: a letter, and in a few words."""

    facts: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    name: str = ""

    def fits(self, run: Run) -> bool:
        return all(self.facts.get(key, value) == value for key, value in run.facts.items())

    def unlike(self, other: "Protocol") -> list[str]:
        """In words, what was measured otherwise in the other one: the reason that the two are apart."""
        keys = [key for key in self.facts if key in other.facts and self.facts[key] != other.facts[key]]
        return [f"{key}: {_short(self.facts[key])}, not {_short(other.facts[key])}" for key in keys]


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only, by seed; several of one seed were asked for other metrics or attacks, and
    the one with most metrics comes first. variant: the settings that tell it from the method's other rows of the
    concept, empty if there are none."""

    protocol: int
    concept: str
    method: str
    variant: str
    runs: Mapping[int, Sequence[Run]]

    @property
    def name(self) -> str:
        return f"{self.method} ({self.variant})" if self.variant else self.method


@dataclass(frozen=True)
class Gathered:
    """What lies in a folder. `rows` in the order of protocol, concept, method, variant."""

    folder: Path
    protocols: Sequence[Protocol]
    rows: Sequence[Row]
    faults: Sequence[Fault]

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for runs in row.runs.values() for run in runs]


def gather(folder: Path) -> Gathered:
    """Read every record below the folder. Raises UserError if there is no folder, or no record in it to be read."""
    if not folder.is_dir():
        raise UserError(f"compare {folder}: no such folder; `unpaint run` makes one called outputs")
    runs, faults = [], []
    for path in record_files(folder):
        if path.name != FILE_NAME:
            faults.append(
                Fault("not evaluated", f"{path.parent}: erased, but not evaluated; unpaint run does the rest")
            )
            continue
        try:
            runs.append(run_of(RunRecord.load(path), path.parent))
        except UserError as error:
            faults.append(Fault("unreadable", str(error)))
    if not runs:
        told = "; ".join(fault.text for fault in faults[:3])
        raise UserError(
            f"compare {folder}: {told}" if told else f"compare {folder}: no {FILE_NAME} in it; `unpaint run` writes one"
        )
    return gathered(folder, runs, faults)


def gathered(folder: Path, runs: Sequence[Run], faults: Sequence[Fault] = ()) -> Gathered:
    """Sort runs into protocols and rows; what is wrong with them joins `faults`."""
    runs, twice = _each_once(runs)
    protocols = measured_alike(runs)
    rows = [row for i, protocol in enumerate(protocols) for row in _rows(i, protocol)]
    unfinished = [_unfinished(run) for run in runs if run.record.status != "complete"]
    return Gathered(folder, protocols, rows, [*faults, *twice, *unfinished, *_missing(protocols, rows)])


def record_files(folder: Path) -> Iterator[Path]:
    """Every `record.json` below the folder, and every `edit.safetensors` without one, in the order of their paths."""
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in (FILE_NAME, "edit.safetensors"):
            if name in files:
                yield Path(place, name)
                below.clear()  # a run's folder holds no other run's
                break


def run_of(record: RunRecord, folder: Path) -> Run:
    config = record.config
    parts = {name: _section(config, name) for name in ("model", "concept", "method", "evaluator")}
    settings = {
        f"method.{key}": value for key, value in flat(parts["method"]).items() if key not in ("_target_", "name")
    }
    settings |= {
        f"concept.{key}": value
        for key, value in flat(parts["concept"]).items()
        if _is_for_methods(key) and key.rpartition(".")[2] not in ("name", "_target_", "kind")
    }
    if config.get("edit"):
        settings["edit"] = config["edit"]
    return Run(record, folder, _facts(record, parts), settings)


def flat(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`{a: {b: 1.0}}` as `{"a.b": 1}`; lists and empty sections as JSON text. 2.0 is the same option as 2."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif isinstance(value, list | dict):
            found[name] = json.dumps(value, ensure_ascii=False)
        else:
            found[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return found


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


# --- measured alike ---------------------------------------------------------------------------------------------------


def _facts(record: RunRecord, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    evaluator = parts["evaluator"]
    facts: dict[str, Any] = {"model": record.model, "kind": _kind(parts["concept"])}
    facts |= {f"model.{key}": value for key, value in parts["model"].items() if key in ("path", "hub", "dtype")}
    facts |= {f"sampler.{key}": value for key, value in _section(evaluator, "sampler").items() if key != "_target_"}
    facts["batch_size"] = evaluator.get("batch_size")
    facts["times"] = evaluator.get("times", 1)
    facts["prompts_csv"] = evaluator.get("prompts_csv")
    if version := record.environment.get("unpaint"):
        facts["unpaint"] = version
    for key, value in flat(parts["concept"]).items():
        if not _is_for_methods(key):
            facts[f"{record.concept}: {key}"] = value
    for name, metric in record.metrics.items():
        facts[f"detector of {name}"] = metric.get("detector")
        for key, value in flat(_settings(evaluator, name)).items():
            if key not in ("title", "cost"):
                facts[f"{name}: {key}"] = value
        # How many prompts an attack needs, or an edit leaves to be attacked, may depend on the edit.
        if not name.startswith(("attack/", "restoration/")):
            facts[f"{record.concept}: n of {name}"] = metric.get("n")
    return facts


def _kind(concept: Mapping[str, Any]) -> str:
    return "set" if concept.get("members") else str(concept.get("kind", "individual"))


def _is_for_methods(key: str) -> bool:
    parts = key.split(".")
    own = parts[2:] if parts[0] == "members" else parts
    return len(own) == 1 and own[0] in _FOR_METHODS


def _settings(evaluator: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The evaluator's options for one metric, attack or restoration; empty if they cannot be told."""
    group, _, rest = name.partition("/")
    if group == "restoration":
        return _section(evaluator, "relearning")
    kinds = _section(evaluator, "attacks" if group == "attack" and rest.count("/") else "metrics")
    for key, options in kinds.items():
        if isinstance(options, Mapping) and (options.get("name") == name or key in rest.split("/")):
            return options
    return {}


def measured_alike(runs: Sequence[Run]) -> list[Protocol]:
    """Part the runs so that no fact differs within a part; those with most runs first, named A, B, ...

    A run joins the first part that it fits. The commonest numbers of pictures come first, and with them the commonest
    prompts of a concept, so that each part is built around runs that belong together.
    """
    counts = Counter(_counts(run) for run in runs)
    prompts = Counter(_asked_alike(run) for run in runs)

    def turn(run: Run) -> tuple[Any, ...]:
        own = _counts(run)
        return -counts[own], own, -prompts[_asked_alike(run)], -len(run.facts), run.record.run_id

    found: list[Protocol] = []
    for run in sorted(runs, key=turn):
        protocol = next((one for one in found if one.fits(run)), None)
        if protocol is None:
            found.append(protocol := Protocol())
        protocol.facts |= run.facts
        protocol.runs.append(run)
    found.sort(key=lambda protocol: -len(protocol.runs))
    for i, protocol in enumerate(found):
        letter = chr(ord("A") + i) if i < 26 else str(i + 1)
        protocol.name = f"{letter}: {_in_words(protocol)}"
    return found


def _counts(run: Run) -> str:
    """Model, sampler and numbers of pictures, whatever the concept."""
    said = {key.partition(": ")[2] or key: value for key, value in run.facts.items()}
    words = ("model", "times", "sampler.", "evaluation.per_label")
    return repr({key: v for key, v in said.items() if key.startswith(words) or key.endswith("_pictures")})


def _asked_alike(run: Run) -> str:
    """All facts that are known before anything is measured."""
    return repr([(key, v) for key, v in run.facts.items() if "/" not in key and " of " not in key and key != "unpaint"])


def _in_words(protocol: Protocol) -> str:
    facts = protocol.facts
    counts = sorted({int(v) for k, v in facts.items() if k.endswith(": n of erasure/ua") and v is not None})
    words = [str(facts.get("model"))]
    if facts.get("kind", "individual") != "individual":
        words.append(str(facts["kind"]))
    if "sampler.steps" in facts:
        words.append(f"{facts['sampler.steps']} steps")
    if counts:
        words.append(f"{counts[0]}{f'–{counts[-1]}' if len(counts) > 1 else ''} pictures of the target")
    return ", ".join(words)


def _short(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(protocol: int, alike: Protocol) -> list[Row]:
    by_concept: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in alike.runs:
        key = json.dumps(run.settings, sort_keys=True, default=str)
        by_concept.setdefault((run.record.concept, run.record.method), {}).setdefault(key, []).append(run)
    told = {method: _telling(method, by_concept) for _, method in by_concept}
    rows = []
    for (concept, method), variants in by_concept.items():
        for runs in variants.values():
            variant = ", ".join(
                f"{key.removeprefix('method.')}={_short(runs[0].settings[key], 40)}"
                for key in told[method]
                if key in runs[0].settings
            )
            seeds: dict[int, list[Run]] = {}
            for run in sorted(runs, key=lambda run: (run.record.seed, -_measured(run), run.record.run_id)):
                seeds.setdefault(run.record.seed, []).append(run)
            rows.append(Row(protocol, concept, method, variant, seeds))
    return sorted(rows, key=lambda row: (row.concept, row.method, row.variant))


def _measured(run: Run) -> int:
    """How many metrics it has, attacks aside: they are asked of few concepts, often by a run that has little else."""
    return sum(not name.startswith("attack/") for name in run.record.metrics)


def _telling(method: str, by_concept: Mapping[tuple[str, str], Mapping[str, Sequence[Run]]]) -> list[str]:
    """As few settings as tell a method's rows apart, the most telling first; none if no concept has several rows of it,
    whatever it was given for one concept and another."""
    differing: dict[str, None] = {}
    every: list[Mapping[str, Any]] = []
    for (_, name), variants in by_concept.items():
        own = [runs[0].settings for runs in variants.values()] if name == method else []
        every += own
        keys = dict.fromkeys(key for settings in own for key in settings)
        differing |= {key: None for key in keys if len({repr(settings.get(key)) for settings in own}) > 1}

    def apart(keys: Sequence[str]) -> int:
        return len({tuple(repr(settings.get(key)) for key in keys) for settings in every})

    chosen: list[str] = []
    while apart(chosen) < apart(list(differing)):
        chosen.append(max((key for key in differing if key not in chosen), key=lambda key: apart([*chosen, key])))
    return chosen


def _each_once(runs: Sequence[Run]) -> tuple[list[Run], list[Fault]]:
    """One run for each seed and settings and way of measuring: the complete one, or the one that began last."""
    found: dict[str, Run] = {}
    faults = []
    for run in runs:
        record = run.record
        # What an unfinished run lacks must not make it another run.
        key = repr([record.method, record.seed, _asked_alike(run), sorted(run.settings.items()), _asked(run)])
        if (other := found.get(key)) is None:
            found[key] = run
            continue
        kept, left = sorted((other, run), key=lambda r: (r.record.status == "complete", r.record.started))[::-1]
        found[key] = kept
        faults.append(Fault("twice", f"{left.folder}: the same run as {kept.folder}, which is the one shown"))
    return list(found.values()), faults


def _asked(run: Run) -> str:
    """Everything that its evaluator was told. Not titles, which may be worded anew; an option that is null or an empty
    section is as good as not there, as in a record from before there was the option."""
    told = {key: value for key, value in _section(run.record.config, "evaluator").items() if value != {}}
    options = [(key, value) for key, value in flat(told).items() if value is not None]
    return repr(sorted((key, value) for key, value in options if key.rpartition(".")[2] not in ("title", "cost")))


def _unfinished(run: Run) -> Fault:
    record = run.record
    what = f"{record.method} on {record.concept}, seed {record.seed}"
    if record.status == "failed":
        return Fault("failed", f"{what}: failed on {record.finished}; the same command tries again ({run.folder})")
    text = "not finished, or still running; the same command goes on"
    return Fault("interrupted", f"{what}: {text} ({run.folder})")


def _missing(protocols: Sequence[Protocol], rows: Sequence[Row]) -> list[Fault]:
    """Concepts and seeds that other rows of the same protocol have, and a method lacks. Of a method with several
    settings it is not known which were meant to be run where."""
    faults = []
    for i in range(len(protocols)):
        own = [row for row in rows if row.protocol == i]
        seeds = {row.concept: set[int]() for row in own}
        for row in own:
            seeds[row.concept] |= set(row.runs)
        by_name: dict[str, dict[str, set[int]]] = {}
        searched = {row.method for row in own if row.variant}
        for row in (row for row in own if row.method not in searched):
            by_name.setdefault(row.name, {}).setdefault(row.concept, set()).update(row.runs)
        for name, there in by_name.items():
            lacks = {concept: sorted(every - there.get(concept, set())) for concept, every in seeds.items()}
            told = [f"{concept} (seed {', '.join(map(str, which))})" for concept, which in lacks.items() if which]
            if told:
                more = f" and {len(told) - 6} more" if len(told) > 6 else ""
                faults.append(
                    Fault("missing", f"{protocols[i].name[0]}, {name}: no run on {', '.join(told[:6])}{more}")
                )
    return faults
