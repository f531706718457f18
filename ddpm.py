"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, arXiv:2006.11239) in one file.

    d = Diffusion(linear_schedule())
    model = UNet()
    loss_simple(model, d, x0).backward()                         # training: Algorithm 1
    model.eval()                                                 # sampling: no dropout
    x0 = sample_ancestral(model, d, torch.randn(16, 3, 32, 32))  # Algorithm 2

The notation is the paper's. Images x0 are floats in [-1, 1]. Timesteps t run from 1 to T, s < t is
an earlier timestep, and t = 0 is the clean image. Tables have T + 1 entries, with beta[0] = 0 and
alpha_bar[0] = 1, so each formula holds as printed. A model is any callable (xt, t) -> eps, which
gets xt (B, ...) and int64 t (B,) on xt's device; with labels, lambda xt, t: net(xt, t, y). Keep x0
and xt in float32, and use autocast for mixed precision.
"DDIM" is arXiv:2010.02502, "iDDPM" is arXiv:2102.09672.

    1  noise schedules       sec. 4, iDDPM eq. 17          linear, cosine, exponential
    2  forward process       eq. 4                         Diffusion.q_sample
    3  posterior             eq. 7                         Diffusion.posterior_mean, beta_tilde
    4  parametrisation       eq. 11, eq. 15                Diffusion.x0_from_eps, p_mean
    5  simple loss           eq. 14, Algorithm 1           loss_simple
    6  ancestral sampling    Algorithm 2                   ancestral_step, sample_ancestral
    7  DDIM sampling         DDIM eq. 12, DDIM eq. 16      ddim_step, sample_ddim
    8  network               App. B                        UNet, 35,746,307 parameters

likelihood.py has the variational bound; improved.py has learned variances and guidance.

The authors' code, which produced the paper's results, differs from the paper's text:
    - A reverse step clips the predicted x0 to [-1, 1] (`clip`).
    - The network gets t - 1, and also has self-attention in its middle.
    - The last layer of each residual branch, and of the network, starts near zero (`gain`).
    - Downsampling pads on the right and at the bottom only: TensorFlow's SAME padding (even sizes).
    - sigma_1^2, the variance of the last step in the bound, is beta_tilde_2 (likelihood.py).
    - Training uses learning-rate warm-up and gradient clipping. EMA is in the text (train.py).
