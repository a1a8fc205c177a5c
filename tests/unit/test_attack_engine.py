"""Bookkeeping of attacks on a tiny pipeline: the rates, the budget, what is kept and replayed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from unpaint.concepts import Concept, ConceptSet
from unpaint.edit import Edit, applied
from unpaint.errors import UserError
from unpaint.evaluation.attacks import Attack, Once, Scene, Try, digest_of, engine
from unpaint.evaluation.attacks.engine import Campaign, asked_for, transfer, units
from unpaint.evaluation.attacks.inversion import Inversion
from unpaint.evaluation.attacks.outcomes import Outcome, found_prompts, summary, union
from unpaint.evaluation.attacks.tokens import TokenAttack
from unpaint.evaluation.metrics.drawings import drawing
from unpaint.evaluation.metrics.rates import Rate
from unpaint.evaluation.prompt_lists import prompts_from_csv
from unpaint.evaluation.suite import Evaluator
from unpaint.model import TextToImage, load_model
from unpaint.picturebook.world import SETTINGS
from unpaint.sampling import Sampler, paint

GREEN = 0.48  # of a picture of the unedited model, at least


class Colours:
    """A cat is green, an umbrella is never there."""

    labels: Sequence[str] = ("object/cat", "object/umbrella")
    identity = "colours"
    only_for = None
    thresholds: Mapping[str, float] = {"object/cat": GREEN, "object/umbrella": 2.0}

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))[:, [1, 0]]


def concept(word: str = "cat") -> Concept:
    evaluation: Any = {
        "templates": ["{concept} {n}"],
        "slots": {"n": {f"setting/{name}": str(i) for i, name in enumerate((*SETTINGS, "none"))}},
        "target_pictures": 6,
    }
    return Concept(
        name=word,
        kind="individual",
        axis="object",
        labels=(f"object/{word}",),
        target=f"a {word}",
        anchor="a thing",
        templates=("{concept}", "one {concept}"),
        evaluation=evaluation,
    )


@dataclass(frozen=True)
class Say:
    """Paints `word` before each prompt, so often; a list of what was asked of it."""

    word: str = "dog"
    name: str = "say"
    title: str = "a word"
    prompts: int = 6
    at_n: int = 1
    max_seconds: float = 60.0
    tries: int = 2
    asked: ClassVar[list[list[str]]] = []

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        for i in range(self.tries):
            yield None
            rows = list(scene.open)
            self.asked.append(scene.prompts(rows))
            yield scene.painted(rows, [f"{self.word} {i} {prompt}" for prompt in scene.prompts(rows)])


class Force(Say):
    """Shows the concept to the first row only, as if it had been found."""

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        rows = list(scene.open)
        self.asked.append(scene.prompts(rows))
        pictures = torch.zeros(len(rows), 3, 64, 64, dtype=torch.uint8)
        pictures[0, 1] = 255
        yield Try(rows, pictures, [f"found {row}" for row in rows])


@pytest.fixture(autouse=True)
def nothing_asked() -> None:
    Say.asked.clear()


def evaluator(*attacks: Attack, control: bool = False, batch_size: int = 4) -> Evaluator:
    ua = Rate("erasure/ua", "", "", ("target",), ("target",))
    return Evaluator(
        {"ua": ua},
        Colours(),
        Sampler(steps=2, guidance=1),
        batch_size,
        attacks={attack.name: attack for attack in attacks},
        control=concept("umbrella") if control else None,
    )


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder: Path) -> TextToImage:
    return load_model({"name": "tiny", "path": str(tiny_pipeline_folder), "device": "cpu"})


def shifted(model: TextToImage, by: float) -> Edit:
    """An edit that shifts the noise that is predicted: by 3, pictures lose their green."""
    bias = model.pipe.unet.conv_out.bias
    before = bias.detach().clone()
    bias.data.add_(by)
    edit = Edit.from_change(model.pipe, {"unet.conv_out.bias": before}, method="test", concept="cat", config={})
    bias.data.copy_(before)
    return edit


@pytest.fixture(scope="module")
def ungreen(model: TextToImage) -> Edit:
    return shifted(model, 3)


def campaign(
    model: TextToImage, edit: Edit, cache: Path, attack: Attack, control: bool = False, batch_size: int = 4
) -> Campaign:
    return Campaign(evaluator(attack, control=control, batch_size=batch_size), model, edit, concept(), 0, cache)


def test_what_fails_is_counted_with_its_effort(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.pipe.unet.state_dict().items()}
    done: list[int] = []
    here = campaign(model, ungreen, tmp_path, Say(), control=True)
    here.run(Say(), progress=done.append)
    assert sum(done) == here.work(Say(), 0, 1) == 3 * 6 * 2
    assert applied(model.pipe) == []
    assert all(value.equal(before[key]) for key, value in model.pipe.unet.state_dict().items())
    scores = here.scores(Say())
    assert list(scores) == ["attack/say/pre_asr", "attack/say/asr", "attack/say/control_asr"]
    asr, control = scores["attack/say/asr"], scores["attack/say/control_asr"]
    assert (asr["value"], asr["n"], asr["base"], asr["queries"], asr["added"]) == (0.0, 6, 1.0, 12, 0.0)
    assert (asr["higher_is_better"], asr["detector"], asr["seconds_per_success"]) == (False, "colours", None)
    assert (control["value"], control["n"], control["pre"], control["queries"]) == (0.0, 6, 0.0, 12)
    # Four and two prompts on the edited model, the control's likewise; the unedited one shows all by itself.
    assert [len(rows) for rows in Say.asked] == [4, 4, 2, 2] * 2


def test_what_is_found_is_closed_and_kept(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    attack = Force(at_n=3)
    here = campaign(model, ungreen, tmp_path, attack)
    here.run(attack)
    scores = here.scores(attack)
    assert scores["attack/say/pre_asr"]["value"] == 0
    asr = scores["attack/say/asr"]
    # One of each batch: of four, and of two.
    assert (asr["value"], asr["added"], asr["queries"], asr["queries_per_success"]) == (2 / 6, 2 / 6, 6, 3.0)
    assert [row["prompt"] for row in asr["prompts"]] == ["found 0", "found 0"]
    assert (scores["attack/say/asr_at_n"]["value"], scores["attack/say/asr_at_n"]["seeds"]) == (2 / 6, 3)
    lost = [o for o in here.outcomes(attack, concept()) if not o.found]
    assert len(lost) == 4 and all(o.again == (False, False) for o in lost)
    found_prompts({"say": here.outcomes(attack, concept())}, 2.5, tmp_path / "found")
    rows = prompts_from_csv(tmp_path / "found" / "say.csv")
    assert [(row.prompt, row.guidance) for row in rows] == [("found 0", 2.5)] * 2
    assert [row.seed for row in rows] == [row["seed"] for row in asr["prompts"]]


def test_what_is_shown_anyway_is_a_success_without_an_attack(model: TextToImage, tmp_path: Path) -> None:
    here = campaign(model, shifted(model, 1e-4), tmp_path, Say(at_n=2))
    here.run(Say(at_n=2))
    scores = here.scores(Say(at_n=2))
    assert [scores[f"attack/say/{key}"]["value"] for key in ("pre_asr", "asr", "asr_at_n")] == [1.0, 1.0, 1.0]
    assert Say.asked == [] and scores["attack/say/asr"]["added"] == 0


def test_an_attack_of_no_rounds_is_no_attack(model: TextToImage, tmp_path: Path) -> None:
    # Half of the pictures are as green as they have to be.
    edit = shifted(model, 3)
    cases = concept().cases(0)
    edit.apply(model.pipe)
    painted = torch.cat(list(paint(model, [c.prompt for c in cases], [c.seed for c in cases], Sampler(2, 1), 4)))
    edit.remove(model.pipe)
    greens = (painted.float() / 255).mean(dim=(2, 3))[:, 1].sort().values
    enough = float(greens[2] + greens[3]) / 2
    attack = TokenAttack(
        "none", "", "simplex", "noise", "in_order", "prefix", 2, 0, 5, 0.1, 0.1, prompts=6, at_n=1, max_seconds=60
    )
    here = campaign(model, edit, tmp_path, attack)
    here.evaluator.detector = Half()
    Half.thresholds = {"object/cat": enough}
    here.run(attack)
    scores = here.scores(attack)
    assert scores["attack/none/pre_asr"]["value"] == scores["attack/none/asr"]["value"]
    assert scores["attack/none/asr"]["value"] == 0.5
    assert scores["attack/none/asr"]["queries"] == 0


class Half(Colours):
    identity = "half"


def test_the_same_again_asks_nothing_and_a_lost_file_is_one_prompt(
    model: TextToImage, ungreen: Edit, tmp_path: Path
) -> None:
    here = campaign(model, ungreen, tmp_path, Say())
    here.run(Say())
    first = here.outcomes(Say(), concept())
    Say.asked.clear()
    again = campaign(model, ungreen, tmp_path, Say())
    again.run(Say())
    assert Say.asked == [] and again.outcomes(Say(), concept()) == first
    lost = asked_for(Say(), concept(), 0)[4]
    (again.folder(Say(), True) / f"{digest_of(lost)}.json").write_text("{")
    again.run(Say())
    assert Say.asked == [[lost.prompt]] * 2
    Say.asked.clear()
    # More prompts are no other attack; other options are.
    again.run(Say(prompts=3))
    assert Say.asked == []
    again.run(Say(word="a", prompts=3))
    assert Say.asked == [[case.prompt for case in asked_for(Say(prompts=3), concept(), 0)]] * 2


def test_an_attack_that_was_interrupted_goes_on(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    class Dies(Force):
        def attempts(self, scene: Scene) -> Iterator[Try | None]:
            yield next(super().attempts(scene))
            raise KeyboardInterrupt

    here = campaign(model, ungreen, tmp_path, Dies())
    with pytest.raises(KeyboardInterrupt):
        here.run(Dies())
    assert applied(model.pipe) == []
    Say.asked.clear()
    here.run(Force())
    # The first row of the first batch was found before; the three others of its batch go on without it.
    cases = [case.prompt for case in asked_for(Force(), concept(), 0)]
    assert Say.asked == [cases[1:4], cases[4:]]


def test_the_budget_ends_a_search_and_a_larger_one_takes_it_up(
    model: TextToImage, ungreen: Edit, tmp_path: Path
) -> None:
    short = Say(max_seconds=0.0)
    here = campaign(model, ungreen, tmp_path, short)
    here.run(short)
    assert Say.asked == [] and here.scores(short)["attack/say/asr"]["stopped"] == 6
    here.run(short)
    assert Say.asked == []
    here.run(Say())
    assert len(Say.asked) == 4 and here.scores(Say())["attack/say/asr"]["stopped"] == 0
    assert here.scores(short)["attack/say/asr"]["stopped"] == 0


@dataclass(frozen=True)
class Learn(Say):
    """One lesson for all prompts, of as many seconds as steps."""

    steps: int = 25
    max_seconds: float = 30.0
    tries: int = 1
    once: bool = True
    clock: ClassVar[list[float]] = [0.0]

    def attempts(self, scene: Scene) -> Iterator[Try | None]:
        learned = scene.folder / "learned"
        for _ in range(0 if learned.is_file() else self.steps):
            self.clock[0] += 1
            yield None
        learned.parent.mkdir(parents=True, exist_ok=True)
        learned.touch()
        self.clock[0] += 9  # painting
        rows = list(scene.open)
        self.asked.append(scene.prompts(rows))
        yield scene.painted(rows, scene.prompts(rows))


def test_one_lesson_for_all_prompts_has_the_time_of_all(
    model: TextToImage, ungreen: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: Learn.clock[0]))
    Learn.clock[0] = 0.0
    # Three batches of two prompts, a third of 30 seconds each: too few for a lesson of 25, which is one for all.
    here = campaign(model, ungreen, tmp_path / "enough", Learn(), batch_size=2)
    here.run(Learn())
    assert Learn.clock[0] == 25 + 3 * 9
    assert [len(rows) for rows in Say.asked] == [2, 2, 2]
    assert here.scores(Learn())["attack/say/asr"]["stopped"] == 0
    # Of 40: the first batch stops beyond 30, and the others do not begin anew.
    long = Learn(steps=40, at_n=2)
    Learn.clock[0] = 0.0
    Say.asked.clear()
    here = campaign(model, ungreen, tmp_path / "few", long, batch_size=2)
    here.run(long)
    assert Learn.clock[0] == 31 + 1 + 1 and Say.asked == []
    assert here.scores(long)["attack/say/asr"]["stopped"] == 6
    assert here.scores(long)["attack/say/asr_at_n"]["stopped"] == 6
    # With more time it is learned after all.
    more = replace(long, max_seconds=60.0)
    here.run(more)
    assert here.scores(more)["attack/say/asr"]["stopped"] == 0
    assert isinstance(Inversion("inversion", "", 2, "a", 1, 0.1, 2, 2, 9.0), Once)


def test_a_budget_is_what_a_prompt_gets_of_it(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    many, few = Say(max_seconds=1e-9, prompts=6), Say(max_seconds=1e-9, prompts=3)
    here = campaign(model, ungreen, tmp_path, many)
    here.run(many)
    # As much for half of the prompts is more for each.
    assert here.outcomes(few, concept()) == []
    here.run(few)
    assert here.scores(few)["attack/say/asr"]["stopped"] == 3


def test_two_ranks_do_what_one_does(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    alone, shared = (campaign(model, ungreen, tmp_path / name, Force(), control=True) for name in ("one", "two"))
    alone.run(Force())
    for rank in (1, 0):
        shared.run(Force(), rank, 2)

    def plain(here: Campaign) -> list[Outcome]:
        every = here.outcomes(Force(), concept()) + here.outcomes(Force(), concept("umbrella"))
        return [replace(outcome, seconds=0) for outcome in every]

    assert plain(alone) == plain(shared) and len(plain(alone)) == 12
    assert shared.work(Force(), 0, 2) + shared.work(Force(), 1, 2) == alone.work(Force(), 0, 1)


def test_batches_of_a_set_are_its_members_own() -> None:
    pets = ConceptSet("pets", (concept("cat"), concept("dog")))
    every = units(Say(prompts=6), pets, concept("umbrella"), 0, 2)
    assert all(set(case.wants) >= set(unit.concept.labels) for unit in every for case in unit.cases)
    edited = [unit for unit in every if unit.edited and not unit.drawn]
    assert [(unit.concept.name, len(unit.cases)) for unit in edited] == [("cat", 2), ("cat", 1), ("dog", 2), ("dog", 1)]
    assert sum(unit.budget * len(unit.cases) for unit in edited) == pytest.approx(60)
    assert [len(unit.fellows) for unit in edited] == [3, 3, 3, 3]
    assert {case.prompt for case in edited[0].fellows} == {case.prompt for unit in edited[:2] for case in unit.cases}
    assert sum(unit.drawn for unit in every) == 3
    few = [unit for unit in units(Say(), pets, concept("umbrella"), 0, 4, control_prompts=3) if unit.drawn]
    assert [(len(unit.cases), unit.budget) for unit in few] == [(3, 20.0)]
    # The control of itself would be no control.
    assert not any(unit.drawn for unit in units(Say(), concept("cat"), concept("cat"), 0, 2))


@pytest.mark.parametrize("none", ["prompts", "at_n"])
def test_an_attack_on_nothing_is_refused(model: TextToImage, ungreen: Edit, tmp_path: Path, none: str) -> None:
    attack = Say(**{none: 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"attack say: {none} is at least 1, not 0"):
        campaign(model, ungreen, tmp_path, attack).run(attack)


def test_the_control_is_attacked_with_drawings(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    seen: list[Scene] = []

    class Look(Say):
        def attempts(self, scene: Scene) -> Iterator[Try | None]:
            seen.append(scene)
            return iter(())

    here = campaign(model, ungreen, tmp_path, Look(), control=True, batch_size=8)
    here.run(Look())
    cat, umbrella = seen
    assert (cat.drawn, umbrella.drawn) == (False, True)
    drawn = torch.from_numpy(drawing(umbrella.cases[0])).permute(2, 0, 1)
    assert umbrella.pictures[0].equal(drawn)
    # What the concept's pictures are: those of the unedited model, although the edit is on the model.
    cases = cat.cases
    plain = torch.cat(list(paint(model, [c.prompt for c in cases], [c.seed for c in cases], Sampler(2, 1), 4)))
    assert (cat.pictures.int() - plain.int()).abs().max() <= 1
    assert cat.base.keys() == {"unet.conv_out.bias"}
    assert cat.base["unet.conv_out.bias"].equal(model.pipe.unet.conv_out.bias)


def test_effort_by_hand() -> None:
    outcomes = [
        Outcome("a", 1, True, True, None, 0, 0.0),
        Outcome("b", 2, False, True, "x b", 3, 2.0),
        Outcome("c", 3, False, True, None, 1, 1.0),
        Outcome("d", 4, False, False, "y d", 5, 6.0, (), 9.0),
    ]
    assert summary(outcomes) == {
        "added": 0.5,
        "seconds": 9.0,
        "queries": 9,
        "seconds_per_success": 4.5,
        "queries_per_success": 4.5,
        "stopped": 1,
        "prompts": [{"prompt": "x b", "of": "b", "seed": 2}],
    }


def test_the_union_of_two_attacks_by_hand() -> None:
    lost, won = Outcome("a", 1, False, False, "x", 8, 4.0, (False,), 9.0), Outcome("a", 1, False, True, "y", 3, 2.0)
    pre, alone = Outcome("b", 2, True, True, None, 0, 0.0), Outcome("c", 3, False, True, "z", 1, 1.0)
    seen = Outcome("d", 4, False, False, "v", 1, 1.0, (False, True))
    both = union([[lost, pre, alone, seen], [won, pre, replace(seen, again=(False, False))]])
    assert both[0] == replace(won, queries=11, seconds=6.0, again=(False,))
    assert both[1] == pre and len(both) == 3
    assert not both[2].found and both[2].again == (False, True, False, False)
    assert union([[lost], [lost]])[0].stopped == 9.0


def test_p4d_is_also_counted_as_the_union_of_both(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    attacks = (Say(name="p4d_n"), Force(name="p4d_k"))
    here = campaign(model, ungreen, tmp_path, attacks[0])
    for attack in attacks:
        here.run(attack)
    scores = here.union_scores(attacks)
    assert list(scores) == ["attack/p4d_union/pre_asr", "attack/p4d_union/asr"]
    asr, each = scores["attack/p4d_union/asr"], [here.scores(attack) for attack in attacks]
    assert (asr["value"], asr["n"], asr["base"]) == (2 / 6, 6, 1.0)
    assert asr["queries"] == each[0]["attack/p4d_n/asr"]["queries"] + each[1]["attack/p4d_k/asr"]["queries"]
    assert here.union_scores(attacks[:1]) == {}


def test_found_prompts_are_replayed_on_other_edits(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    mild = shifted(model, 1e-4)
    here = {name: campaign(model, edit, tmp_path, Force()) for name, edit in (("strong", ungreen), ("mild", mild))}
    for each in here.values():
        each.run(Force())
    # Two prompts were said to be found on the strong edit; they are none, but the mild one shows a cat for any.
    assert transfer(here, Force()) == {
        "strong": {"strong": (0.0, 2), "mild": (1.0, 2)},
        "mild": {"strong": (0.0, 0), "mild": (0.0, 0)},
    }


def test_prompts_of_a_file_are_attacked_each_with_its_guidance(
    model: TextToImage, ungreen: Edit, tmp_path: Path
) -> None:
    seen: list[Scene] = []

    class Look(Say):
        def attempts(self, scene: Scene) -> Iterator[Try | None]:
            seen.append(scene)
            return iter(())

    file = tmp_path / "prompts.csv"
    file.write_text("prompt,evaluation_seed,evaluation_guidance\none,7,2\nanother,8,3\nthird,9,2\n")
    here = campaign(model, ungreen, tmp_path, Look(), control=True)
    here.evaluator.prompts_csv = str(file)
    here.run(Look())
    given = [(scene.prompts(scene.open), scene.seeds(scene.open), scene.sampler.guidance) for scene in seen]
    assert given[:2] == [(["one", "third"], [7, 9], 2.0), (["another"], [8], 3.0)]
    assert all(scene.concept.name == "umbrella" for scene in seen[2:]) and len(seen) == 4
    assert here.scores(Look())["attack/say/asr"]["n"] == 3
    # The same prompts with another guidance are other questions.
    file.write_text("prompt,evaluation_seed,evaluation_guidance\none,7,5\n")
    assert here.outcomes(Look(), concept()) == []


def test_a_found_prompt_keeps_its_guidance(model: TextToImage, ungreen: Edit, tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,evaluation_seed,evaluation_guidance\none,7,2\nanother,8,3\n")
    here = campaign(model, ungreen, tmp_path, Force())
    here.evaluator.prompts_csv = str(file)
    here.run(Force())
    found_prompts({"say": here.outcomes(Force(), concept())}, 2.5, tmp_path / "found")
    assert [row.guidance for row in prompts_from_csv(tmp_path / "found" / "say.csv")] == [2, 3]
    assert transfer({"edit": here}, Force()) == {"edit": {"edit": (0.0, 2)}}


def test_an_evaluator_refuses_what_cannot_be_told_apart_and_a_control_that_is_not_its_model_s() -> None:
    with pytest.raises(UserError, match="two attacks of the evaluator are called 'say'"):
        Evaluator(
            {"ua": Rate("erasure/ua", "", "", ("target",), ("target",))},
            Colours(),
            Sampler(),
            attacks={"a": Say(), "b": Say()},
        )
    with pytest.raises(UserError, match=r"umbrella.*~concept@evaluator\.control"):
        evaluator(control=True).check_model("sd14")
    lacking = evaluator(control=True)
    lacking.control = concept("boat")
    with pytest.raises(UserError, match="concept 'boat': detector colours lacks 'object/boat'"):
        lacking.check_model("picturebook")
    evaluator().check_model("sd14")
