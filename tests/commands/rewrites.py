"""Rewrites of ddpm.py that are equal in mathematics, or a matter of taste, and three that are not.

Each is code that stands behind ddpm.py's own and defines some of it anew, with the tests of the
specification that once rejected it, or that must: a file, a test, and its arguments.
"""

import torch

REORDERED = """
construct = UNet.__init__
def reordered(self, *args, **how):
    construct(self, *args, **how)
    for name in list(self._modules){order}:
        self._modules[name] = self._modules.pop(name)
UNet.__init__ = reordered
"""
NETWORK = [("test_9_network", "test_appB_network_computes_what_the_numpy_network_computes", how)
           for how in ({}, {"mult": (2, 1, 3), "attention": (1,), "blocks": 2, "groups": 2})]  # fmt: skip
SOFTMAX = "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"
ATTENTION = [*NETWORK, ("test_9_network", SOFTMAX)]
RESIDUAL = "test_residual_block_is_norm_silu_conv_twice_around_the_embedding"
BLOCK = [*NETWORK, ("test_9_network", RESIDUAL, 8, 12),
         ("test_9_network", "test_dropout_acts_just_before_the_last_convolution_of_a_residual_block"),
         ("test_9_network", "test_appB_dropout_is_a_tenth_by_default")]  # fmt: skip
BOUND = [
    ("test_8_bound", test)
    for test in (
        "test_eq5_with_exact_eps_sigma2_beta_costs_the_kl_of_the_two_variances",
        "test_eq5_each_kl_term_compares_the_posterior_with_the_models_step_at_the_same_xt",
        "test_eq5_every_variance_is_judged_on_the_one_draw_of_each_xt",
        "test_bound_clips_x0_as_the_sampler_does",
    )
]

