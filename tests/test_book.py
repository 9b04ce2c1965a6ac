"The book as a whole: what export and clean would change, what an experiment must look like, and which way imports run."
import ast, filecmp, importlib.util, json, re, shutil, subprocess, sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
import nbformat, papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
number = lambda p: re.match(r'(\d+)([a-z]*)_', p.name).groups()
EXPERIMENTS = [p for p in CHAPTERS if int(number(p)[0]) >= 20]
SOURCES = [p for p in CHAPTERS if p not in EXPERIMENTS]
chapters, sources, experiments = (pytest.mark.parametrize('path', o, ids=lambda p: p.stem) for o in (CHAPTERS, SOURCES, EXPERIMENTS))
EXPORT = re.compile(r'^#\|\s*export', re.M)


def cells(path, kind='code'): return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]
def exported(path): return [c.source for c in cells(path) if EXPORT.search(c.source)]
def module(path): return next(m.group(1) for c in cells(path) if (m := re.match(r'#\|\s*default_exp\s+(\S+)', c.source)))


def differing(a, b):
    "Files, relative, that are not the same in both folders."
    res = [o for o in a.rglob('*') if o.is_file() and '__pycache__' not in o.parts and '.ipynb_checkpoints' not in o.parts]
    other = [o for o in b.rglob('*') if o.is_file() and '__pycache__' not in o.parts]
    names = {o.relative_to(a) for o in res} | {o.relative_to(b) for o in other}
    return sorted(str(o) for o in names if not ((a/o).exists() and (b/o).exists() and filecmp.cmp(a/o, b/o, shallow=False)))


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "This tree without results, after nbdev_export and nbdev_clean."
    tmp = tmp_path_factory.mktemp('tree')
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for o in ('nbs', 'ecgflowcmr'): shutil.copytree(ROOT/o, tmp/o, ignore=skip)
    for o in ('settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/o, tmp)
    for o in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).parent/o], cwd=tmp, check=True)
    return tmp


@pytest.mark.parametrize('folder', ['nbs', 'ecgflowcmr'])
def test_export_and_clean_change_nothing(copy, folder): assert differing(ROOT/folder, copy/folder) == []


def test_export_keeps_pyproject(copy): assert filecmp.cmp(ROOT/'pyproject.toml', copy/'pyproject.toml', shallow=False)


def test_readme_is_the_index():
    loader = SourceFileLoader('readme', str(ROOT/'.ci'/'readme'))
    mod = importlib.util.module_from_spec(importlib.util.spec_from_loader('readme', loader))
    sys.dont_write_bytecode, old = True, sys.dont_write_bytecode
    try: loader.exec_module(mod)
    finally: sys.dont_write_bytecode = old
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert mod.render() == text, 'README.md is older than nbs/index.ipynb: run .ci/readme'
    for link in re.findall(r'\]\(([^)#:]+)\)|src="([^":]+)"', text): assert (ROOT/(link[0] or link[1])).exists(), link


def test_ruff(): subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', '.'], cwd=ROOT, check=True)


def test_lock_and_ranges_agree():
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    lock = dict(o.split('==') for o in (ROOT/'requirements.lock').read_text().splitlines() if o and not o.startswith('#'))
    lock = {canonicalize_name(k): v for k, v in lock.items()}
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    for o in map(Requirement, (cfg['DEFAULT']['requirements'] + ' ' + cfg['DEFAULT']['dev_requirements']).split()):
        assert o.specifier.contains(lock[canonicalize_name(o.name)]), o


@sources
def test_source_chapter_begins(path):
    first, title = nbformat.read(path, as_version=4).cells[:2]
    assert first.source.startswith('#| default_exp ')
    assert title.cell_type == 'markdown' and re.match(r'# .+\n+> .+', title.source), 'a title and a one-line summary'
    assert module(path) == path.stem.split('_', 1)[1]


@sources
def test_exported_cells_fit_on_a_screen(path):
    assert [len(o.splitlines()) for o in exported(path) if len(o.splitlines()) > 30] == []


@sources
def test_imports_run_downwards(path):
    known = {f'ecgflowcmr.{module(p)}': i for i, p in enumerate(SOURCES)}
    mine = known[f'ecgflowcmr.{module(path)}']
    for node in (n for src in exported(path) for n in ast.walk(ast.parse(src))):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path.name}: internal imports are absolute'
            names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
        for o in names: assert known.get(o, -1) < mine, f'{path.name} imports {o}, a later chapter'


@chapters
def test_imports_stand_alone(path):
    for src in (c.source for c in cells(path)):
        try: body = ast.parse(re.sub(r'^[%!].*', '', src, flags=re.M)).body
        except SyntaxError: pytest.fail(f'{path.name}: a cell is no Python:\n{src}')
        imports = [isinstance(o, ast.Import | ast.ImportFrom) or (isinstance(o, ast.Try) and isinstance(o.body[0], ast.Import | ast.ImportFrom)) for o in body]
        assert all(imports) or not any(imports), f'{path.name}: imports mixed with other code:\n{src}'


@chapters
def test_outputs_are_small_and_name_no_machine(path):
    for out in (o for c in cells(path) for o in c.outputs):
        assert len(json.dumps(out)) < 200_000, f'{path.name}: an output of {len(json.dumps(out))//1000} KB'
        assert out.output_type != 'error', f'{path.name}: an error is kept'
        text = ''.join(out.get('text', '')) + ' '.join(str(v) for k, v in out.get('data', {}).items() if not k.startswith('image/p'))
        assert not (m := re.search(r'/(work|root|tmp|home|Users)/\S*', text)), f'{path.name}: {m.group()}'


@experiments
def test_experiment_is_one(path):
    assert not exported(path), 'an experiment exports nothing'
    assert any('skip_exec: true' in c.source for c in cells(path, 'raw')), 'nbdev_test would run it'
    tagged = [c for c in cells(path) if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1, f'{len(tagged)} cells tagged parameters'
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == 'python3'
    params = papermill.inspect_notebook(str(path))
    assert {'preset', 'recipe', 'cohort', 'run', 'seed'} <= set(params)
    assert set(re.findall(r'^(\w+): ', tagged[0].source, re.M)) == set(params), 'papermill reads every parameter (an = in the comment hides one)'
    assert not [o for o, v in params.items() if not v['help']], 'every parameter is explained by a trailing comment'
    assert any('check_parameters(globals()' in c.source for c in cells(path))


def test_there_are_chapters(): assert len(SOURCES) > 10 and len(EXPERIMENTS) >= 4
