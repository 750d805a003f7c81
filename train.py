"""Train an implicit autoencoder on images, look at it, and measure it.

    python train.py --dataset mnist --global 10 --local 100      Figure 2c: the digit in z, its style in n
    python train.py --resume runs/mnist-10-100-0                 go on where a run was cut off
    python train.py --from runs/mnist-10-100-0 --sample 100      a sheet of samples from a trained model

The algorithm is `update`, one step of both players; around it stand its loop, `train`, the settings, the folder of a
run, and the pictures.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: two runs into one folder are not noticed there
    fcntl = None

import matplotlib

matplotlib.use("Agg")  # figures are files: no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torch.utils.flop_counter import FlopCounterMode

from data import InputError, batch_indices, brief, fingerprints, load_dataset, load_picture
from fiae import FIAE, InfoGAN
from iae import IAE, layout_of, noisy, shift, to_range, to_uint8
from metrics import (assignments, draw, draw_local, evaluate, evaluate_clusters, fixed_classifier, fixed_noise,
                     variance_map)

# Each recipe holds what the paper leaves open. "paper": the original GAN losses (Eq. 1), BatchNorm in the
# discriminators as in Appendix D.2 (before the ReLU: README, departure 1), InfoGAN's optimizer settings. "stable": what
# measures better (README, "Recipes").
RECIPES = {
    "paper": dict(
        objective="gan",  # Eq. 1, non-saturating
        penalty=0.0,  # gamma of R1 + R2 on the reconstruction discriminator (and the D(x) of --sample-weight)
        regularization_penalty=0.0,  # and on the regularization discriminator
        penalty_every=1,  # K: penalties in each K-th step, with K times their gamma; lazy ones (Karras et al. 2020)
        reconstruction_weight=1.0,  # of the reconstruction GAN's loss in what encoder and decoder descend
        regularization_weight=1.0,  # of the regularization GAN's
        regularization_steps=1,  # of the IAE's D(z), for each step of the others
        code_penalty=0.0,  # gamma of R1 on the code alone, in D(x, z)
        decorrelation_weight=0.0,  # of the covariances between the dimensions of the IAE's Gaussian code
        sample_weight=0.0,  # of a third GAN, whose D(x) sees samples from the IAE's prior, in what the decoder descends
        sample_rate=2e-4,  # Adam's, of that D(x): a fifth of the decoder's; a faster one wins (README, "What failed")
        paired_regularization=False,  # the FIAE's D(x) as a relativistic GAN
        information_weight=0.0,  # of what asks the FIAE's images to tell their codes; grows to it over training
        code_noise=0.0,  # deviation of the noise in which the IAE's D(z), the FIAE's D(x, z) sees codes
        image_noise=0.0,  # and of that in which the FIAE's recognition network and D(x, z) see its images
        elastic=0.0,  # of ripples in what the FIAE's recognition network and D(x, z) see, in the IAE's deformed copies
        agreement_weight=0.0,  # of the probability that a deformed image gets the same code
        local_scale=1.0,  # of the decoder's initial weights of n
        batch_norm=True,  # in the discriminators of images
        beta1=0.5,  # of Adam
        rates=(1e-3, 1e-3, 2e-4, 2e-4),  # Adam's, of encoder, decoder, reconstruction and regularization discriminator
        decay=0.0,  # the share of training, at its end, over which all rates fall linearly to zero
        averaging=0.999,  # decay of the averaged weights, which are what is evaluated and saved for use
    ),
    "stable": dict(
        objective="paired",
        penalty=0.0,
        regularization_penalty=0.1,
        penalty_every=16,
        reconstruction_weight=1.0,
        regularization_weight=10.0,
        regularization_steps=1,
        code_penalty=0.0,
        decorrelation_weight=0.0,
        sample_weight=0.0,
        sample_rate=2e-4,
        paired_regularization=False,
        information_weight=0.0,
        code_noise=0.0,
        image_noise=0.0,
        elastic=0.0,
        agreement_weight=0.0,
        local_scale=1.0,
        batch_norm=True,
        beta1=0.0,
        rates=(1e-4, 1e-3, 2e-4, 5e-4),
        decay=0.0,  # falling rates end the game early, with worse samples (README, "What failed")
        averaging=0.999,
    ),
}
# What "stable" changes where --local is 0: all of x must pass through z, so z has more to learn and less to be moved.
DETERMINISTIC = dict(penalty_every=1, regularization_weight=1.0, rates=(3e-4, 1e-3, 5e-4, 5e-4), decay=0.5)
# And under a categorical prior: what a cluster is must be said, and D(z) must not win by the corners of the simplex.
CATEGORICAL = dict(regularization_penalty=0.3, penalty_every=1, regularization_weight=100.0, code_noise=0.3,
                   agreement_weight=1.0, rates=(1e-3, 1e-3, 2e-4, 2e-3), decay=0.5)
# With labels, which hold every cluster in its place, both GANs are better gentle with it (README, "Discrete codes").
LABELLED = dict(regularization_penalty=1.0, regularization_weight=10.0, reconstruction_weight=0.1)
# Where the model is flipped, D(x) is a plain GAN's: InfoGAN's settings, and D(x, z) as fast as the recognition network.
FLIPPED = dict(regularization_penalty=0.0, penalty_every=1, regularization_weight=1.0, beta1=0.5,
               rates=(1e-3, 1e-3, 1e-3, 2e-4), decay=0.5)
FLIPPED_GAUSSIAN = dict(FLIPPED, image_noise=0.2, elastic=0.06, code_penalty=15.0, paired_regularization=True,
                        information_weight=25.0, reconstruction_weight=0.5)
FLIPPED_CATEGORICAL = dict(FLIPPED, reconstruction_weight=0.3, code_noise=0.3, agreement_weight=1.0, local_scale=0.5)
CHOICES = {
    "model": ("iae", "fiae", "infogan"), "prior": ("gaussian", "categorical"), "objective": ("gan", "paired", "kl"),
    "conditioning": ("dependent", "invariant", "projection", "distance"), "recipe": tuple(RECIPES),
    "precision": ("auto", "float32", "bf16"),
}
# What of the command line config.json does not keep: what it asks for, and what is kept under another name.
NO_SETTINGS = "resume", "from", "sample", "reconstruct", "no_regularization", "seeds", "benchmark", "epochs"
PROJECT, FORMAT = "implicit-autoencoders", 4  # what a checkpoint says it is
SAVE_SECONDS = 120  # between checkpoints; up to five times as long where saving takes more than a tenth of it
STOPPED = "stopped; what was saved is whole, and a run that has a folder goes on with --resume"
JUDGED_STEPS = 400  # a discriminator or code that shows nothing by then is named in the log


def build_model(settings: dict) -> IAE | FIAE:
    """The untrained model that `settings` (a run's config.json) describe."""
    sizes = tuple(settings["shape"]), settings["global"], settings["local"]
    options = {name: settings[name] for name in (
        "prior", "batch_norm", "objective", "penalty", "regularization_penalty", "reconstruction_weight",
        "regularization_weight", "positive_gradient", "agreement_weight", "elastic", "code_noise", "local_scale")}
    if settings["model"] != "iae":
        options.update({name: settings[name] for name in ("image_noise", "paired_regularization")})
    if settings["model"] == "infogan":
        return InfoGAN.for_images(*sizes, **options)
    options.update(noise_size=settings["noise"], conditioning=settings["conditioning"],
                   code_penalty=settings["code_penalty"])
    if settings["model"] == "fiae":
        return FIAE.for_images(*sizes, **options, information_weight=settings["information_weight"])
    options.update({name: settings[name] for name in (
        "euclidean", "regularization", "decorrelation_weight", "sample_weight")})
    return IAE.for_images(*sizes, **options)


def drop_discriminators(model: IAE | FIAE) -> None:
    """Leaves what is evaluated and used: encoder and decoder."""
    for name in [name for name, _ in model.named_children() if "discriminator" in name]:
        setattr(model, name, None)


def recent_size(settings: dict, model: IAE | FIAE) -> tuple[int, int] | None:
    """(batches, rows) of the codes kept for the further steps of the IAE's D(z); None where it makes none."""
    if settings["regularization_steps"] == 1 or isinstance(model, FIAE) or model.regularization_discriminator is None:
        return None
    return settings["regularization_steps"] - 1, settings["batch_size"]


class Run:
    """What training moves, and so what a checkpoint holds: the two players, their optimizers, the average, the step."""

    def __init__(self, settings: dict):
        self.settings, self.step, self.seconds = settings, 0, 0.0
        self.taken_up = 0, 0.0  # the step and seconds that this process began at: the speed shown is its own
        self.captured = {}  # by penalty_scale
        self.judged, self.warned = [], set()  # of `warn_of_dead_discriminator`, `warn`
        self.device = torch.device(settings["device"])
        torch.manual_seed(settings["seed"])
        self.model = build_model(settings).to(self.device, memory_format=torch.channels_last)
        # The average of the weights over steps is what is evaluated, drawn and loaded for use.
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        drop_discriminators(self.averaged)
        self.autoencoder = [p for name, p in self.model.named_parameters() if "discriminator" not in name]
        flipped = isinstance(self.model, FIAE)
        networks = (self.model.recognition if flipped else self.model.encoder,
                    self.model.generator if flipped else self.model.decoder,
                    self.model.reconstruction_discriminator, self.model.regularization_discriminator,
                    None if flipped else self.model.sample_discriminator)
        rates = *settings["rates"], settings["sample_rate"]
        groups = [{"params": [] if network is None else list(network.parameters()), "rate": rate}
                  for network, rate in zip(networks, rates)]
        betas = (settings["beta1"], 0.99)

        def adam(groups):
            if not settings["capture"]:
                return torch.optim.Adam(groups, betas=betas, fused=True)
            for group in groups:  # what a graph reads must stay in its place: the rate becomes a tensor
                group["lr"] = torch.tensor(group["rate"], device=self.device)
            return torch.optim.Adam(groups, betas=betas, fused=True, capturable=True)

        self.autoencoder_optimizer, self.discriminator_optimizer = adam(groups[:2]), adam(groups[2:])
        size = recent_size(settings, self.model)
        self.recent = self.model.sample_codes(*size) if size else None

    @property
    def penalty_scale(self) -> int:
        """What this step multiplies the penalties by: K in each K-th step of --penalty-every K, else 0."""
        every = self.settings["penalty_every"]
        return every if self.step % every == 0 else 0

    def state_dict(self) -> dict:
        """Tensors and plain Python only, which `torch.load(weights_only=True)` reads without running code."""
        return {
            "project": PROJECT, "format": FORMAT, "settings": self.settings, "step": self.step,
            "seconds": self.seconds, "model": self.model.state_dict(), "averaged": self.averaged.state_dict(),
            "autoencoder_optimizer": self.autoencoder_optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "recent": self.recent, "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict) -> None:
        """`load_state_dict` in place: no tensor moves, and what an optimizer did not have yet becomes zero."""
        self.model.load_state_dict(state["model"])
        if self.recent is not None:
            self.recent.copy_(state["recent"])
        for name in ("autoencoder_optimizer", "discriminator_optimizer"):
            optimizer, saved = getattr(self, name), state[name]["state"]
            for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                for key, tensor in optimizer.state[parameter].items():
                    tensor.copy_(saved[i][key]) if i in saved else tensor.zero_()
        torch.set_rng_state(state["random_state"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"].cpu(), self.device)

    def load_state_dict(self, state: dict) -> None:
        """Take up where `state` was saved; together with `batch_indices` this is all a bit-exact resume needs."""
        self.step, self.seconds = self.taken_up = state["step"], state["seconds"]
        self.captured = {}  # a graph would go on with the optimizers' old state
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        if self.recent is not None:
            self.recent.copy_(state["recent"])
        for name in ("autoencoder_optimizer", "discriminator_optimizer"):
            optimizer, saved = getattr(self, name), state[name]["state"]
            parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            for i, moments in saved.items():
                like = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
                check_tensors(moments, like, f"{name} {i}: ")
            # The moments alone: rates, betas and the form for a GPU or a CPU are this run's.
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(state["random_state"].cpu())
        if self.device.type == "cuda" and state["cuda_random_state"] is not None:
            torch.cuda.set_rng_state(state["cuda_random_state"].cpu())


def update(run: Run, x: torch.Tensor, labelled: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict:
    """Section 2's "Training Process" on images x (batch, *shape): the discriminators learn, then the autoencoder.

    labelled: (images, labels) for the cross-entropy of semi-supervised learning (Section 2.1.2), or None.
    Returns the losses as tensors on the device (reading them is what would wait for it).
    """
    model = run.model
    precision = torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings["precision"] == "bf16")
    with precision:
        # IAE: z_hat ~ q(z|x), x_hat ~ p(x|z_hat). FIAE: z ~ p(z), x_hat ~ p(x|z), z_hat ~ q(z|x_hat).
        # With --sample-weight the IAE makes samples too, g(z, n) of z ~ p(z), in the batch of x_hat.
        codes_and_images = model(x)  # one pass serves both players

    # 1. The discriminators descend the negative of Eq. 1, or --objective's: (x, z_hat) is real, (x_hat, z_hat) fake;
    #    z ~ p(z) is real, z_hat fake. In the FIAE (x_hat, z) is real, (x_hat, z_hat) fake; x is real, x_hat fake. With
    #    --sample-weight the IAE has a third: x is real, samples are fake. `real` keeps the real sides' logits: to the
    #    other player they are constants, and so need no second pass.
    with precision:
        losses, real = model.discriminator_losses(x, *codes_and_images, penalty_scale=run.penalty_scale)
    if losses:
        run.discriminator_optimizer.zero_grad()
        sum(losses.values()).backward()
        run.discriminator_optimizer.step()
    if run.recent is not None:  # D(z) is cheap and must see every hole that q(z) leaves in p(z): it gets further steps
        for z_hat in run.recent:  # (batch, global), codes of an earlier batch, at first of p(z)
            with precision:
                loss = model.regularization_discriminator_loss(z_hat, run.penalty_scale)
            run.discriminator_optimizer.zero_grad()
            loss.backward()
            run.discriminator_optimizer.step()
        run.recent.copy_(torch.cat([run.recent[1:], codes_and_images[0].detach()[None]]))

    # 2. Encoder and decoder descend T = -log D of the negative pair (Eq. 9-10), or --objective's cost of it, and the
    #    encoder that of KL(q(z) || p(z)), the decoder that of samples. In the FIAE generator and recognition network
    #    descend the negative pair's, and the generator that of KL(p(x) || p_data). The discriminators only judge here:
    #    `inputs` spares their weights' gradients.
    with precision:
        generative = model.autoencoder_losses(x, *codes_and_images, real=real)
        if labelled is not None:
            generative["classification"] = model.classification_loss(*labelled)
    run.autoencoder_optimizer.zero_grad()
    sum(generative.values()).backward(inputs=run.autoencoder)
    run.autoencoder_optimizer.step()
    return {name: loss.detach() for name, loss in (losses | generative).items()}


def train_step(run: Run, x: torch.Tensor, labelled: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict:
    """One `update` between what changes with the steps: the learning rates before it, the averaged weights after it."""
    settings = run.settings
    left = 1 - run.step / settings["steps"]  # of training, 1 to 0
    falling = min(1.0, left / settings["decay"]) if settings["decay"] else 1.0
    for group in (*run.discriminator_optimizer.param_groups, *run.autoencoder_optimizer.param_groups):
        if isinstance(group["lr"], torch.Tensor):  # on CUDA, where a captured update reads it from its place
            group["lr"].fill_(falling * group["rate"])
        else:
            group["lr"] = falling * group["rate"]
    if isinstance(run.model, FIAE):
        run.model.progress.fill_(1 - left)
    if settings["capture"] and run.penalty_scale not in run.captured:
        run.captured[run.penalty_scale] = Captured(run, x, labelled)
    losses = run.captured[run.penalty_scale](x, labelled) if settings["capture"] else update(run, x, labelled)
    run.step += 1
    decay = min(settings["averaging"], run.step / (run.step + 10))  # short at first: forgets the first weights
    get_ema_multi_avg_fn(decay)(list(run.averaged.parameters()), run.autoencoder, run.step)
    return losses


class Captured:
    """`update` recorded once as a CUDA graph and replayed: one launch a step in place of some thousand.

    The noise is drawn inside the graph, from the device's own generator. x and labelled are examples of the shapes.
    Steps with and without penalties need a graph each: the one recorded is that of run.step.
    """

    def __init__(self, run: Run, x: torch.Tensor, labelled: tuple[torch.Tensor, torch.Tensor] | None):
        self.inputs = [tensor.clone() for tensor in (x, *(labelled or ()))]
        arguments = (self.inputs[0], tuple(self.inputs[1:]) or None)
        before = copy.deepcopy(run.state_dict())
        side = torch.cuda.Stream(run.device)
        side.wait_stream(torch.cuda.current_stream(run.device))
        with torch.cuda.stream(side):  # libraries choose their algorithms in a warm-up, which must not be recorded
            for _ in range(3):
                update(run, *arguments)
        torch.cuda.current_stream(run.device).wait_stream(side)
        run.discriminator_optimizer.zero_grad()
        run.autoencoder_optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = update(run, *arguments)
        run.restore(before)

    def __call__(self, x: torch.Tensor, labelled: tuple[torch.Tensor, torch.Tensor] | None) -> dict:
        for place, tensor in zip(self.inputs, (x, *(labelled or ()))):
            place.copy_(tensor)
        self.graph.replay()
        return self.losses


def refresh_average(run: Run, x: torch.Tensor) -> IAE | FIAE:
    """The averaged model, ready for use: its BatchNorm statistics are measured anew, on uint8 images x of the data, in
    the FIAE and InfoGAN on as many dreams; in cases 1 and 3 the prior is fitted to the codes of x."""
    with fixed_noise(run.device):
        parts = x[:4000].tensor_split(math.ceil(len(x[:4000]) / 500))  # of equal sizes: each weighs the same
        update_bn((to_range(part, run.averaged.shape) for part in parts), run.averaged)
        run.averaged.eval()
        if run.settings["model"] == "iae" and run.averaged.fitted_prior and run.averaged.global_size:
            with torch.no_grad():
                codes = [run.averaged.encode(to_range(part, run.averaged.shape)) for part in x[:10000].split(500)]
            run.averaged.fit_gaussian(torch.cat(codes))
    return run.averaged


# ---------------------------------------------------------------------------------------------------------- the loop


class Stop:
    """Within `with Stop() as stop`, Ctrl-C and SIGTERM only set stop.asked, so that what is saved is a whole step."""

    asked = False

    def __enter__(self):
        self.before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, kind, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def __exit__(self, *error):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


def train(run: Run, data: dict, folder: str, stop: Stop) -> bool:
    """Train up to settings["steps"] and keep the folder current. False where `stop` ended it before."""
    settings, x_train, held = run.settings, data["train"].x, data["validation" if len(data["validation"].x) else "test"]
    terminal, columns = sys.stderr.isatty(), shutil.get_terminal_size().columns - 1
    clock = saved = printed = time.monotonic()
    pause = SAVE_SECONDS
    chosen, labelled = torch.tensor(settings["labelled_rows"], device=run.device), None
    last = False
    while run.step < settings["steps"] and not last:  # not `stop.asked`: what it ends at must have been saved
        rows = batch_indices(len(x_train), settings["batch_size"], run.step, settings["seed"]).to(run.device)
        if len(chosen):  # the only place in training that reads labels
            few = batch_indices(len(chosen), min(len(chosen), settings["batch_size"]), run.step, settings["seed"])
            few = chosen[few.to(run.device)]
            labelled = to_range(x_train[few], run.model.shape), data["train"].y[few].long()
        x = to_range(x_train[rows], run.model.shape)
        losses = train_step(run, shift(x, settings["shift"]) if settings["shift"] else x, labelled)

        last = run.step == settings["steps"] or stop.asked
        if run.step % 20 and not last:
            continue
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        run.seconds += time.monotonic() - clock
        line = log_losses(run, losses, folder)
        if terminal or last or time.monotonic() - printed > 15 or run.step == 20:
            over = terminal and not last  # the next line is written over this one, which must fill one row
            print(line[:columns].ljust(columns) if over else line.ljust(columns * terminal),
                  end="\r" if over else "\n", file=sys.stderr, flush=True)
            printed = time.monotonic()
        drawing = last or run.step in (100, 200, 400) or run.step % 1000 == 0
        saving = last or time.monotonic() - saved > pause
        if drawing or saving:
            began, model = time.monotonic(), refresh_average(run, x_train)
            if saving:  # before the pictures, which whoever stops a run may not wait for
                save_checkpoint(run, folder)
                saved = time.monotonic()
                # Saving is to take a tenth of the time, but what a kill costs stays bounded.
                pause = max(SAVE_SECONDS, min(10 * (saved - began), 5 * SAVE_SECONDS))
            if drawing:
                warn_of_collapse(run, model, held.x)
                draw_figures(model, held.x, held.y, folder)
                draw_curves(folder)
        clock = time.monotonic()  # pictures and checkpoints do not count as training time
    if run.step == run.taken_up[0]:  # who saved this end may have been killed before drawing it
        draw_figures(run.averaged, held.x, held.y, folder)
        draw_curves(folder)
    return run.step >= settings["steps"] and not stop.asked


def save_checkpoint(run: Run, folder: str) -> None:
    """checkpoint.pt, whole at every moment; never with weights that are not finite (InputError)."""
    for name, parameter in run.model.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"step {run.step}: the weights of {name} are not finite; the last checkpoint is "
                             "untouched; try lower --rates or a --penalty")
    write(os.path.join(folder, "checkpoint.pt"), lambda part: torch.save(run.state_dict(), part))


def log_losses(run: Run, losses: dict, folder: str) -> str:
    """Append one line to metrics.jsonl and return the progress text; InputError at a loss that is not finite."""
    numbers = {name: loss.item() for name, loss in losses.items()}
    for name, number in numbers.items():
        if not np.isfinite(number):
            raise InputError(f"step {run.step}: the loss {name} is {number}; the last checkpoint is untouched; "
                             "try lower --rates or a --penalty")
    try:
        with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": run.step, "seconds": round(run.seconds, 2), **numbers}) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}); mend that, then go on with --resume") from None
    warn_of_dead_discriminator(run, numbers)
    steps, (step, seconds) = run.settings["steps"], run.taken_up
    speed = (run.step - step) / max(run.seconds - seconds, 1e-9)
    left = int((steps - run.step) / speed)
    eta = f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"
    short = "  ".join(f"{name.replace('_discriminator', ' D')} {number:.3f}" for name, number in numbers.items())
    return f"step {run.step}/{steps}  {speed:.1f}/s  ETA {eta}  {short}"


def warn(run: Run, kind: str, text: str) -> None:
    """One line in the log, once a run and kind."""
    if kind not in run.warned:
        run.warned.add(kind)
        end_of_progress = "\n" if sys.stderr.isatty() else ""
        print(f"{end_of_progress}warning: step {run.step}: {text}", file=sys.stderr, flush=True)


def discriminator_of_images(model: IAE | FIAE) -> str:
    """The name of the discriminator that `warn_of_dead_discriminator` judges."""
    return "regularization_discriminator" if isinstance(model, FIAE) else "reconstruction_discriminator"


def warn_of_dead_discriminator(run: Run, numbers: dict) -> None:
    """Notices a discriminator of images whose loss never fell below what constant logits give.

    The discriminators of codes are not judged: there that value is also what a q(z) equal to p(z) gives.
    """
    name = discriminator_of_images(run.model)
    if name not in numbers or len(run.judged) == JUDGED_STEPS // 20:
        return
    run.judged.append(numbers[name])
    objective = run.model.regularization_objective if isinstance(run.model, FIAE) else run.settings["objective"]
    blind = {"gan": 2 * math.log(2), "paired": math.log(2), "kl": 0.0}[objective]
    if len(run.judged) == JUDGED_STEPS // 20 and min(run.judged) > blind - 0.005:
        warn(run, name, f"the {name} learns nothing: its loss has never been below {blind:.3f}, what constant logits "
                        "give; try another of its --rates, --no-batch-norm, or another --seed")


@torch.no_grad()
def warn_of_collapse(run: Run, model: IAE | FIAE, x: torch.Tensor) -> None:
    """Notices, on uint8 images x, a cluster that holds nearly all of them, or a code that the images do not follow."""
    if not model.global_size or run.step < JUDGED_STEPS:
        return
    with fixed_noise(x.device):
        x = to_range(x[:500], model.shape)
        z = model.encode(x)[torch.randperm(len(x)).to(x.device)]
        share = torch.bincount(z.argmax(1)).max().item() / len(z)
        if model.prior == "categorical" and model.global_size > 1 and share > 0.9:
            warn(run, "cluster", f"one of {model.global_size} clusters holds {share:.0%} of the images; try a higher "
                                 "--regularization-weight, a lower first of --rates, or another --seed")
            return
        n = torch.randn(len(x), model.local_size, device=x.device)
        moved = (model.decode(z, n) - model.decode(z.roll(1, 0), n)).square().mean()
    # Independent images would differ by twice their variance.
    if moved < 0.01 * 2 * x.var(0).mean():
        warn(run, "code", "the code is ignored: with another image's z and the same n nearly the same comes out; try a "
                          "smaller --local, a lower --regularization-weight, or another --seed")


def finish(run: Run, data: dict, folder: str, data_dir: str) -> dict:
    """final.json: every metric of the averaged model on the test set, or with --validation on the held-out images."""
    split = "validation" if len(data["validation"].x) else "test"
    train_set, test_set = data["train"], data[split]
    classifier = None
    if test_set.y is not None:
        classifier = fixed_classifier(train_set.x, train_set.y, data_dir)
    print(f"measuring on the {split} images ...", file=sys.stderr)
    numbers = evaluate(run.averaged, train_set, test_set, classifier)
    if run.settings["prior"] == "categorical":
        numbers |= evaluate_clusters(run.averaged, train_set, test_set, classifier, bool(run.settings["labels"]))
        if run.settings["noise"]:
            draw_votes(run.averaged, test_set.x, folder)
    elif run.settings["global"]:
        draw_codes(run.averaged, test_set.x, folder)
    if run.settings["local"] and run.settings["shape"][0] == 3:
        draw_map(run.averaged, test_set.x, folder)
    if classifier is not None:
        draw_neighbours(run.averaged, train_set.x, classifier, folder)
    final = {"settings": run.settings, "evaluated_on": split, "steps": run.step, "seconds": round(run.seconds, 1),
             "host": run.host, "metrics": numbers}
    write_json(os.path.join(folder, "final.json"), final)
    return final


# ---------------------------------------------------------------------------------------------------- a run's folder


def write(path: str, save) -> None:
    """`save(temporary path)`, then move it into place: a kill at any moment leaves the previous file whole."""
    try:
        save(path + ".part")
        with open(path + ".part", "rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
        os.replace(path + ".part", path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        raise InputError(f"cannot write {path} ({brief(error)}); make its folder, free space there, or use "
                         "another") from None


def write_json(path: str, content: dict) -> None:
    """`content` as an indented JSON file, whole or not at all."""
    write(path, lambda part: Path(part).write_text(json.dumps(content, indent=1) + "\n"))


def write_figure(figure, path: str, **options) -> None:
    """`figure` as a PNG, whole or not at all; it is closed. options: of `savefig`."""
    write(path, lambda part: figure.savefig(part, format="png", **options))
    plt.close(figure)


def checkpoint_file(path: str) -> str:
    """The checkpoint that `path`, a run's folder or the file itself, stands for. InputError where it is not there."""
    if os.path.isdir(path):
        path = os.path.join(path, "checkpoint.pt")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint; name a run's folder or its checkpoint.pt")
    return path


def read_checkpoint(path: str) -> dict:
    """The state that `Run.state_dict` wrote, from a checkpoint or a run's folder; no code of the file is run.

    Raises InputError where the file is missing, damaged, of another project or of another format, or where settings
    and tensors are not those of one model: a stranger may have written it.
    """
    path = checkpoint_file(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch would unpack a compressed member whole, whatever its size
            members = archive.infolist()
        if any(member.compress_type for member in members) or sum(m.file_size for m in members) > os.path.getsize(path):
            raise ValueError("compressed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any of torch's, pickle's and zipfile's ways
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); use another copy") from None
    if not isinstance(state, dict) or state.get("project") != PROJECT:
        raise InputError(f"{path}: not a checkpoint of this project; name one that train.py wrote")
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: not of checkpoint format {FORMAT}; use the version of the code that wrote it")
    try:
        state["settings"] = settings = checked_settings(state["settings"])
        if type(state["step"]) is not int or type(state["seconds"]) is not float or not 0 <= state["step"] < 2**31:
            raise ValueError("step and seconds are no numbers")
        with torch.device("meta"):  # a layout without memory: sizes may be absurd
            model = build_model(settings)
            size = recent_size(settings, model)
            recent = {"recent": torch.empty(*size, settings["global"])} if size else {}
        weights = model.state_dict()
        check_tensors(state["model"], weights)
        check_tensors(state["averaged"], {name: like for name, like in weights.items() if "discriminator" not in name})
        check_tensors({"recent": state["recent"]} if state["recent"] is not None else {}, recent)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: the checkpoint's settings and tensors do not fit each other ({brief(error)}); "
                         "use another copy") from None
    return state


def checked_settings(settings: dict) -> dict:
    """A checkpoint's settings: each of the kind and in the range of `settings_of`, as a stranger may have written them.

    What an older version did not know yet takes its default. Raises KeyError, TypeError or ValueError.
    """
    defaults = vars(parse([])[0])
    kinds = {**defaults, **RECIPES["stable"], "steps": 1, "conditioning": "", "rates": [1.0], "shape": [1],
             "regularization": True, "labelled_rows": [1], "label_seed": 1, "data": {}, "out": "", "image_size": 1,
             "init": ""}
    for name in NO_SETTINGS:
        del kinds[name]
    since = {**defaults, "data": {}, "image_noise": 0.0, "code_penalty": 0.0, "paired_regularization": False,
             "information_weight": 0.0, "elastic": 0.0, "decorrelation_weight": 0.0, "sample_weight": 0.0,
             "sample_rate": 1e-3, "penalty_every": 1}
    found = {}
    for name, kind in kinds.items():
        value = found[name] = settings.get(name, since.get(name))
        if value is None and name in ("out", "image_size", "init"):
            continue
        if type(value) is not type(kind) and not (type(value) is int and type(kind) is float):
            raise ValueError(f"setting {name} is of type {type(value).__name__}")
        if isinstance(kind, list) and not all(type(item) is type(kind[0]) for item in value):
            raise ValueError(f"setting {name} holds other things than numbers")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"setting {name} is {value!r}")
    if len(found["shape"]) != 3 or len(found["rates"]) != 4:
        raise ValueError("settings shape and rates need 3 and 4 numbers")
    for facts in found["data"].values():
        if {name: type(fact) for name, fact in facts.items()} != {"images": int, "fingerprint": str}:
            raise ValueError("setting data is not made of counts and fingerprints")

    def refuse(message):
        raise ValueError(message)

    check(refuse, argparse.Namespace(**{**defaults, **found, "no_regularization": not found["regularization"]}))
    return found


def check_tensors(found: dict, wanted: dict, where: str = "") -> None:
    """ValueError where tensors have not the names, shapes and types of `wanted`, each in memory of its own size."""
    for name in [*wanted, *found]:
        tensor, like = found.get(name), wanted.get(name)
        if tensor is None or like is None:
            raise ValueError(f"{where}{name} is {'missing' if tensor is None else 'not of the model'}")
        dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu" and (
            tensor.is_contiguous() or tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        if not dense or tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(f"{where}{name} is not a dense {like.dtype} tensor of shape {tuple(like.shape)}")


def load_checkpoint(path: str, device: str = "cpu") -> IAE | FIAE:
    """A trained model, ready to use: `encode(x)`, `decode(z, n)`, `reconstruct(x)`, `sample(count)`.

    path: a run's folder or its checkpoint.pt. The weights are the averaged ones, in evaluation mode; images are in the
    network's range (`iae.to_range`). Raises InputError where the file does not hold such a model.
    """
    state = read_checkpoint(path)
    model = build_model(state["settings"])
    drop_discriminators(model)
    model.load_state_dict(state["averaged"])
    return model.to(device).eval().requires_grad_(False)


def new_folder(run: Run) -> str:
    """The run's folder: --out, or runs/NAME-NUMBER with the next free number. It can be resumed from now on."""
    settings = run.settings
    path = settings["out"]
    if not path:
        name = os.path.splitext(os.path.basename(os.path.abspath(settings["dataset"])))[0]
        stem = os.path.join("runs", f"{name}-{settings['global']}-{settings['local']}")
        path = next(f"{stem}-{i}" for i in range(10**6) if not os.path.exists(f"{stem}-{i}"))
    inside, pictures = os.path.realpath(path), os.path.realpath(settings["dataset"])
    own = settings["dataset"] not in ("mnist", "svhn", "celeba") and os.path.isdir(pictures)
    if own and os.path.join(inside, "").startswith(os.path.join(pictures, "")):
        raise InputError(f"{path} lies among the pictures of {settings['dataset']}, where figures would become some "
                         "more; choose an --out outside")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose another folder with --out") from None
    run.lock = lock(path)
    if os.path.exists(os.path.join(path, "checkpoint.pt")):
        raise InputError(f"{path} holds a run already; choose another --out, or go on with --resume {path}")
    if os.path.exists(os.path.join(path, "config.json")):
        raise InputError(f"{path} holds a run that has lost its checkpoint.pt; choose another --out, or remove it")
    run.host = host_facts(run.device)
    write(os.path.join(path, "checkpoint.pt"), lambda part: torch.save(run.state_dict(), part))
    write_json(os.path.join(path, "config.json"), {**settings, "host": run.host})
    return path


def lock(folder: str):
    """An open file that keeps other runs out of `folder` until it is closed, or the process ends, killed or not.

    Raises InputError where another process holds it, or the folder cannot be written to.
    """
    try:
        file = open(os.path.join(folder, "lock"), "w")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; mend that, or use another folder") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is training into this folder; wait for it or stop it") from None
    except OSError:
        pass  # a disk without locks: two runs are not noticed there
    return file


@functools.cache  # a sweep's later seeds are of the code that its process began with
def commit_of_this_code() -> str:
    """The commit that this file lies in, with "-dirty" where the files differ from it; "unknown" without git."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def host_facts(device: torch.device) -> dict:
    """What a number depends on besides its settings: versions, commit, device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "commit": commit_of_this_code(), "hardware": name, "threads": torch.get_num_threads()}


# ---------------------------------------------------------------------------------------------------------- pictures


def sheet(images: torch.Tensor, columns: int, path: str) -> None:
    """Images (count, *shape) in the network's range, row by row, as one PNG of `columns` columns; each pixel is
    two wide, or more where the images are small."""
    pixels = to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy()  # (count, height, width, channels)
    rows, (height, width) = -(-len(pixels) // columns), pixels.shape[1:3]
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + 2) + 2, (i % columns) * (width + 2) + 2
        canvas[top:top + height, left:left + width] = image
    scale = max(2, 64 // height)
    picture = Image.fromarray(canvas).resize((canvas.shape[1] * scale, canvas.shape[0] * scale), Image.NEAREST)
    write(path, lambda part: picture.save(part, format="PNG"))


@torch.no_grad()
def draw_figures(model: IAE, x: torch.Tensor, y: torch.Tensor | None, folder: str) -> None:
    """reconstructions.png and samples.png of uint8 test images x, with the same noise each time.

    reconstructions.png is in the manner of Figure 2: originals in the first row, below them x_hat for five draws of n
    (one where there is no n), the same n along a row; with labels y two images of each class.
    """
    with fixed_noise(x.device):
        if y is not None and y.dim() == 1:
            kinds = y.unique()[:10]
            chosen = torch.cat([(y == kind).nonzero()[:2, 0] for kind in kinds])
        else:
            chosen = torch.arange(min(20, len(x)))
        originals = to_range(x[chosen], model.shape)
        if model.global_size:
            z, n = model.encode(originals), torch.randn(5 if model.local_size else 1, model.local_size, device=x.device)
            rows = [model.decode(z, row.expand(len(z), -1)) for row in n]
            sheet(torch.cat([originals, *rows]), len(chosen), os.path.join(folder, "reconstructions.png"))
        sheet(model.sample(200), 20, os.path.join(folder, "samples.png"))
        if model.prior == "categorical":  # Figure 6: a column a cluster, a row one n
            z = torch.eye(model.global_size, device=x.device)
            n = torch.randn(10, model.local_size, device=x.device)
            rows = [model.decode(z, row.expand(len(z), -1)) for row in n]
            sheet(torch.cat(rows), len(z), os.path.join(folder, "clusters.png"))


@torch.no_grad()
def draw_codes(model: IAE | FIAE, x: torch.Tensor, folder: str) -> None:
    """Of uint8 test images x: interpolation.png, eight pairs, between each pair's originals its codes in even steps
    with one n; and with local noise swap.png, the global code of the row's image with the local code of the column."""
    with fixed_noise(x.device):
        some = to_range(x[:16], model.shape)
        half = len(some) // 2
        z, n = model.encode(some), torch.randn(11, model.local_size, device=x.device)
        steps = torch.linspace(0, 1, 10, device=x.device)[:, None, None]
        between = (1 - steps) * z[:half] + steps * z[half:2 * half]  # (10, half, global)
        between = between.transpose(0, 1).flatten(0, 1)  # (half * 10, global)
        images = model.decode(between, n[:1].expand(len(between), -1))
        rows = torch.cat([some[:half, None], images.unflatten(0, (half, 10)), some[half:2 * half, None]], 1)
        sheet(rows.flatten(0, 1), 12, os.path.join(folder, "interpolation.png"))
        if model.local_size:
            columns = [some[:10], *(model.decode(z[:10], row.expand(len(z[:10]), -1)) for row in n[:10])]
            sheet(torch.stack(columns, 1).flatten(0, 1), 11, os.path.join(folder, "swap.png"))


@torch.no_grad()
def draw_map(model: IAE | FIAE, x: torch.Tensor, folder: str) -> None:
    """variance.png: where in the picture n varies x_hat, the heat map of `metrics.variance_map` on uint8 images x, and
    the thirds of its width."""
    ratio = variance_map(draw_local(model, x[:1000]), to_range(x[:1000], model.shape)).cpu().numpy()
    figure, axis = plt.subplots(figsize=(3.6, 3))
    picture, third = axis.imshow(ratio, cmap="viridis", vmin=0), ratio.shape[1] // 3
    figure.colorbar(picture, ax=axis, label="variance over n / variance of the data")
    for edge in (third, ratio.shape[1] - third):
        axis.axvline(edge - 0.5, color="white", linewidth=0.8)
    axis.axis("off")
    figure.tight_layout()
    write_figure(figure, os.path.join(folder, "variance.png"), dpi=100)


@torch.no_grad()
def draw_neighbours(model: IAE | FIAE, x: torch.Tensor, classifier, folder: str) -> None:
    """neighbours.png: 20 samples over the three training images (of the first 20,000 of uint8 x) nearest to each by the
    classifier's features."""
    with fixed_noise(x.device):
        samples = model.sample(20)
        features = torch.cat([classifier.features(to_range(part, model.shape)) for part in x[:20000].split(1000)])
        nearest = torch.cdist(classifier.features(samples), features).topk(min(3, len(x)), largest=False).indices
        rows = [samples, *(to_range(x[column], model.shape) for column in nearest.T)]
        sheet(torch.cat(rows), 20, os.path.join(folder, "neighbours.png"))


@torch.no_grad()
def draw_votes(model: FIAE | IAE, x: torch.Tensor, folder: str) -> None:
    """votes.png: of uint8 test images x ten of those that draws of eps agree most on, and the ten that they agree least
    on, over their votes."""
    votes = assignments(model, x, draws=50)[0].cpu()  # (count, K)
    order = votes.max(1).values.sort(stable=True).indices
    figure, axes = plt.subplots(4, 10, figsize=(12, 5), gridspec_kw={"height_ratios": [1.4, 1, 1.4, 1]})
    for top, rows, title in ((0, order[-10:], "most certain"), (2, order[:10], "least certain")):
        for column, row in enumerate(rows.tolist()):
            axes[top, column].imshow(x[row].permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=255)
            axes[top, column].axis("off")
            axes[top + 1, column].bar(range(votes.shape[1]), votes[row].tolist())
            ticks = range(0, votes.shape[1], math.ceil(votes.shape[1] / 10))
            axes[top + 1, column].set(ylim=(0, 1), xticks=ticks, yticks=(0, 1) if column == 0 else ())
            axes[top + 1, column].tick_params(labelsize=6)
            axes[top + 1, column].set_xlabel("code", fontsize=6)
        axes[top, 0].set_title(title, fontsize=9, loc="left")
        axes[top + 1, 0].set_ylabel("share of draws", fontsize=7)
    figure.tight_layout()
    write_figure(figure, os.path.join(folder, "votes.png"), dpi=80)


def draw_curves(folder: str) -> None:
    """curves.png: every logged loss over steps, from metrics.jsonl (at most about 1,000 points a curve)."""
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            lines = [json.loads(line) for line in file]
    except OSError as error:
        raise InputError(f"cannot read {folder} ({error.strerror}); its log is gone, start anew") from None
    lines = lines[:: max(1, len(lines) // 1000)]
    names = [name for name in lines[0] if name not in ("step", "seconds")] if lines else []
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(3.2 * max(1, len(names)), 2.6), squeeze=False)
    for name, axis in zip(names, axes[0]):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=0.8)
        axis.set_title(name.replace("_", " "), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    write_figure(figure, os.path.join(folder, "curves.png"), dpi=100)


# ---------------------------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, set]:
    """The command line, and the names that were given on it."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] + " Defaults are in parentheses.",
        epilog="Section 2's cases: 1 '--local 0 --no-regularization', 2 '--local 0', 3 '--no-regularization', 4 "
               "neither; '--global 0' is a plain GAN, '--local 0 --euclidean' the adversarial autoencoder.")
    add = parser.add_argument_group("the model").add_argument
    add("--model", default="iae", choices=CHOICES["model"],
        help="iae: Section 2; fiae: the flipped one of Section 3; infogan: its baseline (%(default)s)")
    add("--global", type=int, default=10, metavar="SIZE", help="of the global code z; 0: a plain GAN (%(default)s)")
    add("--local", type=int, default=100, metavar="SIZE", help="of the local code n; 0: deterministic (%(default)s)")
    add("--noise", type=int, default=0, metavar="SIZE", help="of the encoder's noise eps; 0: none (%(default)s)")
    add("--prior", default="gaussian", choices=CHOICES["prior"],
        help="p(z); categorical: --global is the number of clusters (%(default)s)")
    add("--conditioning", choices=CHOICES["conditioning"],
        help="how D(x, z) sees z, D.1 (gaussian: dependent, categorical: invariant; fiae with --objective "
             "paired: distance, projection)")
    add("--no-regularization", action="store_true",
        help="drop KL(q(z) || p(z)), cases 1 and 3; a Gaussian code's samples come from a Gaussian fitted to q(z)")
    add("--euclidean", action="store_true", help="squared error in place of the reconstruction GAN; case 2: the AAE")
    add("--positive-gradient", action="store_true", help="footnote 1's variant: the positive pair moves the encoder")

    recipe_flags(parser.add_argument_group("the recipe: what the paper leaves open").add_argument)

    add = parser.add_argument_group("data and training").add_argument
    add("--dataset", default="mnist", metavar="NAME",
        help="mnist, svhn, celeba, or a path of your own: an .npz with x (uint8 images) and perhaps y (labels), or a "
             "folder of pictures (%(default)s)")
    add("--extra", action="store_true", help="svhn: train on its 531,131 extra images too")
    add("--image-size", type=int, metavar="SIZE", help="of a folder's pictures: cut square and scaled to it")
    add("--data-dir", default="data", metavar="FOLDER", help="where the data lies or is downloaded to (%(default)s)")
    add("--epochs", type=float, default=20, help="passes over the training images (%(default)s)")
    add("--steps", type=int, help="training steps, in place of --epochs")
    add("--batch-size", type=int, default=128, metavar="SIZE", help="images a step (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, noise and data order (%(default)s)")
    add("--seeds", type=int, nargs="+", metavar="SEED",
        help="a run for each under --out, then their mean and deviation; the same command goes on where it was cut off")
    add("--labels", type=int, default=0, metavar="N",
        help="semi-supervised (categorical prior): N class-balanced training labels (%(default)s)")
    add("--label-seed", type=int, metavar="SEED", help="of the draw of these labels (that of the run)")
    add("--validation", type=int, default=0, metavar="N",
        help="hold N training images out and measure on them, not on the test set: for choosing settings (%(default)s)")
    add("--shift", type=int, default=0, metavar="PIXELS",
        help="move each batch of training images at random by up to so much each way (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--precision", default="auto", choices=CHOICES["precision"], help="auto: bf16 where it is fast (%(default)s)")
    add("--capture", action=argparse.BooleanOptionalAction, default=True,
        help="on CUDA, replay the update as one CUDA graph; --no-capture: step by step (%(default)s)")
    add("--out", help="the run's folder (runs/DATASET-GLOBAL-LOCAL-NUMBER)")
    add("--resume", metavar="RUN",
        help="go on with a run's folder or checkpoint; --epochs, --steps, --device, --capture, --data-dir and where "
             "--dataset lies may change; a run that is done is measured anew")
    add("--init", metavar="RUN", help="begin with the weights of another run of the same sizes, step 0 of a new one")
    add("--benchmark", action="store_true", help="a table: a step of ours, of the field's way, of plain float32")

    add = parser.add_argument_group("using a trained model").add_argument
    add("--from", metavar="RUN", help="a run's folder or checkpoint, with one of the following")
    add("--sample", type=int, metavar="COUNT", help="write a sheet of samples to --out (samples.png)")
    add("--reconstruct", nargs="+", metavar="PICTURE",
        help="write your own pictures (like the training data: digits white on black) over five reconstructions each "
             "to --out (reconstructed.png)")
    args = parser.parse_args(argv)
    unset = object()
    again = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(again).items() if value is not unset}
    check(parser.error, args)
    refuse_idle(parser.error, args, given)
    return args, given


def recipe_flags(add_argument: Callable) -> None:
    """The flags of what a recipe sets, with its values in their help; None where they are not given."""
    add_argument("--recipe", default="stable", choices=CHOICES["recipe"],
                 help="sets all of the following (%(default)s), each to the value told in brackets; with --local 0, "
                      "--prior categorical, --labels or --model, stable has others (DETERMINISTIC and on in train.py)")

    def add(flag: str, help: str, **options) -> None:
        name = flag[2:].replace("-", "_")
        paper, stable = RECIPES["paper"][name], RECIPES["stable"][name]
        values = stable if paper == stable else f"paper {paper}, stable {stable}"
        add_argument(flag, help=f"{help} ({values})", **options)

    add("--objective", choices=CHOICES["objective"], help="gan: Eq. 1; paired: relativistic; kl: the f-GAN's")
    add("--penalty", type=float, metavar="GAMMA", help="of R1 + R2 on the reconstruction discriminator")
    add("--regularization-penalty", type=float, metavar="GAMMA", help="of R1 + R2 on the regularization discriminator")
    add("--penalty-every", type=int, metavar="K", help="penalties in each K-th step, times K")
    add("--reconstruction-weight", type=float, metavar="WEIGHT", help="of the reconstruction GAN in what is descended")
    add("--regularization-weight", type=float, metavar="WEIGHT", help="of the regularization GAN in what is descended")
    add("--regularization-steps", type=int, metavar="K", help="of the IAE's D(z) for each step of the others")
    add("--code-penalty", type=float, metavar="GAMMA", help="of R1 on the code alone, in D(x, z)")
    add("--decorrelation-weight", type=float, metavar="WEIGHT",
        help="of the squared covariances between the dimensions of the IAE's Gaussian code")
    add("--sample-weight", type=float, metavar="WEIGHT",
        help="of a third GAN, whose D(x) sees samples from the IAE's prior and moves the decoder")
    add("--sample-rate", type=float, metavar="RATE", help="learning rate of that D(x)")
    add("--paired-regularization", action=argparse.BooleanOptionalAction, default=None, help="of FIAE's D(x)")
    add("--information-weight", type=float, metavar="WEIGHT", help="of FIAE's images telling their codes, in the end")
    add("--code-noise", type=float, metavar="DEVIATION", help="of noise on codes for the IAE's D(z), FIAE's D(x, z)")
    add("--image-noise", type=float, metavar="DEVIATION", help="the same for the FIAE's f and D(x, z), which see x_hat")
    add("--elastic", type=float, metavar="DEVIATION",
        help="likewise, of ripples, in half sides; in the IAE of clusters, of deformed images")
    add("--agreement-weight", type=float, metavar="WEIGHT", help="of agreement on deformed images (categorical)")
    add("--local-scale", type=float, metavar="FACTOR", help="of the decoder's initial weights of n")
    add("--batch-norm", action=argparse.BooleanOptionalAction, default=None, help="in the discriminators of images")
    add("--rates", type=float, nargs=4, metavar=("F", "G", "DX", "DZ"),
        help="learning rates of encoder, decoder, reconstruction and regularization discriminator")
    add("--beta1", type=float, help="of Adam")
    add("--decay", type=float, metavar="SHARE", help="of training, at its end, over which the rates fall to zero")
    add("--averaging", type=float, metavar="DECAY", help="of the averaged weights, which are the ones used")


def check(error, args: argparse.Namespace) -> None:
    """Calls `error` (argparse's: usage and one line) with a message where a number is out of range."""
    sizes = vars(args)
    for name in ("global", "local", "noise", "validation", "seed", "labels", "label_seed", "shift"):
        if sizes[name] is not None and not 0 <= sizes[name] < 2**31:
            error(f"--{name.replace('_', '-')} {sizes[name]}: must be from 0 to {2**31 - 1}")
    if args.local == 0 and sizes["global"] == 0:
        error("--global 0 --local 0: the decoder has no input; give at least one of them a size")
    if sizes["global"] == 0 and (args.euclidean or args.positive_gradient or args.noise or args.prior == "categorical"):
        error("--global 0 has no code: drop --euclidean, --positive-gradient, --noise and --prior categorical")
    if sizes["global"] == 1 and args.prior == "categorical":
        error("--global 1 --prior categorical: one cluster says nothing; give 2 or more")
    if args.model != "iae" and (args.euclidean or args.no_regularization or args.labels or sizes["global"] == 0):
        error(f"--model {args.model}: --global 0, --euclidean, --no-regularization and --labels are the IAE's")
    if args.model == "infogan" and (args.noise or args.positive_gradient):
        error("--model infogan has no D(x, z) and no eps: drop --noise and --positive-gradient")
    if args.labels == 1:
        error("--labels 1: BatchNorm needs at least 2 images")
    if args.labels and args.prior != "categorical":
        error("--labels: the clusters are the classes; add --prior categorical")
    if args.seeds and (not all(0 <= seed < 2**31 for seed in args.seeds) or len(set(args.seeds)) < len(args.seeds)):
        error(f"--seeds: from 0 to {2**31 - 1}, each once")
    if args.seeds and (args.resume or not args.out):
        error("--seeds: name the folder of the sweep by --out; to go on, give the same command again")
    for name in ("batch_size", "steps", "epochs", "sample"):
        if sizes[name] is not None and not 0 < sizes[name] < 2**31:
            error(f"--{name.replace('_', '-')} {sizes[name]}: must be more than 0, and less than {2**31}")
    for name in ("regularization_steps", "penalty_every"):
        if sizes[name] is not None and sizes[name] < 1:
            error(f"--{name.replace('_', '-')} {sizes[name]}: must be 1 or more")
    if args.shift > 8:
        error(f"--shift {args.shift}: at most 8 pixels, or digits leave their pictures")
    for flag, rate in [*(("--rates", rate) for rate in args.rates or ()), ("--sample-rate", args.sample_rate)]:
        if rate is not None and not 0 < rate < 1:
            error(f"{flag} {rate}: a learning rate must be above 0 and below 1")
    for name in ("penalty", "regularization_penalty", "reconstruction_weight", "regularization_weight", "code_noise",
                 "code_penalty", "image_noise", "agreement_weight", "local_scale", "elastic", "information_weight",
                 "decorrelation_weight", "sample_weight"):
        if sizes[name] is not None and not 0 <= sizes[name] < float("inf"):
            error(f"--{name.replace('_', '-')} {sizes[name]}: must be 0 or more")
    for name in ("image_noise", "information_weight", "paired_regularization"):
        if args.model == "iae" and sizes[name]:
            error(f"--{name.replace('_', '-')} is of the flipped models; add --model fiae")
    if args.elastic and args.model == "iae" and args.prior != "categorical":
        error("--elastic: of the IAE's clusters and of the flipped models; add --prior categorical or --model fiae")
    if args.decorrelation_weight and (args.model != "iae" or args.prior != "gaussian" or sizes["global"] == 0):
        error("--decorrelation-weight: of the IAE's Gaussian code; drop it, or --model, --prior, --global 0")
    if args.sample_weight and (args.model != "iae" or args.no_regularization or sizes["global"] == 0):
        error("--sample-weight: of an IAE with a prior; drop it, or --model, --no-regularization, --global 0")
    if args.agreement_weight and args.prior != "categorical":
        error("--agreement-weight: of clusters; add --prior categorical")
    if args.beta1 is not None and not 0 <= args.beta1 < 1:
        error(f"--beta1 {args.beta1}: must be at least 0 and below 1")
    if args.averaging is not None and not 0 <= args.averaging < 1:
        error(f"--averaging {args.averaging}: must be at least 0 and below 1")
    if args.decay is not None and not 0 <= args.decay <= 1:
        error(f"--decay {args.decay}: must be from 0 to 1")
    if args.euclidean and args.positive_gradient:
        error("--euclidean has no reconstruction GAN: drop --positive-gradient")
    if args.validation == 1:
        error("--validation 1: a spread needs 2 images or more")
    if args.batch_size < 2:
        error("--batch-size 1: BatchNorm needs at least 2 images")
    if (args.sample or args.reconstruct) and not sizes["from"]:
        error("--sample and --reconstruct need a trained model: name it by --from RUN")
    if sizes["from"] and bool(args.sample) == bool(args.reconstruct):
        error("--from RUN: say what to make with it, --sample COUNT or --reconstruct PICTURE")
    if sizes["from"] and args.out and not args.out.endswith(".png"):
        error(f"--out {args.out}: the sheet is a PNG; give a name that ends in .png")
    if sizes["from"] and args.out in (args.reconstruct or ()):
        error(f"--out {args.out} would replace your picture; name another file")
    if args.benchmark and (args.resume or args.seeds or args.init or args.labels):
        error("--benchmark trains a new model for some steps: drop --resume, --seeds, --init and --labels")
    for name in ("resume", "init", "from"):
        if sizes[name] == "":
            error(f"--{name}: its value is empty; name a run's folder")


def refuse_idle(error, args: argparse.Namespace, given: set) -> None:
    """Calls `error` where the command line gives a flag that, beside the others, would change nothing."""
    from_alone = given - {"from", "sample", "reconstruct", "out", "device", "seed"}
    for there, idle, why in (
            (vars(args)["from"], from_alone, "--from uses a trained model as it is"),
            (args.seeds, {"seed"}, "--seeds has the seeds already"),
            (args.euclidean or args.model == "infogan", {"conditioning", "code_penalty"},
             "--euclidean and --model infogan have no D(x, z)"),
            (args.euclidean and not args.sample_weight, {"penalty"}, "--euclidean has no D(x, z)"),
            (args.no_regularization, {"regularization_weight", "regularization_penalty"},
             "--no-regularization has no D(z)"),
            (not args.sample_weight and not args.resume, {"sample_rate"}, "without --sample-weight there is no D(x)"),
            (not args.labels and not args.resume, {"label_seed"}, "without --labels none are drawn")):
        if there and given & idle:
            error(f"{why}: drop --{min(given & idle).replace('_', '-')}")


def pick_device(name: str) -> torch.device:
    """The device of --device; InputError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name}: not there; use auto, cpu or, with a GPU and a CUDA build, cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: use auto, cpu or cuda")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # a graph is recorded, and random state read, on the current one
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """bf16 where it is fast: on CUDA, and on CPUs that multiply it (AMX, AVX512-BF16); others emulate it slowly."""
    if name != "auto":
        return name
    multiplies = (getattr(torch.cpu, f"_is_{kind}_supported", lambda: False) for kind in ("amx_tile", "avx512_bf16"))
    return "bf16" if device.type == "cuda" or any(found() for found in multiplies) else "float32"


def labelled_rows(y: torch.Tensor | None, count: int, clusters: int, seed: int) -> list[int]:
    """`count` training images, the same number of each class, drawn by --label-seed: the labels that training may read.

    Raises InputError where the labels do not allow it.
    """
    if not count:
        return []
    if y is None or y.dim() != 1:
        raise InputError(f"--labels {count}: this data set has no class labels; drop --labels")
    classes = int(y.max()) + 1
    fewest = int(torch.bincount(y.long()).min())
    if classes > clusters:
        raise InputError(f"--labels {count}: {classes} classes need as many clusters; give --global {classes} or more")
    if count % classes:
        raise InputError(f"--labels {count}: each of {classes} classes gets as many; give a multiple of {classes}")
    if count // classes > fewest:
        raise InputError(f"--labels {count}: a class has {fewest} training images; give at most {classes * fewest}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    rows = torch.cat([order[y[order] == kind][:count // classes] for kind in range(classes)])
    return sorted(rows.tolist())


def steps_of(args: argparse.Namespace, images: int, batch_size: int) -> int:
    """How many training steps --steps asks for, or else --epochs over so many images. InputError at 2^31."""
    steps = args.steps or max(1, round(args.epochs * (images // batch_size)))
    if steps >= 2**31:
        raise InputError(f"--epochs {args.epochs:g}: {steps} steps; give less than {2**31}")
    return steps


def settings_of(args: argparse.Namespace, data: dict) -> dict:
    """A run's settings, as config.json holds them: the recipe's values, or what the command line gave instead.
    InputError where no layout fits the images, or labels are asked for that they do not have."""
    x, y = data["train"].x, data["train"].y
    try:
        layout_of(tuple(x.shape[1:]))
    except ValueError as error:
        raise InputError(f"{args.dataset}: {error}") from None
    settings = {**vars(args), "shape": list(x.shape[1:]), "regularization": not args.no_regularization,
                "data": fingerprints(data),
                "label_seed": args.seed if args.label_seed is None else args.label_seed}
    settings["labelled_rows"] = labelled_rows(y, args.labels, vars(args)["global"], settings["label_seed"])
    for name in NO_SETTINGS:
        del settings[name]
    recipe = dict(RECIPES[args.recipe])
    if args.recipe == "stable" and args.model != "iae":
        recipe |= FLIPPED_CATEGORICAL if args.prior == "categorical" else FLIPPED_GAUSSIAN
    elif args.recipe == "stable":
        recipe |= (DETERMINISTIC if args.local == 0 else {}) | (CATEGORICAL if args.prior == "categorical" else {})
        recipe |= LABELLED if args.labels else {}
    for name, value in recipe.items():
        if settings[name] is None:
            settings[name] = value
    settings["rates"] = list(settings["rates"])
    d1 = "dependent" if args.prior == "gaussian" else "invariant"  # Appendix D.1's choice
    pairs = "distance" if args.prior == "gaussian" else "projection"  # the FIAE's, which share x_hat
    shared = args.model != "iae" and settings["objective"] == "paired"
    settings["conditioning"] = args.conditioning or (pairs if shared else d1)
    settings["device"] = str(pick_device(args.device))
    settings["precision"] = pick_precision(args.precision, torch.device(settings["device"]))
    settings["capture"] = args.capture and settings["device"].startswith("cuda")
    settings["steps"] = steps_of(args, len(x), args.batch_size)
    return settings


def take_weights(run: Run, path: str) -> None:
    """Begin with the networks of another run, a folder or checkpoint; what that run lacks, as a discriminator that it
    was trained without, and all optimizers begin anew. InputError where a network of both does not fit."""
    state = read_checkpoint(path)
    for name in ("model", "prior", "shape"):
        if state["settings"][name] != run.settings[name]:
            raise InputError(f"--init {path}: its {name} is {state['settings'][name]}, not {run.settings[name]}; "
                             "name a run of the same")
    try:
        for name, network in run.model.named_children():
            weights = {key.removeprefix(f"{name}."): value for key, value in state["model"].items()
                       if key.startswith(f"{name}.")}
            if weights:
                network.load_state_dict(weights)
        run.averaged.load_state_dict(state["averaged"])
    except RuntimeError:
        raise InputError(f"--init {path}: its networks are of other kinds or sizes; give the same --global, --local, "
                         "--noise, --conditioning and --batch-norm") from None


def start(args: argparse.Namespace, first: dict | None = None) -> tuple[Run, dict, str]:
    """A new run, its data and its folder; `first` has the settings of a sweep's first run."""
    data = load_dataset(args.dataset, args.data_dir, args.validation, pick_device(args.device), args.extra,
                        args.image_size)
    if not args.validation and len(data["test"].x) < 2:
        raise InputError(f"{args.dataset}: one image to test, and metrics need two; give more, or --validation")
    settings = settings_of(args, data)
    refuse_unlike(settings, first)
    run = Run(settings)
    if args.init:
        take_weights(run, args.init)
    batch_indices(len(data["train"].x), settings["batch_size"], 0, 0)  # says so where the data are fewer than a batch
    return run, data, new_folder(run)


def refuse_changes(args: argparse.Namespace, given: set, settings: dict) -> None:
    """InputError where the command line gives a setting another value than the run was made with."""
    for name in sorted(given - {"resume", "epochs", "steps", "device", "data_dir", "dataset", "seeds", "capture"}):
        old = not settings["regularization"] if name == "no_regularization" else settings.get(name)
        if vars(args)[name] != old and (name, vars(args)[name]) != ("precision", "auto"):
            raise InputError(f"--{name.replace('_', '-')} {vars(args)[name]}: the run was made with {old}; "
                             "only --epochs, --steps, --device, --data-dir and where --dataset lies may change at a "
                             "resume")


def refuse_unlike(settings: dict, first: dict | None) -> None:
    """InputError where a run of a sweep differs from its first one in more than the seed and where it is made."""
    own = {"seed", "label_seed", "labelled_rows", "out", "device", "data_dir", "dataset", "capture",
           "epochs"}  # which older versions kept
    for name in sorted(first.keys() - own if first else ()):
        if settings.get(name) != first[name]:
            raise InputError(f"{settings['out']}: {name} is {settings.get(name)}, but {first[name]} in {first['out']}; "
                             "give the command that the sweep began with, or another --out")


def resume(args: argparse.Namespace, given: set, first: dict | None = None) -> tuple[Run, dict, str]:
    """The run of --resume, its data and its folder; the settings that may not change are compared."""
    path = checkpoint_file(args.resume)
    folder = os.path.dirname(path) or os.curdir
    held = lock(folder)  # before the file is read: who holds it may be writing another
    state = read_checkpoint(path)
    settings = state["settings"]
    refuse_changes(args, given, settings)
    settings |= {name: vars(args)[name] for name in ("data_dir", "dataset") if name in given}
    if "capture" in given or settings["device"] == "cpu":  # a CPU's run has it off
        settings["capture"] = args.capture
    try:
        settings["device"] = str(pick_device(args.device if "device" in given else settings["device"]))
    except InputError:
        if "device" in given:
            raise
        settings["device"] = str(pick_device("auto"))  # the GPU that it was made on is not there
    settings["capture"] = settings["capture"] and settings["device"].startswith("cuda")
    data = load_dataset(settings["dataset"], settings["data_dir"], settings["validation"], settings["device"],
                        settings["extra"], settings["image_size"])
    x, y, rows = data["train"].x, data["train"].y, settings["labelled_rows"]
    facts = fingerprints(data)
    same = list(x.shape[1:]) == settings["shape"] and facts == {**facts, **settings["data"]}
    if not same or rows and (y is None or min(rows) < 0 or max(rows) >= len(x) or y[rows].max() >= settings["global"]):
        raise InputError(f"{settings['dataset']}: not the images that the run was started with, or not in the same "
                         "order; bring those back")
    if "steps" in given or "epochs" in given:
        settings["steps"] = steps_of(args, len(x), settings["batch_size"])
    if settings["steps"] < state["step"]:
        raise InputError(f"{path}: it has {state['step']} steps already; give --steps of that or more")
    refuse_unlike(settings, first)
    run = Run(settings)
    try:
        run.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: the checkpoint's optimizers or random state cannot be taken up ({brief(error)}); "
                         "use another copy") from None
    lines = os.path.join(folder, "metrics.jsonl")
    if os.path.exists(lines):  # cut back to the checkpoint's step, so that no step is logged twice
        try:
            with open(lines) as file:
                kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= run.step]
            name, first_lines = discriminator_of_images(run.model), map(json.loads, kept[: JUDGED_STEPS // 20])
            run.judged = [numbers[name] for numbers in first_lines if name in numbers]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{lines}: not a log of train.py ({brief(error)}); mend or remove it") from None
        write(lines, lambda part: Path(part).write_text("".join(kept)))
    run.lock, run.host = held, host_facts(run.device)
    if run.step < settings["steps"]:  # where nothing is left to train, config.json keeps what trained it
        write_json(os.path.join(folder, "config.json"), {**settings, "host": run.host})
    return run, data, folder


def use_model(args: argparse.Namespace) -> None:
    """--from: a sheet of samples, or of one's own pictures over their reconstructions."""
    device = pick_device(args.device)
    model = load_checkpoint(vars(args)["from"], str(device))
    with torch.no_grad():
        torch.manual_seed(args.seed)
        if args.sample:
            out = args.out or "samples.png"
            parts = [model.sample(min(500, args.sample - done)) for done in range(0, args.sample, 500)]
            sheet(torch.cat(parts), min(20, args.sample), out)
        else:
            out = args.out or "reconstructed.png"
            if not model.global_size:
                raise InputError(f"{vars(args)['from']} is a plain GAN (--global 0): it has no encoder; use --sample")
            x = torch.stack([load_picture(path, model.shape) for path in args.reconstruct]).to(device)  # uint8
            draws = draw(model, x, draws=5 if model.local_size else 1)[1]
            sheet(torch.cat([to_range(x, model.shape)[None], draws]).flatten(0, 1), len(x), out)
    print(f"wrote {out}")


# -------------------------------------------------------------------------------------------------------- benchmark


class PerImage(torch.utils.data.Dataset):
    """The field's way with data: each image converted by itself, for a DataLoader with worker processes."""

    def __init__(self, x: torch.Tensor, shape: tuple[int, int, int]):
        self.x, self.shape = x.cpu(), shape

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return to_range(self.x[i], self.shape)


def field_update(run: Run, x: torch.Tensor) -> None:
    """The same losses as in `update`, written as most public code writes them: what the benchmark compares with.

    float32, contiguous, default Adam, penalties in every step, one step of D(z), and plain backward calls, which also
    compute gradients that nobody uses.
    """
    model = run.model
    outputs = model(x)
    losses, real = model.discriminator_losses(x, *outputs)
    if losses:
        run.discriminator_optimizer.zero_grad()
        sum(losses.values()).backward()
        run.discriminator_optimizer.step()
    pairs = {}  # whose logits are computed anew, where `update` takes those of the discriminators' pass
    if isinstance(model, FIAE):
        if model.objective == "paired" and not model.information_weight:
            pairs["reconstruction_discriminator"] = outputs[2], noisy(outputs[0], model.code_noise)
        if model.regularization_objective == "paired":
            pairs["regularization_discriminator"] = (x,)
    elif model.objective == "paired":
        pairs = {"reconstruction_discriminator": (x, outputs[0]), "sample_discriminator": (x,)}
    with torch.no_grad():
        real = {name: getattr(model, name)(*pairs[name]) for name in real if name in pairs}
    run.autoencoder_optimizer.zero_grad()
    sum(model.autoencoder_losses(x, *outputs, real=real).values()).backward()
    run.autoencoder_optimizer.step()
    for average, parameter in zip(run.averaged.parameters(), run.autoencoder):
        average.lerp_(parameter.detach(), 1 - run.settings["averaging"])


def benchmark(args: argparse.Namespace, rounds: int = 7, seconds: float | None = None) -> dict:
    """--benchmark: this project's step beside the field's way and its own float32, in turns; medians, as one table.

    Returns steps a second by row. FLOP are torch's count of the layers' multiplications, forward and backward.
    seconds: of a turn (4, on CUDA .3).
    """
    data = load_dataset(args.dataset, args.data_dir, args.validation, pick_device(args.device), args.extra,
                        args.image_size)
    settings, x = settings_of(args, data), data["train"].x
    device, batch = torch.device(settings["device"]), settings["batch_size"]
    seconds = seconds or (0.3 if device.type == "cuda" else 4.0)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def ours(**changes):
        run = Run({**settings, "steps": 10**9, **changes})

        def step():
            rows = batch_indices(len(x), batch, run.step, 0).to(device)
            train_step(run, to_range(x[rows], run.model.shape))
        return run, step

    def field(batches):
        run = Run({**settings, "precision": "float32", "capture": False})
        run.model.to(memory_format=torch.contiguous_format)
        for name in ("autoencoder_optimizer", "discriminator_optimizer"):
            groups = [{"params": group["params"], "lr": group["rate"]} for group in getattr(run, name).param_groups]
            setattr(run, name, torch.optim.Adam(groups, betas=(settings["beta1"], 0.99)))
        return run, lambda: field_update(run, next(batches).to(device, non_blocking=True))

    def loaded():
        loader = torch.utils.data.DataLoader(PerImage(x, tuple(settings["shape"])), batch, shuffle=True, num_workers=2,
                                             drop_last=True, persistent_workers=True, pin_memory=device.type == "cuda")
        while True:
            yield from loader

    def preloaded():
        images = to_range(x, tuple(settings["shape"]))
        while True:
            yield images[torch.randint(len(images), (batch,), device=device)]

    rows = {"this project": ours(), "this project, eager float32": ours(precision="float32", capture=False),
            "the field's way, DataLoader": field(loaded()), "the field's way, data preloaded": field(preloaded())}
    times = {name: [] for name in rows}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, (_, step) in rows.items():
            count, began = 0, time.monotonic()
            while count == 0 or time.monotonic() - began < seconds:
                step()
                count += 1
            wait()  # not at each step: a GPU works while the next one is prepared
            if turn:
                times[name].append((time.monotonic() - began) / count)
    run = rows["this project, eager float32"][0]
    for name in ("penalty", "regularization_penalty", "code_penalty"):  # torch's counter follows no second derivatives
        setattr(run.model, name, 0.0)
    with FlopCounterMode(display=False) as counter:
        update(run, to_range(x[:batch], run.model.shape))
    flop = counter.get_total_flops()
    parameters = sum(p.numel() for p in run.model.parameters())
    averaged = sum(p.numel() for p in run.averaged.parameters())
    traffic = 36 * parameters + 12 * averaged  # bytes: read, gradient written, Adam 7 x 4; average read twice, written

    peak, bandwidth = machine_limits(device, torch.bfloat16 if settings["precision"] == "bf16" else torch.float32)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * peak_memory()
    host = host_facts(device)
    print(f"{host['hardware']}, {host['threads']} threads, torch {host['torch']}, batch {batch}, "
          f"recipe {settings['recipe']}, {settings['precision']}; {flop / 1e9:.1f} GFLOP (without "
          f"penalties) and {traffic / 1e9:.2f} GB of parameter traffic a step;\n"
          f"peak of a matrix product {peak / 1e12:.2f} TFLOP/s, bandwidth of a copy "
          f"{bandwidth / 1e9:.1f} GB/s, most memory in use {memory / 1e9:.2f} GB (all rows together)\n")
    print("| | steps a second | images a second | ours is faster by | share of the peak | share of the bandwidth |")
    print("|---|---|---|---|---|---|")
    median = {name: float(np.median(each)) for name, each in times.items()}
    for name, second in median.items():
        print(f"| {name} | {1 / second:.2f} | {batch / second:.0f} | {second / median['this project']:.2f} | "
              f"{100 * flop / second / peak:.0f} % | {100 * traffic / second / bandwidth:.0f} % |")
    return {name: 1 / second for name, second in median.items()}


def machine_limits(device: torch.device, kind: torch.dtype) -> tuple[float, float]:
    """(FLOP a second of a matrix product of type `kind`, bytes a second of a copy), the fastest of eight each."""
    a, b = torch.randn(2048, 2048, device=device).to(kind), torch.randn(2**26, device=device)

    def fastest(work):
        found = []
        for _ in range(8):
            began = time.monotonic()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.monotonic() - began)
        return min(found)

    return 2 * 2048**3 / fastest(lambda: a @ a), 2 * 4 * 2**26 / fastest(b.clone)


def peak_memory() -> int:
    """The most memory that this process has held, KiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def summary(metrics: dict) -> str:
    """The deciding numbers of final.json, one a line."""
    return "\n".join(f"  {name:26} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float)))


def run_once(args: argparse.Namespace, given: set, first: dict | None = None) -> dict | None:
    """Start or go on with one run, to its end; its final.json's content, or None where it was stopped before."""
    run, data, folder = resume(args, given, first) if args.resume else start(args, first)
    print(f"{folder}: {len(data['train'].x)} training images, {run.settings['steps']} steps on {run.device}, "
          f"{run.settings['precision']}, recipe {run.settings['recipe']}", file=sys.stderr, flush=True)
    with Stop() as stop:
        finished = train(run, data, folder, stop)
    if not finished:
        print(f"stopped at step {run.step}; go on with: python train.py --resume {shlex.quote(folder)}",
              file=sys.stderr)
        return None
    final = finish(run, data, folder, run.settings["data_dir"])
    print(f"{folder}: {run.step} steps in {final['seconds']:.0f} s\n{summary(final['metrics'])}", flush=True)
    return final


def sweep(args: argparse.Namespace, given: set) -> bool:
    """--seeds: one run a seed under --out, each resumed or skipped where it is done; then sweep.json over all."""
    base, finals = args.out, []
    for seed in args.seeds:
        first = finals[0]["settings"] if finals else None
        args.seed, args.out = seed, os.path.join(base, f"seed-{seed}")
        args.resume = args.out if os.path.exists(os.path.join(args.out, "checkpoint.pt")) else None
        path = os.path.join(args.out, "final.json")
        final = None
        if os.path.exists(path):
            try:
                with open(path) as file:
                    final = json.load(file)
                made, steps = final["settings"], final["settings"]["steps"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: cannot be read ({brief(error)}); remove it, and it is made again") from None
            refuse_changes(args, given - {"out"}, made)
            if "steps" in given or "epochs" in given:
                steps = steps_of(args, made["data"]["train"]["images"], made["batch_size"])
        if final is None or final["steps"] != steps:
            final = run_once(args, given - {"out"}, first)
        if final is None:
            print("the whole sweep goes on with the command that it began with", file=sys.stderr)
            return False
        refuse_unlike(final["settings"], first)
        finals.append(final)
    numbers = {}
    for name in finals[0]["metrics"]:
        each = [final["metrics"].get(name) for final in finals]
        if all(isinstance(value, (int, float)) for value in each):
            deviation = float(np.std(each, ddof=1)) if len(each) > 1 else 0.0
            numbers[name] = {"mean": float(np.mean(each)), "deviation": deviation, "each": each}
    write_json(os.path.join(base, "sweep.json"), {
        "settings": {**finals[0]["settings"], "seed": None, "label_seed": args.label_seed, "labelled_rows": None,
                     "out": base}, "seeds": args.seeds, "evaluated_on": finals[0]["evaluated_on"], "metrics": numbers,
        "steps": finals[0]["steps"], "seconds": [final["seconds"] for final in finals], "host": finals[0]["host"]})
    print(f"{base}: seeds {' '.join(map(str, args.seeds))}, mean +- deviation (each)")
    for name, number in numbers.items():
        each = "  ".join(f"{value:.4g}" for value in number["each"])
        print(f"  {name:26} {number['mean']:.4g} +- {number['deviation']:.2g}  ({each})")
    return True


def main(argv: list[str] | None = None) -> None:
    """The command line: ends with status 2 and one line on bad input, with 130 where training was stopped."""
    args, given = parse(argv)
    try:
        if vars(args)["from"]:
            return use_model(args)
        if args.benchmark:
            benchmark(args)
            return
        if not (sweep(args, given) if args.seeds else run_once(args, given)):
            sys.exit(130)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
                words in str(error) for words in ("allocate memory", "size calculation overflowed")):
            raise
        print("error: too little memory; try smaller sizes, --batch-size or --image-size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # while nothing is trained, or for the second time
        print(STOPPED, file=sys.stderr)
        sys.exit(130)


def ended(*_) -> None:
    """SIGTERM outside of training: an orderly end, so that no half download is left."""
    print(STOPPED, file=sys.stderr)
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, ended)
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not be text
    main()
