"""Implicit autoencoders (IAE): the networks, the losses and the model of Section 2 and Appendix D.

    encoder                        z_hat = f(x, eps)    q(z|x), implicit                          Encoder
    decoder                        x_hat = g(z_hat, n)  p(x|z), implicit                          Decoder
    reconstruction discriminator   D(x, z)              (x, z_hat) is real, (x_hat, z_hat) fake   JointDiscriminator
    regularization discriminator   D(z)                 z ~ p(z) is real, z_hat fake              CodeDiscriminator

The discriminators and the autoencoder take turns (Section 2, "Training Process"):

    1. both discriminators descend `discriminator_loss` (Eq. 1); what comes from encoder and decoder is detached;
    2. encoder and decoder descend `generator_loss` (T = -log D, Eq. 9-10) through the *negative* pair (x_hat, z_hat),
       in which z_hat moves in both places; the positive pair (x, z_hat) is a constant (footnote 1). The loss of the
       regularization GAN moves the encoder alone.

    outputs = model(x)                                          (z_hat, x_hat)
    losses, real = model.discriminator_losses(x, *outputs)      step the discriminators by the sum of losses, then
    losses = model.autoencoder_losses(x, *outputs, real=real)   encoder and decoder by the sum of these

Shapes are (batch, channels, height, width); where they begin with `...`, these are the toys' seeds, trained together.
Images are in the range of the decoder's last layer: [0, 1] for the MNIST layout (sigmoid), [-1, 1] for the others
(tanh); `to_range` and `to_uint8` convert, and nothing else does.
Parameters, images and codes are float32; for bfloat16 there is torch.autocast.
This file needs torch alone: copy it, or any piece of it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Appendix D.2: the convolutions of encoder and discriminator (the decoder mirrors them), their kernel size, and the
# fully connected width of decoder and discriminator; MNIST's encoder has no convolutions (`Encoder`). "SAME" padding at
# stride 2 is (kernel - 2) / 2 on each side, for both directions. BatchNorm stands before the ReLU, not after it, and
# CelebA's discriminator is our guess (README, departures 1 and 6).
#            channels of the convolutions, kernel, hidden FC, last nonlinearity, its range
LAYOUTS = {
    "mnist": dict(channels=(64, 128), kernel=4, hidden=1024, last=nn.Sigmoid, low=0.0, high=1.0),
    "svhn": dict(channels=(64, 128, 256), kernel=4, hidden=None, last=nn.Tanh, low=-1.0, high=1.0),
    "celeba": dict(channels=(128, 256, 512), kernel=6, hidden=None, last=nn.Tanh, low=-1.0, high=1.0),
}


def layout_of(shape: tuple[int, int, int]) -> dict:
    """Appendix D.2's column for images of `shape` = (channels, height, width).

    28x28 takes MNIST's, 48x48 CelebA's, any other multiple of 8 SVHN's. Raises ValueError where none fits.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"images with {channels} channels: use 1 (grey) or 3 (colour)")
    if (height, width) == (28, 28):
        return LAYOUTS["mnist"]
    if (height, width) == (48, 48):
        return LAYOUTS["celeba"]
    if height > 0 and width > 0 and height % 8 == 0 and width % 8 == 0:
        return LAYOUTS["svhn"]
    raise ValueError(f"images of {height}x{width}: no layout fits; use 28x28 or sides that are multiples of 8")


