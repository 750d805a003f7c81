"""The paper's two toys, as pictures and as numbers: a mixture of Gaussians (Figure 5) and four points (Figures 8, 9).

    python toy.py                        mixture and four-points, seed 0
    python toy.py mixture --seeds 0 1 2  GAN and IAE with the same decoder on seven Gaussians
    python toy.py four-points            InfoGAN and FIAE with a 2-D Gaussian code on the points (+-1, +-1)
    python toy.py standards              IAE on the ring of 8 and the grid of 25, beside published numbers
    python toy.py ablation               from the paper's losses to the recipe, one piece at a time

Every network has one more dimension in front, the seeds: x is (seeds, batch, 2), and all seeds train in one pass. They
share no weight, no statistic and no row. A seed alone decides its initial weights; the noise of training is one stream
for all seeds of a command, so a run repeats by its whole command.
"""

import argparse
import math
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError
from fiae import FIAE, InfoGAN
from iae import IAE
from metrics import mmd_test, normalized_mutual_information
from train import host_facts, write_figure, write_json


# ---------------------------------------------------------------------------------------------- data, networks, recipe

def circle(count: int, radius: float) -> Tensor:
    """`count` points evenly on a circle, (count, 2)."""
    angle = torch.arange(count) * (2 * math.pi / count)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


#       the modes (K, 2) and the standard deviation of the Gaussian around each
DATA = {
    "mixture": (circle(7, 2.0), 0.2),
    "ring": (circle(8, 1.0), 0.01),
    "grid": (torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 2), 0.025),  # spacing 2, deviation .05, in half units
    "four-points": (torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]]), 0.1),
}

# What the paper leaves open. Each of the first six rows adds one piece to the one before.
#   penalty  gamma of gamma / 2 (R1 + R2) on the discriminators of x, at first and at last; None: see SCHEDULES
#   decay    the rates fall to 0 at the end, and Adam has no momentum
#   speeds   every network learns at its own rate, SPEEDS: a discriminator that is faster than its generator gives the
#            modes their width
#   settle   the IAE's codes settle first: its regularization cost weighs 1000, D(z) sees codes in noise that vanishes,
#            the softmax is soft at first, and then the encoder stops. Codes must not move when gamma is small, as
#            D(x, z) then no longer draws a decoder from afar
RECIPES = {
    "paper":    dict(objective="gan", penalty=(0.0, 0.0), decay=False, speeds=False, settle=False),  # Eq. 1 and 9
    "penalty":  dict(objective="gan", penalty=(0.1, 0.1), decay=False, speeds=False, settle=False),
    "annealed": dict(objective="gan", penalty=None, decay=False, speeds=False, settle=False),
    "decayed":  dict(objective="gan", penalty=None, decay=True, speeds=False, settle=False),
    "speeds":   dict(objective="gan", penalty=None, decay=True, speeds=True, settle=False),
    "stable":   dict(objective="gan", penalty=None, decay=True, speeds=True, settle=True),
    "kl":       dict(objective="kl", penalty=None, decay=True, speeds=True, settle=True),  # Nowozin et al. 2016
}
# What differs between the toys. The ring's and the grid's modes are fine: a fortieth or less of what lies between them.
#   first, last     gamma falls geometrically from `first` to `last` deviation^2 (it has the unit of x^2)
#   held, fallen    the shares of training between which it falls
#   follow          the rates fall with gamma^follow, as a step must not be wider than what D(x, z) can tell apart,
#   decay, power    and over the last share `decay` of training to 0, with the power `power`
#   speeds          what replaces SPEEDS
#   settle, sharp   recipe "settle": the share of training at which the encoder stops; and (most, at) of its softmax's
#                   scale, which rises from 1 to `most`. Samples have one-hot codes: fine modes need z_hat close to one
#   code            the share of training at which gamma of D(z) has fallen from 1 to .1
#   narrow          factor of the decoder's first weights of n: fine modes that start wide take long to narrow
COARSE = dict(first=0.1, last=0.2, held=0.25, fallen=0.6, follow=0, decay=0.4, power=1, speeds={}, settle=0.4,
              sharp=(3, 0.27), code=1, narrow=1)
FINE = dict(first=0.1, last=0.2, held=0.35, fallen=0.6, follow=0.25, decay=0.2, power=1,
            speeds=dict(decoder=0.5, reconstruction_discriminator=5), settle=0.35, sharp=(6, 0.35), code=0.35,
            narrow=0.3)
SCHEDULES = {"mixture": COARSE, "ring": FINE, "grid": FINE,
             "four-points": dict(first=1.0, last=0.5, held=0.0, fallen=1.0, follow=0, decay=1.0, power=2, speeds={})}
SPEEDS = {  # rates in units of `--rate`
    "IAE": dict(encoder=4, decoder=1, reconstruction_discriminator=10, regularization_discriminator=4),
    "GAN": dict(generator=1, regularization_discriminator=10),
    "FIAE": dict(generator=1, recognition=1, reconstruction_discriminator=1, regularization_discriminator=1),
    "InfoGAN": dict(generator=1, recognition=1, regularization_discriminator=1),
}

#                  for             mixture        ring        grid        four-points
STEPS = dict(zip(DATA, (2500, 9000, 7000, 3000)))
WIDTHS = dict(zip(DATA, (64, 96, 128, 64)))
RATES = dict(zip(DATA, (1e-3, 1e-3, 1e-3, 2e-3)))
BATCHES = dict(zip(DATA, (256, 256, 512, 512)))
INFO_WEIGHT = 0.01


