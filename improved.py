"""Learned variances and guidance, on top of ddpm.py, which this file imports and leaves as it is.

"iDDPM" is Improved DDPM (Nichol, Dhariwal 2021, arXiv:2102.09672), "CFG" is Classifier-Free
Diffusion Guidance (Ho, Salimans 2022, arXiv:2207.12598). The notation is ddpm.py's. A model with
learned variances is any callable (xt, t) -> (B, 2C, ...), for xt (B, C, ...): eps, then v, such as
ddpm.UNet(C, 2 * C). A labelled one is (xt, t, y) -> ..., with y (B,) int64 in 0..K, where y = K is
"no label", such as ddpm.UNet(num_classes=K).

    1  learned variances     iDDPM eq. 15                  variance
    2  hybrid loss           iDDPM eq. 6, iDDPM eq. 16     bound_term, loss_hybrid
    3  sampling              iDDPM eq. 19                  strided, sample_ancestral
    4  likelihood bound                                    bound_terms
    5  guidance              CFG Algorithm 1, CFG eq. 6    drop_labels, guided

Not in the text of iDDPM, but in its authors' code:
    - At t = 1, where beta_tilde is 0, beta_tilde_2 stands for it: lowest.
    - L_vlb is counted in bits/dim, and x0 is not clipped in it: loss_hybrid.
Unlike that code, v is the network's output, as printed, and not (output + 1) / 2.
"""

import math

import torch
import torch.nn.functional as F

import ddpm
from ddpm import alike, at, require

# --- 1. Learned variances ------------------------------------------------------------------------

def lowest(d):
    """beta_tilde[0..T], with beta_tilde_2 at t = 1, where it is 0 and has no logarithm."""
    table = d.beta_tilde.clone()
    table[1] = d.beta_tilde[2] if d.T > 1 else d.beta[1]
    return table

def variance(d, t, v):
    """iDDPM eq. 15: sigma_t^2 = exp(v log beta_t + (1 - v) log beta_tilde_t); as v (B, ...)."""
    low = lowest(d)  # log beta - log low, and not 1 - v: in bfloat16, that and its gradient cancel
    return torch.exp(at(low.log(), t, v) + v * at((d.beta / low).log(), t, v))

def halves(model, xt, t):
    """What a model with learned variances says of xt: eps and v, each of xt's shape."""
    out = model(xt, t)
    need = (len(xt), 2 * xt.shape[1], *xt.shape[2:])
    require(out.shape == need, f"the model must give eps and v, {need}, not {(*out.shape,)}")
    return out.chunk(2, dim=1)

def eps_only(model):
    """A model with learned variances as one of ddpm.py, for what takes fixed ones: DDIM, say."""
    return lambda xt, t: halves(model, xt, t)[0]

# --- 2. The hybrid loss --------------------------------------------------------------------------

def bound_term(d, x0, xt, t, eps, v, clip=True):
    """iDDPM eq. 6: L_{t-1} in bits/dim (B,), for the eps and v that the model says at xt and t;
    at t = 1 it is L_0, the decoder. t in 1..T: an int or (B,) int64 on the CPU."""
    alike(xt, v)
    mean, sigma2 = d.p_mean(xt, t, eps, clip), variance(d, t, v)
    kl = ddpm.normal_kl(d.posterior_mean(x0, xt, t), at(lowest(d), t, x0), mean, sigma2)
    later = at(d.beta_tilde, t, x0) > 0  # than t = 1; a decoder that is not asked must not overflow
    decoder = -ddpm.discretized_log_likelihood(x0, mean, torch.where(later, 1.0, sigma2))
    return torch.where(later, kl, decoder).flatten(1).mean(1) / math.log(2)

