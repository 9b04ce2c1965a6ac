"The paper page: what is written and judged in a fresh kernel, and what is refused."
import json
import pandas as pd
import pytest


@pytest.fixture
def tables(root, tmp_path_factory):
    "A folder of made-up tables inside the runs folder, and a run beside it."
    import shutil
    folder = root/'runs'/f'pytest-{tmp_path_factory.mktemp("page").name}-{id(tmp_path_factory)}'
    (folder/'figures').mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def drawn_rows(*found):
    "Rows of a table: task, difference to MAE (real), difference to the control or None."
    part = lambda name, d: {} if d is None else {name: d, f'{name}: low': d-.01, f'{name}: high': d+.01}
    return pd.DataFrame([dict(method=f'mae_synthetic:harmonic:{k}', name=f'{k} %', task=t) | part('difference', a) | part('over control', b) for k, (t, a, b) in zip((100, 300), found)]).to_csv(index=False)


def test_the_page_of_a_run(root, tables, papermill_run):
    (tables/'figures'/'table2_all.csv').write_text(drawn_rows(('cm', .03, .02), ('cm', .05, .04)))
    (tables/'figures'/'table4_all.csv').write_text(drawn_rows(('cardiomyopathy', .12, None)))   # as it was run before there were controls
    pd.DataFrame({'CM AUC': ['.81 & more']}, index=pd.Index(['MAE_(real)'], name='method')).to_csv(tables/'figures'/'table2.csv')
    (tables/'figures'/'table2.json').write_text(json.dumps(dict(made_by=dict(run='x', kind='virtual', cohort='ukb', epochs={'pre-training': dict(mae_real=4), 'fine-tuning': dict(cm=8)}))))
    before = (root/'figures'/'paper.md').read_bytes()
    nb = papermill_run('90_paper.ipynb', preset='smoke', run=tables.name)
    md, tex = ((tables/'paper'/f'paper.{end}').read_text(encoding='utf-8') for end in ('md', 'tex'))
    line = next(k for k in md.splitlines() if k.startswith('| Cines of ECGFlowCMR in pre-training raise the AUC of diseases'))
    assert '| holds' in line and '300 % +0.050 (+0.040 to +0.060), over its control +0.040 (+0.030 to +0.050)' in line
    line = next(k for k in md.splitlines() if k.startswith('| Cines of ECGFlowCMR in pre-training raise the AUC in the second hospital'))
    assert '| not measured' in line and '100 % +0.120 (+0.110 to +0.130), over its control not measured' in line
    assert md.count('| not measured') >= 15 and '.81 & more' in md and r'.81 \& more' in tex and r'MAE\_(real)' in tex
    done = json.loads((tables/'paper'/'done.json').read_text())
    assert done['figures']['holds'] == 1 and done['tables'] == ['table2']
    made = json.loads((tables/'figures'/'table2.json').read_text())['made_by']
    assert '*run x, epochs pre-training (mae_real 4); fine-tuning (cm 8), kind virtual*' in md and made['epochs']['fine-tuning'] == dict(cm=8)
    assert (root/'figures'/'paper.md').read_bytes() == before, 'a run that is not published leaves figures/ alone'
    assert not any(o.get('output_type') == 'error' for c in nb.cells for o in c.get('outputs', []))


def test_a_run_without_tables_is_refused(tables, refusal):
    assert 'holds no table' in str(refusal('90_paper.ipynb', preset='smoke', run=tables.name))


def test_patients_are_not_published(root, tables, refusal):
    "Tables of a cohort that is not known to be virtual do not reach figures/."
    (tables/'figures'/'table2.csv').write_text('method,AUC\nvit,.7\n')
    (tables/'figures'/'table2.json').write_text(json.dumps(dict(made_by=dict(run='x', cohort='ukb'))))
    before = (root/'figures'/'table2.csv').read_bytes()
    assert 'table2: not known to be of virtual hearts' in str(refusal('90_paper.ipynb', preset='smoke', run=tables.name, publish=True))
    assert (root/'figures'/'table2.csv').read_bytes() == before
