"Recipes `paper` and `released`: published sizes and the details in which they differ, each by a test that fails without it; every part trains on a toy."
import numpy as np, pytest, torch
from einops import rearrange
from torch import nn
from ecgflowcmr.amdf import euler, guided
from ecgflowcmr.baselines.common import recalled
from ecgflowcmr.cohort import build_virtual_cohort
from ecgflowcmr.ecg import DataError
from ecgflowcmr.frames import Frames, PaperDiT, ReleasedDiT, fit_frames, frame_flow_loss, paper_config, released_config, released_euler
from ecgflowcmr.pamae import predicted_cycles
from ecgflowcmr.resnet_ecg import ResNetECG, late_cycles, middle_cycle, middle_cycle_features, released_peaks, released_target, resnet_loss
from ecgflowcmr.stages import fit_generator
from ecgflowcmr.train import fit
from ecgflowcmr.vae_released import Adversary, Conv3, Patch3, ReleasedVAE, check_perceptual, glare, hinge, released_vae_config, released_vae_loss

rng = lambda s=0: torch.Generator().manual_seed(s)
millions = lambda m: sum(p.numel() for p in m.parameters())/1e6
FIELDS = dict(paper=PaperDiT, released=ReleasedDiT)
small = dict(width=32, depth=2, heads=4, features=16, patch=2)
TIMES = (np.arange(625)+.5)*8/500


def strip(b=2):
    "Strips with a beat every .8 s and waves that differ from lead to lead."
    t = torch.arange(5000)/500
    beat = lambda at, w: torch.exp(-((t % .8 - at)/w)**2)
    return torch.stack([beat(.4, .02)*(1+.1*i) + .2*beat(.65, .06) for i in range(12)]).expand(b, -1, -1) + .01*torch.randn(b, 12, 5000, generator=rng())


def sincos(rr=.9, first=.21): a = 2*np.pi*(TIMES-first)/rr; return np.stack([np.sin(a), np.cos(a)], 1)


# --- the encoder -------------------------------------------------------------------------------------------------
def test_encoder_has_the_published_shape():
    m = ResNetECG()
    assert m.width == 768 and [s[0].body[0][0].out_channels for s in m.stages] == [64, 128, 256, 512] and [len(s) for s in m.stages] == [2]*4
    assert [s[0].body[0][0].stride[0] for s in m.stages] == [1, 2, 1, 1]
    assert (m.stem[0][0].kernel_size, m.stem[0][0].stride) == ((7,), (2,)) and m.decode[-1].kernel_size == (7,)
    assert [o.out_features for o in m.phase if isinstance(o, nn.Linear)] == [512, 256, 2]
    with torch.no_grad(): assert m.encode(torch.zeros(1, 12, 5000)).shape == (1, 625, 768)


def test_the_mask_is_on_the_output():
    "The encoder sees the whole strip; what the decoder sees is zero at about half of the positions and nothing else."
    m, seen = ResNetECG(8, 16), {}
    m.stem.register_forward_pre_hook(lambda _, a: seen.update(strip=a[0])); m.decode.register_forward_pre_hook(lambda _, a: seen.update(features=a[0]))
    mv = strip()
    resnet_loss(m, mv, torch.zeros(2, 625, 2), rng())
    assert torch.equal(seen['strip'], mv)
    zero = (seen['features'] == 0).all(1)
    assert .42 < zero.float().mean() < .58 and torch.equal((seen['features'] == 0).any(1), zero)


def test_the_loss_is_100_to_10_over_all_samples():
    m, mv = ResNetECG(8, 16), strip()
    d = resnet_loss(m, mv, torch.zeros(2, 625, 2), rng(), ratio=1.)
    painted = m.decode(torch.zeros(2, 16, 625)).detach()                # everything hidden: still the error of every sample
    assert d['rec'].item() == pytest.approx((painted-mv).square().mean().item(), rel=1e-4)
    assert d['loss'].item() == pytest.approx(100*d['rec'].item() + 10*d['phase'].item(), rel=1e-5)


