"Table 1 and Figure 2 at the smoke preset, in fresh kernels the first time: what they leave, that they go on where they stopped, and what they refuse."
import json
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.vae import TimeConv

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(smoke):
    "The run of all tests: encoder, VAE and field of the smoke preset are there."
    name, res = smoke
    assert res.returncode == 0, res.stderr[-3000:]
    return ROOT/'runs'/name


@pytest.mark.slow
def test_table_1(run, papermill_run):
    papermill_run('40_generation_quality.ipynb', preset='smoke', run=run.name, systems='crossmodal harmonic')
    table = pd.read_csv(run/'figures'/'table1.csv', index_col=0)
    assert len(table) == 7 and 'harmonic, a tenth more noise' in table.index
    assert [c for c in table if 'published' in c] == [f'{q}, UK Biobank, as published' for q in ('LPIPS', 'FID', 'FVD', 's a video')]
    assert table.loc['ECGFlowCMR, harmonic (ours)', [c for c in table if 'published' in c]].isna().all(), 'what the paper says of its own method is not said of another one'
    assert all('(domain)' in c for c in table if c.startswith(('LPIPS', 'FID', 'FVD')) and 'published' not in c), 'a bare name is that of the published network'
    whole = pd.read_csv(run/'figures'/'table1_all.csv', index_col=0)
    truth, other = 'The true cine through the VAE', 'True cines of other people'
    assert float(whole.loc['LPIPS (domain)', truth]) < float(whole.loc['LPIPS (domain)', other])
    assert float(whole.loc['SSIM', truth]) > float(whole.loc['SSIM', other])
    assert 'not defined' in whole.loc['distances', 'Mean of the training set']
    assert (whole.loc['copies'].str.contains('not judged')).all(), 'twelve subjects are too few, and the table says so'
    text = json.loads((run/'figures'/'table1.json').read_text())
    assert all('trained on' in o for o in text['made_by']['extractors']), 'every score names its extractor'
    assert {'torch', 'python', 'ecgflowcmr'} <= set(text['made_by']['versions']) and text['made_by']['device'] == 'cpu'
    scores = pd.read_csv(run/'figures'/'table1_scores.csv')
    assert {'KID (domain)', 'KVD (domain)'} <= set(scores['score']) <= set(whole.index) and scores[['network', 'range', 'drawn', 'true']].notna().all(None)
    assert 'rough' in scores.loc[scores['score'] == 'KID (domain)', 'warning'].iloc[0], 'twelve cines are few'


@pytest.mark.slow
def test_table_1_goes_on_system_by_system(run, cells):
    kept = sorted((run/'table1').glob('*/verdict-*.json')) + sorted((run/'table1').glob('*/cines.npy'))
    before = {o: o.read_bytes() for o in kept}
    lost = next(o for o in kept if 'harmonic' in o.parent.name)
    lost.unlink()
    half = next(o for o in kept if 'crossmodal' in o.parent.name and o.suffix == '.json')   # stopped while it drew: two batches were noted
    half.unlink(); cines = np.load(half.with_name('cines.npy'), mmap_mode='r+'); cines.reshape(-1, 50, 96, 96)[16:] = 0; cines.flush(); del cines
    note = half.with_name('drawn.json'); note.write_text(json.dumps(json.loads(note.read_text()) | dict(done=16)))
    cells('40_generation_quality.ipynb', preset='smoke', run=run.name, systems='crossmodal harmonic')
    assert {o: o.read_bytes() for o in kept} == before, 'what was lost is drawn and judged again: the same cines, the same verdicts'


@pytest.mark.slow
def test_ablation_and_noise_scale(run, papermill_run, cells):
    papermill_run('41_ablation.ipynb', preset='smoke', run=run.name, variants='whole no_ecg vae_per_frame no_neighbours no_qk_norm uniform_time')
    table = pd.read_csv(run/'figures'/'ablation.csv', index_col='variant')
    assert table.index.tolist() == ['everything', 'without ECG', 'VAE for each frame alone', 'ours: MLP without neighbours', 'ours: without QK-norm', 'ours: uniform time'] and (table.loc['everything', ['more obedience', 'more agreement: high']] == 0).all()
    whole, deaf, frames, *ours = (np.load(next((run/'ablation').glob(f'{v}-*'))/'cines.npy').astype(float) for v in ('whole', 'no_ecg', 'vae_per_frame', 'no_neighbours', 'no_qk_norm', 'uniform_time'))
    assert np.abs(whole - deaf).mean() > 1 and all((whole != other).mean() > .05 for other in (frames, *ours)), 'a part that is taken out changes the picture: a switch that does nothing would draw the same bytes'
    beside, alone = ([m.weight for o in run.glob('amdf*/bundle') if (g := ECGFlowCMR.from_pretrained(o)).config['vae'].get('time', True) == time for m in g.vae.modules() if isinstance(m, TimeConv)] for time in (True, False))
    one = torch.tensor([[0.], [1.], [0.]])
    assert alone and all(torch.equal(w, one.expand_as(w)) for w in alone), 'a VAE for each frame sees no other frame'
    assert beside and not any(torch.equal(w, one.expand_as(w)) for w in beside), 'that of the whole system does'
    cells('42_noise_scale.ipynb', preset='smoke', run=run.name, alphas='.5 1')
    table = pd.read_csv(run/'figures'/'noise_scale.csv', index_col=0)
    assert table.index.tolist() == [.5, 1.] and table['LPIPS'].notna().all()


@pytest.mark.parametrize('notebook, params, message', [
    ('40_generation_quality', dict(systems='videogpt sora'), 'crossmodal'),
    ('31_baseline_train', dict(system='sora'), 'videogpt'),
    ('41_ablation', dict(variants='without_heart'), 'no_phase_head'),
    ('42_noise_scale', dict(alphas='9'), 'from .01 to 5'),
    ('40_generation_quality', dict(extractors='standard', systems='crossmodal', weights='/nowhere'), 'alexnet')])
def test_wrong_parameters(run, refusal, notebook, params, message):
    assert message in str(refusal(f'{notebook}.ipynb', preset='smoke', run=run.name, **params))
