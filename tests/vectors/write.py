"""Write the test vectors from the NumPy reference: python tests/vectors/write.py [--out FOLDER]

There is one JSON file for each subject, and network.npz. README.md explains their format. Random inputs have a
fixed seed and are multiples of 1/64, which are exact in float32 too, so inputs add no error. Each expected
number has a tolerance for float64 and one for float32. The tolerances are derived in this file.
"""

import argparse
import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "specification")]

import exact_models  # noqa: E402
import network_numpy  # noqa: E402

import reference_numpy as ref  # noqa: E402

SEED = 2006_11239  # of NumPy's default generator, which starts again for each file
EPS = 2.0**-52
EPS32 = 2.0**-23
SUBJECTS = {}  # name of a subject -> (generator of its cases, texts at the top of its file)

# --- The processes -----------------------------------------------------------------------------------


class Process(NamedTuple):
    name: str
    written: object  # beta in the JSON file: a list, or the ends of a linear schedule
    beta: np.ndarray  # beta[0..T]
    steps: list  # the timesteps of the cases


def listed(name, beta):
    """Return a process with a short table, which the file contains, and the timesteps 1..T."""
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
    """Return (a, b, c_0, c_t), each (B, 1): xt = a x0 + b eps, and eq. 7 is c_0 x0 + c_t xt."""
    a, v = (moments[t] for moments in ref.forward_moments(beta))
    c_0, c_t, _ = np.transpose([ref.posterior(beta, i) for i in t])
    return [c[:, None] for c in (a, np.sqrt(v), c_0, c_t)]


def beta_tilde(beta):
    """Return beta_tilde[0..T], with 0 at t = 0, where it does not exist."""
    return np.array([0.0, *(ref.posterior(beta, t)[2] for t in range(1, len(beta)))])


def normal(rng, *shape):
    """Return samples of N(0, I), rounded to multiples of 1/64."""
    return np.round(rng.standard_normal(shape) * 64) / 64


def images(rng, *shape):
    """Return pixels in [-1, 1], multiples of 1/64."""
    return rng.integers(-64, 65, shape) / 64


# --- Texts of the files -------------------------------------------------------------------------------

T_FROM_1 = """t runs from 1 to T. A table has T + 1 entries: entry 0 is the clean image, with beta[0] = 0
    and alpha_bar[0] = 1. Code that counts from 0 subtracts 1 from each t and changes nothing else"""
RULE = """|got - want| <= tolerance[precision] * scale for each entry. Without a scale, it is |want|.
    Entries that are null in want are not compared"""
FACTOR = """4 eps / min beta for each stage, eps = 2^-52. alpha_bar_t is a product of t factors with a
    relative error of at most t eps. The relative error of 1 - alpha_bar_t is then t eps alpha_bar_t / (1 -
    alpha_bar_t), which is at most eps / min beta. The factor 4 covers the few other operations"""
ROUNDED = """4 eps32 for each stage, eps32 = 2^-23, for coefficients that are computed in float64 and
    rounded once and for the few operations with them, plus the float64 tolerance. 1 - alpha_bar from a
    float32 alpha_bar exceeds this at small t, because its relative error is 1.7e-4 there"""
SUM = "the sum of the absolute values of the terms that are added"
BATCH = "B images of D dimensions (B, D), row b at step t[b]; t (B,)"
MODEL = "eps(xt, t) = 0.875 xt + ((t mod 3) - 1) / 8, elementwise"
UNCLIPPED = """x0 is not clipped to [-1, 1] before the mean is computed. The paper's text does not clip,
    but the authors' code, which produced the paper's results, does. Acceptable if documented. It makes no
    difference while x0 is in [-1, 1]"""
TANH = """the normal CDF is the tanh approximation of the authors' code, and the probability of a bin is
    at least 1e-12. Acceptable if documented: Phi is off by up to 1.8e-4, and far from x0 the gradient is 0"""


def subject(**head):
    """Register the cases of a file with its texts. tolerance: how (float64, float32) are derived."""

    def add(cases):
        SUBJECTS[cases.__name__] = cases, head
        return cases

    return add


def allowed(beta, stages=1):
    """Return the tolerances of quantities computed from 1 - alpha_bar: FACTOR and ROUNDED."""
    tables = 4 * stages * EPS / beta[1:].min()
    return {"float64": tables, "float32": 4 * stages * EPS32 + tables}


def case(process, call, given, want, scale, stages=1, kind="", **more):
    """Return a case: one call and its result for a process."""
    return {"name": process.name + kind, "call": call, "given": {"beta": process.written, **given},
            "want": want, "scale": scale, "tolerance": allowed(process.beta, stages), **more}  # fmt: skip