def test_targets_are_zero_outside_the_r_peaks():
    mv = np.zeros((12, 5000), 'f4'); mv[1, 700:4400:400] = 1.
    y = released_target(mv, own_peaks=True)
    assert y.shape == (625, 2) and not np.isnan(y).any()
    assert np.allclose(y[:87], [0, 1]) and np.allclose(y[-70:], [0, 1])      # phase 0: sine 0, cosine 1
    assert np.allclose(y[100], [np.sin(2*np.pi*100/400), np.cos(2*np.pi*100/400)], atol=1e-5)   # sample 800, 100 after the peak at 700


def test_the_peak_rule():
    x = np.zeros(5000); x[[500, 600, 900, 1500]] = 1., .5, .005, 1.           # 600 is too near, 900 too low
    assert released_peaks(x).tolist() == [500, 1500]


def test_the_late_cut_is_half_a_beat_late():
    y = sincos()
    early, late = (middle_cycle(y, o)*8/500 for o in (False, True))
    assert (early-.21)/.9 % 1 == pytest.approx([0, 0], abs=.01) or (early-.21)/.9 % 1 == pytest.approx([1, 1], abs=.01)
    assert (late-.21)/.9 % 1 == pytest.approx([.5, .5], abs=.02)
    k = len(predicted_cycles(y)); assert early[0] == pytest.approx(.21+.9*((k-1)//2), abs=.01)      # the middle one
    assert len(late_cycles(np.ones((625, 2)))) == 0


def test_one_cycle_or_none():
    m = ResNetECG(8, 16).eval()
    class Known(nn.Module):
        def forward(self, f): return torch.from_numpy(np.stack([sincos(), np.ones((625, 2))])).float()
    m.phase = Known()
    f, rr, count = middle_cycle_features(m, strip())
    assert f.shape == (2, 50, 16) and count.tolist() == [1, 0] and rr[0].item() == pytest.approx(.9, abs=.01)
    assert f[0].isfinite().all() and f[1].isnan().all() and rr[1].isnan()
    m.late = True                                                       # a model made so cuts half a beat late: the other half of the beat comes first
    late = middle_cycle_features(m, strip())[0][0]; assert torch.equal(late, middle_cycle_features(m, strip(), late=True)[0][0])
    assert not torch.allclose(late, f[0]) and (late.roll(25, 0)-f[0]).abs().mean() < (late-f[0]).abs().mean()


def test_the_encoder_learns_the_phase(tmp_path):
    torch.manual_seed(0)
    m, mv = ResNetECG(8, 32), strip(4)
    y = torch.from_numpy(np.stack([released_target(o.numpy(), own_peaks=False) for o in mv]))
    before = resnet_loss(m, mv, y, rng())
    fit(m, lambda m, i, r: resnet_loss(m, mv[i], y[i], r), 4, dict(steps=20, batch=4, lr=4e-3, warmup=2, ema=0., log_every=20), tmp_path/'pamae', 'cpu', None)
    m.train(); after = resnet_loss(m, mv, y, rng())
    assert after['phase'] < .6*before['phase'] and after['rec'] < before['rec']
    resnet_loss(m, mv, y, rng())['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


# --- the VAE -----------------------------------------------------------------------------------------------------
def test_the_vae_has_the_published_size():
    with torch.device('meta'): v, d = ReleasedVAE(), Patch3()
    assert sum(millions(m) for m in (v.start, v.up, v.leave)) == pytest.approx(38, abs=.5)
    x = torch.empty(1, 50, 96, 96, device='meta')
    with torch.no_grad():
        z, logvar = v.encode(x); assert z.shape == logvar.shape == (1, 4, 50, 12, 12) and v.decode(z).shape == x.shape
    assert millions(d) == pytest.approx(11., abs=.2)
    toy().vae.to(memory_format=torch.channels_last)                       # as a bundle does with any VAE


def test_conv3_is_conv3d():
    x = torch.randn(2, 3, 6, 9, 8, requires_grad=True); c = Conv3(3, 4, 3, (1, 2))
    y = nn.functional.conv3d(x, rearrange(c.weight, 'o (k c) p q -> o c k p q', k=3), c.bias, (1, 2, 2), 1)
    assert torch.allclose(c(x), y, atol=1e-5)
    a, b = (torch.autograd.grad(o.square().sum(), (x, c.weight)) for o in (c(x), y))
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(a, b))


def toy(): torch.manual_seed(0); return Adversary(ReleasedVAE(ch=4, mult=(1, 1, 2, 2), blocks=1, attention=(12,), heads=2, window=3), ndf=2)
def clip(b=1): g = torch.linspace(-1, 1, 96); return ((g[:, None].square()+g.square() < .4).float()*1.2-.6).expand(b, 3, 96, 96).contiguous()


def test_each_player_has_the_gradient_of_its_own_loss():
    both, x = toy(), clip()
    released_vae_loss(both, x, rng(), gan_start=0)['loss'].backward()
    mixed = {k: p.grad.clone() for k, p in both.named_parameters()}
    both.zero_grad(); both.step.zero_()
    mean, logvar = both.vae.encode(x); y = both.vae.decode(mean+torch.randn(mean.shape, generator=rng())*(logvar/2).exp())
    hinge(both.discriminator(x), both.discriminator(y.detach())).backward()
    for k, p in both.discriminator.named_parameters(): assert torch.allclose(mixed[f'discriminator.{k}'], p.grad, atol=1e-5), k
    assert all(p.grad is None for p in both.vae.parameters())
    both.zero_grad(); released_vae_loss(both, x, rng(), gan_start=99)['loss'].backward()
    assert all(p.grad is None for p in both.discriminator.parameters())                # not before its start
    assert any(not torch.allclose(mixed[f'vae.{k}'], p.grad, atol=1e-6) for k, p in both.vae.named_parameters())   # after it the VAE listens


def test_the_start_is_counted_and_resumes(tmp_path):
    both, x = toy(), clip(2)
    loss = lambda m, i, r: released_vae_loss(m, x[i], r, gan_start=3)
    fit(both, loss, 2, dict(steps=5, batch=1, lr=1e-3, warmup=0, ema=0., log_every=1), tmp_path/'vae', 'cpu', None)
    assert both.step.item() == 5
    rows = [r.split(',') for r in (tmp_path/'vae'/'log.csv').read_text().splitlines()]
    judged = [float(r[rows[0].index('judged')]) for r in rows[1:]]
    assert judged[:3] == [0, 0, 0] and min(judged[3:]) > 0
    again = toy(); fit(again, loss, 2, dict(steps=5, batch=1, lr=1e-3, warmup=0, ema=0., log_every=1), tmp_path/'vae', 'cpu', None)
    assert again.step.item() == 5 and torch.equal(again.vae.leave[-1].weight, both.vae.leave[-1].weight)


def test_the_vae_overfits_a_clip():
    both, x = toy(), clip()
    opt = torch.optim.AdamW(both.parameters(), lr=5e-3); l1 = []
    for _ in range(16):
        d = released_vae_loss(both, x, rng(), gan_start=12); opt.zero_grad(); d['loss'].backward(); opt.step(); l1.append(d['l1'].item())
    assert min(l1[-5:]) < .7*l1[0], l1


def test_kl_is_summed_and_bright_pixels_cost():
    both, x = toy(), clip()
    d = released_vae_loss(both, x, rng()); mean, logvar = both.vae.encode(x)
    assert d['kl'].item() == pytest.approx(.5*(mean.square()+logvar.exp()-1-logvar).sum().item(), rel=1e-4)
    dark = torch.zeros(1, 1, 96, 96); bright = dark.clone(); bright[..., 5, 5] = 3
    assert glare(dark) == 0 < glare(bright)


def test_the_perceptual_term_is_said_openly():
    c = released_vae_config('smoke'); assert c['perceptual'] == 'none'
    check_perceptual(c, None)
    with pytest.raises(DataError, match='perceptual'): check_perceptual(c, lambda a, b: 0)
    with pytest.raises(DataError, match='LPIPS'): check_perceptual(c | dict(perceptual='LPIPS'), None)
    both, x = toy(), clip(); plain = released_vae_loss(both, x, rng())['loss']
    more = released_vae_loss(both, x, rng(), perceptual=lambda a, b: torch.full((len(a),), 2.))['loss']
    assert (more-plain).item() == pytest.approx(2., abs=1e-4)


def test_windows_do_not_mix():
    v = ReleasedVAE(ch=8, mult=(1, 1, 1, 1), blocks=1, attention=(12,), heads=2, window=5)
    assert v.encode(torch.zeros(1, 7, 96, 96))[0].shape[2] == 7                              # no whole windows: one window
    assert v.encode(torch.zeros(1, 10, 96, 96))[0].shape[2] == 10


# --- the flows ---------------------------------------------------------------------------------------------------
def test_the_template_is_the_mean_over_subjects_and_time():
    z = torch.randn(7, 4, 50, 12, 12, generator=rng()) + torch.randn(4, 1, 12, 12, generator=rng(1))
    s = fit_frames(Frames(), (Frames().project(b) for b in z.split(3)))
    assert torch.allclose(s.template, z.mean((0, 2)), atol=1e-5) and torch.equal(s.spread, torch.ones(200))
    assert torch.allclose(s.back(s(z)), z, atol=1e-5)
    noise = torch.randn(2, 200, 12, 12)
    assert torch.allclose(s.back(.8*noise), z.mean((0, 2))[:, None] + .8*s.back(noise)-.8*s.template[:, None], atol=1e-4)   # z0 = template + alpha eps
    s12 = Frames(channels=12); assert s12.mean.shape == (600, 12, 12) and s12.template.shape == (12, 12, 12)


def test_the_released_field_has_the_published_size():
    with torch.device('meta'): m = ReleasedDiT()
    assert millions(m) == pytest.approx(72.8, abs=.1) and m.place.shape == (50, 144, 512) and len(m.blocks) == 8
    assert m.blocks[0].modulation.out_features == 12*512 and m.blocks[0].time.heads == 8


@pytest.mark.parametrize('name', FIELDS)
def test_a_field_keeps_its_protocol(name):
    field = FIELDS[name](**small); x, f, rr = torch.randn(3, 200, 12, 12), torch.randn(3, 50, 16), torch.ones(3)
    ecg = field.ecg(f, rr, drop=torch.tensor([True, False, True]), guess=None); assert isinstance(ecg, tuple)
    assert field(x, torch.rand(3), torch.zeros(4, 12, 12), ecg).shape == x.shape
    v = guided(field, torch.zeros(4, 12, 12), f, rr, 2.)[0]; assert euler(v, x, 2).shape == released_euler(v, x, 2).shape == x.shape
    wide = FIELDS[name](**small, channels=12); assert wide(torch.randn(1, 600, 12, 12), torch.rand(1), torch.zeros(12, 12, 12), wide.ecg(f[:1], rr[:1])).shape == (1, 600, 12, 12)


@pytest.mark.slow
@pytest.mark.parametrize('name,walk,guidance,drop', [('paper', euler, 1., 0.), ('released', released_euler, 2., .1)])
def test_a_field_gives_each_ecg_its_own_latent_back(name, walk, guidance, drop):
    "Four beating latents learnt by heart, sampled as the recipe samples: from noise not seen before each ECG gets its own, told another ECG another's."
    torch.manual_seed(0)
    field, space = FIELDS[name](width=64, depth=1, heads=4, features=16, patch=2, size=4), Frames(size=4)
    beat, places = 1+.3*torch.cos(2*torch.pi*torch.arange(50)/50), torch.randn(4, 4, 1, 2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    z, f, rr, seen, steps = space.project(places*beat[:, None, None]), torch.randn(4, 50, 16), torch.ones(4), rng(), 300
    fit_frames(space, [z]); x1 = z - space.mean
    opt = torch.optim.AdamW(field.parameters(), lr=6e-3); slow = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, 2*(1-i/steps)))
    for _ in range(steps):
        opt.zero_grad(); frame_flow_loss(field, space, x1, f, rr, seen, drop=drop)['loss'].backward()
        nn.utils.clip_grad_norm_(field.parameters(), 1.); opt.step(); slow.step()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in field.parameters())
    noise = torch.randn(x1.shape, generator=rng(5))
    drawn = lambda shift: walk(guided(field.eval(), space.template, f.roll(shift, 0), rr, guidance)[0], noise, 10)
    share, error = recalled(drawn(0), x1)
    assert share == 1 and error < .2 and recalled(drawn(1), x1)[0] == 0


