"""Flipped implicit autoencoders (FIAE) and the InfoGAN baseline: Section 3, on the networks and losses of iae.py.

    generator (the paper's encoder)    x_hat = g(z, n)        p(x|z), an implicit conditional likelihood
    recognition (the paper's decoder)  z_hat = f(x_hat, eps)  q(z|x), an implicit variational posterior
    regularization discriminator       D(x)                   x ~ p_data is real, x_hat ~ p(x) is fake
    reconstruction discriminator       D(x, z)                (x_hat, z) is real, (x_hat, z_hat) is fake

The data meet the regularization GAN alone: the recognition network is trained on what the generator dreams up (with an
agreement_weight on the data too). The cost is Eq. 15, KL(p(x) || p_data) + KL(p(x, z) || s(x, z)) with s(x, z) = p(x)
q(z|x) (Eq. 11). The players take turns:

    1. both discriminators descend `discriminator_loss` (Eq. 1); x_hat and z_hat are constants to them;
    2. generator and recognition network descend -log D of the *negative* pair (x_hat, z_hat), in which x_hat moves in
       both places; the positive pair (x_hat, z) is a constant, by analogy with the IAE's footnote 1. The loss of the
       regularization GAN moves the generator alone.
       Not in the paper: with an information_weight the positive pair moves the generator after all, *with* D(x, z).
       It descends D(x, z)'s own loss by x_hat, where footnote 1's variant, positive_gradient, works against D(x, z).

    outputs = model(x)                                          (z, x_hat, seen, z_hat)
    losses, real = model.discriminator_losses(x, *outputs)      step the discriminators by the sum of losses, then
    losses = model.autoencoder_losses(x, *outputs, real=real)   generator and recognition network by the sum of these

This file needs torch and iae.py.
"""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, OneHotCategorical

from iae import (Decoder, Encoder, JointDiscriminator, agreement_loss, deform, discriminate,
                 discriminator_loss, generator_loss, noisy, ripple, sample_prior)


