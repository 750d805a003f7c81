"""Proofs rather than coverage: the losses against exact distributions and finite differences, the networks against
Appendix D.2 counted by hand, the scripts by running them on data that the tests make. No network, no GPU needed."""

import ast
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import iae
import metrics
import train
from data import InputError
from iae import IAE, CodeDiscriminator, Decoder, Encoder, JointDiscriminator

HERE = pathlib.Path(__file__).parent
torch.set_num_threads(2)

MNIST, SVHN, CELEBA = (1, 28, 28), (3, 32, 32), (3, 48, 48)


def count(module):
    return sum(p.numel() for p in module.parameters())


def fc(i, o):
    return i * o + o


def cv(i, o, k):
    return i * o * k * k + o


def bn(n):
    return 2 * n


# ------------------------------------------------------------------------------------------- Appendix D.2, by hand


def test_mnist_networks_have_appendix_d2s_parameters():
    assert count(Encoder(MNIST, 20)) == fc(784, 2000) + fc(2000, 2000) + fc(2000, 20)  # the last BN has no scale
    assert count(Decoder(MNIST, 20, 100)) == (
        fc(120, 1024) + bn(1024) + fc(1024, 128 * 7 * 7) + bn(128) + cv(128, 64, 4) + bn(64) + cv(64, 1, 4))
    body = cv(1, 64, 4) + bn(64) + cv(64, 128, 4) + bn(128) + fc(128 * 7 * 7, 1024) + bn(1024) + fc(1024, 1)
    assert count(JointDiscriminator(MNIST, 20)) == body + fc(20, 1000) + fc(1000, 14 * 14)
    assert count(JointDiscriminator(MNIST, 20, "invariant")) == body + fc(20, 64)
    assert count(JointDiscriminator(MNIST, 0)) == body
    assert count(CodeDiscriminator(20)) == fc(20, 2000) + fc(2000, 2000) + fc(2000, 1)


@pytest.mark.parametrize("shape, widths, k, code, local", [(SVHN, (64, 128, 256), 4, 75, 1000),
                                                            (CELEBA, (128, 256, 512), 6, 50, 1000)])
def test_colour_networks_have_appendix_d2s_parameters(shape, widths, k, code, local):
    a, b, c = widths
    side = shape[1] // 8
    convs = cv(3, a, k) + bn(a) + cv(a, b, k) + bn(b) + cv(b, c, k) + bn(c)
    assert count(Encoder(shape, code)) == convs + fc(c * side * side, code)
    assert count(Decoder(shape, code, local)) == (
        fc(code + local, c * side * side) + bn(c) + cv(c, b, k) + bn(b) + cv(b, a, k) + bn(a) + cv(a, 3, k))
    side_1 = shape[1] // 2
    assert count(JointDiscriminator(shape, code)) == (
        convs + fc(c * side * side, 1) + fc(code, 1000) + fc(1000, side_1 * side_1))


@pytest.mark.parametrize("shape, low", [(MNIST, 0), (SVHN, -1), (CELEBA, -1), ((1, 16, 40), -1), ((3, 28, 28), 0)])
def test_shapes_and_ranges(shape, low):
    model, x = IAE.for_images(shape, 5, 7, noise_size=3), torch.rand(4, *shape)
    z_hat, x_hat = model(x)
    assert z_hat.shape == (4, 5) and x_hat.shape == x.shape and model.sample(3).shape == (3, *shape)
    extreme = model.decode(torch.randn(64, 5) * 100, torch.randn(64, 7) * 100)
    assert extreme.min() >= low and extreme.max() <= 1 and (low == 0 or extreme.min() < 0)
    pixels = torch.randint(256, (4, *shape), dtype=torch.uint8)
    assert torch.equal(iae.to_uint8(iae.to_range(pixels, shape)), pixels)
    ends = iae.to_range(torch.tensor([0, 255], dtype=torch.uint8), shape)
    assert ends.tolist() == pytest.approx([low, 1])


@pytest.mark.parametrize("shape", [(1, 30, 30), (2, 28, 28), (1, 0, 8), (3, 28, 32)])
def test_no_layout_fits(shape):
    with pytest.raises(ValueError, match="use"):
        IAE.for_images(shape, 5, 5)


