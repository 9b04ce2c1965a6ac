"The shipped heart finder: its files, its speed, and what it sees in real hearts that it never learnt from."
import json, shutil, time
from dataclasses import replace
from types import SimpleNamespace
from uuid import uuid4
import nibabel as nib
import numpy as np
import pytest
import torch
from ecgflowcmr.cine import read_cine
from ecgflowcmr.crop import mask_centre, motion_centre, standard_cine
from ecgflowcmr.ecg import DataError
from ecgflowcmr.files import sha256_file
from ecgflowcmr.segment import WEIGHTS, Segmenter, at_frames, glance, load_segmenter, network_centre, position, segment
from ecgflowcmr.virtual.heart import geometry
from ecgflowcmr.virtual.people import scan_of, virtual_person, virtual_subject
from ecgflowcmr.virtual.scan import four_chamber
from ecgflowcmr.virtual.short_axis import short_axis


def dice(a, b): return 2*(a & b).sum()/max(1, a.sum() + b.sum())


def test_the_shipped_weights_are_the_card_s():
    card = json.loads(WEIGHTS.with_suffix('.json').read_text())
    assert sha256_file(WEIGHTS) == card['sha256'] and WEIGHTS.stat().st_size < 3e6
    assert {'made_by', 'config', 'virtual_dice', 'real_hearts', 'machine', 'versions', 'date', 'code'} <= set(card)
    assert '/work' not in json.dumps(card)
    assert isinstance(load_segmenter(), Segmenter)


def test_missing_or_foreign_weights_are_refused(tmp_path):
    with pytest.raises(DataError, match='26_segment_train'): load_segmenter(tmp_path/'segment.safetensors')
    (tmp_path/'a.safetensors').write_bytes(WEIGHTS.read_bytes()[:-8])
    (tmp_path/'a.json').write_bytes(WEIGHTS.with_suffix('.json').read_bytes())
    with pytest.raises(DataError, match='SHA-256'): load_segmenter(tmp_path/'a.safetensors')


@pytest.mark.parametrize('name, view', [('Se2_sax_mid', 'sax'), ('Se6_4ch', '4ch')])
def test_the_real_ventricle_is_smallest_where_it_should_be(fixtures, name, view):
    "The smallest left ventricle within two frames of frame 9, the largest at the R peak; all parts of the heart are there."
    cine = read_cine(fixtures/'cine'/'bivme_patient1'/name)
    lab = segment(cine.frames, cine.pixel_mm, view, looks=2)
    area = (lab == 1).sum((1, 2))*cine.pixel_mm**2/100
    assert abs(int(area.argmin()) - 9) <= 2 and min(int(area.argmax()), 25 - int(area.argmax())) <= 3
    assert set(range(1, 6 if view == '4ch' else 4)) <= set(np.unique(lab[0]))
    assert area.min()/area.max() < .75


