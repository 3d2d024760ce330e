"What `kshot_doctor` says where something is broken: it must answer, and name what to do."
import json, os, subprocess, sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from kshot.cli import doctor
from kshot.cli.doctor import examine, look_data, look_devices, look_folders, look_lab, look_tools, needed

def ask(tmp_path, broken={}):
    "Exit code and findings by name, beside packages that are broken."
    for name,code in broken.items(): (tmp_path/name).mkdir(); (tmp_path/name/'__init__.py').write_text(code)
    env = dict(os.environ, PYTHONPATH=str(tmp_path), KSHOT_HOME=str(tmp_path/'home'))
    code = 'from kshot.cli.doctor import doctor; doctor(["--json"])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert 'Traceback' not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    assert told['works'] == (done.returncode == 0)
    return done.returncode, {f['name']: f for f in told['findings']}

def by_name(findings): return {f.name: f for f in findings}

def test_all_is_well(tmp_path):
    code, found = ask(tmp_path)
    assert code == 0 and {*needed(), 'kshot', 'cpu', 'runs', 'table digits'} <= set(found)
    assert found['torch']['found'] == torch.__version__ or found['torch']['found'] in torch.__version__
    assert not (tmp_path/'home').exists() and not (tmp_path/'runs').exists() # looking leaves nothing

def test_torchvision_of_another_torch(tmp_path):
    code, found = ask(tmp_path, {'torchvision': 'raise RuntimeError("operator torchvision::nms does not exist")'})
    assert code == 1 and found['torchvision']['state'] == 'bad' and 'nms does not exist' in found['torchvision']['found']
    assert found['torchvision']['do'].endswith('torch torchvision')
    assert found['torch']['state'] == found['cpu']['state'] == found['runs']['state'] == 'ok' # it looked on

def test_a_package_that_ends_the_process(tmp_path):
    code, found = ask(tmp_path, {'scipy': 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'})
    assert code == 1 and 'killed by signal 11' in found['next look']['found'] and found['torch']['state'] == 'ok'

def test_without_fastcore(tmp_path):
    code, found = ask(tmp_path, {'fastcore': 'raise ImportError("gone")'})
    assert code == 1 and 'gone' in found['fastcore']['found'] and found['fastai']['state'] == 'bad' and found['numpy']['state'] == 'ok'

def test_runs_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    found = by_name(look_folders(tmp_path/'file'/'runs'))['runs']
    assert found.state == 'bad' and 'Not a directory' in found.found and '--runs' in found.do

def test_a_look_that_hangs(monkeypatch, tmp_path):
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (tmp_path/'torch.py').write_text('import threading; threading.Event().wait()')
    *_, last = doctor.examine_apart(tmp_path, seconds=3)
    assert last.state == 'bad' and 'no answer in 3 s' in last.found

def test_a_look_that_fails(monkeypatch, tmp_path):
    def look(): yield doctor.Finding('data', 'first', 'ok', ''); raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(doctor, 'looks', lambda runs: dict(data=look, tools=look_tools))
    found = list(examine(tmp_path))
    assert [found[0].name, found[1].state] == ['first', 'less'] and 'Permission denied' in found[1].found and found[2].group == 'tools'

def test_data(monkeypatch, tmp_path):
    monkeypatch.setenv('KSHOT_HOME', str(tmp_path))
    monkeypatch.setenv('KSHOT_DATA', str(tmp_path/'none'))
    (tmp_path/'tables').mkdir()
    (tmp_path/'tables'/'mine.parquet').write_bytes(b'PAR1 is not enough')
    found = by_name(look_data())
    assert found['table digits'].state == 'ok' and found['KSHOT_DATA'].state == found['cifar10'].state == 'less'
    assert found['table mine'].state == 'less' and 'mine.parquet' in found['table mine'].do
    assert 'kshot_tables import nb201' in found['table nb201'].do
    monkeypatch.setenv('KSHOT_DATA', str(tmp_path))
    (tmp_path/'nas_bench_macro_cifar10.parquet').write_bytes(b'')
    (tmp_path/'cifar10_part0.npz').write_bytes(b'')
    found = by_name(look_data())
    assert found['table macro'].found.startswith('importable') and found['cifar10'].state == 'ok'

@pytest.mark.parametrize('version, driver, word', [('13.0', True, 'finds no GPU'), (None, True, 'without CUDA'), ('13.0', False, 'no NVIDIA GPU')])
def test_no_gpu(monkeypatch, version, driver, word):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.version, 'cuda', version)
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: '/usr/bin/nvidia-smi' if driver else None)
    monkeypatch.setattr(doctor, 'Path', lambda p: Path('/nowhere')/str(p).lstrip('/'))
    found = by_name(look_devices())['cuda']
    assert found.state == 'less' and word in found.found and bool(found.do) == driver

def test_gpus_of_two_ages(monkeypatch):
    Card = namedtuple('Card', 'name total_memory major')
    cards = [Card('new', 80e9, 9), Card('old', 16e9, 7)]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', cards.__getitem__)
    monkeypatch.setattr(torch.distributed, 'is_nccl_available', lambda: False)
    found = by_name(look_devices())
    assert found['cuda'].found.startswith('2 GPUs') and [found[f'cuda:{i}'].lost for i in (0, 1)] == ['', 'speed of large runs']
    assert found['distributed'].state == 'less' and 'lacks nccl' in found['distributed'].lost

def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda p: namedtuple('Usage', 'total')(64e6))
    if Path('/dev/shm').is_dir(): assert '--shm-size' in by_name(look_devices())['shared memory'].do

def test_no_tools_and_no_extensions(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(sys, 'prefix', str(tmp_path)); monkeypatch.setattr(sys, 'base_prefix', str(tmp_path))
    assert {f.name for f in look_tools() if f.state == 'less'} >= {'git', 'quarto', 'chromium'}
    assert all(f.state == 'less' and 'widgets' in f.lost for f in look_lab() if 'browser' in f.name)

def test_tools_are_looked_up_and_not_imported(monkeypatch):
    monkeypatch.setattr(doctor, 'import_module', lambda name: pytest.fail(f'{name} is imported'))
    assert {'onnx', 'onnxscript'} <= {f.name for f in look_tools()}

def test_a_floor_that_is_not_met(monkeypatch):
    monkeypatch.setattr(doctor, 'version', lambda name: '1.2.post3')
    found = doctor.check_package('numpy', '1.10')
    assert found.state == 'bad' and found.do == "pip install -U 'numpy>=1.10'"
