"Noising, targets, weights and schedulers against diffusers and against closed forms."
import math
import pytest
import torch
from diffusers import DDPMScheduler, DEISMultistepScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from diffusers.training_utils import compute_snr
from t2i_nb.core import InputError
from t2i_nb.objective import BETA_SCHEDULES, PREDICTION_TYPES, SAMPLERS, Objective, ObjectiveConfig, check_sampler, prediction_coefficients

STEPS = torch.arange(1000)
T = (STEPS + .5)/1000 # the middle of each timestep
X0, EPS = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
COSINE = DDPMScheduler(beta_schedule='squaredcos_cap_v2')

def near(a, b, eps): assert (a - b).abs().max() <= eps

@pytest.mark.parametrize('zero', (False, True))
@pytest.mark.parametrize('name', BETA_SCHEDULES)
def test_noising_is_that_of_diffusers(name, zero):
    ours, theirs = Objective(ObjectiveConfig('v_prediction', name, zero_terminal_snr=zero)), DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    near(ours.add_noise(X0, EPS, T), theirs.add_noise(X0, EPS, STEPS), 1e-6)

def test_betas_and_their_rescaling_are_the_papers():
    def f(t): return math.cos((t + .008)/1.008*math.pi/2)**2
    cosine = torch.tensor([min(1 - f((i + 1)/1000)/f(i/1000), .999) for i in range(1000)])
    for name, betas in dict(linear=torch.linspace(1e-4, .02, 1000), scaled_linear=torch.linspace(1e-4**.5, .02**.5, 1000)**2, squaredcos_cap_v2=cosine).items():
        assert torch.equal(Objective(ObjectiveConfig('epsilon', name)).alphas_cumprod, torch.cumprod(1 - betas, 0))
    root = torch.cumprod(1 - cosine, 0).sqrt() # Lin et al., algorithm 1
    root = (root - root[-1])*(root[0]/(root[0] - root[-1]))
    near(Objective(ObjectiveConfig('sample', zero_terminal_snr=True)).alphas_cumprod, root**2, 1e-5)

def test_flow_is_the_straight_line():
    flow, theirs = Objective(), FlowMatchEulerDiscreteScheduler()
    near(flow.add_noise(X0, EPS, theirs.sigmas), theirs.scale_noise(X0, theirs.timesteps, EPS), 1e-6)
    assert torch.equal(flow.target(X0, EPS, T), EPS - X0)
    assert flow.timestep(torch.tensor([0., .25, .4379, .9999, 1.])).tolist() == [0, 250, 437, 999, 999]

def test_velocity_is_that_of_diffusers():
    near(Objective(ObjectiveConfig('v_prediction')).target(X0, EPS, T), COSINE.get_velocity(X0, EPS, STEPS), 1e-6)

@pytest.mark.parametrize('kind, of_x0, of_eps', (('flow', 1e-5, 1e-5), ('v_prediction', 1e-5, 1e-5), ('sample', 1e-5, 1e-3), ('epsilon', 1e-1, 1e-5)))
def test_every_prediction_gives_image_and_noise_back(kind, of_x0, of_eps):
    objective = Objective(ObjectiveConfig(kind))
    x0, eps = objective.split_prediction(objective.target(X0, EPS, T), objective.add_noise(X0, EPS, T), T)
    near(x0, X0, of_x0); near(eps, EPS, of_eps)

def test_predictions_convert_into_each_other():
    ways = {kind: Objective(ObjectiveConfig(kind, 'linear')) for kind in PREDICTION_TYPES[1:]}
    alpha, sigma = ways['epsilon'].alpha_sigma(T)
    xt, pred = ways['epsilon'].add_noise(X0, EPS, T), EPS
    for a, b in zip(['epsilon', 'v_prediction', 'sample'], ['v_prediction', 'sample', 'epsilon']):
        x0, eps = ways[a].split_prediction(pred, xt, T)
        p, q = prediction_coefficients(b, alpha, sigma)
        pred = p*x0 + q*eps
    near(pred, EPS, 1e-3)

