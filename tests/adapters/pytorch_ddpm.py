"""w86763777/pytorch-ddpm (commit f804ccb) under the names of ddpm.py.

It only has a linear schedule, which torch.linspace computes in its constructors. Other schedules replace
torch.linspace there. Its trainer and its sampler are modules without arguments for t, noise or clipping. The
trainer's t and noise are replaced in the same way. Noise comes from the global generator.
"""

import contextlib
from unittest import mock

import diffusion as library
import model as networks
import torch
from adapters import shared


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    return shared.table(library.GaussianDiffusionTrainer(None, beta_1, beta_T, T).betas, 0.0)


class Diffusion:
    def __init__(self, beta):
        self.betas = torch.as_tensor(beta, dtype=torch.float64)[1:]
        self.T = len(self.betas)
        alpha_bar = self.trainer().sqrt_alphas_bar ** 2
        shared.process(self, self.sampler().betas, alpha_bar, self.sampler().posterior_var)

    def trainer(self, model=None):
        with mock.patch.object(torch, "linspace", lambda *_: self.betas):
            return library.GaussianDiffusionTrainer(model, 0.0, 0.0, self.T)

    def sampler(self, model=None, variance="fixedlarge"):
        with mock.patch.object(torch, "linspace", lambda *_: self.betas):
            return library.GaussianDiffusionSampler(
                model, 0.0, 0.0, self.T, mean_type="epsilon", var_type=variance
            )

    def q_sample(self, x0, t, eps):
        """Return the xt that the trainer computes for its model."""
        seen = []

        def model(xt, t):
            seen.append(xt)
            return xt

        train(self.trainer(model), x0, shared.from_0(t, x0), eps)
        return seen[0]

    def posterior_mean(self, x0, xt, t):
        return self.sampler().q_mean_variance(x0, xt, shared.from_0(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.sampler().predict_xstart_from_eps(xt, shared.from_0(t, xt), eps)

    def p_mean(self, xt, t, eps, *, clip=True):
        """p_mean_variance clips x0 after it has computed the mean, so `clip` makes no difference."""
        return self.sampler(lambda xt, t: eps).p_mean_variance(xt, shared.from_0(t, xt))[0]


def train(trainer, x0, t, eps):
    """Call the trainer with the given t, counted from 0, and eps. None keeps them random."""
    with contextlib.ExitStack() as stack:
        if t is not None:
            stack.enter_context(mock.patch.object(torch, "randint", lambda *_, **__: t))
        if eps is not None:
            stack.enter_context(mock.patch.object(torch, "randn_like", lambda *_: eps))
        return trainer(x0)


def loss_simple(model, d, x0, t=None, eps=None):
    t = None if t is None else shared.from_0(t, x0)
    return train(d.trainer(shared.counting_from_0(model)), x0, t, eps).mean()


@torch.no_grad()
def sample_ancestral(model, d, xt, sigma2=None, *, clip=True):
    """It clips the last image in any case, and no other predicted x0."""
    shared.absent_if(not clip, "sampling without clipping")
    variance = shared.kind_of(sigma2, d, "fixedlarge", "fixedsmall")
    return d.sampler(shared.counting_from_0(model), variance)(xt)


def timestep_embedding(t, dim):
    return networks.TimeEmbedding(int(t.max()) + 1, dim, dim).timembedding[0](t)


class UNet(networks.UNet):
    def __init__(self, *channels, **given):
        s = shared.unet_settings(*channels, **given)
        shared.absent_if(s.groups != 32, "another number of groups than 32")
        shared.absent_if((s.in_channels, s.out_channels) != (3, 3), "other channels than 3")
        super().__init__(1000, s.ch, list(s.mult), list(s.attention), s.blocks, s.dropout)

    def forward(self, xt, t, y=None):
        return super().forward(xt, t - 1)
