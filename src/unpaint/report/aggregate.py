"""From the numbers of runs to those of rows: means and intervals over seeds and concepts, and the Pareto front.

Everything here is arithmetic on frames with one line a number; nothing is read from disk.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from unpaint.errors import UserError, nearest
from unpaint.report.gather import Gathered, Row, Run

ROW = ["protocol", "concept", "method", "variant"]
MEAN = ["protocol", "method", "variant"]
UA, RETENTION = "erasure/ua", "retention/ira"
COST = "cost/"
_TO_UA95 = "seconds_to_ua95"  # null in the record of a run that never got there
# Concepts of one axis ask for their retained labels with the same prompts and seeds.
_SHARED = ("retention/", "fidelity/")
_AT_LEAST_0 = ("seconds", "bytes", "count", "steps")
# Kept records have six digits, and the means of the same rates over one seed and over three differ in their last bits.
_ALIKE = 5e-6
# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def numbers(gathered: Gathered) -> pd.DataFrame:
    """One line a run and metric: protocol, concept, method, variant, seed, metric, value, low, high, n, base, base_low,
    base_high, never, more_than, stopped, unit, higher_is_better, detector. Costs are metrics called `cost/...`. What
    was not measured is left out. never: 1 for what did not come to its end, as UA to 95 %, or the concept back by
    relearning: it has no value, but was more than `more_than` (inf if that is not known). stopped: searches of an
    attack that a budget ended."""
    lines = [line for row in gathered.rows for line in _lines(row)]
    columns = [*ROW, "seed", "metric", *_NUMBERS, *_TOLD, "unit", "higher_is_better", "detector"]
    frame = pd.DataFrame(lines, columns=columns).astype(dict.fromkeys([*_NUMBERS, *_TOLD], "float64"))
    return frame.fillna({"never": 0.0, "stopped": 0.0})


_NUMBERS = ("value", "low", "high", "n", "base", "base_low", "base_high")
_TOLD = ("never", "more_than", "stopped")


def _lines(row: Row) -> list[dict[str, object]]:
    found: dict[tuple[int, object], dict[str, object]] = {}
    for seed, runs in row.runs.items():
        for run in runs:
            for metric in _measured(run):
                found.setdefault((seed, metric["metric"]), {**_place(row), "seed": seed, **metric})
    return list(found.values())


def _place(row: Row) -> dict[str, object]:
    return {"protocol": row.protocol, "concept": row.concept, "method": row.method, "variant": row.variant}


def _measured(run: Run) -> list[dict[str, object]]:
    record = run.record
    found: list[dict[str, object]] = []
    for name, metric in record.metrics.items():
        # relearned: null where there was nothing to bring back
        if metric["value"] is None or metric.get("relearned", True) is None:
            continue
        line: dict[str, object] = {"metric": name} | {key: metric.get(key) for key in (*_NUMBERS, "stopped")}
        if metric.get("relearned") is False:
            line |= {"value": None, "never": 1, "more_than": metric["value"]}
        line["unit"] = metric.get("unit", "rate")
        line["higher_is_better"] = bool(metric.get("higher_is_better", True))
        line["detector"] = metric.get("detector") or ""
        found.append(line)
    for name, value in record.cost.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            unit = "seconds" if "seconds" in name else "bytes" if name.endswith("bytes") else "count"
            found.append({"metric": f"{COST}{name}", "value": value, "unit": unit, "higher_is_better": False})
    if _TO_UA95 in record.cost and record.cost[_TO_UA95] is None:
        never = {"never": 1, "more_than": math.inf, "unit": "seconds", "higher_is_better": False}
        found.append({"metric": f"{COST}{_TO_UA95}", **never})
    return found


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a row and metric: the mean over seeds, `seeds` (how many), `n` (of all of them) and an interval.

    One seed: the record's own interval, which is about pictures. Several: the wider, on each side, of two. Student's t
    over the seeds says how far another seed of the method would move the mean; with few seeds that happen to agree it
    is too narrow. The runs' own intervals, combined by MOVER (`_mean`), say how far other pictures would. Rates are
    cut at 0 and 1, costs at 0. Where some seed never came to its end there is no mean (`never` is their share): that of
    the others would make a method look fast that mostly does not get there.
    """
    return _mean(frame, [*ROW, "metric"], t=True).rename(columns={"count": "seeds"})


