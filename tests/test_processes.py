"""A training that several processes share: the same steps as one, whoever starts them; what happens when one of them fails or dies.

`python tests/test_processes.py JOB FOLDER` is one of the processes, in the environment of torchrun or of srun."""
import json, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm
from ecgflowcmr.ecg import DataError
from ecgflowcmr.experiment import new_experiment
from ecgflowcmr.files import read_json
from ecgflowcmr.processes import barrier, everyone, main_first, only_main, rank, shard, world
from ecgflowcmr.train import NotFinite, adamw, batch_at, ema_update, fit, finish_stage, finished, load_stage, lr_at, read_log, read_tensors, seed_step, stage_folder, training_config, waiting

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CONFIG = dict(steps=24, batch=16, lr=3e-3, warmup=10, ema=.9, clip=.5, seed=3, log_every=6, save_steps=4)
N = 50
PATIENCE = 500  # seconds that a job may take on a busy machine; alone it takes ten
DATA = torch.randn(N, 8, generator=torch.Generator().manual_seed(1))


def small():
    "A net with dropout and a part that not every shard uses."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(.1), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    net.spare = nn.Linear(8, 4)
    return net


def loss(model, index, rng):
    noisy = DATA[index] + .1*torch.randn(len(index), 8, generator=rng)
    out = nn.Sequential(*list(model.children())[:-1])(noisy)
    if torch.rand((), generator=rng) < .5: out = out + model.spare(noisy)
    return dict(loss=nn.functional.mse_loss(out, DATA[index, :4]), noise=(noisy - DATA[index]).abs().mean())


def train(folder, loss=loss, **over): return fit(small(), loss, N, CONFIG | over, folder, 'cpu', None)


def weights(folder): return (Path(folder)/'model.safetensors').read_bytes()


def step_of(folder): return json.loads(read_tensors(Path(folder)/'resume.safetensors', '')[1]['resume'])['step']


def failing(what, at):
    "A loss that goes wrong in the second process, at its step `at`."
    count = []
    def wrong(model, index, rng):
        count.append(1)
        out = loss(model, index, rng)
        if len(count) <= at or rank() == 0: return out
        return what(out)
    return wrong


def message(f, *a, **kw):
    try: f(*a, **kw)
    except (DataError, NotFinite) as e: return f'{type(e).__name__}: {e}'


def stage(run):
    "A stage as the chapters write them; how often it trained."
    folder, model, count = stage_folder(run, 'net', CONFIG), small(), []
    if finished(folder): return load_stage(folder, model), 0
    fit(model, lambda *a: (count.append(1), loss(*a))[1], N, CONFIG, folder, 'cpu', None)
    finish_stage(folder, dict(loss=1.))
    return model, len(count)


def job_all(folder):
    "What two processes that know each other can be asked, one thing after the other; the answers of both."
    said = dict(place=[rank(), world()], rows=list(shard(7)), array=shard(np.arange(5)).tolist())
    train(folder/'two'); train(folder/'four', accumulate=2); train(folder/'muon', optimizer='muon')
    said['divisible'] = message(train, folder/'odd', batch=15)
    nan = failing(lambda out: out | dict(loss=out['loss']*float('nan')), 9)
    said['nan'] = message(train, folder/'nan', loss=nan)
    said['other settings'] = message(train, folder/'differ', lr=1e-3*(1 + rank()))
    said['stage'] = [stage(folder/'run')[1], stage(folder/'run')[1]]
    with main_first(): said['found'] = (folder/'cache').exists(); (folder/'cache').touch()
    barrier()
    told = everyone(said)
    if rank() == 0: (folder/'said.json').write_text(json.dumps(told))
    only_main()
    (folder/'alone').write_text(f'{rank()} of {world()}')
    train(folder/'after', accumulate=2)


