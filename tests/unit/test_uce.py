"""UCE's closed form against a least-squares solver, and the tokens that it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unpaint.config import compose, instantiate
from unpaint.errors import UserError
from unpaint.methods.uce import UCE, States, multiplier, subject_ends

Begun = Callable[..., tuple[UCE, list[Tensor]]]


def solved(weight: Tensor, states: States, erase: float, preserve: float, lamb: float) -> Tensor:
    """The minimum of the objective, as one least-squares problem with a row for each of its terms."""
    rows = [
        erase**0.5 * states.erased,
        preserve**0.5 * states.preserved,
        lamb**0.5 * torch.eye(weight.shape[1]).double(),
    ]
    goals = [erase**0.5 * states.guides, preserve**0.5 * states.preserved, rows[2]]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(goals) @ weight.T, driver="gelsd").solution.T


def test_the_closed_form_is_the_minimum_of_equation_7() -> None:
    generator = torch.Generator().manual_seed(0)
    erased, guides, preserved, weight = (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (2, 2, 3, 5)
    )
    states = States(erased, guides, preserved)
    new = weight @ multiplier(states, 2.0, 0.3, 0.1)
    torch.testing.assert_close(new, solved(weight, states, 2.0, 0.3, 0.1))
    # And as the authors write it down.
    left, gram = 0.1 * weight, 0.1 * torch.eye(6).double()
    for c, g in zip(erased, guides, strict=True):
        left += 2.0 * torch.outer(weight @ g, c)
        gram += 2.0 * torch.outer(c, c)
    for p in preserved:
        left += 0.3 * torch.outer(weight @ p, p)
        gram += 0.3 * torch.outer(p, p)
    torch.testing.assert_close(new, left @ torch.linalg.inv(gram))


@pytest.mark.parametrize("tokens", ["last_subject", "span"])
@pytest.mark.parametrize("prompts", ["concept", "all"])
def test_every_key_and_value_matrix_is_rewritten(tokens: str, prompts: str, begun: Begun) -> None:
    options = ["erase_scale=2.0", "preserve_scale=0.5", "lamb=0.1", f"tokens={tokens}", f"prompts={prompts}"]
    method, _ = begun("method=uce", *(f"method.{option}" for option in options))
    (states,) = method.batches(0)
    assert len(list(method.batches(1))) == 0
    assert float(method.step(states)["relative_change"]) > 0
    assert len(method.job.weights) == 8
    for key, old in method.job.base.items():
        expected = solved(old.double(), states, 2.0, 0.5, 0.1).float()
        torch.testing.assert_close(method.job.weights[key].detach(), expected, rtol=1e-4, atol=1e-6)


def test_the_concept_gets_the_anchors_keys_and_values_and_what_must_stay_keeps_its_own(begun: Begun) -> None:
    method, _ = begun("method=uce", "method.tokens=last_subject", "method.prompts=concept", "method.lamb=1e-3")
    method.step(next(method.batches(0)))
    model, before = method.job.model, method.job.base
    states = {words: model.encode([words])[0] for words in ("a cat", "a dog")}
    retained = method.job.concept.retain_prompts()[:11]
    assert retained[0] == "a dog" and retained[-1] == "a bottle"
    for key, weight in method.job.weights.items():
        old, new = before[key], weight.detach()
        cat, dog = states["a cat"][2], states["a dog"][2]
        assert float((new @ cat - old @ dog).norm()) < 0.05 * float((old @ cat - old @ dog).norm())
        for prompt in retained:
            last = model.encode([prompt])[0][len(model.pipe.tokenizer(prompt).input_ids) - 2]
            assert float((new @ last - old @ last).norm()) < 0.05 * float((old @ cat - old @ dog).norm())


def test_tokens_and_guide_choose_the_states(begun: Begun) -> None:
    def states(*options: str) -> tuple[States, Callable[[str], Tensor]]:
        method, _ = begun("method=uce", "method.prompts=concept", *(f"method.{option}" for option in options))
        return next(method.batches(0)), lambda prompt: method.job.model.encode([prompt])[0].double()

    # "a cat" is begin, a, cat, end, padding; so is "a dog".
    last, encoded = states("tokens=last_subject", "guide=anchor")
    assert last.erased.equal(encoded("a cat")[2:3]) and last.guides.equal(encoded("a dog")[2:3])
    assert len(last.preserved) == 11 and last.preserved[0].equal(encoded("a dog")[2])
    span, _ = states("tokens=span", "guide=anchor")
    assert span.erased.equal(encoded("a cat")[2:]) and span.guides.equal(encoded("a dog")[2:])
    assert span.preserved.equal(torch.cat([encoded(p) for p in _retained()]))
    last, _ = states("tokens=last_subject", "guide=empty")
    assert last.erased.equal(encoded("a cat")[2:3]) and last.guides.equal(encoded("")[:1])
    span, _ = states("tokens=span", "guide=empty", "preserve_scale=0")
    assert span.erased.equal(encoded("a cat")[2:]) and span.guides.equal(encoded("")[:-2])
    assert len(span.preserved) == 0


def _retained() -> list[str]:
    words = ("dog", "bird", "fish", "spider", "tree", "house", "car", "boat", "flower")
    return [*(f"a {word}" for word in words), "an apple", "a bottle"]


def test_the_subject_is_found_inside_longer_prompts(begun: Begun) -> None:
    method, _ = begun("method=uce", "method.prompts=all", "method.tokens=last_subject")
    (states,) = method.batches(0)
    prompts, anchors = (f(further=True) for f in (method.job.concept.prompts, method.job.concept.anchor_prompts))
    encode = method.job.model.encode
    row = prompts.index("a cat in flat style")
    assert anchors[row] == "a dog in flat style"
    assert states.erased[row].equal(encode([prompts[row]])[0][2].double())
    assert states.guides[row].equal(encode([anchors[row]])[0][2].double())
    retained = method.job.concept.retain_prompts()
    row = retained.index("a dog in flat style")
    assert len(states.preserved) == len(retained)
    assert states.preserved[row].equal(encode(["a dog in flat style"])[0][2].double())


@pytest.mark.parametrize(
    ("prompt", "other", "ends"),
    [
        ("B a cat E", "B a dog E", (2, 2)),
        ("B a cat in ink E", "B a big dog in ink E", (2, 3)),
        ("B a cat and a dog E", "B a cat E", (5, 2)),  # nothing of its own in the other: the token before
        ("B a cat a cat E", "B a cat E", (4, 2)),  # a token is not counted at the beginning and at the end
        ("B a cat E", "B E", (2, 0)),
        ("B a cat E", "B a cat E", (3, 3)),
    ],
)
def test_subject_ends(prompt: str, other: str, ends: tuple[int, int]) -> None:
    words = sorted({*prompt.split(), *other.split()})
    one, two = ([words.index(word) for word in text.split()] for text in (prompt, other))
    assert subject_ends(one, two) == ends


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("tokens=spam", "method.tokens .* did you mean span"),
        ("prompts=both", "method.prompts"),
        ("guide=dog", "method.guide"),
        ("lamb=0", "method.lamb"),
        ("preserve_scale=-1", "method.preserve_scale"),
    ],
)
def test_bad_options_are_refused(option: str, said: str) -> None:
    arguments: Any = compose(["method=uce", f"method.{option}"]).method
    with pytest.raises(UserError, match=said):
        instantiate(arguments)
