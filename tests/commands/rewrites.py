"""Rewrites of our files: some are equal in mathematics or a matter of taste, and some are not.

Each is code that is appended to a file and defines some of it anew, with tests of the specification that once
rejected it, or that must reject it: test file, test and arguments.
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
NETWORK = [("test_8_network", "test_appB_network_computes_what_the_numpy_network_computes", how)
           for how in ({}, {"mult": (2, 1, 3), "attention": (1,), "blocks": 2, "groups": 2})]  # fmt: skip
SOFTMAX = "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"
ATTENTION = [*NETWORK, ("test_8_network", SOFTMAX, 1.0)]
RESIDUAL = "test_residual_block_is_norm_silu_conv_twice_around_the_embedding"
BLOCK = [*NETWORK, ("test_8_network", RESIDUAL, 8, 12, 1.0),
         ("test_8_network", "test_dropout_acts_just_before_the_last_convolution_of_a_residual_block"),
         ("test_8_network", "test_appB_dropout_is_a_tenth_by_default")]  # fmt: skip
BOUND = [
    ("test_9_bound", "test_eq5_with_exact_eps_sigma2_beta_costs_the_kl_of_the_two_variances"),
    ("test_9_bound",
     "test_eq5_each_kl_term_compares_the_posterior_with_the_models_step_at_the_same_xt"),
    ("test_9_bound", "test_eq5_every_variance_is_evaluated_at_the_one_sample_of_each_xt"),
    ("test_contract", "test_memory_does_not_grow_along_a_run", "bound_terms"),
    ("test_randomness", "test_every_step_has_new_standard_normal_noise", "bound_terms", "given"),
]  # fmt: skip
ANY_SHAPE = "test_eq5_terms_are_means_over_all_pixels_of_an_image_of_any_shape"
ONE_TERM = "test_an_output_that_is_nan_at_one_t_makes_its_term_of_the_bound_nan_and_no_other"
ANY_NOISE = "test_noise_may_be_any_function_of_a_tensor_shaped_like_the_images"
LEARNED_BOUND = [
    ("test_improved",
     "test_bound_has_a_row_for_each_fixed_variance_and_one_for_the_learned_at_the_same_xt"),
    ("test_improved", "test_bound_with_learned_variances_clips_and_rejects_as_the_other"),
    ("test_improved", "test_bound_with_learned_variances_clips_x0_at_t_1_too"),
    ("test_contract", ONE_TERM, "improved.bound_terms", 4),
    ("test_randomness", ANY_NOISE, "improved.bound_terms"),
]  # fmt: skip
LOGARITHMS = [
    ("test_2_forward", "test_eq4_alpha_bar_is_the_signal_that_the_chain_of_eq2_keeps"),
    ("test_2_forward", "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
    ("test_3_posterior",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("test_3_posterior", "test_eq7_posterior_mean_keeps_the_marginal_mean"),
    ("test_4_parametrisation", "test_eq11_p_mean_is_the_printed_formula"),
    ("test_4_parametrisation",
     "test_eq12_an_error_of_eps_moves_the_mean_by_the_weight_of_eq12"),
    ("test_improved",
     "test_iddpm_eq19_betas_are_those_of_the_steps_between_the_timesteps_kept"),
]  # fmt: skip
PARAMETRISATION = [
    ("test_4_parametrisation", "test_eq15_x0_from_eps_inverts_q_sample"),
    ("test_4_parametrisation", "test_eq4_eps_from_x0_inverts_q_sample"),
    ("test_4_parametrisation", "test_eq15_x0_from_eps_is_as_accurate_as_float32_allows"),
]
NOISE = [
    ("test_contract", "test_ambient_state_changes_no_formula", "sample_ancestral"),
    ("test_contract", "test_every_option_has_an_effect_of_its_own", "ddpm.sample_ancestral"),
    ("test_inputs", "test_images_may_have_any_number_of_dimensions", "sample_ancestral", (3, 2, 5)),
    ("test_6_ancestral", "test_algorithm2_returns_the_only_image_of_the_data"),
]

# By name: the file, the code and the tests that accept it.
EQUAL = {
    "queries, keys and values in one convolution": ("ddpm", """
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
    "queries, keys and values by Linear layers": ("ddpm", """
class Attention(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.gn, self.to_out = norm(groups, c), init(nn.Linear(c, c), 1e-5)
        self.to_q, self.to_k, self.to_v = (init(nn.Linear(c, c)) for _ in range(3))

    def forward(self, x):
        h = self.gn(x).flatten(2).mT
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).mT.reshape(x.shape)
""", [*ATTENTION, ("test_8_network", "test_network_starts_with_xavier_uniform_weights_and_zero_biases")]),
    "a residual block written differently, with its shortcut first": ("ddpm", """
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
    "group norms and dropout by hand": ("ddpm", """
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
    "the network built from its end to its beginning": (
        "ddpm", REORDERED.format(order="[::-1]"), NETWORK),
    "the time embedding built last": ("ddpm", REORDERED.format(order="[:1]"), NETWORK),
    "the middle built first": (
        "ddpm", REORDERED.format(order="[:3] + list(self._modules)[4:]"), NETWORK),
    "blocks and attention under other names": ("ddpm", """
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
    "sinusoids in float64": ("ddpm", """
def timestep_embedding(t, dim):
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float64)
    angle = t[:, None] * torch.exp(-math.log(10000) / (dim // 2 - 1) * i)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
""", [("test_8_network", "test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator")]),
    "a frozen table of sinusoids, registered as a parameter": ("ddpm", """
construct, embed = UNet.__init__, timestep_embedding
def with_table(self, *args, **how):
    construct(self, *args, **how)
    self.table = nn.Parameter(embed(torch.arange(1000), self.ch), requires_grad=False)
UNet.__init__ = with_table
""", [*NETWORK, ("test_contract", "test_arguments_stay_unchanged", "UNet"),
      ("test_gradients", "test_gradients_of_the_network_are_the_slopes_of_its_outputs", "net"),
      ("test_8_network", "test_every_parameter_gets_a_gradient")]),
    "eq. 15 by the tables sqrt(1 / alpha_bar) and sqrt(1 / alpha_bar - 1)": ("ddpm", """
def reciprocal(self, xt, t, eps):
    a = self.alpha_bar
    return at((1 / a).sqrt(), t, xt) * xt - at((1 / a - 1).sqrt(), t, xt) * eps
def reciprocal_eps(self, xt, t, x0):
    a = self.alpha_bar
    return (at((1 / a).sqrt(), t, xt) * xt - x0) / at((1 / a - 1).sqrt(), t, xt)
Diffusion.x0_from_eps, Diffusion.eps_from_x0 = reciprocal, reciprocal_eps
""", PARAMETRISATION),
    "eq. 11 as printed where nothing is clipped": ("ddpm", """
by_x0 = Diffusion.p_mean
def printed(self, xt, t, eps, clip=True):
    if clip:
        return by_x0(self, xt, t, eps)
    c = self.beta / (1 - self.alpha_bar).sqrt()
    return (xt - at(c, t, xt) * eps) / at(self.alpha.sqrt(), t, xt)
Diffusion.p_mean = printed
""", [("test_4_parametrisation", test) for test in (
        "test_clipping_changes_nothing_while_the_predicted_x0_is_an_image",
        "test_eq11_p_mean_is_the_printed_formula", "test_eq11_is_eq7_at_the_predicted_x0")]),
    "tables that are buffers of a module": ("ddpm", """
Plain = Diffusion
class Diffusion(nn.Module):
    def __init__(self, beta):
        super().__init__()
        d = Plain(beta)
        self.T = d.T
        for name, table in vars(d).items():
            if torch.is_tensor(table):
                self.register_buffer(name, table)
    q_sample, posterior_mean, x0_from_eps = Plain.q_sample, Plain.posterior_mean, Plain.x0_from_eps
    eps_from_x0, p_mean = Plain.eps_from_x0, Plain.p_mean
""", [("test_2_forward", "test_tables_and_the_bound_are_on_the_cpu_whatever_the_default_device")]),
    "a generator argument instead of noise": ("ddpm", """
with_noise = sample_ancestral
def sample_ancestral(model, d, xt, sigma2=None, *, start=None, clip=True, generator=None, on_step=None):
    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return with_noise(model, d, xt, sigma2, start=start, clip=clip, noise=noise, on_step=on_step)
""", NOISE),
    "noise from the global generator only": ("ddpm", """
with_noise = sample_ancestral
def sample_ancestral(model, d, xt, sigma2=None, *, start=None, clip=True, on_step=None):
    return with_noise(model, d, xt, sigma2, start=start, clip=clip, on_step=on_step)
""", NOISE),
    "names and positions that this project used before": ("ddpm", """
new_ddim = sample_ddim
def ddim_grid(T, n):
    return ddim_timesteps(T, n)
def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return new_ddim(model, d, xt, grid, eta=eta, clip=clip, noise=noise, on_step=on_step)
""", [("test_7_ddim", "test_ddim_returns_the_only_image_of_the_data_for_any_timesteps_and_eta"),
      ("test_contract", "test_every_option_has_an_effect_of_its_own", "ddpm.sample_ddim")]),
    "a KL from logarithms": ("likelihood", """
def normal_kl(mean_1, var_1, mean_2, var_2):
    log_1, log_2 = torch.log(torch.as_tensor(var_1)), torch.log(torch.as_tensor(var_2))
    return 0.5 * (log_2 - log_1 - 1 + torch.exp(log_1 - log_2) + (mean_1 - mean_2) ** 2 * torch.exp(-log_2))
""", [("test_9_bound", "test_kl_is_not_negative_and_zero_for_equal_distributions")]),
    "samplers that return a copy": ("ddpm", """
ancestral, ddim = sample_ancestral, sample_ddim
def sample_ancestral(*args, **how):
    return ancestral(*args, **how).clone()
def sample_ddim(*args, **how):
    return ddim(*args, **how).clone()
""", [("test_6_ancestral", "test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0"),
      ("test_7_ddim", "test_ddim_calls_the_model_once_at_each_of_the_timesteps_and_ends_at_0", [1, 4])]),
    "a call of the model for each table of variances": ("likelihood", """
def bound_terms(model, d, x0, variances, *, clip=True, noise=torch.randn_like, together=bound_terms):
    z = [noise(x0) for _ in range(d.T)]
    rows = []
    for sigma2 in variances:
        left = list(z)
        rows.append(together(model, d, x0, [sigma2], clip=clip, noise=lambda x: left.pop(0)))
    return torch.cat(rows)
""", BOUND),
    "all t of the bound in one call of the model": ("likelihood", """
@torch.no_grad()
def bound_terms(model, d, x0, variances, *, clip=True, noise=torch.randn_like, one_by_one=bound_terms):
    T, B = d.T, len(x0)
    z = [noise(x0) for _ in range(T)]
    t = torch.arange(1, T + 1, device=x0.device).repeat_interleave(B)
    xt = d.q_sample(x0.repeat(T, *[1] * (x0.ndim - 1)), t, torch.cat(z))
    eps = model(xt, t).split(B)
    return one_by_one(lambda xt, t: eps[int(t[0]) - 1], d, x0, variances, clip=clip,
                      noise=lambda x: z.pop(0))
""", BOUND),
    "all t of the bound in one call of everything": ("likelihood", """
@torch.no_grad()
def bound_terms(model, d, x0, variances, *, clip=True, noise=torch.randn_like):
    check_levels(x0)
    T, B = d.T, len(x0)
    t = torch.arange(1, T + 1, device=x0.device).repeat_interleave(B)
    x = x0.repeat(T, *[1] * (x0.ndim - 1))
    xt = d.q_sample(x, t, noise(x))
    mean = d.p_mean(xt, t, model(xt, t), clip=clip)
    tables = [with_sigma_1(d, sigma2) for sigma2 in variances]
    rows = [bound_term(d, x, xt, t, mean, at(sigma2, t, x)).reshape(T, B).T for sigma2 in tables]
    prior = prior_term(d, x0).expand(len(rows), B)[..., None]
    return torch.cat([torch.stack(rows), prior], dim=2).cpu().double()
""", [*BOUND[:3], *(("test_9_bound", ANY_SHAPE, shape, size)
                   for shape in ((3, 2, 6, 4), (2, 5)) for size in (1.0, 10.0)),
      ("test_randomness", ANY_NOISE, "bound_terms"),
      *(("test_contract", ONE_TERM, "bound_terms", t) for t in (1, 4))]),
    "all t of the learned bound in one call of everything": ("improved", """
@torch.no_grad()
def bound_terms(model, d, x0, variances=(), *, clip=True, noise=torch.randn_like):
    likelihood.check_levels(x0)
    T, B = d.T, len(x0)
    t = torch.arange(1, T + 1, device=x0.device).repeat_interleave(B)
    x = x0.repeat(T, *[1] * (x0.ndim - 1))
    xt = d.q_sample(x, t, noise(x))
    eps, v = split_output(model(xt, t), xt)
    mean = d.p_mean(xt, t, eps, clip=clip)
    sigma2s = [at(likelihood.with_sigma_1(d, sigma2), t, x) for sigma2 in variances]
    rows = []
    for sigma2 in [*sigma2s, variance(d, t, v)]:
        rows.append(likelihood.bound_term(d, x, xt, t, mean, sigma2).reshape(T, B).T)
    prior = likelihood.prior_term(d, x0).expand(len(rows), B)[..., None]
    return torch.cat([torch.stack(rows), prior], dim=2).cpu().double()
""", LEARNED_BOUND),
    "tables from logarithms": ("ddpm", """
construct = Diffusion.__init__
def logarithmic(self, beta):
    construct(self, beta)
    log_alpha_bar = torch.log1p(-self.beta).cumsum(0)
    self.alpha_bar = log_alpha_bar.exp()
    self.one_minus = -torch.expm1(log_alpha_bar)
    self.alpha_bar_s = F.pad(self.alpha_bar[:-1], (1, 0), value=math.nan)
    before = F.pad(self.one_minus[:-1], (1, 0), value=math.nan)
    self.beta_tilde = self.beta * before / self.one_minus
def q_sample(self, x0, t, eps):
    check_same_shape(x0=x0, eps=eps)
    return at(self.alpha_bar.sqrt(), t, x0) * x0 + at(self.one_minus.sqrt(), t, x0) * eps
def posterior_mean(self, x0, xt, t):
    check_same_shape(x0=x0, xt=xt)
    before = F.pad(self.one_minus[:-1], (1, 0), value=math.nan)
    c_0 = self.alpha_bar_s.sqrt() * self.beta / self.one_minus
    c_t = self.alpha.sqrt() * before / self.one_minus
    return at(c_0, t, x0) * x0 + at(c_t, t, xt) * xt
def x0_from_eps(self, xt, t, eps):
    check_same_shape(xt=xt, eps=eps)
    return (xt - at(self.one_minus.sqrt(), t, xt) * eps) / at(self.alpha_bar.sqrt(), t, xt)
def eps_from_x0(self, xt, t, x0):
    check_same_shape(xt=xt, x0=x0)
    return at(self.one_minus.rsqrt(), t, xt) * (xt - at(self.alpha_bar.sqrt(), t, xt) * x0)
Diffusion.__init__, Diffusion.q_sample, Diffusion.posterior_mean = logarithmic, q_sample, posterior_mean
Diffusion.x0_from_eps, Diffusion.eps_from_x0 = x0_from_eps, eps_from_x0
""", LOGARITHMS),
    "the bound from T down to 1": ("likelihood", """
@torch.no_grad()
def bound_terms(model, d, x0, variances, *, clip=True, noise=torch.randn_like, upwards=bound_terms):
    z, eps = {}, {}
    for t in range(d.T, 0, -1):
        z[t] = noise(x0)
        eps[t] = model(d.q_sample(x0, t, z[t]), same_t(t, x0))
    left = [z[t] for t in range(1, d.T + 1)]
    return upwards(lambda xt, t: eps[int(t[0])], d, x0, variances, clip=clip,
                   noise=lambda x: left.pop(0))
""", BOUND),
    "the bound in the file of ddpm.py": ("ddpm", """
def normal_kl(mean_1, var_1, mean_2, var_2):
    return 0.5 * ((var_2 / var_1).log() + (var_1 + (mean_1 - mean_2) ** 2) / var_2 - 1)
""", [("test_9_bound", "test_kl_is_not_negative_and_zero_for_equal_distributions")]),
    "other exceptions": ("ddpm", """
def raising(method, exception):
    def checked(self, *args):
        try:
            return method(self, *args)
        except ValueError as error:
            raise exception(str(error)) from None
    return checked
Diffusion.__init__ = raising(Diffusion.__init__, AssertionError)
Diffusion.q_sample = raising(Diffusion.q_sample, TypeError)
""", [("test_rejections", "test_a_wrong_call_is_rejected", what)
      for what in ("t = -1", "noise of another shape", "beta_t = 1.5")]),
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
# By name: the code, a part of the failure's message, and the tests that reject it.
UNEQUAL = {
    "float32 tables": (TABLES, "float32's rounding", [
        ("test_2_forward", "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
        ("test_2_forward", "test_eq4_coefficients_are_computed_in_float64_and_rounded_once", 1),
        ("test_inputs", "test_float32_images_get_coefficients_that_are_computed_in_float64",
         "x0_from_eps", 1)]),
    "coefficients in half precision": (COEFFICIENTS, "", [
        ("test_2_forward", "test_eq4_half_precision_images_get_all_their_noise", torch.bfloat16)]),
    "float64 on a device that has none": (ON_THE_DEVICE, "float64 on the far device", [
        ("test_6_ancestral", "test_loss_samplers_and_bound_are_the_same_on_another_device")]),
}  # fmt: skip