class FIAE(nn.Module):
    """The flipped implicit autoencoder of Section 3: four networks, what each of them descends, and how to sample.

    The networks are any modules with the signatures of iae.py's (`FIAE.for_images` makes Appendix D.2's):
    generator(z, n), recognition(x, eps), reconstruction_discriminator(x, z), regularization_discriminator(x).
    recognition and reconstruction_discriminator None leave the plain GAN whose noise is z and n (Figure 5b).

    prior, objective ("paired": the rows of both pairs share x_hat) and the penalties: as in iae.IAE. positive_gradient
    moves the generator through the positive pair too. Figure 10 has local_size = noise_size = 0.
    Not in the paper, for a categorical z: code_noise of D(x, z)'s `noisy` codes; with an agreement_weight the
    recognition network sees x_hat deformed (`deform`), and descends `agreement_loss` on the data. The latter weighs
    agreement_weight times `progress`, a buffer, 1 at first, which the training loop moves from 0 to 1
    (`model.progress.fill_(share)`): while dreams look unlike data, it would form clusters of the data that are not the
    dreams'. It needs images (batch, channels, height, width) and a recognition network with `logits(x, eps)` too.
    Not in the paper either: elastic and image_noise, the deviations of the `ripple` and the Gaussian noise in which the
    recognition network and D(x, z) see x_hat, so that the generator cannot hide z in details that real images do not
    have; code_penalty of D(x, z)'s gradient by the code (`discriminate`); paired_regularization, the paired objective
    for D(x) too, whose rows share nothing: a relativistic GAN (without it D(x) has Eq. 1 where D(x, z) is paired);
    information_weight, times `progress`, of D(x, z)'s own loss, as the generator descends it by the positive pair: its
    images shall let D(x, z) tell z from z_hat. With constant positive pairs nothing else asks them to tell their codes.
    """

    def __init__(self, generator: nn.Module, recognition: nn.Module | None,
                 reconstruction_discriminator: nn.Module | None, regularization_discriminator: nn.Module, *,
                 shape: tuple[int, ...], global_size: int, local_size: int, noise_size: int = 0,
                 prior: str = "gaussian", objective: str = "gan", penalty: float = 0.0,
                 regularization_penalty: float | None = None, positive_gradient: bool = False,
                 reconstruction_weight: float = 1.0, regularization_weight: float = 1.0,
                 agreement_weight: float = 0.0, code_noise: float = 0.0, image_noise: float = 0.0,
                 elastic: float = 0.0, code_penalty: float = 0.0, paired_regularization: bool = False,
                 information_weight: float = 0.0):
        super().__init__()
        self.generator, self.recognition = generator, recognition
        self.reconstruction_discriminator = reconstruction_discriminator
        self.regularization_discriminator = regularization_discriminator
        self.shape = tuple(shape)
        self.global_size, self.local_size, self.noise_size, self.prior = global_size, local_size, noise_size, prior
        self.objective, self.penalty, self.positive_gradient = objective, penalty, positive_gradient
        self.reconstruction_weight, self.regularization_weight = reconstruction_weight, regularization_weight
        self.regularization_penalty = penalty if regularization_penalty is None else regularization_penalty
        own = "gan" if objective == "paired" else objective
        self.regularization_objective = "paired" if paired_regularization else own
        self.agreement_weight, self.code_noise = agreement_weight, code_noise
        self.image_noise, self.elastic = image_noise, elastic
        self.code_penalty, self.information_weight = code_penalty, information_weight
        self.register_buffer("progress", torch.ones(()))

    @classmethod
    def for_images(cls, shape: tuple[int, int, int], global_size: int, local_size: int, noise_size: int = 0,
                   prior: str = "gaussian", conditioning: str | None = None, batch_norm: bool = True,
                   local_scale: float = 1.0, **options) -> "FIAE":
        """The model with Appendix D.2's networks for images of `shape`; `options` are the constructor's.

        conditioning, of D(x, z), defaults to D.1's choice, location-dependent for a Gaussian code, -invariant for a
        categorical; with the paired objective to "distance" and "projection", as x_hat is the same in both pairs. With
        "distance" the recognition network of a Gaussian code lacks D.2's last BatchNorm, which would give z_hat the
        variance of z also where x tells less of it. Raises ValueError for a negative size or no latent code.
        """
        if min(local_size, noise_size) < 0 or global_size < 1:
            raise ValueError("code sizes: the latent code needs at least 1, local and noise sizes at least 0")
        paired = options.get("objective") == "paired"
        if prior == "gaussian":
            conditioning = conditioning or ("distance" if paired else "dependent")
        else:
            conditioning = conditioning or ("projection" if paired else "invariant")
        recognition = Encoder(shape, global_size, noise_size, prior)
        if prior == "gaussian" and conditioning == "distance":
            recognition.norm = nn.Identity()
        return cls(Decoder(shape, global_size, local_size, local_scale), recognition,
                   JointDiscriminator(shape, global_size, conditioning, batch_norm),
                   JointDiscriminator(shape, 0, batch_norm=batch_norm), shape=shape, global_size=global_size,
                   local_size=local_size, noise_size=noise_size, prior=prior, **options)

    def encode(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """A sample z_hat ~ q(z|x), (batch, global_size), of x (batch, *shape) in the generator's range.

        eps (batch, noise_size) is drawn from N(0, I) where it is not given.
        """
        if eps is None and self.noise_size:
            eps = torch.randn(*x.shape[:x.dim() - len(self.shape)], self.noise_size, device=x.device)
        return self.recognition(x, eps).float()

    def logits(self, x: Tensor) -> Tensor:
        """The clusters' logits (batch, global_size) of images x, one draw of eps, for a categorical z."""
        eps = torch.randn(len(x), self.noise_size, device=x.device) if self.noise_size else None
        return self.recognition.logits(x, eps).float()

    def decode(self, z: Tensor, n: Tensor | None = None) -> Tensor:
        """A sample x_hat ~ p(x|z), (batch, *shape), from codes z (batch, global_size).

        n (batch, local_size) is drawn from N(0, I) where it is not given.
        """
        if n is None and self.local_size:
            n = torch.randn(*z.shape[:-1], self.local_size, device=z.device)
        return self.generator(z, n).float()

    def reconstruct(self, x: Tensor) -> Tensor:
        """x (batch, *shape) through q(z|x), then p(x|z), as in Figure 10; one draw where there is noise."""
        return self.decode(self.encode(x))

    def sample_codes(self, *batch: int) -> Tensor:
        """z ~ p(z), (*batch, global_size)."""
        return sample_prior(self.prior, *batch, self.global_size, device=next(self.parameters()).device)

    def sample(self, count: int) -> Tensor:
        """x ~ p(x), (count, *shape)."""
        return self.decode(self.sample_codes(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(z, x_hat, seen, z_hat) of Figure 7, one row for each row of x, whose values are not looked at.

        z ~ p(z) and x_hat ~ p(x|z), so (x_hat, z) ~ p(x, z); z_hat ~ q(z|x_hat), so (x_hat, z_hat) ~ s(x, z) (Eq. 11).
        seen (batch, *shape), what D(x, z) sees, and the recognition network too (there it is `dreamt`), is x_hat in the
        paper, here `corrupted`.
        """
        z = self.sample_codes(*x.shape[:x.dim() - len(self.shape)])
        x_hat = self.decode(z)
        seen = self.corrupted(x_hat)
        return z, x_hat, seen, self.infer(self.dreamt(seen)) if self.recognition is not None else None

    def infer(self, x: Tensor) -> Tensor:
        """What the reconstruction cost needs of images x: here z_hat ~ q(z|x), in InfoGAN the parameters of q(z|x)."""
        return self.encode(x)

    def corrupted(self, x_hat: Tensor) -> Tensor:
        """x_hat rippled, then in noise: what D(x, z) sees in training."""
        return noisy(ripple(x_hat, self.elastic) if self.elastic else x_hat, self.image_noise)

    def dreamt(self, seen: Tensor) -> Tensor:
        """What the recognition network sees in training: that deformed, where there is an agreement_weight."""
        return deform(seen) if self.agreement_weight else seen

    def discriminator_losses(self, x: Tensor, z: Tensor, x_hat: Tensor, seen: Tensor, z_hat: Tensor | None, *,
                             penalty_scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the two discriminators descend, for data x and the model's outputs: all constants here.

        penalty_scale and what is returned: as of `iae.IAE.discriminator_losses`.
        """
        losses, real = {}, {}
        if self.reconstruction_discriminator is not None:
            name = "reconstruction_discriminator"
            losses[name], real[name] = discriminate(
                self.reconstruction_discriminator, real=(seen, noisy(z, self.code_noise)),
                fake=(seen, noisy(z_hat, self.code_noise)), objective=self.objective,
                penalty=penalty_scale * self.penalty, code_penalty=penalty_scale * self.code_penalty)
        name = "regularization_discriminator"
        losses[name], real[name] = discriminate(
            self.regularization_discriminator, real=(x,), fake=(x_hat,), objective=self.regularization_objective,
            penalty=penalty_scale * self.regularization_penalty)
        return losses, real

    def autoencoder_losses(self, x: Tensor, z: Tensor, x_hat: Tensor, seen: Tensor, z_hat: Tensor | None, *,
                           real: dict[str, Tensor]) -> dict[str, Tensor]:
        """What generator and recognition network descend (Eq. 15), for the model's outputs with their gradients.

        reconstruction   KL(p(x, z) || s(x, z)), moves both
        regularization   KL(p(x) || p_data), moves the generator alone
        agreement        with an agreement_weight: on the data, moves the recognition network alone

        real: the second of what `discriminator_losses` returned; empty will do where neither GAN is paired.
        """
        losses = {}
        if self.recognition is not None:
            loss = self.reconstruction_loss(z, seen, z_hat, real.get("reconstruction_discriminator"))
            losses["reconstruction"] = self.reconstruction_weight * loss
        paired = self.regularization_objective == "paired"
        loss = generator_loss(real["regularization_discriminator"] if paired else None,
                              self.regularization_discriminator(x_hat), self.regularization_objective)
        losses["regularization"] = self.regularization_weight * loss
        if self.agreement_weight:
            copies = self.logits(x).softmax(1), self.logits(deform(x)).softmax(1)  # (batch, K) each
            losses["agreement"] = self.agreement_weight * self.progress * agreement_loss(*copies)
        return losses

    def reconstruction_loss(self, z: Tensor, seen: Tensor, z_hat: Tensor, real: Tensor | None) -> Tensor:
        """-log D(x_hat, z_hat): reaches the recognition network by z_hat, the generator by x_hat and through z_hat.

        z, and with it the positive pair (x_hat, z), is a constant but for positive_gradient and information_weight.
        real (batch,): the constant pair's logits, from the discriminators' pass; where the pair is no constant they are
        computed anew.
        """
        z, z_hat = noisy(z, self.code_noise), noisy(z_hat, self.code_noise)
        fake = self.reconstruction_discriminator(seen, z_hat)
        if self.positive_gradient or self.information_weight:
            real = self.reconstruction_discriminator(seen, z)
        constant = real.detach() if self.objective == "paired" else None
        loss = generator_loss(real if self.positive_gradient else constant, fake, self.objective)
        if self.information_weight:  # reaches the generator alone, by x_hat
            weight = self.information_weight * self.progress
            loss = loss + weight * discriminator_loss(real, fake.detach(), self.objective)
        return loss


class InfoGAN(FIAE):
    """InfoGAN as Section 3 reads it (Eq. 13): the FIAE with an explicit q(z|x), and -log q(z|x_hat) for its second GAN.

    recognition(x, None) returns the posterior's parameters: (batch, 2 * global_size), mean and log deviation of a
    factorized Gaussian, both learned (footnote 2), or for a categorical prior the logits (batch, global_size).
    reconstruction_discriminator is None and noise_size 0. Eq. 13's H(z|x) is left out: the cost bounds nothing.
    """

    @classmethod
    def for_images(cls, shape: tuple[int, int, int], global_size: int, local_size: int, prior: str = "gaussian",
                   batch_norm: bool = True, local_scale: float = 1.0, **options) -> "InfoGAN":
        """As FIAE.for_images, with the same generator, D(x) and recognition network, which ends before the softmax."""
        if local_size < 0 or global_size < 1:
            raise ValueError("code sizes: the latent code needs at least 1, the local size at least 0")
        recognition = Encoder(shape, 2 * global_size if prior == "gaussian" else global_size, prior=prior)
        recognition.last = nn.Identity()
        if prior == "gaussian":  # mean and deviation are free; logits keep the BatchNorm that holds clusters in use
            recognition.norm, recognition.scale = nn.Identity(), 1.0
        return cls(Decoder(shape, global_size, local_size, local_scale), recognition, None,
                   JointDiscriminator(shape, 0, batch_norm=batch_norm), shape=shape, global_size=global_size,
                   local_size=local_size, prior=prior, **options)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z|x) as a distribution over codes (batch, global_size), for x (batch, *shape)."""
        return self.distribution(self.infer(x))

    def distribution(self, parameters: Tensor) -> Distribution:
        """The posterior that the recognition network's outputs stand for."""
        if self.prior == "categorical":
            return OneHotCategorical(logits=parameters, validate_args=False)
        mean, log_deviation = parameters.chunk(2, dim=-1)  # (batch, global_size) each
        return Independent(Normal(mean, log_deviation.exp(), validate_args=False), 1, validate_args=False)

    def encode(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """A sample z_hat ~ q(z|x), (batch, global_size), without gradient; eps is not used."""
        return self.posterior(x).sample()

    def infer(self, x: Tensor) -> Tensor:
        """The parameters of q(z|x), for `forward` in place of z_hat: the cost needs the density of z, no sample."""
        return self.recognition(x, None).float()

    def reconstruction_loss(self, z: Tensor, seen: Tensor, parameters: Tensor, real: None = None) -> Tensor:
        """E[-log q(z|x_hat)], Eq. 13: reaches the recognition network, and the generator by x_hat."""
        if self.prior == "categorical":  # `distribution` has checks that wait for the device, which no CUDA graph does
            return -(z * parameters.log_softmax(-1)).sum(-1).mean()
        return -self.distribution(parameters).log_prob(z).mean()
