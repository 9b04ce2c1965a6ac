"Real and awkward cines become standard cines."
from types import SimpleNamespace
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from ecgflowcmr.cine import read_cine
from ecgflowcmr.crop import CROP, PIXEL_MM, crop_at, fifty_phases, harmonic, heart_centre, motion_centre, standard_cine
from ecgflowcmr.ecg import DataError
from ecgflowcmr.virtual.people import virtual_subject

# marked by hand on the pictures, counted from 0: middle of the box around all chambers over the beat (row, column); see nbs/26_segment_train
BY_HAND = dict(Se2_sax_mid=('sax', (97, 116)), Se6_4ch=('4ch', (128, 113)))


@pytest.fixture(scope='module', params=BY_HAND)
def real(request, fixtures):
    view, centre = BY_HAND[request.param]
    return read_cine(fixtures/'cine'/'bivme_patient1'/request.param), view, centre


def test_the_network_finds_the_real_heart(real):
    cine, view, centre = real
    out = standard_cine(cine, view)
    assert out.shape == (50, CROP[view], CROP[view]) and out.dtype == np.uint8
    how = cine.meta['standard']
    assert how['how'] == 'network' and how['ed'] == 'trigger time'
    assert np.hypot(how['row']-centre[0], how['col']-centre[1])*cine.pixel_mm < 10


def test_motion_finds_the_real_heart_roughly(real):
    cine, view, centre = real
    *at, how = heart_centre(cine, find='motion')
    assert how == 'motion' and np.hypot(at[0]-centre[0], at[1]-centre[1])*cine.pixel_mm < 15


def test_the_real_crop_is_the_picture(real):
    "Frame 0 is the picture of frame 0 at 1.83 mm; grey values keep their order."
    cine, view, centre = real
    out = standard_cine(cine, view, find=centre)[0].astype(float)
    at = np.meshgrid(*((np.arange(CROP[view])-(CROP[view]-1)/2)*PIXEL_MM/cine.pixel_mm + c for c in centre), indexing='ij')
    plain = map_coordinates(cine.frames[0].astype(float), at, order=1)
    assert np.corrcoef(out.ravel(), np.clip(plain, 0, np.percentile(plain, 99.6)).ravel())[0, 1] > .98


@pytest.mark.parametrize('n', [12, 17, 30, 50, 75, 120])
def test_any_frame_count(n):
    "A smooth motion comes back at 50 phases whatever the number of frames."
    wave = lambda k: 100 + 50*np.sin(2*np.pi*k) + 20*np.cos(4*np.pi*k)
    frames = wave(np.arange(n)/n)[:, None, None]*np.ones((1, 4, 5))
    out = fifty_phases(frames, np.arange(n)*900/n, 900.)
    np.testing.assert_allclose(out[:, 0, 0], wave(np.arange(50)/50), atol=4 if n == 12 else 1)


def test_a_virtual_cine_stays_itself():
    "With its mask centred already, a virtual cine passes nearly unchanged."
    s = virtual_subject(3)
    for x, mask, view in ((s.la, s.la_mask, '4ch'), (s.sa, s.sa_mask, 'sax')):
        cine = SimpleNamespace(frames=x, pixel_mm=s.pixel_mm, trigger_ms=np.arange(50)*s.rr_s*20, rr_ms=1000*s.rr_s, view=view, meta={})
        middle = ((x.shape[1]-1)/2,)*2
        same = standard_cine(cine, find=middle)
        assert np.abs(same.astype(int) - x).mean() < 3
        row, col, how = heart_centre(cine, mask)
        assert how == 'mask' and np.hypot(row-middle[0], col-middle[1])*s.pixel_mm < 20


@pytest.mark.parametrize('rr', [np.nan, None, 0., -5., 1e9])
def test_a_nonsense_beat_length_is_not_believed(rr):
    frames = np.random.default_rng(0).random((20, 8, 8))
    np.testing.assert_allclose(fifty_phases(frames, np.arange(20)*45., rr), fifty_phases(frames, np.arange(20)*45., 900.), atol=1e-5)


def test_missing_frames_are_bridged():
    s = virtual_subject(1)
    keep = np.delete(np.arange(50), [3, 4, 20, 41])
    out = fifty_phases(s.la[keep], keep*20., 1000.)
    assert np.abs(out - s.la).mean() < 3 and np.abs(out[3] - s.la[3]).mean() < 8


def test_what_cannot_be_cropped_is_refused():
    good = dict(frames=np.random.default_rng(0).integers(0, 99, (20, 60, 60)), pixel_mm=1.8, trigger_ms=None, rr_ms=None, view='sax', meta=None)
    for wrong in (dict(view='2ch'), dict(pixel_mm=np.nan), dict(frames=good['frames'][:1]), dict(frames=np.zeros((20, 60, 60)))):
        with pytest.raises(DataError): standard_cine(SimpleNamespace(**good | wrong))
    with pytest.raises(DataError): standard_cine(SimpleNamespace(**good), mask=np.zeros((20, 60, 60)))
    with pytest.raises(DataError): standard_cine(SimpleNamespace(**good), find='elsewhere')
    assert standard_cine(SimpleNamespace(**good), find=(30, 30)).shape == (50, 80, 80)


def test_small_tools():
    assert crop_at(np.ones((2, 9, 9)), (4, 4), 1.83, 80).shape == (2, 80, 80)
    assert motion_centre(np.ones((5, 20, 20)), 1.8) is None and harmonic(np.ones((5, 20, 20)), 1.8).max() < 1e-5
