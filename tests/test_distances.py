"""Distances between cines: what is refused, what processes share, and what a cohort says of its cines.

`python tests/test_distances.py FOLDER` is one of two processes."""
import json, os, socket, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from ecgflowcmr.distances import (Moments, Pairs, Sketch, frechet, frechet_scores, gathered, gathered_pairs, kid_score, leading, load_sketch, pair_values, preprocessing, save_sketch, scores_table)
from ecgflowcmr.ecg import DataError
from ecgflowcmr.extractors import random_extractor
from ecgflowcmr.processes import shard

ROOT = Path(__file__).resolve().parents[1]
MADE = dict(view='la', frames=6, crop='32x32', pixel_mm='1.83')


def given(d, **kw):
    "An extractor of features that are made by hand."
    return SimpleNamespace(**dict(name='given', family='random', input='video', layer='none', num_features=d, size=0, sha256='0'*64, describe=lambda: 'given') | kw)


def features(n, d, seed=0): return np.random.default_rng(seed).normal(size=(n,d))


def sketch(n=60, d=8, seed=0, made=MADE, x=None, **kw): return Sketch(given(d, **kw), made).add(features(n, d, seed) if x is None else x)


def cines(n=5, seed=0, size=32): return torch.rand(n, 6, size, size, generator=torch.Generator().manual_seed(seed))*2 - 1


def frames(): return random_extractor('frame', num_features=8)


@pytest.mark.parametrize('does, says', {
    'fewer cines than features': (lambda: frechet_scores(sketch(60, 64), sketch(60, 64, 1)), 'basis=leading(training.whole, 60)'),
    'nine cines': (lambda: frechet_scores(sketch(9), sketch(60)), 'at least 10 cines'),
    'nine cines, kernel': (lambda: kid_score(sketch(9), sketch(60)), 'at least 10 cines'),
    'nothing moves': (lambda: frechet_scores(sketch(x=np.full((60,8), 3.)), sketch()), 'the same features'),
    'nothing moves, kernel': (lambda: kid_score(sketch(), sketch(x=np.full((60,8), 3.))), 'the same features'),
    'constant cines': (lambda: Sketch(frames(), MADE).see(torch.zeros(3,6,32,32)-.5), 'constant'),
    'still cines': (lambda: Sketch(frames(), MADE).see(cines(3)[:,:1].repeat(1,6,1,1)), 'every frame the same'),
    'NaN cines': (lambda: Sketch(frames(), MADE).see(cines()*np.nan), 'NaN'),
    'NaN features': (lambda: sketch(x=features(60, 8)*np.nan), 'NaN'),
    'infinite features': (lambda: sketch(x=features(60, 8)/0.), 'infinity'),
    'bytes': (lambda: Sketch(frames(), MADE).see(((cines()+1)*127.5).byte()), 'x.float()/127.5 - 1'),
    'bytes as floats': (lambda: Sketch(frames(), MADE).see((cines()+1)*127.5), 'x/127.5 - 1'),
    '[0, 1]': (lambda: Sketch(frames(), MADE).see((cines()+1)/2), '2*x - 1'),
    'wrong features': (lambda: sketch(d=8).add(features(3, 9)), '(cines, 8)'),
    'other frames': (lambda: sketch(x=np.zeros((4,5,8))+features(4, 1)[:,None]).add(np.zeros((4,6,8))), 'the same number of frames'),
    'too few numbers': (lambda: sketch().add(features(3, 8), [1,2]), 'one whole number a cine'),
    'a cine twice': (lambda: sketch().add(features(3, 8), [0,1,2]), 'taken in twice'),
    'merged with itself': (lambda: sketch().merge(sketch()), 'taken in twice'),
    'crop': (lambda: frechet_scores(sketch(), sketch(made=MADE | dict(crop='80x80'))), 'crop is 32x32 in one set and 80x80'),
    'size of a pixel': (lambda: kid_score(sketch(), sketch(made=MADE | dict(pixel_mm='1.4'))), 'pixel_mm is 1.83'),
    'preprocessing of one set unknown': (lambda: frechet_scores(sketch(), sketch(made=None)), 'not stated'),
    'another extractor': (lambda: frechet_scores(sketch(), sketch(name='other')), 'name is given in one set and other'),
    'another layer merged': (lambda: sketch().merge(sketch(layer='logits')), 'layer is none'),
    'other weights': (lambda: kid_score(sketch(), sketch(sha256='1'*64)), 'sha256'),
    'other groups': (lambda: frechet_scores(sketch(), Sketch(given(8), MADE, groups=5).add(features(60, 8))), 'groups is 20'),
    'one group': (lambda: frechet_scores(Sketch(given(8), MADE).add(features(60, 8), 20*np.arange(60)), sketch()), 'share 1 of 20 groups'),
    'floor of another size': (lambda: frechet_scores(sketch(), sketch(seed=1), floor=sketch(90, seed=2)), '90 cines, but 60 were drawn'),
    'subjects that differ': (lambda: kid_score(sketch(60), sketch(70), same_subjects=True), 'the same ids'),
    'no extractor left': (lambda: Sketch(about=sketch().about).see(cines()), 'merge the two'),
    'counts of pairs': (lambda: pair_values(cines(5), cines(4, 1)), '5 cines generated, 4 true'),
    'frames of pairs': (lambda: pair_values(cines(5), cines(5, 1)[:,:4]), '6 frames generated, 4 true'),
    'sizes of pairs': (lambda: pair_values(cines(5), cines(5, 1)[...,:30]), '32 width generated, 30 true'),
    'tiny pictures': (lambda: pair_values(cines(5, size=8), cines(5, 1, 8)), '11 pixels or more'),
    'the truth twice': (lambda: pair_values(cines(), cines()), 'the same in both sets'),
    'pairs of bytes': (lambda: Pairs().see(cines(), ((cines(5, 1)+1)*127.5).byte()), 'x.float()/127.5 - 1'),
    'NaN pairs': (lambda: Pairs().see(cines()*np.nan, cines(5, 1)), 'NaN'),
    'pairs of other crops': (lambda: Pairs(None, MADE, MADE | dict(crop='80x80')), 'crop is 32x32'),
    'no perceptual distance': (lambda: Pairs(frames()), 'has no distance between frames'),
    'three subjects': (lambda: Pairs().see(cines(3), cines(3, 1)).scores(), '3 subjects'),
    'one subject, five samples': (lambda: Pairs().see(cines(5), cines(5, 1), [7]*5).scores(), '1 subjects'),
}.values())
def test_refused(does, says):
    with np.errstate(all='ignore'), pytest.raises(DataError, match='.') as e: does()
    assert says in str(e.value) and e.value.remedy and '\n' not in str(e.value), str(e.value)


