"The papermill route: the one-argument command in every form, parameters that are wrong, and the real chain at the smoke preset."
import fcntl, os, pty, re, shutil, struct, subprocess, sys, termios
from pathlib import Path
import nbformat, pandas as pd, papermill
import papermill.cli
import pytest
from papermill.exceptions import PapermillExecutionError
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.cli import VALUES
from ecgflowcmr.experiment import new_experiment

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
BAR = re.compile(r'30/30 \[\d+:\d+<\d+:\d+')  # the last state of a bar: elapsed<left


@pytest.fixture
def tree(tmp_path):
    "A checkout with one small experiment."
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = ecgflowcmr\n')
    code = ["import time\nfrom tqdm import tqdm", "print('size', preset, 'seed', seed)\nfor _ in tqdm(range(30), desc='beats', mininterval=0): time.sleep(.01)",
            "if seed == 13: raise RuntimeError('unlucky')", 'show_where(results=out)']
    nbformat.write(new_experiment('Tiny', 'A bar and a line', *code), tmp_path/'nbs'/'90_tiny.ipynb')
    return tmp_path


def call(*args, cwd, cmd=(BIN/'papermill',), **kw):
    return subprocess.run([*cmd, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300, **kw)


def terminal(*args, cwd, size=(24, 100)):
    "Exit code and everything shown, at a terminal."
    pid, fd = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', *size, 0, 0))
        os.chdir(cwd)
        os.execv(BIN/'papermill', ['papermill', *map(str, args)])
    res = b''
    while True:
        try: part = os.read(fd, 65536)
        except OSError: break  # Linux: the other side is closed
        if not part: break
        res += part
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), res.decode()


def finished(path):
    nb = nbformat.read(path, as_version=4)
    return all(c.metadata.papermill.status == 'completed' for c in nb.cells) and not nb.metadata.papermill.exception


def test_table_of_options_is_papermills():
    "A new papermill with another option must break this test, not a user's command."
    opts = [o for o in papermill.cli.papermill.params if o.param_type_name == 'option']
    assert VALUES == {name: o.nargs for o in opts if not o.is_flag for name in o.opts}


@pytest.mark.parametrize('size', [(24, 100), (0, 0)], ids=['100 columns', 'a terminal without a size'])
def test_one_argument_at_a_terminal(tree, size):
    rc, shown = terminal('nbs/90_tiny.ipynb', cwd=tree, size=size)
    assert rc == 0, shown
    assert BAR.search(shown) and 'size demo seed 0' in shown and 'results: runs/demo' in shown
    assert finished(tree/'runs'/'demo'/'90_tiny.ipynb')


def test_one_argument_redirected(tree):
    res = call('nbs/90_tiny.ipynb', '-p', 'preset', 'smoke', cwd=tree, stdin=subprocess.DEVNULL)
    assert res.returncode == 0, res.stderr
    assert res.stdout == 'size smoke seed 0\nresults: runs/smoke\n', 'what the notebook prints, once, and no JSON'
    assert BAR.search(res.stderr)
    out = tree/'runs'/'smoke'/'90_tiny.ipynb'
    assert finished(out)
    kept = [''.join(o.text) for c in nbformat.read(out, as_version=4).cells for o in c.get('outputs', []) if o.get('name') == 'stderr']
    assert len(kept) == 1 and BAR.search(kept[0]) and kept[0].count('beats') == 1, 'one state of the bar is kept'


def test_one_argument_with_stdin_a_pipe(tree):
    before = (tree/'nbs'/'90_tiny.ipynb').read_bytes()
    res = call('-p', 'run', 'mine', 'nbs/90_tiny.ipynb', cwd=tree, input='nothing to read here\n')
    assert res.returncode == 0, res.stderr
    assert res.stdout.endswith('results: runs/mine\n') and finished(tree/'runs'/'mine'/'90_tiny.ipynb')
    assert (tree/'nbs'/'90_tiny.ipynb').read_bytes() == before


def test_one_argument_from_elsewhere_and_as_a_module(tree, tmp_path_factory):
    res = call(tree/'nbs'/'90_tiny.ipynb', '-y', '{run: far, seed: 7}', cwd=tmp_path_factory.mktemp('elsewhere'), cmd=(sys.executable, '-m', 'papermill'))
    assert 'seed 7' in res.stdout, res.stderr
    assert (tree/'runs'/'far'/'90_tiny.ipynb').exists() and 'results: runs/far' in res.stdout
    assert not (ROOT/'runs'/'far').exists(), 'the results are in the same checkout as the notebook'


def test_one_argument_that_fails(tree):
    res = call('nbs/90_tiny.ipynb', '-p', 'seed', '13', cwd=tree, stdin=subprocess.DEVNULL)
    assert res.returncode == 1 and 'unlucky' in res.stderr
    assert 'unlucky' in (tree/'runs'/'demo'/'90_tiny.ipynb').read_text()


def test_a_run_that_is_no_folder_name(tree):
    res = call('nbs/90_tiny.ipynb', '-p', 'run', '../away', cwd=tree)
    assert res.returncode == 2 and 'plain folder name' in res.stderr
    assert not (tree/'away').exists() and not (tree/'runs').exists()