class MLP(nn.Module):
    """A ReLU network for each seed, batched: (seeds, batch, inputs) to (seeds, batch, outputs), or (seeds, batch) of 1.

    Takes its input in parts, any of them None, as iae.py's networks are called: f(x, eps), g(z, n), D(x, z), D(z).
    He's initialization, drawn from one torch.Generator a seed, but for the last layer, of half that variance, and the
    first: its weights and biases are N(0, 1), so that its kinks lie all over the data, not all in the origin. A softmax
    comes after a BatchNorm, "FC Linear. BN" of Appendix D.2, of scale 3 or what `train` sets: it keeps every code in
    use and none out of reach of gradients. slope is that of the ReLUs below 0: not 0 where a discriminator's units must
    survive a large rate.
    """

    def __init__(self, generators: list[torch.Generator], inputs: int, outputs: int, width: int, depth: int = 2,
                 softmax: bool = False, slope: float = 0.0):
        super().__init__()
        sizes = [inputs] + [width] * depth + [outputs]
        gains = [1.0] + [math.sqrt(2 / size) for size in sizes[1:-2]] + [math.sqrt(1 / sizes[-2])]
        self.weights = nn.ParameterList(
            torch.stack([gain * torch.randn(rows, columns, generator=g) for g in generators])  # (seeds, rows, columns)
            for gain, rows, columns in zip(gains, sizes, sizes[1:]))
        first = torch.stack([torch.randn(1, width, generator=g) for g in generators])
        self.biases = nn.ParameterList([first] + [torch.zeros(len(generators), 1, columns) for columns in sizes[2:]])
        self.norm = nn.BatchNorm1d(len(generators) * outputs, affine=False) if softmax else None
        self.slope, self.scale = slope, 3.0

    def forward(self, *parts: Tensor | None) -> Tensor:
        h = torch.cat([part for part in parts if part is not None], dim=-1)  # (seeds, batch, inputs)
        for bias, weight in zip(self.biases[:-1], self.weights):
            h = F.leaky_relu(torch.baddbmm(bias, h, weight), self.slope)  # (seeds, batch, width)
        h = torch.baddbmm(self.biases[-1], h, self.weights[-1])
        if self.norm is None:
            return h.squeeze(-1)
        logits = self.norm(h.transpose(0, 1).flatten(1)).unflatten(1, (len(h), -1))  # (batch, seeds, outputs)
        return (self.scale * logits).softmax(-1).transpose(0, 1)  # (seeds, batch, outputs)


class AdditiveNoise(nn.Module):
    """p(x|z) = N(network(z), deviation^2): the four points' generator. Its local noise n, (seeds, batch, 2), is the
    small noise that the data carry too, so z cannot be written into deviations of x that are smaller."""

    def __init__(self, network: nn.Module, deviation: float):
        super().__init__()
        self.network, self.deviation = network, deviation

    def forward(self, z: Tensor, n: Tensor) -> Tensor:
        return self.network(z) + self.deviation * n  # (seeds, batch, 2)


def mixture_model(kind: str, seeds: list[int], codes: int, local: int, width: int, narrow: float = 1.0,
                  **options) -> IAE | FIAE:
    """"IAE" or "GAN" of Figure 5 with the same decoder: a categorical code of `codes`, a Gaussian one of `local`.

    narrow scales the decoder's first weights of the Gaussian n, and so how wide its modes are at first.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    network = partial(MLP, generators, width=width)
    sizes = dict(shape=(2,), global_size=codes, local_size=local, prior="categorical")
    decoder = network(codes + local, 2)
    with torch.no_grad():
        decoder.weights[0][:, codes:] *= narrow
    if kind == "GAN":
        return FIAE(decoder, None, None, network(2, 1, slope=0.2), **sizes, **options)
    return IAE(network(2, codes, softmax=True), decoder, network(2 + codes, 1, slope=0.2),
               network(codes, 1), **sizes, **options)


def four_points_model(kind: str, seeds: list[int], deviation: float, width: int, info_weight: float, **options) -> FIAE:
    """"FIAE" (eps of size 4) or "InfoGAN" of Figures 8 and 9: a 2-D Gaussian code, x (2,)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = dict(shape=(2,), global_size=2, local_size=2)
    generator = AdditiveNoise(MLP(generators, 2, 2, width, depth=3), deviation)
    critic = MLP(generators, 2, 1, width)
    if kind == "InfoGAN":
        recognition = MLP(generators, 2, 4, width, depth=3)  # mean and log deviation
        return InfoGAN(generator, recognition, None, critic, reconstruction_weight=info_weight, **sizes, **options)
    recognition = MLP(generators, 2 + 4, 2, width, depth=3)
    joint = MLP(generators, 2 + 2, 1, width, depth=3)
    return FIAE(generator, recognition, joint, critic, noise_size=4, **sizes, **options)


