"""What the project measures: Figure 2 as numbers, and the distances between samples that both scripts use.

Images x, x_hat are (batch, channels, height, width) in the network's range; codes z are (batch, size). `evaluate` and
`evaluate_clusters` collect the numbers of a run, in plain Python, so that they can be written to JSON as they are.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError, brief, save
from iae import shift, to_range

SIMILAR_DIGITS = ((3, 5, 8), (4, 9))  # Section 2.1.1: "visually similar digits such as {3, 5, 8} or {4, 9}"


@contextlib.contextmanager
def fixed_noise(device: torch.device):
    """Within it noise begins at seed 0; after it the random state of the CPU and of `device` is what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    """(batch, inputs, height, width) -> (batch, outputs, height, width)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """A small fixed convolutional classifier: the judge of label preservation, and the feature space of the distances.

    x (batch, *shape) in the network's range; `features` (batch, 128), `forward` logits (batch, classes). Two
    convolutions are right on 99.2 % of MNIST but on 89 % of SVHN's subset: colour gets five, with BatchNorm.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        channels, height, width = shape
        if channels == 3:
            layers = [conv_bn_relu(3, 32), nn.MaxPool2d(2), conv_bn_relu(32, 64), conv_bn_relu(64, 64), nn.MaxPool2d(2),
                      conv_bn_relu(64, 128), conv_bn_relu(128, 128), nn.MaxPool2d(2)]
            flat = 128 * (height // 8) * (width // 8)
        else:
            layers = [nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                      nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            flat = 64 * (height // 4) * (width // 4)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.25), nn.Linear(flat, 128), nn.ReLU())
        self.last = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, classes))

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (batch, 128), float32."""
        return torch.cat([self.body(part) for part in x.split(1000)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def fixed_classifier(x: Tensor, y: Tensor, folder: str, epochs: int | None = None) -> Classifier:
    """The classifier of the training set x (uint8), y: trained once with a fixed seed, then read from `folder`.

    y (count,) are class labels; y (count, attributes) of 0 and 1, as CelebA's, are learned one by one. Colour images
    are seen 200,000 times in all, each 3 to 20 times (grey ones 8 times), moved by up to a sixteenth of their height,
    two pixels at most, and in noise of a deviation up to .3, or grain in x_hat would be taken for another digit.

    The file's name holds a hash of the data, so that another data set never meets the wrong judge. On MNIST it is
    right on 99.2 % of the test images or more; `evaluate` reports the measured number beside what it judges.
    """
    shape = tuple(x.shape[1:])
    classes = int(y.max()) + 1 if y.dim() == 1 else y.shape[1]
    colour = shape[0] == 3
    epochs = epochs or (min(20, max(3, 200_000 // len(x))) if colour else 8)
    digest = hashlib.sha256(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes()).hexdigest()[:12]
    path = os.path.join(folder, f"classifier-{digest}-{classes}-{epochs}.pt")
    with fixed_noise(x.device):
        classifier = Classifier(shape, classes).to(x.device, memory_format=torch.channels_last)
        if os.path.exists(path):
            try:
                classifier.load_state_dict(torch.load(path, map_location=x.device, weights_only=True))
            except Exception as error:  # a damaged file can fail in any of torch's, pickle's and zipfile's ways
                raise InputError(f"{path}: damaged ({type(error).__name__}); delete it to train it anew") from None
            return classifier.eval()
        print(f"training the fixed classifier that judges reconstructions ({epochs} epochs, once) ...", file=sys.stderr)
        batch = max(1, min(128, len(x) // 4))
        batches = len(x) // batch  # an epoch; what remains is left out
        optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * batches)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(batch)[:batches]:
                optimizer.zero_grad()
                images = to_range(x[rows], shape)
                if colour:
                    images = shift(images, min(2, shape[1] // 16))
                    images += 0.3 * torch.rand(len(images), 1, 1, 1, device=x.device) * torch.randn_like(images)
                logits = classifier(images)
                if y.dim() == 1:
                    F.cross_entropy(logits, y[rows].long()).backward()
                else:
                    F.binary_cross_entropy_with_logits(logits, y[rows].float()).backward()
                optimizer.step()
                schedule.step()
    content = io.BytesIO()
    torch.save(classifier.state_dict(), content)
    try:
        save(Path(path), content.getbuffer())
    except InputError as error:
        print(f"the classifier is not cached ({error}): the next run trains it again", file=sys.stderr)
    return classifier.eval()


def similar_share(matrix: Tensor) -> tuple[float, float]:
    """Section 2.1.1's claim on a `cross_table` of ten digits, true against found: the share of all confusions that stay
    inside {3, 5, 8} or {4, 9}, and the same share by chance, had each row's confusions fallen evenly on the nine
    others."""
    matrix = matrix * (1 - torch.eye(len(matrix)))
    inside = sum(matrix[a, b].item() for group in SIMILAR_DIGITS for a in group for b in group)
    chance = sum(matrix[a].sum().item() * (len(group) - 1) / 9 for group in SIMILAR_DIGITS for a in group)
    total = max(1.0, matrix.sum().item())
    return inside / total, chance / total


def local_diversity(draws: Tensor, x: Tensor) -> float:
    """The variance over n at fixed z over the data's variance, both summed over pixels: 0 deterministic, 1 all local.

    draws (count, batch, *shape): `count` reconstructions of the same codes; x (batch, *shape).
    """
    return (draws.var(0).mean(0).sum() / x.var(0).sum().clamp(min=1e-6)).item()


def draw_local(model: nn.Module, x: Tensor, draws: int = 10) -> Tensor:
    """(draws, batch, *shape): reconstructions of uint8 images x with fresh n each; of a plain GAN, samples."""
    if model.global_size:
        return draw(model, x, draws)[1]
    return torch.stack([torch.cat([model.sample(len(part)) for part in x.split(500)]) for _ in range(draws)])


def variance_map(draws: Tensor, x: Tensor) -> Tensor:
    """`local_diversity` pixel by pixel, (height, width): variance over n over the data's variance, channels summed."""
    return draws.var(0).mean(0).sum(0) / x.var(0).sum(0).clamp(min=1e-6)


def outer_over_middle(ratio: Tensor) -> float:
    """The mean of a `variance_map` (height, width) in the outer thirds of the width over that in the middle one."""
    third = ratio.shape[1] // 3
    outer = torch.cat([ratio[:, :third], ratio[:, -third:]], 1)
    return (outer.mean() / ratio[:, third:-third].mean()).item()


def side_colour_correlation(x: Tensor) -> float:
    """Do the sides of pictures x (batch, 3, height, width) have the style of the middle? The correlation, over
    pictures, of the middle third's mean colour with the outer thirds', averaged over channels (0 of a constant one)."""
    third = x.shape[3] // 3
    middle = x[..., third:-third].mean((2, 3))  # (batch, 3)
    outer = torch.cat([x[..., :third], x[..., -third:]], 3).mean((2, 3))
    found = [torch.corrcoef(torch.stack(pair))[0, 1].nan_to_num().item() for pair in zip(middle.T, outer.T)]
    return sum(found) / len(found)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (count, size)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.cov(features.T).reshape(a.shape[1], a.shape[1]) for features in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).pow(2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020) of features (count, size). Density may exceed 1; coverage is in [0, 1].

    Around each real point, of two or more, lies the ball that reaches its k-th nearest real neighbour. Density: in how
    many balls a fake point lies, over k. Coverage: the share of balls with a fake point inside.
    """
    k, centre = min(k, len(real) - 1), real.mean(0)
    real, fake = real - centre, fake - centre  # far from 0 float32 would round the distances
    radius = torch.cat([torch.cdist(part, real).kthvalue(k + 1, dim=1).values for part in real.split(1000)])
    inside = torch.cat([torch.cdist(part, real) < radius for part in fake.split(1000)])  # (fake, real)
    return inside.sum().item() / (k * len(fake)), inside.any(0).double().mean().item()


def mmd_test(a: Tensor, b: Tensor, permutations: int = 100, bandwidths: tuple = (0.5, 1.0, 2.0)) -> dict:
    """Squared maximum mean discrepancy of two samples (count, size) of equal count, unbiased, RBF kernels averaged.

    Returns mmd, its floor (the mean absolute value over random relabellings of the pooled sample, which is what two
    equal distributions give) and the permutation p-value. The bandwidths are for two dimensions; they are scaled by
    sqrt(size / 2) for others. Raises ValueError unless the counts agree and are at least 2.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"two samples of {len(a)} and {len(b)} rows: the counts must agree and be at least 2")
    count, pooled = len(a), torch.cat([a, b]).float()
    own = torch.Generator().manual_seed(0)  # leaves the global ones, a GPU's too, as they are
    orders = [torch.arange(2 * count)] + [torch.randperm(2 * count, generator=own) for _ in range(permutations)]
    first = torch.stack([(order < count) for order in orders], 1).float().to(a.device)  # (2 count, 1 + permutations)
    scales = [1 / (2 * h * h * max(1, pooled.shape[1]) / 2) for h in bandwidths]
    within, total = torch.zeros(2, first.shape[1], dtype=torch.double, device=a.device), 0.0
    for start in range(0, 2 * count, 1000):
        rows = slice(start, start + 1000)
        squares = torch.cdist(pooled[rows], pooled).square()
        kernel = sum(torch.exp(-squares * s) for s in scales) / len(scales)
        kernel[:, start:].fill_diagonal_(0)  # unbiased: no point is paired with itself
        to_first, to_all = kernel @ first, kernel.sum(1, keepdim=True)
        within[0] += (first[rows] * to_first).double().sum(0)
        within[1] += ((1 - first[rows]) * (to_all - to_first)).double().sum(0)
        total += to_all.double().sum().item()
    between = (total - within.sum(0)) / 2
    values = within.sum(0) / (count * (count - 1)) - 2 * between / count**2
    mmd, null = values[0].item(), values[1:]
    return {"mmd": mmd, "floor": null.abs().mean().item(), "p": (1 + (null >= mmd).sum().item()) / (1 + permutations)}


