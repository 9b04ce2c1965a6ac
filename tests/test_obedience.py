"Obedience with generators whose answer is known: an ideal sampler, one that ignores its ECG, one that dies; and the truth of the volume-time curve."
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
import ecgflowcmr.fidelity as fidelity
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.cohort import build_virtual_cohort
from ecgflowcmr.ecg import DataError
from ecgflowcmr.fidelity import READ, Reader, others, truth, volume_curves
from ecgflowcmr.obedience import NAMES, calibration, fit_regressor, kept_name, look, obedience, samples_of, split_look

P = 4  # quantities of a toy heart, each the brightness of a quadrant


class Painter:
    "Draws `m + sqrt(1-rho^2) e` into the quadrants of a cine; m is in the features of the beat, e comes from the seed."
    def __init__(self, rho, follows=1., dies=None): self.rho, self.follows, self.dies, self.calls, self.largest = rho, follows, dies, 0, 0

    def sample(self, f, rr, seeds):
        if self.dies is not None and self.calls >= self.dies: raise KeyboardInterrupt
        self.calls += len(f); self.largest = max(self.largest, len(f))
        e = torch.stack([torch.randn(P, generator=torch.Generator().manual_seed(s)) for s in seeds])
        x = self.follows*f[:,0,:P] + np.sqrt(1 - (self.follows*self.rho)**2)*e
        return (x/10).view(-1, 1, 2, 2).repeat_interleave(48, 2).repeat_interleave(48, 3).expand(-1, 50, -1, -1)


def quadrants(x): return (x.mean(1).reshape(-1, 2, 48, 2, 48).mean((2,4)).reshape(-1, P)*10).numpy()


def judged(painter, rho, n=500, k=8, swap=False, seed=0):
    rng = np.random.default_rng(seed)
    m = rho*rng.normal(size=(n,P)); x = m + np.sqrt(1-rho**2)*rng.normal(size=(n,P))
    f = torch.from_numpy(m)[:,None].float()
    if swap: f = f[others(n)]
    read = samples_of(painter, quadrants, f, torch.ones(n), k, batch=64, desc=None)
    return x, read, obedience(x, x, read, m, names=list('ABCD'), judged=tuple('ABCD'), draws=300)


@pytest.mark.parametrize('rho', [.5, .9])
@pytest.mark.parametrize('k', [1, 8])
def test_an_ideal_sampler_obeys(rho, k):
    x, read, table = judged(Painter(rho), rho, k=k)
    assert table.loc['mean','obedience: low'] < 1 < table.loc['mean','obedience: high'] or abs(table.loc['mean','obedience'] - 1) < .04
    if k > 1: assert (abs(calibration(x, read, list('ABCD'), 200)['error/spread'] - 1) < .1).all()


def test_half_obedience_is_found_out():
    table = judged(Painter(.9, follows=.4), .9)[2]
    assert table.loc['mean','obedience: high'] < .85


@pytest.mark.parametrize('painter,swap', [(Painter(.9, follows=0.), False), (Painter(.9), True)], ids=['ignores its ECG', 'shuffled ECGs'])
def test_no_obedience_is_nothing(painter, swap):
    table = judged(painter, .9, swap=swap)[2]
    a = table['agreement, one sample'].to_numpy(float)[:P]
    assert (abs(a) < .12).all() and (table['agreement, one sample: low'].to_numpy(float)[:P] < .03).all() and abs(table.loc['mean','obedience']) < .2


def test_without_coupling_it_is_undefined():
    rng = np.random.default_rng(0); x = rng.normal(size=(200,P))
    table = obedience(x, x, rng.normal(size=(200,8,P)), rng.normal(size=(200,P)), names=list('ABCD'), judged=tuple('AB'), draws=100)
    assert table['obedience'].isna().all() and table['why'].str.contains('undefined').all()


def test_a_mean_heart_obeys_but_is_not_calibrated():
    "Always drawing the expected heart beats the ceiling of one sample: only the calibration convicts it."
    rng = np.random.default_rng(1); m = .6*rng.normal(size=(400,P)); x = m + .8*rng.normal(size=(400,P)); drawn = m[:,None] + .05*rng.normal(size=(400,8,P))
    assert obedience(x, x, drawn, m, names=list('ABCD'), judged=tuple('ABCD'), draws=50).loc['mean','obedience'] > 1.05
    assert (calibration(x, drawn, list('ABCD'), 50)['error/spread'] > 5).all()