def train(kind: str, model: IAE | FIAE, data: str, recipe: dict, options: argparse.Namespace, snapshot) -> list:
    """The alternating game of iae.py and fiae.py for `options.steps` steps; returns [(step, snapshot(model)), ...].

    Every loss is a mean over seeds and batch; times the seeds it is each seed's own mean, as if it trained alone.
    """
    deviation, seeds, batch = DATA[data][1], len(options.seeds), options.batch or BATCHES[data]
    plan = SCHEDULES[data]
    start, end = options.penalty or recipe["penalty"] or (plan["first"], plan["last"] * deviation**2)
    groups = [{"params": list(network.parameters()), "name": name} for name, network in model.named_children()]
    critics, players = ([group for group in groups if ("discriminator" in group["name"]) == which]
                        for which in (True, False))
    optimizers = [torch.optim.Adam(networks, betas=(0.0 if recipe["decay"] else 0.5, 0.99), fused=True)
                  for networks in (critics, players)]
    settle = recipe["settle"] and isinstance(model, IAE)
    if settle:
        model.regularization_weight = 1000.0
    steps = options.steps or STEPS[data]
    frame_at, frames = {round(steps * share) for share in (0.02, 0.05, 0.1, 0.2, 0.4, 1)}, []
    began = told = time.time()
    for step in range(1, steps + 1):
        progress = step / steps
        fall = 1.0  # gamma over what it starts from
        if start:
            share = (progress - plan["held"]) / (plan["fallen"] - plan["held"])
            fall = (end / start) ** min(1.0, max(0.0, share))
            model.penalty = model.regularization_penalty = start * fall
            if isinstance(model, IAE):
                model.regularization_penalty = 0.1 ** min(1.0, progress / plan["code"])
        if settle:
            model.code_noise = 0.3 * max(0.0, 1 - progress / plan["settle"])
            most, at = plan["sharp"]
            model.encoder.scale = most ** min(1.0, progress / at)
        for group in (*optimizers[0].param_groups, *optimizers[1].param_groups):
            group["lr"] = options.rate or RATES[data]
            if recipe["speeds"]:
                group["lr"] *= {**SPEEDS[kind], **plan["speeds"]}[group["name"]]
            if settle and group["name"] == "encoder":
                group["lr"] *= min(1.0, max(0.0, 1 - progress / plan["settle"]) / 0.75)
            elif recipe["decay"]:
                group["lr"] *= fall ** plan["follow"] * min(1.0, (1 - progress) / plan["decay"]) ** plan["power"]
        x = draw(data, seeds, batch)
        outputs = model(x)
        told_critics, real = model.discriminator_losses(x, *outputs)
        optimizers[0].zero_grad()
        (seeds * sum(told_critics.values())).backward(inputs=[p for group in critics for p in group["params"]])
        optimizers[0].step()
        told_players = model.autoencoder_losses(x, *outputs, real=real)
        optimizers[1].zero_grad()
        (seeds * sum(told_players.values())).backward(inputs=[p for group in players for p in group["params"]])
        optimizers[1].step()
        if step in frame_at:
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                Parser().error(f"{kind}: weights are not finite after {step} steps; try a lower --rate")
            with torch.no_grad():
                frames.append((step, snapshot(model)))
        if step == 20 or step == steps or time.time() - told > 10:
            told = time.time()
            losses = "  ".join(f"{k.replace('_discriminator', ' D')} {v.item():.3f}"
                               for k, v in {**told_critics, **told_players}.items())
            left = (told - began) / step * (steps - step)
            print(f"  {kind:8s} {step:5d}/{steps}  {losses}  {left:.0f} s left", flush=True)
    return frames


def draw(data: str, *size: int) -> Tensor:
    """x ~ p_data, (*size, 2)."""
    modes, deviation = DATA[data]
    return modes[torch.randint(len(modes), size)] + deviation * torch.randn(*size, 2)


# ------------------------------------------------------------------------------------------------ numbers of Figure 5

def mean_distance(r: Tensor, deviation: float) -> Tensor:
    """E |y| for y ~ N(m, deviation^2 I) in the plane with |m| = r, exactly (the mean of a Rice distribution)."""
    t = (r / (2 * deviation)).square()
    return deviation * math.sqrt(math.pi / 2) * ((1 + 2 * t) * torch.special.i0e(t) + 2 * t * torch.special.i1e(t))


