"""Properties of every public function, whatever it computes: arguments, memory, modes, ambient state, options.

CALLS shows how each function is called. Each property is stated once, for all of them.
"""

import contextlib
import copy
import gc
import inspect
import pathlib
import weakref

import checks
import pytest
import torch
from calls import ddpm, improved, likelihood, noise
from checks import close, f64, same
from test_6_ancestral import BRUTAL

import reference_numpy as ref

SHAPE = (3, 2, 4, 6)  # not square: swapped axes and sizes become visible


class Model(torch.nn.Module):
    """eps = tanh(w xt + t / 9), then v if it learns variances. One part is in training mode, one is not."""

    def __init__(self, learns=False, labels=False):
        super().__init__()
        self.w = torch.nn.Parameter(f64(0.4))
        self.learns = learns
        self.labels = labels
        self.training_part = torch.nn.Dropout(0.5)
        self.other_part = torch.nn.Dropout(0.5).eval()

    def forward(self, xt, t, y=None):
        ones = [1] * (xt.ndim - 1)
        eps = torch.tanh(self.w.to(xt) * xt + t.reshape(-1, *ones).to(xt) / 9)
        if self.labels:
            eps = eps + y.reshape(-1, *ones).to(xt) / 3
        return torch.cat([eps, 1.5 - 0.2 * xt], dim=1) if self.learns else eps


def weights(module):
    """Return the parameters that training changes. Frozen tables may be registered as parameters too."""
    return [p for p in module.parameters() if p.requires_grad]


def randomised(module):
    """Return a float64 module with random weights, none of them near zero."""
    with torch.no_grad():
        for i, p in enumerate(weights(module)):
            p.copy_(torch.randn(p.shape, generator=checks.generator(i)) * 0.3)
    return module.double()


def network(**settings):
    """Return a small labelled network."""
    small = dict(in_channels=2, ch=8, mult=(1, 2), blocks=1, groups=4, dropout=0.0, num_classes=3)
    return randomised(ddpm.UNet(**{**small, **settings}))


def inputs(dtype=torch.float64, shape=SHAPE, number=11):
    """Return new arguments by the names that CALLS uses: images of this shape, and others."""
    random = checks.generator(number)
    B = shape[0]
    x0 = torch.randint(0, 256, shape, generator=random).double() / 127.5 - 1
    xt, eps, v = torch.randn(3, *shape, generator=random, dtype=torch.float64)
    emb = torch.randn(B, 32, generator=random)
    given = dict(x0=x0, xt=xt, eps=eps, v=v, emb=emb)
    given = {name: x.to(dtype) for name, x in given.items()}
    return dict(
        given,
        beta=f64(*BRUTAL),
        t=torch.tensor([3, 2, 4])[:B],
        y=torch.tensor([0, 3, 1])[:B],
        labels=torch.arange(60) % 3,
        noise=noise(number + 1),
        model=Model(),
        learned=Model(learns=True),
        labelled=Model(labels=True),
    )


def states_of(sampler, *arguments, **options):
    """Return the states that a sampler gives to on_step. The last one is x0."""
    states = []
    sampler(*arguments, **options, on_step=lambda s, xs: states.append(xs))
    return states


def t_of(sampler, *arguments, **options):
    """Return the t that a sampler gives to its model."""
    seen = []

    def model(xt, t):
        seen.append(t)
        return 0.1 * xt

    sampler(model, *arguments, **options)
    return seen


def tables(d):
    return [x for x in vars(d).values() if torch.is_tensor(x)]


