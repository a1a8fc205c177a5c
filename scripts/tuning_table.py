"""The trials of a method's tuning as one CSV file, from the records that `unpaint run +sweep=tune` left.

    python scripts/tuning_table.py outputs > docs/tuning.csv

One line a run. `ua` is that of the edited model; `kept_in_domain` and `kept_cross_domain` are its IRA and CRA over
those of the unedited one. `options` are those of the method that all its trials do not share.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from unpaint.errors import UserError
from unpaint.results import FILE_NAME, RunRecord


def trials(folder: Path) -> pd.DataFrame:
    """All complete records below the folder, by method, options and concept. Raises UserError if there are none."""
    found = [RunRecord.load(file) for file in sorted(folder.rglob(FILE_NAME))]
    records = [record for record in found if record.status == "complete"]
    if not records:
        raise UserError(f"no complete run below '{folder}'; unpaint run +sweep=tune outputs={folder} makes them")
    options = pd.DataFrame([_flat(record.config["method"]) for record in records])
    rows = [_row(record) for record in records]
    for method in {record.method for record in records}:
        own = [i for i, record in enumerate(records) if record.method == method]
        varied = [key for key in options if options.loc[own, key].astype(str).nunique() > 1]
        for i in own:
            rows[i]["options"] = " ".join(f"{key}={options.loc[i, key]}" for key in varied)
    return pd.DataFrame(rows).sort_values(["method", "options", "concept"], ignore_index=True)


def _flat(options: dict[str, Any], above: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: str(value)}
    return flat


def _row(record: RunRecord) -> dict[str, Any]:
    metrics = record.metrics
    return {
        "method": record.method,
        "options": "",
        "concept": record.concept,
        "seed": record.seed,
        "ua": metrics["erasure/ua"]["value"],
        "n_ua": metrics["erasure/ua"]["n"],
        "kept_in_domain": metrics["retention/ira"]["value"] / metrics["retention/ira"]["base"],
        "kept_cross_domain": metrics["retention/cra"]["value"] / metrics["retention/cra"]["base"],
        "erase_seconds": record.cost["erase_seconds"],
        "changed_parameters": record.cost["changed_parameters"],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    trials(Path(sys.argv[1])).round(4).to_csv(sys.stdout, index=False)
