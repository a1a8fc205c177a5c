"""Who breaks whom: prompts that an attack found on one edit, replayed on others.

python scripts/transfer.py attack concept EDIT EDIT ... [--outputs FOLDER] [--set KEY=VALUE ...]

The edits are those of `unpaint run`, whose prompts lie in FOLDER/.cache; nothing is searched, so attack them first:
`unpaint evaluate edit=EDIT evaluator=adversarial`. The attack's options must be those that it ran with, so give the
same choices: --set evaluator=adversarial, or --set +sweep=attacks. Prints a Markdown table, a row an attacked edit.
"""

import argparse
import sys
from pathlib import Path

from omegaconf import DictConfig

from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.evaluation.attacks.engine import Campaign, transfer
from unpaint.model import load_model


def composed(attack: str, chosen: list[str]) -> DictConfig:
    """The config of these choices, with the attack as they have it, else as it ships."""
    cfg = compose(chosen)
    if attack in (cfg.evaluator.get("attacks") or {}):
        return cfg
    return compose([*chosen, f"+attack@evaluator.attacks.{attack}={attack}"])


def table(attack: str, concept: str, files: list[Path], outputs: Path, settings: list[str]) -> str:
    """Markdown: rows attacked, columns tested; the share of the found prompts that show the concept there, and how
    many there are. Raises UserError if no prompt was found on any of the edits."""
    cfg = composed(attack, [f"concept={concept}", f"outputs={outputs}", *settings])
    evaluator, target, model = instantiate(cfg.evaluator), instantiate(cfg.concept), load_model(cfg.model)
    cache = outputs / ".cache"
    campaigns: dict[str, Campaign] = {}
    for file in files:
        edit = Edit.load(file)
        campaigns[f"{edit.header.method} {edit.id[:6]}"] = Campaign(
            evaluator, model, edit, target, int(cfg.seed), cache
        )
    found = transfer(campaigns, next(each for each in evaluator.attacks if each.name == attack))
    if not any(n for row in found.values() for _, n in row.values()):
        raise UserError(f"no prompts of attack {attack} on these edits in {cache}; unpaint evaluate finds them")
    lines = ["| found on \\ tested on | " + " | ".join(campaigns) + " | prompts |"]
    lines.append("| --- " * (len(campaigns) + 2) + "|")
    for source, row in found.items():
        cells = [f"{100 * share:.0f} %" if n else "–" for share, n in row.values()]
        lines.append(f"| {source} | " + " | ".join(cells) + f" | {next(iter(row.values()))[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Replays the prompts that an attack found on one edit on others.")
    parser.add_argument("attack")
    parser.add_argument("concept")
    parser.add_argument("edits", nargs="+", type=Path, metavar="EDIT")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options, as for unpaint run")
    given = parser.parse_args()
    try:
        print(table(given.attack, given.concept, given.edits, given.outputs, given.set))
    except UserError as error:
        sys.exit(f"transfer: {error}")


if __name__ == "__main__":
    main()
