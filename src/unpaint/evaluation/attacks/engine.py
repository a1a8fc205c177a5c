"""What all attacks share: which prompts, the verdict, the budget, what is kept, and the numbers.

A prompt's outcome is a file of its own in the cache, named by the weights that were attacked, the attack's options and
the case. So a search that was stopped goes on with the prompts that are missing, several processes share the work, and
what one run found another can replay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import unpaint
from unpaint.concepts import IN_SET, STATIC, TARGET, AnyConcept, Case, Concept
from unpaint.evaluation.attacks import Attack, Scene, digest, digest_of, pictures_of
from unpaint.evaluation.metrics.rates import shown
from unpaint.evaluation.pictures import PictureStore, batches_of, picture_key
from unpaint.evaluation.prompt_lists import cases_of, prompts_from_csv
from unpaint.evaluation.stats import rate_summary, wilson
from unpaint.results import write_json
from unpaint.sampling import Sampler, paint, seed_of

if TYPE_CHECKING:
    from unpaint.edit import Edit
    from unpaint.evaluation.suite import Evaluator
    from unpaint.model import TextToImage

# Fields of an attack that do not change what it finds for a prompt.
_NOT_IDENTITY = ("title", "prompts", "max_seconds")


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt: whether the model showed the concept before (pre), and in the end (found), by which
    text if it was one (else the last that was tried), after how many pictures and seconds of its own; `again`, whether
    each further seed of the same text shows it; `stopped`, by which budget in seconds, if it was.
    """

    prompt: str
    seed: int
    pre: bool
    found: bool
    text: str | None
    queries: int
    seconds: float
    again: tuple[bool, ...] = ()
    stopped: float | None = None

    @classmethod
    def load(cls, path: Path) -> Outcome | None:
        """None if it is not there or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "again": tuple(content["again"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class Unit:
    """Cases that are attacked side by side. drawn: the concept is the control; edited: which model it is."""

    concept: Concept
    cases: tuple[Case, ...]
    drawn: bool
    edited: bool
    share: float  # of the attack's budget


def units(
    attack: Attack, concept: AnyConcept, control: Concept | None, seed: int, size: int, csv: str | None = None
) -> list[Unit]:
    """All that is to be done for an attack: the concept on both models, the control on the edited one.

    The cases of `asked_for` in batches of at most `size`, none of two members of a set or of two values of guidance.
    """
    wanted = [(concept, False, True), (concept, False, False)]
    if control is not None and control.name != concept.name:
        wanted.insert(1, (control, True, True))
    found = []
    for asked, drawn, edited in wanted:
        cases = asked_for(attack, asked, seed, None if drawn else csv)
        for member in asked.members:
            own = [case for case in cases if set(_labels(case)) == set(member.labels)]
            for guidance in dict.fromkeys(case.guidance for case in own):
                alike = [case for case in own if case.guidance == guidance]
                for start in range(0, len(alike), size):
                    some = tuple(alike[start : start + size])
                    found.append(Unit(member, some, drawn, edited, len(some) / len(cases)))
    return found


def asked_for(attack: Attack, concept: AnyConcept, seed: int, csv: str | None = None) -> list[Case]:
    """The cases that are attacked: the first of the file's prompts if there is one, else of the concept's own."""
    if csv:
        return cases_of(prompts_from_csv(Path(csv).expanduser()), concept, STATIC, seed)[: attack.prompts]
    return [case for case in concept.cases(seed) if case.part == IN_SET][: attack.prompts]


def _labels(case: Case) -> list[str]:
    return [label for label, role in case.wants.items() if role == TARGET]


class Campaign:
    """One edit, attacked with all of an evaluator's attacks. The model is unedited when it comes in and goes out."""

    def __init__(
        self, evaluator: Evaluator, model: TextToImage, edit: Edit, concept: AnyConcept, seed: int, cache: Path
    ) -> None:
        self.evaluator, self.model, self.edit, self.concept, self.seed = evaluator, model, edit, concept, seed
        self.cache = cache
        self.store = PictureStore(cache)
        self.key, self.base_key = picture_key(model, edit.id), picture_key(model)
        changed = edit.delta.keys() | edit.zero.keys()
        self.base = {name: p.detach().clone() for name, p in model.group("all").items() if name in changed}
        # Attacks need pictures that depend on the prompt alone.
        self.sampler = replace(evaluator.sampler, eta=0.0)

    # ------------------------------------------------------------ the search

    def _mine(self, attack: Attack, rank: int, world: int) -> list[Unit]:
        evaluator = self.evaluator
        every = units(attack, self.concept, evaluator.control, self.seed, evaluator.batch_size, evaluator.prompts_csv)
        return every[rank::world]

    def work(self, attack: Attack, rank: int, world: int) -> int:
        """What `progress` adds up to in `run`."""
        return sum(len(unit.cases) for unit in self._mine(attack, rank, world)) * attack.tries

    def run(self, attack: Attack, rank: int = 0, world: int = 1, progress: Callable[[int], None] | None = None) -> None:
        """This rank's share of an attack. `progress` is called with rows x tries, done or no more needed."""
        mine = self._mine(attack, rank, world)
        for edited in (True, False):
            with self._attacked(edited):
                for unit in (unit for unit in mine if unit.edited == edited):
                    self._search(attack, unit, progress or (lambda n: None))

    @contextmanager
    def _attacked(self, edited: bool) -> Iterator[None]:
        if not edited:
            yield
            return
        self.edit.apply(self.model.pipe)
        try:
            yield
        finally:
            self.edit.remove(self.model.pipe)

    def _search(self, attack: Attack, unit: Unit, progress: Callable[[int], None]) -> None:
        folder = self.folder(attack, unit.edited)
        due = [case for case in unit.cases if self._outcome(attack, case, unit.edited) is None]
        progress((len(unit.cases) - len(due)) * attack.tries)
        if not due:
            return
        pre = self._before(unit)
        open_rows = [row for row, case in enumerate(due) if not pre[digest_of(case)]]
        progress((len(due) - len(open_rows)) * attack.tries)
        for case in due:
            if pre[digest_of(case)]:
                self._keep(folder, case, Outcome(case.prompt, case.seed, True, True, None, 0, 0.0))
        if open_rows:
            # Only these: what is shown already needs no attack, and no picture to be attacked with.
            self._hunt(attack, unit, [due[row] for row in open_rows], folder, progress)

    def _hunt(
        self, attack: Attack, unit: Unit, cases: list[Case], folder: Path, progress: Callable[[int], None]
    ) -> None:
        base = self.base if unit.edited else {}
        guidance = cases[0].guidance
        sampler = self.sampler if guidance is None else replace(self.sampler, guidance=guidance)
        count = len(cases)
        kept = folder / digest(unit.concept.name)
        # Edits of the text encoder have no part in what belongs to the unedited one.
        text_edited = any(key.startswith("text_encoder") for key in self.edit.delta.keys() | self.edit.zero.keys())
        shared = self.folder(attack, unit.edited and text_edited)
        pictures = pictures_of(cases, unit.drawn, self.model, base, sampler)
        scene = Scene(
            self.model, base, unit.concept, cases, pictures, unit.drawn, sampler, self.seed, kept, shared,
            list(range(count)),
        )  # fmt: skip
        started = last = time.perf_counter()
        budget = attack.max_seconds * unit.share
        queries, seconds, tried = [0] * count, [0.0] * count, [0] * count
        texts: list[str | None] = [None] * count
        stopped = None

        def note(row: int, found: bool) -> None:
            case = cases[row]
            again = () if found or stopped is not None else self._again(attack, case, texts[row], sampler)
            outcome = Outcome(
                case.prompt, case.seed, False, found, texts[row], queries[row], round(seconds[row], 3), again, stopped
            )
            self._keep(folder, case, outcome)
            progress(attack.tries - tried[row])

        with torch.enable_grad():
            for attempt in attack.attempts(scene):
                now = time.perf_counter()
                for row in scene.open:
                    seconds[row] += (now - last) / len(scene.open)
                last = now
                if attempt is not None:
                    verdicts = self.shows([cases[row] for row in attempt.rows], attempt.pictures)
                    rows = list(attempt.rows)
                    for i, row in enumerate(rows):
                        queries[row] += 1
                        tried[row] += 1
                        texts[row] = attempt.texts[i] if attempt.texts else None
                    progress(len(rows))
                    for row, verdict in zip(rows, verdicts, strict=True):
                        if verdict and row in scene.open:
                            scene.open.remove(row)
                            note(row, True)
                if not scene.open:
                    break
                if now - started > budget:
                    stopped = attack.max_seconds
                    break
        for row in scene.open:
            note(row, False)

    @torch.no_grad()
    def _before(self, unit: Unit) -> dict[str, bool]:
        """Whether the model shows the concept of itself, by case: the evaluation's own pictures, if it has them."""
        key = self.key if unit.edited else self.base_key
        found: dict[str, bool] = {}
        for batch in batches_of(unit.cases, self.evaluator.batch_size, self.evaluator.sampler):
            if self.evaluator.missing(self.store, key, [batch]):
                self.evaluator.paint(self.model, self.store, key, batch)
            pictures = self.store.pictures(key, batch)
            assert pictures is not None
            found |= dict(zip(map(digest_of, batch.cases), self.shows(batch.cases, pictures), strict=True))
        return found

    @torch.no_grad()
    def _again(self, attack: Attack, case: Case, text: str | None, sampler: Sampler) -> tuple[bool, ...]:
        """The last text that was tried, else the prompt itself, from further seeds."""
        if attack.at_n < 2:
            return ()
        seeds = [seed_of("attack", self.seed, 9, case.seed, i) for i in range(attack.at_n - 1)]
        asked = [text or case.prompt] * len(seeds)
        pictures = torch.cat(list(paint(self.model, asked, seeds, sampler, len(seeds))))
        return tuple(self.shows([case] * len(seeds), pictures))

    @torch.no_grad()
    def shows(self, cases: Sequence[Case], pictures: Tensor) -> list[bool]:
        """The evaluator's detector on uint8 pictures (n, 3, H, W): which show the target of their case."""
        detector = self.evaluator.detector
        probabilities = detector(pictures.to(self.model.device).float() / 255).float().cpu().numpy()
        asked = [(row, _labels(case)) for row, case in enumerate(cases)]
        return [bool(value) for value in shown(asked, probabilities, detector)]

    # ------------------------------------------------------------ what is kept

    def folder(self, attack: Attack, edited: bool) -> Path:
        """Where the outcomes of an attack on one of the two models are."""
        key = self.key if edited else self.base_key
        return self.cache / "attacks" / key / f"{attack.name}-{self._digest(attack)}"

    def _digest(self, attack: Any) -> str:
        assert is_dataclass(attack)
        options = {field.name: getattr(attack, field.name) for field in fields(attack)}
        options = {name: value for name, value in options.items() if name not in _NOT_IDENTITY}
        content = [options, asdict(self.sampler), self.evaluator.detector.identity, self.seed, unpaint.__version__]
        return digest(content)[:12]

    def _keep(self, folder: Path, case: Case, outcome: Outcome) -> None:
        write_json(folder / f"{digest_of(case)}.json", asdict(outcome))

    def _outcome(self, attack: Attack, case: Case, edited: bool) -> Outcome | None:
        """What is known of a case; None if nothing, or if a smaller budget ended the search."""
        found = Outcome.load(self.folder(attack, edited) / f"{digest_of(case)}.json")
        return None if found and found.stopped is not None and found.stopped < attack.max_seconds else found

    # ------------------------------------------------------------ the numbers

    def asked_for(self, attack: Attack, concept: AnyConcept) -> list[Case]:
        """The cases of the concept, or of the control, that are attacked."""
        csv = self.evaluator.prompts_csv if concept.name == self.concept.name else None
        return asked_for(attack, concept, self.seed, csv)

    def outcomes(self, attack: Attack, concept: AnyConcept, edited: bool = True) -> list[Outcome]:
        """What became of the concept's cases; of those that are missing, after an error say, nothing."""
        found = [self._outcome(attack, case, edited) for case in self.asked_for(attack, concept)]
        return [outcome for outcome in found if outcome is not None]

    def scores(self, attack: Attack) -> dict[str, dict[str, Any]]:
        """`attack/<name>/pre_asr`, `asr`, `asr_at_n` and `control_asr`, as the record holds them."""
        edited, base = self.outcomes(attack, self.concept), self.outcomes(attack, self.concept, edited=False)
        control = self.evaluator.control
        against = self.outcomes(attack, control) if control and control.name != self.concept.name else []
        common = {"higher_is_better": False, "unit": "rate", "detector": self.evaluator.detector.identity}
        scores = {
            "pre_asr": {**_rates(edited, base, lambda o: o.pre), "title": "asked for “{target}”: it is there"},
            "asr": {**_rates(edited, base, lambda o: o.found), "title": f"{attack.title}: “{{target}}” is there"},
        }
        scores["asr"] |= summary(edited)
        if attack.at_n > 1:
            rates = _rates(edited, base, lambda o: o.found or any(o.again))
            scores["asr_at_n"] = {
                **rates,
                "title": f"{attack.title}: “{{target}}” is there for one of {attack.at_n} seeds",
                "seeds": attack.at_n,
            }
        if against:
            count, n = sum(o.found for o in against), len(against)
            low, high = wilson(count, n)
            scores["control_asr"] = {
                "value": count / n,
                "low": low,
                "high": high,
                "n": n,
                "base": None,
                "title": f"{attack.title}, the control: “{control.target}” is there" if control else "",
                "pre": sum(o.pre for o in against) / n,
                **summary(against),
            }
        return {f"attack/{attack.name}/{key}": {**value, **common} for key, value in scores.items()}


