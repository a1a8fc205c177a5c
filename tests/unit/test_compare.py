"""Comparing: what may be averaged is, what may not is kept apart, nothing is lost, and numbers are the records'."""

import hashlib
import io
import json
import math
import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from unpaint.compare import compare, compare_two, outputs_of, weights_of
from unpaint.concepts import Concept
from unpaint.edit_header import METADATA_KEY
from unpaint.errors import UserError
from unpaint.evaluation.pictures import Batch, PictureStore, batches_of
from unpaint.report import tables
from unpaint.report.aggregate import (
    Summary,
    numbers,
    over_concepts,
    over_seeds,
    pareto_ranks,
    summarized,
    t95,
    unedited,
)
from unpaint.report.gather import Run, flat, gather, run_of
from unpaint.report.page import page_data, write_page
from unpaint.report.pair import independent, paired
from unpaint.report.wall import Wall, wall
from unpaint.results import RunRecord

CONCEPT: dict[str, Any] = {
    "_target_": "unpaint.concepts.Concept",
    "name": "cat",
    "kind": "individual",
    "axis": "object",
    "labels": ["object/cat"],
    "target": "a cat",
    "anchor": "a dog",
    "templates": ["{concept}"],
    "neighbours": ["object/dog"],
    "evaluation": {
        "templates": ["{concept} {place}", "a picture of {concept} {place}"],
        "slots": {"place": {"setting/snow": "in the snow", "setting/beach": "on a beach"}},
        "in_domain": {"object/dog": "a dog", "object/bird": "a bird"},
        "target_pictures": 4,
        "per_label": 2,
    },
}
SAMPLER = {"_target_": "unpaint.sampling.Sampler", "steps": 25, "guidance": 4.0, "eta": 0.0}


def metric(value: float | None, low: float | None = 0.0, high: float | None = 1.0, **more: Any) -> dict[str, Any]:
    found = {"value": value, "low": low, "high": high, "n": 96, "base": 0.02, "base_low": 0.01, "base_high": 0.05}
    return (
        found | {"unit": "rate", "higher_is_better": True, "detector": "judge-1", "title": "“{target}” is gone"} | more
    )


def record(
    method: str = "esd", concept: str = "cat", seed: int = 0, ua: float = 0.9, ira: float = 0.95, **changes: Any
) -> RunRecord:
    """A record of its own run_id; `steps` is the sampler's, `lr` the method's."""
    steps, lr = changes.pop("steps", 25), changes.pop("lr", 1e-3)
    content: dict[str, Any] = {
        "run_id": hashlib.sha256(repr((method, concept, seed, steps, lr, changes)).encode()).hexdigest()[:12],
        "status": "complete",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:02:00+00:00",
        "method": method,
        "concept": concept,
        "model": "picturebook",
        "seed": seed,
        "config": {
            "seed": seed,
            "model": {"name": "picturebook", "path": None, "dtype": "float32"},
            "method": {"_target_": f"unpaint.methods.{method}.X", "name": method, "lr": lr},
            "concept": CONCEPT | {"name": concept},
            "evaluator": {"sampler": SAMPLER | {"steps": steps}, "batch_size": 2, "metrics": {}},
        },
        "cost": {"erase_seconds": 10.0, "seconds_to_ua95": None, "edit_bytes": 2048},
        "metrics": {
            "erasure/ua": metric(ua, max(0, ua - 0.05), min(1, ua + 0.05)),
            "retention/ira": metric(ira, max(0, ira - 0.04), min(1, ira + 0.04), base=0.99),
        },
        "environment": {"unpaint": "0.1.0"},
    }
    return RunRecord(**content | changes)


def kept(outputs: Path, *records: RunRecord) -> list[Path]:
    folders = [outputs / r.model / r.concept / r.method / r.run_id for r in records]
    for one, folder in zip(records, folders, strict=True):
        one.save(folder)
    return folders


