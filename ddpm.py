"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239) in one file.

Notation is the paper's. Images x0 are floats in [-1, 1]. Steps t run 1..T, an earlier one is s < t,
and t = 0 is the clean image: every table has T + 1 entries, with beta[0] = 0 and alpha_bar[0] = 1,
so that each formula holds as printed. A model is any callable (xt, t) -> eps that takes xt (B, ...)
and t (B,) int64 on its device. "DDIM" is arXiv:2010.02502, "iDDPM" arXiv:2102.09672.

    1  noise schedules       sec. 4, iDDPM eq. 17          linear, cosine, exponential
    2  forward process       eq. 4                         q_sample
    3  posterior             eq. 7                         posterior_mean, beta_tilde
    4  parametrisation       eq. 11, eq. 15                x0_from_eps, eps_from_x0, p_mean
    5  simple loss           eq. 14 (Algorithm 1)          loss_simple
    6  ancestral sampling    Algorithm 2                   sample_ancestral
    7  implicit sampling     DDIM eq. 12, DDIM eq. 16      sample_ddim
    8  likelihood bound      eq. 5, eq. 13                 bound_terms, in bits/dim
    9  network               App. B                        UNet, 35,746,307 parameters

Not in the paper's text, but in the authors' code, which made its results:
    - x0 is clipped to [-1, 1] before the mean of a reverse step is formed: `clip`.
    - The decoder's variance sigma_1^2 is beta_tilde_2, for both choices of sigma: bound_terms.
    - UNet embeds t - 1, has self-attention in its middle, and pads stride 2 as TensorFlow does.
    - The last layer of every residual branch, and of the network, starts near zero: `gain`.
    - The learning rate warms up and gradients are clipped: train.py.
Unlike the authors' code, the decoder's normal CDF is exact, in log space, not a tanh approximation.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- 1. Noise schedules: each returns the table beta[0..T] in float64 ----------------------------

def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """Sec. 4: from beta_1 to beta_T in equal steps. The paper's schedule, made for T = 1000."""
    return F.pad(torch.linspace(beta_1, beta_T, T, dtype=torch.float64, device="cpu"), (1, 0))

def cosine_schedule(T=1000, s=0.008, beta_max=0.999):
    """iDDPM eq. 17: alpha_bar = f(t)/f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)); beta capped."""
    t = torch.arange(T + 1, dtype=torch.float64, device="cpu")
    f = torch.cos(math.pi / 2 * (t / T + s) / (1 + s)) ** 2
    return F.pad((1 - f[1:] / f[:-1]).clamp(max=beta_max), (1, 0))

def exponential_schedule(T=1000, beta_1=1e-4, beta_T=0.066):
    """Geometric, from beta_1 to beta_T; by default alpha_bar_1000 = 3.2e-5 (linear: 4.0e-5)."""
    exponent = torch.linspace(0, 1, T, dtype=torch.float64, device="cpu")
    return F.pad(beta_1 * (beta_T / beta_1) ** exponent, (1, 0))

# --- 2, 3, 4. The diffusion: four tables, and what follows from them in closed form --------------
def require(ok, words):
    """Refuse what is not ok, under python -O too. No step reads back from a device to tell."""
    if not ok:
        raise ValueError(words)

def alike(*xs):
    """Refuse what are not float tensors (B, ...), B > 0, of one shape."""
    ok = all(torch.is_tensor(x) and x.is_floating_point() and x.shape == xs[0].shape for x in xs)
    require(ok and xs[0].ndim and xs[0].numel(), "need float tensors (B, ...) of one shape, B > 0")

def at(table, t, x):
    """table[t] as (B, 1, ..., 1), to scale x (B, ...) by; t is an int, or (B,) int64 on the CPU.
    float64 is rounded once, here, to float32 or better: float32 tables put 1 - alpha_bar_1 off by
    1.7e-4. Only CUDA may run ahead of the copy: Apple GPUs read freed memory (pytorch #189690)."""
    t = torch.as_tensor(t, device="cpu").reshape(-1)
    ok = t.dtype == torch.int64 and len(t) in (1, len(x)) and 0 <= t.min() and t.max() < len(table)
    require(ok and table[t].isfinite().all(), "t: int or (B,) int64 in 0..T, for a step in 1..T")
    c = table[t].to(torch.promote_types(x.dtype, torch.float32))
    return c.to(x.device, non_blocking=x.is_cuda).reshape(-1, *[1] * (x.ndim - 1))

