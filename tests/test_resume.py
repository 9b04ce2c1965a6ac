"""A training that is killed, that meets a full disk or a broken file: what it leaves, and what it ends with.

`python tests/test_resume.py FOLDER` is the training that the tests kill; `python tests/test_resume.py overhead` measures what the loop costs."""
import errno, json, multiprocessing, os, random, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path
import pytest
import torch
from torch import nn
from tqdm import tqdm
from ecgflowcmr.ecg import DataError
from ecgflowcmr.train import NotFinite, fit, finish_stage, finished, load_stage, read_log, read_tensors, stage_folder

CONFIG = dict(steps=400, batch=16, lr=3e-3, warmup=50, ema=.99, clip=.5, seed=3, log_every=10, save_steps=4)
SHORT = CONFIG | dict(steps=120)
N = 50  # items; batches run over the ends of epochs


def small():
    "A net with dropout and a running statistic, the same at every call."
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(.1), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


DATA = torch.randn(N, 8, generator=torch.Generator().manual_seed(1))


def loss(model, index, rng):
    "Predict the first four numbers from noisy eight."
    noisy = DATA[index] + .1*torch.randn(len(index), 8, generator=rng)
    return dict(loss=nn.functional.mse_loss(model(noisy), DATA[index, :4]), noise=(noisy - DATA[index]).abs().mean())


def train(folder, config=SHORT, loss=loss, model=None): return fit(model or small(), loss, N, config, folder, device='cpu', desc=None)


def weights(folder): return (Path(folder)/'model.safetensors').read_bytes()


def state(folder): return json.loads(read_tensors(Path(folder)/'resume.safetensors', '')[1]['resume'])


def job(folder):
    "The training of CONFIG, in a process of its own."
    tqdm.set_lock(threading.RLock())    # not a semaphore between processes, which a kill would leak
    torch.set_num_threads(1)
    train(folder, CONFIG)


def command(folder):
    "The same as a person starts it."
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    return subprocess.Popen([sys.executable, __file__, str(folder)], env=env, stderr=subprocess.PIPE, text=True)


def logged(folder):
    "The last step in the log."
    try: return int((Path(folder)/'log.csv').read_text().split('\n')[-2].split(',')[0])
    except (FileNotFoundError, IndexError, ValueError): return 0


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "The weights of SHORT, trained in one go."
    folder = tmp_path_factory.mktemp('uninterrupted')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder)
    yield weights(folder)
    torch.set_num_threads(threads)


def test_killed_at_any_moment_ends_with_the_same_weights(tmp_path):
    fresh = multiprocessing.get_context('forkserver')   # new processes without six times the seconds that importing torch takes
    fresh.set_forkserver_preload(['pytest', 'ecgflowcmr.train', 'lightning_fabric'])
    one, cut, seed = command(tmp_path/'one'), tmp_path/'cut', random.randrange(10**6)
    print('seed of the moments:', seed)
    chance, kills, states = random.Random(seed), 0, []
    for share in (.02, .15, .3, .5, .65, .8):
        until, deadline = int(share*CONFIG['steps']), time.time() + 60
        process = fresh.Process(target=job, args=(cut,))
        process.start()
        while logged(cut) < until and process.is_alive() and time.time() < deadline: time.sleep(.002)
        time.sleep(chance.random()*.04)     # a save takes milliseconds and comes every fourth step: many moments fall into one
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        states.append(state(cut)['step'] if (cut/'resume.safetensors').exists() else 0)
    last = command(cut)
    for c in (one, last): assert c.wait(timeout=120) == 0, c.stderr.read()
    for c in (one, last): c.stderr.close()
    print('resume states at the kills:', states)
    assert kills == len(states) and states == sorted(states) and states[1] < states[-1] < CONFIG['steps'], (kills, states)
    assert weights(cut) == weights(tmp_path/'one')
    a, b = read_log(tmp_path/'one'), read_log(cut)
    assert all((a[k] == b[k]).all() for k in a if k != 'seconds')
    assert (b['seconds'][1:] >= b['seconds'][:-1]).all()
    assert sorted(p.name for p in cut.iterdir() if not p.name.startswith('.')) == ['log.csv', 'model.safetensors', 'trained.json']