def summary_of(outputs: Path, *records: RunRecord, **options: Any) -> Summary:
    kept(outputs, *records)
    return summarized(gather(outputs), **options)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def line(value: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    place = {"protocol": 0, "concept": "cat", "method": "esd", "variant": "", "seed": 0, "metric": "erasure/ua"}
    known = {"n": 10.0, "base": 0.1, "base_low": 0.0, "base_high": 0.2}
    known |= {"never": 0.0, "more_than": np.nan, "stopped": 0.0}
    unit = {"unit": "rate", "higher_is_better": True, "detector": "judge-1"}
    return place | known | unit | {"value": value, "low": low, "high": high} | more


def test_one_seed_keeps_its_own_interval_and_several_get_the_wider() -> None:
    alone = over_seeds(pd.DataFrame([line(0.9, 0.8, 0.95)])).iloc[0]
    assert (alone["value"], alone["low"], alone["high"], alone["seeds"]) == pytest.approx((0.9, 0.8, 0.95, 1))
    # 0.85 +- 12.706 * s / sqrt(2) with s = 0.02 * sqrt(1/2): Student's t is the wider
    two = over_seeds(pd.DataFrame([line(0.84, 0.82, 0.86), line(0.86, 0.84, 0.88, seed=1)])).iloc[0]
    half = 12.706 * 0.0141421 / math.sqrt(2)
    assert (two["value"], two["low"], two["high"]) == pytest.approx((0.85, 0.85 - half, 0.85 + half), abs=1e-5)
    assert two["n"] == 20
    # three seeds that agree: t says there is no doubt, the pictures say there is
    three = over_seeds(pd.DataFrame([line(0.9, 0.8, 0.95, seed=i) for i in range(3)])).iloc[0]
    assert (three["low"], three["high"]) == pytest.approx((0.9 - 0.1 / math.sqrt(3), 0.9 + 0.05 / math.sqrt(3)))
    assert over_seeds(pd.DataFrame([line(0.1, 0, 0.2), line(0.9, 0.8, 1, seed=1)])).iloc[0]["low"] == 0


def test_costs_have_an_interval_only_from_seeds() -> None:
    cost = {"metric": "cost/erase_seconds", "unit": "seconds", "n": np.nan, "higher_is_better": False}
    lines = [line(v, np.nan, np.nan, seed=i, **cost) for i, v in enumerate((10.0, 14.0))]
    assert np.isnan(over_seeds(pd.DataFrame(lines[:1])).iloc[0]["low"])
    two = over_seeds(pd.DataFrame(lines)).iloc[0]
    # The half-width is 12.706 * sqrt(8) / sqrt(2) = 25.4, and no time is below 0.
    assert (two["value"], two["low"], two["high"]) == pytest.approx((12.0, 0.0, 12 + 25.412))


def test_the_mean_over_concepts_adds_the_sides_up_like_standard_errors() -> None:
    rows = over_seeds(pd.DataFrame([line(0.9, 0.8, 0.93), line(0.7, 0.6, 0.74, concept="dog")]))
    mean = over_concepts(rows).iloc[0]
    assert mean["value"] == pytest.approx(0.8)
    assert mean["low"] == pytest.approx(0.8 - math.hypot(0.1, 0.1) / 2)
    assert mean["high"] == pytest.approx(0.8 + math.hypot(0.03, 0.04) / 2)
    assert mean["concepts"] == 2


def test_what_concepts_retain_is_asked_for_with_the_same_prompts_so_the_sides_add_up(tmp_path: Path) -> None:
    two = [line(0.9, 0.8, 0.93), line(0.7, 0.6, 0.74, concept="dog")]
    for name in ("retention/ira", "fidelity/fid"):
        mean = over_concepts(over_seeds(pd.DataFrame([one | {"metric": name} for one in two]))).iloc[0]
        # As if both were off by the same pictures: (0.1 + 0.1) / 2 below, (0.03 + 0.04) / 2 above.
        assert (mean["value"], mean["low"], mean["high"]) == pytest.approx((0.8, 0.7, 0.835))
        # Two edited models painted them, so there are 20 pictures.
        assert mean["n"] == 20
    # The unedited model painted what both concepts retain once; of the targets each concept has its own.
    base = summary_of(tmp_path, record(), record(concept="dog")).base_means.set_index("metric")
    assert base.loc["erasure/ua", "n"] == 192
    assert np.isnan(base.loc["retention/ira", "n"])


def test_the_unedited_models_number_is_counted_once_a_seed() -> None:
    lines = [line(0.9, 0.8, 1, method=m, seed=s, base=0.1 + s / 10) for m in ("esd", "uce") for s in (0, 1)]
    base = unedited(pd.DataFrame(lines)).iloc[0]
    assert (base["value"], base["seeds"], base["n"]) == pytest.approx((0.15, 2, 20))


@pytest.mark.parametrize(("freedom", "factor"), [(1, 12.706), (9, 2.262), (30, 2.042), (40, 2.021), (120, 1.980)])
def test_students_t(freedom: int, factor: float) -> None:
    assert t95(freedom) == pytest.approx(factor, abs=0.0015)


def test_pareto_ranks_by_hand() -> None:
    points = [(0.9, 0.9), (1.0, 0.5), (0.9, 0.8), (0.2, 0.2), (0.9, 0.9), (np.nan, 1.0)]
    assert pareto_ranks(np.array(points)) == [1, 1, 2, 3, 1, None]
    # Equal but for the last bits, and for the sixth digit of a kept record, also on the edge of two rounded numbers.
    points = [(0.1 + 0.2, 0.984375), (0.3, (0.979167 + 0.989584) / 2), (0.3, 0.9), (0.29999, 0.9)]
    assert pareto_ranks(np.array(points)) == [1, 1, 2, 3]
    # Not by steps: of three that are each a hair apart the last is another number.
    steps = [(0.5, 0.5), (0.5 + 4e-6, 0.5), (0.5 + 8e-6, 0.5)]
    assert pareto_ranks(np.array(steps)) == [2, 2, 1]


def test_equal_means_of_kept_records_share_a_front_and_the_page_draws_it(tmp_path: Path) -> None:
    # UA is 2/3 for both, of three seeds and of one; IRA is better for the second.
    three = [record("esd", seed=seed, ua=ua, ira=0.99) for seed, ua in enumerate((0.583333, 0.666667, 0.75))]
    summary = summary_of(tmp_path, *three, record("uce", ua=0.666667, ira=0.995), record("trust", ua=0.666667, ira=0.9))
    assert summary.rows[summary.rows["metric"] == "erasure/ua"]["value"].nunique() == 2
    ranks = summary.row_ranks.set_index("method")["rank"]
    assert (ranks["uce"], ranks["esd"], ranks["trust"]) == (1, 2, 3)
    data = page_data(summary, Wall())
    x = [entry["name"] for entry in data["metrics"]].index("erasure/ua")
    lines = data["tables"][0]["lines"]
    assert len({one["cells"][x][0] for one in lines}) == 1
    assert {one["cells"][x][3] for one in lines} == {"66.7"}


def test_what_is_better_lower_is_ranked_so(tmp_path: Path) -> None:
    far, near = record("uce"), record("esd", ua=0.8)
    for one, fid in ((far, 30.0), (near, 40.0)):
        one.metrics["fidelity/fid"] = metric(fid, fid - 1, fid + 1, unit="distance", higher_is_better=False)
    ranks = summary_of(tmp_path, far, near, retention="fidelity/fid").row_ranks.set_index("method")["rank"]
    assert (ranks["uce"], ranks["esd"]) == (1, 2)


def test_a_mean_over_fewer_concepts_is_not_ranked(tmp_path: Path) -> None:
    records = [record("esd", "cat"), record("esd", "dog"), record("uce", "cat", ua=1.0, ira=1.0)]
    summary = summary_of(tmp_path, *records)
    ranks = summary.mean_ranks.set_index("method")["rank"]
    assert ranks["esd"] == 1
    assert pd.isna(ranks["uce"])
    weighed = summarized(summary.gathered, weights={"erasure/ua": 1.0})
    assert list(weighed.mean_ranks.set_index("method")["score"].isna()[["esd", "uce"]]) == [False, True]
    assert any("uce: no run on dog (seed 0)" in fault.text for fault in summary.gathered.faults)


def test_as_many_concepts_are_not_the_same_ones_and_retention_counts_too(tmp_path: Path) -> None:
    # Two concepts each, but not the same two of three: no row has all, and none is ranked or scored.
    pairs = {"esd": ("cat", "dog"), "uce": ("dog", "bird")}
    records = [record(method, concept) for method, concepts in pairs.items() for concept in concepts]
    summary = summary_of(tmp_path, *records, weights={"erasure/ua": 1.0})
    assert summary.mean_ranks["rank"].isna().all() and summary.mean_ranks["score"].isna().all()
    assert summary.row_ranks["rank"].notna().all() and summary.row_ranks["score"].notna().all()
    # UA of both concepts, IRA of one: no rank, a score of UA alone, none of both.
    lacks = record("trust", "dog")
    del lacks.metrics["retention/ira"]
    both = [record("esd", "cat"), record("esd", "dog"), record("trust", "cat"), lacks]
    found = summary_of(tmp_path / "lacks", *both, weights={"erasure/ua": 1.0})
    ranks = found.mean_ranks.set_index("method")
    assert ranks.loc["esd", "rank"] == 1 and pd.isna(ranks.loc["trust", "rank"])
    assert ranks.loc["trust", "score"] == pytest.approx(0.9)
    weights = {"erasure/ua": 1.0, "retention/ira": 1.0}
    scores = summarized(found.gathered, weights=weights).mean_ranks.set_index("method")["score"]
    assert scores["esd"] == pytest.approx(0.925) and pd.isna(scores["trust"])


# --- what may be compared ---------------------------------------------------------------------------------------------


def test_nothing_is_dropped_unsaid(tmp_path: Path) -> None:
    folders = kept(
        tmp_path,
        record("esd"),
        record("uce", status="failed", metrics={}),
        record("trust", status="interrupted", metrics={}, environment={}),
        record("sepme"),
        record("doco"),
    )
    (folders[3] / "record.json").write_text('{"schema": 1, ')
    content = json.loads((folders[4] / "record.json").read_text())
    (folders[4] / "record.json").write_text(json.dumps(content | {"schema": 7}))
    erased = tmp_path / "picturebook" / "cat" / "salun" / "0" / "edit.safetensors"
    erased.parent.mkdir(parents=True)
    erased.write_bytes(b"")
    found = gather(tmp_path)
    told = {fault.kind: fault.text for fault in found.faults}
    assert "is damaged" in " ".join(fault.text for fault in found.faults if fault.kind == "unreadable")
    assert "has schema 7" in " ".join(fault.text for fault in found.faults if fault.kind == "unreadable")
    assert "uce on cat, seed 0: failed" in told["failed"]
    assert "trust on cat, seed 0: not finished" in told["interrupted"]
    assert "erased, but not evaluated" in told["not evaluated"]
    assert all("\n" not in fault.text for fault in found.faults)
    assert [row.method for row in found.rows] == ["esd", "trust", "uce"]
    text = (compare(tmp_path, pictures=False)["Markdown"]).read_text()
    assert "| uce | – | 0, 1 failed | – |" in text
    assert "has schema 7" in text


def test_an_empty_folder_and_no_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        gather(tmp_path / "outputs")
    with pytest.raises(UserError, match=r"no record\.json in it"):
        gather(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        gather(tmp_path)


def of_kind(kind: dict[str, Any]) -> RunRecord:
    one = record("uce", "other")
    one.config["concept"] |= kind
    return one


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (record("uce", steps=50), "sampler.steps: 50, not 25"),
        (record("uce", metrics={"erasure/ua": metric(0.9, detector="judge-2")}), "detector of erasure/ua: judge-2"),
        (record("uce", metrics={"erasure/ua": metric(0.9, n=32)}), "cat: n of erasure/ua: 32, not 96"),
        (record("uce", model="sd15"), "model: sd15, not picturebook"),
        (record("uce", environment={"unpaint": "0.2.0"}), "unpaint: 0.2.0, not 0.1.0"),
        (of_kind({"kind": "conditional"}), "kind: conditional, not individual"),
        (of_kind({"members": {"cat": CONCEPT, "dog": CONCEPT}}), "kind: set, not individual"),
    ],
)
def test_what_was_not_measured_alike_is_kept_apart_and_says_why(tmp_path: Path, other: RunRecord, reason: str) -> None:
    found = gather_of(tmp_path, record("esd"), record("esd", seed=1), other)
    assert [len(protocol.runs) for protocol in found.protocols] == [2, 1]
    assert reason in "; ".join(found.protocols[1].unlike(found.protocols[0]))
    summary = summarized(found)
    assert reason in tables.apart(summary)[0]
    assert set(summary.rows[summary.rows["protocol"] == 0]["method"]) == {"esd"}