def test_conditioning_is_a_map_for_all_channels_or_a_bias_for_all_places():
    z = torch.randn(3, 6)
    for kind, shape in (("dependent", (3, 1, 14, 14)), ("invariant", (3, 64, 1, 1))):
        d = JointDiscriminator(MNIST, 6, kind)
        assert d.condition(z).shape == shape
        first = []  # what the first BatchNorm sees: the code is added before it
        d.layers[0].register_forward_hook(lambda module, inputs, output: first.append(inputs[0]))
        x = torch.rand(3, *MNIST)
        d(x, z)
        assert torch.allclose(first[0], d.first(x) + d.condition(z).expand(3, 64, 14, 14), atol=1e-6)


def test_gaussian_codes_are_normalized_and_categorical_ones_lie_on_the_simplex():
    x = torch.rand(500, *MNIST)
    z = Encoder(MNIST, 5)(x)
    assert z.mean(0).abs().max() < 1e-4 and (z.var(0, unbiased=False) - 1).abs().max() < 0.05
    z = Encoder(MNIST, 5, prior="categorical")(x)
    assert (z >= 0).all() and torch.allclose(z.sum(1), torch.ones(500))


def test_batch_norm_before_a_softmax_would_cap_the_confidence():
    # Ten codes used evenly and as confidently as can be: logits one-hot times a large number, then standardized.
    logits = F.one_hot(torch.arange(10).repeat(50), 10) * 1e3
    capped = torch.nn.BatchNorm1d(10, affine=False)(logits.float()).softmax(1).max().item()
    assert capped == pytest.approx(math.exp(3) / (math.exp(3) + 9 * math.exp(-1 / 3)), abs=1e-3)  # .757
    encoder = Encoder(MNIST, 10, prior="categorical")
    torch.nn.init.normal_(encoder.head[-2].weight, std=100)
    assert encoder(torch.rand(100, *MNIST)).max() > 0.999


def test_the_literal_layer_order_cannot_train_and_ours_can():
    """"FC ReLU. BN" then "FC 1": with real and fake in separate passes the mean logit is the bias on both sides."""
    torch.manual_seed(0)
    real, fake = torch.rand(64, *MNIST), torch.rand(64, *MNIST) * 0.1
    ours = JointDiscriminator(MNIST, 0)
    literal = JointDiscriminator(MNIST, 0)
    literal.fc = torch.nn.Sequential(literal.fc[0], torch.nn.ReLU(), torch.nn.BatchNorm1d(1024), literal.fc[3])
    for d, bounded in ((literal, True), (ours, False)):
        optimizer = torch.optim.Adam(d.parameters(), 1e-3)
        for _ in range(15):
            loss = iae.discriminator_loss(d(real), d(fake))
            if bounded:
                assert loss.item() >= 2 * math.log(2) - 1e-4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert bounded or loss.item() < 0.5


# ------------------------------------------------------------------------------------------ losses, exact references


def test_optimal_discriminators_on_finite_distributions():
    """The loss at the optimum: 2 ln 2 - 2 JSD for Eq. 1 (at logit log p/q), -KL for the f-GAN bound (at 1 + log p/q)."""
    torch.manual_seed(1)
    p, q = torch.randn(2, 12, dtype=torch.double).softmax(1)
    mean = (p + q) / 2
    jsd = 0.5 * (p * (p / mean).log()).sum() + 0.5 * (q * (q / mean).log()).sum()
    kl = (p * (p / q).log()).sum()
    counts = 10**6  # expectations as means over a table of examples, each point as often as its probability says
    table_p = torch.repeat_interleave(torch.arange(12), (p * counts).round().long())
    table_q = torch.repeat_interleave(torch.arange(12), (q * counts).round().long())
    for objective, best, value in (("gan", (p / q).log(), 2 * math.log(2) - 2 * jsd), ("kl", 1 + (p / q).log(), -kl)):
        found = iae.discriminator_loss(best[table_p], best[table_q], objective)
        assert found.item() == pytest.approx(value.item(), abs=1e-5)
        for _ in range(5):  # and no other discriminator does better
            other = best + 0.3 * torch.randn(12, dtype=torch.double)
            assert iae.discriminator_loss(other[table_p], other[table_q], objective) > found


