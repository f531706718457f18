"""Writes the test vectors, from reference_numpy.py alone: python tests/vectors/write.py [--out FOLDER]

One JSON file a subject, and network.npz; README.md says how they are read. What is drawn, is drawn with a
fixed seed and in steps of 1/64: exact in float32 too, so that inputs add no error of their own. Every
expected number comes with the error that float64 and float32 are allowed, and that is derived here.
"""

import argparse
import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import reference_numpy as ref  # noqa: E402

SEED = 2006_11239  # of NumPy's default generator, begun afresh for every file
EPS, EPS32 = 2.0**-52, 2.0**-23
SUBJECTS = {}  # the generator of its cases, and the words at the head of its file, by a subject's name

# --- The processes -----------------------------------------------------------------------------------


class Process(NamedTuple):
    name: str
    written: object  # beta in the JSON file: a list, or the ends of a straight line
    beta: np.ndarray  # beta[0..T]
    steps: list  # the t that are looked at


def listed(name, beta):
    """A process whose table is short enough to be written down, and looked at from 1 to T."""
    return Process(
        name, list(map(float, beta)), np.array(beta, np.float64), list(range(1, len(beta)))
    )


ONE = listed("T = 1", [0, 0.5])
TWO = listed("T = 2", [0, 0.5, 0.25])
STEEP = listed("steep, T = 4", [0, 0.1, 0.3, 0.8, 0.2])
LINE = listed("linear, T = 10", ref.linear_beta(10, 0.05, 0.7))
EXTREME = listed("extreme, T = 5", [0, 1e-6, 0.999, 1e-3, 0.9, 1e-6])
CLIFF = listed("cliff, T = 6", [0, 0.03, *[0.999] * 5])
PAPER = Process("the paper's, T = 1000", {"T": 1000, "beta_1": 1e-4, "beta_T": 0.02}, ref.linear_beta(1000),
                [1, 2, 3, 10, 100, 500, 999, 1000])  # fmt: skip
SHORT = ONE, TWO, STEEP, LINE
ALL = *SHORT, EXTREME, PAPER


def coefficients(beta, t):
    """(a, b, c_0, c_t), each (B, 1), of the steps t: xt = a x0 + b eps, and eq. 7 is c_0 x0 + c_t xt."""
    a, v = (moments[t] for moments in ref.forward_moments(beta))
    c_0, c_t, _ = np.transpose([ref.posterior(beta, i) for i in t])
    return [c[:, None] for c in (a, np.sqrt(v), c_0, c_t)]


def beta_tilde(beta):
    """beta_tilde[0..T], with 0 for the step that does not exist."""
    return np.array([0.0, *(ref.posterior(beta, t)[2] for t in range(1, len(beta)))])


def draw(rng, *shape):
    """N(0, I), to the nearest 1/64."""
    return np.round(rng.standard_normal(shape) * 64) / 64


def images(rng, *shape):
    """Pixels of [-1, 1], in steps of 1/64."""
    return rng.integers(-64, 65, shape) / 64


# --- What the files say ------------------------------------------------------------------------------

T_FROM_1 = """t counts from 1 to T. A table has T + 1 entries: entry 0 is the image before any noise,
    beta[0] = 0 and alpha_bar[0] = 1. Code that counts from 0 subtracts 1 from every t, and from nothing
    else"""
RULE = """|got - want| <= tolerance[precision] * scale, entry by entry. A scale that is not given is
    |want|. null is no number and is not judged"""
FACTOR = """4 eps / min beta for each stage, eps = 2^-52. alpha_bar_t is a product of t factors, off by t
    eps at most; 1 - alpha_bar_t is then off by t eps alpha_bar_t / (1 - alpha_bar_t), which is at most
    eps / min beta. 4 allows for the few operations around it"""
ROUNDED = """4 eps32 for each stage, eps32 = 2^-23, for coefficients that are made in float64 and rounded
    once, and for the few operations with them; and what float64 is allowed. 1 - alpha_bar from a float32
    alpha_bar is not within it at small t: that is a fault, and no departure"""
SUM = "the sum of the absolute values of the terms that are added"
BATCH = "B images of D dimensions (B, D), row b at step t[b]; t (B,)"
MODEL = "eps(xt, t) = 0.875 xt + ((t mod 3) - 1) / 8, elementwise: of t, only t mod 3 counts"
UNCLIPPED = """x0 is not clipped to [-1, 1] before the mean is formed. The paper's text does not clip;
    its authors' code does, and made the paper's results. Acceptable if it is said; no difference while
    x0 is in [-1, 1]"""
TANH = """the normal CDF is the authors' code's tanh approximation, and the mass of a bin is at least
    1e-12. Acceptable if it is said: Phi is off by up to 1.8e-4, and far from x0 the gradient is 0"""


def subject(**head):
    """Registers the cases of a file with its words. tolerance: those of (float64, float32)."""

    def add(cases):
        SUBJECTS[cases.__name__] = cases, head
        return cases

    return add


def allowed(beta, stages=1):
    """The tolerances of what is built on 1 - alpha_bar: FACTOR and ROUNDED."""
    tables = 4 * stages * EPS / beta[1:].min()
    return {"float64": tables, "float32": 4 * stages * EPS32 + tables}


def case(process, call, given, want, scale, stages=1, kind="", **more):
    """A case of a process, of one call and one result."""
    return {"name": process.name + kind, "call": call, "given": {"beta": process.written, **given},
            "want": want, "scale": scale, "tolerance": allowed(process.beta, stages), **more}  # fmt: skip


