"Weight files of the feature extractors: what is missing, damaged or disguised, and the real ones where they are."
import math, os, pickle, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from ecgflowcmr.ecg import DataError
from ecgflowcmr.extractors import STANDARD, LPIPS, check_cines, find_weights, load_published, lpips_heads, random_extractor, random_lpips, standard
from ecgflowcmr.files import sha256_file

names = pytest.mark.parametrize('name', STANDARD)
UNUSED = ('classifier', 'AuxLogits', 'fc')


def cines(b=1, t=9, size=96, seed=0): return torch.rand(b, t, size, size, generator=torch.Generator().manual_seed(seed))*2 - 1


def arrays(name, seed=0):
    "Seeded random arrays under the published names; those that are not used take no room."
    rng = torch.Generator().manual_seed(seed)
    with torch.device('meta'): shapes = {k: v.shape for k, v in STANDARD[name].build().state_dict().items()}

    def fill(k, n):
        if k.endswith('num_batches_tracked'): return torch.tensor(0)
        if k.split('.')[0] in UNUSED: return torch.ones(1).expand(n)
        if k.endswith(('running_var', 'bn.weight')): return torch.rand(n, generator=rng) + .5
        return torch.randn(n, generator=rng)*((2/math.prod(n[1:]))**.5 if len(n) > 1 else .1)
    return {k: fill(k, n) for k, n in shapes.items()}


def save(name, folder, state):
    path = folder/STANDARD[name].file
    torch.save(state, path)
    return replace(STANDARD[name], prefix=sha256_file(path)[:8]), path


@names
def test_missing_names_file_folder_and_source(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    with pytest.raises(DataError) as e: standard(name)
    for part in (STANDARD[name].file, str(tmp_path/'torch'/'hub'/'checkpoints'), STANDARD[name].url, 'nothing is downloaded'): assert part in str(e.value)
    assert not (tmp_path/'torch').exists()


@names
def test_torch_home_folder_and_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path/'hub'/'checkpoints'
    folder.mkdir(parents=True)
    path = folder/STANDARD[name].file
    path.write_bytes(b'x')
    assert find_weights(STANDARD[name]) == find_weights(STANDARD[name], folder) == find_weights(STANDARD[name], path) == path


@names
def test_hash_is_checked_before_the_file_is_read(name, tmp_path, monkeypatch):
    path = tmp_path/STANDARD[name].file
    path.write_bytes(b'no weights at all')
    read = []
    monkeypatch.setattr(torch, 'load', lambda *a, **k: read.append(a))
    with pytest.raises(DataError, match='SHA-256'): standard(name, path, sha256='0'*16)
    assert not read
    if STANDARD[name].prefix:
        with pytest.raises(DataError, match=f'begins with {STANDARD[name].prefix}'): standard(name, path)
        assert not read


class Program:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))


@pytest.mark.parametrize('how', ['torch', 'pickle', 'nested'])
def test_a_pickle_never_runs(how, tmp_path):
    ran, path = tmp_path/'ran', tmp_path/'i3d_pretrained_400.pt'
    bad = Program(ran) if how != 'nested' else {'logits.conv3d.bias': torch.zeros(400), 'more': [Program(ran)]}
    path.write_bytes(pickle.dumps(bad)) if how == 'pickle' else torch.save(bad, path)
    with pytest.raises(DataError, match='i3d_pretrained_400.pt'): standard('i3d-logits', path)
    assert not ran.exists()


@pytest.mark.parametrize('keep', [0, 1, 100, .5, .999])
@pytest.mark.parametrize('legacy', [False, True])
def test_truncated(keep, legacy, tmp_path):
    path = tmp_path/'i3d_pretrained_400.pt'
    torch.save(arrays('i3d-logits'), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep if isinstance(keep, int) else int(len(whole)*keep)])
    with pytest.raises(DataError, match='published at|get it from'): standard('i3d-logits', path)


def test_torchscript_is_refused(tmp_path):
    path = tmp_path/'i3d_pretrained_400.pt'  # another file of the same network, i3d_torchscript.pt, is often taken for it
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(DataError, match='TorchScript'): standard('i3d-logits', path)


def test_files_of_other_networks_are_refused(tmp_path):
    for mine, other in (('inception-tf', 'i3d-logits'), ('i3d-features', 'inception-tf'), ('inception-torchvision', 'inception-tf')):
        entry, path = save(mine, tmp_path, arrays(other))
        with pytest.raises(DataError, match='of this network|missing'): load_published(entry, path)


@names
def test_strict_load_and_run(name, tmp_path):
    state = arrays(name)
    entry, path = save(name, tmp_path, state)
    e = load_published(entry, path)
    x = cines(1, 9) if e.input == 'video' else cines(1, 2)
    out = e(x)
    assert out.shape == ((1 if e.input == 'video' else 2), e.num_features) and out.isfinite().all() and out.dtype == torch.float32
    assert e.sha256 == sha256_file(path) and e.sha256[:8] in e.describe() and name in e.describe() and e.family == 'standard'
    assert isinstance(e, LPIPS) == (name == 'lpips-alex') and not any(p.requires_grad for p in e.parameters())
    last = next(k for k in reversed(state) if k.split('.')[0] not in UNUSED and not k.endswith('tracked'))
    for bad, why in (({k: v for k, v in state.items() if k != last}, 'missing'), (state | {'x.weight': torch.zeros(1)}, 'not of this network'), (state | {last: state[last][:1]}, 'another shape'),
                     (state | {last: state[last]/0}, 'not finite')):
        entry, path = save(name, tmp_path, bad)
        with pytest.raises(DataError, match=why): load_published(entry, path)


def test_heads_are_the_published_ones(tmp_path):
    assert [len(o) for o in lpips_heads()] == [64, 192, 384, 256, 256]
    path = tmp_path/'alex.pth'
    torch.save({f'lin{i}.model.1.weight': o.view(1, -1, 1, 1) for i, o in enumerate(lpips_heads())}, path)
    with pytest.raises(DataError, match='df73285e'): lpips_heads(path)  # equal numbers, another file


def test_random_family_is_named_so():
    for e in (random_extractor(), random_extractor('video'), random_lpips()):
        assert e.family == 'random' and e.name.startswith('random-') and e.describe().startswith('random-')


def test_checks_name_the_scale():
    x = cines()
    for bad, says in (((x + 1)*127.5, 'bytes'), ((x + 1)/2, r'\[0, 1\]'), (((x + 1)*127.5).byte(), 'stored bytes'), (x/0, 'NaN or infinity'), (x[0], '3 axes'), (x[:0], 'nothing'), (x[:, :1].expand(1, 9, 96, 96), 'constant')):
        with pytest.raises(DataError, match=says): check_cines(bad)


def test_import_reads_and_prints_nothing():
    out = subprocess.run([sys.executable, '-c', 'import ecgflowcmr.extractors, sys; print("torchvision" in sys.modules, "torchmetrics" in sys.modules)'], capture_output=True, text=True, env=os.environ | {'TORCH_HOME': '/nonexistent'})
    assert out.returncode == 0 and out.stdout.split() == ['False', 'False'], out.stderr


@names
def test_the_real_weights(name):
    "Where the published files are: they load, and two different pictures are told apart."
    try: find_weights(STANDARD[name])
    except DataError as e: pytest.skip(str(e))
    e = standard(name)
    x = cines(2, 9)
    out = e(x)
    assert out.isfinite().all() and (out[0] != out[-1]).any()
    if isinstance(e, LPIPS): assert float(e.distance(x, x).abs().max()) == 0 and float(e.distance(x[:1], x[1:]).min()) > 0