def test_paired_loss_ignores_what_the_pair_shares():
    real, fake, shared = torch.randn(3, 50)
    for loss in (iae.discriminator_loss, iae.generator_loss):
        assert torch.allclose(loss(real + shared, fake + shared, "paired"), loss(real, fake, "paired"), atol=1e-6)
    assert iae.discriminator_loss(real, real, "paired").item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("objective", ["gan", "paired", "kl"])
def test_the_players_pull_in_opposite_directions(objective):
    """The discriminator's loss falls as real logits rise and fake ones fall; the generator's as fake ones rise."""
    real, fake = torch.randn(2, 20).requires_grad_(), torch.randn(20).requires_grad_()
    real = real[0]
    d_real, d_fake = torch.autograd.grad(iae.discriminator_loss(real, fake, objective), (real, fake))
    assert (d_real < 0).all() and (d_fake > 0).all()
    g_fake, = torch.autograd.grad(iae.generator_loss(real, fake, objective), fake)
    assert (g_fake < 0).all()
    if objective == "gan":
        assert torch.allclose(iae.generator_loss(None, fake), -torch.sigmoid(fake).log().mean())  # T = -log D, Eq. 9


def test_gradient_penalty_of_a_linear_discriminator_in_closed_form():
    class Linear(torch.nn.Module):
        def forward(self, x, z):
            return 3 * x.sum((1, 2, 3)) + 2 * z.sum(1)

    x, z = torch.rand(5, 1, 2, 2), torch.rand(5, 3)
    bare = iae.discriminate(Linear(), (x, z), (x + 1, z))
    with_penalty = iae.discriminate(Linear(), (x, z), (x + 1, z), penalty=0.1)
    assert (with_penalty - bare).item() == pytest.approx(0.1 / 2 * 2 * (4 * 9 + 3 * 4), rel=1e-4)


