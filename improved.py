"""Learned variances, fewer timesteps and guidance, on top of ddpm.py and likelihood.py.

"iDDPM" is Improved DDPM (Nichol, Dhariwal 2021, arXiv:2102.09672). "CFG" is Classifier-Free
Diffusion Guidance (Ho, Salimans 2022, arXiv:2207.12598). The notation is that of ddpm.py. A model
with learned variances is any callable (xt, t) -> (B, 2C, ...) for xt (B, C, ...): first eps, then v,
for example ddpm.UNet(C, 2 * C). A labelled model is (xt, t, y) -> ..., with labels y (B,) in 0..K,
where y = K is "no label", for example ddpm.UNet(num_classes=K).

    1  learned variances     iDDPM eq. 15                  variance
    2  hybrid loss           iDDPM eq. 6, iDDPM eq. 16     bound_term, loss_hybrid
    3  sampling              iDDPM eq. 19                  respaced, sample_ancestral
    4  likelihood bound                                    bound_terms
    5  guidance              CFG Algorithm 1, CFG eq. 6    drop_labels, guided

iDDPM's code differs from its text in three points, where this file follows the code:
    - At t = 1, where beta_tilde is 0, the lower end of the variance is beta_tilde_2.
    - L_vlb is in bits/dim.
    - The predicted x0 is not clipped in L_vlb.
In a fourth point this file follows the text: v is the network's output. For weights of iDDPM's code,
v is (output + 1) / 2.
"""

from operator import index

import torch
import torch.nn.functional as F

import ddpm
import likelihood
from ddpm import at, check, same_t

# --- 1. Learned variances -------------------------------------------------------------------------


def variance(d, t, v):
    """iDDPM eq. 15: sigma_t^2 = exp(v log beta_t + (1 - v) log beta_tilde_t), shaped like v (B, ...)."""
    low = likelihood.with_sigma_1(d, d.beta_tilde)
    # (1 - v) log low + v log beta would lose digits in bfloat16, in its value and its gradient.
    return torch.exp(at(low.log(), t, v) + v * at((d.beta / low).log(), t, v))


def split_output(output, xt):
    """Split the output (B, 2C, ...) of a model with learned variances into eps and v, like xt."""
    shape = (len(xt), 2 * xt.shape[1], *xt.shape[2:])
    check(output.shape == shape, "the model must return {}, got {}", shape, tuple(output.shape))
    return output.chunk(2, dim=1)


def eps_only(model):
    """Return the eps of a model with learned variances, as a model for ddpm.py (for example DDIM)."""

    def eps_model(xt, t):
        eps, _ = split_output(model(xt, t), xt)
        return eps

    return eps_model


# --- 2. Hybrid loss -------------------------------------------------------------------------------


def bound_term(d, x0, xt, t, eps, v, *, clip=True):
    """iDDPM eq. 6: L_{t-1} in bits/dim (B,) for the model's eps and v. At t = 1 it is L_0.

    t in 1..T is an int or an int64 tensor (B,).
    """
    ddpm.check_same_shape(xt=xt, v=v)
    mean = d.p_mean(xt, t, eps, clip=clip)
    return likelihood.bound_term(d, x0, xt, t, mean, variance(d, t, v))


def loss_hybrid(model, d, x0, t=None, eps=None, *, weight=0.001):
    """iDDPM eq. 16: L_simple + weight * L_vlb. eps is detached in L_vlb, which trains only v.

    x0 is on the 256 levels. t and eps are as in ddpm.loss_simple.
    """
    if t is None:
        t = torch.randint(1, d.T + 1, (len(x0),), device="cpu")
    if eps is None:
        eps = torch.randn_like(x0)
    t = t.cpu()  # once, because at() would wait for a GPU each time
    check(t.shape == x0.shape[:1], "need t {}, got {}", tuple(x0.shape[:1]), tuple(t.shape))
    check(not ddpm.readable(t) or t.min() > 0, "t must be in 1..T: t = 0 is the clean image")
    xt = d.q_sample(x0, t, eps)
    output = model(xt, t.to(x0.device, non_blocking=x0.is_cuda))
    eps_theta, v = split_output(output, xt)
    l_simple = F.mse_loss(eps_theta.to(eps.dtype), eps)
    l_vlb = d.T * bound_term(d, x0, xt, t, eps_theta.detach(), v, clip=False).mean()
    return l_simple + weight * l_vlb


# --- 3. Sampling ----------------------------------------------------------------------------------


def respaced(model, d, timesteps):
    """iDDPM eq. 19: the model and the diffusion on n increasing timesteps only, renumbered 1..n.

    alpha_bar keeps its values at these timesteps. beta, beta_tilde and learned variances are those of
    the longer steps between them. The new model takes (xt, t): apply guided() first.
    """
    pairs = ddpm.timestep_pairs(d.T, timesteps)
    original = torch.tensor([0, *(t for _, t in pairs)], device="cpu")  # new t -> original t
    alpha_bar = d.alpha_bar[original]
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    beta = beta.clamp(max=1 - 2**-53)  # a beta that rounds to 1 becomes the next smaller float64

    def respaced_model(xt, t):
        return model(xt, original.to(t.device, non_blocking=t.is_cuda)[t])

    short = ddpm.Diffusion(F.pad(beta, (1, 0)))
    # It computes alpha_bar from 1 - beta, which has lost digits where beta is close to 1.
    short.alpha_bar = alpha_bar
    short.alpha_bar_s = F.pad(alpha_bar[:-1], (1, 0), value=torch.nan)
    return respaced_model, short