class Diffusion:
    """The process that beta[0..T] defines, as tables[0..T] in float64: beta, alpha, alpha_bar, and
    beta_tilde (nan at 0: there is no such step). x0, xt and eps are (B, ...) of one shape."""
    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu").clone()
        require(beta.ndim == 1 and len(beta) > 1 and beta[0] == 0, "need beta[0..T], beta[0] = 0")
        require(((beta < 1) & (1 - beta < 1))[1:].all(), "need beta_t and 1 - beta_t in (0, 1)")
        self.T, self.beta, self.alpha = len(beta) - 1, beta, 1 - beta
        self.alpha_bar = self.alpha.cumprod(0)
        ab, ab_s = self.alpha_bar, self.alpha_bar.roll(1)  # at t and at s = t - 1
        self.beta_tilde = beta * (1 - ab_s) / (1 - ab)  # eq. 7; where roll wraps, it is 0/0 = nan

    def q_sample(self, x0, t, eps):
        """eq. 4: xt ~ q(xt | x0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I), with noise eps."""
        alike(x0, eps)
        return at(self.alpha_bar.sqrt(), t, x0) * x0 + at((1 - self.alpha_bar).sqrt(), t, x0) * eps

    def posterior_mean(self, x0, xt, t):
        """eq. 7: mu_tilde_t(xt, x0), the mean of q(x_{t-1} | xt, x0), of variance beta_tilde."""
        alike(x0, xt)
        ab, ab_s = self.alpha_bar, self.alpha_bar.roll(1)
        c_0, c_t = ab_s.sqrt() * self.beta / (1 - ab), self.alpha.sqrt() * (1 - ab_s) / (1 - ab)
        return at(c_0, t, x0) * x0 + at(c_t, t, xt) * xt

    def x0_from_eps(self, xt, t, eps):
        """eq. 15: the x0 that eps implies, which is eq. 4 solved for x0."""
        alike(xt, eps)
        ab = self.alpha_bar
        return (xt - at((1 - ab).sqrt(), t, xt) * eps) / at(ab.sqrt(), t, xt)

    def eps_from_x0(self, xt, t, x0):
        """The noise that x0 implies, which is eq. 4 solved for eps. t in 1..T."""
        alike(xt, x0)
        ab = self.alpha_bar
        return at((1 - ab).rsqrt(), t, xt) * (xt - at(ab.sqrt(), t, xt) * x0)

    def p_mean(self, xt, t, eps, clip=True):
        """eq. 11: mu_theta(xt, t), as eq. 7 at the x0 that eps implies; the same unless clipped."""
        x0 = self.x0_from_eps(xt, t, eps)
        return self.posterior_mean(x0.clamp(-1, 1) if clip else x0, xt, t)

# --- 5. The simple loss --------------------------------------------------------------------------
def loss_simple(model, d, x0, t=None, eps=None):
    """eq. 14, Algorithm 1: || eps - model(xt, t) ||^2, averaged over images and their dimensions.
    t (B,) ~ Uniform{1..T}, on the CPU, and eps ~ N(0, I) are drawn where they are not given."""
    alike(x0)
    t = torch.randint(1, d.T + 1, (len(x0),), device="cpu") if t is None else t
    require(torch.is_tensor(t) and t.shape == (len(x0),) and t.min() > 0, "t must be (B,) in 1..T")
    eps = torch.randn_like(x0) if eps is None else eps
    eps_theta = model(d.q_sample(x0, t, eps), t.to(x0.device, non_blocking=x0.is_cuda))
    alike(eps_theta, eps)
    return F.mse_loss(eps_theta.to(eps.dtype), eps)