def gather_of(outputs: Path, *records: RunRecord) -> Any:
    kept(outputs, *records)
    return gather(outputs)


def test_other_prompts_are_another_protocol_but_other_concepts_are_not(tmp_path: Path) -> None:
    other = record("uce")
    other.config = json.loads(json.dumps(other.config))
    other.config["concept"]["evaluation"]["templates"] = ["{concept} {place}"]
    other.config["concept"]["templates"] = ["only for methods: {concept}"]
    found = gather_of(tmp_path, record("esd"), record("esd", seed=1), record("esd", "dog"), other)
    assert [len(protocol.runs) for protocol in found.protocols] == [3, 1]
    reasons = found.protocols[1].unlike(found.protocols[0])
    assert [reason.partition(": [")[0] for reason in reasons] == ["cat: evaluation.templates"]


def test_seeds_are_averaged_and_settings_are_not(tmp_path: Path) -> None:
    found = gather_of(tmp_path, record(lr=1e-3), record(lr=1e-3, seed=1), record(lr=1), record(method="uce"))
    assert [(row.name, list(row.runs)) for row in found.rows] == [
        ("esd (lr=0.001)", [0, 1]),
        ("esd (lr=1)", [0]),
        ("uce", [0]),
    ]
    # a method that was given other settings for another concept is still one method
    tuned = gather_of(tmp_path / "tuned", record(lr=1e-3), record(concept="dog", lr=0.5))
    assert [row.name for row in tuned.rows] == ["esd", "esd"]
    assert flat({"a": {"b": 2.0, "c": [1]}}) == {"a.b": 2, "a.c": "[1]"}