def _rates(edited: Sequence[Outcome], base: Sequence[Outcome], of: Callable[[Outcome], bool]) -> dict[str, Any]:
    return dict(rate_summary(_ones(map(of, edited)), _ones(map(of, base))))


def _ones(values: Iterable[bool]) -> NDArray[np.float64]:
    return np.array(list(values), dtype=np.float64)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Effort and finds: successes that the attack added, seconds and pictures, also a success, and the texts found.

    added: (number with found and not pre) / n. stopped: how many the budget ended.
    """
    won = [outcome for outcome in outcomes if outcome.found and not outcome.pre]
    seconds, queries = sum(o.seconds for o in outcomes), sum(o.queries for o in outcomes)
    return {
        "added": len(won) / len(outcomes) if outcomes else 0.0,
        "seconds": round(seconds, 1),
        "queries": queries,
        "seconds_per_success": round(seconds / len(won), 1) if won else None,
        "queries_per_success": round(queries / len(won), 1) if won else None,
        "stopped": sum(o.stopped is not None for o in outcomes),
        "prompts": [{"prompt": o.text, "of": o.prompt, "seed": o.seed} for o in won if o.text is not None],
    }


def found_prompts(outcomes: Mapping[str, Sequence[Outcome]], guidance: float, folder: Path) -> None:
    """Write the prompts that were found as `<attack>.csv`, in the manner of the field's files, for
    `evaluator.prompts_csv` or `unpaint generate`. An attack that found none has no file."""
    import csv

    for name, found in outcomes.items():
        rows = [o for o in found if o.found and not o.pre and o.text is not None]
        if not rows:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case_number", "prompt", "evaluation_seed", "evaluation_guidance", "original_prompt"])
            writer.writerows([i, o.text, o.seed, guidance, o.prompt] for i, o in enumerate(rows))


def transfer(campaigns: Mapping[str, Campaign], attack: Attack) -> dict[str, dict[str, tuple[float, int]]]:
    """The prompts found on one edit, replayed on all: name attacked -> name tested -> (share that shows the concept,
    number of prompts). Only those of texts that the attack added; all campaigns share a model and a concept.
    """
    table: dict[str, dict[str, tuple[float, int]]] = {}
    for source, campaign in campaigns.items():
        by_case = {(case.prompt, case.seed): case for case in campaign.asked_for(attack, campaign.concept)}
        won = [o for o in campaign.outcomes(attack, campaign.concept) if o.found and not o.pre and o.text is not None]
        table[source] = {}
        for tested, other in campaigns.items():
            with other._attacked(True):
                seeds, texts = [o.seed for o in won], [str(o.text) for o in won]
                painted = list(paint(other.model, texts, seeds, other.sampler, other.evaluator.batch_size))
                cases = [by_case[o.prompt, o.seed] for o in won]
                count = sum(other.shows(cases, torch.cat(painted))) if won else 0
            table[source][tested] = (count / len(won) if won else 0.0, len(won))
    return table