# How each function is called, with the arguments of `inputs` and MADE. Functions that draw take `noise`.
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
    "ancestral_step": lambda d, xt, eps, noise: ddpm.ancestral_step(d, xt, 3, eps, noise=noise),
    "ancestral_step with beta_tilde": lambda d, xt, eps, noise: ddpm.ancestral_step(
        d, xt, 3, eps, d.beta_tilde, clip=False, noise=noise),
    "ancestral_step at t = 1": lambda d, xt, eps: ddpm.ancestral_step(d, xt, 1, eps),
    "sample_ancestral": lambda model, d, xt, noise: ddpm.sample_ancestral(model, d, xt, noise=noise),
    "sample_ancestral from t = 2": lambda model, d, xt, noise: ddpm.sample_ancestral(
        model, d, xt, start=2, noise=noise),
    "sample_ancestral, its states": lambda model, d, xt, noise: states_of(
        ddpm.sample_ancestral, model, d, xt, noise=noise),
    "sample_ancestral, its t": lambda d, xt, noise: t_of(ddpm.sample_ancestral, d, xt, noise=noise),
    "ddim_step": lambda d, xt, eps: ddpm.ddim_step(d, xt, 4, 2, eps),
    "ddim_step with noise": lambda d, xt, eps, noise: ddpm.ddim_step(
        d, xt, 4, 2, eps, eta=0.5, noise=noise),
    "ddim_step upwards": lambda d, xt, eps: ddpm.ddim_step(d, xt, 2, 4, eps, clip=False),
    "sample_ddim": lambda model, d, xt, noise: ddpm.sample_ddim(
        model, d, xt, [1, 2, 4], eta=1.0, noise=noise),
    "sample_ddim, its states": lambda model, d, xt, noise: states_of(
        ddpm.sample_ddim, model, d, xt, [1, 2, 4], eta=1.0, noise=noise),
    "sample_ddim, its t": lambda d, xt, noise: t_of(
        ddpm.sample_ddim, d, xt, [1, 2, 4], eta=1.0, noise=noise),
    "sample_ddim without noise": lambda model, d, xt: ddpm.sample_ddim(model, d, xt, [1, 2, 4]),
    "normal_kl": lambda x0, v, xt, eps: likelihood.normal_kl(x0, v.exp(), xt, eps.exp()),
    "discretized_log_likelihood": lambda x0, xt, v: likelihood.discretized_log_likelihood(
        x0, xt, v.exp()),
    "bound_term": lambda d, x0, xt, t, eps, v: likelihood.bound_term(d, x0, xt, t, eps, v.exp()),
    "bound_term at t = 1": lambda d, x0, xt, eps, v: likelihood.bound_term(d, x0, xt, 1, eps, v.exp()),
    "bound_terms": lambda model, d, x0, noise: likelihood.bound_terms(
        model, d, x0, [d.beta, d.beta_tilde], noise=noise),
    "timestep_embedding": lambda t: ddpm.timestep_embedding(t, 32),
    "timestep_embedding of 999": lambda t: ddpm.timestep_embedding(t * 333, 32),
    "improved.variance": lambda d, t, v: improved.variance(d, t, v),
    "improved.eps_only": lambda learned, xt, t: improved.eps_only(learned)(xt, t),
    "improved.bound_term": lambda d, x0, xt, t, eps, v: improved.bound_term(d, x0, xt, t, eps, v),
    "improved.bound_term at t = 1": lambda d, x0, xt, eps, v: improved.bound_term(
        d, x0, xt, 1, eps, v),
    "improved.loss_hybrid": lambda learned, d, x0, t, eps: improved.loss_hybrid(
        learned, d, x0, t, eps),
    "improved.respaced": lambda model, d, xt, t: improved.respaced(model, d, [1, 2, 3, 4])[0](xt, t),
    "improved.respaced, its diffusion": lambda d: tables(improved.respaced(None, d, [2, 4])[1]),
    "improved.ancestral_step": lambda d, xt, eps, v, noise: improved.ancestral_step(
        d, xt, 3, eps, v, noise=noise),
    "improved.sample_ancestral": lambda learned, d, xt, noise: improved.sample_ancestral(
        learned, d, xt, noise=noise),
    "improved.sample_ancestral, its states": lambda learned, d, xt, noise: states_of(
        improved.sample_ancestral, learned, d, xt, noise=noise),
    "improved.bound_terms": lambda learned, d, x0, noise: improved.bound_terms(
        learned, d, x0, [d.beta], noise=noise),
    "improved.drop_labels": lambda labels, noise: improved.drop_labels(labels, 3, 0.5, noise=noise),
    "improved.guided": lambda labelled, xt, t, y: improved.guided(labelled, y, 3, 2.0)(xt, t),
    "improved.guided at w = 0": lambda labelled, xt, t, y: improved.guided(labelled, y, 3)(xt, t),
}  # fmt: skip
NETWORKS = {
    "ResBlock": lambda block, xt, emb: block(xt, emb),
    "Attention": lambda attention, xt: attention(xt),
    "UNet": lambda net, xt, t, y: net(xt, t, y),
    "UNet in training": lambda training, xt, t, y: training(xt, t, y),
    "loss_simple of a UNet": lambda net, d, x0, t, eps: ddpm.loss_simple(net, d, x0, t, eps),
    "sample_ancestral with a UNet": lambda net, d, xt, noise: ddpm.sample_ancestral(
        net, d, xt, noise=noise),
    "sample_ddim with a UNet": lambda training, d, xt: ddpm.sample_ddim(training, d, xt, [2, 4]),
    "bound_terms of a UNet": lambda training, d, x0, noise: likelihood.bound_terms(
        training, d, x0, [d.beta], noise=noise),
    "improved.guided UNet": lambda training, xt, t, y: improved.guided(training, y, 3, 2.0)(xt, t),
}  # fmt: skip
CALLS_AND_NETWORKS = {**CALLS, **NETWORKS}
every_function = pytest.mark.parametrize("name", CALLS_AND_NETWORKS)