def energy_distance(x: Tensor, modes: Tensor, deviation: float) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| between samples x (count, 2) and the exact mixture y; about 0 where equal."""
    cross = mean_distance(torch.cdist(x, modes), deviation).mean()
    within = mean_distance(torch.cdist(modes, modes), math.sqrt(2) * deviation).mean()
    return (2 * cross - torch.pdist(x).mean() - within).item()


def mixture_numbers(x: Tensor, code: Tensor, modes: Tensor, deviation: float) -> dict[str, float]:
    """What decides Figure 5, of one seed's samples x (count, 2) and the codes (count,) that they came from.

    good          share within three deviations of a mode (the data themselves: 98.9 %)
    modes         modes with a good sample
    spread_*      deviation of a mode's good samples over the same of the data, (1 - 4.5 e^-4.5 / (1 - e^-4.5))^.5
                  deviations; least and largest of the modes, and _thin in a mode's thinnest direction; 0 = collapsed
    bridge        share beyond four deviations of every mode (the data: .03 %)
    nmi           of the code and the nearest mode
    energy        energy distance to the exact density
    reverse_kl    KL(share of each mode || uniform), nats
    """
    distance, mode = torch.cdist(x, modes).min(1)  # (count,) both
    good = distance < 3 * deviation
    truth = deviation * math.sqrt(1 - 4.5 * math.exp(-4.5) / (1 - math.exp(-4.5)))
    spread, thin = [], []
    for k in range(len(modes)):
        points = x[good & (mode == k)]
        variances = torch.linalg.eigvalsh(torch.cov(points.T)) if len(points) > 2 else torch.zeros(2)
        spread.append(variances.mean().clamp(min=0).sqrt().item() / truth)
        thin.append(variances[0].clamp(min=0).sqrt().item() / truth)
    share = torch.bincount(mode, minlength=len(modes)) / len(x)
    return dict(good=good.double().mean().item(), modes=len(mode[good].unique()), spread_min=min(spread),
                spread_max=max(spread), spread_thin=min(thin), bridge=(distance > 4 * deviation).double().mean().item(),
                nmi=normalized_mutual_information(code, mode), energy=energy_distance(x[:5000], modes, deviation),
                reverse_kl=torch.special.xlogy(share, share * len(modes)).sum().item())


def clustering_accuracy(code: Tensor, mode: Tensor) -> float:
    """Share of data whose code (count,) names its mode (count,), each code standing for the mode it holds most of."""
    joint = torch.zeros(int(code.max()) + 1, int(mode.max()) + 1)
    joint.index_put_((code, mode), torch.ones(()), accumulate=True)
    return (joint.max(1).values.sum() / len(code)).item()


@torch.no_grad()
def run_mixture(data: str, kinds: tuple[str, ...], recipe: dict, options: argparse.Namespace, count: int, local: int):
    """Train and measure `kinds` on a mixture: numbers {model: {metric: [one a seed]}} and pictures {name: tensors}."""
    (modes, deviation), seeds = DATA[data], options.seeds
    torch.manual_seed(seeds[0])
    x, numbers, pictures = draw(data, len(seeds), count), {}, {}
    nearest = torch.cdist(x, modes).argmin(-1)  # (seeds, count)
    numbers["data"] = each_seed(lambda s: mixture_numbers(x[s], nearest[s], modes, deviation), seeds)

    def sample(model: nn.Module) -> tuple[Tensor, Tensor]:
        z = model.sample_codes(len(seeds), count)
        return model.decode(z), z.argmax(-1)  # (seeds, count, 2), (seeds, count)

    for kind in kinds:
        torch.manual_seed(seeds[0])
        width = options.width or WIDTHS[data]
        model = mixture_model(kind, seeds, len(modes), local, width, narrow=SCHEDULES[data]["narrow"],
                              objective=recipe["objective"])
        with torch.enable_grad():
            frames = train(kind, model, data, recipe, options,
                           lambda model: [part[0, :1500] for part in sample(model)])
        model.eval()
        x_hat, code = sample(model)
        numbers[kind] = each_seed(lambda s: mixture_numbers(x_hat[s], code[s], modes, deviation), seeds)
        if kind == "IAE":
            inferred = model.encode(x).argmax(-1)  # (seeds, count)
            numbers[kind]["accuracy"] = [clustering_accuracy(inferred[s], nearest[s]) for s in range(len(seeds))]
            pictures["encoder"] = x[0], inferred[0]
        pictures[kind], pictures[kind + " frames"] = (x_hat[0], code[0]), frames
    return numbers, pictures


def each_seed(measure, seeds: list[int]) -> dict[str, list[float]]:
    """{metric: [one number a seed]} of measure(index of the seed), a dictionary."""
    print(f"  measuring {len(seeds)} seed{'s' if len(seeds) > 1 else ''} ...", flush=True)
    rows = [measure(index) for index in range(len(seeds))]
    return {key: [row[key] for row in rows] for key in rows[0]}


# --------------------------------------------------------------------------------------- numbers of Figures 8 and 9

def border_alignment(network: nn.Module, points: Tensor, seeds: int, side: int = 200) -> list[float]:
    """How axis-aligned the borders between the true posteriors are, for each seed: the mean of cos 4 theta.

    theta is the direction of the border's normal; the mean is over the length of the borders, weighted by the density
    of p(z). 1: every border parallel to an axis (quadrants and parallel strips alike); -1: every border diagonal;
    0: no preference. network maps z (seeds, batch, 2) to noiseless x; a border separates different nearest points.
    """
    axis = torch.linspace(-3, 3, side)
    z = torch.cartesian_prod(axis, axis).expand(seeds, -1, -1).clone().requires_grad_()  # (seeds, side * side, 2)
    squares = torch.cdist(network(z), points.expand(seeds, -1, -1)).square()  # (seeds, side * side, points)
    label = squares.detach().argmin(-1).unflatten(1, (side, side))  # (seeds, side, side)
    total = weight = torch.zeros(seeds)
    for dim in (1, 2):  # cells whose next neighbour along this axis has another label lie on a border
        other = label.roll(-1, dim)
        on_border = label != other
        on_border.select(dim, -1).zero_()
        pair = squares.gather(2, torch.stack([label, other], -1).flatten(1, 2))  # (seeds, side * side, 2)
        normal, = torch.autograd.grad((pair[..., 0] - pair[..., 1]).sum(), z, retain_graph=True)
        theta = torch.atan2(normal[..., 1], normal[..., 0])
        # A border of normal theta meets |cos| + |sin| cells per unit of its length.
        density = (-0.5 * z.detach().square().sum(-1)).exp() / (theta.cos().abs() + theta.sin().abs())
        density = density * on_border.flatten(1)
        total, weight = total + (density * (4 * theta).cos()).sum(1), weight + density.sum(1)
    return (total / weight.clamp(min=1e-12)).tolist()


def overlap(q: Tensor) -> float:
    """Share of the mass of q (points, count, 2), one posterior a point, where another point's is the denser: the error
    of guessing the point from z. Densities by histogram, cells of .2; .75 all four alike (.69 of 10,000 draws, by
    chance). Posteriors that only touch have 0 to .05, of the cells that a border crosses."""
    cells = ((q.nan_to_num().clamp(-4, 3.999) + 4) / 0.2).long()  # (points, count, 2), 40 x 40 cells
    counts = torch.stack([torch.bincount(c[:, 0] * 40 + c[:, 1], minlength=1600) for c in cells])  # (points, 1600)
    return 1 - (counts.max(0).values.sum() / counts.sum()).item()


def true_posterior(network_of_z: Tensor, z: Tensor, point: Tensor, deviation: float) -> Tensor:
    """Exact samples of p(z|x = point) among z ~ p(z), (count, 2), by rejection: kept with p(x|z) / max p(x|z)."""
    keep = torch.rand(len(z)) < (-(network_of_z - point).square().sum(-1) / (2 * deviation**2)).exp()
    return z[keep]


@torch.no_grad()
def run_four_points(kinds: tuple[str, ...], recipe: dict, options: argparse.Namespace, count: int = 10000,
                    permutations: int = 100):
    """Train and measure `kinds` on the four points. Returns numbers and pictures as `run_mixture` does.

    distance     mean distance of the generator's noiseless output to the nearest of the four points, z ~ p(z)
    share_min    least share of a point in these (ideal .25)
    agreement    share of z ~ q(z|x_i) that the generator maps nearest to x_i: mass of q in its own true region
    overlap      of the four q(z|x_i), and true_overlap of the four p(z|x_i), which is 0 but for the histogram
    mmd, mmd_floor, mmd_p                  `mmd_test` of q(z), with x from the data, against p(z), `count` samples each
    posterior_mmd, _floor, _p              the same of q(z|x_i) against p(z|x_i) by rejection, of 2,500 samples at most:
                                           mean over the four points, nan where one of them has 100 or fewer
    alignment    of the true posterior's borders
    """
    (points, deviation), seeds = DATA["four-points"], options.seeds
    numbers, pictures = {}, {}

    def posteriors(model: nn.Module, rows: int) -> Tensor:
        return model.encode(points.repeat_interleave(rows, 0).expand(len(seeds), -1, -1)).unflatten(1, (4, rows))

    for kind in kinds:
        torch.manual_seed(seeds[0])
        model = four_points_model(kind, seeds, deviation, options.width or WIDTHS["four-points"], options.info_weight,
                                  objective=recipe["objective"])
        with torch.enable_grad():
            frames = train(kind, model, "four-points", recipe, options,
                           lambda model: posteriors(model, 400)[0])
            alignment = border_alignment(model.generator.network, points, len(seeds))
        network = model.generator.network
        z = torch.randn(len(seeds), 4 * count, 2)
        x_hat = network(z)  # (seeds, 4 * count, 2), noiseless
        distance, label = torch.cdist(x_hat, points.expand(len(seeds), -1, -1)).min(-1)
        q = posteriors(model, count)  # (seeds, 4, count, 2)
        back = torch.cdist(network(q.flatten(1, 2)), points.expand(len(seeds), -1, -1)).argmin(-1)
        agreement = (back.unflatten(1, (4, count)) == torch.arange(4)[:, None]).double().mean((1, 2))
        aggregated = model.encode(draw("four-points", len(seeds), count))  # q(z), (seeds, count, 2)

        def measure(s: int) -> dict[str, float]:
            tests = []
            true = [true_posterior(x_hat[s], z[s], point, deviation) for point in points]
            for p, q_i in zip(true, q[s]):
                rows = min(len(p), 2500)
                tests.append(mmd_test(q_i[:rows], p[:rows], permutations) if rows > 100 else {})
            to_prior = mmd_test(aggregated[s], torch.randn(count, 2), permutations)
            rows = max(1, min(map(len, true)))
            return dict(distance=distance[s].mean().item(), agreement=agreement[s].item(), overlap=overlap(q[s]),
                        share_min=torch.bincount(label[s], minlength=4).min().item() / (4 * count),
                        true_overlap=overlap(torch.stack([p[:rows] for p in true])) if rows > 100 else math.nan,
                        alignment=alignment[s], mmd=to_prior["mmd"], mmd_floor=to_prior["floor"], mmd_p=to_prior["p"],
                        **{f"posterior_{key}": sum(test.get(key, math.nan) for test in tests) / 4 for key in to_prior})

        numbers[kind] = each_seed(measure, seeds)
        pictures[kind] = ([true_posterior(x_hat[0], z[0], point, deviation)[:1500] for point in points],
                          list(q[0, :, :1500]), model.generator(z[0:1, :1500].expand(len(seeds), -1, -1),
                                                                torch.randn(len(seeds), 1500, 2))[0], label[0, :1500])
        pictures[kind + " frames"] = frames
    return numbers, pictures


# ------------------------------------------------------------------------------------------------------------ figures

FOUR = ("#3b6fb6", "#e08a2e", "#3f9c6d", "#c2504f")  # one colour a point
INK = "#333333"
plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "axes.edgecolor": "#cccccc", "text.color": INK,
                     "axes.titlecolor": INK, "font.family": "DejaVu Sans", "savefig.dpi": 150})


def colours(labels: Tensor, count: int) -> list:
    """One colour for each label of `count`: ten that are easy to tell apart, a colour wheel for more."""
    wheel = plt.get_cmap("hsv")(torch.linspace(0, 0.96, count).numpy())
    palette = plt.get_cmap("tab10").colors if count <= 10 else wheel
    return [palette[label] for label in labels.tolist()]


def panel(axes, title: str, below: str, points: Tensor, colour, limit: float, size: float = 3) -> None:
    """One scatter plot: equal axes, no ticks, a title above and the deciding numbers below."""
    axes.scatter(*points.T, s=size, c=colour, linewidths=0, alpha=0.7, rasterized=True)
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.set_xlabel(below, fontsize=7, color=INK, linespacing=1.5)


def save(figure, folder: Path, name: str) -> None:
    """Write a figure as folder/name (PNG) and close it."""
    path = folder / name
    write_figure(figure, str(path), bbox_inches="tight")
    print(f"  saved {path}")


def summary(numbers: dict[str, list[float]]) -> str:
    """The numbers under a panel of Figure 5, of the first seed."""
    first = {key: values[0] for key, values in numbers.items()}
    return (f"{100 * first['good']:.1f} % good samples, {first['modes']:.0f} modes\n"
            f"NMI of code and mode {first['nmi']:.3f}\n"
            f"spread {first['spread_min']:.2f} to {first['spread_max']:.2f} of the data's")


def mixture_figure(data: str, numbers: dict, pictures: dict, folder: Path) -> None:
    """Figure 5, and as a fourth panel what the encoder makes of the data."""
    modes, deviation = DATA[data]
    limit, count = modes.abs().max().item() * 1.25 + 3 * deviation, len(modes)
    kinds = [kind for kind in ("GAN", "IAE") if kind in numbers]
    figure, axes = plt.subplots(1, 2 + len(kinds), figsize=(2.5 * (2 + len(kinds)), 3))
    x, inferred = (part[:3000] for part in pictures["encoder"])
    panel(axes[0], "(a) Data", f"{100 * numbers['data']['good'][0]:.1f} % good samples", x, "#777777", limit)
    for axis, letter, kind in zip(axes[1:], "bc", kinds):
        samples, code = (part[:3000] for part in pictures[kind])
        panel(axis, f"({letter}) {kind} samples by their code", summary(numbers[kind]), samples, colours(code, count),
              limit)
    panel(axes[-1], f"({'abcd'[1 + len(kinds)]}) Data by the IAE's encoder",
          f"clustering accuracy {100 * numbers['IAE']['accuracy'][0]:.2f} %", x, colours(inferred, count), limit)
    save(figure, folder, f"toy_{data}.png")
    frames = len(pictures[kinds[0] + " frames"])
    figure, axes = plt.subplots(len(kinds), frames, figsize=(10 / 6 * frames, 1.8 * len(kinds)), squeeze=False)
    for row, kind in zip(axes, kinds):
        for axis, (step, (samples, code)) in zip(row, pictures[kind + " frames"]):
            panel(axis, f"{kind}, step {step}", "", samples, colours(code, count), limit, size=2)
    save(figure, folder, f"toy_{data}_training.png")


def four_points_figure(numbers: dict, pictures: dict, folder: Path) -> None:
    """Figures 8 (InfoGAN) and 9 (FIAE): a row a model; a colour a point."""
    kinds = [kind for kind in ("InfoGAN", "FIAE") if kind in numbers]
    figure, axes = plt.subplots(len(kinds), 3, figsize=(8.2, 3.3 * len(kinds)), squeeze=False)
    for row, kind in zip(axes, kinds):
        true, variational, x_hat, label = pictures[kind]
        first = {key: values[0] for key, values in numbers[kind].items()}
        stack = lambda parts: (torch.cat(parts), [FOUR[i] for i, part in enumerate(parts) for _ in part])  # noqa: E731
        panel(row[0], f"{kind}: true posterior p(z|x)", f"borders' axis alignment {first['alignment']:+.2f}\n"
              f"(1 axis-aligned, -1 diagonal)", *stack(true), 3.6)
        panel(row[1], f"{kind}: variational posterior q(z|x)", f"agreement {100 * first['agreement']:.1f} %, overlap "
              f"{100 * first['overlap']:.1f} %\nMMD² to p(z) {first['mmd']:.5f} (floor {first['mmd_floor']:.5f})",
              *stack(variational), 3.6)
        panel(row[2], f"{kind}: samples x ~ p(x)", f"distance to the four {first['distance']:.3f}\n"
              f"least share {first['share_min']:.2f}", x_hat, [FOUR[i] for i in label.tolist()], 2)
    figure.subplots_adjust(hspace=0.3)
    save(figure, folder, "toy_four_points.png")
    frames = len(pictures[kinds[0] + " frames"])
    figure, axes = plt.subplots(len(kinds), frames, figsize=(10 / 6 * frames, 1.8 * len(kinds)), squeeze=False)
    for row, kind in zip(axes, kinds):
        for axis, (step, q) in zip(row, pictures[kind + " frames"]):
            panel(axis, f"{kind}, step {step}", "", q.flatten(0, 1), [c for c in FOUR for _ in q[0]], 3.6, size=2)
    save(figure, folder, "toy_four_points_training.png")


# ------------------------------------------------------------------------------------------------- tables, files, main

def mean_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and deviation (n - 1) of the numbers that exist, nan where none does."""
    values = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.double)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def print_table(title: str, numbers: dict[str, dict[str, list[float]]]) -> None:
    """A row a metric, a column a model: mean +- deviation over the seeds, and the range in brackets; where a seed has
    no number, how many have."""
    width = 40 if any(len(values) > 1 for column in numbers.values() for values in column.values()) else 10
    print(f"\n{title}\n  {'':14s}" + "".join(f"{kind:>{width}s}" for kind in numbers))
    metrics = list(dict.fromkeys(metric for column in numbers.values() for metric in column))
    for metric in metrics:
        cells = []
        for column in numbers.values():
            values = column.get(metric, [])
            mean, deviation = mean_deviation(values)
            found = [value for value in values if not math.isnan(value)]
            spread = f" +- {deviation:.2g} [{min(found):.3g}, {max(found):.3g}]" if len(found) > 1 else ""
            lost = f" ({len(found)} of {len(values)} seeds)" if len(found) < len(values) else ""
            cells.append("" if math.isnan(mean) else f"{mean:.4g}{spread}{lost}")
        print(f"  {metric:14s}" + "".join(f"{cell:>{width}s}" for cell in cells))