def ancestral_step(d, xt, t, eps, v, *, clip=True, noise=torch.randn_like):
    """Algorithm 2, one step with a learned variance: x_{t-1} from xt and the model's eps and v."""
    t = index(t)
    ddpm.check_same_shape(xt=xt, v=v)
    mean = d.p_mean(xt, t, eps, clip=clip)
    if t == 1:
        return mean
    z = noise(xt)
    ddpm.check_same_shape(xt=xt, noise=z)
    return mean + variance(d, t, v).sqrt() * z


@torch.no_grad()
def sample_ancestral(model, d, xt, *, start=None, clip=True, noise=torch.randn_like, on_step=None):
    """Algorithm 2 with learned variances. See ddpm.sample_ancestral."""
    start = d.T if start is None else start
    check(0 <= start <= d.T, f"start must be in 0..{d.T}, got {start}")
    for t in range(start, 0, -1):
        eps, v = split_output(model(xt, same_t(t, xt)), xt)
        xt = ancestral_step(d, xt, t, eps, v, clip=clip, noise=noise)
        if on_step:
            on_step(t - 1, xt)
    return xt


# --- 4. Likelihood bound --------------------------------------------------------------------------


@torch.no_grad()
def bound_terms(model, d, x0, variances=(), *, clip=True, noise=torch.randn_like):
    """Return likelihood.bound_terms for K fixed variances and the learned one: (K + 1, B, T + 1).

    All are evaluated on the same xt; the learned variance comes last.
    """
    likelihood.check_levels(x0)
    tables = [likelihood.with_sigma_1(d, sigma2) for sigma2 in variances]
    terms = []
    for t in range(1, d.T + 1):
        xt = d.q_sample(x0, t, noise(x0))
        eps, v = split_output(model(xt, same_t(t, x0)), xt)
        mean = d.p_mean(xt, t, eps, clip=clip)
        sigma2s = [at(table, t, x0) for table in tables]
        sigma2s.append(variance(d, t, v))
        rows = [likelihood.bound_term(d, x0, xt, t, mean, sigma2) for sigma2 in sigma2s]
        terms.append(torch.stack(rows))
    terms.append(likelihood.prior_term(d, x0).expand_as(terms[0]))
    return torch.stack(terms, dim=2).cpu().double()


# --- 5. Guidance ----------------------------------------------------------------------------------


def drop_labels(y, none, p=0.1, generator=None):
    """CFG Algorithm 1: labels y (B,), each replaced by `none` independently with probability p."""
    check(y.dtype == torch.int64, f"labels y must be int64, got {y.dtype}")
    check(0 <= p <= 1, f"p must be in [0, 1], got {p}")
    u = torch.rand(y.shape, generator=generator, dtype=torch.float32, device=y.device)
    return torch.where(u < p, none, y)


def guided(net, y, none, w=0.0):
    """CFG eq. 6: a model of eps = (1 + w) eps(xt, y) - w eps(xt, none), with one call of net per step.

    y (B, ...): labels or other conditions; `none` is their null value, a number or a tensor that
    broadcasts to y. w: a number, or a tensor (B,). w = 0 is the conditional model, w = -1 the
    unconditional one. Others write s = 1 + w. Learned variances are those given y, unless w = -1.
    """
    null = torch.as_tensor(none, dtype=y.dtype, device=y.device).expand_as(y)
    if not torch.is_tensor(w):
        w = torch.tensor(w, dtype=torch.float64, device="cpu")
    w = w.cpu().double().clone().reshape(-1)  # on the CPU first, because Apple GPUs lack float64
    check(len(w) in (1, len(y)), "w has {} entries, but there are {} conditions", len(w), len(y))

    def model(xt, t):
        check(len(y) == len(xt), "{} images need as many conditions, got {}", len(xt), len(y))
        if (w == 0).all():
            return net(xt, t, y)
        if (w == -1).all():
            return net(xt, t, null)
        output = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
        # Under autocast the output may be bfloat16, and w magnifies its rounding.
        output = output.to(xt.dtype)
        given_y, given_null = output.chunk(2)
        channels = xt.shape[1]
        weight = w.to(xt.dtype).to(xt.device, non_blocking=xt.is_cuda)
        weight = weight.reshape((-1,) + (1,) * (xt.ndim - 1))
        eps = (1 + weight) * given_y[:, :channels] - weight * given_null[:, :channels]
        return torch.cat([eps, given_y[:, channels:]], dim=1)  # then v, if there is one

    return model