def model(xt, t):
    """MODEL, exact in every precision but for one rounding, so that it can be written in any language."""
    return 0.875 * xt + (np.asarray(t) % 3 - 1) / 8


# --- Schedules and tables ----------------------------------------------------------------------------


def cosine_scale(T, s=0.008):
    """What rounding an angle does to 1 - cos^2(angle_t) / cos^2(angle_{t-1}): about its tangent."""
    angle = np.pi / 2 * (np.arange(-1, T) / T + s) / (1 + s)
    return 1 + 4 * np.tan(angle.clip(0))


def schedule(kind, beta, tolerance, scale, words="", **given):
    T = len(beta) - 1
    t = list(range(T + 1)) if T <= 10 else [0, *PAPER.steps]
    rounded = {"scale": {"beta": beta[t]}, "tolerance": {"float64": EPS32, "float32": EPS32}}
    return {"name": f"{kind}, T = {T}{words}", "call": f"{kind}_schedule", "given": {"T": T, **given, "t": t},
            "want": {"beta": beta[t]}, "scale": {"beta": np.broadcast_to(scale, beta.shape)[t]},
            "tolerance": {"float64": tolerance, "float32": tolerance},
            "departures": {"rounded to float32": rounded}}  # fmt: skip


@subject(
    formula="""beta[0..T]. linear (sec. 4): beta_t = beta_1 + (t - 1) (beta_T - beta_1) / (T - 1). cosine
        (iDDPM eq. 17): alpha_bar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), beta_t = 1 -
        alpha_bar_t / alpha_bar_{t-1}, but at most beta_max. exponential: beta_t = beta_1 (beta_T /
        beta_1)^((t-1)/(T-1)). With T = 1: beta_1""",
    shapes="beta (len(t),): the entries t of a table (T + 1,)",
    tolerance=("""linear: 4 eps of beta_T. cosine: 8 eps (1 + 4 tan(angle_{t-1})), which is what rounding
        an angle does to a ratio of two cos^2. exponential: (4 + 4 log(beta_T / beta_1)) eps of beta_t,
        the error of a power""",
               "the same: a schedule is computed in float64, whatever the images are"),
    departures={"rounded to float32": """the table, computed in float64, is returned in float32.
        Acceptable for beta; not for alpha_bar, see forward.json"""},
)  # fmt: skip
def schedules(rng):
    yield schedule("linear", ref.linear_beta(1000), 4 * EPS, 0.02, ", the paper's by default")
    yield schedule(
        "cosine", ref.cosine_beta(1000), 8 * EPS, cosine_scale(1000), ", the paper's by default"
    )
    for T, beta_1, beta_T in (1, 0.5, 0.5), (10, 0.05, 0.7), (1000, 1e-4, 0.02):
        ends = {"beta_1": beta_1, "beta_T": beta_T}
        yield schedule("linear", ref.linear_beta(T, **ends), 4 * EPS, beta_T, **ends)
    for T in 1, 10, 1000:
        yield schedule(
            "cosine", ref.cosine_beta(T), 8 * EPS, cosine_scale(T), s=0.008, beta_max=0.999
        )
    for T, beta_1, beta_T in (1, 0.5, 0.5), (10, 0.01, 0.9), (1000, 1e-4, 0.066):
        ends = {"beta_1": beta_1, "beta_T": beta_T}
        beta = ref.exponential_beta(T, **ends)
        yield schedule("exponential", beta, (4 + 4 * np.log(beta_T / beta_1)) * EPS, beta, **ends)


@subject(
    formula="""alpha_t = 1 - beta_t; alpha_bar_t = alpha_1 .. alpha_t (eq. 4); beta_tilde_t = beta_t (1 -
        alpha_bar_{t-1}) / (1 - alpha_bar_t) (eq. 7), of which there is none at t = 0""",
    shapes="each (len(t),): the entries t of a table (T + 1,)", tolerance=(FACTOR, ROUNDED),
)  # fmt: skip
def tables(rng):
    for p in ALL:
        a, v = ref.forward_moments(p.beta)
        t = [0, *p.steps]
        want = {"alpha": 1 - p.beta[t], "alpha_bar": a[t] ** 2, "one_minus_alpha_bar": v[t],
                "beta_tilde": np.append(np.nan, beta_tilde(p.beta)[t[1:]])}  # fmt: skip
        yield case(p, "Diffusion", {"t": t}, want, {})


# --- Forward process, posterior, parametrisation, loss -----------------------------------------------


@subject(
    formula="""eq. 4: xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps; columns 0 and 1 are the
        coefficients""",
    shapes=f"x0, eps, xt: {BATCH}", tolerance=(FACTOR, ROUNDED), scale=SUM,
)  # fmt: skip
def forward(rng):
    for p in ALL:
        a, b, _, _ = coefficients(p.beta, p.steps)
        x0, eps = images(rng, len(p.steps), 3), draw(rng, len(p.steps), 3)
        x0[:, :2], eps[:, :2] = [1, 0], [0, 1]
        yield case(p, "Diffusion.q_sample", {"x0": x0, "t": p.steps, "eps": eps},
                   {"xt": a * x0 + b * eps}, {"xt": a * abs(x0) + b * abs(eps)})  # fmt: skip