def save_numbers(path: Path, options: argparse.Namespace, numbers: dict, wall: float) -> None:
    """Numbers of every seed as JSON, and what is needed to get them again."""
    clean = lambda value: None if math.isnan(value) else value  # noqa: E731  (JSON has no nan)
    results = {kind: {metric: dict(mean=clean(mean_deviation(values)[0]), deviation=clean(mean_deviation(values)[1]),
                                   per_seed=[clean(value) for value in values])
                      for metric, values in column.items()} for kind, column in numbers.items()}
    settings = dict(steps=options.steps or STEPS, batch=options.batch or BATCHES, width=options.width or WIDTHS,
                    rate=options.rate or RATES, penalty=options.penalty, info_weight=options.info_weight)
    write_json(str(path), dict(command=options.command, seeds=options.seeds, recipe=options.recipe, settings=settings,
                               wall_seconds=round(wall, 1), host=options.host, results=results))
    print(f"  saved {path}")


# Published numbers, 2,500 samples (Lin et al. 2018, PacGAN, which trained GAN and ALI beside it): modes, good share.
PUBLISHED = {
    "ring": "GAN 6.3 modes 98.2 %   ALI 6.6 modes 97.6 %   PacGAN2 7.9 modes 95.6 %",
    "grid": "GAN 17.3 modes 94.8 %   ALI 24.1 modes 95.7 %   PacGAN4 24.8 modes 93.6 %",
}


