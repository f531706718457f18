"""The catalogue of mistakes: each is an edit of ddpm.py, and each must be killed by the test it names.

    python tests/mutants.py              all of them, in parallel; exit status 1 if one survives
    python tests/mutants.py padding      those with this text in their name
    python tests/mutants.py "in print"   the slips in print, named by the formula as printed

"seen" says where the mistake was found: a public project, "in print", or "plausible". A mutant counts
as killed only if its own test fails with a failed assertion, or with the very crash that the catalogue
foresees: a file that does not even run is no kill. (Projects: CompVis latent-diffusion, ControlNet,
diffusers, dome272, guided-diffusion, Ho's, improved-diffusion, labml, lucidrains, minDiffusion,
pytorch-ddpm of w86763777, tqch.)
"""

import contextlib
import io
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 300  # a mutant that takes longer hangs


@dataclass(frozen=True)
class Mutant:
    name: str
    seen: str
    old: str  # stands exactly once in ddpm.py
    new: str
    test: str
    crash: str = ""  # the exception that is the kill, where a crash is what the mistake comes to


CATALOGUE = [Mutant(*fields) for fields in (
    # 1. schedules
    ("beta_t = beta_1 + t (beta_T - beta_1) / T, read with t from 1", "in print; minDiffusion",
     "torch.linspace(beta_1, beta_T, T, dtype=torch.float64)",
     "torch.linspace(beta_1, beta_T, T + 1, dtype=torch.float64)[1:]",
     "test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps"),
    ("beta_t = beta_1 + t (beta_T - beta_1) / T, read with t from 0", "in print",
     "torch.linspace(beta_1, beta_T, T, dtype=torch.float64)",
     "torch.linspace(beta_1, beta_T, T + 1, dtype=torch.float64)[:-1]",
     "test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps"),
    ("linear: ends scaled by 1000 / T", "improved-diffusion, lucidrains",
     "torch.linspace(beta_1, beta_T, T, dtype=torch.float64)",
     "torch.linspace(beta_1 * 1000 / T, beta_T * 1000 / T, T, dtype=torch.float64)",
     "test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps"),
    ("linear: in the square roots", "diffusers (scaled_linear)",
     "torch.linspace(beta_1, beta_T, T, dtype=torch.float64)",
     "torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2",
     "test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps"),
    ("linear: float32, then cast", "w86763777",
     "torch.linspace(beta_1, beta_T, T, dtype=torch.float64)",
     "torch.linspace(beta_1, beta_T, T).double()",
     "test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps"),
    ("linear: beta_T = 0.01 by default", "plausible",
     "def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02)",
     "def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.01)",
     "test_sec4_linear_schedule_is_the_papers_by_default"),
    ("linear: padded on the wrong side", "lucidrains #18",
     "return F.pad(torch.linspace(beta_1, beta_T, T, dtype=torch.float64), (1, 0))",
     "return F.pad(torch.linspace(beta_1, beta_T, T, dtype=torch.float64), (0, 1))",
     "test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps"),
    ("cosine: not squared", "plausible",
     "(t / T + s) / (1 + s)) ** 2", "(t / T + s) / (1 + s))",
     "test_iddpm_eq17_cosine_schedule_makes_alpha_bar_a_squared_cosine"),
    ("cosine: no offset s in the denominator", "plausible",
     "(t / T + s) / (1 + s)) ** 2", "(t / T + s)) ** 2",
     "test_iddpm_eq17_cosine_schedule_makes_alpha_bar_a_squared_cosine"),
    ("cosine: pi instead of pi/2", "plausible",
     "torch.cos(math.pi / 2 * (t / T + s)", "torch.cos(math.pi * (t / T + s)",
     "test_iddpm_eq17_cosine_schedule_makes_alpha_bar_a_squared_cosine"),
    ("cosine: T + 1 steps", "plausible",
     "torch.cos(math.pi / 2 * (t / T + s)", "torch.cos(math.pi / 2 * (t / (T + 1) + s)",
     "test_iddpm_eq17_cosine_schedule_makes_alpha_bar_a_squared_cosine"),
    ("cosine: beta capped at 0.99", "plausible",
     "beta_max=0.999", "beta_max=0.99",
     "test_iddpm_eq17_cosine_schedule_has_the_papers_constants"),
    ("cosine: s = 0.08", "plausible",
     "s=0.008", "s=0.08", "test_iddpm_eq17_cosine_schedule_has_the_papers_constants"),
    ("exponential: the exponent is t / T", "plausible",
     "** torch.linspace(0, 1, T, dtype=torch.float64)",
     "** (torch.arange(1, T + 1, dtype=torch.float64) / T)",
     "test_exponential_schedule_goes_from_beta_1_to_beta_T_by_a_constant_factor"),
    ("exponential: from beta_T to beta_1", "plausible",
     "beta_1 * (beta_T / beta_1) **", "beta_T * (beta_1 / beta_T) **",
     "test_exponential_schedule_goes_from_beta_1_to_beta_T_by_a_constant_factor"),
    # 2. tables and forward process
    ("alpha_bar_0 is alpha_1", "CompVis #136, minDiffusion",
     "self.alpha_bar = self.alpha.cumprod(0)", "self.alpha_bar = self.alpha.roll(-1).cumprod(0)",
     "test_tables_run_from_0_to_T_and_begin_with_the_clean_image"),
    ("alpha_bar_t = prod_s alpha_t, for prod_s alpha_s", "in print",
     "self.alpha_bar = self.alpha.cumprod(0)",
     "self.alpha_bar = self.alpha ** torch.arange(len(beta))",
     "test_eq4_alpha_bar_is_what_the_chain_of_eq2_leaves_of_the_image"),
    ("alpha_bar is a sum", "plausible",
     "self.alpha_bar = self.alpha.cumprod(0)", "self.alpha_bar = 1 - self.beta.cumsum(0)",
     "test_eq4_alpha_bar_is_what_the_chain_of_eq2_leaves_of_the_image"),
    ("alpha_bar in float32", "diffusers, w86763777",
     "self.alpha_bar = self.alpha.cumprod(0)", "self.alpha_bar = self.alpha.float().cumprod(0).double()",
     "test_eq4_coefficients_are_float64_arithmetic_rounded_once"),
    ("alpha_bar without its last factor", "plausible",
     "self.alpha_bar = self.alpha.cumprod(0)",
     "self.alpha_bar = F.pad(self.alpha[:-1].cumprod(0), (1, 0), value=1.0)",
     "test_eq4_alpha_bar_is_what_the_chain_of_eq2_leaves_of_the_image"),
    ("the cast comes before the arithmetic", "diffusers #9004",
     "return at(ab.sqrt(), t, x0) * x0 + at((1 - ab).sqrt(), t, x0) * eps",
     "return at(ab.sqrt(), t, x0) * x0 + at((1 - ab.float()).sqrt(), t, x0) * eps",
     "test_eq4_coefficients_are_float64_arithmetic_rounded_once"),
    ("half precision: bf16 coefficients and sum", "diffusers (train_unconditional)",
     "table[t].to(torch.promote_types(x.dtype, torch.float32))", "table[t].to(x.dtype)",
     "test_eq4_half_precision_images_lose_no_noise"),
    ("half precision: 1 - alpha_bar from a bf16 table", "diffusers #9004",
     "return at(ab.sqrt(), t, x0) * x0 + at((1 - ab).sqrt(), t, x0) * eps",
     "return at(ab.sqrt(), t, x0) * x0 + at((1 - ab.to(x0.dtype)).double().sqrt(), t, x0) * eps",
     "test_eq4_half_precision_images_lose_no_noise"),
    ("q_sample: 1 - alpha_bar instead of its root", "plausible",
     "at((1 - ab).sqrt(), t, x0) * eps", "at(1 - ab, t, x0) * eps",
     "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
    ("q_sample: alpha_bar instead of its root", "plausible",
     "return at(ab.sqrt(), t, x0) * x0 +", "return at(ab, t, x0) * x0 +",
     "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
    ("q_sample: the noise of a single step, beta_t", "plausible",
     "at((1 - ab).sqrt(), t, x0) * eps", "at(self.beta.sqrt(), t, x0) * eps",
     "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
    ("q_sample: the tables of step t - 1", "diffusers, lucidrains (0-based)",
     "return at(ab.sqrt(), t, x0) * x0 + at((1 - ab).sqrt(), t, x0) * eps",
     "ab = ab.roll(1)\n        return at(ab.sqrt(), t, x0) * x0 + at((1 - ab).sqrt(), t, x0) * eps",
     "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
    ("q_sample: roots of the signal and the noise swapped", "plausible",
     "return at(ab.sqrt(), t, x0) * x0 + at((1 - ab).sqrt(), t, x0) * eps",
     "return at((1 - ab).sqrt(), t, x0) * x0 + at(ab.sqrt(), t, x0) * eps",
     "test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2"),
    ("one t for the whole batch: the first image's", "plausible",
     "c = table[t].to(", "c = table[t[:1]].to(",
     "test_eq4_q_sample_gives_each_image_its_own_t"),
    ("negative t wraps around to the end of the table", "MONAI #446",
     "assert len(t) in (1, len(x)) and 0 <= t.min() and t.max() < len(table)",
     "assert len(t) in (1, len(x)) and t.max() < len(table)",
     "test_a_step_outside_0_T_is_refused"),
    ("beta_T = 1 is accepted", "Ho's, tqch (jsd)",
     "(0 < beta[1:]) & (beta[1:] < 1)", "(0 < beta[1:]) & (beta[1:] <= 1)",
     "test_a_table_that_is_no_schedule_is_refused"),
    ("any beta is accepted", "lucidrains (T <= 20), diffusers",
     "(0 < beta[1:]) & (beta[1:] < 1)", "beta[1:] == beta[1:]",
     "test_a_table_that_is_no_schedule_is_refused"),
    # 3. posterior
    ("beta_tilde is beta", "labml, dome272",
     "self.beta_tilde = beta * (1 - ab_s) / (1 - ab)", "self.beta_tilde = beta * 1",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("beta_tilde: alpha_bar shifted the other way", "lucidrains #18",
     "self.beta_tilde = beta * (1 - ab_s)", "self.beta_tilde = beta * (1 - ab.roll(-1))",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("beta_tilde: the ratio upside down", "plausible",
     "self.beta_tilde = beta * (1 - ab_s) / (1 - ab)", "self.beta_tilde = beta * (1 - ab) / (1 - ab_s)",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("beta_tilde_1 is replaced by beta_tilde_2", "Ho's",
     "  # eq. 7; where roll wraps, it is 0/0 = nan\n", "\n        self.beta_tilde[1] = self.beta_tilde[min(2, self.T)] + beta[1] * (self.T < 2)\n",
     "test_eq7_at_t1_the_posterior_is_the_clean_image"),
    ("c_0: alpha_bar of step t", "plausible",
     "c_0, c_t = ab_s.sqrt() * self.beta", "c_0, c_t = ab.sqrt() * self.beta",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("c_0: no root", "plausible",
     "c_0, c_t = ab_s.sqrt() * self.beta", "c_0, c_t = ab_s * self.beta",
     "test_eq7_posterior_mean_keeps_the_marginal_mean"),
    ("c_t: no root of alpha_t", "a trial of this suite",
     "self.alpha.sqrt() * (1 - ab_s)", "self.alpha * (1 - ab_s)",
     "test_eq7_posterior_keeps_the_marginal_variance"),
    ("c_t: alpha_bar_t in place of alpha_t", "plausible",
     "self.alpha.sqrt() * (1 - ab_s)", "ab.sqrt() * (1 - ab_s)",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("c_t: 1 - alpha_bar of step t", "plausible",
     "self.alpha.sqrt() * (1 - ab_s) / (1 - ab)", "self.alpha.sqrt() * (1 - ab) / (1 - ab)",
     "test_eq7_posterior_mean_keeps_the_marginal_mean"),
    ("c_0 and c_t swapped", "plausible",
     "return at(c_0, t, x0) * x0 + at(c_t, t, xt) * xt", "return at(c_t, t, x0) * x0 + at(c_0, t, xt) * xt",
     "test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt"),
    ("alpha_bar_{t-1} at t = 1 is alpha_bar_1", "ControlNet #587, Stability-AI #345",
     "ab, ab_s = self.alpha_bar, self.alpha_bar.roll(1)\n",
     "ab, ab_s = self.alpha_bar, torch.cat([self.alpha_bar[1:2], self.alpha_bar[1:2], self.alpha_bar[1:-1]])\n",
     "test_eq7_at_t1_the_posterior_is_the_clean_image"),
    # 4. parametrisation
    ("x0 = (xt - (1 - alpha_t) / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)", "in print",
     "return (xt - at((1 - ab).sqrt(), t, xt) * eps) / at(ab.sqrt(), t, xt)",
     "return (xt - at(self.beta / (1 - ab).sqrt(), t, xt) * eps) / at(ab.sqrt(), t, xt)",
     "test_eq15_x0_from_eps_solves_eq4_of_the_chain"),
    ("x0: divided by alpha_bar instead of its root", "plausible",
     "* eps) / at(ab.sqrt(), t, xt)", "* eps) / at(ab, t, xt)",
     "test_eq15_x0_from_eps_undoes_q_sample"),
    ("x0: alpha_t in place of alpha_bar_t", "plausible",
     "* eps) / at(ab.sqrt(), t, xt)", "* eps) / at(self.alpha.sqrt(), t, xt)",
     "test_eq15_x0_from_eps_undoes_q_sample"),
    ("x0: the noise is added", "plausible",
     "return (xt - at((1 - ab).sqrt(), t, xt) * eps)", "return (xt + at((1 - ab).sqrt(), t, xt) * eps)",
     "test_eq15_x0_from_eps_undoes_q_sample"),
    ("x0: reciprocal form on float32 tables", "Ho's and its ports",
     "return (xt - at((1 - ab).sqrt(), t, xt) * eps) / at(ab.sqrt(), t, xt)",
     "ab = ab.float()\n        return at((1 / ab).sqrt(), t, xt) * xt - at((1 / ab - 1).sqrt(), t, xt) * eps",
     "test_eq15_x0_from_eps_is_as_accurate_as_float32_allows"),
    ("eps: divided by 1 - alpha_bar instead of its root", "plausible",
     "* x0) / at((1 - ab).sqrt(), t, xt)", "* x0) / at(1 - ab, t, xt)",
     "test_eq4_eps_from_x0_undoes_q_sample"),
    ("eps: the image is added", "plausible",
     "return (xt - at(ab.sqrt(), t, xt) * x0)", "return (xt + at(ab.sqrt(), t, xt) * x0)",
     "test_eq4_eps_from_x0_undoes_q_sample"),
    ("clip: dead code", "w86763777 #9",
     "self.posterior_mean(x0.clamp(-1, 1) if clip else x0, xt, t)", "self.posterior_mean(x0, xt, t)",
     "test_clipping_is_done_before_the_mean_is_formed"),
    ("clip: the mean is clipped, not x0", "dome272 (final image only)",
     "return self.posterior_mean(x0.clamp(-1, 1) if clip else x0, xt, t)",
     "mean = self.posterior_mean(x0, xt, t)\n        return mean.clamp(-1, 1) if clip else mean",
     "test_clipping_is_seen_at_every_step_of_the_papers_schedule"),
    ("clip: to [0, 1]", "labml (its data)",
     "self.posterior_mean(x0.clamp(-1, 1) if clip", "self.posterior_mean(x0.clamp(0, 1) if clip",
     "test_clipping_changes_nothing_while_x0_is_an_image"),
    ("clip: off by default", "minDiffusion, dome272",
     "def p_mean(self, xt, t, eps, clip=True)", "def p_mean(self, xt, t, eps, clip=False)",
     "test_clipping_is_seen_at_every_step_of_the_papers_schedule"),
    ("clip: cannot be switched off", "Ho's sampler",
     "x0.clamp(-1, 1) if clip else x0, xt, t)", "x0.clamp(-1, 1), xt, t)",
     "test_eq11_p_mean_is_the_printed_formula"),
    # 5. loss
    ("t = T is never drawn", "minDiffusion",
     "torch.randint(1, d.T + 1, (len(x0),))", "torch.randint(1, d.T, (len(x0),))",
     "test_algorithm1_draws_t_uniformly_from_1_to_T"),
    ("t ~ Uniform({0, .., T}), for {1, .., T}", "in print",
     "torch.randint(1, d.T + 1, (len(x0),))", "torch.randint(0, d.T + 1, (len(x0),))",
     "test_algorithm1_draws_t_uniformly_from_1_to_T"),
    ("t is drawn from {0 .. T-1}", "0-based code on these tables",
     "torch.randint(1, d.T + 1, (len(x0),))", "torch.randint(0, d.T, (len(x0),))",
     "test_algorithm1_draws_t_uniformly_from_1_to_T"),
    ("t = 1 is never drawn", "dome272",
     "torch.randint(1, d.T + 1, (len(x0),))", "torch.randint(2, d.T + 1, (len(x0),))",
     "test_algorithm1_draws_t_uniformly_from_1_to_T"),
    ("one t for all images of a batch", "plausible",
     "torch.randint(1, d.T + 1, (len(x0),))", "torch.randint(1, d.T + 1, (1,)).expand(len(x0))",
     "test_algorithm1_draws_t_for_each_image_alone"),
    ("antithetic t: T + 1 - t for the second half", "ermongroup/ddim (a variant, not Algorithm 1)",
     "torch.randint(1, d.T + 1, (len(x0),)) if t is None",
     "(lambda a: torch.stack([a, d.T + 1 - a], 1).reshape(-1)[: len(x0)])"
     "(torch.randint(1, d.T + 1, (len(x0) // 2 + 1,))) if t is None",
     "test_algorithm1_draws_t_for_each_image_alone"),
    ("L_simple = || x0 - eps_theta ||^2, for || eps - eps_theta ||^2", "in print",
     "return F.mse_loss(eps_theta, eps)", "return F.mse_loss(eps_theta, x0)",
     "test_algorithm1_the_target_is_the_noise_and_not_the_image"),
    ("L1 instead of the square", "lucidrains (an option)",
     "return F.mse_loss(eps_theta, eps)", "return F.l1_loss(eps_theta, eps)",
     "test_eq14_is_the_mean_squared_error_of_the_noise_at_the_given_t"),
    ("half the squared error", "plausible",
     "return F.mse_loss(eps_theta, eps)", "return 0.5 * F.mse_loss(eps_theta, eps)",
     "test_eq14_is_the_mean_squared_error_of_the_noise_at_the_given_t"),
    ("a sum over dimensions", "plausible",
     "return F.mse_loss(eps_theta, eps)", "return F.mse_loss(eps_theta, eps, reduction='sum') / len(x0)",
     "test_eq14_is_the_mean_squared_error_of_the_noise_at_the_given_t"),
    ("the noise is uniform", "plausible",
     "eps = torch.randn_like(x0) if eps is None", "eps = torch.rand_like(x0) if eps is None",
     "test_algorithm1_draws_standard_normal_noise_for_each_pixel_alone"),
    ("the same noise for every image", "plausible",
     "eps = torch.randn_like(x0) if eps is None", "eps = torch.randn_like(x0[:1]).expand_as(x0) if eps is None",
     "test_algorithm1_draws_standard_normal_noise_for_each_pixel_alone"),
    ("the model is told t - 1", "0-based code on these tables",
     "t.to(x0.device, non_blocking=True))\n    assert", "t.to(x0.device, non_blocking=True) - 1)\n    assert",
     "test_algorithm1_the_model_sees_xt_and_its_t"),
    ("the model is told t / T", "minDiffusion",
     "t.to(x0.device, non_blocking=True))\n    assert", "t.to(x0.device, non_blocking=True) / d.T)\n    assert",
     "test_algorithm1_the_model_sees_xt_and_its_t"),
    ("a prediction of another shape broadcasts", "plausible",
     "    assert eps_theta.shape == eps.shape\n", "",
     "test_a_prediction_of_another_shape_is_refused"),
    # 6. ancestral sampling
    ("x_{t-1} = mu + beta_tilde_t z, for sqrt(beta_tilde_t) z", "in print",
     "at(sigma2.sqrt(), t, xt) * noise_like", "at(sigma2, t, xt) * noise_like",
     "test_algorithm2_takes_each_step_from_p_with_mean_of_eq11_and_variance_sigma2"),
    ("sigma is read at t - 1", "plausible",
     "at(sigma2.sqrt(), t, xt) * noise_like", "at(sigma2.sqrt(), t - 1, xt) * noise_like",
     "test_algorithm2_ends_in_the_distribution_that_the_recursion_of_moments_predicts"),
    ("noise is added at t = 1", "labml",
     "* noise_like(xt, generator) if t > 1 else mean", "* noise_like(xt, generator) if t > 0 else mean",
     "test_algorithm2_adds_no_noise_at_t1"),
    ("no noise at t = 2 either", "plausible",
     "* noise_like(xt, generator) if t > 1 else mean", "* noise_like(xt, generator) if t > 2 else mean",
     "test_algorithm2_ends_in_the_distribution_that_the_recursion_of_moments_predicts"),
    ("the last step is skipped", "dome272",
     "for t in range(d.T, 0, -1)", "for t in range(d.T, 1, -1)",
     "test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0"),
    ("the first step is skipped", "lucidrains (interpolate)",
     "for t in range(d.T, 0, -1)", "for t in range(d.T - 1, 0, -1)",
     "test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0"),
    ("the model is told t + 1 after the first step", "plausible",
     "mean = d.p_mean(xt, t, model(xt, same_t(t, xt)), clip)\n        xt = mean + at(sigma2",
     "mean = d.p_mean(xt, t, model(xt, same_t(min(t + 1, d.T), xt)), clip)\n        xt = mean + at(sigma2",
     "test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0"),
    ("the root of a log-variance", "diffusers #14569",
     "at(sigma2.sqrt(), t, xt) * noise_like", "at(sigma2.log().sqrt(), t, xt) * noise_like",
     "test_algorithm2_ends_in_the_distribution_that_the_recursion_of_moments_predicts"),
    ("beta_tilde is the default", "lucidrains",
     "sigma2 = d.beta if sigma2 is None", "sigma2 = d.beta_tilde if sigma2 is None",
     "test_algorithm2_uses_sigma2_beta_by_default"),
    ("the variance that is asked for is ignored", "labml, dome272",
     "sigma2 = d.beta if sigma2 is None else sigma2", "sigma2 = d.beta",
     "test_algorithm2_ends_in_the_distribution_that_the_recursion_of_moments_predicts"),
    ("all images share their noise", "plausible",
     "at(sigma2.sqrt(), t, xt) * noise_like(xt, generator)",
     "at(sigma2.sqrt(), t, xt) * noise_like(xt[:1], generator)",
     "test_algorithm2_takes_each_step_from_p_with_mean_of_eq11_and_variance_sigma2"),
    ("sampling always clips", "Ho's",
     "model(xt, same_t(t, xt)), clip)\n        xt = mean + at(sigma2",
     "model(xt, same_t(t, xt)))\n        xt = mean + at(sigma2",
     "test_sampling_clips_x0_by_default"),
    ("sampling never clips", "minDiffusion, dome272",
     "def sample_ancestral(model, d, xt, sigma2=None, clip=True",
     "def sample_ancestral(model, d, xt, sigma2=None, clip=False",
     "test_sampling_clips_x0_by_default"),
    ("sampling keeps the graph", "plausible",
     "@torch.no_grad()\ndef sample_ancestral", "def sample_ancestral",
     "test_sampling_builds_no_graph"),
    ("generators are ignored", "edm without per-image generators",
     "torch.randn(size, generator=g,", "torch.randn(size,",
     "test_a_seed_gives_the_same_image_at_any_batch_size"),
    ("all images take the first one's generator", "plausible",
     "for g in generators]", "for g in generators[:1] * len(generators)]",
     "test_a_seed_gives_the_same_image_at_any_batch_size"),
    # 7. DDIM
    ("DDIM: eta is ignored", "a trial of this suite",
     "sigma = eta * math.sqrt(", "sigma = 0 * math.sqrt(",
     "test_ddim_eq16_each_jump_is_gaussian_with_the_predicted_mean_and_variance"),
    ("DDIM: eta counts twice", "plausible",
     "sigma = eta * math.sqrt(", "sigma = eta * eta * math.sqrt(",
     "test_ddim_eq16_each_jump_is_gaussian_with_the_predicted_mean_and_variance"),
    ("DDIM: ends at alpha_bar_1", "ControlNet #587, Stability-AI #345",
     "jumps = list(zip([0, *grid[:-1]], grid))",
     "jumps = list(zip([0, *grid[:-1]], grid))\n"
     "    d = Diffusion(d.beta)\n    d.alpha_bar[0] = d.alpha_bar[1]",
     "test_ddim_ends_in_the_distribution_that_the_recursion_of_moments_predicts"),
    ("DDIM: the last jump is skipped", "minDiffusion",
     "for s, t in reversed(jumps):", "for s, t in reversed(jumps[1:]):",
     "test_ddim_asks_the_model_once_at_each_step_of_the_grid_and_ends_at_0"),
    ("DDIM: the first jump is skipped", "plausible",
     "for s, t in reversed(jumps):", "for s, t in reversed(jumps[:-1]):",
     "test_ddim_asks_the_model_once_at_each_step_of_the_grid_and_ends_at_0"),
    ("DDIM: sigma of a single step, sqrt(beta_tilde_t)", "plausible",
     "math.sqrt((1 - ab_s) / (1 - ab)) * math.sqrt(1 - ab / ab_s)",
     "min(math.sqrt(1 - ab_s), math.sqrt(d.beta_tilde[t]))",
     "test_ddim_eq16_each_jump_is_gaussian_with_the_predicted_mean_and_variance"),
    ("DDIM: sigma upside down", "plausible",
     "math.sqrt((1 - ab_s) / (1 - ab)) * math.sqrt(1 - ab / ab_s)",
     "math.sqrt((1 - ab_s) / (1 - ab)) * math.sqrt(max(0, 1 - ab_s / ab))",
     "test_ddim_eq16_each_jump_is_gaussian_with_the_predicted_mean_and_variance"),
    ("DDIM: sigma^2 is not taken from the direction to xt", "plausible",
     "math.sqrt(max(0.0, 1 - ab_s - sigma**2)) * eps", "math.sqrt(1 - ab_s) * eps",
     "test_ddim_ends_in_the_distribution_that_the_recursion_of_moments_predicts"),
    ("DDIM: the old alpha_bar before x0", "plausible",
     "mean = math.sqrt(ab_s) * x0", "mean = math.sqrt(ab) * x0",
     "test_ddim_eq12_first_step_has_the_mean_that_keeps_the_marginals"),
    ("DDIM: the model's eps with a clipped x0", "diffusers (use_clipped_model_output=False)",
     "        x0 = d.x0_from_eps(xt, t, model(xt, same_t(t, xt)))\n",
     "        eps_theta = model(xt, same_t(t, xt))\n        x0 = d.x0_from_eps(xt, t, eps_theta)\n"
     "        d.eps_from_x0 = lambda *_: eps_theta\n",
     "test_ddim_clips_x0_and_takes_the_noise_that_the_clipped_x0_implies"),
    ("DDIM: never clips", "plausible",
     "x0 = x0.clamp(-1, 1) if clip else x0\n        eps", "eps",
     "test_ddim_clips_x0_and_takes_the_noise_that_the_clipped_x0_implies"),
    ("DDIM: noise at the last jump", "plausible",
     "if sigma > 0 else mean", "if sigma > 0 else mean + 0.01 * noise_like(xt, generator)",
     "test_ddim_with_eta_0_is_deterministic_and_that_is_the_default"),
    ("DDIM: eta = 1 by default", "plausible",
     "grid, eta=0.0, clip=True", "grid, eta=1.0, clip=True",
     "test_ddim_with_eta_0_is_deterministic_and_that_is_the_default"),
    ("DDIM: the root of a difference that rounds below 0", "this file, once",
     "max(0.0, 1 - ab_s - sigma**2)", "1 - ab_s - sigma**2",
     "test_ddim_with_eta_1_survives_a_jump_whose_variance_rounds_to_all_there_is",
     "ValueError: math domain error"),
    ("everything stays on the CPU", "plausible",
     "torch.float32)).to(x.device, non_blocking=True)", "torch.float32))",
     "test_loss_and_samplers_work_on_the_device_of_the_images",
     "RuntimeError: Tensor on device meta is not on the expected device cpu"),
    ("DDIM grid: strides of T // n", "tqch #12",
     "[T * i // n for i in range(1, n + 1)]", "list(range(T // n, T + 1, T // n))",
     "test_ddim_grid_has_n_steps_from_above_0_to_T_as_even_as_integers_allow"),
    ("DDIM grid: does not reach T", "tqch (quadratic), CompVis",
     "[T * i // n for i in range(1, n + 1)]", "[T * i // n + 1 for i in range(n)]",
     "test_ddim_grid_has_n_steps_from_above_0_to_T_as_even_as_integers_allow"),
    ("DDIM grid: more steps than there are", "improved-diffusion (T = 1)",
     "assert 1 <= n <= T, f\"cannot choose {n}", "assert True, f\"cannot choose {n}",
     "test_ddim_grid_refuses_a_number_of_steps_that_T_cannot_give"),
    # 8. bound
    ("KL: the wrong way round", "plausible",
     "normal_kl(mu_tilde, at(d.beta_tilde, t, x0), mu_theta, at(sigma2, t, x0))",
     "normal_kl(mu_theta, at(sigma2, t, x0), mu_tilde, at(d.beta_tilde, t, x0))",
     "test_eq5_with_exact_eps_sigma2_beta_costs_the_kl_of_the_two_variances"),
    ("KL: the ratio of variances upside down", "plausible",
     "(var_2 / var_1).log()", "(var_1 / var_2).log()",
     "test_kl_of_two_gaussians_is_cross_entropy_minus_entropy"),
    ("KL: no factor of a half", "plausible",
     "return 0.5 * ((var_2", "return 1.0 * ((var_2",
     "test_kl_of_two_gaussians_is_cross_entropy_minus_entropy"),
    ("KL: without its - 1", "plausible",
     "** 2) / var_2 - 1)", "** 2) / var_2)",
     "test_kl_is_not_negative_and_zero_for_equal_distributions"),
    ("KL: divided by the first variance", "plausible",
     "** 2) / var_2 - 1)", "** 2) / var_1 - 1)",
     "test_kl_of_two_gaussians_is_cross_entropy_minus_entropy"),
    ("KL: standard deviations for variances", "plausible",
     "normal_kl(mu_tilde, at(d.beta_tilde, t, x0), mu_theta, at(sigma2, t, x0))",
     "normal_kl(mu_tilde, at(d.beta_tilde, t, x0).sqrt(), mu_theta, at(sigma2, t, x0).sqrt())",
     "test_eq5_each_kl_term_compares_the_posterior_with_the_models_step_at_the_same_xt"),
    ("nats are called bits", "a trial of this suite",
     "return terms / math.log(2)", "return terms",
     "test_eq5_constants_of_the_papers_schedule"),
    ("decoder: tanh approximation of the CDF", "Ho's, improved-diffusion, guided-diffusion",
     "    log_high = torch.special.log_ndtr(high)\n"
     "    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))",
     "    cdf = lambda x: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))\n"
     "    return torch.log(cdf(high) - cdf(low))",
     "test_eq13_decoder_is_the_mass_of_the_levels_bin"),
    ("decoder: a floor of 1e-12 with no gradient", "Ho's, improved-diffusion",
     "    log_high = torch.special.log_ndtr(high)\n"
     "    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))",
     "    return (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-12).log()",
     "test_eq13_decoder_still_teaches_when_it_is_far_off"),
    ("decoder: density times bin width", "plausible",
     "    log_high = torch.special.log_ndtr(high)\n"
     "    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))",
     "    return -0.5 * (x0 - mean) ** 2 / var - 0.5 * (2 * math.pi * var).log() + math.log(2 / 255)",
     "test_eq13_decoder_is_the_mass_of_the_levels_bin"),
    ("decoder: bins of 1/256", "plausible",
     "(x0 - mean - 1 / 255) / var.sqrt(), (x0 - mean + 1 / 255)",
     "(x0 - mean - 1 / 256) / var.sqrt(), (x0 - mean + 1 / 256)",
     "test_eq13_decoder_probabilities_of_the_256_levels_sum_to_1"),
    ("decoder: the lower end bin is finite", "plausible",
     "low = torch.where(x0 < -0.999, -math.inf, low)", "low = 1 * low",
     "test_eq13_end_levels_reach_to_infinity"),
    ("decoder: the upper end bin is finite", "plausible",
     "high = torch.where(x0 > 0.999, math.inf, high)", "high = 1 * high",
     "test_eq13_end_levels_reach_to_infinity"),
    ("decoder: no flip, so the right tail cancels", "plausible",
     "flip = low + high > 0", "flip = low + high > math.inf",
     "test_eq13_decoder_is_the_mass_of_the_levels_bin"),
    ("decoder: variance for standard deviation", "plausible",
     "(x0 - mean - 1 / 255) / var.sqrt(), (x0 - mean + 1 / 255) / var.sqrt()",
     "(x0 - mean - 1 / 255) / var, (x0 - mean + 1 / 255) / var",
     "test_eq13_decoder_is_the_mass_of_the_levels_bin"),
    ("decoder variance: beta_1", "the paper's text, not its results",
     "var = at(d.beta_tilde, 2, x0) if d.T > 1 else at(d.beta, 1, x0)", "var = at(d.beta, 1, x0)",
     "test_eq13_decoder_variance_is_beta_tilde_2_for_both_choices_of_sigma"),
    ("decoder variance: 1e-20, the floor of a log-variance", "lucidrains",
     "var = at(d.beta_tilde, 2, x0) if d.T > 1 else at(d.beta, 1, x0)",
     "var = torch.full_like(at(d.beta, 1, x0), 1e-20)",
     "test_eq13_decoder_variance_is_beta_tilde_2_for_both_choices_of_sigma"),
    ("L_T is left out", "lucidrains, tqch",
     "    terms[:, :, d.T] = prior.flatten(1).mean(1)", "    terms[:, :, d.T] = 0 * prior.flatten(1).mean(1)",
     "test_eq5_prior_term_is_the_kl_from_the_last_step_to_the_standard_normal"),
    ("L_T without the image's mean", "plausible",
     "prior = normal_kl(ab.sqrt() * x0,", "prior = normal_kl(0 * x0,",
     "test_eq5_prior_term_is_the_kl_from_the_last_step_to_the_standard_normal"),
    ("the posterior's variance is sigma2", "plausible",
     "normal_kl(mu_tilde, at(d.beta_tilde, t, x0), mu_theta,", "normal_kl(mu_tilde, at(sigma2, t, x0), mu_theta,",
     "test_eq5_with_exact_eps_sigma2_beta_costs_the_kl_of_the_two_variances"),
    ("terms are averaged over the batch", "plausible",
     "row[:, t - 1] = nats.flatten(1).mean(1)", "row[:, t - 1] = nats.mean()",
     "test_eq5_terms_are_bits_per_dimension_of_each_image"),
    ("terms are summed over dimensions", "plausible",
     "row[:, t - 1] = nats.flatten(1).mean(1)", "row[:, t - 1] = nats.flatten(1).sum(1)",
     "test_eq5_terms_are_bits_per_dimension_of_each_image"),
    ("the bound's model is told t - 1", "0-based code on these tables",
     "eps = model(xt, same_t(t, x0))", "eps = model(xt, same_t(t - 1, x0))",
     "test_eq5_with_exact_eps_sigma2_beta_tilde_makes_the_kl_terms_vanish"),
    ("the bound never clips", "plausible",
     "d.p_mean(xt, t, eps, clip)\n", "d.p_mean(xt, t, eps, False)\n",
     "test_bound_clips_x0_as_the_sampler_does"),
    ("the bound takes any range of pixels", "labml, minDiffusion (their data)",
     "assert x0.abs().max() <= 1 and ", "assert ",
     "test_bound_refuses_pixels_outside_1"),
    ("the bound takes images in [0, 1]", "labml (its data)",
     "and (k - k.round()).abs().max() < 0.01", "",
     "test_bound_refuses_pixels_that_are_not_on_the_256_levels"),
    ("the bound asks the model anew for each variance", "plausible",
     "    for row, sigma2 in zip(terms, variances):\n",
     "    for row, sigma2 in zip(terms, variances):\n            model(xt, same_t(t, x0))\n",
     "test_eq5_one_evaluation_of_the_model_at_each_t_serves_all_variances"),
    # 9. network
    ("embedding: d/2 in the denominator", "w86763777, improved-diffusion",
     "math.log(10000) / (dim // 2 - 1)", "math.log(10000) / (dim // 2)",
     "test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator"),
    ("embedding: cosines first", "improved-diffusion, diffusers",
     "torch.cat([angle.sin(), angle.cos()], dim=1)", "torch.cat([angle.cos(), angle.sin()], dim=1)",
     "test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator"),
    ("embedding: sines and cosines interleaved", "w86763777",
     "torch.cat([angle.sin(), angle.cos()], dim=1)", "torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)",
     "test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator"),
    ("embedding: of t, not t - 1", "the paper's text",
     "timestep_embedding(t - 1, self.ch)", "timestep_embedding(t, self.ch)",
     "test_appB_network_computes_what_the_numpy_network_computes"),
    ("embedding: in the images' half precision", "plausible",
     "timestep_embedding(t - 1, self.ch)", "timestep_embedding((t - 1).to(xt.dtype), self.ch)",
     "test_the_embedding_tells_neighbouring_t_apart_in_half_precision"),
    ("labels are ignored where there are none to learn", "plausible",
     " and (y is None or self.num_classes)", "",
     "test_labels_for_a_network_without_labels_are_refused"),
    ("the network ignores t", "minDiffusion (toy network)",
     "h = self.conv1(F.silu(self.norm1(x))) + self.emb(F.silu(emb))[:, :, None, None]",
     "h = self.conv1(F.silu(self.norm1(x)))",
     "test_the_output_depends_on_t"),
    ("GroupNorm: eps = 1e-5, torch's default", "w86763777, improved-diffusion, diffusers",
     "eps=1e-6", "eps=1e-5", "test_group_norm_divides_by_the_standard_deviation_with_eps_1e_6"),
    ("padding: symmetric on stride 2", "w86763777, improved-diffusion, diffusers",
     "nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 0, 1, 0))",
     "test_appB_network_computes_what_the_numpy_network_computes"),
    ("attention: no scale", "plausible",
     "F.scaled_dot_product_attention(q, k, v)", "F.scaled_dot_product_attention(q, k, v, scale=1.0)",
     "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"),
    ("attention: softmax over the queries", "labml #146",
     "h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v",
     "h = (q @ k.mT / q.shape[-1] ** 0.5).softmax(2) @ v",
     "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"),
    ("attention: q and k swapped", "plausible",
     "F.scaled_dot_product_attention(q, k, v)", "F.scaled_dot_product_attention(k, q, v)",
     "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"),
    ("attention: two heads", "improved-diffusion, diffusers",
     "h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v",
     "q, k, v = (torch.cat(z.chunk(2, -1), 1) for z in (q, k, v))\n"
     "        h = torch.cat(F.scaled_dot_product_attention(q, k, v).chunk(2, 1), -1)",
     "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"),
    ("attention: its norm is created and not applied", "labml",
     "h = self.norm(x)\n        q, k, v", "h = x\n        q, k, v",
     "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"),
    ("attention: over channels, not pixels", "plausible",
     "h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v",
     "h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT",
     "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"),
    ("attention: no residual", "plausible",
     "return x + self.out(h[:, 0]", "return self.out(h[:, 0]",
     "test_residual_blocks_and_attention_start_as_the_identity"),
    ("attention: pixels mixed up on the way back", "plausible",
     "self.out(h[:, 0].mT.reshape(x.shape))", "self.out(h[:, 0].reshape(x.shape))",
     "test_attention_commutes_with_permuting_the_pixels"),
    ("zero init: not on the residual branch", "lucidrains, diffusers",
     "self.norm2, self.conv2 = norm(groups, c_out), conv(c_out, c_out, gain=1e-5)",
     "self.norm2, self.conv2 = norm(groups, c_out), conv(c_out, c_out)",
     "test_residual_blocks_and_attention_start_as_the_identity"),
    ("zero init: not on attention", "lucidrains, diffusers",
     "self.out = conv(c, c, size=1, gain=1e-5)", "self.out = conv(c, c, size=1)",
     "test_residual_blocks_and_attention_start_as_the_identity"),
    ("zero init: not on the last layer", "lucidrains, diffusers",
     "self.conv_out = conv(c, out_channels or in_channels, gain=1e-5)",
     "self.conv_out = conv(c, out_channels or in_channels)",
     "test_network_starts_near_zero_so_that_L_simple_starts_at_1"),
    ("init: torch's default weights", "w86763777's is Xavier; lucidrains, minDiffusion",
     "    nn.init.xavier_uniform_(layer.weight, gain)\n    nn.init.zeros_(layer.bias)\n",
     "    layer.weight.data *= gain\n    layer.bias.data *= gain\n",
     "test_network_starts_with_xavier_uniform_weights_and_zero_biases"),
    ("init: Xavier normal", "plausible",
     "nn.init.xavier_uniform_", "nn.init.xavier_normal_",
     "test_network_starts_with_xavier_uniform_weights_and_zero_biases"),
    ("dropout: left on when sampling", "labml",
     "self.conv2(self.dropout(F.silu(self.norm2(h))))", "self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1))",
     "test_dropout_is_off_in_eval_mode_and_on_in_training"),
    ("dropout: before the norm", "plausible",
     "self.conv2(self.dropout(F.silu(self.norm2(h))))", "self.conv2(F.silu(self.norm2(self.dropout(h))))",
     "test_dropout_acts_just_before_the_last_convolution_of_a_residual_block"),
    ("dropout: whole channels", "plausible",
     "self.dropout = nn.Dropout(dropout)", "self.dropout = nn.Dropout2d(dropout)",
     "test_appB_dropout_is_a_tenth_by_default"),
    ("dropout: none by default", "improved-diffusion",
     "attention=(1,), dropout=0.1,", "attention=(1,), dropout=0.0,",
     "test_appB_dropout_is_a_tenth_by_default"),
    ("residual block: no silu on the embedding", "plausible",
     "self.emb(F.silu(emb))", "self.emb(emb)",
     "test_residual_block_is_norm_silu_conv_twice_around_the_embedding"),
    ("residual block: relu for silu", "minDiffusion, plausible",
     "self.dropout(F.silu(self.norm2(h)))", "self.dropout(F.relu(self.norm2(h)))",
     "test_residual_block_is_norm_silu_conv_twice_around_the_embedding"),
    ("residual block: divided by sqrt(2)", "minDiffusion (is_res)",
     "return self.shortcut(x) + h", "return (self.shortcut(x) + h) / 2**0.5",
     "test_residual_block_is_norm_silu_conv_twice_around_the_embedding"),
    ("residual block: BatchNorm mixes the images", "minDiffusion",
     "return nn.GroupNorm(groups, c, eps=1e-6)", "return nn.BatchNorm2d(c, track_running_stats=False)",
     "test_images_of_a_batch_do_not_see_each_other"),
    ("skips: concatenated before h", "plausible",
     "torch.cat([h, skips.pop()], dim=1)", "torch.cat([skips.pop(), h], dim=1)",
     "test_appB_network_computes_what_the_numpy_network_computes"),
    ("skips: the attention is left out of them", "plausible",
     "            h = stage(h, emb)\n            skips.append(h)\n",
     "            skips.append(stage[:1](h, emb) if isinstance(stage[0], ResBlock) else stage(h, emb))\n"
     "            h = stage(h, emb)\n",
     "test_appB_network_computes_what_the_numpy_network_computes"),
    ("upsampling: bilinear", "plausible",
     "nn.Upsample(scale_factor=2)", "nn.Upsample(scale_factor=2, mode='bilinear')",
     "test_appB_network_computes_what_the_numpy_network_computes"),
    ("widths compound: 1, 2, 4, 8", "labml",
     "        for level, m in enumerate(mult):\n",
     "        mult = [math.prod(mult[: i + 1]) for i in range(len(mult))]\n"
     "        for level, m in enumerate(mult):\n",
     "test_appB_network_has_the_parameters_of_the_released_one"),
    ("the middle has no attention", "plausible",
     "Stack(res(c, c), Attention(c, groups), res(c, c))", "Stack(res(c, c), res(c, c))",
     "test_appB_defaults_are_the_cifar10_network"),
    ("attention at 32x32 instead of 16x16", "plausible",
     "attention=(1,), dropout=0.1", "attention=(0,), dropout=0.1",
     "test_appB_defaults_are_the_cifar10_network"),
    ("width 64", "lucidrains README, minDiffusion",
     "out_channels=None, ch=128", "out_channels=None, ch=64",
     "test_appB_network_has_the_parameters_of_the_released_one"),
    ("sizes that do not fit are not refused", "lucidrains, dome272, minDiffusion",
     "H % self.factor == W % self.factor == 0", "H > 0",
     "test_sizes_that_the_levels_do_not_divide_are_refused_in_words"),
    ("labels: row 0 means no label", "plausible",
     "torch.full_like(t, self.num_classes) if y is None", "torch.zeros_like(t) if y is None",
     "test_appB_labels_are_added_to_the_time_embedding_and_the_last_row_means_no_label"),
    ("labels: dropped for the whole batch", "dome272",
     "if y is None else y)", "if y is None else y[:1].expand_as(t))",
     "test_appB_labels_are_added_to_the_time_embedding_and_the_last_row_means_no_label"),
)]  # fmt: skip


class Verdict:
    """A pytest plugin that keeps the first failure."""

    test = message = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.test is None:
            self.test, crash = report.nodeid, getattr(report.longrepr, "reprcrash", None)
            self.message = (crash.message if crash else str(report.longrepr)).strip()


def judge(source, tests):
    """Runs pytest on the source of a ddpm.py: (exit status, failed test, its message)."""
    import pytest
    import torch

    torch.set_num_threads(1)
    verdict, quiet = Verdict(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "ddpm.py"
        path.write_text(source)
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            status = pytest.main(["-x", "-q", "--hypothesis-profile=mutants", "-p", "no:warnings",
                                  f"--rootdir={ROOT}", f"--ddpm={path}", *tests], [verdict])
    return int(status), verdict.test, verdict.message or quiet.getvalue().strip()[-300:]


def is_assertion(message):
    """A failed assertion, or an expected refusal that did not come: not a crash."""
    return message.startswith(("AssertionError", "assert ", "Failed: DID NOT RAISE"))


def locate(test):
    """The node id of a test by its name."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if f"def {test}(" in path.read_text():
            return f"{path}::{test}"
    raise SystemExit(f"no test is called {test}")


def try_mutant(mutant):
    signal.alarm(SECONDS)
    source = (ROOT / "ddpm.py").read_text()
    if source.count(mutant.old) != 1:
        return mutant, False, f"its text stands {source.count(mutant.old)} times in ddpm.py, not once"
    status, _, message = judge(source.replace(mutant.old, mutant.new), [locate(mutant.test)])
    if status == 0:
        return mutant, False, f"SURVIVED {mutant.test}"
    if status != 1 or not (is_assertion(message) or (mutant.crash and message.startswith(mutant.crash))):
        return mutant, False, f"died, but not of its test (exit status {status}): {message.splitlines()[0]}"
    return mutant, True, message.splitlines()[0]


def in_parallel(function, items):
    """function(item) for each item, each in a process of its own forked from this one."""
    import hypothesis  # noqa: F401  imported once, for all the children
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import scipy.integrate
    import scipy.signal
    import scipy.stats  # noqa: F401
    import torch.nn.functional  # noqa: F401

    os.chdir(ROOT)
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        yield from pool.imap(function, items)


def main(words):
    began, alive = time.monotonic(), 0
    chosen = [m for m in CATALOGUE if all(word in f"{m.name} [{m.seen}]" for word in words)]
    for mutant, killed, message in in_parallel(try_mutant, chosen):
        alive += not killed
        print(f"{'killed  ' if killed else 'ALIVE   '}{mutant.name}  [{mutant.seen}]\n"
              f"        {mutant.test}\n        {message[:200]}", flush=True)  # fmt: skip
    print(f"\n{len(chosen) - alive} of {len(chosen)} mutants killed by the test they name, "
          f"{time.monotonic() - began:.0f} s")
    return 1 if alive or not chosen else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