def loss_hybrid(model, d, x0, t=None, eps=None, weight=0.001):
    """iDDPM eq. 16: L_simple + weight * L_vlb, which teaches v alone: its eps is detached.
    x0 is on the 256 levels; t and eps as in ddpm.loss_simple, drawn where they are not given."""
    alike(x0)
    t = torch.randint(1, d.T + 1, (len(x0),), device="cpu") if t is None else t
    require(torch.is_tensor(t) and t.shape == (len(x0),) and t.min() > 0, "t must be (B,) in 1..T")
    eps = torch.randn_like(x0) if eps is None else eps
    xt = d.q_sample(x0, t, eps)
    eps_theta, v = halves(model, xt, t.to(x0.device, non_blocking=x0.is_cuda))
    vlb = d.T * bound_term(d, x0, xt, t, eps_theta.detach(), v, clip=False).mean()
    return F.mse_loss(eps_theta.to(eps.dtype), eps) + weight * vlb

# --- 3. Sampling ---------------------------------------------------------------------------------

def strided(model, d, grid):
    """iDDPM eq. 19: model and diffusion on the steps t_1 < .. < t_n of a grid alone, now 1..n.
    alpha_bar stays what it is there; beta, beta_tilde, learned variances become the grid's own."""
    ok = len(grid) and all(s < t and t in range(d.T + 1) for s, t in zip([0, *grid], grid))
    require(ok, f"need a grid that increases in 1..{d.T}")
    steps = torch.tensor([0, *grid], device="cpu")
    ab = d.alpha_bar[steps]
    beta = F.pad((1 - ab[1:] / ab[:-1]).clamp(max=0.9999999999999999), (1, 0))  # rounded, maybe 1
    def on_grid(xt, i):
        return model(xt, steps.to(i.device, non_blocking=i.is_cuda)[i])
    return on_grid, ddpm.Diffusion(beta)

@torch.no_grad()
def sample_ancestral(model, d, xt, clip=True, generator=None, on_step=None):
    """Algorithm 2 with learned variances; for the rest, see ddpm.sample_ancestral."""
    for t in range(d.T, 0, -1):
        eps, v = halves(model, xt, ddpm.same_t(t, xt))
        mean, sigma = d.p_mean(xt, t, eps, clip), variance(d, t, v).sqrt()
        xt = mean + sigma * ddpm.noise_like(xt, generator) if t > 1 else mean
        if on_step:
            on_step(t - 1, xt)
    return xt

# --- 4. The likelihood bound ---------------------------------------------------------------------

def bound_terms(model, d, x0, variances=(), clip=True, generator=None):
    """ddpm.bound_terms of K fixed variances, and of the learned one, on the same draws: K + 1."""
    learned = torch.empty(len(x0), d.T, dtype=torch.float64, device="cpu")

    def eps_model(xt, t):
        (eps, v), t = halves(model, xt, t), t.cpu()
        learned[:, t[0] - 1] = bound_term(d, x0, xt, t, eps, v, clip).cpu()
        return eps

    terms = ddpm.bound_terms(eps_model, d, x0, [*variances, d.beta], clip, generator)
    terms[-1, :, : d.T] = learned
    return terms

# --- 5. Guidance ---------------------------------------------------------------------------------

def drop_labels(y, none, p=0.1, generator=None):
    """CFG Algorithm 1: y (B,), each label replaced by `none`, on its own, with probability p."""
    require(y.dtype == torch.int64 and 0 <= p <= 1, "need labels y (B,) int64, and p in [0, 1]")
    draw = torch.rand(y.shape, generator=generator, dtype=torch.float32, device=y.device)
    return torch.where(draw < p, none, y)

def guided(net, y, none, w=0.0):
    """CFG eq. 6: a model of eps = (1 + w) eps(xt, y) - w eps(xt, none), by one call of net a step.

    w = 0 is the conditional model, w = -1 the unconditional one. Others write s = 1 + w, where
    those are s = 1 and s = 0. Learned variances are those given y, unless w = -1."""
    def model(xt, t):
        require(y.shape == t.shape, f"need a label for each of {len(xt)} images, not {(*y.shape,)}")
        if w in (0, -1):  # one of the two is all of it
            return net(xt, t, torch.full_like(y, none) if w else y)
        out = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, none)]))
        out = out.to(xt.dtype)  # w magnifies what bfloat16 would round
        (eps, *v), (eps_none, *_) = (half.split(xt.shape[1], dim=1) for half in out.chunk(2))
        return torch.cat([(1 + w) * eps - w * eps_none, *v], dim=1)
    return model