"""

import math
from operator import index  # index(t) is int(t), but raises TypeError for 2.5

import torch
import torch.nn.functional as F
from torch import nn


def check(ok, message, *values):
    """Raise ValueError unless ok. Only mistakes that would otherwise go unnoticed are checked.

    The values replace each {} of the message, only on failure: an f-string with a size of the
    batch would make torch.compile compile again for every size.
    """
    if not ok:
        raise ValueError(message.format(*values))


def check_same_shape(**tensors):
    """Raise ValueError unless all are float tensors of one shape, so that nothing broadcasts."""
    for name, x in tensors.items():
        check(x.is_floating_point(), "{} must be a float tensor, got {}", name, x.dtype)
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    first = next(iter(shapes.values()))
    check(all(shape == first for shape in shapes.values()), "shapes must be equal, got {}", shapes)


def readable(x):
    """Return True if the values of x may be checked.

    On a GPU this would wait for all queued work. torch.compile and torch.func.vmap do not allow it.
    """
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(x)


# --- 1. Noise schedules: each returns the table beta[0..T] in float64 on the CPU ------------------


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """Sec. 4: beta rises from beta_1 to beta_T in equal steps.

    The defaults are made for T = 1000. For another T, scale both by 1000 / T: otherwise x_T is not
    close to N(0, I).
    """
    beta = torch.linspace(beta_1, beta_T, T, dtype=torch.float64, device="cpu")
    return F.pad(beta, (1, 0))


def cosine_schedule(T=1000, s=0.008, beta_max=0.999):
    """iDDPM eq. 17: alpha_bar = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)).

    beta is at most beta_max, because alpha_bar_T would be 0 otherwise.
    """
    t = torch.arange(index(T) + 1, dtype=torch.float64, device="cpu")
    f = torch.cos(math.pi / 2 * (t / T + s) / (1 + s)) ** 2
    beta = 1 - f[1:] / f[:-1]
    return F.pad(beta.clamp(max=beta_max), (1, 0))


def exponential_schedule(T=1000, beta_1=1e-4, beta_T=0.066):
    """beta grows by a constant factor from beta_1 to beta_T. Not in the paper.

    The defaults are made for T = 1000: alpha_bar_T is 3.2e-5, close to that of linear_schedule.
    """
    exponent = torch.linspace(0, 1, T, dtype=torch.float64, device="cpu")
    beta = beta_1 * (beta_T / beta_1) ** exponent
    return F.pad(beta, (1, 0))


# --- The tables of the diffusion process, shared by sections 2 to 7 -------------------------------


def at(table, t, x):
    """Return table[t], shaped (B, 1, ..., 1) or (1, 1, ..., 1) so that it multiplies x (B, ...).

    t is an int or an int64 tensor (B,), best on the CPU: t on a GPU makes each call wait. Tables are
    float64 and are rounded only here, to float32 or better: 1 - alpha_bar_1 from a float32 table has
    a relative error of 1.7e-4.
    """
    t = t.cpu() if torch.is_tensor(t) else torch.full((1,), index(t), device="cpu")
    t = t.reshape(-1)
    check(t.dtype == torch.int64, f"t must be an int or an int64 tensor, got {t.dtype}")
    check(len(t) in (1, len(x)), "t has {} entries, but the batch has {} images", len(t), len(x))
    if readable(t):
        check(t.min() >= 0, "t must not be negative")
        check(table[t].isfinite().all(), "not finite at this t; t = 0 is the clean image: use 1..T")
    coefficient = table[t].to(torch.promote_types(x.dtype, torch.float32))
    # Only CUDA may copy asynchronously: Apple GPUs can read freed memory (pytorch #189690).
    coefficient = coefficient.to(x.device, non_blocking=x.is_cuda)
    return coefficient.reshape((-1,) + (1,) * (x.ndim - 1))


def same_t(t, x):
    """Return timestep t for each image of x (B, ...): an int64 tensor (B,) on x's device."""
    return torch.full((len(x),), t, device=x.device)