def needs(name):
    """Return the names of the arguments of a call."""
    return list(inspect.signature(CALLS_AND_NETWORKS[name]).parameters)


# Arguments that are made by the tested file's own classes.
MADE = {
    "d": lambda: ddpm.Diffusion(BRUTAL),
    "net": lambda: network().eval(),
    "training": lambda: network().train(),
    "block": lambda: randomised(ddpm.ResBlock(2, 2, 32, 0.0, 1)),
    "attention": lambda: randomised(ddpm.Attention(2, 1)),
}


def arguments(name, dtype=torch.float64, **options):
    """Return new arguments of a call."""
    given = inputs(dtype, **options)
    for key in needs(name):
        if key in MADE:
            made = MADE[key]()
            given[key] = made if key == "d" else made.to(dtype)
    return {key: given[key] for key in needs(name)}


def call(name, given):
    return CALLS_AND_NETWORKS[name](**given)


def tensors(x):
    """Return the tensors of a result or of an argument: a module's weights, a diffusion's tables."""
    if torch.is_tensor(x):
        return [x]
    if isinstance(x, torch.nn.Module):
        return [*x.parameters(), *x.buffers()]
    if isinstance(x, (list, tuple)):
        return [y for part in x for y in tensors(part)]
    return tables(x) if hasattr(x, "__dict__") else []


# --- Memory --------------------------------------------------------------------------------------


@every_function
def test_arguments_stay_unchanged(name):
    """No tensor is written to, not even with the same values. Modules and diffusions get no new attributes."""
    given = arguments(name)
    before = copy.deepcopy({key: x for key, x in given.items() if key != "noise"})
    versions = {key: [x._version for x in tensors(given[key])] for key in before}
    call(name, given)
    for key, was in before.items():
        for x, y in zip(tensors(given[key]), tensors(was), strict=True):
            same(key, x, y)
        now = [x._version for x in tensors(given[key])]
        assert now == versions[key], f"{key} is written to: versions {versions[key]} became {now}"
        if hasattr(was, "__dict__"):
            new = set(vars(given[key])) ^ set(vars(was))
            assert not new, f"attributes of {key} appeared or vanished: {new}"


@every_function
def test_results_share_no_memory(name):
    """A result shares no memory with the arguments, another result or the next call's results.

    So the caller may write to results, and to the states that on_step receives.
    """
    given = arguments(name)
    results = [*tensors(call(name, given)), *tensors(call(name, given))]
    held = {x.untyped_storage().data_ptr() for value in given.values() for x in tensors(value)}
    places = [x.untyped_storage().data_ptr() for x in results]
    different = len(set(places))
    assert different == len(places), f"{len(places)} results lie in {different} places in memory"
    shared = [i for i, place in enumerate(places) if place in held]
    assert not shared, f"results {shared} of {len(places)} share memory with an argument"


def other_arguments(name, shape=(2, 2, 6, 4), beta=(0, 0.2, 0.3, 0.4, 0.1, 0.6)):
    """Return arguments of a call with other images and another schedule."""
    given = arguments(name, shape=shape, number=21)
    if "d" in given:
        given["d"] = ddpm.Diffusion(beta)
    return given


def test_no_tensor_is_kept_between_calls():
    """After a result is deleted, no new tensor exists: no cache, no graph, no list.

    The images, the schedule and T are new, so that a cache of earlier ones grows.
    """
    given = {}
    for name in CALLS_AND_NETWORKS:
        with contextlib.suppress(pytest.skip.Exception):  # the name is absent
            call(name, arguments(name))
            given[name] = other_arguments(name)
    gc.collect()
    gc.freeze()  # ignore all objects that exist now
    try:
        for name in given:
            with contextlib.suppress(pytest.skip.Exception):
                call(name, given[name])
            gc.collect()
            left = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            shapes = [tuple(x.shape) for x in left]
            assert not left, f"{name}: {len(left)} tensors are left, of shapes {shapes[:5]}"
    finally:
        gc.unfreeze()


@every_function
def test_a_result_does_not_depend_on_earlier_calls(name):
    """A call with other images, another schedule and other models in between changes nothing."""

    def result(given):
        checks.seed()
        return tensors(call(name, given))

    first = result(arguments(name))
    result(other_arguments(name))
    for x, y in zip(result(arguments(name)), first, strict=True):
        same("result", x, y)


# These results are the same for all schedules.
ANY_SCHEDULE = {
    "bound_term at t = 1",
    "q_sample at t = 0",
    "sample_ancestral, its t",
    "sample_ddim, its t",
    "improved.respaced",
}


