"""What holds for every public function, whatever it computes: its arguments, memory, modes and precision.

The table of calls below says how each is called; the properties are stated once, for all of them.
"""

import contextlib
import copy
import gc
import inspect
import pathlib
import weakref

import judge
import pytest
import torch
from judge import close, f64, same
from test_6_ancestral import BRUTAL

import ddpm
import improved
import reference_numpy as ref


class Model(torch.nn.Module):
    """eps = tanh(w xt), then v if it learns variances; some of its parts train and some do not."""

    def __init__(self, learns=False, labels=False):
        super().__init__()
        self.w, self.learns, self.labels = torch.nn.Parameter(f64(0.4)), learns, labels
        self.training_part, self.other_part = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()

    def forward(self, xt, t, y=None):
        eps = torch.tanh(self.w.to(xt) * xt)
        if self.labels:
            eps = eps + y.reshape(-1, *[1] * (xt.ndim - 1)).to(xt) / 3
        return torch.cat([eps, 1.5 - 0.2 * xt], dim=1) if self.learns else eps


def randomised(module):
    """A module with random weights, none of them near zero."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.randn(p.shape, generator=judge.generator(i)) * 0.3)
    return module.double()


def network(**how):
    """A small labelled network."""
    how = (
        dict(in_channels=2, ch=8, mult=(1, 2), blocks=1, groups=4, dropout=0.0, num_classes=3) | how
    )
    return randomised(ddpm.UNet(**how))


def inputs(dtype=torch.float64):
    """New arguments, by the names that the calls give them: three images of two channels."""
    random = judge.generator(11)
    x0 = torch.randint(0, 256, (3, 2, 4, 4), generator=random) / 127.5 - 1
    xt, eps, v = torch.randn(3, 3, 2, 4, 4, generator=random, dtype=torch.float64)
    given = dict(
        x0=x0, xt=xt, eps=eps, v=v, emb=torch.randn(3, 32, generator=random), beta=f64(*BRUTAL)
    )
    given = {name: x.to(torch.float64 if name == "beta" else dtype) for name, x in given.items()}
    return dict(given, t=torch.tensor([3, 2, 4]), y=torch.tensor([0, 3, 1]), labels=torch.arange(60) % 3,
                generator=judge.generator(12), model=Model(), learned=Model(learns=True),
                labelled=Model(labels=True))  # fmt: skip


def told(sampler, *arguments, **options):
    """What on_step is told by a sampler: the states, last of all x0."""
    states = []
    sampler(*arguments, **options, on_step=lambda s, xs: states.append(xs))
    return states


def asked(sampler, *arguments, **options):
    """The t with which a sampler asks its model."""
    seen = []
    sampler(lambda xt, t: seen.append(t) or 0.1 * xt, *arguments, **options)
    return seen


def tables(d):
    return [x for x in vars(d).values() if torch.is_tensor(x)]


# By name, how each is called, its arguments being those of `inputs`; `generator` is of those that draw.
CALLS = {
    "linear_schedule": lambda: ddpm.linear_schedule(4),
    "cosine_schedule": lambda: ddpm.cosine_schedule(4),
    "exponential_schedule": lambda: ddpm.exponential_schedule(4),
    "Diffusion": lambda beta: tables(ddpm.Diffusion(beta)),
    "q_sample": lambda d, x0, t, eps: d.q_sample(x0, t, eps),
    "q_sample at t = 0": lambda d, x0, eps: d.q_sample(x0, 0, eps),
    "posterior_mean": lambda d, x0, xt, t: d.posterior_mean(x0, xt, t),
    "x0_from_eps": lambda d, xt, t, eps: d.x0_from_eps(xt, t, eps),
    "eps_from_x0": lambda d, xt, t, x0: d.eps_from_x0(xt, t, x0),
    "p_mean": lambda d, xt, t, eps: d.p_mean(xt, t, eps),
    "p_mean without clipping": lambda d, xt, t, eps: d.p_mean(xt, t, eps, clip=False),
    "loss_simple": lambda model, d, x0, t, eps: ddpm.loss_simple(model, d, x0, t, eps),
    "noise_like": lambda x0, generator: ddpm.noise_like(x0, generator),
    "sample_ancestral": lambda model, d, xt, generator: ddpm.sample_ancestral(
        model, d, xt, generator=generator),
    "sample_ancestral, its states": lambda model, d, xt, generator: told(
        ddpm.sample_ancestral, model, d, xt, generator=generator),
    "sample_ancestral, its t": lambda d, xt, generator: asked(
        ddpm.sample_ancestral, d, xt, generator=generator),
    "sample_ddim": lambda model, d, xt, generator: ddpm.sample_ddim(
        model, d, xt, [1, 2, 4], 1.0, generator=generator),
    "sample_ddim, its states": lambda model, d, xt, generator: told(
        ddpm.sample_ddim, model, d, xt, [1, 2, 4], 1.0, generator=generator),
    "sample_ddim without noise": lambda model, d, xt: ddpm.sample_ddim(model, d, xt, [1, 2, 4]),
    "normal_kl": lambda x0, v, xt, eps: ddpm.normal_kl(x0, v.exp(), xt, eps.exp()),
    "discretized_log_likelihood": lambda x0, xt, v: ddpm.discretized_log_likelihood(x0, xt, v.exp()),
    "bound_terms": lambda model, d, x0, generator: ddpm.bound_terms(
        model, d, x0, [d.beta, d.beta_tilde], generator=generator),
    "timestep_embedding": lambda t: ddpm.timestep_embedding(t, 32),
    "timestep_embedding of 999": lambda t: ddpm.timestep_embedding(t * 333, 32),
    "improved.variance": lambda d, t, v: improved.variance(d, t, v),
    "improved.eps_only": lambda learned, xt, t: improved.eps_only(learned)(xt, t),
    "improved.bound_term": lambda d, x0, xt, t, eps, v: improved.bound_term(d, x0, xt, t, eps, v),
    "improved.bound_term at t = 1": lambda d, x0, xt, eps, v: improved.bound_term(d, x0, xt, 1, eps, v),
    "improved.loss_hybrid": lambda learned, d, x0, t, eps: improved.loss_hybrid(learned, d, x0, t, eps),
    "improved.strided": lambda model, d, xt, t: improved.strided(model, d, [1, 2, 3, 4])[0](xt, t),
    "improved.strided, its diffusion": lambda d: tables(improved.strided(None, d, [2, 4])[1]),
    "improved.sample_ancestral": lambda learned, d, xt, generator: improved.sample_ancestral(
        learned, d, xt, generator=generator),
    "improved.sample_ancestral, its states": lambda learned, d, xt, generator: told(
        improved.sample_ancestral, learned, d, xt, generator=generator),
    "improved.bound_terms": lambda learned, d, x0, generator: improved.bound_terms(
        learned, d, x0, [d.beta], generator=generator),
    "improved.drop_labels": lambda labels, generator: improved.drop_labels(labels, 3, 0.5, generator),
    "improved.guided": lambda labelled, xt, t, y: improved.guided(labelled, y, 3, 2.0)(xt, t),
    "improved.guided at w = 0": lambda labelled, xt, t, y: improved.guided(labelled, y, 3)(xt, t),
}  # fmt: skip
NETWORKS = {
    "ResBlock": lambda block, xt, emb: block(xt, emb),
    "Attention": lambda attention, xt: attention(xt),
    "UNet": lambda net, xt, t, y: net(xt, t, y),
    "UNet in training": lambda training, xt, t, y: training(xt, t, y),
    "loss_simple of a UNet": lambda net, d, x0, t, eps: ddpm.loss_simple(net, d, x0, t, eps),
    "sample_ancestral with a UNet": lambda net, d, xt, generator: ddpm.sample_ancestral(
        net, d, xt, generator=generator),
    "sample_ddim with a UNet": lambda training, d, xt: ddpm.sample_ddim(training, d, xt, [2, 4]),
    "bound_terms of a UNet": lambda training, d, x0, generator: ddpm.bound_terms(
        training, d, x0, [d.beta], generator=generator),
    "improved.guided UNet": lambda training, xt, t, y: improved.guided(training, y, 3, 2.0)(xt, t),
}  # fmt: skip
CALLS_AND_NETWORKS = {**CALLS, **NETWORKS}
every_function = pytest.mark.parametrize("name", CALLS_AND_NETWORKS)


def needs(name):
    """The arguments that a call asks for."""
    return list(inspect.signature(CALLS_AND_NETWORKS[name]).parameters)


# Arguments of the judged file's own classes.
MADE = {
    "d": lambda: ddpm.Diffusion(BRUTAL),
    "net": lambda: network().eval(), "training": lambda: network().train(),
    "block": lambda: randomised(ddpm.ResBlock(2, 2, 32, 0.0, 1)),
    "attention": lambda: randomised(ddpm.Attention(2, 1)),
}  # fmt: skip


def arguments(name, dtype=torch.float64):
    """New arguments of a call."""
    given = inputs(dtype)
    given.update({key: MADE[key]() for key in needs(name) if key in MADE})
    return {
        key: given[key].to(dtype) if key in MADE and key != "d" else given[key]
        for key in needs(name)
    }


def call(name, given):
    return CALLS_AND_NETWORKS[name](**given)


def tensors(x):
    """The tensors of a result, or of an argument: of a module, its weights; of a diffusion, its tables."""
    if torch.is_tensor(x):
        return [x]
    if isinstance(x, torch.nn.Module):
        return [*x.parameters(), *x.buffers()]
    if isinstance(x, (list, tuple)):
        return [y for part in x for y in tensors(part)]
    return [] if isinstance(x, torch.Generator) else tables(x)


# --- Memory --------------------------------------------------------------------------------------


@every_function
def test_arguments_are_left_as_they_were(name):
    """No tensor of them is written to, not even with what it held; a module keeps its weights, a diffusion
    its tables; nothing is hung on them."""
    given = arguments(name)
    before = copy.deepcopy({key: x for key, x in given.items() if key != "generator"})
    versions = {key: [x._version for x in tensors(given[key])] for key in before}
    call(name, given)
    for key, was in before.items():
        for x, y in zip(tensors(given[key]), tensors(was), strict=True):
            same(key, x, y)
        assert [x._version for x in tensors(given[key])] == versions[key], f"{key} is written to"
        if hasattr(was, "__dict__"):
            assert set(vars(given[key])) == set(vars(was)), f"hung on {key}"


@every_function
def test_results_share_no_memory(name):
    """Not with the arguments, with one another, or with those of the next call: whoever holds a result, or
    a state that on_step was told, may write to it."""
    given = arguments(name)
    results = [*tensors(call(name, given)), *tensors(call(name, given))]
    held = [x for x in given.values() for x in tensors(x)]
    places = [x.untyped_storage().data_ptr() for x in results]
    assert len(set(places)) == len(places), "two results are one"
    assert not set(places) & {x.untyped_storage().data_ptr() for x in held}, (
        "a result is an argument"
    )


def test_nothing_is_kept_between_calls():
    """When a result is gone, no tensor is left that was not there before: no cache, no graph, no list."""
    given = {}
    for name in CALLS_AND_NETWORKS:
        with contextlib.suppress(pytest.skip.Exception):  # of a name that is absent
            given[name] = arguments(name)
            call(name, given[name])
    gc.collect()
    gc.freeze()  # what there is now is not looked at
    try:
        for name in given:
            with contextlib.suppress(pytest.skip.Exception):
                call(name, given[name])
            gc.collect()
            left = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            assert not left, (
                f"{name}: {len(left)} tensors are left, the first {tuple(left[0].shape)}"
            )
    finally:
        gc.unfreeze()


LONG_RUNS = {
    "sample_ancestral": lambda eps, d, x: ddpm.sample_ancestral(eps, d, x),
    "sample_ddim": lambda eps, d, x: ddpm.sample_ddim(eps, d, x, range(1, 9), 1.0),
    "bound_terms": lambda eps, d, x: ddpm.bound_terms(eps, d, x.sign(), [d.beta]),
    "improved.sample_ancestral": lambda eps, d, x: improved.sample_ancestral(
        lambda xt, t: torch.cat([eps(xt, t), xt], dim=1), d, x),
    "improved.bound_terms": lambda eps, d, x: improved.bound_terms(
        lambda xt, t: torch.cat([eps(xt, t), xt], dim=1), d, x.sign()),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_RUNS)
def test_memory_does_not_grow_along_a_run(name):
    """Eight steps: when the model is asked, the states before the last are gone, and no graph holds them."""
    model, seen = Model(), []

    def watched(xt, t):
        alive = sum(x() is not None for x in seen)
        assert alive <= 2, f"{alive} earlier states are held at t = {int(t[0])}"
        seen.append(weakref.ref(xt))
        return model(xt, t)

    LONG_RUNS[name](watched, ddpm.Diffusion([0, *[0.1] * 8]), inputs()["xt"])
    assert len(seen) == 8


# --- Modes ---------------------------------------------------------------------------------------


# The state of torch that is everybody's: how it is read, set, and two values of it, the first the usual one.
FLAGS = {
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled, True, False),
    "default type": (torch.get_default_dtype, torch.set_default_dtype, torch.float32, torch.float64),
    "threads": (torch.get_num_threads, torch.set_num_threads, 1, 1),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
                         "highest", "medium"),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled,
                                 torch.use_deterministic_algorithms, False, True),
    **{f"cudnn.{flag}": (lambda flag=flag: getattr(torch.backends.cudnn, flag),
                         lambda on, flag=flag: setattr(torch.backends.cudnn, flag, on), usual, not usual)
       for flag, usual in {"benchmark": False, "deterministic": False, "allow_tf32": True}.items()},
}  # fmt: skip


@contextlib.contextmanager
def flags_left_alone(unusual):
    """Sets every flag to its usual value, or to the other one, and asserts that this one is left."""
    __tracebackhide__ = True
    before = {flag: read() for flag, (read, *_) in FLAGS.items()}
    wanted = {flag: values[unusual] for flag, (_, _, *values) in FLAGS.items()}
    try:
        for flag, (_, put, *_) in FLAGS.items():
            put(wanted[flag])
        yield
        left = {flag: read() for flag, (read, *_) in FLAGS.items()}
        assert left == wanted, [
            f"{flag} is {left[flag]}" for flag in FLAGS if left[flag] != wanted[flag]
        ]
    finally:
        for flag, (_, put, *_) in FLAGS.items():
            put(before[flag])


def modes(module):
    """Of a model: which parts train, which weights ask for gradients, and that none has got one."""
    return ([m.training for m in module.modules()],
            [(p.requires_grad, p.grad is None) for p in module.parameters()])  # fmt: skip


every_state = pytest.mark.parametrize("unusual", [False, True], ids=["usual flags", "others"])


@every_state
@every_function
def test_modes_and_flags_are_left_as_they_were(name, unusual):
    """Those of torch, whatever they are, and those of the model that is given, in training or not."""
    with flags_left_alone(unusual):
        given = arguments(name)
        models = [x for x in given.values() if isinstance(x, torch.nn.Module)]
        before = [modes(x) for x in models]
        call(name, given)
        assert [modes(x) for x in models] == before, "a mode of the model"


@every_state
@pytest.mark.parametrize("judged", [ddpm, improved], ids=["ddpm.py", "improved.py"])
def test_importing_changes_nothing(judged, unusual):
    """Neither torch's flags nor the state of its generator."""
    if not getattr(judged, "__file__", None):
        pytest.skip("absent: the file")
    before = torch.get_rng_state()
    with flags_left_alone(unusual):
        source = pathlib.Path(judged.__file__).read_text()
        exec(compile(source, judged.__file__, "exec"), {"__name__": "again"})
    assert torch.equal(torch.get_rng_state(), before), "the generator moved"


