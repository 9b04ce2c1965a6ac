"""Statistics: pROC's published numbers, DeLong by all pairs, permutation tests, speed, and what 95 % intervals and p values hold in simulated studies.

`python -m pytest tests/test_stats.py -s` prints the table of coverages; ECGFLOWCMR_THOROUGH=1 simulates 4,000 studies of most intervals; without it they are 2,000, and the bounds, 93.5 to 96.5 %, are three standard errors of a true 95 %."""
import csv
import os
import sys
import time
import numpy as np
import pytest
from scipy import stats as sp
from scipy.integrate import quad
from sklearn.metrics import roc_auc_score
from ecgflowcmr.ecg import DataError
from ecgflowcmr.scores import (choose_threshold, classifier_scores, compare_phenotypes, fold_auc, fold_test, macro_test, multiclass_scores, phenotype_scores)
from ecgflowcmr.stats import (auc_interval, auc_parts, bootstrap_difference, bootstrap_interval, correlation_interval, correlation_test, delong_contrast, delong_test, delong_unpaired, dependent_correlation_test,
                              mcnemar_test, proportion_test, roc_band, wilson_interval)


def pairwise(y, *scores):
    "DeLong's AUCs and covariance from every pair of a case and a control."
    y = np.asarray(y) == 1
    psi = np.stack([(s[y][:,None] > s[~y]) + .5*(s[y][:,None] == s[~y]) for s in scores])
    return psi.mean((1,2)), np.atleast_2d(np.cov(psi.mean(2)))/y.sum() + np.atleast_2d(np.cov(psi.mean(1)))/(~y).sum()


@pytest.fixture(scope='module')
def asah(fixtures):
    with open(fixtures/'stats'/'aSAH.csv') as f: rows = list(csv.DictReader(f))
    return {'y': np.array([o['outcome'] == 'Poor' for o in rows]).astype(int), 'female': np.array([o['gender'] == 'Female' for o in rows])} | {k: np.array([float(o[k]) for o in rows]) for k in ('wfns', 's100b', 'ndka')}


# Z, p and, where published, the interval of the difference (pROC's own expectations)
PAIRED = {('wfns','s100b'): (2.20898359144091, .0271757822291882, (.0104061769564846, .174214419249478)),
          ('wfns','ndka'): (2.79777591868904, .00514557970691098, (.0634011709339876, .3600405634833566)),
          ('ndka','s100b'): (-1.39077002573558, .164295175223054, (-.2876917446341914, .0488706064228094))}
UNPAIRED = {('wfns','s100b'): (1.43490640926908, .152825378808796), ('wfns','ndka'): (3.10125096778969, .00220950791756457), ('ndka','s100b'): (-1.55995743389685, .120192832430845)}


def test_asah_as_proc(asah):
    near = lambda x: pytest.approx(x, rel=0, abs=1e-10)
    assert auc_interval(asah['y'], asah['s100b']).auc == near(.731368563685637)
    assert auc_interval(asah['y'], asah['wfns']).auc == near(.823678861788618)
    o = auc_interval(asah['y'], asah['ndka'])
    assert (o.low, o.auc, o.high) == near((.501244999271703, .611957994579946, .722670989888189))
    f = asah['female']; o = auc_interval(asah['y'][f], asah['ndka'][f])
    assert (o.low, o.auc, o.high) == near((.5261398281, .6671428571, .8081458862))
    for (a,b), (z,p,ci) in PAIRED.items():
        t = delong_test(asah['y'], asah[a], asah[b])
        assert (t.z, t.p) == near((z, p)) and t.interval == near(ci)
    for (a,b), (d,p) in UNPAIRED.items():
        t = delong_unpaired(asah['y'], asah[a], asah['y'], asah[b])
        assert (t.z, t.p) == near((d, p))
    assert str(auc_interval(asah['y'], asah['s100b'])) == 'AUC .731 (95 % CI .63-.83)'
    assert str(delong_test(asah['y'], asah['wfns'], asah['s100b'])) == 'AUC .824 against .731: difference .092 (95 % CI .01-.17), z = 2.21, p = .027 *'