def mixture(options: argparse.Namespace) -> None:
    """Figure 5: GAN and IAE with the same decoder, recipe and steps."""
    began = time.time()
    numbers, pictures = run_mixture("mixture", ("GAN", "IAE"), RECIPES[options.recipe], options, count=10000, local=10)
    print_table("Mixture of seven Gaussians (Figure 5)", numbers)
    save_numbers(options.out / "toy_mixture.json", options, numbers, time.time() - began)
    mixture_figure("mixture", numbers, pictures, options.figures)


def four_points(options: argparse.Namespace) -> None:
    """Figures 8 and 9: InfoGAN and FIAE."""
    began = time.time()
    numbers, pictures = run_four_points(("InfoGAN", "FIAE"), RECIPES[options.recipe], options)
    print_table("Four points (Figures 8 and 9)", numbers)
    # P(y > 0)^2 of y with the mean (2 / pi)^.5 and the variance 1 - 2 / pi of half a Gaussian, N(0, 1) cut at 0
    quadrant = (0.5 + 0.5 * math.erf(math.sqrt(1 / (math.pi - 2)))) ** 2
    print(f"  Gaussians with the moments of four quadrants, whatever their rotation: agreement {quadrant:.3f}.\n"
          "  More than that means a code smuggled through small deviations of x, or regions that are no quadrants.")
    save_numbers(options.out / "toy_four_points.json", options, numbers, time.time() - began)
    four_points_figure(numbers, pictures, options.figures)