def to_range(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 images to float32 in the network's range: [0, 1] for MNIST's layout (sigmoid), [-1, 1] else (tanh)."""
    layout = layout_of(shape)
    return images.float() * ((layout["high"] - layout["low"]) / 255) + layout["low"]


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of `to_range` for images (batch, channels, height, width), rounded and clamped."""
    layout = layout_of(tuple(x.shape[1:]))
    x = (x.float() - layout["low"]) / (layout["high"] - layout["low"])
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def deform(x: Tensor) -> Tensor:
    """Each of the images x (batch, channels, height, width) turned, sheared, scaled and moved a little, at random.

    By up to 15 degrees, .3, a factor e^.15 and a tenth of the side; pixels of the border fill what opens beyond it.
    Images shall be square: in others angles are distorted.
    """
    draws = 2 * torch.rand(6, len(x), device=x.device) - 1
    # Plain numbers: a tensor would be copied from the CPU, which a CUDA graph cannot record.
    most = 0.26, 0.3, 0.15, 0.15, 0.2, 0.2  # radians, shear, logs, half sides
    turn, shear, wide, high, right, down = (limit * row for limit, row in zip(most, draws))  # (batch,) each
    cos, sin, wide, high = turn.cos(), turn.sin(), wide.exp(), high.exp()
    # From places in the new image to those in the old one, as `affine_grid` wants them.
    maps = torch.stack([cos * wide, (shear - sin) * wide, right, sin * high, cos * high, down], 1)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would move pixels by a tenth
        grid = F.affine_grid(maps.view(-1, 2, 3), list(x.shape), align_corners=False)  # (batch, height, width, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def shift(x: Tensor, most: int) -> Tensor:
    """Images x (batch, channels, height, width), all moved alike, at random, by up to `most` pixels each way.

    Pixels of the border fill what opens beyond it."""
    down, right = torch.randint(2 * most + 1, (2,)).tolist()
    return F.pad(x, (most,) * 4, mode="replicate")[:, :, down:down + x.shape[2], right:right + x.shape[3]]


def ripple(x: Tensor, deviation: float) -> Tensor:
    """Each of the images x (batch, channels, height, width) with its pixels moved by a smooth random field.

    An elastic deformation, as in Simard et al. 2003: 5x5 Gaussian shifts of `deviation` half sides, interpolated.
    """
    shifts = deviation * torch.randn(len(x), 2, 5, 5, device=x.device)
    shifts = F.interpolate(shifts, x.shape[2:], mode="bicubic").permute(0, 2, 3, 1)  # (batch, height, width, 2)
    still = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would move pixels by a tenth
        grid = F.affine_grid(still, list(x.shape), align_corners=False) + shifts  # (batch, height, width, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Halves the sides exactly: stride 2 with SAME padding (Appendix D.2)."""
    return nn.Conv2d(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)


def upconv(inputs: int, outputs: int, kernel: int) -> nn.ConvTranspose2d:
    """Doubles the sides exactly: stride 2 with SAME padding (Appendix D.2)."""
    return nn.ConvTranspose2d(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)


class Encoder(nn.Module):
    """z_hat = f(x, eps), Appendix D.2's first column. q(z|x) is implicit: its sample is the output itself.

    x (batch, *shape) in the network's range, eps (batch, noise_size) or None where noise_size is 0.
    Returns z_hat (batch, code_size): for a Gaussian prior the output of a BatchNorm without scale, for a
    categorical prior a point of the softmax simplex (Section 2.1.2).
    """

    def __init__(self, shape: tuple[int, int, int], code_size: int, noise_size: int = 0, prior: str = "gaussian"):
        super().__init__()
        if prior not in ("gaussian", "categorical"):
            raise ValueError(f"prior {prior!r}: use gaussian or categorical")
        layout, (channels, height, width) = layout_of(shape), shape
        features, size = [], channels * height * width
        if layout is not LAYOUTS["mnist"]:
            for outputs in layout["channels"]:
                features += [conv(channels, outputs, layout["kernel"]), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels, height, width = outputs, height // 2, width // 2
            size = channels * height * width
        self.features = nn.Sequential(*features, nn.Flatten())
        size += noise_size  # eps joins the flattened features before the first fully connected layer
        head = []
        if layout is LAYOUTS["mnist"]:
            head = [nn.Linear(size, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU()]
            size = 2000
        self.head = nn.Sequential(*head, nn.Linear(size, code_size))
        # "FC Linear. BN": without scale it pins each code's mean and variance to the prior's. Before a softmax it keeps
        # every cluster in use, but would cap the confidence without a factor of 2: of 10 codes, each of mean 0 and
        # variance 1, a row would be one-hot with logits of 3 and -1/3, whose softmax is .76.
        self.norm = nn.BatchNorm1d(code_size, affine=False)
        self.scale = 1.0 if prior == "gaussian" else 2.0
        self.last = nn.Identity() if prior == "gaussian" else nn.Softmax(dim=1)

    def logits(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """The last BatchNorm's output (batch, code_size): under a categorical prior the clusters' logits."""
        h = self.features(x)  # (batch, size)
        h = self.head(h if eps is None else torch.cat([h, eps], dim=1))  # (batch, code_size)
        return self.scale * self.norm(h.float())  # (batch, code_size)

    def forward(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        return self.last(self.logits(x, eps))  # (batch, code_size)


class Decoder(nn.Module):
    """x_hat = g(z, n), Appendix D.2's second column. p(x|z) is implicit: its sample is the output itself.

    z (batch, code_size) and n (batch, local_size), either of them None, or empty, where its size is 0.
    Returns x_hat (batch, *shape) in the network's range. local_scale: what the initial weights of n are multiplied by.
    """

    def __init__(self, shape: tuple[int, int, int], code_size: int, local_size: int, local_scale: float = 1.0):
        super().__init__()
        layout, (channels, height, width) = layout_of(shape), shape
        widths = layout["channels"][::-1]
        scale = 2 ** len(widths)
        self.start = (height // scale, width // scale, widths[0])  # channels last, as forward says
        size, first = code_size + local_size, []
        if layout["hidden"]:
            first = [nn.Linear(size, layout["hidden"]), nn.BatchNorm1d(layout["hidden"]), nn.ReLU()]
            size = layout["hidden"]
        self.fc = nn.Sequential(*first, nn.Linear(size, math.prod(self.start)))
        self.fc[0].weight.data[:, code_size:] *= local_scale  # the columns of n
        layers = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [upconv(inputs, outputs, layout["kernel"]), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, upconv(widths[-1], channels, layout["kernel"]))
        self.last = layout["last"]()

    def forward(self, z: Tensor | None, n: Tensor | None = None) -> Tensor:
        h = self.fc(torch.cat([part for part in (z, n) if part is not None], dim=1))  # (batch, features)
        # As (height, width, channels) the features are born in the memory layout that convolutions are fastest in.
        h = h.unflatten(1, self.start).permute(0, 3, 1, 2)  # (batch, channels, height, width)
        # In float32: bfloat16 would round sigmoid or tanh to 1 above .998, and pass no gradient on.
        return self.last(self.layers(h).float())  # (batch, *shape)


class LocationDependent(nn.Module):
    """Location-dependent conditioning (Appendix D.1): 1000 ReLU units to one map, the same for every channel."""

    def __init__(self, code_size: int, channels: int, height: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(code_size, 1000), nn.ReLU(), nn.Linear(1000, height * width),
                                    nn.Unflatten(1, (1, height, width)))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)  # (batch, 1, height, width), broadcast over the channels


class LocationInvariant(nn.Module):
    """Location-invariant conditioning (Appendix D.1): a linear map to one bias a channel, the same everywhere."""

    def __init__(self, code_size: int, channels: int, height: int, width: int):
        super().__init__()
        self.linear = nn.Linear(code_size, channels)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)[:, :, None, None]  # (batch, channels, 1, 1), broadcast over height and width


class JointDiscriminator(nn.Module):
    """The reconstruction GAN's D(x, z), Appendix D.2's third column; with code_size 0 the D(x) of a plain GAN.

    x (batch, *shape), z (batch, code_size) or None. Returns logits (batch,): log D / (1 - D), large where real.
    The code is an adaptive bias of the first layer (D.1), added before its BatchNorm and ReLU. Not in the paper:
    conditioning "projection", logits psi(x) + z . phi(x) from the last layer (Miyato and Koyama 2018), and "distance",
    logits -|z - phi(x)|^2 / (2 code_size), to which x adds nothing of its own: for pairs that share x, as the FIAE's,
    and for the paired objective, since these logits are never above 0. Raises ValueError for another conditioning.
    """

    def __init__(self, shape: tuple[int, int, int], code_size: int, conditioning: str = "dependent",
                 batch_norm: bool = True):
        super().__init__()
        if conditioning not in ("dependent", "invariant", "projection", "distance"):
            raise ValueError(f"conditioning {conditioning!r}: use dependent, invariant, projection or distance")
        layout, (channels, height, width) = layout_of(shape), shape
        widths, kernel = layout["channels"], layout["kernel"]
        self.first = conv(channels, widths[0], kernel)
        height, width = height // 2, width // 2
        self.projection = conditioning == "projection" and code_size > 0
        self.distance = conditioning == "distance" and code_size > 0
        self.condition = None
        if code_size and not (self.projection or self.distance):
            condition = {"dependent": LocationDependent, "invariant": LocationInvariant}[conditioning]
            self.condition = condition(code_size, widths[0], height, width)
        norm2d, norm1d = (nn.BatchNorm2d, nn.BatchNorm1d) if batch_norm else (nn.Identity, nn.Identity)
        layers = [norm2d(widths[0]), nn.ReLU()]
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [conv(inputs, outputs, kernel), norm2d(outputs), nn.ReLU()]
            height, width = height // 2, width // 2
        self.layers = nn.Sequential(*layers)
        size, hidden = widths[-1] * height * width, layout["hidden"]
        fc = [nn.Linear(size, hidden), norm1d(hidden), nn.ReLU()] if hidden else []
        outputs = code_size if self.distance else 1 + code_size * self.projection
        self.fc = nn.Sequential(*fc, nn.Linear(hidden or size, outputs))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        h = self.first(x)  # (batch, channels, height / 2, width / 2)
        if self.condition is not None:
            h = h + self.condition(z)
        h = self.layers(h).permute(0, 2, 3, 1).flatten(1)  # no copy where the memory is channels-last, as in training
        h = self.fc(h).float()  # (batch, 1), with a projection (batch, 1 + code_size), a distance (batch, code_size)
        if self.distance:
            return -0.5 * (z - h).pow(2).mean(1)  # (batch,)
        return h[:, 0] + (z * h[:, 1:]).sum(1) if self.projection else h.squeeze(1)  # (batch,)


class CodeDiscriminator(nn.Module):
    """The regularization GAN's D(z): two layers of 2000 ReLU units (Appendix D.2).

    z (batch, code_size). Returns logits (batch,).
    """

    def __init__(self, code_size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(code_size, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(),
                                    nn.Linear(2000, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).squeeze(1).float()  # (batch,)


def sample_prior(prior: str, *size: int, device: torch.device | str | None = None) -> Tensor:
    """z ~ p(z), shape `size` = (..., code_size): N(0, I), or one-hot vectors of equally likely categories."""
    if prior == "gaussian":
        return torch.randn(size, device=device)
    if prior != "categorical":
        raise ValueError(f"prior {prior!r}: use gaussian or categorical")
    return F.one_hot(torch.randint(size[-1], size[:-1], device=device), size[-1]).float()


def discriminator_loss(real: Tensor, fake: Tensor, objective: str = "gan") -> Tensor:
    """What a discriminator descends, from the logits of real and of fake examples, both (..., batch).

    gan     -log D(real) - log(1 - D(fake)), the negative of Eq. 1; at its least 2 ln 2 - 2 JSD
    paired  -log sigmoid(real - fake), relativistic: what is said of z_hat (FIAE: x_hat), shared by row i, cancels
    kl      the f-GAN bound on KL(real || fake), Section 2's remark on Nowozin et al. 2016: exp(T - 1) - T, T the logit
            (for a regularization GAN, whose real side is p(z), or p_data in the FIAE, the reverse of the paper's)
    """
    if objective == "gan":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if objective == "paired":
        return F.softplus(fake - real).mean()
    if objective == "kl":
        return (fake - 1).exp().mean() - real.mean()
    raise ValueError(f"objective {objective!r}: use gan, paired or kl")


def generator_loss(real: Tensor | None, fake: Tensor, objective: str = "gan") -> Tensor:
    """What the generating networks descend, from the logits of real and of fake examples, both (..., batch).

    gan     -log D(fake), the cost T of Eq. 9 (the non-saturating form)
    paired  -log sigmoid(fake - real)
    kl      -T(fake), the non-saturating form of the f-GAN bound

    `real` may be None (not for `paired`); where it carries a gradient, as in footnote 1's variant, the real examples
    are pushed towards "fake" as well. Footnote 1 keeps them constant.
    """
    if objective == "paired":
        return F.softplus(real - fake).mean()
    if objective == "gan":
        loss = F.softplus(-fake).mean()
        return loss + F.softplus(real).mean() if real is not None else loss
    if objective == "kl":
        return real.mean() - fake.mean() if real is not None else -fake.mean()
    raise ValueError(f"objective {objective!r}: use gan, paired or kl")


def noisy(z: Tensor, deviation: float) -> Tensor:
    """Codes or images z in Gaussian noise. Not in the paper: in noise of one deviation real and fake codes, a one-hot
    prior and the softmax, which never is one-hot, overlap, and no discriminator lives on the corners of the simplex."""
    return z + deviation * torch.randn_like(z) if deviation else z


def agreement_loss(p: Tensor, q: Tensor) -> Tensor:
    """-log of the probability that two copies of an image get the same cluster k: p, q (batch, K) are their q(k|x).

    Not in the paper. It asks for agreement, and less than a cross-entropy for confidence. A probability below 1e-6
    counts as that and has no gradient.
    """
    return -(p * q).sum(1).clamp(min=1e-6).log().mean()


def decorrelation_loss(z: Tensor) -> Tensor:
    """The sum of the squared covariances between different dimensions of codes z (..., batch, K), over K.

    Not in the paper; the covariance cost of VICReg (Bardes et al. 2022). It is zero under p(z) = N(0, I), as D(z) would
    have it of q(z), but for the chance of a batch, which leaves (K - 1) / (batch - 1).
    """
    centred = z.float() - z.float().mean(-2, keepdim=True)  # (..., batch, K)
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 would round the small covariances away
        covariance = centred.mT @ centred / (z.shape[-2] - 1)  # (..., K, K)
    squares = covariance.pow(2)
    return ((squares.sum((-2, -1)) - squares.diagonal(dim1=-2, dim2=-1).sum(-1)) / z.shape[-1]).mean()


def discriminate(discriminator: nn.Module, real: tuple, fake: tuple, objective: str = "gan", penalty: float = 0.0,
                 code_penalty: float = 0.0, together: bool = False) -> tuple[Tensor, Tensor]:
    """What `discriminator` descends: `discriminator_loss` and (penalty / 2) (R1 + R2), which are E |d logit/dinputs|^2
    on the real (R1) and on the fake side (R2).

    real, fake: tuples of the discriminator's inputs, (..., batch, *features) or None: constants here.
    code_penalty: of (code_penalty / 2) E |d logit/dz|^2, R1 on the real pair's last input alone, the code z.
    Gradients are of the batch's summed logits: behind BatchNorm, which mixes the rows, not quite each row's own.
    together: both sides in one pass, which is quicker; for codes (..., batch, size), and where no side's batch
    statistics matter. Returns the loss and the real side's logits (..., batch), without gradient.
    """
    real = [part if part is None else part.detach().requires_grad_(penalty + code_penalty > 0) for part in real]
    fake = [part if part is None else part.detach().requires_grad_(penalty > 0) for part in fake]
    if together:
        sizes = [real[0].shape[-2], fake[0].shape[-2]]
        real_logits, fake_logits = discriminator(torch.cat([*real, *fake], dim=-2)).split(sizes, dim=-1)
    else:
        real_logits, fake_logits = discriminator(*real), discriminator(*fake)
    loss = discriminator_loss(real_logits, fake_logits, objective)
    for logits, inputs in ((real_logits, real), (fake_logits, fake)) if penalty else ():
        inputs = [part for part in inputs if part is not None]
        gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
        # All dimensions after (..., batch), which are the logits', are an input's own.
        squares = sum(g.float().pow(2).flatten(logits.dim()).sum(-1) for g in gradients)  # (..., batch)
        loss = loss + penalty / 2 * squares.mean()
    if code_penalty and real[-1] is not None:
        gradient = torch.autograd.grad(real_logits.sum(), real[-1], create_graph=True)[0]  # (..., batch, code_size)
        loss = loss + code_penalty / 2 * gradient.float().pow(2).sum(-1).mean()
    return loss, real_logits.detach()


class IAE(nn.Module):
    """The implicit autoencoder of Section 2: four networks, what each of them descends, and how to sample.

    The networks are any modules with the signatures of those above (`IAE.for_images` makes Appendix D.2's); labels need
    an encoder with `logits(x, eps)` too, agreement_weight images (batch, channels, height, width). D(z) sees both sides
    in one pass, so it must not have batch statistics.
    encoder None (global size 0) is a plain GAN; reconstruction_discriminator None replaces the reconstruction
    GAN by the Euclidean cost (with regularization: the AAE); regularization_discriminator None drops KL(q(z) || p(z)).
    sample_discriminator, not in the paper, is a third GAN's D(x): data are real, samples g(z, n) of z ~ p(z) fake; its
    sample_weight, of its loss in what the decoder descends, must be above 0 then, otherwise 0 (ValueError).

    prior of z: "gaussian", N(0, I), or "categorical", one-hot; objective: of both GANs, see `discriminator_loss` (D(z),
    whose sides share no rows, has Eq. 1 where it is "paired"). penalty, regularization_penalty (None: the same): gamma
    of R1 + R2 on D(x, z) and the sample D(x), on D(z). reconstruction_weight, regularization_weight: of the losses that
    encoder and decoder descend. positive_gradient: these reach the encoder through the positive pair too (footnote 1).

    Section 2's cases: 1 local_size 0 without regularization, 2 local_size 0, 3 without regularization, 4 as it is.
    Not in the paper: code_penalty of D(x, z)'s gradient by the code (`discriminate`); for a Gaussian z
    decorrelation_weight of `decorrelation_loss`; for a categorical z agreement_weight of `agreement_loss`, elastic
    (`ripple`) of its deformed images, code_noise of D(z)'s `noisy` codes.
    """

    def __init__(self, encoder: nn.Module | None, decoder: nn.Module, reconstruction_discriminator: nn.Module | None,
                 regularization_discriminator: nn.Module | None, sample_discriminator: nn.Module | None = None, *,
                 shape: tuple[int, ...], global_size: int, local_size: int, noise_size: int = 0,
                 prior: str = "gaussian", objective: str = "gan", penalty: float = 0.0,
                 regularization_penalty: float | None = None, positive_gradient: bool = False,
                 reconstruction_weight: float = 1.0, regularization_weight: float = 1.0,
                 agreement_weight: float = 0.0, elastic: float = 0.0, code_noise: float = 0.0,
                 code_penalty: float = 0.0, decorrelation_weight: float = 0.0, sample_weight: float = 0.0):
        super().__init__()
        if sample_weight < 0 or (sample_weight > 0) != (sample_discriminator is not None):
            raise ValueError("sample_discriminator: give it and a sample_weight above 0, or neither")
        if sample_weight and encoder is None:
            raise ValueError("sample_weight: a plain GAN, which has no encoder, sees samples already")
        self.encoder, self.decoder = encoder, decoder
        self.reconstruction_discriminator = reconstruction_discriminator
        self.regularization_discriminator = regularization_discriminator
        self.sample_discriminator, self.sample_weight = sample_discriminator, sample_weight
        self.shape = tuple(shape)
        self.global_size, self.local_size, self.noise_size, self.prior = global_size, local_size, noise_size, prior
        self.objective, self.penalty, self.positive_gradient = objective, penalty, positive_gradient
        # z and z_hat share nothing row by row, so "paired" has no meaning in D(z): Eq. 1 takes its place.
        self.regularization_objective = "gan" if objective == "paired" else objective
        self.reconstruction_weight, self.regularization_weight = reconstruction_weight, regularization_weight
        self.regularization_penalty = penalty if regularization_penalty is None else regularization_penalty
        self.agreement_weight, self.elastic = agreement_weight, elastic
        self.code_noise, self.code_penalty = code_noise, code_penalty
        self.decorrelation_weight = decorrelation_weight
        # Cases 1 and 3: nothing makes q(z) a given p(z), so samples are drawn from what `fit_gaussian` fits to it.
        self.fitted_prior = regularization_discriminator is None and prior == "gaussian"
        self.register_buffer("fitted_mean", torch.zeros(global_size))
        self.register_buffer("fitted_factor", torch.eye(global_size))

    @classmethod
    def for_images(cls, shape: tuple[int, int, int], global_size: int, local_size: int, noise_size: int = 0,
                   prior: str = "gaussian", conditioning: str | None = None, batch_norm: bool = True,
                   euclidean: bool = False, regularization: bool = True, local_scale: float = 1.0,
                   sample_weight: float = 0.0, **options) -> "IAE":
        """The model with Appendix D.2's networks for images of `shape`; `options` are the constructor's.
        sample_weight 0 leaves out the GAN of samples.

        conditioning defaults to D.1's choice: location-dependent for a Gaussian code, -invariant for a categorical.
        """
        if min(global_size, local_size, noise_size) < 0 or global_size + local_size == 0:
            raise ValueError("code sizes: none may be negative, and global and local cannot both be 0")
        conditioning = conditioning or ("dependent" if prior == "gaussian" else "invariant")
        encoder = Encoder(shape, global_size, noise_size, prior) if global_size else None
        joint = None if euclidean else JointDiscriminator(shape, global_size, conditioning, batch_norm)
        code = CodeDiscriminator(global_size) if regularization and global_size else None
        samples = JointDiscriminator(shape, 0, batch_norm=batch_norm) if sample_weight else None
        return cls(encoder, Decoder(shape, global_size, local_size, local_scale), joint, code, samples, shape=shape,
                   global_size=global_size, local_size=local_size, noise_size=noise_size, prior=prior,
                   sample_weight=sample_weight, **options)

    def encode(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """A sample z_hat ~ q(z|x), (batch, global_size), of images x in the network's range; None for a plain GAN.

        eps (batch, noise_size) is drawn from N(0, I) where it is not given.
        """
        if self.encoder is None:
            return None
        if eps is None and self.noise_size:
            eps = torch.randn(*x.shape[:x.dim() - len(self.shape)], self.noise_size, device=x.device)
        return self.encoder(x, eps).float()

    def logits(self, x: Tensor) -> Tensor:
        """The clusters' logits (batch, global_size) of images x, one draw of eps, for a categorical z."""
        eps = torch.randn(len(x), self.noise_size, device=x.device) if self.noise_size else None
        return self.encoder.logits(x, eps).float()

    def decode(self, z: Tensor | None, n: Tensor | None = None) -> Tensor:
        """A sample x_hat ~ p(x|z), (batch, *shape) in the network's range, from codes z (batch, global_size).

        n (batch, local_size) is drawn from N(0, I) where it is not given; a plain GAN has z None and needs n.
        """
        if n is None and self.local_size:
            n = torch.randn(*z.shape[:-1], self.local_size, device=z.device)
        return self.decoder(z, n).float()

    def reconstruct(self, x: Tensor) -> Tensor:
        """x_hat ~ r(x) by way of q(z|x) and p(x|z): deterministic where both noise sizes are 0, else one draw.

        With x from the data it is also how to sample in cases 1 and 3, where q(z) is the learned prior.
        """
        return self.forward(x)[1]

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """(z_hat, x_hat) for images x (Figure 1); z_hat is None for a plain GAN.

        In training with a GAN of samples (z_hat, x_hat, samples), as many samples as images: the decoder makes both
        in one batch, as its BatchNorm, once it is trained, has one set of statistics for both.
        """
        z_hat = self.encode(x)
        batch = x.shape[:x.dim() - len(self.shape)]
        if self.training and self.sample_weight:
            codes = torch.cat([z_hat, self.sample_codes(*batch)], dim=-2)  # (..., 2 batch, global_size)
            x_hat, samples = self.decode(codes).chunk(2, dim=len(batch) - 1)
            return z_hat, x_hat, samples
        n = torch.randn(*batch, self.local_size, device=x.device) if self.local_size else None
        return z_hat, self.decode(z_hat, n)

    def sample_codes(self, *batch: int) -> Tensor | None:
        """z ~ p(z), (*batch, global_size); in cases 1 and 3, where p(z) is Gaussian, from what `fit_gaussian` fitted to
        q(z)."""
        if self.encoder is None:
            return None
        z = sample_prior(self.prior, *batch, self.global_size, device=self.fitted_mean.device)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would round the codes
            return self.fitted_mean + z @ self.fitted_factor.T if self.fitted_prior else z

    def sample(self, count: int) -> Tensor:
        """x ~ p(x): `count` images (count, *shape) from codes of `sample_codes`."""
        n = torch.randn(count, self.local_size, device=self.fitted_mean.device) if self.local_size else None
        return self.decode(self.sample_codes(count), n)

    @torch.no_grad()
    def fit_gaussian(self, z: Tensor) -> None:
        """Fit a full-covariance Gaussian to codes z (count, global_size) of data: cases 1 and 3's prior after training,
        a standard normal before. Categorical codes are drawn from their p(z) in these cases too."""
        z = z.double()
        covariance = torch.cov(z.T).reshape(self.global_size, self.global_size)
        values, vectors = torch.linalg.eigh(covariance)  # a square root that exists where a code dimension is constant
        self.fitted_mean.copy_(z.mean(0))
        self.fitted_factor.copy_(vectors * values.clamp(min=0).sqrt())

    def discriminator_losses(self, x: Tensor, z_hat: Tensor | None, x_hat: Tensor, samples: Tensor | None = None, *,
                             penalty_scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the discriminators descend, for data x and what `forward` made of them: all constants here.

        A GAN of samples needs what `forward` makes in training mode (in evaluation mode it makes no samples).
        penalty_scale: what the penalties are multiplied by (lazy ones by k in each k-th step, by 0 in the others).
        Returns by discriminator the losses, and the real sides' logits (batch,) for `autoencoder_losses`.
        """
        losses, real = {}, {}
        if self.reconstruction_discriminator is not None:
            name = "reconstruction_discriminator"
            losses[name], real[name] = discriminate(
                self.reconstruction_discriminator, real=(x, z_hat), fake=(x_hat, z_hat), objective=self.objective,
                penalty=penalty_scale * self.penalty, code_penalty=penalty_scale * self.code_penalty)
        if self.regularization_discriminator is not None:
            losses["regularization_discriminator"] = self.regularization_discriminator_loss(z_hat, penalty_scale)
        if self.sample_discriminator is not None:  # data are real, samples g(z, n) of z ~ p(z) fake
            name = "sample_discriminator"
            losses[name], real[name] = discriminate(
                self.sample_discriminator, real=(x,), fake=(samples,), objective=self.objective,
                penalty=penalty_scale * self.penalty)
        return losses, real

    def regularization_discriminator_loss(self, z_hat: Tensor, penalty_scale: float = 1.0) -> Tensor:
        """What D(z) descends: fresh z ~ p(z) are real, z_hat (..., batch, global_size) fake, a constant."""
        real = noisy(self.sample_codes(*z_hat.shape[:-1]), self.code_noise)
        # One pass for both sides is quicker where layers are large; the toys, whose codes are (seeds, batch, size),
        # keep two passes, on whose rounding their committed numbers depend.
        return discriminate(
            self.regularization_discriminator, real=(real,), fake=(noisy(z_hat, self.code_noise),),
            objective=self.regularization_objective,
            penalty=penalty_scale * self.regularization_penalty, together=z_hat.dim() == 2)[0]

    def autoencoder_losses(self, x: Tensor, z_hat: Tensor | None, x_hat: Tensor, samples: Tensor | None = None, *,
                           real: dict[str, Tensor]) -> dict[str, Tensor]:
        """What encoder and decoder descend (Eq. 9-10), for data x and what `forward` made, with its gradients.

        real: the second of what `discriminator_losses` returned; empty will do where the objective is not "paired".
        That one compares with the positive pair's logits, constants which only weigh the rows: those from before the
        discriminators' step save a pass. With positive_gradient D(x, z)'s are computed anew, with their gradient.

        The reconstruction loss reaches the decoder through x_hat, and the encoder through x_hat and through z_hat, and
        only with positive_gradient through the z_hat of the positive pair too. The regularization loss reaches the
        encoder alone, that of samples the decoder, and the encoder only through the batch statistics that samples share
        with x_hat.
        """
        losses = {}
        if self.reconstruction_discriminator is None:  # as in the AAE: -log p(x|z) of a unit Gaussian, less a constant
            loss = 0.5 * (x - x_hat).pow(2).flatten(x.dim() - len(self.shape)).sum(-1).mean()
        else:
            # Eq. 10: x_hat and z_hat both carry gradients, the encoder's two paths.
            fake, positive = self.reconstruction_discriminator(x_hat, z_hat), None
            if self.positive_gradient:
                positive = self.reconstruction_discriminator(x, z_hat)
            elif self.objective == "paired":
                positive = real["reconstruction_discriminator"]
            loss = generator_loss(positive, fake, self.objective)
        losses["reconstruction"] = self.reconstruction_weight * loss
        if self.regularization_discriminator is not None:
            fake = self.regularization_discriminator(noisy(z_hat, self.code_noise))
            loss = generator_loss(None, fake, self.regularization_objective)
            losses["regularization"] = self.regularization_weight * loss
        if self.decorrelation_weight:
            losses["decorrelation"] = self.decorrelation_weight * decorrelation_loss(z_hat)  # the encoder's
        if self.agreement_weight:
            copies = self.encode(self.deformed(x))  # (batch, global_size)
            # The encoder's; z_hat is q(k|x) here, the softmax.
            losses["agreement"] = self.agreement_weight * agreement_loss(z_hat, copies)
        if self.sample_discriminator is not None:
            # Paired as in a plain GAN, whose pairs share nothing either (RpGAN).
            positive = real["sample_discriminator"] if self.objective == "paired" else None
            fake = self.sample_discriminator(samples)
            losses["samples"] = self.sample_weight * generator_loss(positive, fake, self.objective)  # the decoder's
        return losses

    def deformed(self, x: Tensor) -> Tensor:
        """The copies of images x that should get the same code: deformed, and rippled where `elastic` says so."""
        return ripple(deform(x), self.elastic) if self.elastic else deform(x)

    def classification_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of q(z|x) at labels y (batch,) in [0, global_size), for a categorical z (Section 2.1.2,
        "Semi-Supervised Learning"): what the encoder descends on labelled images x besides the adversarial costs.
        With an agreement_weight the images are deformed, as they are there."""
        return F.cross_entropy(self.logits(self.deformed(x) if self.agreement_weight else x), y)