def model(xt, t):
    """Return MODEL, which has one rounding in each precision and is easy to write in any language."""
    return 0.875 * xt + (np.asarray(t) % 3 - 1) / 8


# --- Schedules and tables ----------------------------------------------------------------------------


def cosine_scale(T, s=0.008):
    """Return the scale of the error that a rounded angle causes in 1 - cos^2(a_t) / cos^2(a_{t-1})."""
    angle = np.pi / 2 * (np.arange(-1, T) / T + s) / (1 + s)
    return 1 + 4 * np.tan(angle.clip(0))


def schedule(kind, beta, tolerance, scale, words="", **given):
    T = len(beta) - 1
    t = list(range(T + 1)) if T <= 10 else [0, *PAPER.steps]
    rounded = {"scale": {"beta": beta[t]}, "tolerance": {"float64": EPS32, "float32": EPS32}}
    return {"name": f"{kind}, T = {T}{words}", "call": f"{kind}_schedule", "given": {"T": T, **given, "t": t},
            "want": {"beta": beta[t]}, "scale": {"beta": np.broadcast_to(scale, beta.shape)[t]},
            "tolerance": {"float64": tolerance, "float32": tolerance},
            "alternatives": {"rounded to float32": rounded}}  # fmt: skip


@subject(
    formula="""beta[0..T]. linear (sec. 4): beta_t = beta_1 + (t - 1) (beta_T - beta_1) / (T - 1). cosine
        (iDDPM eq. 17): alpha_bar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), beta_t = 1 -
        alpha_bar_t / alpha_bar_{t-1}, but at most beta_max. exponential: beta_t = beta_1 (beta_T /
        beta_1)^((t-1)/(T-1)). For T = 1, beta is beta_1""",
    shapes="beta (len(t),): the entries t of a table (T + 1,)",
    tolerance=("""linear: 4 eps of beta_T. cosine: 8 eps (1 + 4 tan(angle_{t-1})), the error that a rounded
        angle causes in a ratio of two cos^2. exponential: (4 + 4 log(beta_T / beta_1)) eps of beta_t,
        the error of a power""",
               "the same, because schedules are computed in float64 for images of any precision"),
    alternatives={"rounded to float32": """the table, computed in float64, is returned in float32.
        Acceptable for beta, but not for alpha_bar: see forward.json"""},
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
        alpha_bar_{t-1}) / (1 - alpha_bar_t) (eq. 7), which does not exist at t = 0""",
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
    formula="""eq. 4: xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. Columns 0 and 1 of xt are the
        two coefficients""",
    shapes=f"x0, eps, xt: {BATCH}", tolerance=(FACTOR, ROUNDED), scale=SUM,
)  # fmt: skip
def forward(rng):
    for p in ALL:
        a, b, _, _ = coefficients(p.beta, p.steps)
        x0 = images(rng, len(p.steps), 3)
        eps = normal(rng, len(p.steps), 3)
        x0[:, :2] = [1, 0]
        eps[:, :2] = [0, 1]
        yield case(p, "Diffusion.q_sample", {"x0": x0, "t": p.steps, "eps": eps},
                   {"xt": a * x0 + b * eps}, {"xt": a * abs(x0) + b * abs(eps)})  # fmt: skip


@subject(
    formula="""eq. 7: mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x0 + sqrt(alpha_t) (1 -
        alpha_bar_{t-1}) / (1 - alpha_bar_t) xt. Columns 0 and 1 of the mean are the two coefficients. The
        variance beta_tilde_t is in tables.json""",
    shapes=f"x0, xt, mean: {BATCH}", tolerance=(FACTOR, ROUNDED), scale=SUM,
)  # fmt: skip
def posterior(rng):
    for p in ALL:
        _, _, c_0, c_t = coefficients(p.beta, p.steps)
        x0 = images(rng, len(p.steps), 3)
        xt = normal(rng, len(p.steps), 3)
        x0[:, :2] = [1, 0]
        xt[:, :2] = [0, 1]
        yield case(p, "Diffusion.posterior_mean", {"x0": x0, "xt": xt, "t": p.steps},
                   {"mean": c_0 * x0 + c_t * xt}, {"mean": c_0 * abs(x0) + c_t * abs(xt)})  # fmt: skip


@subject(
    formula="""eq. 15: x0 = (xt - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t), which is eq. 4 solved
        for x0. Solved for eps: eps = (xt - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t). eq. 11: mean = (xt
        - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), which is eq. 7 at the predicted x0. With
        clip, x0 is first clipped to [-1, 1]""",
    shapes=f"xt, eps, x0, mean: {BATCH}", tolerance=(FACTOR + ". p_mean has two stages", ROUNDED),
    scale=SUM + ", for x0 and eps after the division", alternatives={"unclipped": UNCLIPPED},
)  # fmt: skip
def parametrisation(rng):
    for p in ALL:
        a, b, c_0, c_t = coefficients(p.beta, p.steps)
        x = images(rng, len(p.steps), 2)
        eps = normal(rng, len(p.steps), 2)
        # Some of the predicted x0 are in [-1, 1] and some are not.
        xt = np.round((1.5 * a * x + b * eps) * 64) / 64
        x0 = (xt - b * eps) / a
        size = (abs(xt) + b * abs(eps)) / a
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
                   stages=2, kind=", clip on", alternatives={"unclipped": free})  # fmt: skip


@subject(
    formula="""eq. 14 for given t and eps: the mean over all images and dimensions of (eps - model(xt,
        t))^2, with xt by eq. 4""",
    model=MODEL, shapes=f"x0, eps: {BATCH}; loss: one number", tolerance=(FACTOR + ". Two stages", ROUNDED),
    scale="the mean of gap^2 + |gap| * (sum of the absolute values of the terms of gap), gap = eps - model",
)  # fmt: skip
def loss(rng):
    for p in ALL:
        a, b, _, _ = coefficients(p.beta, p.steps)
        x0 = images(rng, len(p.steps), 3)
        eps = normal(rng, len(p.steps), 3)
        gap = eps - model(a * x0 + b * eps, np.array(p.steps)[:, None])
        size = abs(eps) + 0.875 * (a * abs(x0) + b * abs(eps)) + 0.125
        yield case(p, "loss_simple", {"x0": x0, "t": p.steps, "eps": eps}, {"loss": np.mean(gap**2)},
                   {"loss": np.mean(gap**2 + abs(gap) * size)}, stages=2)  # fmt: skip


# --- Samplers ----------------------------------------------------------------------------------------


def sampled(beta, steps, xt, noise, clip, root=False, own_eps=False):
    """Return each state x_s of a sampler and its scale.

    A step is x_s = p x0 + q xt + r eps + sigma z. Here p x0 + q xt is k_0 x0 + k_t xt. If the model's eps is
    kept, it is (k_0 + k_t a) x0 + k_t b eps, because xt = a x0 + b eps. The step multiplies an error of xt by
    at most the slope. Its own error is proportional to its terms, also if eps is computed from x0 and xt.
    DDIM's coefficient of eps is the root of c^2 = (1 - alpha_bar_s) - sigma^2; its error is that of c^2
    divided by 2 c.
    """
    states = []
    scales = []
    error = 0.0
    for (t, (k_0, k_t, sigma2)), z in zip(steps, noise, strict=True):
        a, b = ref.transition(beta, 0, t) ** np.array([1, 0.5])
        eps = model(xt, t)
        x0 = (xt - b * eps) / a
        size = (abs(xt) + b * abs(eps)) / a
        inside = abs(x0) <= 1 if clip else np.full(x0.shape, True)
        x0 = np.where(inside, x0, np.sign(x0))
        size = np.where(inside, size, 1.0)
        if own_eps:
            p = k_0 + k_t * a
            q = 0.0
            r = k_t * b
        else:
            p = k_0
            q = k_t
            r = 0.0
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
    formula="""Algorithm 2: x_{t-1} = mean + sqrt(sigma2[t]) z for t = T .. 1, with the mean of eq. 11, with
        or without clip, and z = 0 at t = 1""",
    model=MODEL, shapes="""xT (B, D); sigma2 (T + 1,), variances; noise (T, B, D): z at t = T, T - 1, .., 1,
        where the last must not be used; states (T, B, D): x_{T-1}, .., x_0""",
    tolerance=(FACTOR + ". Two stages", ROUNDED),
    scale=SUM + ", plus the scale of the previous state times the slope of the step",
    alternatives={"unclipped": UNCLIPPED},
)  # fmt: skip
def ancestral(rng):
    for p in SHORT:
        xT = normal(rng, 2, 2)
        noise = normal(rng, len(p.steps), 2, 2)
        for table, sigma2 in ("beta", p.beta), ("beta_tilde", beta_tilde(p.beta)):
            given = {"xT": xT, "sigma2": sigma2}
            steps = exact_models.ancestral_steps(p.beta, sigma2)
            free = sampled(p.beta, steps, xT, noise, False)
            yield case(p, "sample_ancestral", {**given, "clip": False, "noise": noise}, **free, stages=2,
                       kind=f", {table}, clip off")  # fmt: skip
            yield case(p, "sample_ancestral", {**given, "clip": True, "noise": noise}, stages=2,
                       **sampled(p.beta, steps, xT, noise, True), kind=f", {table}, clip on",
                       alternatives={"unclipped": free})  # fmt: skip


@subject(
    formula="""DDIM eq. 12, whose alpha is alpha_bar here: x_s = sqrt(alpha_bar_s) x0 + sqrt(1 -
        alpha_bar_s - sigma^2) eps + sigma z, x0 by eq. 15, sigma = eta sqrt((1 - alpha_bar_s) / (1 -
        alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s) (DDIM eq. 16). With clip, x0 is clipped to [-1,
        1], and eps is computed again from xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. The steps
        go down from timesteps[-1] to timesteps[0] and then to s = 0""",
    model=MODEL, shapes="""xT (B, D): the state at t = timesteps[-1]; noise (n, B, D): z of the steps in
        their order; states (n, B, D): x_s after each step, the last at s = 0""",
    tolerance=(FACTOR + """. Two stages. cliff: the root of that, because 1 - alpha_bar_s - sigma^2 is 0
        there, and its rounding error may be negative""", ROUNDED),
    scale=SUM + ", plus the scale of the previous state times the slope of the step",
    alternatives={"unclipped": UNCLIPPED, "the model's own eps": """eps remains the model's where x0 was
        clipped. Neither paper clips, so this is acceptable if documented"""},
)  # fmt: skip
def ddim(rng):
    runs = [(ONE, [1]), (TWO, [2]), (STEEP, [1, 2, 3, 4]), (STEEP, [2, 4]), (LINE, [3, 4, 10]),
            (PAPER, [250, 500, 750, 1000]), (CLIFF, [1, 6])]  # fmt: skip
    for p, timesteps in runs:
        xT = normal(rng, 2, 2)
        noise = normal(rng, len(timesteps), 2, 2)
        for eta, clip in [(1.0, True)] if p is CLIFF else [(0.0, False), (0.5, True), (1.0, False)]:
            run = p.beta, exact_models.ddim_steps(p.beta, timesteps, eta), xT, noise
            others = {"unclipped": sampled(*run, False, True),
                      "the model's own eps": sampled(*run, True, True, own_eps=True)}  # fmt: skip
            given = {"xT": xT, "timesteps": timesteps, "eta": eta, "clip": clip, "noise": noise}
            one = case(p, "sample_ddim", given,
                       **sampled(*run, clip, root=p is not CLIFF), stages=2,
                       kind=f", timesteps {timesteps}, eta {eta}, clip {'on' if clip else 'off'}",
                       **({"alternatives": others} if clip else {}))  # fmt: skip
            if p is CLIFF:
                one["tolerance"] = {
                    precision: root**0.5 for precision, root in one["tolerance"].items()
                }
            yield one


# --- The bound ---------------------------------------------------------------------------------------


@subject(
    formula="KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise, for the terms of eq. 5",
    t="not an argument", shapes="all (n,)", tolerance=("8 eps", "8 eps32"),
    scale="1 + |log var_1| + |log var_2| + (var_1 + (mean_1 - mean_2)^2) / var_2",
)  # fmt: skip
def kl(rng):
    m = images(rng, 2, 24)
    v = 2.0 ** -rng.integers(-2, 14, (2, 24))
    m[1, :6] = m[0, :6]
    v[1, :4] = v[0, :4]  # four pairs are equal and two more have equal means
    scale = 1 + abs(np.log(v)).sum(axis=0) + (v[0] + (m[0] - m[1]) ** 2) / v[1]
    yield {"name": "24 pairs", "call": "normal_kl",
           "given": {"mean_1": m[0], "var_1": v[0], "mean_2": m[1], "var_2": v[1]},
           "want": {"kl": ref.gaussian_kl(m[0], v[0], m[1], v[1])}, "scale": {"kl": scale},
           "tolerance": {"float64": 8 * EPS, "float32": 8 * EPS32}}  # fmt: skip


def decoder_log_prob(k, mean, var, size=0.0):
    """Return log p of the reference and its scale, for a mean that is a sum of terms of this size.

    log p = log Phi(high) + log(1 - e^d), d = log Phi(low) - log Phi(high), low < high and low + high <= 0.
    Rounding changes each log Phi by at most eps |log p|. |d| is at least the width of the bin in z, 2 / 255 /
    sigma, times the least slope of log Phi left of 0, which is 0.8: 1 / (160 sigma). Rounding changes each
    edge by at most eps (|x0| + |mean|) / sigma <= 3 eps / sigma. Relative to the width, this is 3 * 255 / 2 <
    3 * 128. For a wide bin, log p follows an edge with the slope of log Phi, at most 1 + sqrt(2 |log p|).
    """
    log_p = ref.decoder_log_prob(k, mean, var)
    sigma = np.sqrt(var)
    slope = 1 + np.sqrt(-2 * log_p)
    return log_p, (1 - log_p) * (1 + 160 * sigma) + (3 + size) * (128 + slope / sigma)


def tanh_log_prob(k, mean, var, size=0.0):
    """Return the same with Phi(z) = (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2 and p at least 1e-12.

    p is a difference of numbers up to 1. Its error is a few eps plus half the error of its edges.
    """
    sigma = np.sqrt(var)
    x0 = -1 + 2 * k / 255
    low, high = (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
                 for z in ((x0 - mean - 1 / 255) / sigma, (x0 - mean + 1 / 255) / sigma))  # fmt: skip
    p = np.maximum(np.where(k == 255, 1, high) - np.where(k == 0, 0, low), 1e-12)
    return np.log(p), (2 + (3 + size) / sigma) / p


@subject(
    formula="""eq. 13: log of the probability, in nats, that N(mean, var) gives to the bin of level k: from
        x0 - 1/255 to x0 + 1/255, x0 = -1 + 2 k / 255, from -infinity for k = 0 and to infinity for k = 255""",
    t="not an argument; the decoder belongs to t = 1", shapes="k, mean, var, log_p: all (n,)",
    tolerance=("8 eps", "8 eps32, because x0 is rounded to float32 too"),
    scale="""(1 + |log p|) (1 + 160 sigma) + 3 (128 + (1 + sqrt(2 |log p|)) / sigma): two rounded
        log Phi, subtracted over a bin of width 1 / (160 sigma) or more, and rounded x0 and mean, over a bin
        of width 2 / 255""",
    alternatives={"tanh": TANH},
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
        (want, scale) = decoder_log_prob(k, mean, var)
        (other, other_scale) = tanh_log_prob(k, mean, var)
        yield {"name": name, "call": "discretized_log_likelihood",
               "given": {"k": k, "mean": mean, "var": np.full(len(k), var)},
               "want": {"log_p": want}, "scale": {"log_p": scale},
               "tolerance": {"float64": 8 * EPS, "float32": 8 * EPS32},
               "alternatives": {"tanh": {"want": {"log_p": other},
                                       "scale": {"log_p": other_scale}}}}  # fmt: skip


def bound_term(beta, sigma2, t, k, xt, size, clip, first, log_prob):
    """Return (L_{t-1}, its scale) in nats, elementwise, for an xt that is a sum of terms of this size.

    The error of each mean is proportional to its terms. The error of the KL is this error times the
    difference of the means, divided by sigma2[t].
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
    gap = abs(c_0 * x0 + c_t * xt - mean)
    s2 = sigma2[t]
    scale = 1 + abs(np.log(var)) + abs(np.log(s2)) + (var + gap * (gap + size)) / s2
    return ref.gaussian_kl(gap, var, 0, s2), scale


def bound_terms(beta, tables, k, z, clip, sigma_1=False, log_prob=decoder_log_prob):
    """Return (L_0, .., L_T) of eq. 5 in bits/dim, (K, B, T + 1), and their scales. z is the noise at each t."""
    T = len(beta) - 1
    x0 = -1 + 2 * k / 255
    var = beta_tilde(beta)
    a, v = ref.transition(beta, 0, T)
    prior = ref.gaussian_kl(a * x0, v, 0, 1), 1 + abs(np.log(v)) + a**2 * x0**2
    rows = []
    for sigma2 in tables:
        first = sigma2[1] if sigma_1 and sigma2[1] > 0 else var[2] if T > 1 else beta[1]
        terms = []
        for t in range(1, T + 1):
            a, b = ref.transition(beta, 0, t) ** np.array([1, 0.5])
            xt = a * x0 + b * z
            size = a * abs(x0) + b * abs(z)
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
        of eq. 4, the same at each t, so the order of the timesteps does not matter; terms (K, B, T + 1)""",
    tolerance=(FACTOR + ". Two stages", ROUNDED),
    scale="""that of kl.json, plus the difference of the means times the sum of the absolute values of their
        terms, divided by the variance; at t = 1 that of decoder.json, with the terms of the mean added to
        the 3""",
    alternatives={"unclipped": UNCLIPPED, "tanh": TANH + ". Only in terms[.., 0]", "sigma_1": """the
        decoder's variance is variances[..][1] where that is not 0. The paper does not state sigma_1; the
        authors' code uses beta_tilde_2. Acceptable if documented"""},
)  # fmt: skip
def bound(rng):
    for p in SHORT:
        k = rng.integers(0, 256, (2, 2))
        z = normal(rng, 2, 2)
        variances = [p.beta, beta_tilde(p.beta)]
        k[:, 0] = 0, 255
        for clip in False, True:
            run = p.beta, variances, k, z
            others = {"sigma_1": bound_terms(*run, clip, sigma_1=True),
                      "tanh": bound_terms(*run, clip, log_prob=tanh_log_prob),
                      **({"unclipped": bound_terms(*run, False)} if clip else {})}  # fmt: skip
            yield case(p, "bound_terms", {"k": k, "variances": variances, "clip": clip, "noise": z},
                       **bound_terms(*run, clip), stages=2, kind=f", clip {'on' if clip else 'off'}",
                       alternatives=others)  # fmt: skip


# --- The network -------------------------------------------------------------------------------------


@subject(
    formula="""[sin(t f_0), sin(t f_1), .., cos(t f_0), cos(t f_1), ..], f_i = 10000^(-i / (dim/2 - 1)) for
        i < dim/2""",
    t="the position that the network embeds, its t - 1, so it starts at 0", shapes="t (B,), embedding (B, dim)",
    tolerance=("4 eps", "4 eps32"), scale="1 + t, because the angle t f_i is rounded and f_i has an error of a few eps",
    alternatives={"iDDPM": """cosines come first and f_i = 10000^(-i / (dim/2)), as in that paper's code.
        Acceptable in a network that is trained with it, but not with the weights of the DDPM paper"""},
)  # fmt: skip
def embedding(rng):
    for dim, t in (4, [0, 1, 2, 10, 999]), (32, [0, 1, 999]):
        column = np.array(t, np.float64)[:, None]
        want = network_numpy.timestep_embedding(t, dim)
        angle = column * 10000.0 ** -(np.arange(dim // 2) / (dim // 2))
        other = {"embedding": np.concatenate([np.cos(angle), np.sin(angle)], axis=1)}
        yield {"name": f"dim = {dim}", "call": "timestep_embedding", "given": {"t": t, "dim": dim},
               "want": {"embedding": want}, "scale": {"embedding": np.broadcast_to(1 + column, want.shape)},
               "tolerance": {"float64": 4 * EPS, "float32": 4 * EPS32},
               "alternatives": {"iDDPM": {"want": other}}}  # fmt: skip


CONFIG = {"in_channels": 3, "out_channels": 3, "ch": 8, "mult": [1, 2], "blocks": 1, "attention": [1],
          "groups": 4, "dropout": 0.0}  # fmt: skip


def block_layers(name, i, o, attention):
    """Return (name, shape of the weight) for a residual block from i to o channels and its attention."""
    parts = {"norm1": (i,), "conv1": (o, i, 3, 3), "emb": (o, 4 * CONFIG["ch"]), "norm2": (o,),
             "conv2": (o, o, 3, 3), "shortcut": (o, i, 1, 1)}  # fmt: skip
    if i == o:
        del parts["shortcut"]
    if attention:
        parts["attention.norm"] = (o,)
        parts.update({f"attention.{part}": (o, o, 1, 1) for part in ("q", "k", "v", "out")})
    return [(f"{name}.{part}", shape) for part, shape in parts.items()]


def layers():
    """Return (name, shape of the weight) for each layer in the order of use. The bias is (shape[0],)."""
    ch = CONFIG["ch"]
    blocks = CONFIG["blocks"]
    top = len(CONFIG["mult"]) - 1
    found = [("time.0", (4 * ch, ch)), ("time.1", (4 * ch, 4 * ch)),
             ("conv_in", (ch, CONFIG["in_channels"], 3, 3))]  # fmt: skip
    names = [f"down.{level}.{i}" for level in range(top + 1) for i in range(blocks)] + [
        "mid.0",
        "mid.1",
    ]
    names += [f"up.{level}.{i}" for level in reversed(range(top + 1)) for i in range(blocks + 1)]
    for name, (level, i, o) in zip(
        names, network_numpy.residual_table(ch, CONFIG["mult"], blocks), strict=True
    ):
        found += block_layers(name, i, o, level in CONFIG["attention"] or name == "mid.0")
        if name == f"down.{level}.{blocks - 1}" and level < top:
            found.append((f"shrink.{level}", (o, o, 3, 3)))
        if name == f"up.{level}.{blocks}" and level > 0:
            found.append((f"grow.{level}", (o, o, 3, 3)))
    return [*found, ("norm_out", (o,)), ("conv_out", (CONFIG["out_channels"], o, 3, 3))]


def network_arrays(rng):
    """Return xt, t and the weights by name, in the order of use, as multiples of 1/256: exact in float32."""
    weights = {}
    for name, shape in layers():
        mean = 1.0 if "norm" in name else 0.0
        spread = 0.3 if "norm" in name else 0.7 / np.prod(shape[1:]) ** 0.5
        weights[f"{name}.weight"] = mean + spread * rng.standard_normal(shape)
        weights[f"{name}.bias"] = 0.3 * rng.standard_normal(shape[0])
    return (
        normal(rng, 2, 3, 4, 6),
        np.array([1, 700]),
        {k: np.round(w * 256) / 256 for k, w in weights.items()},
    )


def unet(xt, t, weights):
    sizes = {key: CONFIG[key] for key in ("ch", "mult", "blocks", "attention", "groups")}
    return network_numpy.unet(xt, t, weights, **sizes)


def sensitivity(rng, xt, t, weights, step=2.0**-20):
    """Return the largest change of an output, divided by step, if each input x changes to x (1 +- step)."""

    def moved(x):
        return x * (1 + step * rng.choice([-1, 1], x.shape))

    eps = unet(xt, t, weights)
    tries = [unet(moved(xt), t, {name: moved(w) for name, w in weights.items()}) for _ in range(16)]
    return max(abs(eps - other).max() for other in tries) / step


@subject(
    formula="""App. B: the network of this config. Attention follows the residual blocks of level 1 and
        the first in the middle; GroupNorm's eps is 1e-6; a convolution with stride 2 pads
        one row at the bottom and one column on the right; upsampling by 2 repeats pixels before its
        convolution; the network embeds t - 1""",
    shapes="""xt, eps (B, C, H, W), t (B,). Weights: dense (out, in), convolutions (out, in, height,
        width), biases (out,). The arrays are in network.npz, weights in float32, in the order of use""",
    tolerance=("as in float32, because a float64 network may embed t in float32",
               """16 eps32 times the relative sensitivity of the outputs to all pixels and weights. Rounding
        in a sum of n terms acts like a relative change of each term by n^(1/2) eps32 / 2, and n is at most
        216"""),
    scale="1, the magnitude of the outputs",
)  # fmt: skip
def network(rng):
    xt, t, weights = network_arrays(rng)
    assert sum(w.size for w in weights.values()) == network_numpy.unet_parameter_count(
        **{key: value for key, value in CONFIG.items() if key not in ("groups", "dropout")})  # fmt: skip
    change = sensitivity(rng, xt, t, weights)
    yield {"name": f"{sum(w.size for w in weights.values())} weights", "call": "UNet",
           "given": {"xt": "network.npz:xt", "t": "network.npz:t", "config": CONFIG,
                     "weights": {name: list(w.shape) for name, w in weights.items()}},
           "want": {"eps": "network.npz:eps"}, "scale": {"eps": 1.0},
           "tolerance": dict.fromkeys(("float64", "float32"), 16 * EPS32 * change)}  # fmt: skip


# --- Inputs that must be rejected ---------------------------------------------------------------------


@subject(
    formula="none. The implementation must raise an error, of any type, and return nothing",
    model=MODEL, shapes="as in the other files, except for the difference that the name of a case states",
    tolerance=("none", "none"),
)  # fmt: skip
def rejected(rng):
    beta = STEEP.written
    pair = np.full((2, 2), 0.5)
    one = np.full((1, 2), 0.5)
    wide = np.full((2, 3), 0.5)
    t = [1, 2]
    run = {"eta": 0.0, "clip": False, "noise": np.full((4, 2, 2), 0.5)}
    options = {"variances": [beta], "clip": True, "noise": one}
    for name, call, given in [
        ("beta[0] is not 0", "Diffusion", {"beta": [0.1, 0.2]}),
        ("no timesteps", "Diffusion", {"beta": [0.0]}),
        ("beta_2 is 0", "Diffusion", {"beta": [0.0, 0.1, 0.0]}),
        ("beta_2 is 1", "Diffusion", {"beta": [0.0, 0.1, 1.0]}),
        ("beta_1 is negative", "Diffusion", {"beta": [0.0, -0.1, 0.1]}),
        ("1 - beta_1 rounds to 1", "Diffusion", {"beta": [0.0, 1e-17, 0.1]}),
        ("beta is a matrix", "Diffusion", {"beta": [[0.0, 0.1], [0.0, 0.1]]}),
        ("t is T + 1", "Diffusion.q_sample", {"beta": beta, "x0": pair, "t": [1, 5], "eps": pair}),
        ("t is -1", "Diffusion.q_sample", {"beta": beta, "x0": pair, "t": [1, -1], "eps": pair}),
        (
            "t has three entries for two images",
            "Diffusion.q_sample",
            {"beta": beta, "x0": pair, "t": [1, 2, 3], "eps": pair},
        ),
        (
            "eps has another width",
            "Diffusion.q_sample",
            {"beta": beta, "x0": pair, "t": t, "eps": wide},
        ),
        (
            "eps would broadcast",
            "Diffusion.q_sample",
            {"beta": beta, "x0": pair, "t": t, "eps": one},
        ),
        (
            "no reverse step from t = 0",
            "Diffusion.posterior_mean",
            {"beta": beta, "x0": pair, "xt": pair, "t": [1, 0]},
        ),
        (
            "no reverse step from t = 0",
            "Diffusion.eps_from_x0",
            {"beta": beta, "xt": pair, "t": [1, 0], "x0": pair},
        ),
        (
            "xt would broadcast",
            "Diffusion.posterior_mean",
            {"beta": beta, "x0": pair, "xt": one, "t": t},
        ),
        (
            "eps would broadcast",
            "Diffusion.x0_from_eps",
            {"beta": beta, "xt": pair, "t": t, "eps": one},
        ),
        (
            "x0 would broadcast",
            "Diffusion.eps_from_x0",
            {"beta": beta, "xt": pair, "t": t, "x0": one},
        ),
        (
            "timesteps begin at 0",
            "sample_ddim",
            {"beta": beta, "xT": pair, "timesteps": [0, 4], **run},
        ),
        (
            "timesteps decrease",
            "sample_ddim",
            {"beta": beta, "xT": pair, "timesteps": [3, 1], **run},
        ),
        (
            "a timestep occurs twice",
            "sample_ddim",
            {"beta": beta, "xT": pair, "timesteps": [2, 2], **run},
        ),
        ("0 timesteps of 10", "ddim_timesteps", {"T": 10, "n": 0}),
        ("11 timesteps of 10", "ddim_timesteps", {"T": 10, "n": 11}),
        ("x0 is between two levels", "bound_terms", {"beta": beta, "x0": one, **options}),
        ("x0 is beyond 1", "bound_terms", {"beta": beta, "x0": one * 2 + 2 / 255, **options}),
        (
            "height 5 for two levels",
            "UNet",
            {"xt": np.zeros((1, 3, 5, 4)), "t": [1], "config": CONFIG},
        ),
        (
            "two t for one image",
            "UNet",
            {"xt": np.zeros((1, 3, 4, 4)), "t": [1, 2], "config": CONFIG},
        ),
    ]:
        yield {"name": name, "call": call, "given": given}


# --- The files ---------------------------------------------------------------------------------------


def plain(value, digits=None):
    """Return a value for JSON: nan becomes null, texts lose their line breaks, scales keep three digits."""
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
    """Return JSON with one line for each key and each case. An array is on one line. Floats are written by
    repr: the shortest decimals that read back as the same float64."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{json.dumps(key)}: {text(v, deeper)}" for key, v in value.items()]
        return "{" + deeper + f",{deeper}".join(rows) + indent + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + deeper + f",{deeper}".join(text(v, deeper) for v in value) + indent + "]"
    return json.dumps(value, allow_nan=False)


def document(name):
    """Return the content of NAME.json."""
    cases, head = SUBJECTS[name]
    float64, float32 = head["tolerance"]
    scale = {"scale": head["scale"]} if "scale" in head else {}
    words = {"formula": head["formula"], "t": head.get("t", T_FROM_1), "model": head.get("model"),
             "shapes": head["shapes"], "alternatives": head.get("alternatives")}  # fmt: skip
    return plain({"subject": name, **{key: value for key, value in words.items() if value},
                  "tolerances": {"rule": RULE, "float64": float64, "float32": float32, **scale},
                  "cases": list(cases(np.random.default_rng(SEED)))})  # fmt: skip


def write(folder):
    """Write all files into an existing folder."""
    for name in SUBJECTS:
        (folder / f"{name}.json").write_text(text(document(name)) + "\n", encoding="ascii")
    xt, t, weights = network_arrays(np.random.default_rng(SEED))
    single = {name: w.astype("<f4") for name, w in weights.items()}
    np.savez_compressed(folder / "network.npz", xt=xt, t=t, eps=unet(xt, t, weights), **single)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FOLDER", type=pathlib.Path, default=HERE,
                        help="existing folder (default: the folder of write.py)")  # fmt: skip
    write(parser.parse_args().out)