def test_two_arguments_and_help_as_ever(tree):
    res = call('nbs/90_tiny.ipynb', 'mine.ipynb', '-p', 'seed', '2', cwd=tree, stdin=subprocess.DEVNULL)
    assert res.returncode == 0 and res.stdout == '' and 'Executing: 100%' in res.stderr, 'papermill counts cells and prints nothing'
    assert finished(tree/'mine.ipynb')
    res = call('--help-notebook', 'nbs/90_tiny.ipynb', cwd=tree, stdin=subprocess.DEVNULL)
    assert res.returncode == 0 and re.search(r"preset: str \(default 'demo'\)\s+size: smoke", res.stdout) and 'Unknown' not in res.stdout
    assert [o for o in ('preset', 'cohort', 'run', 'seed') if f'\n  {o}: ' not in res.stdout] == []


def test_another_projects_notebook_is_left_alone(tree):
    (tree/'settings.ini').write_text('[DEFAULT]\nlib_name = another\n')
    rc, shown = terminal('nbs/90_tiny.ipynb', cwd=tree)
    assert rc == 2 and 'OUTPUT_PATH' in shown and not (tree/'runs').exists()


@pytest.mark.parametrize('params, says', [
    (dict(sede=1), r'sede: unknown parameter \(did you mean seed\?\)\. Valid are: preset, cohort, run, seed'),
    (dict(preset='dmo'), "preset: unknown value 'dmo'. Use one of: smoke, demo, paper"),
    (dict(cohort='no/such/folder'), r"cohort: 'no/such/folder': no such folder. Valid are: virtual, or the folder"),
    (dict(seed='three'), "seed: 'three' is str, not int"),
    (dict(run='a/b'), 'run: .*plain folder name'),
], ids=lambda o: next(iter(o)) if isinstance(o, dict) else '')
def test_wrong_parameters_stop_at_the_first_cell(tree, papermill_run, params, says):
    with pytest.raises(PapermillExecutionError) as e: papermill_run(tree/'nbs'/'90_tiny.ipynb', tmp=tree, **params)
    assert e.value.ename == 'DataError' and re.search(says, e.value.evalue), e.value.evalue
    nb = nbformat.read(tree/'90_tiny.ipynb', as_version=4)
    assert not [c for c in nb.cells if 'tqdm(' in c.source and c.outputs], 'nothing ran'


def test_cleaning_keeps_the_parameters_and_nbdev_test_skips(tree):
    shutil.copy(ROOT/'settings.ini', tree)
    (tree/'ecgflowcmr').mkdir()
    (tree/'ecgflowcmr'/'__init__.py').write_text('__version__ = "0"\n')
    nb = tree/'nbs'/'90_tiny.ipynb'
    subprocess.run([BIN/'nbdev_clean'], cwd=tree, check=True)
    assert list(papermill.inspect_notebook(str(nb))) == ['preset', 'cohort', 'run', 'seed']
    bad = nbformat.read(nb, as_version=4)
    bad.cells[-1].source = '1/0'
    nbformat.write(bad, nb)
    assert subprocess.run([BIN/'nbdev_test', '--n_workers', '0'], cwd=tree).returncode == 0, 'front matter keeps nbdev_test out'


@pytest.mark.slow
def test_the_chain_from_nothing(smoke):
    run, res = smoke
    assert res.returncode == 0, res.stderr[-3000:]
    assert finished(ROOT/'runs'/run/'30_amdf_train.ipynb') and f'runs/{run}' in res.stdout
    assert re.search(r'\[\d+:\d+<\d+:\d+', res.stderr), 'a bar with an ETA'
    for o in ('pamae', 'vae', 'amdf'): assert (ROOT/'runs'/run/o/'done.json').exists(), o


@pytest.mark.slow
@pytest.mark.parametrize('name', ['20_pamae_train', '25_vae_train', '30_amdf_train'])
def test_a_finished_stage_is_loaded(smoke, papermill_run, name):
    run, _ = smoke
    done = {o: o.read_bytes() for o in (ROOT/'runs'/run).glob('*/done.json')}
    papermill_run(f'{name}.ipynb', preset='smoke', run=run)
    assert {o: o.read_bytes() for o in done} == done and done