@subject(
    formula="""eq. 7: mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x0 + sqrt(alpha_t) (1 -
        alpha_bar_{t-1}) / (1 - alpha_bar_t) xt; columns 0 and 1 are the coefficients. The variance,
        beta_tilde_t, is in tables.json""",
    shapes=f"x0, xt, mean: {BATCH}", tolerance=(FACTOR, ROUNDED), scale=SUM,
)  # fmt: skip
def posterior(rng):
    for p in ALL:
        _, _, c_0, c_t = coefficients(p.beta, p.steps)
        x0, xt = images(rng, len(p.steps), 3), draw(rng, len(p.steps), 3)
        x0[:, :2], xt[:, :2] = [1, 0], [0, 1]
        yield case(p, "Diffusion.posterior_mean", {"x0": x0, "xt": xt, "t": p.steps},
                   {"mean": c_0 * x0 + c_t * xt}, {"mean": c_0 * abs(x0) + c_t * abs(xt)})  # fmt: skip


@subject(
    formula="""eq. 15: x0 = (xt - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t), which is eq. 4 solved
        for x0. The same for eps: eps = (xt - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t). eq. 11: mean
        = (xt - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), which is eq. 7 at that x0; with
        clip, x0 is first cut to [-1, 1]""",
    shapes=f"xt, eps, x0, mean: {BATCH}", tolerance=(FACTOR + ". p_mean has two stages", ROUNDED),
    scale=SUM + ", for x0 and eps after the division", departures={"unclipped": UNCLIPPED},
)  # fmt: skip
def parametrisation(rng):
    for p in ALL:
        a, b, c_0, c_t = coefficients(p.beta, p.steps)
        x, eps = images(rng, len(p.steps), 2), draw(rng, len(p.steps), 2)
        xt = (
            np.round((1.5 * a * x + b * eps) * 64) / 64
        )  # the x0 that it implies is in range or somewhat out
        x0, size = (xt - b * eps) / a, (abs(xt) + b * abs(eps)) / a
        given = {"xt": xt, "t": p.steps, "eps": eps}
        yield case(p, "Diffusion.x0_from_eps", given, {"x0": x0}, {"x0": size})
        yield case(p, "Diffusion.eps_from_x0", {"xt": xt, "t": p.steps, "x0": x},
                   {"eps": (xt - a * x) / b}, {"eps": (abs(xt) + a * abs(x)) / b})  # fmt: skip
        free = {
            "want": {"mean": c_0 * x0 + c_t * xt},
            "scale": {"mean": c_0 * size + c_t * abs(xt)},
        }
        yield case(
            p, "Diffusion.p_mean", {**given, "clip": False}, **free, stages=2, kind=", clip off"
        )
        clipped = c_0 * x0.clip(-1, 1) + c_t * xt
        size = c_0 * np.where(abs(x0) > 1, 1, size) + c_t * abs(xt)
        yield case(p, "Diffusion.p_mean", {**given, "clip": True}, {"mean": clipped}, {"mean": size},
                   stages=2, kind=", clip on", departures={"unclipped": free})  # fmt: skip


@subject(
    formula="""eq. 14 for given t and eps: the mean over all images and dimensions of (eps - model(xt,
        t))^2, with xt by eq. 4""",
    model=MODEL, shapes=f"x0, eps: {BATCH}; loss: one number", tolerance=(FACTOR + ". Two stages", ROUNDED),
    scale="the mean of the squares, and of the roots times the terms of which they were formed",
)  # fmt: skip
def loss(rng):
    for p in ALL:
        a, b, _, _ = coefficients(p.beta, p.steps)
        x0, eps = images(rng, len(p.steps), 3), draw(rng, len(p.steps), 3)
        gap = eps - model(a * x0 + b * eps, np.array(p.steps)[:, None])
        size = abs(eps) + 0.875 * (a * abs(x0) + b * abs(eps)) + 0.125
        yield case(p, "loss_simple", {"x0": x0, "t": p.steps, "eps": eps}, {"loss": np.mean(gap**2)},
                   {"loss": np.mean(gap**2 + abs(gap) * size)}, stages=2)  # fmt: skip


# --- Samplers ----------------------------------------------------------------------------------------


def sampled(beta, steps, xt, noise, clip, root=False, own_eps=False):
    """Every state x_s of a sampler, and its scale.

    A step is x_s = p x0 + q xt + r eps + sigma z: k_0 x0 + k_t xt, or, where the model's own eps is kept,
    (k_0 + k_t a) x0 + k_t b eps, since xt = a x0 + b eps. An error of xt comes out multiplied by the slope
    at most; the step's own is in proportion to its terms, also where eps is formed from x0 and xt on the
    way. DDIM's coefficient of eps is the root of c^2 = (1 - alpha_bar_s) - sigma^2, whose error is that of
    c^2 over 2 c.
    """
    states, scales, error = [], [], 0.0
    for (t, (k_0, k_t, sigma2)), z in zip(steps, noise, strict=True):
        a, b = ref.transition(beta, 0, t) ** np.array([1, 0.5])
        eps = model(xt, t)
        x0, size = (xt - b * eps) / a, (abs(xt) + b * abs(eps)) / a
        inside = abs(x0) <= 1 if clip else np.full(x0.shape, True)
        x0, size = np.where(inside, x0, np.sign(x0)), np.where(inside, size, 1.0)
        p, q, r = (k_0 + k_t * a, 0.0, k_t * b) if own_eps else (k_0, k_t, 0.0)
        slope = p * inside * (1 + 0.875 * b) / a + q + 0.875 * r
        own = (p + 2 * q * a) * size + q * abs(xt) + r * abs(eps) + np.sqrt(sigma2) * abs(z)
        if root and k_t > 0:
            own = own + sigma2 / (2 * k_t * b) * abs((xt - a * x0) / b)
        error = slope * error + own
        xt = p * x0 + q * xt + r * eps + np.sqrt(sigma2) * z
        states.append(xt)
        scales.append(error)
    return {"want": {"states": np.array(states)}, "scale": {"states": np.array(scales)}}