def test_a_file_that_is_none(tmp_path):
    for text in (b'', b'nonsense'*10):
        (tmp_path/'s.safetensors').write_bytes(text)
        with pytest.raises(DataError, match='is broken'): load_sketch(tmp_path/'s.safetensors')
    with pytest.raises(DataError, match='missing'): load_sketch(tmp_path/'none.safetensors')


def test_what_is_asked_for_small_sets_works():
    train, a, b = sketch(400, 64, 5), sketch(80, 64), sketch(80, 64, 1)
    for s in frechet_scores(a, b, basis=leading(train.whole, 80)): assert '10 components' in s.name and s.low < s.value < s.high
    assert 'fewer cines (60) than features (64)' in frechet_scores(sketch(60, 64), sketch(60, 64, 1), refuse=False)[0].warning
    assert kid_score(sketch(60, 64), sketch(60, 64, 1)).n == 60


def test_a_score_says_all_of_it():
    s = frechet_scores(sketch(), sketch(seed=1))[0]
    for said in ('FVD (random)', f'{s.value:.4g}', f'{s.low:.4g}', f'{s.high:.4g}', '60 generated cines', '60 real', 'given', 'layer none', '[-1, 1]', 'jackknife', 'WARNING: 60 cines are fewer than ten a feature'): assert said in str(s), said
    assert '\n' not in str(s) and list(scores_table([s]).columns) == ['value', 'low', 'high', 'n', 'n_real', 'extractor', 'layer', 'range', 'interval', 'warning']
    assert 'preprocessing not stated' in kid_score(sketch(made=None), sketch(seed=1, made=None)).warning
    with pytest.raises(AttributeError): s.value = 0.
    assert frechet_scores(sketch(family='standard'), sketch(seed=1, family='standard'))[0].name == 'FVD'