EQUAL = {
    "queries, keys and values in one convolution": ("""
class Attention(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.gn, self.qkv = norm(groups, c), conv(c, 3 * c, size=1)
        self.proj = conv(c, c, size=1, gain=1e-5)

    def forward(self, x):
        q, k, v = self.qkv(self.gn(x)).flatten(2).chunk(3, dim=1)
        share = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]), dim=-1)
        return x + self.proj(torch.einsum("bij,bcj->bci", share, v).reshape(x.shape))
""", ATTENTION),
    "queries, keys and values by Linear layers": ("""
class Attention(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.gn, self.to_out = norm(groups, c), init(nn.Linear(c, c), 1e-5)
        self.to_q, self.to_k, self.to_v = (init(nn.Linear(c, c)) for _ in range(3))

    def forward(self, x):
        h = self.gn(x).flatten(2).mT
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).mT.reshape(x.shape)
""", [*ATTENTION, ("test_9_network", "test_network_starts_with_xavier_uniform_weights_and_zero_biases")]),
    "a residual block in other words, its shortcut first": ("""
class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb_dim, dropout, groups):
        super().__init__()
        self.skip = nn.Identity() if c_in == c_out else conv(c_in, c_out, size=1)
        self.out = nn.Sequential(norm(groups, c_out), nn.SiLU(), nn.Dropout(dropout),
                                 conv(c_out, c_out, gain=1e-5))
        self.time = nn.Sequential(nn.SiLU(), init(nn.Linear(emb_dim, c_out)))
        self.enter = nn.Sequential(norm(groups, c_in), nn.SiLU(), conv(c_in, c_out))

    def forward(self, x, emb):
        skip = self.skip(x)
        return skip + self.out(self.enter(x) + self.time(emb)[:, :, None, None])
""", BLOCK),
    "group norms and dropout by hand": ("""
class Norm(nn.Module):
    def __init__(self, groups, c):
        super().__init__()
        self.groups = groups
        self.gamma, self.shift = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):
        h = x.reshape(len(x), self.groups, -1)
        h = (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        return h.reshape(x.shape) * self.gamma[:, None, None] + self.shift[:, None, None]

class Drop(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.rate = p

    def forward(self, x):
        return F.dropout(x, self.rate, self.training)

norm = Norm
construct = ResBlock.__init__
def with_drop(self, c_in, c_out, emb_dim, dropout, groups):
    construct(self, c_in, c_out, emb_dim, dropout, groups)
    self.dropout = Drop(dropout)
ResBlock.__init__ = with_drop
""", BLOCK),
    "the network built from its end to its beginning": (REORDERED.format(order="[::-1]"), NETWORK),
    "the time embedding built last": (REORDERED.format(order="[:1]"), NETWORK),
    "the middle built first": (REORDERED.format(order="[:3] + list(self._modules)[4:]"), NETWORK),
    "blocks and attention under other names": ("""
ResidualBlock, SelfAttention = ResBlock, Attention
class Stack(Stack):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResidualBlock) else layer(x)
        return x
construct = UNet.__init__
def without_names(self, *args, **how):
    globals().update(ResBlock=ResidualBlock, Attention=SelfAttention)
    construct(self, *args, **how)
    del globals()["ResBlock"], globals()["Attention"]
UNet.__init__ = without_names
del ResBlock, Attention
""", NETWORK),
    "sinusoids in float64": ("""
def timestep_embedding(t, dim):
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float64)
    angle = t[:, None] * torch.exp(-math.log(10000) / (dim // 2 - 1) * i)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
""", [("test_9_network", "test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator")]),
    "eq. 15 by the tables sqrt(1 / alpha_bar) and sqrt(1 / alpha_bar - 1)": ("""
def reciprocal(self, xt, t, eps):
    ab = self.alpha_bar
    return at((1 / ab).sqrt(), t, xt) * xt - at((1 / ab - 1).sqrt(), t, xt) * eps
Diffusion.x0_from_eps = reciprocal
""", [("test_4_parametrisation", test) for test in (
        "test_eq15_x0_from_eps_undoes_q_sample",
        "test_eq15_x0_from_eps_is_as_accurate_as_float32_allows")]),
    "eq. 11 as printed where nothing is clipped": ("""
by_x0 = Diffusion.p_mean
def printed(self, xt, t, eps, clip=True):
    if clip:
        return by_x0(self, xt, t, eps)
    c = self.beta / (1 - self.alpha_bar).sqrt()
    return (xt - at(c, t, xt) * eps) / at(self.alpha.sqrt(), t, xt)
Diffusion.p_mean = printed
""", [("test_4_parametrisation", test) for test in (
        "test_clipping_changes_nothing_while_x0_is_an_image", "test_eq11_p_mean_is_the_printed_formula",
        "test_eq11_is_eq7_at_the_x0_that_eps_implies")]),
    "tables that are buffers of a Module": ("""
Plain = Diffusion
class Diffusion(nn.Module):
    def __init__(self, beta):
        super().__init__()
        d = Plain(beta)
        self.T = d.T
        for name in ("beta", "alpha", "alpha_bar", "beta_tilde"):
            self.register_buffer(name, getattr(d, name))
    q_sample, posterior_mean, x0_from_eps = Plain.q_sample, Plain.posterior_mean, Plain.x0_from_eps
    eps_from_x0, p_mean = Plain.eps_from_x0, Plain.p_mean
""", [("test_2_forward", "test_tables_live_on_the_cpu_whatever_the_default_device")]),
    "a KL of logarithms": ("""
def normal_kl(mean_1, var_1, mean_2, var_2):
    log_1, log_2 = torch.log(torch.as_tensor(var_1)), torch.log(torch.as_tensor(var_2))
    return 0.5 * (log_2 - log_1 - 1 + torch.exp(log_1 - log_2) + (mean_1 - mean_2) ** 2 * torch.exp(-log_2))
""", [("test_8_bound", "test_kl_is_not_negative_and_zero_for_equal_distributions")]),
    "samplers that return a copy": ("""
ancestral, ddim = sample_ancestral, sample_ddim
def sample_ancestral(*args, **how):
    return ancestral(*args, **how).clone()
def sample_ddim(*args, **how):
    return ddim(*args, **how).clone()
""", [("test_6_ancestral", "test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0"),
      ("test_7_ddim", "test_ddim_asks_the_model_once_at_each_step_of_the_grid_and_ends_at_0", [1, 4])]),
    "a call of the model for each table of variances": ("""
def bound_terms(model, d, x0, variances, clip=True, generator=None, together=bound_terms):
    xts = [d.q_sample(x0, t, noise_like(x0, generator)) for t in range(1, d.T + 1)]
    noise = [d.eps_from_x0(xt, t, x0) for t, xt in enumerate(xts, 1)]
    def replay(x, _):
        return left.pop(0)
    rows, drawn = [], noise_like
    for sigma2 in variances:
        left = list(noise)
        globals()["noise_like"] = replay
        try:
            rows.append(together(model, d, x0, [sigma2], clip))
        finally:
            globals()["noise_like"] = drawn
    return torch.cat(rows)
""", BOUND),
    "all t of the bound in one call of the model": ("""
def bound_terms(model, d, x0, variances, clip=True, generator=None, one_by_one=bound_terms):
    T, B = d.T, len(x0)
    eps = [noise_like(x0, generator) for _ in range(T)]
    t = torch.arange(1, T + 1).repeat_interleave(B)
    said = model(d.q_sample(x0.repeat(T, *[1] * (x0.ndim - 1)), t, torch.cat(eps)), t).split(B)
    drawn = noise_like
    globals()["noise_like"] = lambda x, _: eps.pop(0)
    try:
        return one_by_one(lambda xt, t: said[int(t[0]) - 1], d, x0, variances, clip)
    finally:
        globals()["noise_like"] = drawn
""", BOUND),
    "refusals by AssertionError": ("""
def refuse(method, exception):
    def checked(self, *args):
        try:
            return method(self, *args)
        except (ValueError, AssertionError) as refusal:
            raise exception(str(refusal)) from None
    return checked
Diffusion.__init__, Diffusion.q_sample = (refuse(method, exception) for method, exception in (
    (Diffusion.__init__, AssertionError), (Diffusion.q_sample, TypeError)))
""", [("test_2_forward", "test_a_step_outside_0_T_is_refused"),
      ("test_2_forward", "test_images_and_noise_of_different_shapes_are_refused", "q_sample"),
      ("test_2_forward", "test_a_table_that_is_no_schedule_is_refused", [0, 1.5])]),
}  # fmt: skip

TABLES = """
construct = Diffusion.__init__
def rounded(self, beta):
    construct(self, beta)
    self.alpha_bar = self.alpha.float().cumprod(0).double()
Diffusion.__init__ = rounded
"""
COEFFICIENTS = """
def at(table, t, x):
    return table[torch.as_tensor(t).reshape(-1)].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
"""
ON_THE_DEVICE = """
def at(table, t, x):
    c = table.to(x.device)[torch.as_tensor(t, device="cpu").reshape(-1).to(x.device)]
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
"""
UNEQUAL = {  # each with what its failure says
    "float32 tables": (TABLES, "float32's rounding", [
        ("test_2_forward", "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
        ("test_2_forward", "test_eq4_coefficients_are_float64_arithmetic_rounded_once", 1)]),
    "coefficients kept in half precision": (COEFFICIENTS, "", [
        ("test_2_forward", "test_eq4_half_precision_images_lose_no_noise", torch.bfloat16)]),
    "float64 on a device that has none": (ON_THE_DEVICE, "float64 on the far device", [
        ("test_6_ancestral", "test_loss_samplers_and_bound_are_the_same_on_another_device")]),
}  # fmt: skip