@pytest.mark.parametrize(
    "name", [name for name in CALLS if "d" in needs(name) and name not in ANY_SCHEDULE]
)
def test_each_call_uses_the_schedule_that_it_is_given(name):
    """Another schedule with the same T changes the result for the same images."""
    results = []
    for beta in (BRUTAL, [0, 0.2, 0.4, 0.3, 0.6]):
        checks.seed()
        given = arguments(name)
        given["d"] = ddpm.Diffusion(beta)
        results.append(torch.cat([x.nan_to_num().flatten() for x in tensors(call(name, given))]))
    differs("the schedule", *results)


LONG_RUNS = {
    "sample_ancestral": lambda eps, d, x: ddpm.sample_ancestral(eps, d, x),
    "sample_ddim": lambda eps, d, x: ddpm.sample_ddim(eps, d, x, range(1, 9), eta=1.0),
    "bound_terms": lambda eps, d, x: likelihood.bound_terms(eps, d, x.sign(), [d.beta]),
    "improved.sample_ancestral": lambda eps, d, x: improved.sample_ancestral(
        lambda xt, t: torch.cat([eps(xt, t), xt], dim=1), d, x),
    "improved.bound_terms": lambda eps, d, x: improved.bound_terms(
        lambda xt, t: torch.cat([eps(xt, t), xt], dim=1), d, x.sign()),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_RUNS)
def test_memory_does_not_grow_along_a_run(name):
    """When the model is called, at most two earlier states exist: no list and no graph holds them.

    The bound may use one call for all t, or several calls in any order.
    """
    model = Model()
    seen = []

    def watched(xt, t):
        alive = sum(x() is not None for x in seen)
        assert alive <= 2, f"{alive} earlier states are held at t = {int(t[0])}"
        seen.append(weakref.ref(xt))
        return model(xt, t)

    LONG_RUNS[name](watched, ddpm.Diffusion([0, *[0.1] * 8]), inputs()["xt"])
    assert seen, "the model was called 0 times"


# --- Modes ---------------------------------------------------------------------------------------


# Torch's global state: how it is read, how it is set, the usual value and another one.
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
def flags_unchanged(unusual):
    """Set every flag to its usual or its other value, and assert that the block leaves it there."""
    __tracebackhide__ = True
    before = {flag: read() for flag, (read, *_) in FLAGS.items()}
    wanted = {flag: values[unusual] for flag, (_, _, *values) in FLAGS.items()}
    try:
        for flag, (_, put, *_) in FLAGS.items():
            put(wanted[flag])
        yield
        left = {flag: read() for flag, (read, *_) in FLAGS.items()}
        changed = [f"{flag} is {left[flag]}" for flag in FLAGS if left[flag] != wanted[flag]]
        assert not changed, f"{len(changed)} flags changed: {changed}"
    finally:
        for flag, (_, put, *_) in FLAGS.items():
            put(before[flag])


def modes(module):
    """Return which parts of a model train, which weights require gradients, and which have none."""
    training = [m.training for m in module.modules()]
    gradients = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return training, gradients


every_state = pytest.mark.parametrize("unusual", [False, True], ids=["usual flags", "other flags"])


@every_state
@every_function
def test_modes_and_flags_stay_unchanged(name, unusual):
    """This holds for torch's flags, whatever they are, and for the modes of the model's parts.

    The model is also called in its own mode: a model in training mode keeps its dropout.
    """
    during = []
    with flags_unchanged(unusual):
        given = arguments(name)
        models = [x for x in given.values() if isinstance(x, torch.nn.Module)]
        before = [modes(x) for x in models]
        for x in models:
            x.register_forward_pre_hook(lambda module, _: during.append(modes(module)[0]))
        call(name, given)
        now = [modes(x) for x in models]
        for training in during:
            assert training == before[0][0], f"called with {training}, given with {before[0][0]}"
        assert now == before, f"modes of the model: {before} became {now}"


class Stopped(Exception):
    """An exception of a model."""


WITH_MODEL = [name for name in CALLS if {"model", "learned", "labelled"} & {*needs(name)}]


@every_state
@pytest.mark.parametrize("calls_before", [0, 1])
@pytest.mark.parametrize("name", WITH_MODEL)
def test_an_exception_of_the_model_reaches_the_caller_and_modes_and_flags_stay_unchanged(
    name, calls_before, unusual
):
    """In the first or the second call of the model; its exception is neither caught nor replaced."""
    error = Stopped("model")
    with flags_unchanged(unusual):
        given = arguments(name)
        [key] = {"model", "learned", "labelled"} & {*given}
        model = given[key]
        left = [calls_before]

        def hook(module, _):
            if not left[0]:
                raise error
            left[0] -= 1

        model.register_forward_pre_hook(hook)
        before = modes(model)
        try:
            call(name, given)
        except Stopped as caught:
            assert caught is error, f"another exception: {caught!r}"
        else:
            assert left[0] == 0 and calls_before, f"not raised, with {left[0]} calls left"
        assert modes(model) == before, f"modes of the model: {before} became {modes(model)}"