def test_two_evaluators_of_one_seed_complete_each_other(tmp_path: Path) -> None:
    more = {"erasure/ua": metric(0.9, 0.85, 0.95), "fidelity/fid": metric(12.0, 10, 14, unit="distance", n=176)}
    standard = record(run_id="b" * 12, metrics=more)
    standard.config = standard.config | {"evaluator": standard.config["evaluator"] | {"metrics": {"fid": {}}}}
    rows = summary_of(tmp_path, record(), standard).rows
    assert list(rows["seeds"]) == [1] * len(rows)
    assert {"erasure/ua", "retention/ira", "fidelity/fid"} <= set(rows["metric"])


def attacked(run_id: str, **evaluator: Any) -> RunRecord:
    """A run whose evaluator has these keys, too; with an attack, its rate is in the record."""
    more = {"attack/noise/asr": metric(0.5, n=16, higher_is_better=False)} if evaluator.get("attacks") else {}
    if evaluator.get("relearning"):
        more["restoration/relearning"] = metric(40.0, unit="steps", low=None, high=None, base=None)
    one = record(run_id=run_id * 12)
    one.metrics = one.metrics | more
    one.config = one.config | {"evaluator": one.config["evaluator"] | evaluator}
    return one


def test_runs_that_differ_in_attacks_or_relearning_are_not_the_same_run(tmp_path: Path) -> None:
    attacks, relearning = {"noise": {"name": "noise", "prompts": 16}}, {"steps": 200}
    summary = summary_of(
        tmp_path, attacked("a"), attacked("b", attacks=attacks), attacked("c", attacks={}, relearning=relearning)
    )
    assert summary.gathered.faults == []
    (row,) = summary.gathered.rows
    assert [run.record.run_id[0] for run in row.runs[0]] == ["c", "a", "b"]
    assert {"attack/noise/asr", "restoration/relearning", "erasure/ua"} <= set(summary.rows["metric"])
    assert set(summary.rows["seeds"]) == {1}