def job_killed(folder):
    "A training that leaves its process numbers; slow enough to be met half way."
    (folder/f'pid{rank()}').write_text(str(os.getpid()))
    train(folder/'net', loss=lambda *a: (time.sleep(.02), loss(*a))[1])


def job_first_fails(folder):
    with main_first():
        if rank() == 0: raise DataError('the disk is full')
        (folder/'wrong').touch()


def torchrun_env(port, i): return dict(RANK=str(i), WORLD_SIZE='2', LOCAL_RANK=str(i), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))


def srun_env(port, i):
    return dict(SLURM_PROCID=str(i), SLURM_STEP_NUM_TASKS='2', SLURM_NTASKS='2', SLURM_LOCALID=str(i), SLURM_JOB_ID='4711', SLURM_STEP_ID='0',
                SLURM_STEP_NODELIST='localhost', SLURM_JOB_NAME='train', MASTER_PORT=str(port))


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def environment(): return os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))


def pair(env, *words):
    "Two processes in this environment; exit codes and what they wrote to stderr."
    port = free_port()
    ps = [subprocess.Popen([sys.executable, __file__, *map(str, words)], env=environment() | env(port, i), stderr=subprocess.PIPE, text=True) for i in (0, 1)]
    try: return [(p.communicate(timeout=PATIENCE)[1], p.returncode) for p in ps]
    finally:
        for p in ps: p.kill()


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "The folder of `job_all`, as srun would start it, and what the processes said."
    folder = tmp_path_factory.mktemp('two')
    for err, rc in pair(srun_env, 'all', folder): assert rc == 0, err
    return folder, json.loads((folder/'said.json').read_text())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same_curve(a, b):
    "Logs and weights of two trainings; equal but for the order of a sum."
    x, y = read_log(a), read_log(b)
    for k in ('step', 'lr', 'loss', 'noise', 'grad_norm'): np.testing.assert_allclose(x[k], y[k], rtol=1e-4, err_msg=k)
    x, y = [read_tensors(o/'model.safetensors', '')[0] for o in (a, b)]
    for k in x: torch.testing.assert_close(x[k], y[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name, over', [('two', dict(accumulate=2)), ('four', dict(accumulate=4)), ('muon', dict(accumulate=2, optimizer='muon'))])
def test_processes_do_what_one_does_with_as_many_shards(two, tmp_path, name, over):
    summary = train(tmp_path, **over)
    same_curve(two[0]/name, tmp_path)
    note = read_json(two[0]/name/'trained.json')['summary']
    assert (note['processes'], summary['processes'], note['accumulate']) == (2, 1, summary['accumulate']//2)


def test_a_curve_depends_on_the_shards(two, tmp_path):
    train(tmp_path)
    assert not np.allclose(read_log(tmp_path)['loss'], read_log(two[0]/'two')['loss'], rtol=1e-4), 'other random numbers for other shards, or nothing above was tested'


def test_rows_are_shared(two):
    _, (a, b) = two
    assert [a['place'], b['place']] == [[0, 2], [1, 2]]
    assert (a['rows'], b['rows'], a['array'], b['array']) == ([0, 2, 4, 6], [1, 3, 5], [0, 2, 4], [1, 3])
    assert (a['found'], b['found']) == (False, True)


def test_a_stage_is_trained_by_all_and_loaded_by_all(two):
    assert [o['stage'] for o in two[1]] == [[CONFIG['steps'], 0]]*2
    done = read_json(two[0]/'run'/'net'/'done.json')
    assert done['training']['processes'] == 2 and sorted(p.name for p in (two[0]/'run'/'net').iterdir()) == ['config.json', 'done.json', 'log.csv', 'model.safetensors']


def test_nan_in_one_process_stops_both_at_the_same_step(two):
    for o in two[1]: assert o['nan'].startswith('NotFinite') and 'loss is nan in step 9. The last good state, after step 8' in o['nan'], o
    assert step_of(two[0]/'nan') == 8


def test_what_cannot_be_shared_is_refused_in_all(two):
    for o in two[1]:
        assert '15 items cannot be shared equally by 2 processes x 1 shards' in o['divisible']
        assert 'the settings is not the same in all processes' in o['other settings']


def test_the_main_process_goes_on_alone(two):
    assert (two[0]/'alone').read_text() == '0 of 1'
    same_curve(two[0]/'two', two[0]/'after')


def test_the_others_stop_with_the_main_process(tmp_path):
    (first, rc), (second, rc2) = pair(torchrun_env, 'first_fails', tmp_path)
    assert rc and rc2 and 'the disk is full' in first and 'the main process failed: DataError: ' in second and not (tmp_path/'wrong').exists()


@pytest.fixture
def torchrun():
    "Start two processes by torchrun; none outlives the test."
    started = []
    def start(*words, cwd=ROOT):
        started.append(subprocess.Popen([BIN/'torchrun', '--standalone', '--nproc-per-node', '2', *map(str, words)], cwd=cwd, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]
    yield start
    for p in started: p.terminate(); p.communicate(timeout=60)


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(')')[-1].split()[0] != 'Z'
    except OSError: return False


def test_a_killed_process_ends_all_and_the_training_goes_on_later(two, tmp_path, torchrun):
    whole = two[0]/'two'
    p, file = torchrun(__file__, 'killed', tmp_path), tmp_path/'net'/'resume.safetensors'
    deadline = time.time() + PATIENCE
    while time.time() < deadline and p.poll() is None and not file.exists(): time.sleep(.01)
    pids = [int((tmp_path/f'pid{i}').read_text()) for i in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    _, err = p.communicate(timeout=PATIENCE)
    assert p.returncode != 0 and not any(map(alive, pids)), err
    assert 0 < step_of(tmp_path/'net') < CONFIG['steps'] and not (tmp_path/'net'/'model.safetensors').exists()
    with pytest.raises(DataError, match='processes x accumulate: 2 -> absent.*Start so many processes that processes x accumulate is 2 again'): train(tmp_path/'net')
    for err, rc in pair(torchrun_env, 'killed', tmp_path): assert rc == 0, err
    assert weights(tmp_path/'net') == weights(whole)


def test_two_processes_run_one_notebook(tmp_path, torchrun):
    "papermill as a person types it under torchrun: one notebook a process, the second ends after the training."
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = ecgflowcmr\n')
    code = ['import torch\nfrom torch import nn\nfrom ecgflowcmr.processes import only_main, rank, shard, world\nfrom ecgflowcmr.train import fit, finish_stage, stage_folder',
            "folder = stage_folder(out, 'line', dict(steps=5))\nmodel = nn.Linear(1, 1)",
            "def loss(m, index, rng): return dict(loss=(m(index[:,None].float()/8) - 1).square().mean())\nfit(model, loss, 8, dict(steps=5, batch=4), folder, 'cpu')",
            "finish_stage(folder, dict(weight=model.weight.item()))\nprint('rows', *shard(4), 'of', world())", 'only_main()', "print('alone', world())"]
    nbformat.write(new_experiment('Line', 'Two processes', *code), tmp_path/'nbs'/'90_line.ipynb')
    p = torchrun('--no-python', BIN/'papermill', 'nbs/90_line.ipynb', '-p', 'run', 'r', cwd=tmp_path)
    shown, err = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0, err
    texts = [[''.join(o.get('text', '')) for c in nbformat.read(tmp_path/'runs'/'r'/f'90_line{e}.ipynb', as_version=4).cells for o in c.get('outputs', [])] for e in ('', '.rank1')]
    first, second = map(''.join, texts)
    assert 'rows 0 2 of 2' in first and 'alone 1' in first and 'rows 1 3 of 2' in second and 'alone' not in second
    assert '2 processes on cpu' in first and 'rows 0 2 of 2' in shown and 'rows 1 3' not in shown, 'the main process alone is seen'
    assert read_json(tmp_path/'runs'/'r'/'line'/'done.json')['training']['processes'] == 2


@pytest.mark.slow
def test_two_processes_train_the_encoder_of_the_smoke_preset_as_one_does(tmp_path, torchrun):
    "The command of the book on the first stage of the smoke preset, against one process with two shards a step."
    from ecgflowcmr.cohort import COHORT_SIZE, cohort_at
    from ecgflowcmr.pamae import fit_pamae, pamae_config
    import shutil
    run = f'test-two-{os.getpid()}'
    try:
        data = cohort_at('virtual', ROOT, n=COHORT_SIZE['smoke'], seed=0, need=('ecg', 'la'))
        p = torchrun('--no-python', BIN/'papermill', 'nbs/20_pamae_train.ipynb', '-p', 'preset', 'smoke', '-p', 'run', run, '-p', 'settings', 'pamae.train.steps=20')
        _, err = p.communicate(timeout=400)
        assert p.returncode == 0, err[-3000:]
        assert {'20_pamae_train.ipynb', '20_pamae_train.rank1.ipynb'} <= {o.name for o in (ROOT/'runs'/run).iterdir()}
        config = pamae_config('smoke', 0)
        fit_pamae(data, config | dict(train=config['train'] | dict(steps=20, accumulate=2)), tmp_path, 'cpu')
        a, b = read_log(ROOT/'runs'/run/'pamae'), read_log(tmp_path/'pamae')
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-3)
        np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-2)
    finally: shutil.rmtree(ROOT/'runs'/run, ignore_errors=True)


def test_one_process_does_what_a_bare_loop_does(tmp_path):
    "`fit` adds nothing to the mathematics: the same weights to the bit."
    c = training_config(CONFIG)
    train(tmp_path)
    model = small().train()
    named = dict(model.named_parameters())
    adam, ema = adamw(named, c), [p.detach().clone() for p in named.values()]
    for s in range(c['steps']):
        for g in adam.param_groups: g['lr'] = lr_at(s, c)
        loss(model, batch_at(s, N, c['batch'], c['seed']), seed_step(c['seed'], s))['loss'].backward()
        nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g['params']], c['clip'])
        adam.step()
        adam.zero_grad()
        ema_update(ema, list(named.values()), s, c['ema'])
    got = read_tensors(tmp_path/'model.safetensors', '')[0]
    assert all(torch.equal(got[k], e) for k, e in zip(named, ema))


@pytest.mark.parametrize('over', [dict(optimizer='muon'), dict(optimizer='muon', by_adamw=['0.', 'spare']), dict(accumulate=4)], ids=['muon', 'muon and adamw', 'shards'])
def test_cut_and_resumed_to_the_bit(tmp_path, over):
    count = []
    def cut(*a):
        count.append(1)
        if len(count) > 15*over.get('accumulate', 1): raise KeyboardInterrupt
        return loss(*a)
    train(tmp_path/'whole', **over)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'cut', loss=cut, **over)
    assert step_of(tmp_path/'cut') == 12
    train(tmp_path/'cut', **over)
    assert weights(tmp_path/'cut') == weights(tmp_path/'whole')


def test_a_state_of_adamw_is_refused_by_muon(tmp_path):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, loss=lambda *a: (_ for _ in ()).throw(KeyboardInterrupt) if (tmp_path/'resume.safetensors').exists() else loss(*a))
    with pytest.raises(DataError, match='optimizer: absent -> muon'): train(tmp_path, optimizer='muon')
    assert step_of(tmp_path) == 4


def test_waiting_is_told_or_not_known(tmp_path):
    def slow(*a):
        with waiting(): time.sleep(.004)
        return loss(*a)
    assert train(tmp_path/'told', loss=slow)['waiting'] > .2
    assert train(tmp_path/'silent')['waiting'] is None


if __name__ == '__main__':
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    globals()[f'job_{sys.argv[1]}'](Path(sys.argv[2]))