def test_asah_by_pairs(asah):
    y, s = asah['y'], [asah[o] for o in ('wfns', 's100b', 'ndka')]
    auc, cov = pairwise(y, *s)
    got, phi = auc_parts(y == 1, np.stack(s))
    np.testing.assert_allclose(got, auc, rtol=0, atol=1e-14); np.testing.assert_allclose(phi @ phi.T, cov, rtol=0, atol=1e-14)
    L = np.array([[1,-1,0],[1,0,-1]]); d = L @ auc
    joint = delong_contrast(y, s)
    assert joint.chi2 == pytest.approx(d @ np.linalg.inv(L @ cov @ L.T) @ d, abs=1e-10) and joint.df == 2
    assert joint.p == pytest.approx(sp.chi2.sf(joint.chi2, 2), abs=1e-14)
    auc_b = bootstrap_interval(lambda y,s: auc_parts(y == 1, s[None])[0][0], y, s[1], strata=y, draws=1000)
    assert (auc_b.low, auc_b.high) == pytest.approx((.63, .83), abs=.03)


@pytest.mark.parametrize('seed', range(40))
def test_u_statistics_with_ties(seed):
    g = np.random.default_rng(seed); n = int(g.integers(5, 300)); y = g.permutation(n) < g.integers(2, n-1); levels = [1, 2, 3, 10, 10**6][seed % 5]
    s = np.floor(g.random((3,n))*levels + .7*levels*y*g.random(n))
    auc, cov = pairwise(y, *s); got, phi = auc_parts(y, s)
    np.testing.assert_allclose(got, auc, rtol=0, atol=1e-13); np.testing.assert_allclose(phi @ phi.T, cov, rtol=0, atol=1e-13)
    assert got[0] == pytest.approx(roc_auc_score(y, s[0]), abs=1e-12) and got[0] == pytest.approx(sp.mannwhitneyu(s[0][y], s[0][~y]).statistic/y.sum()/(~y).sum(), abs=1e-12)
    t = delong_test(y, s[0], s[1]); v = cov[0,0] + cov[1,1] - 2*cov[0,1]
    if v > 1e-14: assert t.z == pytest.approx((auc[0]-auc[1])/np.sqrt(v), abs=1e-9)


def test_delong_agrees_with_permutation():
    "Under the null the labels of the two models may be exchanged subject by subject (on ranks, since only ranks count)."
    for seed in range(3):
        g = np.random.default_rng(seed); y = np.arange(160) % 2 == 0; e = g.normal(size=(2,160))
        s = np.round(np.stack([e[0] + y, .5*e[0] + .87*e[1] + (.9, .6, .4)[seed]*y]), 1); ranks = np.stack([sp.rankdata(o) for o in s])
        swap = g.random((2000,160)) < .5; one = np.where(swap, ranks[1], ranks[0]); two = np.where(swap, ranks[0], ranks[1])
        area = lambda r: (sp.rankdata(r, axis=1)[:,y].sum(1) - 80*81/2)/6400
        drawn, seen = area(one) - area(two), delong_test(y, *s)
        assert abs((np.sum(np.abs(drawn) >= abs(seen.difference) - 1e-12) + 1)/2001 - seen.p) < .035


def test_bootstrap_agrees_with_permutation():
    g = np.random.default_rng(5); y, e, f = g.normal(size=(3,150)); a, b = y+e, y+1.2*f; mae = lambda y,p: np.abs(y-p).mean()
    d = np.abs(y-a) - np.abs(y-b); flips = (g.choice([-1,1], (5000,150))*d).mean(1)
    assert abs(bootstrap_difference(mae, y, a, b, draws=1000).p - np.mean(np.abs(flips) >= abs(d.mean()))) < .03
    c = compare_phenotypes(y, a, b); assert c.mae[0,0] == pytest.approx(d.mean(), abs=1e-12) and abs(c.mae[0,3] - np.mean(np.abs(flips) >= abs(d.mean()))) < .03