@subject(
    formula="""Algorithm 2: x_{t-1} = mean + sqrt(sigma2[t]) z for t = T .. 1, mean by eq. 11, with clip
        or without, and z = 0 at t = 1""",
    model=MODEL, shapes="""xT (B, D); sigma2 (T + 1,), variances; noise (T, B, D): z of the steps t = T,
        T - 1, .., 1, of which the last must not be used; states (T, B, D): x_{T-1}, .., x_0""",
    tolerance=(FACTOR + ". Two stages", ROUNDED),
    scale=SUM + ", and the scale of the state before, times the slope of the step",
    departures={"unclipped": UNCLIPPED},
)  # fmt: skip
def ancestral(rng):
    for p in SHORT:
        xT, noise = draw(rng, 2, 2), draw(rng, len(p.steps), 2, 2)
        for table, sigma2 in ("beta", p.beta), ("beta_tilde", beta_tilde(p.beta)):
            given, steps = {"xT": xT, "sigma2": sigma2}, ref.ancestral_steps(p.beta, sigma2)
            free = sampled(p.beta, steps, xT, noise, False)
            yield case(p, "sample_ancestral", {**given, "clip": False, "noise": noise}, **free, stages=2,
                       kind=f", {table}, clip off")  # fmt: skip
            yield case(p, "sample_ancestral", {**given, "clip": True, "noise": noise}, stages=2,
                       **sampled(p.beta, steps, xT, noise, True), kind=f", {table}, clip on",
                       departures={"unclipped": free})  # fmt: skip


@subject(
    formula="""DDIM eq. 12, whose alpha is alpha_bar here: x_s = sqrt(alpha_bar_s) x0 + sqrt(1 -
        alpha_bar_s - sigma^2) eps + sigma z, x0 by eq. 15, sigma = eta sqrt((1 - alpha_bar_s) / (1 -
        alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s) (DDIM eq. 16). With clip, x0 is cut to [-1, 1]
        and eps solved for again, so that xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. The
        jumps go down the grid, and from grid[0] to s = 0""",
    model=MODEL, shapes="""xT (B, D): the state at t = grid[-1]; noise (n, B, D): z of the jumps in their
        order; states (n, B, D): x_s after each of them, the last at s = 0""",
    tolerance=(FACTOR + """. Two stages. cliff: the root of that, since 1 - alpha_bar_s - sigma^2 is 0
        but for rounding, which may be negative""", ROUNDED),
    scale=SUM + ", and the scale of the state before, times the slope of the jump",
    departures={"unclipped": UNCLIPPED, "the model's own eps": """where x0 was clipped, eps is still the
        model's. Neither paper clips, so either is acceptable if it is said"""},
)  # fmt: skip
def ddim(rng):
    runs = [(ONE, [1]), (TWO, [2]), (STEEP, [1, 2, 3, 4]), (STEEP, [2, 4]), (LINE, [3, 4, 10]),
            (PAPER, [250, 500, 750, 1000]), (CLIFF, [1, 6])]  # fmt: skip
    for p, grid in runs:
        xT, noise = draw(rng, 2, 2), draw(rng, len(grid), 2, 2)
        for eta, clip in [(1.0, True)] if p is CLIFF else [(0.0, False), (0.5, True), (1.0, False)]:
            run = p.beta, ref.ddim_steps(p.beta, grid, eta), xT, noise
            others = {"unclipped": sampled(*run, False, True),
                      "the model's own eps": sampled(*run, True, True, own_eps=True)}  # fmt: skip
            one = case(p, "sample_ddim", {"xT": xT, "grid": grid, "eta": eta, "clip": clip, "noise": noise},
                       **sampled(*run, clip, root=p is not CLIFF), stages=2,
                       kind=f", grid {grid}, eta {eta}, clip {'on' if clip else 'off'}",
                       **({"departures": others} if clip else {}))  # fmt: skip
            if p is CLIFF:
                one["tolerance"] = {
                    precision: root**0.5 for precision, root in one["tolerance"].items()
                }
            yield one


# --- The bound ---------------------------------------------------------------------------------------


@subject(
    formula="KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, as the terms of eq. 5 need it",
    t="no t here", shapes="all (n,)", tolerance=("8 eps of the terms that cancel", "8 eps32 of them"),
    scale="1 + |log var_1| + |log var_2| + (var_1 + (mean_1 - mean_2)^2) / var_2",
)  # fmt: skip
def kl(rng):
    m, v = images(rng, 2, 24), 2.0 ** -rng.integers(-2, 14, (2, 24))
    m[1, :6], v[1, :4] = m[0, :6], v[0, :4]  # four pairs are equal, two more have equal means
    scale = 1 + abs(np.log(v)).sum(axis=0) + (v[0] + (m[0] - m[1]) ** 2) / v[1]
    yield {"name": "24 pairs", "call": "normal_kl",
           "given": {"mean_1": m[0], "var_1": v[0], "mean_2": m[1], "var_2": v[1]},
           "want": {"kl": ref.gaussian_kl(m[0], v[0], m[1], v[1])}, "scale": {"kl": scale},
           "tolerance": {"float64": 8 * EPS, "float32": 8 * EPS32}}  # fmt: skip


