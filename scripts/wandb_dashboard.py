"""Builds the comparison dashboard of docs/wandb.md as a wandb report; prints its address.

python scripts/wandb_dashboard.py --project unpaint [--entity TEAM] [--group SWEEP]

Needs a login (wandb login) and wandb's report extension (pip install 'wandb[workspaces]').
"""

import argparse
import sys
from typing import Any

# Axes of the trade-off plot, and the columns of the table: names that every run's summary has.
ERASED, KEPT = "erasure/ua", "retention/ira"
TABLE = (ERASED, KEPT, "retention/cra", "fidelity/clip_score", "cost/erase_seconds", "cost/edit_bytes")


def missing() -> str | None:
    """What stands in the way, in one line; None if nothing does."""
    import wandb

    try:
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError:
        return "this needs wandb's reports: pip install 'wandb[workspaces]'"
    if not wandb.login(prompt=False):
        return "not logged in: wandb login, or set WANDB_API_KEY"
    return None


def report(project: str, entity: str | None, group: str | None) -> Any:
    """Trade-off plot, a bar a method for each number, the curves of erasing, the pictures; one run set."""
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(
        project=project,
        entity=entity or "",
        groupby=["config.method.name"],
        filters=f"Group == '{group}'" if group else "",
    )
    bars = [wr.BarPlot(title=name, metrics=[name], orientation="h", groupby="method.name") for name in TABLE]
    panels = [
        wr.ScatterPlot(title="what is erased against what is kept", x=KEPT, y=ERASED),
        *bars,
        wr.LinePlot(title="loss", x="trainer/global_step", y=["erase/loss"]),
        wr.WeavePanelSummaryTable(table_name="pictures"),
    ]
    return wr.Report(
        project=project,
        entity=entity or "",
        title=f"unpaint: {group or 'all runs'}",
        blocks=[wr.PanelGrid(runsets=[runs], panels=panels)],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="unpaint")
    parser.add_argument("--entity", help="the team or user that owns the project; the default one if left out")
    parser.add_argument("--group", help="one sweep, by the name over its table")
    args = parser.parse_args()
    if problem := missing():
        print(f"wandb_dashboard.py: {problem}", file=sys.stderr)
        return 2
    made = report(args.project, args.entity, args.group)
    made.save()
    print(made.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