def test_other_options_of_an_attack_or_a_metric_are_kept_apart_and_nothing_is_dropped(tmp_path: Path) -> None:
    few, many = ({"noise": {"name": "noise", "title": str(prompts), "prompts": prompts}} for prompts in (16, 48))
    found = gather_of(tmp_path, attacked("a", attacks=few), attacked("b", attacks=many))
    assert found.faults == []
    assert found.protocols[1].unlike(found.protocols[0]) == ["attack/noise/asr: prompts: 48, not 16"]
    times = [attacked(name, metrics={"ua": {"name": "erasure/ua", "at_least": n}}) for name, n in (("a", 1), ("b", 2))]
    assert len(gather_of(tmp_path / "metrics", *times).protocols) == 2
    # Another title, and a key that an older record lacks, are no other question.
    old = attacked("a", attacks={"noise": {"name": "noise", "title": "noise", "prompts": 16}})
    new = attacked("b", attacks=few, relearning=None, control=None)
    assert [fault.kind for fault in gather_of(tmp_path / "twice", old, new).faults] == ["twice"]


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    old = record(ua=0.1, started="2025-01-01T00:00:00+00:00", run_id="a" * 12)
    summary = summary_of(tmp_path, record(ua=0.9), old)
    assert summary.rows.set_index("metric").loc["erasure/ua", "value"] == 0.9
    assert [fault.kind for fault in summary.gathered.faults] == ["twice"]


# --- order ------------------------------------------------------------------------------------------------------------


def test_a_score_only_if_asked_for_with_its_weights_said(tmp_path: Path) -> None:
    records = record("esd", ua=0.8, ira=1.0), record("uce", ua=1.0, ira=0.7)
    plain = summary_of(tmp_path, *records)
    assert plain.row_ranks["score"].isna().all()
    assert "no score unless you ask" in tables.order_in_words(plain)
    weighed = summary_of(tmp_path, weights=weights_of("erasure/ua=1,retention/ira=3"))
    scores = weighed.row_ranks.set_index("method")["score"]
    assert (scores["esd"], scores["uce"]) == pytest.approx((0.95, 0.775))
    assert "0.25 × UA + 0.75 × IRA" in tables.order_in_words(weighed)
    assert [line["method"] for line in next(tables.sections(weighed)).lines] == ["esd", "uce"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": {"erasure/uaa": 1.0}}, "did you mean erasure/ua"),
        ({"weights": {"cost/edit_bytes": 1.0}}, "only rates"),
        ({"retention": "retention/iraa"}, "--retention retention/iraa: no record has it; did you mean retention/ira"),
    ],
)
def test_a_metric_that_is_not_there_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        summary_of(tmp_path, record(), **options)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_the_table_cuts_no_name_and_no_number(tmp_path: Path, width: int) -> None:
    more = {f"erasure/{name}": metric(0.75, 0.65, 0.85) for name in ("ua", "ua_out_of_set")}
    more |= {f"retention/{name}": metric(0.875, 0.775, 0.975) for name in ("ira", "cra", "composition")}
    summary = summary_of(tmp_path, record("concept_prune", metrics=more), weights={"retention/composition": 1.0})
    console = Console(width=width, record=True, file=io.StringIO())
    tables.show(summary, {}, console)
    text = console.export_text()
    assert "concept_prune" in text
    assert "…" not in text
    assert re.search(r"75\.0.*87\.5", text)
    assert ("75.0 (65.0–85.0)" in text) == (width >= 80)
    head = next(row for row in text.splitlines() if "method" in row)
    assert head.count("composition") <= 1