def test_min_snr_is_the_papers():
    snr = compute_snr(COSINE, STEPS)
    for kind, divisor in {'epsilon': snr, 'sample': torch.ones(1000), 'v_prediction': snr + 1}.items():
        near(Objective(ObjectiveConfig(kind, snr_gamma=5.)).weight(T)/(snr.clamp(max=5.)/divisor), torch.ones(1000), 1e-4)
    for kind in PREDICTION_TYPES: assert Objective(ObjectiveConfig(kind, snr_gamma=5.)).weight(torch.tensor([0., 1.])).isfinite().all()
    assert torch.equal(Objective().weight(T), torch.ones(1000))

def test_training_times():
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = {m: Objective(ObjectiveConfig(timestep_sampling='logit_normal', logit_mean=m)).sample_timesteps(u) for m in (0., 1.)}
    assert torch.equal(Objective().sample_timesteps(u), u) and abs(drawn[0.].logit().mean()) < .03
    near(drawn[1.], math.e*drawn[0.]/(1 + (math.e - 1)*drawn[0.]), 1e-5) # SD3's shift by e is logit_mean + 1

def test_loss_is_float32_and_weighted():
    half = Objective().loss_per_image(torch.zeros(1000, 4, 2, 2, dtype=torch.bfloat16), X0, EPS, T)
    assert half.shape == (1000,) and half.dtype == torch.float32 and half.mean() == pytest.approx(2, abs=.1)
    plain, capped = (Objective(ObjectiveConfig('epsilon', snr_gamma=g)) for g in (0., 5.))
    near(capped.loss_per_image(X0, X0, EPS, T), capped.weight(T)*plain.loss_per_image(X0, X0, EPS, T), 1e-6)

@pytest.mark.parametrize('cfg, words', ((dict(prediction_type='v_predicton'), "did you mean 'v_prediction'"), (dict(timestep_sampling='logit'), 'logit_normal'),
    (dict(prediction_type='epsilon', zero_terminal_snr=True), 'divides by zero'), (dict(zero_terminal_snr=True), 'leave zero_terminal_snr off'),
    (dict(snr_gamma=-1.), '0 or more'), (dict(logit_std=0.), 'above 0'), (dict(num_train_timesteps=0), '1 or more')))
def test_choices_that_cannot_work_are_refused(cfg, words):
    with pytest.raises(InputError, match=words): Objective(ObjectiveConfig(**cfg))

@pytest.mark.parametrize('kind', PREDICTION_TYPES)
def test_the_stock_pipeline_takes_the_scheduler_as_it_is(kind):
    from t2i_nb.unet import UNetConfig, build_unet
    scheduler = Objective(ObjectiveConfig(kind)).noise_scheduler()
    before = dict(scheduler.config)
    pipeline = StableDiffusionPipeline(None, None, None, build_unet(UNetConfig(width=8), 4, 4, 8), safety_checker=None, feature_extractor=None,
                                       scheduler=scheduler, requires_safety_checker=False)
    assert dict(pipeline.scheduler.config) == before
    assert not hasattr(FlowMatchEulerDiscreteScheduler(), 'init_noise_sigma') # why the saved one is not this

@pytest.mark.parametrize('kind', PREDICTION_TYPES)
@pytest.mark.parametrize('cls', (None, UniPCMultistepScheduler, DEISMultistepScheduler))
def test_schedulers_share_the_levels_of_the_training(kind, cls):
    objective = Objective(ObjectiveConfig(kind))
    scheduler = objective.noise_scheduler()
    if cls: scheduler = cls.from_config(scheduler.config)
    scheduler.set_timesteps(10)
    x0, xt = X0[:1], EPS[:1]
    for timestep, level in zip(scheduler.timesteps, scheduler.sigmas):
        t = (timestep[None] + .5)/1000
        alpha, sigma = objective.alpha_sigma(t)
        assert abs(alpha - (1 - level if kind == 'flow' else (1 + level**2)**-.5)) < 1e-3
        xt = scheduler.step(objective.target(x0, (xt - alpha*x0)/sigma, t), timestep, xt).prev_sample
    if cls is not DEISMultistepScheduler: near(xt, x0, 1/127) # DEIS does not go on to no noise at all

def test_samplers_have_names_that_diffusers_knows():
    import diffusers
    for s in SAMPLERS.values():
        for name in filter(None, (s.scheduler, s.flow_scheduler)): assert hasattr(diffusers, name)
    assert len({s.title for s in SAMPLERS.values()}) == len(SAMPLERS)
    with pytest.raises(InputError, match="there is no sampler 'eular' .did you mean 'euler'"): check_sampler('eular')