def best(f, repeat=5):
    out = []
    for _ in range(repeat): t = time.perf_counter(); f(); out.append(time.perf_counter()-t)
    return min(out)


def test_speed():
    g = np.random.default_rng(0); y = np.arange(100_000) % 2; s = g.normal(size=(2,100_000)) + .5*y; few = y[:5000], s[0,:5000], s[1,:5000]
    for ties in (s, np.round(s, 1)): assert best(lambda: delong_test(y, *ties), 3) < .5
    ours, theirs = best(lambda: delong_test(*few), 20), best(lambda: pairwise(*few), 3)
    print(f'\n100,000 subjects {best(lambda: delong_test(y, *s), 3):.3f} s; 5,000: {1e3*ours:.2f} ms, by pairs in numpy {1e3*theirs:.0f} ms: {theirs/ours:.0f} times')
    assert theirs/ours > 50


def test_phenotypes_in_ten_seconds():
    g = np.random.default_rng(0); y = g.normal(size=(5553,82)); p = .7*y + .5*g.normal(size=y.shape)
    start = time.perf_counter(); o = phenotype_scores(y, p); took = time.perf_counter()-start
    print(f'\n2,000 draws of 82 phenotypes on 5,553 subjects: {took:.1f} s')
    assert took < 10 and o.n.min() == 5553 and np.ptp(o.r2[:,1:], 1).max() < .1


def test_knows_no_torch():
    import subprocess
    code = 'import sys, ecgflowcmr.stats, ecgflowcmr.scores; sys.exit("torch" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('call, field', [
    (lambda: auc_interval([1,1,1], [1,2,3]), 'y'), (lambda: auc_interval([0,1,1], [1,2,3]), 'y'), (lambda: auc_interval([0,0,1,1], [1,2,3,np.nan]), 'score'), (lambda: auc_interval([0,0,1,np.nan], [1,2,3,4]), 'y'),
    (lambda: auc_interval([0,0,1,1], [1,2,3]), 'y, score'), (lambda: auc_interval([1,1,2,2], [1,2,3,4]), 'y'), (lambda: delong_test([0,0,1,1], [1,2,3,4], [1,2,3]), 'y, a, b'), (lambda: wilson_interval(5, 4), 'k'),
    (lambda: wilson_interval(0, 0), 'n'), (lambda: bootstrap_interval(np.mean, [1.,np.nan]*5), 'arrays[0]'), (lambda: bootstrap_interval(np.mean, [1.,2.,3.]), 'arrays'), (lambda: classifier_scores([0,0,0,0], [1,2,3,4], 2), 'y'),
    (lambda: choose_threshold([0,1], [1,np.inf]), 'score'), (lambda: fold_auc([0,1,0,1,0,1,0,1], range(8), [0,0,0,0,1,1,1,0]), 'y in fold 1'), (lambda: multiclass_scores([0,0,1,1], np.zeros((4,3))), 'class 2 of y'),
    (lambda: phenotype_scores(np.full((9,1), np.nan), np.zeros((9,1)), ['LVEF']), 'labels of LVEF'), (lambda: phenotype_scores(np.zeros((9,1)), np.full((9,1), np.nan)), 'prediction')])
def test_bad_input_names_the_field(call, field):
    with pytest.raises(DataError) as e: call()
    assert e.value.field == field and e.value.remedy


def test_constant_predictions():
    y = np.arange(20) % 2; s = np.random.default_rng(0).normal(size=20)
    o = auc_interval(y, np.ones(20)); assert (o.auc, o.se, o.p) == (.5, 0, 1) and o.note
    t = delong_test(y, np.ones(20), np.zeros(20)); assert (t.difference, t.z, t.p) == (0, 0, 1) and 'constant' in t.note
    t = delong_test(y, s, np.ones(20)); assert 0 < t.p < 1 and 'b is constant' in t.note
    r = correlation_interval(np.ones(20), s); assert np.isnan(r.value) and 'constant' in r.note
    p = phenotype_scores(s, np.ones(20), draws=50); assert np.isnan(p.r[0]).all() and np.isfinite(p.mae).all() and 'constant' in p.why[0]