def agreement_of_neighbours(z: Tensor, z_data: Tensor, y_data: Tensor, k: int = 10) -> Tensor:
    """Of the k codes z_data (many, K) nearest to each of the codes z (batch, K), the share of their most common label
    in y_data (many,): (batch,). Near 1 inside a class, less on the borders between classes."""
    nearest = torch.cat([torch.cdist(part, z_data).topk(min(k, len(z_data)), largest=False).indices
                         for part in z.split(500)])  # (batch, k)
    labels = y_data[nearest]
    return (labels == labels.mode(1, keepdim=True).values).double().mean(1)


def borders(model: nn.Module, z_test: Tensor, z_train: Tensor, y_train: Tensor, classifier: Classifier) -> dict:
    """Where prior codes lie among the data's, by `agreement_of_neighbours`, and what the decoder makes of them.

    neighbours_agree_prior, ..._test       its mean over prior codes, over codes of test images
    samples_confident_inside, ..._border   the share of samples classified with confidence above .9 where all ten
                                           neighbours agree, and where fewer than six do (None: there are none)
    """
    prior = model.sample_codes(len(z_test))
    agree = agreement_of_neighbours(prior, z_train, y_train)
    sure = torch.cat([classifier(model.decode(part)).softmax(1).amax(1) > 0.9 for part in prior.split(500)])
    share = {name: sure[those].double().mean().item() if those.any() else None
             for name, those in (("inside", agree == 1), ("border", agree < 0.55))}
    return {"neighbours_agree_prior": agree.mean().item(),
            "neighbours_agree_test": agreement_of_neighbours(z_test, z_train, y_train).mean().item(),
            "samples_confident_inside": share["inside"], "samples_confident_border": share["border"]}