@pytest.fixture(scope='module')
def generated(smoke):
    return call('nbs/35_generate.ipynb', '-p', 'preset', 'smoke', '-p', 'run', smoke[0], cwd=ROOT, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_generate_from_a_real_ecg(smoke, generated):
    assert generated.returncode == 0, generated.stderr[-3000:]
    kinds = {o.suffix for o in (ROOT/'runs'/smoke[0]/'generate').iterdir()}
    assert kinds >= {'.mp4', '.png', '.json'} and kinds & {'.gz', '.nii'}, kinds


@pytest.mark.slow
def test_steps_are_judged_and_the_bundle_is_packed(smoke, papermill_run):
    "33 and 37 on the same run: the card holds what 33 measured of this very bundle, and nothing of 32 and 36, which did not look at it."
    run = ROOT/'runs'/smoke[0]
    papermill_run('33_few_steps.ipynb', preset='smoke', run=run.name, k=2)
    table = pd.read_csv(run/'figures'/'few_steps.csv')
    assert table[['sampler', 'steps']].values.tolist() == [['field', 1], ['field', 2], ['field', 10], ['student', 2]] and table.ratio[2] == 1 and table.ratio.notna().all() and (table.fvd_low < table.fvd).all() and (table.fvd < table.fvd_high).all()
    papermill_run('37_ship.ipynb', preset='smoke', run=run.name)
    card, packed = (run/'ship'/'MODEL_CARD.md').read_text(), ECGFlowCMR.from_pretrained(run/'ship')
    assert packed.student is None and 'PSNR, dB' in card and 'over those of ten steps' in card and 'obedience' not in card.lower() and 'Virtual hearts only' in card


def snakemake(*config):
    return call('-n', '-p', '--cores', '2', '--config', *config, cwd=ROOT, cmd=(BIN/'snakemake',))


@pytest.mark.slow
def test_snakemake_has_nothing_left_to_do(smoke, generated):
    res = snakemake('preset=smoke', f'run={smoke[0]}')
    assert res.returncode == 0 and 'Nothing to be done' in res.stdout + res.stderr, res.stdout + res.stderr


def test_snakemake_types_the_papermill_lines():
    res = snakemake('preset=smoke', 'run=test-nothing', 'seed=3')
    shown = re.findall(r'papermill nbs/.*', res.stdout + res.stderr)
    assert sorted(shown) == [f'papermill nbs/{o}.ipynb -p preset smoke -p run test-nothing -p seed 3' for o in ('20_pamae_train', '25_vae_train', '30_amdf_train', '35_generate')], res.stderr
    res = snakemake('preset=smoke', 'run=test-nothing', 'processes=2')
    shown = re.findall(r'command: (.*papermill .*)', res.stdout + res.stderr)
    many = 'torchrun --standalone --nproc-per-node 2 --no-python '
    assert sorted(shown) == [f'{many if o[0] != "35" else ""}papermill nbs/{"_".join(o)}.ipynb -p preset smoke -p run test-nothing'
                             for o in (('35', 'generate'), ('20', 'pamae_train'), ('25', 'vae_train'), ('30', 'amdf_train'))], res.stderr
    res = snakemake('preset=smoke', 'run=test-nothing', 'settings=vae.train.steps=3 amdf.student=null')
    assert res.stdout.count("-p settings 'vae.train.steps=3 amdf.student=null'") + res.stderr.count("-p settings 'vae.train.steps=3 amdf.student=null'") >= 4, res.stderr
    res = snakemake('presett=smoke')
    assert res.returncode != 0 and 'valid are preset, recipe, cohort, run, seed' in res.stdout + res.stderr


def test_every_table_and_figure_can_be_planned():
    "A rule whose inputs cannot be worked out breaks here, not at night."
    rules = 'virtual baselines table1 ablation noise_scale table2 table3 table4 screening label_efficiency subtypes phenotypes_from_generated turing_test reader_study paper papers synthetic'.split()
    res = call('-n', '--cores', '2', '--config', 'preset=smoke', 'run=test-nothing', '--', *rules, cwd=ROOT, cmd=(BIN/'snakemake',))
    assert res.returncode == 0, (res.stdout + res.stderr)[-3000:]
    planned = set(re.findall(r'^rule (\w+):', res.stdout + res.stderr, re.M))
    assert planned >= {'alignment', 'alignment_harmonic', 'baseline', 'paper', 'papers', 'phenotypes_from_generated', 'screening', 'table4'}, planned


def test_slurm_profile_asks_for_gpus():
    res = call('-n', '-p', '--profile', 'profiles/slurm', '--config', 'preset=paper', 'run=test-nothing', 'processes=8', '--', 'obedience', 'few_steps', 'real_ecgs', 'cost', 'generate', cwd=ROOT, cmd=(BIN/'snakemake',))
    shown = dict(re.findall(r'^rule (\w+):\n(?:    .*\n)*?    resources: (.*)', res.stdout + res.stderr, re.M))
    gpus = {k: (re.findall(r'gpu=(\d+)', v) or ['0'])[0] for k, v in shown.items()}
    assert gpus == dict(pamae='8', vae='8', amdf='8', obedience='1', few_steps='1', real_ecgs='1', generate='1', cost='0'), res.stdout + res.stderr
    assert all('nodes=1' in v and 'runtime=' in v and 'mem_mb=' in v for v in shown.values())


@pytest.mark.slow
def test_notebook_30_as_jupyterlab_runs_it(smoke, tmp_path):
    run, _ = smoke
    nb = ROOT/'nbs'/'30_amdf_train.ipynb'
    papermill.execute_notebook(str(nb), str(tmp_path/nb.name), dict(preset='smoke', run=run), cwd=str(ROOT/'nbs'), progress_bar=False)