# ---- what the intervals hold ----

def markers(g, m, n, auc, r=.6):
    "Labels and two correlated Gaussian markers of these AUCs."
    y = np.repeat([1,0], [m,n]); e = g.normal(size=(2,m+n)); e[1] = r*e[0] + np.sqrt(1-r*r)*e[1]
    return y, *(e + np.sqrt(2)*sp.norm.ppf(np.reshape(auc, (2,1)))*y)


def triple(g, n, ra, rb, rab): return np.linalg.cholesky([[1,ra,rb],[ra,1,rab],[rb,rab,1]]) @ g.normal(size=(3,n))


def paired_shares(g, n, p10, p01):
    c = g.choice(4, n, p=[p10, p01, (1-p10-p01)/2, (1-p10-p01)/2])
    return np.ones(n), np.isin(c, (0,2)), np.isin(c, (1,2))


def mean(x, axis=-1): return x.mean(axis)
def corr(x, y, axis=-1): return ((x-x.mean(axis,keepdims=True))*(y-y.mean(axis,keepdims=True))).mean(axis)/x.std(axis)/y.std(axis)
def mae_gap(y, a, b, axis=-1): return (np.abs(y-a)-np.abs(y-b)).mean(axis)
def two_means(x, c, axis=-1): return (x*c).sum(axis)/c.sum(axis) - (x*(1-c)).sum(axis)/(1-c).sum(axis)