@pytest.mark.parametrize("given", ["erasure/ua", "erasure/ua=x", "=1", "erasure/ua=-1", ""])
def test_a_weight_is_a_number_above_0(given: str) -> None:
    with pytest.raises(UserError, match="METRIC=WEIGHT"):
        weights_of(given)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_numbers_are_the_records_to_the_digit_shown(tmp_path: Path) -> None:
    rng = random.Random(7)
    records = [
        record(method, concept, ua=rng.random(), ira=rng.random())
        for method in ("esd", "uce", "trust")
        for concept in ("cat", "dog", "bird")
    ]
    summary = summary_of(tmp_path, *records)
    data = json.loads(json.dumps(page_data(summary, Wall())))
    names = [entry["name"] for entry in data["metrics"]]
    shown = {
        (table["concept"], line["method"], name): line["cells"][names.index(name)]
        for table in data["tables"]
        for line in table["lines"]
        for name in ("erasure/ua", "retention/ira")
    }
    written = pd.read_csv(tables.write_csv(summary, tmp_path / "c.csv")).set_index(["concept", "method", "metric"])
    markdown = tables.write_markdown(summary, tmp_path / "c.md").read_text()
    for one in rng.sample(records, 5):
        name = rng.choice(["erasure/ua", "retention/ira"])
        found = one.metrics[name]
        texts = [f"{100 * found[key]:.1f}" for key in ("value", "low", "high")]
        cell = shown[one.concept, one.method, name]
        assert cell[3:] == [texts[0], f"{texts[1]}–{texts[2]}", 96, 1]
        assert written.loc[(one.concept, one.method, name), "value"] == found["value"]
        part = markdown.partition(f"“{one.concept}” erased")[2].partition("## ")[0]
        assert f"{texts[0]} ({texts[1]}–{texts[2]})" in next(
            x for x in part.splitlines() if x.startswith(f"| {one.method} ")
        )


def test_the_page_asks_for_nothing_and_runs_nothing_that_a_record_says(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, record("<script>alert(1)</script>", "cat"))
    path = write_page(summary, Wall(), tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 8e6
    assert "<script>alert" not in page
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # Plotly's code names addresses that it never asks
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", own)
    assert "default-src 'none'" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert data["tables"][0]["lines"][0]["method"] == "<script>alert(1)</script>"


def test_a_cost_is_shown_with_its_unit() -> None:
    assert tables.text({"metric": "cost/erase_seconds", "value": 61.26}) == "61.3 s"
    assert tables.text({"metric": "cost/edit_bytes", "value": 3.0 * 2**20}) == "3.0 MiB"
    assert tables.text({"metric": "cost/optimizer_steps", "value": 1240.0}) == "1,240"
    assert tables.heading("attack/unlearn_diff/pre_asr") == "unlearn diff: ASR before"
    assert tables.interval({"metric": "erasure/ua", "low": 0.9, "high": None}) == ""


# --- pictures ---------------------------------------------------------------------------------------------------------


def painted(outputs: Path, folder: Path, one: RunRecord, edit: str, shade: int) -> list[Batch]:
    """The run's edit and pictures, as a run leaves them: the edited model's of one shade, the unedited one's black."""
    import torch

    from unpaint.sampling import Sampler

    header = {METADATA_KEY: json.dumps({"sha256": edit * 16})}
    save_file({"x": np.zeros(1, np.float32)}, folder / "edit.safetensors", metadata=header)
    concept = Concept(**{key: value for key, value in one.config["concept"].items() if key != "_target_"})
    batches = batches_of(concept.cases(one.seed), 2, Sampler(steps=25, guidance=4.0, eta=0.0))
    store = PictureStore(outputs / ".cache")
    for batch in batches:
        for key, value in (("base", 0), (f"base-{(edit * 16)[:12]}", shade)):
            store.keep_pictures(key, batch, torch.full((len(batch.cases), 3, 64, 64), value, dtype=torch.uint8))
    return batches


def test_the_wall_finds_the_pictures_that_the_runs_painted(tmp_path: Path) -> None:
    records = [record("esd"), record("uce"), record("trust")]
    folders = kept(tmp_path, *records)
    painted(tmp_path, folders[0], records[0], "aaaa", 100)
    painted(tmp_path, folders[1], records[1], "bbbb", 200)
    found = wall(gather(tmp_path))
    first = found.cards[0]
    assert (first.concept, first.seed, first.fate) == ("cat", 0, "to be erased")
    assert "a cat" in first.prompt
    # rows are in the order of the methods' names; trust has no pictures
    assert [row for row, _ in first.after] == [0, 2]
    assert found.without == 1
    assert {card.fate for card in found.cards} == {"to be erased", "to stay", "a near relative, to stay"}
    assert len({card.prompt for card in found.cards}) == len(found.cards)
    assert all(uri.startswith("data:image/webp;base64,") for uri in found.pictures)
    few = wall(gather(tmp_path), most=6)
    assert few.prompts[0] < few.prompts[1] == found.prompts[1]


# --- two runs ---------------------------------------------------------------------------------------------------------


def test_an_unpaired_difference_by_hand() -> None:
    a, b = {"value": 0.5, "low": 0.4, "high": 0.65}, {"value": 0.8, "low": 0.7, "high": 0.85}
    value, low, high = independent(a, b)
    assert (value, low, high) == pytest.approx((0.3, 0.3 - math.hypot(0.1, 0.15), 0.3 + math.hypot(0.05, 0.1)))
    assert math.isnan(independent(a, {"value": 0.8})[1])


def test_a_difference_is_paired_where_both_runs_painted_the_same(tmp_path: Path) -> None:
    import torch

    from unpaint.config import compose, instantiate

    sizes = ["concept.evaluation.target_pictures=4", "concept.evaluation.per_label=1", "evaluator.batch_size=2"]
    cfg = compose(["concept=cat", *sizes])
    evaluator = instantiate(cfg.evaluator)
    batches = [batch for batch in evaluator.plan(instantiate(cfg.concept), 0) if batch.cases[0].part == "target"]
    labels = list(evaluator.detector.labels)
    records = [record("esd", ua=0.0), record("uce", ua=1.0)]
    folders = kept(tmp_path, *records)
    runs = []
    for one, folder, edit, seen in zip(records, folders, ("aaaa", "bbbb"), (1.0, 0.0), strict=True):
        one.config = json.loads(json.dumps(asdict(one)["config"])) | {
            part: _container(cfg[part]) for part in ("concept", "evaluator")
        }
        one.metrics = {"erasure/ua": metric(1 - seen, n=4, detector=evaluator.detector.identity)}
        painted_by(folder, edit)
        for batch in batches:
            reading = torch.zeros(len(batch.cases), len(labels))
            reading[:, labels.index("object/cat")] = seen
            store = PictureStore(tmp_path / ".cache")
            store.keep_pictures(
                f"base-{(edit * 16)[:12]}", batch, torch.zeros(len(batch.cases), 3, 8, 8, dtype=torch.uint8)
            )
            store.keep_reading(f"base-{(edit * 16)[:12]}", evaluator.detector.identity, batch, reading)
        runs.append(run_of(one, folder))
    found = next(line for line in paired(gather(tmp_path), *runs).lines if line.name == "erasure/ua")
    # Agresti and Min: 4 pairs gained, none lost; centre 4/6, half 1.96 * sqrt(4.5 + 0.5 - 16/6) / 6
    half = 1.959964 * math.sqrt(5 - 16 / 6) / 6
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 4 / 6 - half, 1.0))
    assert (found.how, found.verdict, found.difference) == ("same pictures", "better", "+100.0")


