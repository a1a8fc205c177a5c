"""What became of the prompts that were attacked, and the numbers made of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unpaint.evaluation.stats import rate_summary


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt: whether the model showed the concept before (pre), and in the end (found), by which
    text if it was one (else the last that was tried), after how many pictures and seconds of its own; `again`, whether
    each further seed of the same text shows it; `stopped`, by which budget in seconds for a prompt, if it was;
    `guidance`, that of the prompt if it has its own.
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
    guidance: float | None = None

    @classmethod
    def load(cls, path: Path) -> Outcome | None:
        """None if it is not there or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "again": tuple(content["again"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def union(parts: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """What became of the prompts that all of several attacks had: found if one of them did, with the effort of all."""
    by_prompt = [{(o.prompt, o.seed, o.guidance): o for o in part} for part in parts]
    joined = []
    for key, first in by_prompt[0].items():
        if not all(key in part for part in by_prompt):
            continue
        every = [part[key] for part in by_prompt]
        best = next((o for o in every if o.found), first)
        stopped = [o.stopped for o in every if o.stopped is not None]
        joined.append(
            replace(
                best,
                queries=sum(o.queries for o in every),
                seconds=sum(o.seconds for o in every),
                again=tuple(seen for o in every for seen in o.again),
                stopped=None if best.found or not stopped else max(stopped),
            )
        )
    return joined


def rates_of(edited: Sequence[Outcome], base: Sequence[Outcome], of: Callable[[Outcome], bool]) -> dict[str, Any]:
    """The share of prompts for which `of` holds, on the edited model and on the unedited one, as a record holds it."""
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
    `evaluator.prompts_csv` or `unpaint generate`. guidance: of prompts without their own. An attack that found none has
    no file."""
    for name, found in outcomes.items():
        rows = [o for o in found if o.found and not o.pre and o.text is not None]
        if not rows:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case_number", "prompt", "evaluation_seed", "evaluation_guidance", "original_prompt"])
            own = [guidance if o.guidance is None else o.guidance for o in rows]
            writer.writerows([i, o.text, o.seed, own[i], o.prompt] for i, o in enumerate(rows))