class Tiny(torch.nn.Module):
    """A smooth network in double precision for finite differences; several inputs are concatenated."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(inputs, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs))
        self.outputs = outputs

    def forward(self, *inputs):
        h = self.layers(torch.cat([part for part in inputs if part is not None], dim=-1))
        return h.squeeze(-1) if self.outputs == 1 else h


def tiny(**options):
    torch.manual_seed(3)
    torch.set_default_dtype(torch.double)
    try:
        return IAE(Tiny(2, 3), Tiny(3 + 2, 2), Tiny(2 + 3, 1), Tiny(3, 1), shape=(2,), global_size=3, local_size=2, **options)
    finally:
        torch.set_default_dtype(torch.float32)


class InDouble:
    """IAE casts to float32 (for bf16 training); the finite differences need the double-precision path."""

    def __init__(self, model, x, n):
        self.model, self.x, self.n = model, x, n

    def loss(self):
        z_hat = self.model.encoder(self.x)
        return self.model.autoencoder_losses(self.x, z_hat, self.model.decoder(z_hat, self.n))


@pytest.mark.parametrize("objective", ["gan", "paired", "kl"])
def test_generator_gradient_equals_finite_differences(objective):
    """Eq. 10: the gradient of E[T(g(f(x), n), f(x))], through both places that z_hat stands in, D held fixed."""
    torch.manual_seed(0)
    model, x, n = tiny(objective=objective), torch.randn(6, 2).double(), torch.randn(6, 2).double()
    view = InDouble(model, x, n)
    constant = model.encoder(x).detach()  # the positive pair's z_hat stays what it was while f and g are moved

    def reference():
        z_hat = model.encoder(x)
        fake = model.reconstruction_discriminator(model.decoder(z_hat, n), z_hat)
        real = model.reconstruction_discriminator(x, constant)
        t = {"gan": F.softplus(-fake), "paired": F.softplus(real - fake), "kl": -fake}[objective]
        return t.mean()

    view.loss()["reconstruction"].backward()
    for part in (model.encoder, model.decoder):
        weight = part.layers[0].weight
        for i, j in itertools.product(range(3), range(2)):
            kept, step = weight.data[i, j].item(), 1e-5
            weight.data[i, j] = kept + step
            up = reference().item()
            weight.data[i, j] = kept - step
            down = reference().item()
            weight.data[i, j] = kept
            assert weight.grad[i, j].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-8)


def encoder_gradient(model, x, n, through_x_hat=True, through_z_hat=True):
    z_hat = model.encoder(x)
    x_hat = model.decoder(z_hat if through_x_hat else z_hat.detach(), n)
    loss = model.autoencoder_losses(x, z_hat if through_z_hat else z_hat.detach(), x_hat)["reconstruction"]
    gradient = torch.autograd.grad(loss, model.encoder.layers[0].weight, allow_unused=True)[0]
    return torch.zeros(()) if gradient is None else gradient


def test_both_paths_of_the_negative_pair_reach_the_encoder_and_the_positive_pair_does_not():
    x, n = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    for objective in ("gan", "paired", "kl"):
        model = tiny(objective=objective)
        whole = encoder_gradient(model, x, n)
        by_x, by_z = encoder_gradient(model, x, n, through_z_hat=False), encoder_gradient(model, x, n, through_x_hat=False)
        assert by_x.abs().max() > 1e-6 and by_z.abs().max() > 1e-6
        assert torch.allclose(whole, by_x + by_z)  # nothing else: the positive pair adds nothing
        variant = tiny(objective=objective, positive_gradient=True)  # footnote 1's alternative
        assert not torch.allclose(encoder_gradient(variant, x, n), whole)


def gradients(model, loss):
    """The networks that `loss` moves."""
    model.zero_grad()
    loss.backward()
    return {name for name, child in model.named_children()
            if any(p.grad is not None and p.grad.abs().max() > 0 for p in child.parameters())}


def test_who_descends_what():
    x = torch.randn(8, 2)
    model = tiny().float()
    z_hat, x_hat = model(x)
    losses = model.discriminator_losses(x, z_hat, x_hat)
    assert gradients(model, losses["reconstruction_discriminator"]) == {"reconstruction_discriminator"}
    assert gradients(model, losses["regularization_discriminator"]) == {"regularization_discriminator"}
    for discriminator in (model.reconstruction_discriminator, model.regularization_discriminator):
        discriminator.requires_grad_(False)
    losses = model.autoencoder_losses(x, *model(x))
    assert gradients(model, losses["reconstruction"]) == {"encoder", "decoder"}
    losses = model.autoencoder_losses(x, *model(x))
    assert gradients(model, losses["regularization"]) == {"encoder"}


def test_each_switch_removes_exactly_what_it_says():
    x = torch.rand(4, *MNIST)

    def parts(global_size=4, local_size=6, **options):
        model = IAE.for_images(MNIST, global_size, local_size, **options)
        outputs = model(x)
        return (model, {name for name, child in model.named_children() if child is not None},
                set(model.discriminator_losses(x, *outputs)), set(model.autoencoder_losses(x, *outputs)))

    everything = {"encoder", "decoder", "reconstruction_discriminator", "regularization_discriminator"}
    assert parts()[1:] == (everything, {"reconstruction_discriminator", "regularization_discriminator"},
                           {"reconstruction", "regularization"})
    assert parts(regularization=False)[1:] == (everything - {"regularization_discriminator"},
                                               {"reconstruction_discriminator"}, {"reconstruction"})
    assert parts(euclidean=True)[1:] == (everything - {"reconstruction_discriminator"},
                                         {"regularization_discriminator"}, {"reconstruction", "regularization"})
    assert parts(global_size=0)[1:] == ({"decoder", "reconstruction_discriminator"}, {"reconstruction_discriminator"},
                                        {"reconstruction"})
    deterministic, noisy = parts(local_size=0)[0].eval(), parts(local_size=6)[0].eval()
    assert torch.equal(deterministic.reconstruct(x), deterministic.reconstruct(x))
    assert not torch.equal(noisy.reconstruct(x), noisy.reconstruct(x))
    stochastic = parts(noise_size=3)[0].eval()
    assert torch.equal(noisy.encode(x), noisy.encode(x)) and not torch.equal(stochastic.encode(x), stochastic.encode(x))


def test_euclidean_reconstruction_is_the_unit_gaussians_negative_log_likelihood():
    model, x = IAE.for_images(MNIST, 4, 0, euclidean=True), torch.rand(4, *MNIST)
    z_hat, x_hat = model(x)
    exact = -torch.distributions.Normal(x_hat, 1).log_prob(x).sum((1, 2, 3)).mean() - 784 * 0.5 * math.log(2 * math.pi)
    assert model.autoencoder_losses(x, z_hat, x_hat)["reconstruction"].item() == pytest.approx(exact.item(), rel=1e-4)


def test_priors_and_the_fitted_gaussian():
    torch.manual_seed(0)
    z = iae.sample_prior("gaussian", 20000, 3)
    assert z.mean(0).abs().max() < 0.05 and (torch.cov(z.T) - torch.eye(3)).abs().max() < 0.05
    one_hot = iae.sample_prior("categorical", 20000, 4)
    assert set(one_hot.unique().tolist()) == {0.0, 1.0} and (one_hot.mean(0) - 0.25).abs().max() < 0.02
    model = IAE.for_images(MNIST, 3, 2)
    mixed = z @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.0]]) + torch.tensor([1.0, -2.0, 3.0])
    model.fit_gaussian(mixed)  # of rank 2: a Cholesky factor would not exist
    again = model.sample_codes(20000, fitted=True)
    assert (again.mean(0) - mixed.mean(0)).abs().max() < 0.1 and (torch.cov(again.T) - torch.cov(mixed.T)).abs().max() < 0.15


# ------------------------------------------------------------------------------------------------- metrics, closed forms


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a = torch.randn(200000, 2) @ torch.diag(torch.tensor([1.0, 2.0]))
    b = torch.randn(200000, 2) @ torch.diag(torch.tensor([3.0, 2.0])) + torch.tensor([1.0, 0.0])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + (3 - 1) ** 2, rel=0.03)
    assert abs(metrics.frechet_distance(a, a)) < 1e-6


def test_mmd_is_unbiased_and_sees_a_shift():
    torch.manual_seed(0)
    same = [metrics.mmd_test(torch.randn(100, 2), torch.randn(100, 2), permutations=20) for _ in range(60)]
    values = np.array([s["mmd"] for s in same])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(60)  # unbiased: centred on zero, so also negative
    assert values.min() < 0 and np.mean([s["p"] < 0.1 for s in same]) < 0.25
    a, b = torch.randn(300, 2), torch.randn(300, 2) + 0.5
    shifted = metrics.mmd_test(a, b)
    assert shifted["p"] < 0.02 and shifted["mmd"] > 5 * shifted["floor"]
    direct = 0.0  # against the definition, pair by pair
    for h in (0.5, 1.0, 2.0):
        def k(u, v):
            return torch.exp(-torch.cdist(u, v).square() / (2 * h * h))
        direct += ((k(a, a).sum() - 300) / (300 * 299) + (k(b, b).sum() - 300) / (300 * 299) - 2 * k(a, b).mean()).item() / 3
    assert shifted["mmd"] == pytest.approx(direct, abs=1e-5)


def test_local_diversity_confusions_probe_density():
    x = torch.randn(2000, 1, 4, 4)
    assert metrics.local_diversity(x[None].expand(5, -1, -1, -1, -1), x) == 0
    assert metrics.local_diversity(torch.randn(20, 2000, 1, 4, 4), x) == pytest.approx(1, abs=0.03)
    matrix = torch.zeros(10, 10)
    matrix[3, 5], matrix[4, 9], matrix[0, 1], matrix[7, 7] = 3, 1, 4, 90
    inside, chance = metrics.similar_share(matrix)
    assert inside == 0.5 and chance == pytest.approx((3 * 2 / 9 + 1 / 9) / 8)
    y = torch.arange(3).repeat(200)
    z = F.one_hot(y, 3).float() + 0.1 * torch.randn(600, 3)
    assert metrics.linear_probe(z, y, z, y) == 1.0
    assert metrics.linear_probe(z, y, torch.randn(600, 3), y) < 0.5
    points = torch.randn(500, 2)
    density, coverage = metrics.density_coverage(points, points)
    assert coverage == 1 and 0.9 < density < 1.3
    density, coverage = metrics.density_coverage(points, points[:1].expand(500, 2))  # collapsed: one point
    assert coverage < 0.05
    assert metrics.density_coverage(points, points + 100) == (0, 0)


# ------------------------------------------------------------------------------------------------ the script, for real


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A tiny labelled dataset: bright bars in ten places with noise, 300 images."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 10
    x = rng.integers(0, 60, (300, 28, 28), dtype=np.uint8)
    for image, kind in zip(x, y):
        image[2 + 2 * kind:5 + 2 * kind, 4:24] += 180
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=x, y=y)
    return str(path)


def run(*argv, expect=0):
    """train.py's main in this process; returns nothing, raises where the exit status is another than expected."""
    try:
        train.main([str(a) for a in argv])
        status = 0
    except SystemExit as end:
        status = end.code
    assert status == expect


