"""ConceptPrune against plain loops over full paintings, on the tiny pipeline and by hand."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unpaint.concepts import AnyConcept, Concept
from unpaint.config import compose, instantiate
from unpaint.edit import Edit
from unpaint.errors import UserError
from unpaint.methods.concept_prune import ConceptPrune, filled, prunable
from unpaint.sampling import noise

Begun = Callable[..., tuple[ConceptPrune, list[Tensor]]]
SMALL = (
    "method=concept_prune",
    "method.layers=feed_forward.out",
    "method.ratio=0.2",
    "method.margin=1",
    "method.base=anchor",
    "method.halves=both",
    "method.steps=1",
    "method.batch_size=2",
)


def painted(method: ConceptPrune) -> dict[str, Tensor]:
    """Squared sums (2, all calls, inputs) by weight: whole paintings one picture at a time, all by plain means."""
    job, sampler = method.job, method.sampler
    pipe, model = job.model.pipe, job.model
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(sampler.steps)
    sums = {key: torch.zeros(2, sampler.steps, weight.shape[1]) for key, weight in method.matrices.items()}
    layers = dict(pipe.unet.named_modules())
    where: list[int] = [0, 0]

    def seen(key: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            for half, row in enumerate(inputs[0]):
                if method.halves == "both" or half == 1:
                    for token in row:
                        sums[key][where[0], where[1]] += (token / token.norm()) ** 2

        return hook

    handles = [layers[key[5:-7]].register_forward_hook(seen(key)) for key in sums]
    with torch.no_grad():
        for batch in method.batches(0):
            for role, prompts in enumerate((batch.targets, batch.bases)):
                for prompt, seed in zip(prompts, batch.seeds, strict=True):
                    x = noise([seed], model.latent_shape)
                    for call, t in enumerate(scheduler.timesteps):
                        where[:] = role, call
                        both = pipe.unet(torch.cat([x, x]), t, model.encode(["", prompt])).sample
                        x = scheduler.step(both[:1] + sampler.guidance * (both[1:] - both[:1]), t, x).prev_sample
    for handle in handles:
        handle.remove()
    return sums


def chosen(
    weight: Tensor, sums: Tensor, tau: int, ratio: float, select_ratio: float, margin: float
) -> list[list[bool]]:
    """The mask of the paper, weight by weight."""
    rows, width = weight.shape
    counts = [[0] * width for _ in range(rows)]
    for call in range(tau):
        target, base = ([math.sqrt(float(v)) for v in sums[role, call]] for role in (0, 1))
        for i in range(rows):
            scores = [abs(float(weight[i, j])) * target[j] for j in range(width)]
            best = sorted(range(width), key=lambda j: -scores[j])[: math.floor(ratio * width)]
            for j in best:
                counts[i][j] += scores[j] > margin * abs(float(weight[i, j])) * base[j]
    return [[count > select_ratio * tau for count in row] for row in counts]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("method.halves=conditional", "method.margin=1.001"),
        ("method.layers=cross_attention+feed_forward.out", "method.halves=conditional", "method.base=retained"),
        ("method.select_ratio=0.5", "method.base=context", "concept=mosaic"),
    ],
)
def test_the_mask_is_that_of_plain_loops_over_whole_paintings(options: tuple[str, ...], begun: Begun) -> None:
    method, _ = begun(*SMALL, "method.tau=2", "method.steps=2", *options)
    sums = painted(method)
    for batch in method.batches(0):
        logs = method.step(batch)
    edit = method.finish()
    assert method.own is not None
    parts = method.own.sums[0].split(method.widths, dim=2)
    pruned = 0
    for (key, weight), part in zip(method.matrices.items(), parts, strict=True):
        # The last two of the four calls were never painted: the first two are the same as in whole paintings.
        torch.testing.assert_close(part, sums[key][:, :2], rtol=1e-4, atol=1e-5)
        expected = torch.tensor(chosen(weight, sums[key], 2, method.ratio, method.select_ratio, method.margin))
        assert edit.zero.get(key, torch.zeros_like(expected)).equal(expected)
        pruned += int(expected.sum())
    assert edit.changed_parameters == pruned > 20
    whole = sum(p.numel() for p in method.job.model.pipe.unet.parameters())
    assert float(logs["pruned_share"]) == pytest.approx(pruned / whole)


def test_half_of_a_guided_batch_matters(begun: Begun) -> None:
    both, one = (begun(*SMALL, f"method.halves={halves}")[0] for halves in ("both", "conditional"))
    sums = [method.squares(next(method.batches(0))) for method in (both, one)]
    # Each token adds 1 in each layer and call.
    totals = [float(s[0, 0, 0].sum()) for s in sums]
    assert totals[0] == pytest.approx(2 * totals[1], rel=1e-4)
    # Without a prompt, target and base are the same.
    unconditional = sums[0] - sums[1]
    torch.testing.assert_close(unconditional[0, 0, 0], unconditional[0, 1, 0], rtol=1e-4, atol=1e-4)


def test_without_guidance_there_is_one_half(begun: Begun) -> None:
    options = (*SMALL, "method.sampling_guidance=1")
    both, one = (begun(*options, f"method.halves={halves}")[0] for halves in ("both", "conditional"))
    sums = [method.squares(next(method.batches(0))) for method in (both, one)]
    assert sums[0].equal(sums[1])


def test_a_mask_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-4.0, 1.0, 1.0, 1.0]])
    # Two calls. In the first unit 2 is used less with the concept, in the second units 0 and 3.
    target = torch.tensor([[4.0, 4.0, 4.0, 4.0], [1.0, 9.0, 1.0, 4.0]])
    base = torch.tensor([[1.0, 1.0, 9.0, 1.0], [4.0, 1.0, 0.0, 9.0]])
    # Scores: first [2, 4, (6), 0], [8, 2, (2), 2]; second [(1), 6, 3, (0)], [(4), 3, 1, (2)]; two of each row count.
    assert prunable(weight, target[:1], base[:1], 0.5, 0.0, 1.0)[0].tolist() == [False, True, False, False]
    second = prunable(weight, target[1:], base[1:], 0.5, 0.0, 1.0)
    assert second.tolist() == [[False, True, True, False], [False, True, False, False]]
    # Union over time, and those chosen in more than half of the calls.
    assert prunable(weight, target, base, 0.5, 0.0, 1.0)[0].tolist() == [False, True, True, False]
    assert prunable(weight, target, base, 0.5, 0.5, 1.0)[0].tolist() == [False, True, False, False]
    # Unit 2 of the first row was never used without the concept; unit 1 nine times as much (squared) as with it.
    assert prunable(weight, target[1:], base[1:], 0.5, 0.0, 2.9)[0].tolist() == [False, True, True, False]
    assert prunable(weight, target[1:], base[1:], 0.5, 0.0, 3.1)[0].tolist() == [False, False, True, False]
    # One of four, rounded down.
    assert prunable(weight, target[1:], base[1:], 0.49, 0.0, 1.0).tolist() == [[False, True, False, False], [False] * 4]


def test_what_pruned_weights_become() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) + 5
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    kept = set(weight[~mask].tolist())
    for fill in ("mean", "resample"):
        assert filled(weight, mask, fill, 0)[~mask].equal(weight[~mask])
    assert filled(weight, mask, "mean", 0)[mask].unique().tolist() == pytest.approx([float(weight[~mask].mean())])
    drawn = filled(weight, mask, "resample", 0)[mask]
    assert set(drawn.tolist()) <= kept and len(drawn.unique()) > 500
    assert drawn.equal(filled(weight, mask, "resample", 0)[mask])
    assert not drawn.equal(filled(weight, mask, "resample", 1)[mask])
    assert not filled(weight, torch.ones_like(mask), "mean", 0).any()


@pytest.mark.parametrize("fill", ["zero", "mean", "resample"])
def test_the_edit_changes_the_pruned_weights_and_no_others(fill: str, begun: Begun, tmp_path: Path) -> None:
    method, _ = begun(*SMALL, "method.tau=2", f"method.fill={fill}")
    for batch in method.batches(0):
        method.step(batch)
    masks = method.masks()
    made = method.finish()
    made.save(tmp_path / "edit.safetensors")
    for key, weight in method.job.weights.items():
        weight.data.copy_(method.job.base[key])
    edit = Edit.load(tmp_path / "edit.safetensors").apply
    pipe = edit(method.job.model.pipe)
    assert bool(made.zero) == (fill == "zero") and bool(made.delta) == (fill != "zero")
    for key, mask in masks.items():
        now, before = dict(pipe.unet.named_parameters())[key.removeprefix("unet.")], method.job.base[key]
        assert now[~mask].equal(before[~mask])
        assert (now[mask] != before[mask]).all()
        if fill == "zero":
            assert not now[mask].any()


def test_a_target_and_its_base_share_seed_and_template(begun: Begun) -> None:
    method, _ = begun(*SMALL, "method.steps=40")
    batches = list(method.batches(0))
    pairs = [pair for b in batches for pair in zip(b.targets, b.bases, strict=True)]
    assert {target.replace("a cat", "a dog") == base for target, base in pairs} == {True}
    assert {target for target, _ in pairs} == set(method.job.concept.prompts())
    seeds = [seed for b in batches for seed in b.seeds]
    assert len(set(seeds)) == len(seeds) == 80
    context, _ = begun(*SMALL, "method.base=context", "method.context=a table")
    batch = next(context.batches(0))
    assert [target.replace("a cat", "a table") for target in batch.targets] == batch.bases
    retained, _ = begun(*SMALL, "method.base=retained", "method.steps=11")
    words = list(retained.job.concept.retained.values())
    pairs = [pair for b in retained.batches(0) for pair in zip(b.targets, b.bases, strict=True)]
    for i, (target, base) in enumerate(pairs):
        assert target.replace("a cat", words[i % len(words)]) == base


def test_resumed_is_uninterrupted(begun: Begun) -> None:
    whole, _ = begun(*SMALL, "method.tau=2", "method.steps=3")
    first, second = (begun(*SMALL, "method.tau=2", "method.steps=3")[0] for _ in range(2))
    for batch in whole.batches(0):
        whole.step(batch)
    first.step(next(first.batches(0)))
    assert first.own is not None and second.own is not None
    second.own.load_state_dict(first.own.state_dict())
    for batch in second.batches(1):
        second.step(batch)
    assert second.finish().id == whole.finish().id


def test_ranks_add_up(begun: Begun) -> None:
    method, _ = begun(*SMALL, "method.batch_size=4")
    whole = method.squares(next(method.batches(0)))
    parts = []
    for rank in (0, 1):
        object.__setattr__(method.job, "mine", slice(rank, None, 2))
        parts.append(method.squares(next(method.batches(0))))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


def test_no_hook_is_left_even_after_an_error(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = begun(*SMALL)

    def hooks() -> Iterator[Any]:
        return (hook for module in method.job.model.pipe.unet.modules() for hook in module._forward_pre_hooks.values())

    method.step(next(method.batches(0)))
    assert not list(hooks())
    batch = next(method.batches(0))
    last = list(method.layers.values())[-1]

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(last, "forward", fails)
    with pytest.raises(RuntimeError, match="no"):
        method.step(batch)
    assert not list(hooks())


@dataclass(frozen=True)
class Several:
    """What the method asks of a concept set."""

    name: str
    members: tuple[Concept, ...]
    retained: dict[str, str]


@pytest.mark.parametrize("base", ["anchor", "retained"])
def test_a_set_is_pruned_of_what_any_member_is_pruned_of(base: str, begun: Begun) -> None:
    options = ("method.steps=2", "method.tau=2", f"method.base={base}")
    alone = [begun(*SMALL, *options, f"concept={name}")[0] for name in ("cat", "mosaic")]
    together, _ = begun(*SMALL, *options, "method.batch_size=4")
    retained = {"object/bird": "a bird"}
    for method in alone:
        (concept,) = method.job.concept.members
        only = replace(concept, evaluation=replace(concept.evaluation, in_domain=retained), neighbours=())
        object.__setattr__(method.job, "concept", only)
        method.begin(method.job)
    members = tuple(method.job.concept.members[0] for method in alone)
    object.__setattr__(together.job, "concept", Several("both", members, retained))
    together.begin(together.job)
    for method in (*alone, together):
        for batch in method.batches(0):
            method.step(batch)
    cat, mosaic = (method.finish().zero for method in alone)
    both = together.finish()
    assert both.header.concept == "both"
    assert all(mask.equal(cat[key] | mosaic[key]) for key, mask in both.zero.items())
    assert any(not cat[key].equal(mosaic[key]) for key in cat)


@pytest.mark.parametrize("name", ["cat", "bottle_and_car", "cat_on_table", "pets"])
def test_every_kind_of_concept_will_do(name: str, begun: Begun) -> None:
    concept = f"concept={name}"
    cfg = compose(["method=concept_prune", concept])
    made: AnyConcept = instantiate(cfg.concept)
    instantiate(cfg.method).check(made)
    method, _ = begun(*SMALL, concept)
    method.step(next(method.batches(0)))
    assert method.finish().changed_parameters > 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("ratio=0", "method.ratio"),
        ("ratio=1.5", "method.ratio"),
        ("tau=0", "method.tau"),
        ("tau=99", "method.tau"),
        ("select_ratio=1", "method.select_ratio"),
        ("margin=0", "method.margin"),
        ("base=achor", "anchor, context, retained, not 'achor'.*anchor"),
        ("halves=all", "method.halves"),
        ("fill=noise", "method.fill"),
        ("steps=0", "method.steps"),
        ("sampling_guidance=0", "guidance"),
    ],
)
def test_bad_options_are_refused(option: str, said: str) -> None:
    arguments: Any = compose(["method=concept_prune", f"method.{option}"]).method
    with pytest.raises(UserError, match=said):
        instantiate(arguments)


def test_a_ratio_that_prunes_nothing_is_refused(begun: Begun) -> None:
    with pytest.raises(UserError, match="prunes nothing"):
        begun(*SMALL, "method.ratio=0.001")


def test_retained_needs_something_to_retain() -> None:
    cfg = compose(["method=concept_prune", "method.base=retained"])
    cfg.concept.evaluation.in_domain = {"object/cat": "a cat"}
    cfg.concept.neighbours = []
    concept = instantiate(cfg.concept)
    with pytest.raises(UserError, match="nothing to retain"):
        instantiate(cfg.method).check(concept)