def test_an_interrupted_judgement_goes_on(tmp_path):
    f, rr = torch.randn(10,1,P), torch.ones(10); kept = kept_name(tmp_path, 'own', bundle='toy')
    whole = samples_of(Painter(.8), quadrants, f, rr, 4, batch=4, desc=None)
    dying = Painter(.8, dies=20)
    with pytest.raises(KeyboardInterrupt): samples_of(dying, quadrants, f, rr, 4, batch=4, kept=kept, every=0., desc=None)
    again = Painter(.8)
    got = samples_of(again, quadrants, f, rr, 4, batch=4, kept=kept, desc=None)
    assert np.allclose(got, whole, atol=1e-5) and again.calls == 20 and dying.calls == 20
    assert [p.name for p in tmp_path.iterdir()] == [kept.name]


def test_batches_stay_small():
    p = Painter(.8); samples_of(p, quadrants, torch.randn(30,1,P), torch.ones(30), 8, batch=6, desc=None)
    assert p.largest == 6 and p.calls == 240


def test_broken_readings_are_refused(tmp_path):
    kept = kept_name(tmp_path, 'own', bundle='toy'); kept.write_bytes(b'nothing')
    with pytest.raises(DataError, match='own-'): samples_of(Painter(.8), quadrants, torch.randn(3,1,P), torch.ones(3), 2, kept=kept, desc=None)


def test_regressors_do_not_know_what_was_left_out():
    "More columns than rows, and nothing in them: a fit that had seen its own answers would have r near 1."
    rng = np.random.default_rng(0); x, y, train = rng.normal(size=(120,400)), rng.normal(size=(120,2)), np.arange(80)
    pred, table = fit_regressor(dict(noise=x), y[train], train, names=['a','b'], progress=False)
    assert all(np.corrcoef(pred[train,j], y[train,j])[0,1] < .4 for j in (0,1)) and (table.loc['ridge: noise'] < .2).all()  # left-out means alone have r = -1
    other = fit_regressor(dict(noise=np.r_[x[:80], x[80:][::-1]]), y[train], train, names=['a','b'], progress=False)[0]
    assert np.allclose(pred[80:], other[80:][::-1], atol=1e-8)  # one held-out subject does not bear on another


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return build_virtual_cohort(tmp_path_factory.mktemp('obedience')/'virtual', 20, workers=1, progress=False)


def test_curves_of_virtual_hearts_are_exact(cohort):
    rows = np.array([3, 0, 17]); v = volume_curves(cohort, rows)
    assert np.allclose(v[:,0], cohort.exact['LVEDV'].to_numpy()[rows], rtol=1e-5) and np.allclose(v.min(1), cohort.exact['LVESV'].to_numpy()[rows], rtol=1e-5)


def test_curves_of_another_heart_are_refused(cohort):
    wrong = replace(cohort, exact=cohort.exact.assign(LVEDV=cohort.exact['LVEDV']*1.1))
    with pytest.raises(DataError, match='LVEDV'): volume_curves(wrong, [0])


def test_curves_of_other_cohorts_are_segmented_once(cohort, tmp_path, monkeypatch):
    real = replace(cohort, manifest=cohort.manifest | dict(kind='measured'))
    v, exact = volume_curves(real, [2, 5], tmp_path), volume_curves(cohort, [2, 5])
    assert all(np.corrcoef(a, b)[0,1] > .95 for a,b in zip(v, exact)) and np.allclose(v[:,0], exact[:,0], rtol=1e-4)
    monkeypatch.setattr(fidelity, 'segmented_curve', None)
    assert np.allclose(volume_curves(real, [5, 2], tmp_path), v[::-1])


def test_looking_and_reading_are_one(cohort):
    torch.manual_seed(0); reader = Reader().eval(); x = torch.from_numpy(cohort.la[:3].copy()).float()/127.5 - 1
    parts = split_look(look(reader)(x))
    assert np.allclose(parts['read'][:,:len(READ)], reader.read(x), atol=1e-4) and parts['features'].shape == (3,128) and parts['curve'].shape == (3,50) and parts['read'].shape[1] == len(NAMES)
    assert np.allclose(reader.read_all(x)[:,len(READ)+1:], parts['curve'], atol=1e-3)


def test_beats_come_in_batches(cohort):
    class G:
        def read_beat(self, mv): return mv[:,:1,:50].transpose(1,2), torch.ones(len(mv)), torch.full((len(mv),), 3)
    f, rr, count = ECGFlowCMR.beats_of(G(), (cohort.ecg[i] for i in range(7)), batch=3)
    assert f.shape == (7,50,1) and np.allclose(f[:,:,0], cohort.ecg[:7,0,:50]) and (count == 3).all()


def test_a_cohort_without_labels_is_refused(cohort):
    with pytest.raises(DataError, match='LVEDV'): truth(replace(cohort, exact=None, measured=pd.DataFrame(dict(subject=[]))), [0])