@pytest.mark.parametrize('name', FIELDS)
def test_a_dropped_ecg_is_zeros(name):
    ecg, f = FIELDS[name](**small).ecg, torch.randn(2, 50, 16)
    gone = ecg(f, torch.ones(2), torch.tensor([True, False]))
    for a, zero, kept in zip(gone, ecg(0*f, torch.ones(2)), ecg(f, torch.ones(2))):
        assert torch.allclose(a[0], zero[0], atol=1e-5) and torch.allclose(a[1], kept[1], atol=1e-5) and not torch.allclose(kept[0], zero[0], atol=1e-2)


def test_first_and_last_layers():
    x, f, rr = torch.randn(2, 200, 12, 12), torch.randn(2, 50, 16), torch.ones(2)
    still = PaperDiT(**small); assert still(x, torch.rand(2), torch.zeros(4, 12, 12), still.ecg(f, rr)).abs().max() == 0
    moving = ReleasedDiT(**small); assert moving(x, torch.rand(2), torch.zeros(4, 12, 12), moving.ecg(f, rr)).abs().max() > .01


def test_the_released_field_sees_the_latent_itself():
    m, x, t, template = ReleasedDiT(**small), torch.randn(1, 200, 12, 12), torch.rand(1), torch.randn(4, 12, 12)
    ecg = m.ecg(torch.randn(1, 50, 16), torch.ones(1))
    assert torch.allclose(m(x, t, template, ecg), m(x+template.repeat(50, 1, 1), t, 0*template, ecg), atol=1e-4)


