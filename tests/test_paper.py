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


def test_the_page_of_a_run(tables, papermill_run):
    rows = [dict(method=f'mae_synthetic:harmonic:{k}', name=f'{k} %', task='cm', difference=d, **{'difference: low': d-.01, 'difference: high': d+.01}) for k, d in ((100, .03), (300, .05))]
    pd.DataFrame(rows).to_csv(tables/'figures'/'table2_all.csv', index=False)
    pd.DataFrame({'CM AUC': ['.81 & more']}, index=pd.Index(['MAE_(real)'], name='method')).to_csv(tables/'figures'/'table2.csv')
    nb = papermill_run('90_paper.ipynb', preset='smoke', run=tables.name)
    md, tex = ((tables/'paper'/f'paper.{end}').read_text(encoding='utf-8') for end in ('md', 'tex'))
    line = next(k for k in md.splitlines() if k.startswith('| Drawn cines in pre-training raise the AUC of diseases'))
    assert '| holds' in line and '300 % +0.050 (+0.040 to +0.060)' in line
    assert md.count('not measured') >= 8 and '.81 & more' in md and r'.81 \& more' in tex and r'MAE\_(real)' in tex
    done = json.loads((tables/'paper'/'done.json').read_text())
    assert done['figures']['holds'] == 1 and done['tables'] == ['table2']
    assert not any(o.get('output_type') == 'error' for c in nb.cells for o in c.get('outputs', []))


def test_a_run_without_tables_is_refused(tables, refusal):
    assert 'holds no table' in str(refusal('90_paper.ipynb', preset='smoke', run=tables.name))