def over_concepts(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a protocol, method, variant and metric: the mean over concepts of what `over_seeds` gives, `concepts`
    (how many), and MOVER's interval: the concepts are those that were chosen, not a sample of others. Those of an axis
    ask for what is retained with the same prompts and seeds; the distances of such numbers are added up, as if the
    concepts' errors were one and the same: an upper bound. No mean where a concept has none (`never`)."""
    keys = [*MEAN, "metric"]
    found = _mean(rows, keys, t=False).rename(columns={"count": "concepts"})
    seeds = rows.groupby(keys, sort=False)["seeds"].max().reset_index()
    return found.merge(seeds, on=keys)


def unedited(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a protocol, concept and metric: the unedited model's number, as `over_seeds` gives an edited one's. The
    runs of a seed share it; where they differ (another device painted), their mean counts."""
    keys = ["protocol", "concept", "seed", "metric", "unit", "higher_is_better", "detector"]
    base = frame.dropna(subset=["base"])
    by_seed = base.groupby(keys, sort=False)[["base", "base_low", "base_high", "n"]].mean().reset_index()
    by_seed = by_seed.rename(columns={"base": "value", "base_low": "low", "base_high": "high"})
    by_seed["base"] = by_seed["value"]
    by_seed["method"] = by_seed["variant"] = ""
    return over_seeds(by_seed.assign(never=0.0, more_than=np.nan, stopped=0.0))


def unedited_over_concepts(base: pd.DataFrame) -> pd.DataFrame:
    """`over_concepts` of `unedited`. No n of what concepts share: the sum would count the same pictures repeatedly."""
    found = over_concepts(base)
    found["n"] = found["n"].mask(found["metric"].str.startswith(_SHARED))
    return found


def _mean(frame: pd.DataFrame, keys: Sequence[str], t: bool) -> pd.DataFrame:
    below, above = frame["value"] - frame["low"], frame["high"] - frame["value"]
    spread = frame.assign(below=below**2, above=above**2, whole_below=below, whole_above=above)
    grouped = spread.groupby(list(keys), sort=False, dropna=False)
    found = grouped.agg(
        value=("value", "mean"),
        deviation=("value", "std"),
        count=("value", "size"),
        known=("low", "count"),
        below=("below", "sum"),
        above=("above", "sum"),
        whole_below=("whole_below", "sum"),
        whole_above=("whole_above", "sum"),
        never=("never", "mean"),
        more_than=("more_than", "min"),
        stopped=("stopped", "sum"),
        n=("n", "sum"),
        base=("base", "mean"),
        unit=("unit", "first"),
        higher_is_better=("higher_is_better", "first"),
        detector=("detector", "first"),
    ).reset_index()
    # MOVER (Zou and Donner 2008, Statistics in Medicine 27, section 2): the distances from the estimates to their
    # limits add up like standard errors, each side by itself, so that intervals of rates stay lopsided.
    found["value"] = found["value"].where(found["never"] == 0)
    whole = found["known"] == found["count"]
    below, above = np.sqrt(found["below"]), np.sqrt(found["above"])
    if not t:
        shared = found["metric"].str.startswith(_SHARED)
        below, above = below.mask(shared, found["whole_below"]), above.mask(shared, found["whole_above"])
    low = (found["value"] - below / found["count"]).where(whole)
    high = (found["value"] + above / found["count"]).where(whole)
    if t:
        several = found["count"] > 1
        half = found["count"].map(lambda k: t95(k - 1) / math.sqrt(k) if k > 1 else np.nan) * found["deviation"]
        low = low.where(~several, np.fmin(low, found["value"] - half))
        high = high.where(~several, np.fmax(high, found["value"] + half))
    rate = found["unit"] == "rate"
    at_least_0 = rate | found["unit"].isin(_AT_LEAST_0)
    found["low"], found["high"] = low.mask(at_least_0, low.clip(lower=0)), high.mask(rate, high.clip(upper=1))
    return found.drop(columns=["deviation", "known", "below", "above", "whole_below", "whole_above"])


def t95(freedom: int) -> float:
    """The factor of a two-sided 95 % interval by Student's t. Beyond 30 degrees of freedom by the first three terms of
    its Cornish-Fisher expansion, which are then right to 0.001."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def levelled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (n, k) in which those of a column that differ in the last digits only are one number, the least of them.

    To round them would not do: a value may lie on the edge between two rounded ones, as 189/192 with five digits.
    """
    found = np.array(values, dtype=np.float64)
    for column in found.T:
        for before, here in pairwise(np.argsort(column, kind="stable")):
            if column[here] - column[before] <= _ALIKE * max(1.0, abs(column[here])):
                column[here] = column[before]
    return found


def pareto_ranks(points: NDArray[np.float64]) -> list[int | None]:
    """The front on which each point (n, objectives), all to be large, lies: 1 if no other is at least as good in all
    and better in one, 2 if so without those of 1, and so on; None for a point with a NaN. Values are `levelled`."""
    points = levelled(points)
    ranks: list[int | None] = [None] * len(points)
    left = [i for i in range(len(points)) if not np.isnan(points[i]).any()]
    rank = 0
    while left:
        rank += 1
        own = points[left]
        # (i, j): j is at least as good as i in all, and better in one
        beaten = np.all(own[None] >= own[:, None], axis=2) & np.any(own[None] > own[:, None], axis=2)
        front = [left[k] for k in np.flatnonzero(~beaten.any(axis=1))]
        for i in front:
            ranks[i] = rank
        left = [i for i in left if ranks[i] is None]
    return ranks


def ranked(table: pd.DataFrame, by: Sequence[str], retention: str = RETENTION) -> pd.DataFrame:
    """`by` and `rank`: each row's Pareto rank in UA and retention among those of the same protocol, and concept if `by`
    has it; none for a row that lacks one of the two."""
    found = table[table["metric"].isin([UA, retention])]
    good = found["value"].where(found["higher_is_better"].astype(bool), -found["value"])
    wide = found.assign(value=good).set_index([*by, "metric"])["value"].unstack("metric")
    for name in (UA, retention):
        if name not in wide:
            wide[name] = np.nan
    groups = [name for name in by if name in ("protocol", "concept")]
    found = wide.reset_index()
    found["rank"] = pd.array([None] * len(found), dtype="Int64")
    for _, part in found.groupby(groups, sort=False):
        ranks = pareto_ranks(part[[UA, retention]].to_numpy(dtype=float))
        found.loc[part.index, "rank"] = pd.array(ranks, dtype="Int64")
    return found[[*by, "rank"]]


def scored(table: pd.DataFrame, by: Sequence[str], weights: Mapping[str, float]) -> pd.DataFrame:
    """`by` and `score`: the weighted mean of rates, one minus the rate where lower is better; NaN where one is not
    measured."""
    found = table[table["metric"].isin(list(weights))]
    good = found["value"].where(found["higher_is_better"].astype(bool), 1 - found["value"])
    weight = found["metric"].map(dict(weights)).where(good.notna())
    parts = found.assign(part=good * weight, weight=weight)
    whole = parts.groupby(list(by), sort=False)[["part", "weight"]].sum().reset_index()
    total = sum(weights.values())
    # By the weights that were found, so that a row without one of the rates has no score rather than a low one.
    whole["score"] = (whole["part"] / total).where(np.isclose(whole["weight"], total))
    return whole[[*by, "score"]]


def over_all_concepts(means: pd.DataFrame, gathered: Gathered) -> pd.DataFrame:
    """The means without the values of those that lack a concept of their protocol: they answer another question, and
    are neither ranked nor scored."""
    of = {i: {row.concept for row in gathered.rows if row.protocol == i} for i in range(len(gathered.protocols))}
    # Each concept counts once in a mean, so that as many are the same ones.
    whole = means["concepts"] == means["protocol"].map({i: len(concepts) for i, concepts in of.items()})
    return means.assign(value=means["value"].where(whole))


# --- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What a report shows. runs: `numbers`; rows, base: over seeds; means, base_means: of those over concepts.

    row_ranks, mean_ranks: `rank`, and `score` if weights were given, of each row. weights: of the score, may be empty.
    """

    gathered: Gathered
    runs: pd.DataFrame
    rows: pd.DataFrame
    base: pd.DataFrame
    means: pd.DataFrame
    base_means: pd.DataFrame
    row_ranks: pd.DataFrame
    mean_ranks: pd.DataFrame
    retention: str
    weights: Mapping[str, float]

    @property
    def metrics(self) -> list[str]:
        """Names, in the records' order, costs last."""
        names = list(dict.fromkeys(self.runs["metric"]))
        return sorted(names, key=lambda name: name.startswith(COST))


def summarized(gathered: Gathered, retention: str = RETENTION, weights: Mapping[str, float] | None = None) -> Summary:
    """Raises UserError for a retention metric or a part of the score that no record has or that is no rate."""
    runs, weights = numbers(gathered), dict(weights or {})
    units = dict(zip(runs["metric"], runs["unit"], strict=True))
    asked = ([("--retention", retention)] if retention != RETENTION else []) + [("--score", name) for name in weights]
    for option, name in asked:
        rates = [known for known, unit in units.items() if unit == "rate"]
        if name not in units:
            raise UserError(f"{option} {name}: no record has it{nearest(name, rates)}; there are: {', '.join(rates)}")
        if option == "--score" and units[name] != "rate":
            raise UserError(f"--score {name}: a {units[name]}; only rates (0 to 1) can be added up: {', '.join(rates)}")
    rows, base = over_seeds(runs), unedited(runs)
    means, base_means = over_concepts(rows), unedited_over_concepts(base)
    ranks = []
    for table, by in ((rows, ROW), (over_all_concepts(means, gathered), MEAN)):
        found = ranked(table, by, retention).assign(score=np.nan)
        if weights:
            found = found.drop(columns="score").merge(scored(table, by, weights), on=by, how="left")
        ranks.append(found)
    return Summary(gathered, runs, rows, base, means, base_means, ranks[0], ranks[1], retention, weights)


def in_order(ranks: pd.DataFrame, table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The ranks, best first within protocol (and concept): by score if there is one, else by Pareto rank and UA; rows
    without a rank last."""
    ua = table[table["metric"] == UA][[*by, "value"]].rename(columns={"value": "ua"})
    groups = [name for name in by if name in ("protocol", "concept")]
    names = [name for name in by if name not in groups]
    found = ranks.merge(ua, on=list(by), how="left")
    found["rank_"] = found["rank"].astype("float64")
    return found.sort_values(
        [*groups, "score", "rank_", "ua", *names],
        ascending=[True] * len(groups) + [False, True, False] + [True] * len(names),
        na_position="last",
    ).drop(columns="rank_")