@pytest.mark.parametrize('name', 'ABCD')
def test_real_stacks(fixtures, name):
    "Dice on the middle half of the slices that hold left ventricle; aims .75, .55, .6."
    at = fixtures/'cine'/'autofd'/name
    im, lab = (nib.load(at/f) for f in ('sa_ED.nii.gz', 'seg_sa_ED.nii.gz'))
    first = round(float(im.affine[2, 3] - lab.affine[2, 3])/float(im.header.get_zooms()[2]))
    x = np.moveaxis(np.asanyarray(im.dataobj)[..., 0], 2, 0)
    truth = np.moveaxis(np.asanyarray(lab.dataobj)[..., 0], 2, 0)[first:first + len(x)]
    found = segment(x, float(im.header.get_zooms()[0]), 'sax', stack=True, looks=2)
    held = np.flatnonzero((truth == 1).any((1, 2)))
    mid = held[len(held)//4:len(held) - len(held)//4]
    score = [np.mean([dice(found[i] == a, truth[i] == b) for i in mid]) for a, b in ((1, 1), (2, 2), (3, 4))]
    assert score[0] > .75 and score[1] > .55 and score[2] > .6, np.round(score, 3)


def test_orientation_and_size_do_not_matter():
    s = virtual_subject(20, seed=5)
    x = np.pad(s.la[::10], ((0, 0), (40, 20), (10, 60)))
    truth = np.pad(s.la_mask[::10], ((0, 0), (40, 20), (10, 60))) == 1
    for turn in (lambda a: a, lambda a: a[:, ::-1], lambda a: np.rot90(a, 1, (1, 2)), lambda a: a.swapaxes(1, 2)):
        lab = segment(np.ascontiguousarray(turn(x)), s.pixel_mm, '4ch', looks=1)
        assert dice(lab == 1, turn(truth)) > .75
    again = segment(3.7*x.astype('f4') + 100, s.pixel_mm, '4ch', looks=1)
    assert (again == segment(x, s.pixel_mm, '4ch', looks=1)).mean() > .995


@pytest.mark.parametrize('view', ['4ch', 'sax'])
def test_unseen_hearts_are_found(view):
    "Five people of five populations, 300 mm pictures, turned or mirrored."
    for i in range(5):
        p, _ = virtual_person(i, 31, 'realistic', ('natural', 'subtypes', 'hospital', 'hf', 'cad')[i])
        rng = np.random.default_rng([31, i])
        g, mm = at_frames(geometry(p.heart), np.arange(8)*50//8), float(rng.uniform(1.3, 2.2))
        s = replace(scan_of(p, rng, i == 2), pixel_mm=mm, shift=tuple(rng.normal(size=2)*20), sax_shift=tuple(rng.normal(size=2)*20))
        im, lab = ((four_chamber if view == '4ch' else short_axis)(g, s, rng, size=int(300/mm)))
        im, lab = (position(torch.from_numpy(x)[:, None], i + 3)[:, 0].numpy() for x in (im, lab))
        assert np.hypot(*np.subtract(network_centre(im, mm, view), mask_centre(lab)))*mm < 6
        assert np.hypot(*np.subtract(motion_centre(im, mm), mask_centre(lab)))*mm < 20


def test_no_heart_is_no_heart():
    rng = np.random.default_rng(0)
    for x in (rng.integers(0, 999, (25, 120, 130)), np.zeros((25, 90, 90)), np.tile(np.arange(140.), (25, 140, 1))):
        for view in ('4ch', 'sax'): assert glance(x, 1.6, view)['doubt'] and network_centre(x, 1.6, view) is None
    with pytest.raises(DataError, match='view'): segment(np.zeros((1, 90, 90)), 1.6, '2ch')
    with pytest.raises(DataError, match='pixel_mm'): segment(np.zeros((1, 90, 90)), 99., 'sax')


def test_fast_enough_for_three_zips_a_second():
    "Finding and cropping a UK Biobank-like cine, one thread: well below a third of a second of CPU."
    s = virtual_subject(2)
    cine = SimpleNamespace(frames=np.pad(s.la.astype('u2'), ((0, 0), (60, 52), (50, 64))), pixel_mm=1.83, trigger_ms=np.arange(50)*20., rr_ms=1000., view='4ch', meta={})
    n = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        standard_cine(cine); took = []
        for _ in range(4): begun = time.thread_time(); standard_cine(cine); took.append(time.thread_time() - begun)
    finally: torch.set_num_threads(n)
    assert cine.meta['standard']['how'] == 'network' and min(took) < .3, took
    assert np.hypot(*np.subtract((cine.meta['standard']['row'], cine.meta['standard']['col']), mask_centre(np.pad(s.la_mask, ((0, 0), (60, 52), (50, 64))))))*1.83 < 8


@pytest.mark.slow
def test_the_experiment_runs(papermill_run, root):
    folder = root/'runs'/f'test-segment-{uuid4().hex[:8]}'
    try:
        papermill_run('26_segment_train.ipynb', preset='smoke', run=folder.name)
        assert (folder/'segment'/'done.json').exists() and isinstance(load_segmenter(folder/'weights'/'segment.safetensors'), Segmenter)
    finally: shutil.rmtree(folder, ignore_errors=True)


def test_the_package_holds_the_weights(root):
    assert any('weights' in (root/f).read_text() for f in ('MANIFEST.in', 'setup.py'))