class Diffusion:
    """The diffusion process defined by beta[0..T], and its closed forms.

    beta, alpha, alpha_bar and beta_tilde are float64 tables [0..T] on the CPU. alpha_bar_s[t] is
    alpha_bar at s = t - 1; it and beta_tilde are nan at t = 0, which has no reverse step. x0, xt and
    eps are float tensors of one shape (B, ...), and t is an int or an int64 tensor (B,). Raises
    ValueError if beta is not a valid table.
    """

    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu").detach().clone()
        check(beta.ndim == 1 and len(beta) > 1, f"need a table beta[0..T], got {tuple(beta.shape)}")
        check(beta[0] == 0, "beta[0] must be 0 (t = 0 is the clean image): F.pad(beta, (1, 0))")
        in_range = (beta[1:] < 1) & (1 - beta[1:] < 1)  # 1 - beta_t must not round to 1
        check(in_range.all(), "need 0 < beta_t < 1 for t in 1..T")
        self.T = len(beta) - 1
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = self.alpha.cumprod(0)
        # x0_from_eps divides by sqrt(alpha_bar_t) in float32.
        too_small = self.alpha_bar[-1].sqrt() < 1e-37
        check(not too_small, "alpha_bar_T is too small for float32: beta or T is too large")
        self.alpha_bar_s = F.pad(self.alpha_bar[:-1], (1, 0), value=math.nan)
        self.beta_tilde = beta * (1 - self.alpha_bar_s) / (1 - self.alpha_bar)  # eq. 7

    # --- 2. Forward process -----------------------------------------------------------------------

    def q_sample(self, x0, t, eps):
        """eq. 4: xt ~ q(xt | x0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I), with noise eps."""
        check_same_shape(x0=x0, eps=eps)
        return at(self.alpha_bar.sqrt(), t, x0) * x0 + at((1 - self.alpha_bar).sqrt(), t, x0) * eps

    # --- 3. Posterior -----------------------------------------------------------------------------

    def posterior_mean(self, x0, xt, t):
        """eq. 7: mu_tilde_t(xt, x0), the mean of q(x_{t-1} | xt, x0); its variance is beta_tilde."""
        check_same_shape(x0=x0, xt=xt)
        c_0 = self.alpha_bar_s.sqrt() * self.beta / (1 - self.alpha_bar)
        c_t = self.alpha.sqrt() * (1 - self.alpha_bar_s) / (1 - self.alpha_bar)
        return at(c_0, t, x0) * x0 + at(c_t, t, xt) * xt

    # --- 4. Parametrisation -----------------------------------------------------------------------

    def x0_from_eps(self, xt, t, eps):
        """eq. 15: the predicted x0, which is eq. 4 solved for x0."""
        check_same_shape(xt=xt, eps=eps)
        noise = at((1 - self.alpha_bar).sqrt(), t, xt) * eps
        return (xt - noise) / at(self.alpha_bar.sqrt(), t, xt)

    def eps_from_x0(self, xt, t, x0):
        """Return the noise that x0 implies, which is eq. 4 solved for eps. t in 1..T."""
        check_same_shape(xt=xt, x0=x0)
        noise = xt - at(self.alpha_bar.sqrt(), t, xt) * x0
        return at((1 - self.alpha_bar).rsqrt(), t, xt) * noise  # infinite at t = 0, so at() raises

    def p_mean(self, xt, t, eps, *, clip=True):
        """eq. 11: mu_theta(xt, t), the mean of p(x_{t-1} | xt), as eq. 7 at the predicted x0."""
        x0 = self.x0_from_eps(xt, t, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
        return self.posterior_mean(x0, xt, t)


# --- 5. Simple loss -------------------------------------------------------------------------------


def loss_simple(model, d, x0, t=None, eps=None):
    """eq. 14, Algorithm 1: || eps - model(xt, t) ||^2, averaged over the batch and all dimensions.

    By default t, int64 (B,), is uniform in 1..T, and eps is N(0, I) in the shape of x0.
    """
    if t is None:
        t = torch.randint(1, d.T + 1, (len(x0),), device="cpu")
    if eps is None:
        eps = torch.randn_like(x0)
    t = t.cpu()  # once, because at() would wait for a GPU each time
    check(t.shape == x0.shape[:1], "need t {}, got {}", tuple(x0.shape[:1]), tuple(t.shape))
    check(not readable(t) or t.min() > 0, "t must be in 1..T: t = 0 is the clean image")
    xt = d.q_sample(x0, t, eps)
    eps_theta = model(xt, t.to(x0.device, non_blocking=x0.is_cuda))
    check_same_shape(eps=eps, prediction=eps_theta)
    return F.mse_loss(eps_theta.to(eps.dtype), eps)  # under autocast, eps_theta may be bfloat16


# --- 6. Ancestral sampling ------------------------------------------------------------------------


def ancestral_step(d, xt, t, eps, sigma2=None, *, clip=True, noise=torch.randn_like):
    """Algorithm 2, one step: x_{t-1} ~ p(x_{t-1} | xt), from the predicted noise eps. t is an int.

    sigma2: table [0..T] of variances, d.beta (the default) or d.beta_tilde (sec. 3.2).
    noise: a function that returns noise shaped like its argument. It is not called at t = 1.
    """
    t = index(t)
    sigma2 = d.beta if sigma2 is None else sigma2
    check(sigma2.shape == d.beta.shape, f"need a table sigma2[0..{d.T}], got {tuple(sigma2.shape)}")
    valid = not readable(sigma2) or (sigma2[1:] >= 0).all()
    check(valid, "sigma2 must not be negative or nan")
    mean = d.p_mean(xt, t, eps, clip=clip)
    if t == 1:
        return mean
    z = noise(xt)
    check_same_shape(xt=xt, noise=z)
    return mean + at(sigma2.sqrt(), t, xt) * z


@torch.no_grad()
def sample_ancestral(
    model, d, xt, sigma2=None, *, start=None, clip=True, noise=torch.randn_like, on_step=None
):
    """Algorithm 2: from xt (B, ...) ~ N(0, I) at t = T to x0. See ancestral_step for the options.

    With start < T, xt is an image with noise at t = start. on_step(s, x_s) is called after each step.
    """
    start = d.T if start is None else start
    check(0 <= start <= d.T, f"start must be in 0..{d.T}, got {start}")
    for t in range(start, 0, -1):
        eps = model(xt, same_t(t, xt))
        xt = ancestral_step(d, xt, t, eps, sigma2, clip=clip, noise=noise)
        if on_step:
            on_step(t - 1, xt)
    return xt


# --- 7. DDIM sampling -----------------------------------------------------------------------------


def ddim_timesteps(T, n):
    """Return n of the timesteps 1..T, evenly spaced and ending at T, for sample_ddim."""
    check(1 <= n <= T, f"cannot choose {n} different timesteps out of {T}")
    return [T * i // n for i in range(1, n + 1)]


def timestep_pairs(T, timesteps):
    """Return the pairs (s, t) of neighbours in 0 and the increasing timesteps, as ints."""
    timesteps = [index(t) for t in timesteps]
    pairs = list(zip([0, *timesteps], timesteps))
    check(len(pairs) > 0, "need at least one timestep")
    check(all(s < t <= T for s, t in pairs), f"timesteps must increase in 1..{T}, got {timesteps}")
    return pairs


def ddim_step(d, xt, t, s, eps, *, eta=0.0, clip=True, noise=torch.randn_like):
    """DDIM eq. 12, DDIM eq. 16: x_s from xt and the predicted noise. DDIM's alpha is our alpha_bar.

    t and s are ints. eta in [0, 1] scales sigma; eta = 0 adds no noise. clip also
    replaces eps by the noise that belongs to the clipped x0; DDIM's own code does not clip.
    With eta = 0 and clip=False, steps with s > t encode an image as noise, from t = 1 up to s = T.
    """
    t = index(t)
    s = index(s)
    check(0 <= eta <= 1, f"eta must be in [0, 1], got {eta}")
    check(1 <= t <= d.T, f"t must be in 1..{d.T}, got {t}")
    check(0 <= s <= d.T, f"s must be in 0..{d.T}, got {s}")
    check(s < t or eta == 0, f"eta > 0 needs s < t, got s = {s} and t = {t}")
    x0 = d.x0_from_eps(xt, t, eps)
    eps = eps.to(x0.dtype)  # under autocast, eps may be bfloat16
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = d.eps_from_x0(xt, t, x0)  # the noise that belongs to the clipped x0
    alpha_bar_t = d.alpha_bar[t].item()
    alpha_bar_s = d.alpha_bar[s].item()
    sigma = eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))
    sigma = sigma * math.sqrt(max(0.0, 1 - alpha_bar_t / alpha_bar_s))  # below 0 for s > t
    direction = math.sqrt(max(0.0, 1 - alpha_bar_s - sigma**2))  # below 0 only by rounding
    mean = math.sqrt(alpha_bar_s) * x0 + direction * eps
    if sigma == 0:
        return mean
    z = noise(xt)
    check_same_shape(xt=xt, noise=z)
    return mean + sigma * z