# --- 6. Ancestral sampling -----------------------------------------------------------------------
def noise_like(x, generator=None):
    """z ~ N(0, I) shaped as x; a list of generators, one per image, ties each image to its seed."""
    alike(x)
    alone = isinstance(generator, (list, tuple))
    require(not alone or len(generator) == len(x), "need one generator, or as many as images")
    size, generators = ((1, *x.shape[1:]), generator) if alone else (x.shape, [generator])
    z = [torch.randn(size, generator=g, dtype=x.dtype, device=(g or x).device) for g in generators]
    return torch.cat(z).reshape(x.shape).to(x.device, non_blocking=x.is_cuda)

def same_t(t, x):
    """One step t for all images of x: (B,) int64 on x's device."""
    return torch.full((len(x),), t, device=x.device)

@torch.no_grad()
def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    """Algorithm 2: from xt (B, ...) ~ N(0, I) at t = T to x0, by T steps p(x_{t-1} | xt).
    sigma2: table of the steps' variances, d.beta (the default) or d.beta_tilde (sec. 3.2).
    on_step(s, xs) is called after every step, s = T-1 .. 0."""
    sigma2 = d.beta if sigma2 is None else sigma2
    require(sigma2.shape == d.beta.shape and sigma2[1:].min() >= 0, "need sigma2[0..T], as d.beta")
    for t in range(d.T, 0, -1):
        mean = d.p_mean(xt, t, model(xt, same_t(t, xt)), clip)
        xt = mean + at(sigma2.sqrt(), t, xt) * noise_like(xt, generator) if t > 1 else mean
        if on_step:
            on_step(t - 1, xt)
    return xt