COMMON = ("--global", 3, "--local", 4, "--batch-size", 16)


def test_train_writes_its_folder_and_the_model_can_be_used(digits, tmp_path, capsys):
    out = tmp_path / "run"
    run("--dataset", digits, *COMMON, "--steps", 3, "--out", out, "--data-dir", tmp_path)
    files = {"config.json", "metrics.jsonl", "final.json", "checkpoint.pt", "reconstructions.png", "samples.png", "curves.png"}
    assert set(os.listdir(out)) == files
    final = json.loads((out / "final.json").read_text())
    assert final["steps"] == 3 and 0 <= final["metrics"]["labels_kept"] <= 1 and final["host"]["torch"] == torch.__version__
    assert [json.loads(line)["step"] for line in open(out / "metrics.jsonl")] == [3]

    model = train.load_checkpoint(out / "checkpoint.pt")
    x = torch.rand(5, *MNIST)
    z = model.encode(x)
    assert z.shape == (5, 3) and model.decode(z, torch.zeros(5, 4)).shape == x.shape
    assert model.reconstruct(x).shape == x.shape and model.sample(7).shape == (7, *MNIST)
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    picture = tmp_path / "mine.png"
    Image.fromarray(np.zeros((50, 40, 4), np.uint8)).save(picture)
    run("--from", out, "--sample", 12, "--out", tmp_path / "samples.png")
    run("--from", out, "--reconstruct", picture, "--out", tmp_path / "mine2.png")
    assert Image.open(tmp_path / "samples.png").size == ((12 * 30 + 2) * 2, 64)
    assert Image.open(tmp_path / "mine2.png").size == (64, (6 * 30 + 2) * 2)