def standard(data: str, options: argparse.Namespace) -> None:
    """The "ring" of 8 or the "grid" of 25: an IAE with as many codes, 2,500 samples, beside published numbers."""
    began = time.time()
    numbers, pictures = run_mixture(data, ("IAE",), RECIPES[options.recipe], options, count=2500, local=4)
    print_table(f"The {data} of {len(DATA[data][0])}, 2,500 samples", numbers)
    print(f"  published: {PUBLISHED[data]}")
    save_numbers(options.out / f"toy_{data}.json", options, numbers, time.time() - began)
    mixture_figure(data, numbers, pictures, options.figures)


def ablation(options: argparse.Namespace) -> None:
    """Each recipe on both toys: what the paper's losses do alone, and what each added piece changes. What is done is
    saved after each recipe."""
    began, mixtures, points = time.time(), {}, {}

    def save_json():
        named = {name if "InfoGAN" in name else f"FIAE, {name}": values for name, values in points.items()}
        numbers = {**{f"IAE, {name}": values for name, values in mixtures.items()}, **named}
        save_numbers(options.out / "toy_ablation.json", options, numbers, time.time() - began)

    for name, recipe in RECIPES.items():
        print(f"recipe {name}: {recipe}")
        mixtures[name] = run_mixture("mixture", ("IAE",), recipe, options, count=10000, local=10)[0]["IAE"]
        points[name] = run_four_points(("FIAE",), recipe, options, count=2500, permutations=20)[0]["FIAE"]
        save_json()
    for weight in (options.info_weight, 1.0):
        weighted = argparse.Namespace(**{**vars(options), "info_weight": weight})
        numbers, _ = run_four_points(("InfoGAN",), RECIPES["stable"], weighted, count=2500, permutations=20)
        points[f"InfoGAN, {weight:g}"] = numbers["InfoGAN"]
    save_json()
    for title, rows, metrics in (
            ("Mixture, IAE", mixtures, ("good", "modes", "spread_min", "spread_max", "nmi", "accuracy")),
            ("Four points, FIAE", points, ("distance", "share_min", "agreement", "mmd", "overlap", "posterior_mmd"))):
        print(f"\n{title}\n  {'recipe':18s}" + "".join(f"{metric:>20s}" for metric in metrics))
        for name, column in rows.items():
            cells = []
            for metric in metrics:
                mean, deviation = mean_deviation(column[metric])
                lost = sum(map(math.isnan, column[metric]))
                cells.append(f"{mean:.4f}" + (f" +- {deviation:.4f}" if len(options.seeds) > 1 else "")
                             + (f" (-{lost})" if lost else ""))
            print(f"  {name:18s}" + "".join(f"{cell:>20s}" for cell in cells))