@every_function
def test_results_can_be_used_in_a_later_backward_pass(name):
    """Samplers build no graph, and still give ordinary tensors: to the model, to on_step, to the caller."""
    given = arguments(name)
    for result in tensors(call(name, given)):
        assert not result.is_inference()
        if result.is_floating_point():
            w = torch.ones((), dtype=result.dtype, requires_grad=True)
            (w * result.nan_to_num()).square().sum().backward()
            assert w.grad is not None


# --- Precision and ambient state -----------------------------------------------------------------

AMBIENT = {
    "bfloat16 by default": lambda: default_type(torch.bfloat16),
    "float64 by default": lambda: default_type(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class default_type:
    """torch.set_default_dtype, for a while."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


@every_function
def test_ambient_state_changes_no_formula(name):
    """The same bits, whatever type and device new tensors have by default, and under autocast (but for a
    network's own layers, whose business it is)."""

    def bits():
        judge.seed()
        if "generator" in given:
            given["generator"] = judge.generator()
        return tensors(call(name, given))

    given = arguments(name, torch.float32)
    want = bits()
    for state, entered in AMBIENT.items():
        if state != "autocast" or name in CALLS:
            with entered():
                got = bits()
            for x, y in zip(got, want, strict=True):
                same(f"result, {state}", x, y)


ASKING = [name for name in CALLS if {"model", "learned", "labelled"} & {*needs(name)}]


@pytest.mark.parametrize("name", ASKING)
def test_a_model_in_bfloat16_has_its_answers_rounded_and_nothing_else(name):
    """The same bits as of a model in float32 that gives those answers: states, means, noise, targets and
    losses keep the precision of the images."""
    results = []
    for after in (torch.bfloat16, torch.float32):
        given = arguments(name, torch.float32)
        for key in {"model", "learned", "labelled"} & {*given}:
            model = given[key]
            given[key] = lambda *asked, model=model, after=after: model(*asked).bfloat16().to(after)
        results.append(tensors(call(name, given)))
    for got, want in zip(*results, strict=True):
        if name not in (
            "improved.eps_only",
            "improved.strided",
            "improved.guided at w = 0",
        ):  # that answer
            same("result", got, want)


# --- Thresholds ----------------------------------------------------------------------------------

SAMPLERS = {
    "ancestral": lambda model, d, xt, **how: ddpm.sample_ancestral(model, d, xt, **how),
    "DDIM": lambda model, d, xt, **how: ddpm.sample_ddim(model, d, xt, [1, 2, 4], 0.5, **how),
    "learned variances": lambda model, d, xt, **how: improved.sample_ancestral(
        lambda xt, t: torch.cat([model(xt, t), 1.5 + 0 * xt], dim=1), d, xt, **how),
}  # fmt: skip
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


@every_sampler
def test_without_clipping_a_linear_model_samples_linearly(sampler):
    """x0 = a xT + b z: of xT a thousand times as large, x0 - b z is so too. No state, no eps, no image is
    cut off anywhere."""
    d, xT = ddpm.Diffusion(BRUTAL), inputs()["xt"]

    def draw(xT):
        return SAMPLERS[sampler](
            lambda xt, t: 0.3 * xt, d, xT, clip=False, generator=judge.generator()
        )

    noise = draw(0 * xT)
    close(
        "x0 - b z",
        draw(1e3 * xT) - noise,
        1e3 * (draw(xT) - noise),
        1e-9,
        1e3 * (1 + xT.abs().max()),
    )


@every_sampler
def test_clipping_touches_no_state_while_x0_is_an_image(sampler):
    """The exact model of one image: however far xT is, x0 is that image at every step, and is not clipped."""
    d, given = ddpm.Diffusion(BRUTAL), inputs()
    signal, noise = ref.forward_moments(BRUTAL)

    def draw(clip):
        def model(xt, t):
            return (xt - signal[t[0]] * 0.9 * given["x0"]) / noise[t[0]] ** 0.5

        return told(
            SAMPLERS[sampler], model, d, 100 * given["xt"], clip=clip, generator=judge.generator()
        )

    for free, clipped in zip(draw(False), draw(True), strict=True):
        close("state", clipped, free, 1e-11, 500.0)


@pytest.mark.parametrize("loss", ["loss_simple", "improved.loss_hybrid"])
def test_training_cuts_no_noise_off(loss):
    """The model sees q_sample(x0, t, eps), however large eps is, and the loss counts all of it."""
    given, seen = arguments(loss), []
    given["eps"] = 50 * given["eps"]
    key = "learned" if loss.startswith("improved") else "model"
    model = given[key]
    given[key] = lambda xt, t: seen.append(xt) or 0 * model(xt, t)
    value = call(loss, given)
    same("xt", seen[0], given["d"].q_sample(given["x0"], given["t"], given["eps"]))
    assert value >= given["eps"].square().mean() * (1 - 1e-12)


# --- Arguments -----------------------------------------------------------------------------------


def run_of(given, model, **required):
    """What a run must be given, its options by default, and other values of them."""
    return (dict(model=given[model], d=ddpm.Diffusion(BRUTAL), **required), dict(clip=True, generator=None),
            lambda: dict(clip=False, generator=judge.generator()))  # fmt: skip


def and_also(run, defaults, others):
    """The same, with one option more."""
    return run[0], {**run[1], **defaults}, lambda: {**run[2](), **others}


# By function, from its arguments: what it must be given, its options by default, and one other value of each.
OPTIONS = {
    "ddpm.linear_schedule": lambda given: (
        {}, dict(T=1000, beta_1=1e-4, beta_T=0.02), lambda: dict(T=9, beta_1=1e-3, beta_T=0.1)),
    "ddpm.exponential_schedule": lambda given: (
        {}, dict(T=1000, beta_1=1e-4, beta_T=0.066), lambda: dict(T=9, beta_1=1e-3, beta_T=0.1)),
    "ddpm.cosine_schedule": lambda given: (
        {}, dict(T=1000, s=0.008, beta_max=0.999), lambda: dict(T=9, s=0.1, beta_max=0.5)),
    "ddpm.noise_like": lambda given: (
        dict(x=given["xt"]), dict(generator=None), lambda: dict(generator=judge.generator())),
    "ddpm.sample_ancestral": lambda given: and_also(
        run_of(given, "model", xt=given["xt"]), dict(sigma2=None), dict(sigma2=f64(0, 0.3, 0.2, 0.1, 0.4))),
    "ddpm.sample_ddim": lambda given: run_of(given, "model", xt=given["xt"], grid=[1, 2, 4], eta=0.5),
    "ddpm.sample_ddim: eta": lambda given: (
        run_of(given, "model", xt=given["xt"], grid=[1, 2, 4])[0], dict(eta=0.0), lambda: dict(eta=0.5)),
    "ddpm.bound_terms": lambda given: run_of(given, "model", x0=given["x0"], variances=[f64(*BRUTAL)]),
    "improved.sample_ancestral": lambda given: run_of(given, "learned", xt=given["xt"]),
    "improved.bound_terms": lambda given: and_also(
        run_of(given, "learned", x0=given["x0"]), dict(variances=()), dict(variances=[f64(*BRUTAL)])),
    "improved.bound_term": lambda given: (
        dict({k: given[k] for k in ("x0", "xt", "t", "eps", "v")}, d=ddpm.Diffusion(BRUTAL)),
        dict(clip=True), lambda: dict(clip=False)),
    "improved.loss_hybrid": lambda given: (
        dict({k: given[k] for k in ("x0", "t", "eps")}, model=given["learned"], d=ddpm.Diffusion(BRUTAL)),
        dict(weight=0.001), lambda: dict(weight=0.5)),
    "improved.drop_labels": lambda given: (
        dict(y=given["labels"], none=3), dict(p=0.1, generator=None),
        lambda: dict(p=0.9, generator=judge.generator())),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_counts_and_alone_as_much_as_among_the_others(name):
    """Another value changes the result, whatever the other options are; given alone, it does what it does
    beside the defaults in full."""
    required, defaults, others = OPTIONS[name](inputs())
    module, function = name.partition(":")[0].split(".")
    function = getattr(dict(ddpm=ddpm, improved=improved)[module], function)

    def result(**given):
        judge.seed()
        return function(**required, **given)

    by_default = result()
    same("result by default", by_default, result(**defaults))
    for option in defaults:
        alone = result(**{option: others()[option]})
        same(f"result with {option}", alone, result(**{**defaults, option: others()[option]}))
        assert differ(alone, by_default), f"{option} is ignored"
        assert differ(result(**others()), result(**{**others(), option: defaults[option]})), (
            f"{option} is ignored beside the others"
        )


def differ(a, b):
    return a.shape != b.shape or not torch.equal(a, b)


@pytest.mark.parametrize("loss", ["loss_simple", "improved.loss_hybrid"])
@pytest.mark.parametrize("alone", ["t", "eps"])
def test_t_and_eps_are_used_each_alone_too(loss, alone):
    """Given t, eps is drawn, and given eps, t is."""
    given, seen, every = arguments(loss), {}, inputs()
    key = "learned" if loss.startswith("improved") else "model"
    model, d, x0 = given[key], given["d"], given["x0"]

    def watched(xt, t):
        seen.update(xt=xt, t=t)
        return model(xt, t)

    call(loss, {**given, key: watched, **{other: None for other in ("t", "eps") if other != alone}})
    got = seen["t"] if alone == "t" else d.eps_from_x0(seen["xt"], seen["t"], x0)
    close(alone, got, every[alone], 1e-12, 10.0)