def attributes_kept(classifier: Classifier, y: Tensor, real: Tensor, features: Tensor | None, again: Tensor | None,
                    names: tuple) -> list[dict]:
    """What is kept of each attribute of y (count, attributes), 0 or 1, from the classifier's features of data, of
    reconstructions, and of reconstructions with another n (None where there is no code); README's legend explains it.
    """
    most, on_data = y.double().mean(0), ((classifier.last(real) > 0) == (y > 0)).double().mean(0)
    kept = moved = [None] * y.shape[1]
    if features is not None:
        found, other = classifier.last(features) > 0, classifier.last(again) > 0
        kept, moved = (those.double().mean(0).tolist() for those in (found == (y > 0), found != other))
    return [{"attribute": names[i] if i < len(names) else str(i), "on_data": on_data[i].item(), "kept": kept[i],
             "moved_by_n": moved[i], "by_chance": max(most[i].item(), 1 - most[i].item())} for i in range(y.shape[1])]


def linear_probe(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of a multinomial logistic regression from codes (count, size) to labels, which descends the mean
    cross-entropy and 1e-4 |weights|^2 of standardized codes."""
    z, z_test = z.float(), z_test.float()
    mean, deviation = z.mean(0), z.std(0).clamp(min=1e-6)
    z, z_test = (z - mean) / deviation, (z_test - mean) / deviation
    weight = torch.zeros(z.shape[1] + 1, int(y.max()) + 1, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight[1:] + weight[0], y) + 1e-4 * weight[1:].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return ((z_test @ weight[1:] + weight[0]).argmax(1) == y_test).double().mean().item()


def draw(model: nn.Module, x: Tensor, draws: int = 1) -> tuple[Tensor | None, Tensor]:
    """Codes (batch, global_size) of uint8 images x, and `draws` reconstructions of each, (draws, batch, *shape)."""
    codes, images = [], []
    for part in x.split(500):
        z = model.encode(to_range(part, model.shape))
        n = torch.randn(draws, len(part), model.local_size, device=x.device)  # of no columns where there is no n
        images.append(torch.stack([model.decode(z, row) for row in n]))
        codes.append(z)
    return None if codes[0] is None else torch.cat(codes), torch.cat(images, 1)


# ------------------------------------------------------------------------------------ discrete codes (Section 2.1.2)


def cross_table(a: Tensor, b: Tensor, rows: int, columns: int) -> Tensor:
    """Counts (rows, columns), float64: how often a = row and b = column, of integer labellings a, b (count,)."""
    return torch.bincount(a.long() * columns + b.long(), minlength=rows * columns).view(rows, columns).double().cpu()


def normalized_mutual_information(a: Tensor, b: Tensor) -> float:
    """I(a; b) / sqrt(H(a) H(b)) of two labellings, (count,) integers >= 0; in [0, 1], and 0 where one is constant."""
    joint = cross_table(a, b, int(a.max()) + 1, int(b.max()) + 1) / len(a)
    h_a, h_b, h_joint = (-torch.special.xlogy(p, p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return max(0.0, h_a + h_b - h_joint) / math.sqrt(h_a * h_b) if h_a > 0 and h_b > 0 else 0.0


def adjusted_rand_index(counts: Tensor) -> float:
    """ARI (Hubert and Arabie 1985) of a `cross_table`: pairs on which two labellings agree; 0 by chance, at most 1."""
    pairs = lambda n: (n * (n - 1) / 2).sum().item()  # noqa: E731
    both, a, b, all_pairs = pairs(counts), pairs(counts.sum(1)), pairs(counts.sum(0)), pairs(counts.sum())
    chance, most = a * b / all_pairs, (a + b) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


def one_to_one(counts: Tensor) -> list[int]:
    """The naming of clusters (rows) by classes (columns), each class once, that agrees most: exact, for up to 12 rows,
    of which there are no more than columns.

    best[set of classes] holds the most agreement that the first clusters reach with just these classes.
    """
    best = {0: (0.0, [])}
    for row in counts.tolist():
        reached = {}
        for used, (score, names) in best.items():
            for name, count in enumerate(row):
                key = used | 1 << name
                if key != used and score + count > reached.get(key, (-1.0,))[0]:
                    reached[key] = (score + count, names + [name])
        best = reached
    return max(best.values())[1]


@torch.no_grad()
def assignments(model: nn.Module, x: Tensor, draws: int = 1) -> tuple[Tensor, Tensor]:
    """For uint8 images x: votes (batch, K), the share of `draws` of eps that chose each cluster, and the mean log
    probabilities (batch, K). Without eps one draw says it all."""
    votes, logs = [], []
    for part in x.split(500):
        x_part = to_range(part, model.shape)
        draw_of = [model.logits(x_part).log_softmax(1) for _ in range(draws if model.noise_size else 1)]
        votes.append(sum(F.one_hot(one.argmax(1), one.shape[1]).float() for one in draw_of) / len(draw_of))
        logs.append(sum(draw_of) / len(draw_of))
    return torch.cat(votes), torch.cat(logs)


def clustering(train: tuple[Tensor, Tensor], y_train: Tensor, test: tuple[Tensor, Tensor], y_test: Tensor,
               classes: int) -> dict:
    """How well clusters match classes. train, test: `assignments`; labels of training images only name the clusters.

    error_exemplar     a cluster is named by the training image with the largest q(k|x) (AAE); K labels are read
    error_majority     by the most frequent label of the training images in it; len(y_train) labels are read
    error_one_to_one   each class names one cluster, so that most agree; only where K = classes <= 12
    nmi, ari           normalized mutual information and adjusted Rand index of cluster and class, on the test images
    clusters_used      that hold at least one in 10 K of the test images
    usage_entropy      of the mean assignment, nats; log K where all clusters are used evenly
    assignment_entropy mean entropy of q(k|x), nats; 0 where every decision is sure
    """
    (votes, logs), clusters = test, test[0].shape[1]
    cluster, cluster_train = votes.argmax(1), train[0].argmax(1)
    names = {"exemplar": y_train[train[1].argmax(0)]}
    counts = cross_table(cluster_train, y_train, clusters, classes)
    names["majority"] = counts.argmax(1).to(cluster.device)
    if clusters == classes <= 12:
        names["one_to_one"] = torch.tensor(one_to_one(counts), device=cluster.device)
    numbers = {f"error_{way}": (name[cluster] != y_test).double().mean().item() for way, name in names.items()}
    table_test = cross_table(cluster, y_test, clusters, classes)
    share, p = table_test.sum(1) / len(cluster), logs.softmax(1)
    return numbers | {
        "labels_read": {"exemplar": clusters, "majority": len(y_train), "one_to_one": len(y_train)},
        "nmi": normalized_mutual_information(cluster, y_test), "ari": adjusted_rand_index(table_test),
        "clusters_used": int((share >= 0.1 / clusters).sum()),
        "usage_entropy": -torch.special.xlogy(p.mean(0), p.mean(0)).sum().item(),
        "assignment_entropy": -torch.special.xlogy(p, p).sum(1).mean().item()}


def vote_calibration(votes: Tensor, right: Tensor) -> dict:
    """What the votes (batch, K) over draws of eps are worth (Section 3.1); right (batch,): is the chosen class right?

    error_least_certain   the error among the tenth of the images whose draws agree least, of equals by chance
    error_rest            among the others
    draws_disagree        the share of images on which not all draws agree
    calibration_error     mean |share of the draws that agree - accuracy| over ten equal groups by that share (fewer
                          where there are fewer images)
    """
    mixed = torch.randperm(len(right)).to(right.device)  # most images have votes alike: their order must not matter
    agree, order = votes[mixed].max(1).values.sort(stable=True)
    right = right[mixed][order].double()
    tenth = max(1, len(right) // 10)
    parts = min(10, len(right))
    groups = zip(agree.double().tensor_split(parts), right.tensor_split(parts))
    return {"error_least_certain": 1 - right[:tenth].mean().item(), "error_rest": 1 - right[tenth:].mean().item(),
            "draws_disagree": (agree < 1).double().mean().item(),
            "calibration_error": sum(abs(a.mean() - r.mean()).item() * len(a) for a, r in groups) / len(agree)}


def style(x: Tensor) -> Tensor:
    """Slant and stroke width of digits x (batch, 1, height, width) in [0, 1], (batch, 2).

    slant: the shear mu11 / mu02 from the second central moments of the ink; width: 2 ink / (length of its outline, the
    summed gradient magnitude), which for a long stroke is its width in pixels.
    """
    ink = x[:, 0].double()
    rows = torch.arange(ink.shape[1], device=x.device, dtype=torch.double)[:, None]
    columns = torch.arange(ink.shape[2], device=x.device, dtype=torch.double)
    mass = ink.sum((1, 2)).clamp(min=1e-6)[:, None, None]
    down = rows - (ink * rows).sum((1, 2), keepdim=True) / mass
    right = columns - (ink * columns).sum((1, 2), keepdim=True) / mass
    slant = -(ink * down * right).sum((1, 2)) / (ink * down * down).sum((1, 2)).clamp(min=1e-6)
    dy, dx = ink.diff(dim=1)[:, :, :-1], ink.diff(dim=2)[:, :-1]
    outline = (dy.square() + dx.square()).sqrt().sum((1, 2))
    return torch.stack([slant, 2 * ink.sum((1, 2)) / outline.clamp(min=1e-6)], 1)


def style_correlation(styles: Tensor) -> list[float]:
    """Figure 6's claim: the mean correlation, over pairs of columns, of each measure of `style` along the rows.

    styles (rows, columns, measures). Rows that share n and columns that share z give near 1 where the style is in n.
    """
    found = []
    for measure in styles.unbind(2):
        r = torch.corrcoef(measure.T).nan_to_num()
        found.append(((r.sum() - r.trace()) / (len(r) * (len(r) - 1))).item())
    return found


@torch.no_grad()
def evaluate_clusters(model: nn.Module, train: tuple, test: tuple, classifier: Classifier | None, semi_supervised: bool,
                      draws: int = 50) -> dict:
    """The numbers of a categorical code: `clustering`, votes, purity and style of generated columns, recognition of
    the model's own images; `semi_supervised` adds the error of q(z|x) as a classifier (no cluster needs a name).

    purity: of the images that each cluster generates, the mean share of the classifier's most frequent class.
    error_on_generated: how often the inferred cluster of g(z, n) is not z (Section 3's worry about dreams).
    """
    clusters, device, numbers = model.global_size, train[0].device, {}
    with fixed_noise(device):
        rows = torch.randperm(len(train[0]))[:10000].to(device)
        z = torch.eye(clusters, device=device)
        n = torch.randn(200 if model.local_size else 2, model.local_size, device=device)
        columns = torch.stack([model.decode(z, row.expand(clusters, -1)) for row in n])  # (rows, clusters, *shape)
        own, meant = model.logits(columns.flatten(0, 1)).argmax(1), z.argmax(1).repeat(len(columns))
        numbers["error_on_generated"] = (own != meant).double().mean().item()
        if model.shape == (1, 28, 28) and model.local_size:
            styles = style(columns.flatten(0, 1)).unflatten(0, columns.shape[:2])
            shuffled = torch.stack([column[torch.randperm(len(column))] for column in styles.unbind(1)], 1)
            for suffix, those in (("", styles), ("_shuffled", shuffled)):
                found = style_correlation(those)
                numbers[f"slant_correlation{suffix}"], numbers[f"stroke_width_correlation{suffix}"] = found
        if test[1] is None or test[1].dim() == 2:  # no classes
            return numbers
        classes = int(max(train[1].max(), test[1].max())) + 1
        y_train, y_test = train[1][rows].long(), test[1].long()
        found, named = assignments(model, test[0], draws), assignments(model, train[0][rows], draws)
        numbers |= clustering(named, y_train, found, y_test, classes)
        if semi_supervised:
            numbers["error"] = (found[0].argmax(1) != y_test).double().mean().item()
        if model.noise_size:
            name = cross_table(named[0].argmax(1), y_train, clusters, classes).argmax(1).to(device)
            numbers |= vote_calibration(found[0], name[found[0].argmax(1)] == y_test)
        if classifier is not None:
            kind = torch.stack([classifier(column).argmax(1) for column in columns.unbind(1)])  # (clusters, rows)
            numbers["purity"] = (kind == kind.mode(1, keepdim=True).values).double().mean(1).mean().item()
    return numbers


@torch.no_grad()
def evaluate(model: nn.Module, train: tuple, test: tuple, classifier: Classifier | None, count: int = 10000) -> dict:
    """Every number of a run on at most `count` test images, in plain Python; README's legend explains the names.

    The model is in evaluation mode. train, test: (x uint8, y) pairs, of two images or more. The noise is drawn from a
    fixed seed, and the random state of the CPU and of the images' device is left as it was.
    """
    shape, device, names = model.shape, train[0].device, getattr(test, "names", ())
    with fixed_noise(device):
        x_train, x_test = train[0][torch.randperm(len(train[0]))[:count].to(device)], test[0][:count]
        x = to_range(x_test, shape)
        z, x_hat = draw(model, x_test)
        samples = torch.cat([model.sample(len(part)) for part in x_test.split(500)])
        numbers = {"test_images": len(x_test)}
        if z is not None:
            numbers["reconstruction_mse"] = (x_hat[0] - x).square().mean().item()
            numbers["contrast"] = (x_hat[0].std() / x.std().clamp(min=1e-6)).item()
            numbers["local_diversity"] = local_diversity(draw_local(model, x_test[:1000]), x[:1000])
            prior = model.sample_codes(len(z))
            numbers.update({f"code_{name}": value for name, value in mmd_test(z, prior).items()})
        if shape[0] == 3 and model.local_size:
            draws, data = draw_local(model, x_test[:1000]), x[:1000]
            plain = [images - images.mean((-2, -1), keepdim=True) for images in (draws, data)]
            numbers["outer_over_middle"] = outer_over_middle(variance_map(draws, data))
            numbers["outer_over_middle_without_colour"] = outer_over_middle(variance_map(*plain))
            numbers["side_colour_correlation"] = side_colour_correlation(draws[0])
            numbers["side_colour_correlation_data"] = side_colour_correlation(data)
        if classifier is None:
            return numbers

        real, fake = classifier.features(x), classifier.features(samples)
        features_train = classifier.features(to_range(x_train[: len(x)], shape))  # the floor: as many as samples
        numbers["frechet_floor"] = frechet_distance(features_train, real)
        numbers["frechet_samples"] = frechet_distance(fake, real)
        numbers["density"], numbers["coverage"] = density_coverage(real, fake)
        numbers["density_floor"], numbers["coverage_floor"] = density_coverage(real, features_train)
        features = classifier.features(x_hat[0]) if z is not None else None
        if z is not None:
            numbers["frechet_reconstructions"] = frechet_distance(features, real)
        y = test[1][:count].long()
        if y.dim() == 2:  # attributes of 0 and 1
            again = None
            if z is not None:  # a second draw of n
                again = classifier.features(torch.cat([model.decode(part) for part in z.split(500)]))
            numbers["attributes"] = attributes_kept(classifier, y, real, features, again, names)
            return numbers

        confidence, kind = classifier.last(fake).softmax(1).max(1)
        shares = torch.bincount(kind, minlength=len(classifier.last[1].bias)) / len(kind)
        numbers["samples_confident"] = (confidence > 0.9).double().mean().item()
        numbers["samples_class_shares"] = [round(share, 4) for share in shares.tolist()]
        on_data = classifier.last(real).argmax(1)
        numbers["classifier_accuracy"] = (on_data == y).double().mean().item()
        if z is None:
            return numbers

        on_reconstructions = classifier.last(features).argmax(1)
        numbers["labels_kept"] = (on_reconstructions == y).double().mean().item()
        numbers["predictions_kept"] = (on_reconstructions == on_data).double().mean().item()
        classes = max(len(shares), int(y.max()) + 1)
        if classes <= 100:  # more would be a large file, not a table
            matrix = cross_table(y, on_reconstructions, classes, classes)  # row the true label, column that of x_hat
            numbers["confusion_matrix"] = matrix.long().tolist()
            if shape == (1, 28, 28) and classes == 10:
                numbers["confusions_similar"], numbers["confusions_similar_chance"] = similar_share(matrix)
        rows = torch.randperm(len(train[0]))[:count].to(device)
        y_train, (z_train, seen) = train[1][rows].long(), draw(model, train[0][rows])
        numbers["labels_kept_training"] = (classifier(seen[0]).argmax(1) == y_train).double().mean().item()
        numbers["linear_probe"] = linear_probe(z_train, y_train, z, y)
        if model.prior == "gaussian":
            numbers |= borders(model, z, z_train, y_train, classifier)
    return numbers


def run_name(path: str) -> str:
    """What a column of `table` is called: the file, or the folder of a final.json or sweep.json."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if stem in ("final", "sweep") else stem


def table(paths: list[str]) -> str:
    """README's table of runs, as Markdown, from their final.json files: a column a run, a row a number. Raises
    InputError where one is another file."""
    finals = {}
    for path in paths:
        try:
            with open(path) as file:
                finals[path] = json.load(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({brief(error)}); name a run's final.json") from None
        if not isinstance(finals[path], dict) or not {"settings", "steps", "seconds", "metrics"} <= set(finals[path]):
            raise InputError(f"{path}: not the numbers of a run; name a run's final.json or a sweep's sweep.json")

    def row(title, cell):
        cells = [cell(final) for final in finals.values()]
        return [" | ".join([f"| {title}", *cells]) + " |"] if set(cells) != {"-"} else []

    def number(title, key, scale=1, digits=3):
        def cell(final):
            value = final["metrics"].get(key)
            if isinstance(value, dict):  # of a sweep
                return f"{scale * value['mean']:.{digits}f} +- {scale * value['deviation']:.{digits}f}"
            return f"{scale * value:.{digits}f}" if value is not None else "-"
        return row(title, cell)

    def shares(final):
        found = final["metrics"].get("samples_class_shares")
        return f"{100 * min(found):.1f} to {100 * max(found):.1f}" if found else "-"

    def minutes(final):
        seconds = final["seconds"] if isinstance(final["seconds"], list) else [final["seconds"]]
        return f"{sum(seconds) / len(seconds) / 60:.0f}"

    names = [f"[{run_name(path)}]({path})" for path in finals]
    return "\n".join([
        " | ".join(["| ", *names]) + " |", "|---" * (len(names) + 1) + "|",
        *number("error of q(z given x) as a classifier, %", "error", 100, 2),
        *number("clustering error, exemplar, %", "error_exemplar", 100, 2),
        *number("clustering error, majority, %", "error_majority", 100, 2),
        *number("clustering error, one to one, %", "error_one_to_one", 100, 2),
        *number("error on its own images, %", "error_on_generated", 100, 2),
        *number("error where draws agree least (a tenth), %", "error_least_certain", 100, 1),
        *number("error elsewhere, %", "error_rest", 100, 1),
        *number("calibration error of the vote, %", "calibration_error", 100, 1),
        *number("normalized mutual information", "nmi"), *number("adjusted Rand index", "ari"),
        *number("clusters in use", "clusters_used", 1, 0), *number("entropy of the mean assignment", "usage_entropy"),
        *number("mean entropy of assignments", "assignment_entropy"),
        *number("purity of generated columns, %", "purity", 100, 1),
        *number("correlation of slant between columns, same n", "slant_correlation", 1, 2),
        *number("the same, n shuffled", "slant_correlation_shuffled", 1, 2),
        *number("correlation of stroke width, same n", "stroke_width_correlation", 1, 2),
        *number("the same, n shuffled", "stroke_width_correlation_shuffled", 1, 2),
        *number("labels kept, %", "labels_kept", 100, 1),
        *number("the classifier is right on the data, %", "classifier_accuracy", 100, 1),
        *number("its decision kept, %", "predictions_kept", 100, 1),
        *number("labels of training images kept, %", "labels_kept_training", 100, 1),
        *number("reconstruction MSE", "reconstruction_mse", 1, 4), *number("contrast", "contrast", 1, 2),
        *number("local diversity", "local_diversity"),
        *number("local variance, outer over middle thirds", "outer_over_middle", 1, 2),
        *number("the same without mean colour", "outer_over_middle_without_colour", 1, 2),
        *number("colour of sides and middle, correlation", "side_colour_correlation", 1, 2),
        *number("the same in the data", "side_colour_correlation_data", 1, 2),
        *number("confusions inside {3,5,8}, {4,9}, %", "confusions_similar", 100, 0),
        *number("the same by chance, %", "confusions_similar_chance", 100, 0),
        *number("linear probe of z, %", "linear_probe", 100, 1),
        *number("Frechet distance of reconstructions", "frechet_reconstructions", 1, 2),
        *number("Frechet distance of samples", "frechet_samples", 1, 2),
        *number("its floor, training against test images", "frechet_floor", 1, 2),
        *number("samples classified with confidence above .9, %", "samples_confident", 100, 1),
        *row("least and largest class of all samples, %", shares),
        *number("confident inside a class, %", "samples_confident_inside", 100, 1),
        *number("confident on borders, %", "samples_confident_border", 100, 1),
        *number("neighbours of a prior code that agree, %", "neighbours_agree_prior", 100, 1),
        *number("the same of a test image's code", "neighbours_agree_test", 100, 1),
        *number("density", "density", 1, 2), *number("coverage", "coverage", 1, 2),
        *number("squared MMD of q(z) to p(z)", "code_mmd", 1, 5), *number("its floor", "code_floor", 1, 5),
        *number("its p", "code_p", 1, 2),
        *row("measured on", lambda final: "held-out images" if final.get("evaluated_on") == "validation" else "-"),
        *row("seed", lambda final: " ".join(map(str, final.get("seeds", [final["settings"].get("seed")])))),
        *row("steps", lambda final: str(final["steps"])), *row("minutes", minutes)])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit("usage: python metrics.py results/mnist-*.json  (prints their numbers as a Markdown table)")
    try:
        print(table(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