def test_time_is_unscaled_in_the_released_field():
    "The published sinusoid sees t in [0,1] itself, ours 1,000 times that."
    seen = {}
    for name, cls in FIELDS.items():
        m = cls(**small); m.time.register_forward_pre_hook(lambda _, a, name=name: seen.update({name: a[0]}))
        m(torch.zeros(1, 200, 12, 12), torch.tensor([.37]), torch.zeros(4, 12, 12), m.ecg(torch.zeros(1, 50, 16), torch.ones(1)))
    assert seen['released'][0, 0].item() == pytest.approx(np.sin(.37), abs=1e-5) and seen['paper'][0, 0].item() == pytest.approx(np.sin(370), abs=1e-3)


def test_the_order_of_a_block():
    "Time, ECG, space, MLP."
    m, order = ReleasedDiT(**small), []
    for k in ('time', 'cross', 'space', 'mlp'): getattr(m.blocks[0], k).register_forward_hook(lambda *_, k=k: order.append(k))
    m(torch.zeros(1, 200, 12, 12), torch.zeros(1), torch.zeros(4, 12, 12), m.ecg(torch.zeros(1, 50, 16), torch.ones(1)))
    assert order == ['time', 'cross', 'space', 'mlp']


def test_sampler_times_and_states():
    at = []
    def field(x, t): at.append((t[0].item(), x[0, 0].item())); return torch.ones_like(x)
    end = released_euler(field, torch.zeros(1, 1), 10)
    assert [t for t, _ in at] == pytest.approx([(i+.5)/10 for i in range(10)]) and [x for _, x in at] == pytest.approx([i/10 for i in range(10)]) and end.item() == pytest.approx(1)
    at.clear(); euler(field, torch.zeros(1, 1), 10); assert [t for t, _ in at] == pytest.approx([i/10 for i in range(10)])