def rows_of(g): e = np.repeat(g.normal(size=60), 3) + g.normal(size=180); return e, np.repeat(np.arange(60), 3)
def six(g, method): y = g.random(300) < .4; return classifier_scores(y, 1.2*y + g.normal(size=300), .5, method=method, draws=499)
def folds(g): y = np.arange(250) % 2; return fold_auc(y, 1.2*y + g.normal(size=250), np.arange(250)//2 % 5)
def four(g): y = np.arange(240) % 4; return y, np.eye(4)[y] + g.normal(size=(240,4))
def many(g, n=150, rho=.8): c = g.normal(size=(n,1)); y = .5*c + np.sqrt(.75)*g.normal(size=(n,5)); return phenotype_scores(y, rho*y + rho*np.sqrt(1-rho*rho)*g.normal(size=y.shape), draws=599)


def twice(g): e = np.repeat(g.normal(size=(80,3)), 2, 0) + g.normal(size=(160,3)); return e, np.repeat(np.arange(80), 2)   # two rows a subject, variance 2
def visits(g): y, who = twice(g); return phenotype_scores(y, y + .6*twice(g)[0], draws=599, groups=who)
def rivals(g, n=150): c = g.normal(size=(n,1)); y = .5*c + np.sqrt(.75)*g.normal(size=(n,5)); return compare_phenotypes(y, *(r*y + r*np.sqrt(1-r*r)*g.normal(size=y.shape) for r in (.8, .7)), draws=599)
def calls(g, n=240): # accuracy of all out-of-fold calls, each fold with the threshold of the next; given these thresholds, what is expected of new people
    y, f = np.arange(n) % 2, np.arange(n)//2 % 5; s = 1.2*y + g.normal(size=n); at = np.array([choose_threshold(y[f == (k+1) % 5], s[f == (k+1) % 5]).value for k in range(5)])
    return wilson_interval(int(((s >= at[f]) == (y == 1)).sum()), n), np.mean(.5*sp.norm.sf(at - 1.2) + .5*sp.norm.cdf(at))


SENS, SPEC = sp.norm.sf(-.7), sp.norm.cdf(.5)
V, W = (float((1-r)**2 + r*r*(1-r*r)) for r in (.8, .7))  # error variance of `many`, and of the weaker of `rivals`
TRUE_SIX = dict(ACC=.4*SENS+.6*SPEC, AUC=sp.norm.cdf(1.2/np.sqrt(2)), sensitivity=SENS, specificity=SPEC, PPV=.4*SENS/(.4*SENS+.6*(1-SPEC)), NPV=.6*SPEC/(.6*SPEC+.4*(1-SENS)))
B = dict(draws=599)
STUDIES = {
    'AUC, DeLong': (.8, 4000, lambda g: auc_interval(*markers(g, 100, 100, [.8,.8])[:2])),
    'AUC, DeLong, ties': (.7, 4000, lambda g: auc_interval(*(lambda y: (y, g.binomial(4, np.where(y, .6, .4))))(np.arange(300) % 2))),
    'AUC, logit': (.8, 4000, lambda g: auc_interval(*markers(g, 100, 100, [.8,.8])[:2], scale='logit')),
    'AUC, score': (.8, 4000, lambda g: auc_interval(*markers(g, 60, 120, [.8,.8])[:2], scale='score')),
    'DeLong, paired': (.05, 4000, lambda g: delong_test(*markers(g, 100, 100, [.8,.75]))),
    'DeLong, unpaired': (.05, 4000, lambda g: delong_unpaired(*markers(g, 80, 120, [.8,.8])[:2], *markers(g, 60, 90, [.75,.75])[:2])),
    'Wilson': (.8, 4000, lambda g: wilson_interval(g.binomial(150, .8), 150)),
    'shares, Newcombe': (.15, 4000, lambda g: proportion_test(g.binomial(120, .8), 120, g.binomial(150, .65), 150)),
    'paired shares, Agresti-Min': (.08, 4000, lambda g: mcnemar_test(*paired_shares(g, 200, .16, .08))),
    'r, Fisher': (.6, 4000, lambda g: correlation_interval(*triple(g, 60, .6, .1, .1)[:2])),
    'r, Zou, independent': (.2, 4000, lambda g: correlation_test(corr(*triple(g, 60, .6, .1, .1)[:2]), 60, corr(*triple(g, 90, .4, .1, .1)[:2]), 90)),
    'r, Zou, dependent': (.1, 4000, lambda g: dependent_correlation_test(*triple(g, 80, .6, .5, .5))),
    'bootstrap, percentile': (2., 4000, lambda g: bootstrap_interval(mean, g.gamma(2, size=100), method='percentile', **B)),
    'bootstrap, BCa': (2., 3000, lambda g: bootstrap_interval(mean, g.gamma(2, size=100), **B)),
    'bootstrap, BCa, r': (.6, 3000, lambda g: bootstrap_interval(corr, *triple(g, 100, .6, .1, .1)[:2], **B)),
    'bootstrap, BCa, paired difference': (0., 3000, lambda g: (lambda y,e,f: bootstrap_interval(mae_gap, y, y+e, y+f, **B))(*g.normal(size=(3,100)))),
    'bootstrap, BCa, stratified': (1., 2000, lambda g: (lambda c: bootstrap_interval(two_means, g.gamma(2, size=120) + c, c, strata=c, **B))((np.arange(120) % 3 == 0).astype(float))),
    'bootstrap, BCa, clustered': (0., 1500, lambda g: (lambda x,s: bootstrap_interval(mean, x, groups=s, draws=299))(*rows_of(g))),
    'bootstrap difference': (0., 1500, lambda g: (lambda y,e,f: bootstrap_difference(lambda y,p: np.abs(y-p).mean(), y, y+e, y+f, draws=299))(*g.normal(size=(3,60)))),
    'folds, within': (TRUE_SIX['AUC'], 4000, lambda g: folds(g).within), 'folds, pooled': (TRUE_SIX['AUC'], 4000, lambda g: folds(g).pooled),
    'fold test': (0., 4000, lambda g: (lambda y,a,b: fold_test(y, a, b, np.arange(240) % 5))(*markers(g, 120, 120, [.8,.8]))),
    'macro AUC': (sp.norm.cdf(np.sqrt(.5)), 4000, lambda g: multiclass_scores(*four(g)).macro), 'one-vs-rest AUC': (sp.norm.cdf(np.sqrt(.5)), 4000, lambda g: multiclass_scores(*four(g)).each[2]),
    'macro test': (0., 4000, lambda g: (lambda y,a: macro_test(y, a, np.eye(4)[y] + g.normal(size=a.shape)))(*four(g))),
    'accuracy of four classes': (float(quad(lambda z: sp.norm.pdf(z-1)*sp.norm.cdf(z)**3, -8, 9)[0]), 4000, lambda g: multiclass_scores(*four(g)).accuracy),
    'phenotypes, mean R2': (1-V, 2000, lambda g: many(g).mean_r2), 'phenotypes, difference of mean R2': (W-V, 2000, lambda g: rivals(g).mean_r2),
    'bootstrap, percentile, clustered': (0., 2000, lambda g: (lambda x,s: bootstrap_interval(mean, x, groups=s, draws=299, method='percentile'))(*rows_of(g))),
    'bootstrap difference, clustered': (np.sqrt(2/np.pi)*(np.sqrt(2)*.6 - np.sqrt(2)*.8), 1400, lambda g: (lambda y,w,e,f: bootstrap_difference(lambda y,p: np.abs(y-p).mean(), y, y + .6*e, y + .8*f, groups=w, draws=299))(*(o[:,0] if o.ndim > 1 else o for o in (*twice(g), twice(g)[0], twice(g)[0])))),
}
THOROUGH = bool(os.environ.get('ECGFLOWCMR_THOROUGH'))
STUDIES['AUC, DeLong, ties'] = (float(sum(sp.binom.pmf(i, 4, .6)*(sp.binom.cdf(i-1, 4, .4) + .5*sp.binom.pmf(i, 4, .4)) for i in range(5))), *STUDIES['AUC, DeLong, ties'][1:])


def limits(o): return o.interval if hasattr(o, 'interval') else (o.low, o.high)


@pytest.mark.slow
@pytest.mark.parametrize('name', STUDIES)
def test_coverage(name):
    "A nominal 95 % interval holds the truth in 93.5 to 96.5 % of simulated studies."
    truth, times, study = STUDIES[name]; times, g = times if THOROUGH else times//2, np.random.default_rng(11)
    low, high = np.array([limits(study(g)) for _ in range(times)]).T
    share = np.mean((low <= truth) & (truth <= high)); print(f'\n{name}: {100*share:.1f} % of {times}')
    assert .935 <= share <= .965


@pytest.mark.slow
@pytest.mark.parametrize('method, times', [('wilson', 4000), ('bootstrap', 1500)])
def test_coverage_of_six(method, times):
    "ACC, AUC, sensitivity, specificity, PPV and NPV at a given threshold."
    times = times if THOROUGH else times//2; g = np.random.default_rng(12); low, high = np.moveaxis([[limits(o) for o in six(g, method)] for _ in range(times)], -1, 0); truth = [*TRUE_SIX.values()]
    share = np.mean((low <= truth) & (truth <= high), 0); print(f'\n{method}:', ', '.join(f'{k} {100*o:.1f} %' for k,o in zip(TRUE_SIX, share)))
    assert (share >= .935).all() and (share <= .965).all()


@pytest.mark.slow
def test_coverage_of_phenotypes():
    g = np.random.default_rng(3); runs = [many(g) for _ in range(800)]
    for key,truth in (('mae', np.sqrt(2*V/np.pi)), ('r2', 1-V), ('r', 1/np.sqrt(2-.64))):
        a = np.stack([getattr(o, key) for o in runs]); share = np.mean((a[...,1] <= truth) & (truth <= a[...,2])); print(f'\n{key} of a phenotype, BCa: {100*share:.1f} %')
        assert .935 <= share <= .965


@pytest.mark.slow
@pytest.mark.parametrize('study, times, truth', [
    (rivals, 800, dict(mae=np.sqrt(2/np.pi)*(np.sqrt(V) - np.sqrt(W)), r2=W-V, r=1/np.sqrt(2-.64) - 1/np.sqrt(2-.49))),
    (visits, 2500, dict(mae=np.sqrt(2/np.pi)*.6*np.sqrt(2), r2=1-.36, r=1/np.sqrt(1.36)))], ids=['differences', 'several rows a subject'])
def test_coverage_of_phenotypes_compared_and_clustered(study, times, truth):
    "Differences of two methods on the same subjects; and subjects with two rows each, drawn as a whole."
    g = np.random.default_rng(5); runs = [study(g) for _ in range(times)]
    for key,t in truth.items():
        a = np.stack([getattr(o, key) for o in runs]); share = np.mean((a[...,1] <= t) & (t <= a[...,2])); print(f'\n{key}, {study.__name__}: {100*share:.1f} %')
        assert .935 <= share <= .965


@pytest.mark.slow
def test_coverage_of_calls_over_folds():
    "The accuracy of Tables 2 and 4, Wilson's: all out-of-fold calls, at thresholds that other folds have chosen."
    g = np.random.default_rng(6); share = np.mean([o.low <= t <= o.high for o,t in (calls(g) for _ in range(1500))]); print(f'\ncalls over folds: {100*share:.1f} %')
    assert .935 <= share <= .965


@pytest.mark.slow
def test_coverage_of_the_curve():
    "The band of the ROC curve, at three points away from its ends."
    g = np.random.default_rng(4); at = np.array([.2,.4,.6]); truth = sp.norm.sf(sp.norm.isf(at) - 1.2); hit = []
    for _ in range(1500):
        y = np.arange(400) % 2; _,_,low,high = roc_band(y, 1.2*y + g.normal(size=400), at, draws=400); hit.append((low <= truth) & (truth <= high))
    print(f'\nband of the curve: {np.mean(hit, 0)}'); assert .935 <= np.mean(hit) <= .965 and np.all(abs(np.mean(hit, 0) - .95) < .025)


NULL = {
    'DeLong, paired': lambda g: delong_test(*markers(g, 60, 100, [.8,.8])).p, 'DeLong, unpaired': lambda g: delong_unpaired(*markers(g, 60, 60, [.75,.75])[:2], *markers(g, 40, 80, [.75,.75])[:2]).p,
    'DeLong, joint': lambda g: delong_contrast((d := markers(g, 80, 80, [.8,.8]))[0], [*d[1:], markers(g, 80, 80, [.8,.8])[1]]).p, 'AUC against .5': lambda g: auc_interval(np.arange(120) % 2, g.normal(size=120)).p,
    'shares': lambda g: proportion_test(g.binomial(900, .7), 900, g.binomial(700, .7), 700).p, 'McNemar mid-p': lambda g: mcnemar_test(*paired_shares(g, 900, .15, .15)).p,
    'Fisher z': lambda g: correlation_test(corr(*g.normal(size=(2,50))), 50, corr(*g.normal(size=(2,70))), 70).p, 'Williams': lambda g: dependent_correlation_test(*triple(g, 60, .6, .6, .5)).p,
    'fold test': lambda g: fold_test(*markers(g, 120, 120, [.8,.8]), np.arange(240) % 5).p, 'macro test': lambda g: (lambda y,a: macro_test(y, a, np.eye(4)[y] + g.normal(size=a.shape)).p)(*four(g)),
    'phenotypes': lambda g: (lambda y,e,f: compare_phenotypes(y, y+e, y+f, draws=199).mae[0,3])(*g.normal(size=(3,100))),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', NULL)
def test_p_is_uniform_under_the_null(name):
    g = np.random.default_rng(7); p = np.array([NULL[name](g) for _ in range(2000)]); print(f'\n{name}: p < .05 in {100*np.mean(p < .05):.1f} %')
    assert abs(np.mean(p < .05) - .05) < .0147 and abs(np.mean(p < .2) - .2) < .027 and abs(np.mean(p < .5) - .5) < .034  # three standard errors of 2,000
    assert sp.kstest(p, 'uniform').pvalue > .001 or name in ('shares', 'McNemar mid-p')                             # counts make p jump


def test_exact_mcnemar_is_cautious():
    g = np.random.default_rng(0); p = np.array([mcnemar_test(*paired_shares(g, 80, .1, .1)).p_exact for _ in range(1000)])
    assert np.mean(p < .05) < .05