def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('where', ['fsync', 'replace'])
def test_full_disk_keeps_the_earlier_state(tmp_path, monkeypatch, uninterrupted, where):
    count = []
    def until_full(model, index, rng):
        count.append(1)
        if len(count) == 70: monkeypatch.setattr(os, where, full)
        return loss(model, index, rng)
    with pytest.raises(OSError, match='resume.safetensors could not be written.*No space left.*is kept') as e: train(tmp_path, loss=until_full)
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert state(tmp_path)['step'] == 68
    train(tmp_path)
    assert weights(tmp_path) == uninterrupted
    assert not list(tmp_path.glob('.tmp*'))


@pytest.mark.skipif(sys.platform == 'win32', reason='no limits on file sizes there')
def test_a_write_that_the_system_cuts_short(tmp_path, uninterrupted):
    import resource
    count, before = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    def until_full(model, index, rng):
        count.append(1)
        if len(count) == 70: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return loss(model, index, rng)
    try:
        with pytest.raises(OSError, match='resume.safetensors could not be written'): train(tmp_path, loss=until_full)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state(tmp_path)['step'] == 68
    train(tmp_path)
    assert weights(tmp_path) == uninterrupted


def stop_at(step, what=KeyboardInterrupt):
    "A loss that raises at a step."
    count = []
    def stopping(model, index, rng):
        count.append(1)
        if len(count) > step: raise what
        return loss(model, index, rng)
    return stopping


def test_cut_between_the_weights_and_the_note(tmp_path, monkeypatch, uninterrupted):
    import ecgflowcmr.train as module
    monkeypatch.setattr(module, 'write_json', full)
    with pytest.raises(OSError): train(tmp_path)
    assert (tmp_path/'model.safetensors').exists() and (tmp_path/'resume.safetensors').exists()
    monkeypatch.undo()
    train(tmp_path)
    assert weights(tmp_path) == uninterrupted


@pytest.mark.parametrize('how', ['byte', 'short', 'empty', 'other'])
def test_broken_resume_state_is_refused_by_name(tmp_path, how):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, loss=stop_at(30))
    file = tmp_path/'resume.safetensors'
    good = file.read_bytes()
    middle = len(good)//2
    bad = dict(byte=good[:middle] + bytes([good[middle] ^ 4]) + good[middle+1:], short=good[:middle], empty=b'', other=b'PK\3\4'*1000)[how]
    file.write_bytes(bad)
    with pytest.raises(DataError, match='resume.safetensors.*Delete resume.safetensors') as e: train(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert file.read_bytes() == bad and not (tmp_path/'model.safetensors').exists()


def test_resume_state_of_other_settings_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt): train(tmp_path, loss=stop_at(30))
    with pytest.raises(DataError, match='lr: 0.003 -> 0.001'): train(tmp_path, config=SHORT | dict(lr=1e-3))


def stage(run, model, **over):
    "A stage as the chapters write them."
    config = SHORT | over
    folder = stage_folder(run, 'net', config)
    if finished(folder): return load_stage(folder, model)
    train(folder, config, model=model)
    finish_stage(folder, dict(loss=1.), note='a test')
    return model


