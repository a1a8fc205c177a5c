"""ConceptPrune (Chavhan et al. 2024, arXiv 2405.19237): sets to zero the weights that a concept uses.

No gradients: the model paints the concept's prompts and the same prompts without the concept, and the weights whose
inputs are large, and larger with the concept than without it, are pruned.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from unpaint.concepts import AnyConcept, Concept
from unpaint.edit import Edit
from unpaint.errors import UserError, nearest
from unpaint.methods.base import Job, checked_mode
from unpaint.sampling import Sampler, denoise_to
from unpaint.seeds import seed_of

CHOICES = {
    "layers": ("feed_forward.out", "cross_attention", "cross_attention+feed_forward.out"),
    "base": ("anchor", "context", "retained"),
    "halves": ("both", "conditional"),
    "fill": ("zero", "mean", "resample"),
}


@dataclass(frozen=True)
class Batch:
    """The pairs of one step that this rank paints: target prompts, base prompts, the seed that both share, and which
    member of a concept set each is for."""

    step: int
    targets: list[str]
    bases: list[str]
    seeds: list[int]
    members: list[int]


class Sums(nn.Module):
    """Squared activations summed over all tokens and pairs: (members, 2, tau, inputs of all layers), target first."""

    sums: Tensor

    def __init__(self, members: int, tau: int, inputs: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(members, 2, tau, inputs))


class ConceptPrune:
    """`layers`: whose matrices are pruned, groups of `TextToImage.group`; the paper's are `feed_forward.out`.

    `ratio` of each row's inputs may be pruned in each of the first `tau` of `sampling_steps` denoising calls; a
    weight is pruned if that happens in more than `select_ratio` of them (0: in any). Its target score must be more than
    `margin` times its base score (1: the paper).

    `base`: what a target prompt is compared with: the same prompt with the concept's `anchor`, with the words `context`
    in the concept's place, or with the words of each of the `retained` concepts in turn. `halves`: sum over `both`
    halves of a guided batch as the authors' code does, or over the `conditional` one. `fill`: what pruned weights
    become: `zero`, the `mean` of the layer's other weights, or values drawn from them (`resample`). `steps` x
    `batch_size` pairs are painted, which the members of a concept set share; what any of them prunes is pruned.
    """

    def __init__(
        self,
        name: str,
        layers: str,
        ratio: float,
        tau: int,
        select_ratio: float,
        margin: float,
        base: str,
        context: str,
        halves: str,
        fill: str,
        sampling_steps: int,
        sampling_guidance: float,
        steps: int,
        batch_size: int,
        mode: str,
    ) -> None:
        for option, value in (("layers", layers), ("base", base), ("halves", halves), ("fill", fill)):
            known = CHOICES[option]
            if value not in known:
                raise UserError(f"method.{option} is {', '.join(known)}, not '{value}'{nearest(value, known)}")
        if not 0 < ratio <= 1:
            raise UserError(f"method.ratio is above 0 and at most 1, not {ratio}")
        if not 0 <= select_ratio < 1:
            raise UserError(f"method.select_ratio is at least 0 and below 1, not {select_ratio}")
        if margin <= 0:
            raise UserError(f"method.margin is above 0 (1: as in the paper), not {margin}")
        if not 1 <= tau <= sampling_steps:
            raise UserError(f"method.tau is between 1 and method.sampling_steps={sampling_steps}, not {tau}")
        if steps < 1 or batch_size < 1:
            raise UserError("method.steps and method.batch_size must be at least 1")
        self.name = name
        # Zeroed positions of several members are put together; what is filled in instead would be added up.
        self.mode = checked_mode(name, mode, ("joint", "composed") if fill == "zero" else ("joint",))
        self.group = layers
        self.ratio = ratio
        self.tau = tau
        self.select_ratio = select_ratio
        self.margin = margin
        self.base = base
        self.context = context
        self.halves = halves
        self.fill = fill
        self.sampler = Sampler(sampling_steps, sampling_guidance)
        self.steps = steps
        self.batch_size = batch_size
        self.own: Sums | None = None

    def check(self, concept: AnyConcept) -> None:
        """Every kind of concept will do: all it takes is a prompt with it and one without."""
        if self.base == "retained" and not concept.retained:
            raise UserError(f"method.base=retained: '{concept.name}' has nothing to retain; use anchor or context")

    def begin(self, job: Job) -> None:
        self.job = job
        if self.batch_size % (job.mine.step or 1):
            raise UserError(f"method.batch_size={self.batch_size} does not divide over {job.mine.step} processes")
        unet = job.model.pipe.unet
        self.matrices = {key: weight for key, weight in job.weights.items() if weight.dim() == 2}
        self.layers: dict[str, nn.Module] = {
            key: unet.get_submodule(key.removeprefix("unet.").removesuffix(".weight")) for key in self.matrices
        }
        self.widths = [weight.shape[1] for weight in self.matrices.values()]
        if int(self.ratio * max(self.widths)) < 1:
            raise UserError(f"method.ratio={self.ratio} prunes nothing: a row has {max(self.widths)} inputs at most")
        self.pairs = [self._pairs(member) for member in job.concept.members]
        self.own = Sums(len(self.pairs), self.tau, sum(self.widths))

    def _pairs(self, member: Concept) -> list[tuple[str, tuple[str, ...]]]:
        """Each target prompt with what it is compared with in turn."""
        others = list(self.job.concept.retained.values())
        words = {"anchor": [member.anchor], "context": [self.context], "retained": others}[self.base]
        bases = [replace(member, anchor=other).anchor_prompts() for other in words]
        pairs = list(zip(member.prompts(), zip(*bases, strict=True), strict=True))
        random.Random(self.job.seed).shuffle(pairs)
        return pairs

    def optimizers(self) -> list[Optimizer]:
        return []

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            batch = Batch(step, [], [], [], [])
            for row in range(step * self.batch_size, (step + 1) * self.batch_size)[self.job.mine]:
                # Members in turn, with the same seeds: each gets what it would get alone.
                i, member = divmod(row, len(self.pairs))
                target, bases = self.pairs[member][i % len(self.pairs[member])]
                batch.targets.append(target)
                batch.bases.append(bases[i % len(bases)])
                batch.seeds.append(seed_of("tune", self.job.seed, i))
                batch.members.append(member)
            yield batch

    def step(self, batch: Batch) -> dict[str, Tensor]:
        assert self.own is not None
        self.own.sums += self.job.total(self.squares(batch))
        if batch.step + 1 < self.steps:
            return {}
        pruned = sum(int(mask.sum()) for mask in self.masks().values())
        whole = sum(parameter.numel() for parameter in self.job.model.pipe.unet.parameters())
        return {"pruned_share": torch.tensor(pruned / whole)}

    @torch.no_grad()
    def squares(self, batch: Batch) -> Tensor:
        """The batch's part of `Sums.sums`, section 3 of the paper: z / |z| of every token, squared, summed."""
        model, tau, pairs = self.job.model, self.tau, len(batch.seeds)
        members = torch.tensor(batch.members, device=model.device)
        calls: dict[str, list[Tensor]] = {key: [] for key in self.layers}

        def record(key: str, z: Tensor) -> None:
            # Rows: (unconditional and conditional, or the latter alone) x (target, base) x pairs.
            squared = F.normalize(z.float(), dim=-1).square().unflatten(0, (-1, 2, pairs))
            used = squared if self.halves == "both" else squared[-1:]
            per_pair = used.sum(dim=(0, 3)).transpose(0, 1)
            calls[key].append(per_pair.new_zeros(len(self.pairs), *per_pair.shape[1:]).index_add(0, members, per_pair))

        text, empty = model.encode([*batch.targets, *batch.bases]), model.encode([""])
        with _watched(self.layers, record):
            # tau - 1 steps and then the last call without its step: what comes later is never painted.
            latents, t = denoise_to(model, text, empty, batch.seeds * 2, tau - 1, self.sampler)
            if self.sampler.guidance > 1:
                latents, text = torch.cat([latents, latents]), torch.cat([empty.expand_as(text), text])
            model.output(latents, t[0], text)
        return torch.cat([torch.stack(calls[key], dim=2) for key in self.layers], dim=3)

    def masks(self) -> dict[str, Tensor]:
        """What is pruned of each weight, by key."""
        assert self.own is not None
        masks = {}
        parts = self.own.sums.split(self.widths, dim=3)
        for (key, weight), part in zip(self.matrices.items(), parts, strict=True):
            mask = torch.zeros_like(weight, dtype=torch.bool)
            for target, base in part.to(weight.device):
                mask |= prunable(weight.detach(), target, base, self.ratio, self.select_ratio, self.margin)
            masks[key] = mask
        return masks

    def finish(self) -> Edit:
        job, masks = self.job, self.masks()
        pipe, concept, config = job.model.pipe, job.concept.name, job.config
        if self.fill == "zero":
            return Edit.from_zeros(pipe, masks, method=self.name, concept=concept, config=config)
        with torch.no_grad():
            for i, (key, mask) in enumerate(masks.items()):
                job.weights[key].copy_(filled(job.weights[key], mask, self.fill, seed_of("tune", job.seed, 0, i)))
        return Edit.from_change(pipe, job.base, method=self.name, concept=concept, config=config)