# --- 7. Implicit sampling ------------------------------------------------------------------------
def ddim_grid(T, n):
    """n of the steps 1..T, as even as integers allow and T the last: a grid for sample_ddim."""
    require(1 <= n <= T, f"cannot choose {n} different steps out of {T}")
    return [T * i // n for i in range(1, n + 1)]

@torch.no_grad()
def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    """DDIM eq. 12 (its alpha is our alpha_bar), sigma by DDIM eq. 16: eta from 0 (no noise) to 1.
    grid: increasing steps t_1 < .. < t_n in 1..T. xt (B, ...) at step t_n goes to t_{n-1}, .., t_1
    and 0. With eta = 1 on the full grid 1..T, this is Algorithm 2 with sigma2 = beta_tilde."""
    jumps = list(zip([0, *grid[:-1]], grid))
    ok = jumps and all(s < t and t in range(d.T + 1) for s, t in jumps)
    require(ok and 0 <= eta <= 1, f"need a grid that increases in 1..{d.T}, and eta in [0, 1]")
    for s, t in reversed(jumps):
        ab_s, ab = d.alpha_bar[[s, t]].tolist()
        sigma = eta * math.sqrt((1 - ab_s) / (1 - ab)) * math.sqrt(1 - ab / ab_s)
        x0 = d.x0_from_eps(xt, t, model(xt, same_t(t, xt)))
        x0 = x0.clamp(-1, 1) if clip else x0
        eps = d.eps_from_x0(xt, t, x0)  # the model's own, unless x0 was clipped
        mean = math.sqrt(ab_s) * x0 + math.sqrt(max(0.0, 1 - ab_s - sigma**2)) * eps
        xt = mean + sigma * noise_like(xt, generator) if sigma > 0 else mean
        if on_step:
            on_step(s, xt)
    return xt

# --- 8. The likelihood bound ---------------------------------------------------------------------
def normal_kl(mean_1, var_1, mean_2, var_2):
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise."""
    return 0.5 * ((var_2 / var_1).log() + (var_1 + (mean_1 - mean_2) ** 2) / var_2 - 1)

def discretized_log_likelihood(x0, mean, var):
    """eq. 13: log of the mass that N(mean, var) puts on x0's bin, in nats, elementwise.
    x0 is on the 256 levels -1 + 2k/255; its bin reaches 1/255 either way, end bins to infinity."""
    low, high = (x0 - mean - 1 / 255) / var.sqrt(), (x0 - mean + 1 / 255) / var.sqrt()
    low = torch.where(x0 < -0.999, -math.inf, low)  # the end levels are -1 and 1
    high = torch.where(x0 > 0.999, math.inf, high)
    # Phi(high) - Phi(low) = Phi(-low) - Phi(-high): take the side where log Phi is not rounded to 0
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))

@torch.no_grad()
def bound_terms(model, d, x0, variances, clip=True, generator=None):
    """eq. 5: the bound on -log p(x0) in bits/dim, as its T + 1 terms, by one draw of each xt.
    x0 (B, ...) on the 256 levels. variances: K tables of sigma2, judged on the same draws. Returns
    (K, B, T + 1): L_0, which is the decoder (eq. 13), .., L_{T-1}, L_T. Their sum is the bound."""
    k = (x0 + 1) * 127.5
    require(((x0.abs() <= 1) & ((k - k.round()).abs() < 0.01)).all(), "x0 is off the 256 levels")
    require(all(v.shape == d.beta.shape and v[1:].min() >= 0 for v in variances), "need variances")
    terms = torch.empty(len(variances), len(x0), d.T + 1, dtype=torch.float64, device="cpu")
    for t in range(1, d.T + 1):
        xt = d.q_sample(x0, t, noise_like(x0, generator))
        eps = model(xt, same_t(t, x0))
        mu_tilde, mu_theta = d.posterior_mean(x0, xt, t), d.p_mean(xt, t, eps, clip)
        for row, sigma2 in zip(terms, variances):
            if t > 1:
                nats = normal_kl(mu_tilde, at(d.beta_tilde, t, x0), mu_theta, at(sigma2, t, x0))
            else:  # beta_tilde_1 is 0: the decoder takes beta_tilde_2
                var = at(d.beta_tilde, 2, x0) if d.T > 1 else at(d.beta, 1, x0)
                nats = -discretized_log_likelihood(x0, mu_theta, var)
            row[:, t - 1] = nats.flatten(1).mean(1).cpu()
    prior = normal_kl(at(d.alpha_bar.sqrt(), d.T, x0) * x0, at(1 - d.alpha_bar, d.T, x0), 0.0, 1.0)
    terms[:, :, d.T] = prior.flatten(1).mean(1).cpu()
    return terms / math.log(2)

# --- 9. The network ------------------------------------------------------------------------------
def timestep_embedding(t, dim):
    """(B,) -> (B, dim): the sines, then the cosines, of t / 10000^(i / (dim/2 - 1)), i < dim/2."""
    i = torch.arange(dim // 2, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / (dim // 2 - 1) * i)
    return torch.cat([angle.sin(), angle.cos()], dim=1)

def init(layer, gain=1.0):
    """Weights Xavier-uniform, biases zero; gain=1e-5 for a layer that starts near zero."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer

def conv(c_in, c_out, size=3, gain=1.0):
    return init(nn.Conv2d(c_in, c_out, size, padding=size // 2), gain)

def norm(groups, c):
    return nn.GroupNorm(groups, c, eps=1e-6)

class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, emb_dim) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out, emb_dim, dropout, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(groups, c_in), conv(c_in, c_out)
        self.emb = init(nn.Linear(emb_dim, c_out))
        self.norm2, self.conv2 = norm(groups, c_out), conv(c_out, c_out, gain=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, size=1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h

class Attention(nn.Module):
    """x (B, C, H, W) -> (B, C, H, W): one head of self-attention over the H W pixels."""
    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q, self.k, self.v = conv(c, c, size=1), conv(c, c, size=1), conv(c, c, size=1)
        self.out = conv(c, c, size=1, gain=1e-5)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v
        return x + self.out(h[:, 0].mT.reshape(x.shape))

class Stack(nn.Sequential):
    """Layers one after the other; a ResBlock among them also sees emb."""
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x

class UNet(nn.Module):
    """App. B: xt (B, in_channels, H, W), t (B,) in 1..T -> eps (B, out_channels, H, W).
    The defaults are the paper's CIFAR-10 network; its 256x256 network has mult=(1, 1, 2, 2, 4, 4),
    attention=(4,), dropout=0. Level i has ch * mult[i] channels, sides H / 2^i and W / 2^i,
    `blocks` residual blocks down and one more up, and self-attention if i is in `attention`.
    num_classes adds labels y (B,) in 0..num_classes; y = num_classes, the default, is no label."""
    def __init__(self, in_channels=3, out_channels=None, ch=128, mult=(1, 2, 2, 2), blocks=2,
                 attention=(1,), dropout=0.1, groups=32, num_classes=None):
        super().__init__()
        counts = [in_channels, out_channels, blocks, groups, num_classes, len(mult), *mult]
        require(all(n is None or n > 0 for n in counts), f"need one or more of each: {counts}")
        require(ch > 3 and ch % 2 == ch % groups == 0, "need ch even, > 3, a multiple of groups")
        require({*attention} <= {*range(len(mult))}, "attention lists levels 0, 1, .., not sizes")
        self.ch, self.factor, self.num_classes = ch, 2 ** (len(mult) - 1), num_classes
        self.time = nn.Sequential(init(nn.Linear(ch, 4 * ch)), nn.SiLU(),
                                  init(nn.Linear(4 * ch, 4 * ch)))
        self.label = nn.Embedding(num_classes + 1, 4 * ch) if num_classes else None

        def block(level, c_in, c_out):
            layers = [ResBlock(c_in, c_out, 4 * ch, dropout, groups)]
            return [*layers, Attention(c_out, groups)] if level in attention else layers

        self.conv_in = conv(in_channels, ch)
        c, skips = ch, [ch]  # the channels of h, and of the skips, as forward will meet them
        self.down = nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(Stack(*block(level, c, ch * m)))
                c = ch * m
                skips.append(c)
            if level < len(mult) - 1:
                same = nn.ZeroPad2d((0, 1, 0, 1))  # TensorFlow's SAME: right and bottom only
                self.down.append(Stack(same, init(nn.Conv2d(c, c, 3, stride=2))))
                skips.append(c)
        self.mid = Stack(*block(None, c, c), Attention(c, groups), *block(None, c, c))
        self.up = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(Stack(*block(level, c + skips.pop(), ch * m)))
                c = ch * m
            if level > 0:
                self.up[-1].extend([nn.Upsample(scale_factor=2), conv(c, c)])
        self.norm_out = norm(groups, c)
        self.conv_out = conv(c, out_channels or in_channels, gain=1e-5)

    def forward(self, xt, t, y=None):
        n, f, dtype = self.num_classes, self.factor, self.conv_in.weight.dtype
        ok = xt.ndim == 4 and xt.numel() and xt.shape[2] % f == xt.shape[3] % f == 0
        require(ok, f"xt is {(*xt.shape,)}: need (B, C, H, W), with H and W multiples of {f}")
        ok = xt.dtype == dtype or torch.is_autocast_enabled(xt.device.type)
        require(ok, f"xt is {xt.dtype}, the weights are {dtype}: convert one of them")
        ok = torch.is_tensor(t) and t.shape == xt.shape[:1] and t.dtype == torch.int64
        require(ok and (y is None or n), "need t (B,) int64, and labels y only with num_classes")
        emb = self.time(timestep_embedding(t - 1, self.ch).to(xt.dtype))
        if n:
            y = torch.full_like(t, n) if y is None else y
            seen = y.is_cpu and not torch.compiler.is_compiling()  # its values, without a wait
            ok = y.dtype == t.dtype and y.shape == t.shape
            require(ok and not (seen and (y.min() < 0 or y.max() > n)), f"need y (B,) in 0..{n}")
            emb = emb + self.label(y)
        skips = [self.conv_in(xt)]
        for stage in self.down:
            skips.append(stage(skips[-1], emb))
        h = self.mid(skips[-1], emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))