@pytest.mark.parametrize('how', ['altered', 'missing', 'half'])
def test_altered_weights_are_refused_by_name(tmp_path, how):
    run = tmp_path/'run'
    first = stage(run, small())
    file = run/'net'/'model.safetensors'
    again = stage(run, nn.Sequential(*[m for m in small()]))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    good = file.read_bytes()
    if how == 'missing': file.unlink()
    else: file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if how == 'altered' else good[:len(good)//2])
    fresh = small()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    for f in (lambda: load_stage(run/'net', fresh), lambda: stage(run, fresh)):
        with pytest.raises(DataError, match='model.safetensors') as e: f()
        assert str(file) in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_done_tells_what_was_done(tmp_path):
    stage(tmp_path/'run', small())
    done = json.loads((tmp_path/'run'/'net'/'done.json').read_text())
    assert done['figures'] == dict(loss=1.) and done['note'] == 'a test' and done['device'] == 'cpu' and done['seconds'] > 0
    assert set(done['files']) == {'config.json', 'model.safetensors'} and done['machine']['cores'] >= 1
    assert set(done['versions']) == {'python', 'torch', 'numpy', 'ecgflowcmr'}
    assert done['training']['steps'] == SHORT['steps'] and done['training']['steps_per_s'] > 0 and done['training']['peak_mb'] > 10


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_not_a_number_stops_and_names_the_step(tmp_path, bad):
    count = []
    def breaking(model, index, rng):
        count.append(1)
        out = loss(model, index, rng)
        return out | dict(loss=out['loss'] * (bad if len(count) == 46 else 1))
    with pytest.raises(NotFinite, match=f'loss is {bad} in step 45.*after step 44.*resume.safetensors') as e: train(tmp_path/'stage', loss=breaking)
    assert str(tmp_path/'stage') in str(e.value)
    assert state(tmp_path/'stage')['step'] == 44
    assert all(v.isfinite().all() for v in read_tensors(tmp_path/'stage'/'resume.safetensors', '')[0].values())


def test_other_settings_get_a_folder_of_their_own(tmp_path, capsys):
    run = tmp_path/'run'
    a = stage_folder(run, 'net', SHORT)
    assert capsys.readouterr().out == ''
    b = stage_folder(run, 'net', SHORT | dict(lr=1e-3, width=4))
    out = capsys.readouterr().out
    assert a == run/'net' and b.parent == run and b.name.startswith('net-') and b != a
    assert 'lr: 0.003 -> 0.001' in out and 'width: absent -> 4' in out and b.name in out
    assert stage_folder(run, 'net', SHORT | dict(lr=1e-3, width=4)) == b
    assert stage_folder(run, 'net', SHORT | dict(save_every=5.)) == a


def test_bf16_trains(tmp_path):
    kinds = []
    def watch(model, index, rng):
        kinds.append(model[0](DATA[index]).dtype)
        return loss(model, index, rng)
    train(tmp_path, SHORT | dict(precision='bf16'), watch)
    log = read_log(tmp_path)
    assert kinds[0] == torch.bfloat16 and log['loss'][-1] < .8*log['loss'][0]
    assert {v.dtype for v in read_tensors(tmp_path/'model.safetensors', '')[0].values()} == {torch.float32, torch.int64}


def test_device_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="'cuda:77' is not there.*cpu"): fit(small(), loss, N, SHORT, tmp_path, device='cuda:77')


def overhead(steps=50, rounds=60):
    "CPU milliseconds a step, in turns of 50 steps: a bare loop of the same mathematics, and the steps of `fit`."
    import numpy as np
    from ecgflowcmr.train import Training, ema_update
    torch.set_num_threads(1)
    data, folder = torch.randn(1000, 128), Path(tempfile.mkdtemp())
    def net(): return nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(128, 128), nn.GELU())])
    def error(model, index, rng=None): return dict(loss=(model(data[index]) - data[index]).square().mean())
    model = net()
    params = list(model.parameters())
    adam, ema = torch.optim.AdamW(params, fused=True), [p.detach().clone() for p in params]
    ours = Training(net(), error, 1000, dict(steps=steps*rounds, batch=8), folder, 'cpu')
    def bare_steps():
        for s in range(steps):
            error(model, torch.randint(1000, (8,)))['loss'].backward()
            nn.utils.clip_grad_norm_(params, 1.)
            adam.step()
            adam.zero_grad()
            ema_update(ema, params, s, .999)
    def our_steps():
        for _ in range(steps):
            ours.one_step()
            ours.settle()
        ours.log_row()
    def cost(f):
        t = time.process_time()
        f()
        return (time.process_time() - t)/steps*1e3
    a = np.array([(cost(bare_steps), cost(our_steps)) for _ in range(rounds)])
    print('bare loop {:.2f} ms, fit {:.2f} ms,'.format(*np.median(a, 0)), f'difference {np.median(a[:, 1] - a[:, 0]):.2f} ms a step (medians of {rounds})')


if __name__ == '__main__':
    if sys.argv[1] == 'overhead': overhead()
    else: job(sys.argv[1])