def decoder_log_prob(k, mean, var, size=0.0):
    """log p of the reference, and its scale, for a mean that was formed of terms of this size.

    log p = log Phi(high) + log(1 - e^d), d = log Phi(low) - log Phi(high), low < high and low + high <= 0.
    Each log Phi is rounded, by eps |log p| at most, and d is at least the width of the bin in z, 2 / 255 /
    sigma, times the least slope of log Phi left of 0, 0.8: 1 / (160 sigma). Both edges are rounded, by eps
    (|x0| + |mean|) / sigma, 3 / sigma at most: relative to the width that is 3 * 255 / 2 < 3 * 128, and
    where the bin is wide, log p follows an edge with the slope of log Phi, 1 + sqrt(2 |log p|) at most.
    """
    log_p, sigma = ref.decoder_log_prob(k, mean, var), np.sqrt(var)
    slope = 1 + np.sqrt(-2 * log_p)
    return log_p, (1 - log_p) * (1 + 160 * sigma) + (3 + size) * (128 + slope / sigma)


def tanh_log_prob(k, mean, var, size=0.0):
    """The same by Phi(z) = (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2, for a mass p of at least 1e-12.

    p is a difference of numbers up to 1: off by a few eps, and by half of what its edges are off, whatever p
    is.
    """
    sigma, x0 = np.sqrt(var), -1 + 2 * k / 255
    low, high = (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
                 for z in ((x0 - mean - 1 / 255) / sigma, (x0 - mean + 1 / 255) / sigma))  # fmt: skip
    p = np.maximum(np.where(k == 255, 1, high) - np.where(k == 0, 0, low), 1e-12)
    return np.log(p), (2 + (3 + size) / sigma) / p


@subject(
    formula="""eq. 13: log of the mass, in nats, that N(mean, var) puts on the bin of level k: x0 +-
        1/255 around x0 = -1 + 2 k / 255, to -infinity for k = 0 and to infinity for k = 255""",
    t="not an argument; t = 1 is the step with a decoder", shapes="k, mean, var, log_p: all (n,)",
    tolerance=("8 eps", "8 eps32; x0 is rounded to float32 as well"),
    scale="""(1 + |log p|) (1 + 160 sigma) + 3 (128 + (1 + sqrt(2 |log p|)) / sigma): two log Phi are
        rounded and subtracted over a bin of width 1 / (160 sigma) or more; x0 and mean are rounded, over
        a bin of 2 / 255""",
    departures={"tanh": TANH},
)  # fmt: skip
def decoder(rng):
    k = np.array([0, 1, 2, 64, 127, 128, 191, 253, 254, 255])
    for name, off, var in [
        ("narrow", 0.0, 2.0**-14),
        ("wide", 0.25, 0.25),
        ("very wide", 1.0, 4.0),
        ("missed by 4 sigma", 0.0625, 2.0**-12),
        ("missed by 64 sigma", 1.0, 2.0**-12),
    ]:
        mean = np.round((-1 + 2 * k / 255) * 64) / 64 + off * rng.choice([-1, 1], len(k))
        (want, scale), (other, other_scale) = (
            decoder_log_prob(k, mean, var),
            tanh_log_prob(k, mean, var),
        )
        yield {"name": name, "call": "discretized_log_likelihood",
               "given": {"k": k, "mean": mean, "var": np.full(len(k), var)},
               "want": {"log_p": want}, "scale": {"log_p": scale},
               "tolerance": {"float64": 8 * EPS, "float32": 8 * EPS32},
               "departures": {"tanh": {"want": {"log_p": other},
                                       "scale": {"log_p": other_scale}}}}  # fmt: skip


def bound_term(beta, sigma2, t, k, xt, size, clip, first, log_prob):
    """(L_{t-1}, its scale) in nats, elementwise; xt was formed of terms of this size.

    The error of each mean is in proportion to its terms, and that of the KL is their difference times it,
    over sigma2[t].
    """
    x0 = -1 + 2 * k / 255
    a, b = ref.transition(beta, 0, t) ** np.array([1, 0.5])
    c_0, c_t, var = ref.posterior(beta, t)
    eps = model(xt, t)
    free = (xt - b * eps) / a
    mean = c_0 * (free.clip(-1, 1) if clip else free) + c_t * xt
    size = c_0 * (abs(x0) + (3 * size + 2 * b * abs(eps)) / a) + 4 * c_t * size
    if t == 1:
        log_p, scale = log_prob(k, mean, first, size)
        return -log_p, scale
    gap, s2 = abs(c_0 * x0 + c_t * xt - mean), sigma2[t]
    scale = 1 + abs(np.log(var)) + abs(np.log(s2)) + (var + gap * (gap + size)) / s2
    return ref.gaussian_kl(gap, var, 0, s2), scale