def test_time_is_uniform_and_one_for_a_batch_if_asked():
    class Spy(nn.Module):
        def ecg(self, f, rr, drop): self.drop = drop; return ()
        def forward(self, x, t, template, ecg): self.t = t; return 0*x
    spy, x1 = Spy(), torch.zeros(400, 4, 1, 1); space = Frames(1, 4, 1)
    d = frame_flow_loss(spy, space, x1, None, None, rng(), alpha=.8, drop=.1)
    assert torch.histc(spy.t, 4, 0, 1).min() > 70 and .05 < spy.drop.float().mean() < .16 and d['loss'].item() == pytest.approx(.64, abs=.06)
    frame_flow_loss(spy, space, x1, None, None, rng(), one_time=True); assert spy.t.unique().numel() == 1 and len(spy.t) == 400


def test_the_settings_of_the_recipes():
    p, r = paper_config('paper'), released_config('paper')
    assert {k: p['amdf']['train'][k] for k in ('epochs', 'batch', 'lr', 'weight_decay')} == dict(epochs=10, batch=4, lr=1e-4, weight_decay=1e-4)
    assert (p['amdf']['alpha'], p['amdf']['drop'], p['amdf']['guidance'], p['pamae']['mask_ratio']) == (1., 0., 1., .5)
    assert (r['amdf']['alpha'], r['amdf']['alpha_sampling'], r['amdf']['drop'], r['amdf']['steps'], r['amdf']['guidance'], r['amdf']['sampler']) == (.8, .6, .1, 10, 2., 'released_euler')
    assert (r['vae']['gan_start'], r['vae']['gan_weight'], r['vae']['kl_weight'], r['vae']['train']['lr'], tuple(r['vae']['train']['betas'])) == (10_000, .5, 1e-6, 5e-5, (.5, .9))
    assert (r['pamae']['weights'], r['pamae']['train']['batch'], r['pamae']['train']['epochs'], r['pamae']['train']['weight_decay']) == ([100., 10.], 32, 100, .05)
    assert not r['pamae']['model']['late'] and released_config('paper', faithful=True)['pamae']['model']['late']
    assert not r['pamae']['own_peaks'] and released_config('paper', faithful=True)['pamae']['own_peaks']
    for k in ('pamae', 'vae'): assert (p[k]['train'].get('optimizer', 'adamw'), p[k]['train']['lr'], p[k]['train']['batch']) == ('adamw', 1e-4, 4)


# --- the sampler of the recipe that is used ----------------------------------------------------------------------
@pytest.mark.slow
def test_harmonic_gives_each_ecg_its_own_heart_back(tmp_path):
    "Seven hearts learnt by heart, as every baseline has to (chapter 12): chance alone would find all seven once in 800,000 times."
    cohort = build_virtual_cohort(tmp_path/'c', 10, workers=1, progress=False)
    rows = cohort.index('train'); true = torch.from_numpy(np.array(cohort.la[rows])).float()/127.5 - 1
    generator, _ = fit_generator(cohort, 'smoke', 'harmonic', tmp_path/'run', 0, 'amdf.student=null amdf.train.steps=150', 'cpu')
    f, rr, _ = generator.beats_of([cohort.ecg[i] for i in rows])
    share, _ = recalled(generator.sample(f, rr, seeds=list(range(len(rows)))).float(), true)
    wrong, _ = recalled(generator.sample(f.roll(1, 0), rr.roll(1, 0), seeds=list(range(len(rows)))).float(), true)
    assert len(rows) == 7 and share == 1 and wrong == 0, 'told another ECG it draws another heart'