@pytest.mark.parametrize('n, d', [(500, 3), (60, 20), (500, 200)])
def test_moments_in_any_order(n, d):
    x = features(n, d)*np.geomspace(1e3, 1e-2, d) + 1e3
    whole, parts = Moments().add(x), [Moments().add(p) for p in np.array_split(x[np.random.default_rng(0).permutation(n)], 9)]
    m = Moments()
    for p in parts[::-1]: m.merge(p)
    np.testing.assert_allclose(m.mean, whole.mean, rtol=1e-10); np.testing.assert_allclose(m.square, whole.square, rtol=1e-10, atol=1e-10*whole.square.max())
    y = Moments().add(features(n, d, 1)); of = lambda m: frechet(m.mean, m.cov, y.mean, y.cov)
    assert of(m) == pytest.approx(of(whole), rel=1e-10)


def test_an_extractor_end_to_end(tmp_path):
    for kind in ('frame', 'video'):
        e = random_extractor(kind, num_features=8); make = lambda seed: torch.cat([cines(20, seed)[:,:,:24,:24]]*3, 1)*torch.rand(20, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
        a, b, parts = Sketch(e, MADE), Sketch(e, MADE), [Sketch(e, MADE) for _ in range(2)]
        for j in range(3):
            a.see(make(j)); b.see(make(10+j)); parts[j % 2].see(make(j), 20*j + np.arange(20))
        save_sketch(tmp_path/'s.safetensors', parts[1].merge(parts[0]))
        for s, t in zip([*frechet_scores(a, b), kid_score(a, b)], [*frechet_scores(load_sketch(tmp_path/'s.safetensors'), b), kid_score(load_sketch(tmp_path/'s.safetensors'), b)]):
            assert s.value == pytest.approx(t.value, rel=1e-6, abs=1e-9) and s.low == pytest.approx(t.low, rel=1e-6, abs=1e-9)


def test_preprocessing_of_a_cohort(tmp_path):
    from ecgflowcmr.cohort import build_virtual_cohort
    c = build_virtual_cohort(tmp_path/'c', n=10, workers=1, progress=False)
    la, sa = preprocessing(c), preprocessing(c, 'sa')
    assert la == dict(view='la', frames=50, crop='96x96', pixel_mm='1.83', stored='uint8')
    with pytest.raises(DataError, match='crop is 96x96 in one set and 80x80'): frechet_scores(sketch(made=la), sketch(made=sa))


def one_of_two(folder):
    "What each process does: its share of 60 cines, and what it then knows of all."
    x = features(60, 8); mine = gathered(Sketch(given(8), MADE).add(x[shard(np.arange(60))]))
    pairs = gathered_pairs(Pairs().take(dict(L1=x[shard(np.arange(60)),0]), shard(np.arange(60))))
    real = Sketch(given(8), MADE).add(features(60, 8, 1), np.arange(60)); s = frechet_scores(mine, real)[1]
    (Path(folder)/f"{os.environ['RANK']}.json").write_text(json.dumps([mine.n, s.value, s.low, kid_score(mine, real).value, pairs.scores()[0].value, pairs.scores()[0].low]))


@pytest.mark.timeout(900)
def test_two_processes_know_what_one_does(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    both = [subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in (0,1)]
    assert [p.wait(850) for p in both] == [0,0]
    x, a, b = features(60, 8), sketch(), sketch(seed=1); s, p = frechet_scores(a, b)[1], Pairs().take(dict(L1=x[:,0]), np.arange(60)).scores()[0]
    for r in (0,1): np.testing.assert_allclose(json.loads((tmp_path/f'{r}.json').read_text()), [60, s.value, s.low, kid_score(a, b).value, p.value, p.low], rtol=1e-10)


if __name__ == '__main__': one_of_two(sys.argv[1])