@pytest.mark.parametrize("options", [("--recipe", "paper"), ("--local", 0, "--no-regularization"), ("--global", 0),
                                     ("--local", 0, "--euclidean"), ("--prior", "categorical", "--noise", 2),
                                     ("--positive-gradient", "--objective", "kl", "--penalty", 0.1, "--no-batch-norm")])
def test_every_case_of_section_2_runs(options, digits, tmp_path):
    run("--dataset", digits, *COMMON, *options, "--steps", 2, "--out", tmp_path / "run", "--data-dir", pathlib.Path(digits).parent)
    assert json.loads((tmp_path / "run" / "final.json").read_text())["steps"] == 2


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(digits, tmp_path):
    common = ("--dataset", digits, *COMMON, "--noise", 2, "--data-dir", tmp_path)
    run(*common, "--steps", 7, "--out", tmp_path / "whole")
    run(*common, "--steps", 4, "--out", tmp_path / "cut")
    run("--resume", tmp_path / "cut", "--steps", 7)
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))

    def compare(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for i, pair in enumerate(zip(a, b)):
                compare(*pair, f"{where}.{i}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        else:
            assert a == b, where

    for name in ("step", "model", "averaged", "autoencoder_optimizer", "discriminator_optimizer", "random_state"):
        compare(whole[name], cut[name], name)
    finals = [json.loads((tmp_path / name / "final.json").read_text())["metrics"] for name in ("whole", "cut")]
    assert finals[0] == finals[1]
    assert [json.loads(line)["step"] for line in open(tmp_path / "cut" / "metrics.jsonl")] == [4, 7]
    other = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]["decoder.fc.0.weight"]
    run(*common, "--steps", 7, "--out", tmp_path / "other", "--seed", 1)
    assert not torch.equal(other, train.read_checkpoint(str(tmp_path / "other"))["model"]["decoder.fc.0.weight"])


def test_sigterm_saves_a_whole_step_and_says_how_to_resume(digits, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, HERE / "train.py", "--dataset", digits, *map(str, COMMON), "--steps", "100000",
               "--out", out, "--data-dir", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    step = train.read_checkpoint(str(out))["step"]
    assert step >= 20 and json.loads(open(out / "metrics.jsonl").readlines()[-1])["step"] == step


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("argv, says", [
    (("--global", -1), "--global"), (("--global", 0, "--local", 0), "no input"), (("--dataset", "nothing"), "nothing"),
    (("--device", "cuda:99"), "cuda"), (("--device", "toaster"), "toaster"), (("--recipe", "cake"), "cake"),
    (("--steps", 0), "--steps"), (("--batch-size", 1), "--batch-size"), (("--learning-rate", "nan"), "--learning-rate"),
    (("--batch-size", 100000), "100000"), (("--validation", 100000), "100000"), (("--out", "/dev/null/x"), "--out"),
    (("--resume", "nowhere"), "nowhere"), (("--from", "nowhere", "--sample", 3), "nowhere"), (("--sample", 3), "--from"),
    (("--global", 0, "--euclidean"), "--euclidean"), (("--dataset", "missing.npz"), "missing.npz")])
def test_bad_input_is_one_line_and_status_2(argv, says, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--dataset", digits, "--steps", 1, *argv, expect=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error:" in lines[-1] and says in lines[-1] and "Traceback" not in "".join(lines)
    assert not any("error" in line for line in lines[:-1])


def test_images_that_no_layout_fits(tmp_path, capsys):
    np.savez(tmp_path / "odd.npz", x=np.zeros((20, 30, 30), np.uint8))
    run("--dataset", tmp_path / "odd.npz", "--batch-size", 4, "--out", tmp_path / "run", expect=2)
    assert "multiples of 8" in capsys.readouterr().err and not (tmp_path / "run").exists()


class Bomb:
    def __reduce__(self):
        return (open, (os.environ["BOMB"], "w"))


def test_hostile_and_damaged_checkpoints_are_refused_without_running_them(digits, tmp_path, monkeypatch):
    run("--dataset", digits, *COMMON, "--steps", 1, "--out", tmp_path / "run", "--data-dir", tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    good, state = path.read_bytes(), torch.load(path, weights_only=True)
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    small = {k: state[k] for k in ("project", "format", "settings")}
    bad = {"pickle": Bomb(), "list": [1, 2], "stranger": {"model": {}}, "future": {**state, "format": 99},
           "no tensors": small, "wrong settings": {**state, "settings": {**state["settings"], "global": 9}},
           "missing tensor": {**state, "averaged": {k: v for k, v in state["averaged"].items() if "head" not in k}}}
    for name, content in bad.items():
        torch.save(content, path)
        with pytest.raises(InputError) as caught:
            train.load_checkpoint(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value), name
    for size in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(InputError):
            train.load_checkpoint(str(path))
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(good)
    train.load_checkpoint(str(path))
    run("--resume", tmp_path / "run", "--global", 9, expect=2)  # may not change at a resume
    run("--dataset", digits, "--steps", 1, "--out", tmp_path / "run", expect=2)  # holds a run already


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(digits, tmp_path, capsys):
    run("--dataset", digits, *COMMON, "--steps", 2, "--out", tmp_path / "run", "--data-dir", tmp_path)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["model"]["decoder.fc.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    run("--resume", tmp_path / "run", "--steps", 30, expect=2)
    errors = capsys.readouterr().err
    assert "step 20" in errors and "reconstruction" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path):
    path = str(tmp_path / "file")
    train.write_json(path, {"a": 1})

    def fails(part):
        with open(part, "w") as file:
            file.write("half")
        raise OSError("No space left on device")

    with pytest.raises(InputError, match="No space"):
        train.write(path, fails)
    assert json.load(open(path)) == {"a": 1} and os.listdir(tmp_path) == ["file"]


# ---------------------------------------------------------------------------------------------------------- the README


def test_the_readmes_equation_map_names_things_that_exist():
    readme = (HERE / "README.md").read_text()
    names = re.findall(r"`((?:iae|fiae|data|train|toy|metrics)\.py): ?([\w.]+)`", readme)
    assert len(names) > 15
    for file, dotted in names:
        body = ast.parse((HERE / file).read_text()).body
        for part in dotted.split("."):
            found = [node for node in body if getattr(node, "name", None) == part
                     or isinstance(node, ast.Assign) and any(getattr(t, "id", None) == part for t in node.targets)]
            assert found, f"README names {file}: {dotted}, which is not there"
            body = getattr(found[0], "body", [])
