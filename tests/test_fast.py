"The fast generator draws what the generator draws, and refuses what cannot run here."
import numpy as np, pytest, torch
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.ecg import DataError
from ecgflowcmr.fast import Fast, Graphed, fast, has_compiler, hold_bf16, pick_mode, warm
from ecgflowcmr.train import bf16_is_fast

TOY = dict(pamae=dict(width=32, depth=1), vae=dict(width=16, deep=16, blocks=1), dit=dict(width=32, depth=1, features=32, components=8), harmonics={}, pixel_mm=1.83)


@pytest.fixture(scope='module')
def generator():
    torch.manual_seed(0)
    g = ECGFlowCMR(TOY).eval()
    for p in g.parameters(): torch.nn.init.normal_(p, std=.05)
    return g


@pytest.fixture(scope='module')
def beats():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(5, 50, 32, generator=rng), torch.rand(5, generator=rng)*.4 + .7


def alike(a, b):
    "Equal to what bf16 resolves, and hearts that differ do so by more."
    return (a - b).abs().max() < .25*(a - a.mean(0)).abs().max()


@pytest.mark.parametrize('guidance', [1., 2.])
@pytest.mark.parametrize('batch', [1, 2, 8])
def test_any_batch_draws_the_same(generator, beats, batch, guidance):
    quick = fast(generator, 'eager', batch)
    a, b = (g.sample(*beats, steps=2, guidance=guidance, seeds=[7, 1, 5, 0, 2]) for g in (generator, quick))
    assert a.shape == b.shape and alike(a, b)


def test_defaults_and_streams(generator, beats):
    quick = fast(generator, batch=2)
    assert alike(generator.sample(*beats), quick.sample(*beats))
    parts = list(quick.sample_many(*beats, seed=3, steps=1))
    assert [len(p) for p in parts] == [2, 2, 1] and alike(torch.cat(list(generator.sample_many(*beats, seed=3, steps=1))), torch.cat(parts))


def test_the_generator_is_left_alone(generator):
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    quick = fast(generator)
    assert isinstance(quick, Fast) and not isinstance(generator, Fast) and all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    assert generator.training is False and all(p.requires_grad for p in generator.vae.parameters()) and not any(p.requires_grad for p in quick.parameters())
    assert (quick.dit.enter.weight.dtype == torch.bfloat16) == bf16_is_fast('cpu')
    assert quick.config == generator.config


def test_norms_and_buffers_stay_float32(generator):
    model = hold_bf16(fast(generator))
    assert model.dit.ecg.norm.weight.dtype == model.harmonics.mean.dtype == model.dit.ecg.none.dtype == torch.float32


def test_options_out_of_range_are_still_refused(generator, beats):
    quick = fast(generator)
    for options, word in ((dict(steps=0), 'steps'), (dict(guidance=-1.), 'guidance')):
        with pytest.raises(DataError, match=word): quick.generate(np.zeros((12, 5000), 'f4'), **options)
    with pytest.raises(DataError, match='flat'): quick.generate(np.zeros((12, 5000), 'f4'))


@pytest.mark.parametrize('mode,words', [('graphs', 'CUDA graphs run on a GPU'), ('quick', 'auto, eager, compile, graphs')])
def test_modes_that_cannot_be(generator, mode, words):
    with pytest.raises(DataError, match=words) as err: fast(generator, mode)
    assert err.value.field == 'mode' and err.value.remedy


def test_no_compiler_is_an_error_and_no_other_mode(generator, monkeypatch):
    monkeypatch.setattr('ecgflowcmr.fast.has_compiler', lambda: False)
    with pytest.raises(DataError, match='C\\+\\+ compiler'): fast(generator, 'compile')
    assert fast(generator, 'auto').mode == 'eager' and pick_mode('compile', 'cuda') == 'compile'


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason='torch.compile needs a C++ compiler on a CPU; there is none')
def test_compiled_draws_the_same(generator, beats):
    quick = fast(generator, 'compile', batch=2)
    a, b = (g.sample(*beats, steps=2, guidance=2.) for g in (generator, quick))
    assert alike(a, b)
    compiled = torch._dynamo.utils.counters['stats']['unique_graphs']
    quick.sample(*beats, steps=4, guidance=2.)                                     # other steps, the last part not full: nothing is compiled anew
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == compiled > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('mode', ['eager', 'compile', 'graphs'])
def test_on_a_gpu(generator, beats, mode):
    import copy
    g = copy.deepcopy(generator).cuda()
    quick = warm(fast(g, mode, batch=2), torch.randn(1, 12, 5000), steps=2)
    a, b = (o.sample(*beats, steps=2, guidance=2.) for o in (g, quick))
    assert alike(a, b) and torch.equal(b, quick.sample(*beats, steps=2, guidance=2.)), 'a replay does not touch earlier results'
    if mode == 'graphs': assert isinstance(quick.vae.decode, Graphed) and len(quick.vae.decode.kept) == 1
