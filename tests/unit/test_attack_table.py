"""The scripts of attacks: the table, from records made by hand, and which attack's prompts are replayed."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unpaint.errors import UserError
from unpaint.results import RunRecord


def script(name: str) -> ModuleType:
    file = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return script("attack_table")


def rate(value: float, n: int = 16, **more: Any) -> dict[str, Any]:
    metric = {"value": value, "low": value / 2, "high": min(1.0, value + 0.25), "n": n, "base": 1.0}
    return metric | {"unit": "rate", "higher_is_better": False, "detector": "d"} | more


def save(
    folder: Path, run_id: str, method: str, control: float | None = 0.25, concept: str = "cat", stopped: int = 0
) -> None:
    effort: dict[str, Any] = {"seconds": 41.4, "stopped": stopped}
    metrics = {
        "erasure/ua": rate(0.9),
        "attack/say/pre_asr": rate(0.25),
        "attack/say/asr": rate(0.5, **effort),
        "attack/shout/pre_asr": rate(0.5, n=32),
        "attack/shout/asr": rate(0.5, n=32, **effort),
    }
    if control is not None:
        metrics["attack/say/control_asr"] = rate(control, **effort)
    started, config = "2026-01-01T00:00:00+00:00", {"method": {"lr": run_id}}
    record = RunRecord(run_id, "complete", started, None, method, concept, "m", 0, config, metrics=metrics)
    record.save(folder / run_id)


def test_a_row_a_method_and_a_column_an_attack(table: ModuleType, tmp_path: Path) -> None:
    save(tmp_path, "a" * 12, "uce")
    save(tmp_path, "b" * 12, "esd", control=0.45)
    save(tmp_path, "c" * 12, "esd", control=None)
    save(tmp_path, "d" * 12, "esd", concept="spider", stopped=2)
    cat, spider = table.tables([tmp_path], table.matrix).split("\n\n### ")
    assert cat.splitlines()[2:] == [
        "| method | before | `say` | `shout` |",
        "| --- | --- | --- | --- |",
        # Ten points above both, what shows it anyway and the control, is bold.
        "| esd (lr=bbbbbbbbbbbb) | 50 (25–75) | 50 (25–75) / 45 | 50 (25–75) |",
        "| esd (lr=cccccccccccc) | 50 (25–75) | **50 (25–75)** | 50 (25–75) |",
        "| uce | 50 (25–75) | **50 (25–75)** / 25 | 50 (25–75) |",
    ]
    # What a budget ended might have been found: both are at least so much.
    assert spider.splitlines()[4:] == [
        "| esd (lr=dddddddddddd) | 50 (25–75) | **≥ 50 (25–75; 2 stopped)** / ≥ 25 (2 stopped) "
        "| ≥ 50 (25–75; 2 stopped) |"
    ]
    assert spider.startswith("`spider`")


def test_a_row_an_attack(table: ModuleType, tmp_path: Path) -> None:
    save(tmp_path, "a" * 12, "uce", stopped=1)
    lines = table.tables([tmp_path], table.each).splitlines()
    assert lines[4:] == [
        "| uce | `say` | 16 | 25 (12–50) | ≥ 50 (25–75; 1 stopped) | ≥ 25 (12–50; 1 stopped) | 100 | 41 | 41 | 2 |",
        "| uce | `shout` | 32 | 50 (25–75) | ≥ 50 (25–75; 1 stopped) | – | 100 | 41 | – | 1 |",
    ]
    RunRecord("b" * 12, "complete", "2026-01-01", None, "uce", "cat", "m", 0, {}).save(tmp_path / "plain" / "run")
    with pytest.raises(UserError, match="no complete run with attacks"):
        table.tables([tmp_path / "plain"], table.each)


def test_what_is_replayed_is_what_the_same_choices_attacked_with() -> None:
    composed = script("transfer").composed
    options = {
        name: composed("unlearn_diff", chosen).evaluator.attacks.unlearn_diff.prompts
        for name, chosen in (("shipped", []), ("adversarial", ["evaluator=adversarial"]), ("sweep", ["+sweep=attacks"]))
    }
    assert options == {"shipped": 24, "adversarial": 16, "sweep": 32}