def bound_terms(beta, tables, k, z, clip, sigma_1=False, log_prob=decoder_log_prob):
    """(L_0, .., L_T) of eq. 5 in bits/dim, (K, B, T + 1), and their scales; z is the noise of every xt."""
    T, x0, var = len(beta) - 1, -1 + 2 * k / 255, beta_tilde(beta)
    a, v = ref.transition(beta, 0, T)
    prior = ref.gaussian_kl(a * x0, v, 0, 1), 1 + abs(np.log(v)) + a**2 * x0**2
    rows = []
    for sigma2 in tables:
        first = sigma2[1] if sigma_1 and sigma2[1] > 0 else var[2] if T > 1 else beta[1]
        terms = []
        for t in range(1, T + 1):
            a, b = ref.transition(beta, 0, t) ** np.array([1, 0.5])
            xt, size = a * x0 + b * z, a * abs(x0) + b * abs(z)
            terms.append(bound_term(beta, sigma2, t, k, xt, size, clip, first, log_prob))
        rows.append([*terms, prior])
    want, scale = np.moveaxis(np.mean(rows, axis=-1), [2, 0, 3, 1], [0, 1, 2, 3]) / np.log(2)
    return {"want": {"terms": want}, "scale": {"terms": scale}}


@subject(
    formula="""eq. 5 in bits/dim, averaged over the dimensions: terms[.., t - 1] = KL(q(x_{t-1} | xt, x0)
        || N(mean, variances[..][t])) for t >= 2, mean by eq. 11; terms[.., 0] = -log2 of the decoder
        (eq. 13) of variance beta_tilde_2, or beta_1 if T = 1; terms[.., T] = KL(q(x_T | x0) || N(0, 1)).
        Their sum is the bound""",
    model=MODEL, shapes="""k (B, D): levels, x0 = -1 + 2 k / 255; variances (K, T + 1); noise (B, D): eps
        of eq. 4, the same at every t, so that the order of the steps is free; terms (K, B, T + 1)""",
    tolerance=(FACTOR + ". Two stages", ROUNDED),
    scale="""that of kl.json, and the difference of the means times the terms of which they are formed,
        over the variance; at t = 1 that of decoder.json, with the terms of the mean added to the 3""",
    departures={"unclipped": UNCLIPPED, "tanh": TANH + ". Only in terms[.., 0]", "sigma_1": """the
        decoder's variance is variances[..][1] where that is not 0. The paper does not name sigma_1; its
        authors' code takes beta_tilde_2. Acceptable if it is said"""},
)  # fmt: skip
def bound(rng):
    for p in SHORT:
        k, z, variances = (
            rng.integers(0, 256, (2, 2)),
            draw(rng, 2, 2),
            [p.beta, beta_tilde(p.beta)],
        )
        k[:, 0] = 0, 255
        for clip in False, True:
            run = p.beta, variances, k, z
            others = {"sigma_1": bound_terms(*run, clip, sigma_1=True),
                      "tanh": bound_terms(*run, clip, log_prob=tanh_log_prob),
                      **({"unclipped": bound_terms(*run, False)} if clip else {})}  # fmt: skip
            yield case(p, "bound_terms", {"k": k, "variances": variances, "clip": clip, "noise": z},
                       **bound_terms(*run, clip), stages=2, kind=f", clip {'on' if clip else 'off'}",
                       departures=others)  # fmt: skip


# --- The network -------------------------------------------------------------------------------------