@every_state
@pytest.mark.parametrize("file", [ddpm, likelihood, improved], ids=lambda file: f"{file.file}.py")
def test_importing_changes_no_flag_and_draws_nothing(file, unusual):
    """Torch's flags and the state of its generator stay as they are."""
    path = pathlib.Path(file.module.__file__)
    before = torch.get_rng_state()
    with flags_unchanged(unusual):
        exec(compile(path.read_text(), path, "exec"), {"__name__": "again"})
    moved = (torch.get_rng_state() != before).sum().item()
    assert moved == 0, f"{moved} bytes of the generator's state changed"


@every_function
def test_results_can_be_used_in_a_later_backward_pass(name):
    """Samplers build no graph, but results and states are ordinary tensors, not inference tensors."""
    given = arguments(name)
    for result in tensors(call(name, given)):
        assert not result.is_inference(), f"an inference tensor {tuple(result.shape)}"
        if result.is_floating_point():
            w = torch.ones((), dtype=result.dtype, requires_grad=True)
            (w * result.nan_to_num()).square().sum().backward()
            assert w.grad is not None, f"no gradient through a result {tuple(result.shape)}"


# --- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_MODEL)
def test_a_model_may_be_a_function_or_a_module(name):
    """Only model(xt, t) is called, so that both give the same bits."""
    results = []
    for wrap in (lambda model: model, lambda model: lambda *asked: model(*asked)):
        given = arguments(name)
        [key] = {"model", "learned", "labelled"} & {*given}
        given[key] = wrap(given[key])
        results.append(tensors(call(name, given)))
    for x, y in zip(*results, strict=True):
        same("result", x, y)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_a_model_may_keep_its_inputs_and_its_output(name):
    """Neither the xt and t that it was given nor the tensor that it returned is written to later."""
    given = arguments(name)
    [key] = {"model", "learned", "labelled"} & {*given}
    model = given[key]
    kept = []

    def keeping(*asked):
        output = model(*asked)
        kept.append([(x, x.clone(), x._version) for x in (*asked, output)])
        return output

    given[key] = keeping
    for result in tensors(call(name, given)):
        if not any(result is x for [*_, (x, _, _)] in kept):  # eps_only and others return it itself
            result.nan_to_num()
    for i, tensors_of_call in enumerate(kept):
        for x, was, version in tensors_of_call:
            same(f"a tensor of model call {i + 1}", x, was)
            assert x._version == version, (
                f"a tensor of model call {i + 1} is written to {x._version - version} times"
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_model_gets_images_in_their_own_precision_and_an_int64_t_for_each(name, dtype):
    """xt has the dtype of the images and their shape after the first axis, and t is in 1..T."""
    given = arguments(name, dtype)
    [key] = {"model", "learned", "labelled"} & {*given}
    model = given[key]
    seen = []

    def watched(xt, t, *labels):
        seen.append((xt.dtype, tuple(xt.shape[1:]), t.dtype, tuple(t.shape) == (len(xt),)))
        assert 1 <= t.min() and t.max() <= 4, f"t = {t.tolist()}"
        return model(xt, t, *labels)

    given[key] = watched
    call(name, given)
    want = (dtype, SHAPE[1:], torch.int64, True)
    assert set(seen) == {want}, (
        f"dtype, shape, dtype of t, one t per image: {set(seen)}, want {want}"
    )


# Functions that build a model from another model.
MODELS = {
    "eps_only": lambda given: improved.eps_only(given["learned"]),
    "respaced": lambda given: improved.respaced(given["model"], ddpm.Diffusion(BRUTAL), [1, 2, 3, 4])[0],
    "guided": lambda given: improved.guided(given["labelled"], given["y"], 3, 2.0),
    "guided at w = 0": lambda given: improved.guided(given["labelled"], given["y"], 3),
    "guided at w = -1": lambda given: improved.guided(given["labelled"], given["y"], 3, -1.0),
    "guided, w of each image": lambda given: improved.guided(
        given["labelled"], given["y"], 3, torch.tensor([0.5, 2.0, 0.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_derived_model_has_no_state(name):
    """Called at one t and then at another, with other images, it returns what a new one returns there."""
    given = inputs()
    other = inputs(number=31)
    model = MODELS[name](given)
    model(given["xt"], given["t"])
    got = model(other["xt"], torch.tensor([1, 4, 2]))
    want = MODELS[name](inputs())(other["xt"], torch.tensor([1, 4, 2]))
    same("output at the second t", got, want)


TRAINED = {
    "loss_simple": lambda given: ("model", ddpm.loss_simple(
        given["model"], ddpm.Diffusion(BRUTAL), given["x0"], given["t"], given["eps"])),
    "loss_hybrid": lambda given: ("learned", improved.loss_hybrid(
        given["learned"], ddpm.Diffusion(BRUTAL), given["x0"], given["t"], given["eps"])),
    "eps_only": lambda given: ("learned", MODELS["eps_only"](given)(given["xt"], given["t"])),
    **{name: lambda given, name=name: (
        "model" if name == "respaced" else "labelled", MODELS[name](given)(given["xt"], given["t"]))
       for name in MODELS if name != "eps_only"},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_the_models_parameters(name):
    """The losses and the derived models are differentiable, and their slope is the difference quotient."""
    h = 1e-6
    given = inputs()
    key, value = TRAINED[name](given)
    value.sum().backward()
    slope = given[key].w.grad
    assert slope is not None, "the parameter has no gradient"
    values = []
    for w in (0.4 + h, 0.4 - h):
        moved = inputs()
        moved[key].w.data.fill_(w)
        values.append(TRAINED[name](moved)[1].sum().item())
    want = (values[0] - values[1]) / (2 * h)
    if name != "loss_hybrid":  # it detaches eps in L_vlb, so its value has another slope
        close("slope in the parameter", slope, want, 1e-7, 100.0)
    assert slope != 0 and slope.isfinite(), f"the slope is {slope}"


# --- Precision and ambient state -----------------------------------------------------------------

AMBIENT = {
    "bfloat16 by default": lambda: default_type(torch.bfloat16),
    "float64 by default": lambda: default_type(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@contextlib.contextmanager
def default_type(dtype):
    """Set torch's default dtype in a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@every_function
def test_ambient_state_changes_no_formula(name):
    """The default dtype, the default device and autocast change no bit, except in a network's own layers."""

    def bits():
        checks.seed()
        if "noise" in given:
            given["noise"] = noise()
        return tensors(call(name, given))

    given = arguments(name, torch.float32)
    want = bits()
    for state, entered in AMBIENT.items():
        if state == "autocast" and name in NETWORKS:
            continue
        with entered():
            got = bits()
        for x, y in zip(got, want, strict=True):
            same(f"result, {state}", x, y)


RETURN_THE_OUTPUT = ("improved.eps_only", "improved.respaced", "improved.guided at w = 0")


@pytest.mark.parametrize("name", [name for name in WITH_MODEL if name not in RETURN_THE_OUTPUT])
def test_a_model_in_bfloat16_has_its_output_rounded_and_nothing_else(name):
    """The bits are those of a float32 model with the same rounded output.

    States, means, noise, targets and losses keep the precision of the images.
    """
    results = []
    for after in (torch.bfloat16, torch.float32):
        given = arguments(name, torch.float32)
        [key] = {"model", "learned", "labelled"} & {*given}
        model = given[key]
        given[key] = lambda *asked, model=model, after=after: model(*asked).bfloat16().to(after)
        results.append(tensors(call(name, given)))
    for got, want in zip(*results, strict=True):
        same("result", got, want)


# --- Values that are not numbers -----------------------------------------------------------------

TAKES_IMAGES = [
    (name, key) for name in CALLS_AND_NETWORKS for key in ("xt", "eps", "v", "emb", "x0")
    if key in needs(name) and not name.endswith("its t")
    and not (key == "x0" and any(word in name for word in ("bound", "likelihood", "hybrid")))
    and (name, key) not in (("q_sample at t = 0", "eps"), ("bound_term at t = 1", "xt"))
]  # fmt: skip


@pytest.mark.parametrize("name, key", TAKES_IMAGES)
def test_a_value_that_is_nan_makes_the_result_of_its_image_nan_and_no_other(name, key):
    """So a network that has diverged stays visible. Clipping and means keep nan.

    Arguments on which the result does not depend are left out, and so is x0 where it must be on the 256 levels.
    """
    clean, given = arguments(name), arguments(name)
    given[key][1].view(-1)[3] = torch.nan
    pairs = list(zip(tensors(call(name, given)), tensors(call(name, clean)), strict=True))
    assert pairs, f"{name} returns {len(pairs)} tensors"
    for got, want in pairs:
        if got.ndim == 0:
            assert got.isnan(), f"result {got.item():g}, want nan"
            continue
        axis = 1 if "bound_terms" in name else 0
        numbers = got.select(axis, 1).isnan().sum().item()
        assert numbers > 0, f"result of image 1: {numbers} numbers are nan"
        for i in (0, 2):
            close(f"result of image {i}", got.select(axis, i), want.select(axis, i), 1e-12, 10.0)


@pytest.mark.parametrize("t", [1, 2, 4])
@pytest.mark.parametrize("name", ["bound_terms", "improved.bound_terms"])
def test_an_output_that_is_nan_at_one_t_makes_its_term_of_the_bound_nan_and_no_other(name, t):
    """One pixel of eps of one image."""
    given = arguments(name)
    key = "model" if "model" in given else "learned"
    healthy = given[key]

    def diverged(xt, steps):
        output = healthy(xt, steps).detach().clone()
        at_t = (steps == t).nonzero()[:, 0]  # the images of the batch in order
        if len(at_t):
            output[at_t[1], 0, 2, 3] = torch.nan
        return output

    terms = call(name, {**given, key: diverged})
    places = terms.isnan().nonzero().tolist()
    want = [[row, 1, t - 1] for row in range(2)]
    assert places == want, f"nan in (row, image, term) {places}, want {want}"


# --- Thresholds ----------------------------------------------------------------------------------

SAMPLERS = {
    "ancestral": lambda model, d, xt, **how: ddpm.sample_ancestral(model, d, xt, **how),
    "DDIM": lambda model, d, xt, **how: ddpm.sample_ddim(model, d, xt, [1, 2, 4], eta=0.5, **how),
    "learned variances": lambda model, d, xt, **how: improved.sample_ancestral(
        lambda xt, t: torch.cat([model(xt, t), 1.5 + 0 * xt], dim=1), d, xt, **how),
}  # fmt: skip
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


@every_sampler
def test_without_clipping_a_linear_model_samples_linearly(sampler):
    """x0 = a xT + b z, also for xT a thousand times larger: no state, eps or image is cut off."""
    d = ddpm.Diffusion(BRUTAL)
    xT = inputs()["xt"]

    def sample(xT):
        return SAMPLERS[sampler](lambda xt, t: 0.3 * xt, d, xT, clip=False, noise=noise())

    b_z = sample(0 * xT)
    scale = 1e3 * (1 + xT.abs().max())
    close("x0 - b z", sample(1e3 * xT) - b_z, 1e3 * (sample(xT) - b_z), 1e-9, scale)


@every_sampler
@pytest.mark.parametrize("clip", [True, False])
def test_the_last_state_is_the_returned_image(sampler, clip):
    """x0 is what on_step receives at s = 0, also outside [-1, 1] if nothing is clipped."""
    d, states = ddpm.Diffusion(BRUTAL), []
    x0 = SAMPLERS[sampler](
        lambda xt, t: 0.3 * xt, d, 10 * inputs()["xt"], clip=clip, noise=noise(),
        on_step=lambda s, xs: states.append(xs.clone()),
    )  # fmt: skip
    close("state at s = 0", states[-1], x0, 4 * checks.EPS, 1 + x0.abs())
    if not clip:
        assert x0.abs().max() > 1.5, f"largest value {x0.abs().max():g}: clipping has no effect"


@every_sampler
def test_clipping_changes_no_state_while_the_predicted_x0_is_an_image(sampler):
    """With the exact model of one image, the predicted x0 is that image at every step, however large xT is."""
    d = ddpm.Diffusion(BRUTAL)
    given = inputs()
    signal, noise_var = ref.forward_moments(BRUTAL)

    def model(xt, t):
        return (xt - signal[t[0]] * 0.9 * given["x0"]) / noise_var[t[0]] ** 0.5

    def states(clip):
        return states_of(SAMPLERS[sampler], model, d, 100 * given["xt"], clip=clip, noise=noise())

    for free, clipped in zip(states(False), states(True), strict=True):
        close("state", clipped, free, 1e-11, 500.0)


@pytest.mark.parametrize("loss", ["loss_simple", "improved.loss_hybrid"])
def test_training_cuts_no_noise_off(loss):
    """The model gets q_sample(x0, t, eps), however large eps is, and the loss counts all of it."""
    given = arguments(loss)
    given["eps"] = 50 * given["eps"]
    key = "learned" if loss.startswith("improved") else "model"
    model = given[key]
    seen = []

    def zero(xt, t):
        seen.append(xt)
        return 0 * model(xt, t)

    given[key] = zero
    value = call(loss, given)
    same("xt", seen[0], given["d"].q_sample(given["x0"], given["t"], given["eps"]))
    least = given["eps"].square().mean() * (1 - 1e-12)
    assert value >= least, f"loss {value:.17g}, want at least {least:.17g}"


# --- Options -------------------------------------------------------------------------------------

# Each function: required arguments, its options at their defaults, and another value for each option.
OTHER_SIGMA2 = (0, 0.3, 0.2, 0.1, 0.4)
OPTIONS = {
    "ddpm.linear_schedule": lambda given: (
        (), dict(T=1000, beta_1=1e-4, beta_T=0.02), lambda: dict(T=9, beta_1=1e-3, beta_T=0.1)),
    "ddpm.exponential_schedule": lambda given: (
        (), dict(T=1000, beta_1=1e-4, beta_T=0.066), lambda: dict(T=9, beta_1=1e-3, beta_T=0.1)),
    "ddpm.cosine_schedule": lambda given: (
        (), dict(T=1000, s=0.008, beta_max=0.999), lambda: dict(T=9, s=0.1, beta_max=0.5)),
    "ddpm.ancestral_step": lambda given: (
        (given["d"], given["xt"], 3, given["eps"]), dict(sigma2=None, clip=True, noise=None),
        lambda: dict(sigma2=f64(*OTHER_SIGMA2), clip=False, noise=noise())),
    "ddpm.sample_ancestral": lambda given: (
        (given["model"], given["d"], given["xt"]), dict(sigma2=None, clip=True, noise=None),
        lambda: dict(sigma2=f64(*OTHER_SIGMA2), clip=False, noise=noise())),
    "ddpm.sample_ancestral, start": lambda given: (
        (given["model"], given["d"], given["xt"]), dict(start=None), lambda: dict(start=2)),
    "ddpm.ddim_step": lambda given: (
        (given["d"], given["xt"], 4, 2, given["eps"]), dict(eta=0.0, clip=True),
        lambda: dict(eta=0.5, clip=False)),
    "ddpm.sample_ddim": lambda given: (
        (given["model"], given["d"], given["xt"], [1, 2, 4]), dict(eta=0.0, clip=True),
        lambda: dict(eta=0.5, clip=False)),
    "likelihood.bound_terms": lambda given: (
        (given["model"], given["d"], given["x0"], [f64(*BRUTAL)]), dict(clip=True, noise=None),
        lambda: dict(clip=False, noise=noise())),
    "improved.bound_term": lambda given: (
        (given["d"], *(given[key] for key in ("x0", "xt", "t", "eps", "v"))), dict(clip=True),
        lambda: dict(clip=False)),
    "improved.loss_hybrid": lambda given: (
        (given["learned"], given["d"], given["x0"], given["t"], given["eps"]), dict(weight=0.001),
        lambda: dict(weight=0.5)),
    "improved.ancestral_step": lambda given: (
        (given["d"], given["xt"], 3, given["eps"], given["v"]), dict(clip=True, noise=None),
        lambda: dict(clip=False, noise=noise())),
    "improved.sample_ancestral": lambda given: (
        (given["learned"], given["d"], given["xt"]), dict(clip=True, noise=None),
        lambda: dict(clip=False, noise=noise())),
    "improved.sample_ancestral, start": lambda given: (
        (given["learned"], given["d"], given["xt"]), dict(start=None), lambda: dict(start=2)),
    "improved.bound_terms": lambda given: (
        (given["learned"], given["d"], given["x0"]), dict(variances=(), clip=True, noise=None),
        lambda: dict(variances=[f64(*BRUTAL)], clip=False, noise=noise())),
    "improved.drop_labels": lambda given: (
        (given["labels"], 3), dict(p=0.1, noise=None), lambda: dict(p=0.9, noise=noise())),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_an_effect_of_its_own(name):
    """Another value changes the result, whatever the other options are.

    An option given alone does the same as next to the other options' defaults.
    """
    required, defaults, others = OPTIONS[name](dict(inputs(), d=ddpm.Diffusion(BRUTAL)))
    file, function = name.partition(",")[0].split(".")
    function = getattr(dict(ddpm=ddpm, likelihood=likelihood, improved=improved)[file], function)

    def result(**options):
        checks.seed()
        return function(*required, **options)

    by_default = result()
    same("result by default", by_default, result(**defaults))
    for option in defaults:
        alone = result(**{option: others()[option]})
        same(f"result with {option}", alone, result(**{**defaults, option: others()[option]}))
        differs(f"{option}", alone, by_default)
        without = result(**{**others(), option: defaults[option]})
        differs(f"{option} next to the others", result(**others()), without)


def differs(option, a, b):
    """Assert that two results differ."""
    __tracebackhide__ = True
    equal = a.shape == b.shape and torch.equal(a, b)
    assert not equal, f"{option} has no effect on the {a.numel()} values"


@pytest.mark.parametrize("loss", ["loss_simple", "improved.loss_hybrid"])
@pytest.mark.parametrize("alone", ["t", "eps"])
def test_a_loss_uses_t_without_eps_and_eps_without_t(loss, alone):
    """Given only t, eps is random, and given only eps, t is."""
    given = arguments(loss)
    want = given[alone]
    key = "learned" if loss.startswith("improved") else "model"
    model = given[key]
    d = given["d"]
    x0 = given["x0"]
    seen = {}

    def watched(xt, t):
        seen.update(xt=xt, t=t)
        return model(xt, t)

    given[key] = watched
    given["eps" if alone == "t" else "t"] = None
    call(loss, given)
    got = seen["t"] if alone == "t" else d.eps_from_x0(seen["xt"], seen["t"], x0)
    close(alone, got, want, 1e-12, 10.0)
