"Cleaning against the peers' slow way, on real recordings, under noise of known size, and under nonsense."
import time
import numpy as np
import pytest
import pywt
from pydicom.data import get_testdata_file
from scipy.signal import savgol_filter
from statsmodels.tsa.seasonal import seasonal_decompose
from ecgflowcmr.clean import AUGMENTATIONS, STEPS, beat_length, beat_trend, clean, crop_resize, ecg_transform, minmax, remove_baseline, sign_flip, smooth, time_flip, wavelet_denoise
from ecgflowcmr.ecg import DataError, r_peaks, read_ecg
from ecgflowcmr.virtual.ecg import Electrics, virtual_ecg


@pytest.fixture(scope='module')
def real():
    mv = read_ecg(get_testdata_file('waveform_ecg.dcm', download=False)).mv
    return mv, r_peaks(mv[1])


@pytest.mark.parametrize('n, period', [(5000, 497), (5000, 496), (5000, 250), (5000, 1501), (5000, 2500), (4999, 333), (1000, 2), (1000, 3)])
def test_trend_is_statsmodels(real, n, period):
    x = real[0][:, :n].astype(float)
    mine = beat_trend(x, period)
    for k in (1, 6):
        told = seasonal_decompose(x[k], model='additive', period=period).trend
        ok = np.isfinite(told)
        assert (~ok).sum() == 2*(period//2)
        np.testing.assert_allclose(mine[k][ok], told[ok], rtol=0, atol=1e-12)
        half = np.flatnonzero(ok)[0]
        np.testing.assert_allclose(mine[k][:half], 2*told[half] - told[2*half:half:-1][:half] if n >= 4*half else mine[k][:half], atol=1e-12)
        np.testing.assert_allclose(beat_trend(x[k], period, 'hold'), np.interp(np.arange(n), np.flatnonzero(ok), told[ok]), rtol=0, atol=1e-12)


def test_whole_chain_is_the_slow_one(real):
    "What CardiacNets' code and text say, lead by lead with their libraries."
    mv, peaks = real
    for k, x in enumerate(mv.astype(float)):
        trend = seasonal_decompose(x, model='additive', period=beat_length(peaks)).trend
        ok = np.flatnonzero(np.isfinite(trend))
        x = x - np.interp(np.arange(5000), ok, trend[ok])
        rest, *details = pywt.wavedec(x, 'db6', level=3)
        limit = np.median(abs(details[-1]))/.6745*np.sqrt(2*np.log(5000))
        slow = savgol_filter(pywt.waverec([rest, *(pywt.threshold(d, limit, 'soft') for d in details)], 'db6'), 13, 5)
        np.testing.assert_allclose(smooth(wavelet_denoise(remove_baseline(mv[k].astype(float), peaks, ends='hold'))), slow, rtol=0, atol=1e-9)


def around(x, r, a, b): return np.stack([x[..., i+a:i+b] for i in r if 100 < i < x.shape[-1]-100], -2)
def qrs(x, r): return np.median(np.ptp(around(x, r, -25, 25), axis=-1), axis=-1)
def st(x, r): return np.median(around(x, r, 45, 55).mean(-1) - around(x, r, -50, -40).mean(-1), -1)
def slow_power(x):
    p = abs(np.fft.rfft(x - x.mean(-1, keepdims=True)))**2
    return p[..., np.fft.rfftfreq(x.shape[-1], 1/500) < .5].sum()


def test_real_recordings_keep_what_a_cardiologist_reads(fixtures):
    names = [f'cinc2021/{o}.hea' for o in ('E07500', 'E07502', 'E07504', 'HR06000', 'HR06001', 'HR06003')] + ['ptb/s0010_re.hea']
    kept, moved, slow = [], [], []
    for o in names:
        try: mv = read_ecg(fixtures/'ecg'/o).mv[:, :5000]
        except DataError: continue                                    # the gate has refused it
        r = r_peaks(mv[1])
        y = clean(mv, peaks=r)
        kept.append(np.median(qrs(y, r)/qrs(mv, r)))
        moved.append(np.median(abs(st(y, r) - st(mv, r))))
        slow.append(slow_power(y)/slow_power(mv))
    print('QRS kept', np.round(kept, 3), 'ST moved, mV', np.round(moved, 4), 'power below .5 Hz', np.round(slow, 3))
    assert len(kept) >= 5
    assert min(kept) > .94 and np.median(kept) > .96
    assert max(moved) < .012
    assert max(slow) < .05


@pytest.mark.parametrize('rhythm', [dict(), dict(hr=95, rmssd_ms=10), dict(hr=45)], ids=['60', '95', '45'])
def test_known_disturbance(rhythm):
    "Signal-to-noise ratio rises with every step."
    still, r = virtual_ecg(Electrics(noise_uv=0, baseline_mv=0, mains_uv=0, lsb_uv=.5, **rhythm), np.random.default_rng(1))
    r = np.round(r*500).astype(int)
    rng, f = np.random.default_rng(2), np.fft.rfftfreq(10_000, 1/500)
    drift = np.fft.irfft(((f > .05) & (f < .5))/np.maximum(f, .05)*np.exp(2j*np.pi*rng.random((12, len(f)))), 10_000)[:, :5000]
    x = still + .1*drift/drift.std(-1, keepdims=True) + .02*rng.normal(size=still.shape)
    snr = lambda y: (10*np.log10(still.var(-1)/(y - still).var(-1))).mean()
    b = remove_baseline(x, r); w = wavelet_denoise(b); s = smooth(w)
    found = [snr(o) for o in (x, b, w, s)]
    assert found[1] > found[0] + 8 and found[2] > found[1] + 2 and found[3] > found[2] - .1, found


def test_speed(real):
    "The issue asks for 5 a second of a core; processor time, half of what is usual."
    mv, peaks = real
    def rate(f):
        f(); a = time.process_time()
        for _ in range(10): f()
        return 10/(time.process_time() - a)
    known, alone = rate(lambda: clean(mv, peaks=peaks)), rate(lambda: clean(mv))
    print(f'{known:.0f} strips/s with R peaks known, {alone:.0f} without')
    assert known > 50 and alone > 10


NONSENSE = [np.full((12, 5000), np.nan), np.full((12, 5000), np.inf), np.zeros((12, 5000), complex), np.zeros((12, 5000), bool), np.zeros((12, 0)), np.zeros(()), np.zeros((1, 1, 12, 5000)),
            [['a']*5000]*12, [[1., 2.], [3.]], None, 'ecg', {}, np.array([object()]*5000), b'abc', np.zeros((0, 5000)), np.zeros((0, 12, 5000)), np.full((12, 5000), 1e38, 'f4')*np.sign(np.sin(np.arange(5000)))]


@pytest.mark.parametrize('wrong', NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_refused(wrong):
    for f in STEPS.values():
        with pytest.raises(DataError): f(wrong)
    for f in AUGMENTATIONS.values():
        with pytest.raises(DataError): f(0, wrong)


def test_flat_and_short(real):
    mv, peaks = real
    for f in (clean, remove_baseline):
        with pytest.raises(DataError): f(np.zeros((12, 5000)))       # no beats
        with pytest.raises(DataError): f(mv[:, :40])
    with pytest.raises(DataError, match='flat'): minmax(np.where(np.arange(12)[:, None] == 3, 1., mv))
    with pytest.raises(DataError, match='those of 1 strips for 2'): remove_baseline(np.stack([mv, mv]), [peaks])


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'int16'])
def test_types_and_no_change_in_place(real, dtype):
    x = (1000*real[0]).astype(dtype)
    before, end = x.copy(), 'float32' if dtype == 'float32' else 'float64'
    for f in (lambda: clean(x, peaks=real[1]), lambda: minmax(x), lambda: crop_resize(0, x), lambda: time_flip(0, x, 1), lambda: sign_flip(0, x, 1)):
        y = f()
        assert y.shape == x.shape and y.dtype == end and np.isfinite(y).all()
    assert (x == before).all()


def test_augmentations_are_drawn_as_told():
    x = np.broadcast_to(np.arange(1., 201.), (3000, 2, 200))
    for f, was in ((time_flip, lambda y: y[:, 0, 0] == 200), (sign_flip, lambda y: y[:, 0, 0] == -1)):
        y = f(np.random.default_rng(0), x)
        assert abs(was(y).mean() - .33) < .03 and (y[:, 0] == y[:, 1]).all()
    y = crop_resize(np.random.default_rng(0), x)
    np.testing.assert_allclose(np.diff(y), 149/199, rtol=1e-4)
    assert y[:, 0, 0].min() == 1 and y[:, 0, 0].max() == 51 and abs(y[:, 0, 0].mean() - 26) < 1    # every start, the first and the last
    both = ecg_transform('time_flip, sign_flip')(x, rng=3)
    share = np.array([(both[:, 0, 0] == v).mean() for v in (1, 200, -1, -200)])
    np.testing.assert_allclose(share, [.67*.67, .33*.67, .67*.33, .33*.33], atol=.03)              # independent of each other