@subject(
    formula="""[sin(t f_0), sin(t f_1), .., cos(t f_0), cos(t f_1), ..], f_i = 10000^(-i / (dim/2 - 1)) for
        i < dim/2""",
    t="what the network hands in, its t - 1: from 0", shapes="t (B,), embedding (B, dim)",
    tolerance=("4 eps", "4 eps32"), scale="1 + t: the angle t f_i is rounded, and f_i is off by a few eps",
    departures={"iDDPM": """as in its authors' code, cosines come first and f_i = 10000^(-i / (dim/2)).
        Acceptable in a network that is trained with it; the paper's weights need the other"""},
)  # fmt: skip
def embedding(rng):
    for dim, t in (4, [0, 1, 2, 10, 999]), (32, [0, 1, 999]):
        column, want = np.array(t, np.float64)[:, None], ref.timestep_embedding(t, dim)
        angle = column * 10000.0 ** -(np.arange(dim // 2) / (dim // 2))
        other = {"embedding": np.concatenate([np.cos(angle), np.sin(angle)], axis=1)}
        yield {"name": f"dim = {dim}", "call": "timestep_embedding", "given": {"t": t, "dim": dim},
               "want": {"embedding": want}, "scale": {"embedding": np.broadcast_to(1 + column, want.shape)},
               "tolerance": {"float64": 4 * EPS, "float32": 4 * EPS32},
               "departures": {"iDDPM": {"want": other}}}  # fmt: skip


CONFIG = {"in_channels": 3, "out_channels": 3, "ch": 8, "mult": [1, 2], "blocks": 1, "attention": [1],
          "groups": 4, "dropout": 0.0}  # fmt: skip


def block_layers(name, i, o, attention):
    """(name, shape of the weight) of a residual block from i to o channels, and of the attention after it."""
    parts = {"norm1": (i,), "conv1": (o, i, 3, 3), "emb": (o, 4 * CONFIG["ch"]), "norm2": (o,),
             "conv2": (o, o, 3, 3), "shortcut": (o, i, 1, 1)}  # fmt: skip
    if i == o:
        del parts["shortcut"]
    if attention:
        parts["attention.norm"] = (o,)
        parts.update({f"attention.{part}": (o, o, 1, 1) for part in ("q", "k", "v", "out")})
    return [(f"{name}.{part}", shape) for part, shape in parts.items()]


def layers():
    """(name, shape of the weight) of every layer in the order of use; the bias is (shape[0],)."""
    ch, blocks, top = CONFIG["ch"], CONFIG["blocks"], len(CONFIG["mult"]) - 1
    found = [("time.0", (4 * ch, ch)), ("time.1", (4 * ch, 4 * ch)),
             ("conv_in", (ch, CONFIG["in_channels"], 3, 3))]  # fmt: skip
    names = [f"down.{level}.{i}" for level in range(top + 1) for i in range(blocks)] + [
        "mid.0",
        "mid.1",
    ]
    names += [f"up.{level}.{i}" for level in reversed(range(top + 1)) for i in range(blocks + 1)]
    for name, (level, i, o) in zip(
        names, ref.residual_table(ch, CONFIG["mult"], blocks), strict=True
    ):
        found += block_layers(name, i, o, level in CONFIG["attention"] or name == "mid.0")
        if name == f"down.{level}.{blocks - 1}" and level < top:
            found.append((f"shrink.{level}", (o, o, 3, 3)))
        if name == f"up.{level}.{blocks}" and level > 0:
            found.append((f"grow.{level}", (o, o, 3, 3)))
    return [*found, ("norm_out", (o,)), ("conv_out", (CONFIG["out_channels"], o, 3, 3))]


def network_arrays(rng):
    """xt, t and the weights by name, in the order of use and in steps of 1/256: exact in float32."""
    weights = {}
    for name, shape in layers():
        mean, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.7 / np.prod(shape[1:]) ** 0.5)
        weights[f"{name}.weight"] = mean + spread * rng.standard_normal(shape)
        weights[f"{name}.bias"] = 0.3 * rng.standard_normal(shape[0])
    return (
        draw(rng, 2, 3, 4, 6),
        np.array([1, 700]),
        {k: np.round(w * 256) / 256 for k, w in weights.items()},
    )


def unet(xt, t, weights):
    sizes = {key: CONFIG[key] for key in ("ch", "mult", "blocks", "attention", "groups")}
    return ref.unet(xt, t, list(weights.values()), **sizes)


def sensitivity(rng, xt, t, weights, step=2.0**-20):
    """The largest change of an output when each pixel and weight moves by +-step of itself, over step."""

    def moved(x):
        return x * (1 + step * rng.choice([-1, 1], x.shape))

    eps = unet(xt, t, weights)
    tries = [unet(moved(xt), t, {name: moved(w) for name, w in weights.items()}) for _ in range(16)]
    return max(abs(eps - other).max() for other in tries) / step


@subject(
    formula="""App. B: the network of this config. Attention follows the residual blocks of level 1 and
        the first in the middle; GroupNorm's eps is 1e-6; a convolution of stride 2 sees a row and a
        column of zeros at the bottom and the right only; 2x upsampling repeats pixels before its
        convolution; t - 1 is embedded""",
    shapes="""xt, eps (B, C, H, W), t (B,). Weights: dense (out, in), convolutions (out, in, height,
        width), biases (out,). The arrays are in network.npz, weights in float32, in the order of use""",
    tolerance=("as in float32: the embedding of t may be float32 in a network of float64 too",
               """16 eps32 times the change of the outputs when every pixel and weight moves by a share of
        itself, over that share: rounding in a sum of n terms is as if each had moved by eps32 / 2,
        n^(1/2) times, and n is 216 at most"""),
    scale="1, the order of the outputs",
)  # fmt: skip
def network(rng):
    xt, t, weights = network_arrays(rng)
    assert sum(w.size for w in weights.values()) == ref.unet_parameter_count(
        **{key: value for key, value in CONFIG.items() if key not in ("groups", "dropout")})  # fmt: skip
    change = sensitivity(rng, xt, t, weights)
    yield {"name": f"{sum(w.size for w in weights.values())} weights", "call": "UNet",
           "given": {"xt": "network.npz:xt", "t": "network.npz:t", "config": CONFIG,
                     "weights": {name: list(w.shape) for name, w in weights.items()}},
           "want": {"eps": "network.npz:eps"}, "scale": {"eps": 1.0},
           "tolerance": dict.fromkeys(("float64", "float32"), 16 * EPS32 * change)}  # fmt: skip


# --- What must be refused ----------------------------------------------------------------------------


@subject(
    formula="""none. The answer is an error that says in words what is wrong (in Python a ValueError, an
        AssertionError or a TypeError), before anything is returned""",
    model=MODEL, shapes="as in the other files, but for what a case is named after",
    tolerance=("none", "none"),
)  # fmt: skip
def refused(rng):
    beta, pair, one, wide = (
        STEEP.written,
        np.full((2, 2), 0.5),
        np.full((1, 2), 0.5),
        np.full((2, 3), 0.5),
    )
    t, run = [1, 2], {"eta": 0.0, "clip": False, "noise": np.full((4, 2, 2), 0.5)}
    judged = {"variances": [beta], "clip": True, "noise": one}
    for name, call, given in [
        ("beta[0] is not 0", "Diffusion", {"beta": [0.1, 0.2]}),
        ("no step", "Diffusion", {"beta": [0.0]}),
        ("beta_2 is 0", "Diffusion", {"beta": [0.0, 0.1, 0.0]}),
        ("beta_2 is 1", "Diffusion", {"beta": [0.0, 0.1, 1.0]}),
        ("beta_1 is negative", "Diffusion", {"beta": [0.0, -0.1, 0.1]}),
        ("1 - beta_1 rounds to 1", "Diffusion", {"beta": [0.0, 1e-17, 0.1]}),
        ("beta is a matrix", "Diffusion", {"beta": [[0.0, 0.1], [0.0, 0.1]]}),
        ("t is T + 1", "Diffusion.q_sample", {"beta": beta, "x0": pair, "t": [1, 5], "eps": pair}),
        ("t is -1", "Diffusion.q_sample", {"beta": beta, "x0": pair, "t": [1, -1], "eps": pair}),
        (
            "t is longer",
            "Diffusion.q_sample",
            {"beta": beta, "x0": pair, "t": [1, 2, 3], "eps": pair},
        ),
        ("eps is wider", "Diffusion.q_sample", {"beta": beta, "x0": pair, "t": t, "eps": wide}),
        (
            "eps would be repeated",
            "Diffusion.q_sample",
            {"beta": beta, "x0": pair, "t": t, "eps": one},
        ),
        (
            "no step from 0",
            "Diffusion.posterior_mean",
            {"beta": beta, "x0": pair, "xt": pair, "t": [1, 0]},
        ),
        (
            "no step from 0",
            "Diffusion.eps_from_x0",
            {"beta": beta, "xt": pair, "t": [1, 0], "x0": pair},
        ),
        (
            "xt would be repeated",
            "Diffusion.posterior_mean",
            {"beta": beta, "x0": pair, "xt": one, "t": t},
        ),
        (
            "eps would be repeated",
            "Diffusion.x0_from_eps",
            {"beta": beta, "xt": pair, "t": t, "eps": one},
        ),
        (
            "x0 would be repeated",
            "Diffusion.eps_from_x0",
            {"beta": beta, "xt": pair, "t": t, "x0": one},
        ),
        ("the grid begins at 0", "sample_ddim", {"beta": beta, "xT": pair, "grid": [0, 4], **run}),
        ("the grid falls", "sample_ddim", {"beta": beta, "xT": pair, "grid": [3, 1], **run}),
        ("a step comes twice", "sample_ddim", {"beta": beta, "xT": pair, "grid": [2, 2], **run}),
        ("0 steps of 10", "ddim_grid", {"T": 10, "n": 0}),
        ("11 steps of 10", "ddim_grid", {"T": 10, "n": 11}),
        ("x0 is between two levels", "bound_terms", {"beta": beta, "x0": one, **judged}),
        ("x0 is beyond 1", "bound_terms", {"beta": beta, "x0": one * 2 + 2 / 255, **judged}),
        (
            "height 5, of two levels",
            "UNet",
            {"xt": np.zeros((1, 3, 5, 4)), "t": [1], "config": CONFIG},
        ),
        ("two t, one image", "UNet", {"xt": np.zeros((1, 3, 4, 4)), "t": [1, 2], "config": CONFIG}),
    ]:
        yield {"name": name, "call": call, "given": given}


# --- The files ---------------------------------------------------------------------------------------


def plain(value, digits=None):
    """A value as JSON knows it: nan becomes null, words lose their line breaks, scales keep three digits."""
    if isinstance(value, dict):
        return {k: plain(v, 3 if k in ("scale", "tolerance") else digits) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v, digits) for v in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(f"{value:.{digits}g}") if digits else float(value)
    if isinstance(value, str):
        return " ".join(value.split())
    return int(value) if isinstance(value, np.integer) else value


def text(value, indent="\n"):
    """JSON with a line for every key and every case. An array stays on one line, and its floats are what repr
    gives: the shortest decimals that read back as the same float64."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{json.dumps(key)}: {text(v, deeper)}" for key, v in value.items()]
        return "{" + deeper + f",{deeper}".join(rows) + indent + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + deeper + f",{deeper}".join(text(v, deeper) for v in value) + indent + "]"
    return json.dumps(value, allow_nan=False)


def document(name):
    """The content of NAME.json, as plain values."""
    cases, head = SUBJECTS[name]
    float64, float32 = head["tolerance"]
    scale = {"scale": head["scale"]} if "scale" in head else {}
    words = {"formula": head["formula"], "t": head.get("t", T_FROM_1), "model": head.get("model"),
             "shapes": head["shapes"], "departures": head.get("departures")}  # fmt: skip
    return plain({"subject": name, **{key: value for key, value in words.items() if value},
                  "tolerances": {"rule": RULE, "float64": float64, "float32": float32, **scale},
                  "cases": list(cases(np.random.default_rng(SEED)))})  # fmt: skip


def write(folder):
    """All the files, into a folder that exists."""
    for name in SUBJECTS:
        (folder / f"{name}.json").write_text(text(document(name)) + "\n", encoding="ascii")
    xt, t, weights = network_arrays(np.random.default_rng(SEED))
    single = {name: w.astype("<f4") for name, w in weights.items()}
    np.savez_compressed(folder / "network.npz", xt=xt, t=t, eps=unet(xt, t, weights), **single)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FOLDER", type=pathlib.Path, default=HERE,
                        help="a folder that exists (default: where write.py is)")  # fmt: skip
    write(parser.parse_args().out)
