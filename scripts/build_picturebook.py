"""Builds Picturebook, the built-in model, from nothing; or checks the one that is there.

    python scripts/build_picturebook.py            all stages, each continues where it was killed (hours on 2 cores)
    python scripts/build_picturebook.py --check    the quality table, from the shipped weights (minutes)

Everything before the weights themselves stays in --work, outside the tree.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from unpaint.files import WEIGHTS
from unpaint.picturebook.build import STAGES, Plan, build
from unpaint.picturebook.check import check
from unpaint.picturebook.data import draw_split

WORK = Path.home() / ".cache" / "unpaint" / "picturebook"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the shipped weights and build nothing")
    parser.add_argument("--until", choices=STAGES, default="export", help="stop after this stage")
    parser.add_argument("--work", type=Path, default=WORK, help=f"intermediate state (default: {WORK})")
    for field in fields(Plan):
        if field.name.endswith("_steps"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--start", type=Path, help="take the parts from this pipeline folder; train only the polish")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.check:
        draw_split("held_out", args.work / "drawings", workers=2)
        check(WEIGHTS, args.work / "drawings")
        return
    steps = {field.name: getattr(args, field.name) for field in fields(Plan) if field.name.endswith("_steps")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build(Plan(work=args.work, device=device, start=args.start, **steps), until=args.until)


if __name__ == "__main__":
    main()