TOYS = {"mixture": mixture, "four-points": four_points, "ring": partial(standard, "ring"),
        "grid": partial(standard, "grid"), "ablation": ablation}


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with status 2 and one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"toy.py: {message}\n")


def positive(number_type):
    """An argparse type: `number_type` above 0."""
    def parse(text: str):
        value = number_type(text)
        if not 0 < value < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and below {2**31}")
        return value
    parse.__name__ = number_type.__name__  # argparse's messages name it
    return parse


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line (default: this program's); where they are bad, one line and exit status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toys", nargs="*", metavar="toy",
                        help=f"any of {', '.join(TOYS)}, standards (ring and grid); default: mixture four-points")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="all train in one pass, the figures show the first (default: 0)")
    parser.add_argument("--recipe", choices=RECIPES, default="stable",
                        help="stable (default): penalties R1 and R2, annealed, falling rates, no momentum, each "
                        "network at its own rate, codes that settle first; paper: Eq. 1 and 9 and Adam, nothing "
                        "else; kl: stable with the KL f-GAN in place of Eq. 1; penalty, annealed, decayed, speeds: "
                        "the steps from paper to stable")
    parser.add_argument("--steps", type=positive(int), help=f"default {STEPS}")
    parser.add_argument("--batch", type=positive(int), help=f"rows a step and seed, default {BATCHES}")
    parser.add_argument("--width", type=positive(int), help=f"hidden units of every layer, default {WIDTHS}")
    parser.add_argument("--rate", type=positive(float),
                        help=f"Adam's learning rate, default {RATES}; in speeds, stable and kl the rate of networks of "
                        "speed 1, the others in proportion")
    parser.add_argument("--penalty", type=positive(float), nargs=2, metavar=("START", "END"),
                        help="gamma of the penalty at first and at last, in place of the recipe's")
    parser.add_argument("--info-weight", type=positive(float), default=INFO_WEIGHT,
                        help="weight of InfoGAN's reconstruction cost beside its GAN "
                        f"(default {INFO_WEIGHT}; with 1 it leaves the points to write the code into x)")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the JSON (default runs/toy)")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: that of --out)")
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "toy.py", *(sys.argv[1:] if arguments is None else arguments)])
    options.host = host_facts(torch.device("cpu"))
    options.figures = options.figures or options.out
    options.toys = [name for toy in options.toys or ["mixture", "four-points"]
                    for name in (("ring", "grid") if toy == "standards" else (toy,))]
    for toy in options.toys:
        if toy not in TOYS:
            parser.error(f"no toy is called {toy!r}: use {', '.join(TOYS)} or standards")
    if not all(0 <= seed < 2**31 for seed in options.seeds) or len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds: from 0 to 2147483647, each once")
    if options.batch == 1:
        parser.error("--batch 1: BatchNorm needs at least 2 rows")
    if "ablation" in options.toys and (options.recipe != "stable" or options.penalty):
        parser.error("ablation has recipes and penalties of its own: drop --recipe and --penalty")
    return options


def main(arguments: list[str] | None = None) -> None:
    """The command line; status 2 and one line on bad input."""
    options, began = parse(arguments), time.time()
    torch.set_num_threads(1)  # the matrices are too small to be worth a second thread
    for folder in (options.out, options.figures):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".toy.{os.getpid()}"  # before the training, not after it
            probe.touch()
            probe.unlink()
        except OSError as error:
            Parser().error(f"cannot write to {folder}: {error.strerror}")
    for toy in dict.fromkeys(options.toys):
        print(f"{toy}: recipe {options.recipe}, seeds {' '.join(map(str, options.seeds))}", flush=True)
        try:
            TOYS[toy](options)
        except InputError as error:
            Parser().error(f"{toy}: {error}")
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            Parser().error(f"{toy}: too little memory; try a smaller --width or --batch, or fewer --seeds")
        except KeyboardInterrupt:
            print(f"{toy} stopped; what was saved before is whole", file=sys.stderr)
            sys.exit(130)
    print(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