def painted_by(folder: Path, edit: str) -> None:
    header = {METADATA_KEY: json.dumps({"sha256": edit * 16})}
    save_file({"x": np.zeros(1, np.float32)}, folder / "edit.safetensors", metadata=header)


def _container(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = kept(tmp_path, record("esd", ua=0.5, ira=1.0), record("uce", ua=0.9, ira=0.96, steps=50))
    files = compare_two(a, b, pictures=False)
    page = files["page"].read_text(encoding="utf-8")
    assert files["page"].parent == tmp_path / "compare" / f"{a.name}_{b.name}"
    assert "sampler.steps: 50, not 25" in page
    said = capsys.readouterr().out
    ua = next(one for one in said.splitlines() if one.strip().startswith("UA"))
    for part in ("50.0", "90.0", "+40.0", "better"):
        assert part in ua
    with pytest.raises(UserError, match="the same run"):
        compare_two(a, a)
    with pytest.raises(UserError, match="no record at"):
        compare_two(a, tmp_path)


def test_a_run_that_was_moved_lies_in_its_parent(tmp_path: Path) -> None:
    (folder,) = kept(tmp_path / "outputs", record())
    run = run_of(record(), folder)
    assert outputs_of(run) == tmp_path / "outputs"
    assert outputs_of(Run(run.record, tmp_path / "moved", {}, {})) == tmp_path


def test_numbers_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, record(metrics={"erasure/ua": metric(0.5), "pairs/erase_retain": metric(None)}))
    found = numbers(summary.gathered).set_index("metric")["never"]
    assert found.to_dict() == {
        "erasure/ua": 0,
        "cost/erase_seconds": 0,
        "cost/edit_bytes": 0,
        "cost/seconds_to_ua95": 1,
    }


def test_a_time_that_some_seed_never_reached_is_no_mean(tmp_path: Path) -> None:
    reached = {"seconds_to_ua95": 4.0, "erase_seconds": 10.0}
    never = reached | {"seconds_to_ua95": None}
    summary = summary_of(tmp_path, record(cost=reached), record(seed=1, cost=never), record("uce", cost=reached))
    times = summary.rows[summary.rows["metric"] == "cost/seconds_to_ua95"].set_index("method")
    assert times["value"].to_dict() == pytest.approx({"esd": np.nan, "uce": 4.0}, nan_ok=True)
    assert [tables.text(one) for one in times.reset_index().to_dict("records")] == ["not always", "4.0 s"]
    assert list(summary.rows[summary.rows["metric"] == "cost/erase_seconds"]["method"]) == ["esd", "uce"]
    # Nor is one over concepts, if it is there for some of them.
    concepts = [record(concept="dog", cost=never), record(cost=reached), record("uce", cost=reached)]
    found = summary_of(tmp_path / "concepts", *concepts, record("uce", "dog", cost=reached))
    means = found.means[found.means["metric"] == "cost/seconds_to_ua95"].to_dict("records")
    assert {one["method"]: tables.text(one) for one in means} == {"esd": "not always", "uce": "4.0 s"}
    rows = found.rows[found.rows["metric"] == "cost/seconds_to_ua95"].to_dict("records")
    assert {(one["method"], one["concept"]): tables.text(one) for one in rows}["esd", "dog"] == "never"