@torch.no_grad()
def sample_ddim(
    model, d, xt, timesteps, *, eta=0.0, clip=True, noise=torch.randn_like, on_step=None
):
    """DDIM: from xt (B, ...) ~ N(0, I) at the last of the increasing timesteps to x0.

    It visits them in reverse, and ends at t = 0. on_step(s, x_s) is called after each step. With
    eta = 1 and timesteps 1..T, this is Algorithm 2 with sigma2 = beta_tilde.
    """
    for s, t in reversed(timestep_pairs(d.T, timesteps)):
        eps = model(xt, same_t(t, xt))
        xt = ddim_step(d, xt, t, s, eps, eta=eta, clip=clip, noise=noise)
        if on_step:
            on_step(s, xt)
    return xt


# --- 8. Network -----------------------------------------------------------------------------------


def timestep_embedding(t, dim):
    """(B,) -> (B, dim): sines, then cosines, of t / 10000^(i / (dim/2 - 1)), i = 0 .. dim/2 - 1."""
    check(dim > 2 and dim % 2 == 0, f"dim must be even and at least 4, got {dim}")
    i = torch.arange(dim // 2, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / (dim // 2 - 1) * i)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def init(layer, gain=1.0):
    """Initialise a layer: weights Xavier-uniform, biases zero.

    With gain=1e-5 in its last layer, a residual block starts as its shortcut. The network starts
    with eps near 0, so its first loss is about 1.
    """
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in, c_out, size=3, gain=1.0):
    """Return a convolution with stride 1 that keeps height and width."""
    return init(nn.Conv2d(c_in, c_out, size, padding=size // 2), gain)


def norm(groups, c):
    """Return a GroupNorm: each group of c / groups channels of an image gets mean 0, variance 1."""
    return nn.GroupNorm(groups, c, eps=1e-6)


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, emb_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, emb_dim, dropout, groups):
        super().__init__()
        self.norm1 = norm(groups, c_in)
        self.conv1 = conv(c_in, c_out)
        self.emb = init(nn.Linear(emb_dim, c_out))
        self.norm2 = norm(groups, c_out)
        self.conv2 = conv(c_out, c_out, gain=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, size=1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = h + self.emb(F.silu(emb))[:, :, None, None]  # one number per image and channel
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """x (B, C, H, W) -> (B, C, H, W): self-attention over the H W pixels, with one head."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q = conv(c, c, size=1)
        self.k = conv(c, c, size=1)
        self.v = conv(c, c, size=1)
        self.out = conv(c, c, size=1, gain=1e-5)

    def forward(self, x):
        h = self.norm(x)
        q = self.q(h).flatten(2).mT[:, None]  # (B, 1, H W, C): one head
        k = self.k(h).flatten(2).mT[:, None]
        v = self.v(h).flatten(2).mT[:, None]
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v
        h = h[:, 0].mT.reshape(x.shape)  # (B, C, H, W)
        return x + self.out(h)


class Stack(nn.Sequential):
    """Layers in sequence; the ResBlocks among them also get emb."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """App. B: xt (B, in_channels, H, W), t (B,) in 1..T -> eps (B, out_channels, H, W).

    The defaults are the paper's CIFAR-10 network. Its 256x256 network (113,673,219 parameters) has
    mult=(1, 1, 2, 2, 4, 4), attention=(4,), dropout=0.
    - Level i has ch * mult[i] channels, height H / 2^i and width W / 2^i, so 2^(levels - 1) must
      divide H and W: pad 28x28 to 32x32.
    - It has `blocks` residual blocks on the way down, and one more on the way up: one per skip.
    - It has self-attention after each block if i is in `attention`.
    num_classes adds labels y (B,) in 0..num_classes; y = num_classes, the default, is "no label".
    .to(memory_format=torch.channels_last) is faster: fused attention needs this layout.
    """

    def __init__(self, in_channels=3, out_channels=None, ch=128, mult=(1, 2, 2, 2), blocks=2,
                 attention=(1,), dropout=0.1, groups=32, num_classes=None):  # fmt: skip
        super().__init__()
        levels = range(len(mult))
        check(set(attention) <= set(levels), f"attention must list levels in 0..{len(mult) - 1}")
        self.ch = ch
        self.num_classes = num_classes
        emb_dim = 4 * ch
        self.time = nn.Sequential(
            init(nn.Linear(ch, emb_dim)), nn.SiLU(), init(nn.Linear(emb_dim, emb_dim))
        )
        self.label = nn.Embedding(num_classes + 1, emb_dim) if num_classes else None

        def block(c_in, c_out):
            return ResBlock(c_in, c_out, emb_dim, dropout, groups)

        def stage(level, c_in):
            layers = [block(c_in, ch * mult[level])]
            if level in attention:
                layers.append(Attention(ch * mult[level], groups))
            return Stack(*layers)

        self.conv_in = conv(in_channels, ch)
        c = ch  # channels of h, as in forward
        skip_channels = [ch]  # of the skips, in the order in which forward stores them
        self.down = nn.ModuleList()
        for level in levels:
            for _ in range(blocks):
                self.down.append(stage(level, c))
                c = ch * mult[level]
                skip_channels.append(c)
            if level < levels[-1]:
                pad = nn.ZeroPad2d((0, 1, 0, 1))  # TensorFlow's SAME: right and bottom only
                self.down.append(Stack(pad, init(nn.Conv2d(c, c, 3, stride=2))))
                skip_channels.append(c)
        self.mid = Stack(block(c, c), Attention(c, groups), block(c, c))
        self.up = nn.ModuleList()
        for level in reversed(levels):
            for _ in range(blocks + 1):
                self.up.append(stage(level, c + skip_channels.pop()))
                c = ch * mult[level]
            if level > 0:
                # Nearest-neighbour upsampling, in the last stage because it takes no skip.
                self.up[-1].extend([nn.Upsample(scale_factor=2), conv(c, c)])
        self.norm_out = norm(groups, c)
        self.conv_out = conv(c, out_channels or in_channels, gain=1e-5)

    def embed(self, xt, t, y):
        """Return the embedding (B, 4 * ch) of t and y, in the dtype of xt."""
        check(t.dtype == torch.int64, f"t must be int64 in 1..T, got {t.dtype}")
        check(t.shape == xt.shape[:1], "need t {}, got {}", tuple(xt.shape[:1]), tuple(t.shape))
        check(not readable(t) or t.min() > 0, "t must be in 1..T: t = 0 is the clean image")
        # Counted from 0, as in the authors' code; in float64 for a float64 network.
        position = (t - 1).to(torch.promote_types(xt.dtype, torch.float32))
        emb = self.time(timestep_embedding(position, self.ch).to(xt.dtype))
        if self.label is None:
            check(y is None, "labels y need a network with num_classes")
            return emb
        if y is None:
            y = torch.full_like(t, self.num_classes)
        check(y.shape == t.shape, "need labels y {}, got {}", tuple(t.shape), tuple(y.shape))
        # On a GPU, wrong labels are only noticed by a later call, with a device-side assert.
        in_range = not readable(y) or (y.min() >= 0 and y.max() <= self.num_classes)
        check(in_range, f"labels y must be in 0..{self.num_classes}")
        return emb + self.label(y)

    def forward(self, xt, t, y=None):
        emb = self.embed(xt, t, y)  # (B, 4 * ch)
        skips = [self.conv_in(xt)]  # (B, ch, H, W)
        for stage in self.down:  # a strided convolution is a stage too; its output is also a skip
            skips.append(stage(skips[-1], emb))
        h = self.mid(skips[-1], emb)  # (B, ch * mult[-1], ...): the smallest height and width
        for stage in self.up:
            h = torch.cat([h, skips.pop()], dim=1)
            h = stage(h, emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, H, W)