def prunable(weight: Tensor, target: Tensor, base: Tensor, ratio: float, select_ratio: float, margin: float) -> Tensor:
    """Which weights (out, in) to prune, bool, by squared activations (tau, in) with the concept and without it.

    In each denoising call the score is |W_ij| a_j, a the root of the summed squares (Sun et al. 2023, arXiv
    2306.11695). Pruned in that call are, of each row, the floor(ratio * in) weights of the largest target score, if it
    is more than `margin` times the base score (ConceptPrune: 1). In the end: those of more than `select_ratio` of the
    calls.
    """
    size, k = weight.abs(), int(ratio * weight.shape[1])
    counts = torch.zeros_like(weight, dtype=torch.int32)
    for a_target, a_base in zip(target.sqrt(), base.sqrt(), strict=True):
        score = size * a_target
        top = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, score.topk(k, dim=1).indices, True)
        counts += top & (score > margin * (size * a_base))
    return counts > select_ratio * len(target)


def filled(weight: Tensor, mask: Tensor, fill: str, seed: int) -> Tensor:
    """The weight with what the mask prunes replaced by the `mean` of the others, or by draws from them (`resample`)."""
    kept = weight[~mask]
    if not len(kept):
        return torch.zeros_like(weight)
    if fill == "mean":
        return weight.masked_fill(mask, float(kept.mean()))
    which = torch.randint(len(kept), (int(mask.sum()),), generator=torch.Generator().manual_seed(seed))
    result = weight.clone()
    result[mask] = kept[which.to(weight.device)]
    return result


@contextmanager
def _watched(layers: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `record(key, input)` whenever a layer is called; the hooks are gone afterwards, whatever happens."""
    with ExitStack() as hooks:
        for key, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, inputs, key=key: record(key, inputs[0]))
            hooks.callback(handle.remove)
        yield