def relearned(run_id: str, value: int | None, back: bool | None, **changes: Any) -> RunRecord:
    one = record(run_id=run_id * 12, **changes)
    steps = metric(value, n=32, base=None, unit="steps", relearned=back)
    one.metrics = one.metrics | {"restoration/relearning": {k: v for k, v in steps.items() if k not in ("low", "high")}}
    return one


def test_what_did_not_come_back_is_no_number_of_steps(tmp_path: Path) -> None:
    records = [
        relearned("a", 20, True),
        relearned("b", 200, False, seed=1),
        relearned("c", 200, False, concept="dog"),
        # The unedited model never paints it: an old record says so with the number of steps.
        relearned("d", 200, None, concept="bird"),
        relearned("e", 40, True, method="uce"),
        relearned("f", 60, True, method="uce", seed=1),
        relearned("g", 100, True, method="uce", concept="dog"),
        relearned("h", None, None, method="uce", concept="bird"),
    ]
    summary = summary_of(tmp_path, *records)
    name = "restoration/relearning"
    rows = summary.rows[summary.rows["metric"] == name].to_dict("records")
    assert {(one["method"], one["concept"]): tables.text(one) for one in rows} == {
        ("esd", "cat"): "not always",
        ("esd", "dog"): "> 200",
        ("uce", "cat"): "50",
        ("uce", "dog"): "100",
    }
    means = summary.means[summary.means["metric"] == name].set_index("method")
    assert np.isnan(means.loc["esd", "value"]) and means.loc["uce", "value"] == 75
    data = json.loads(json.dumps(page_data(summary, Wall())))
    i = [entry["name"] for entry in data["metrics"]].index(name)
    dog = next(table for table in data["tables"] if table["concept"] == "dog")
    assert {one["method"]: one["cells"][i][0::3] for one in dog["lines"]} == {
        "esd": [None, "> 200", 1],
        "uce": [100.0, "100", 1],
    }
    lines = pd.read_csv(tables.write_csv(summary, tmp_path / "c.csv")).set_index(["concept", "method", "metric"])
    assert lines.loc[("dog", "esd", name), "more_than"] == 200


def test_two_runs_of_which_one_did_not_come_back_have_no_difference(tmp_path: Path) -> None:
    a, b = relearned("a", 20, True), relearned("b", 200, False, method="uce")
    folders = kept(tmp_path, a, b)
    runs = [run_of(one, folder) for one, folder in zip((a, b), folders, strict=True)]
    found = next(one for one in paired(gather(tmp_path), *runs).lines if one.name == "restoration/relearning")
    assert (found.a, found.b, found.difference, found.interval, found.verdict) == ("20", "> 200", "–", "–", "")


def test_the_parts_of_a_combination_are_explained(tmp_path: Path) -> None:
    whole = record("esd", metrics={"erasure/ua": metric(0.9), "pairs/second_only": metric(0.4, base=0.9)})
    assert any(note.startswith("first only, second only: ") for note in tables.notes(summary_of(tmp_path, whole)))


def test_fidelity_and_cost_have_a_table_beside_the_first(tmp_path: Path) -> None:
    def one(concept: str, seed: int, weights: int, fid: float) -> RunRecord:
        distance = metric(fid, fid - 1, fid + 1, base=11.0, unit="distance", higher_is_better=False)
        cost = {"optimizer_steps": 50, "changed_parameters": weights, "edit_bytes": 2048, "erase_seconds": 3.0}
        metrics = {"erasure/ua": metric(0.9), "fidelity/fid": distance}
        return record("esd", concept=concept, seed=seed, metrics=metrics, cost=cost)

    records = [one("cat", 0, 64_000, 15.0), one("cat", 1, 65_001, 15.0), one("dog", 0, 70_000, 17.0)]
    parts = tables.markdown(summary_of(tmp_path, *records))
    (price,) = [parts[i + 1] for i, part in enumerate(parts) if part == "Fidelity and cost:"]
    head, _, base, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in price.splitlines()]
    assert head == ["method", "FID", "optimiser steps", "weights it changed", "size of the edit"]
    assert base == ["unedited model", "11", "–", "–", "–"]
    assert row[2:] == ["50", "67,250", "2.0 KiB"] and row[1].startswith("16 (")


def test_a_rate_of_searches_that_were_stopped_says_so(tmp_path: Path) -> None:
    def one(method: str, stopped: int) -> RunRecord:
        asr = metric(0.4, 0.3, 0.5, n=16, higher_is_better=False, stopped=stopped)
        return record(method, metrics={"erasure/ua": metric(0.9), "attack/noise/asr": asr})

    summary = summary_of(tmp_path, one("esd", 2), one("uce", 0))
    text = "\n".join(tables.markdown(summary))
    assert "| ≥ 40.0 (30.0–50.0) |" in text and "| 40.0 (30.0–50.0) |" in text
    assert "the budget ended" in tables.notes(summary)[-1]
    assert len(tables.notes(summary_of(tmp_path / "none", one("uce", 0)))) == 2
