"`kshot doctor` where something is broken: it must answer, and name what to do."
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from kshot.cli import doctor
from kshot.cli.doctor import (Finding, examine, look_data, look_devices, look_folders, look_lab,
                              look_tools, needed)

def ask(
    folder:Path,    # to work in
    broken:dict={}, # package -> code that is imported in its place
) -> tuple[int, dict]: # exit code, name -> finding
    "Call the doctor beside packages that are broken."
    for name,code in broken.items():
        (folder/name).mkdir()
        (folder/name/'__init__.py').write_text(code)
    env = dict(os.environ, PYTHONPATH=f'{folder}{os.pathsep}{ROOT}', KSHOT_HOME=str(folder/'home'))
    code = 'from kshot.cli.doctor import doctor; doctor(["--json"])'
    argv = [sys.executable, '-c', code]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=folder, timeout=300)
    assert 'Traceback' not in done.stderr, done.stderr
    result = json.loads(done.stdout)
    assert result['works'] == (done.returncode == 0)
    return done.returncode, {finding['name']: finding for finding in result['findings']}

def by_name(findings) -> dict[str, Finding]: return {finding.name: finding for finding in findings}

def test_all_is_well(tmp_path):
    code, findings = ask(tmp_path)
    assert code == 0 and {*needed(), 'kshot', 'cpu', 'runs', 'table digits'} <= set(findings)
    assert findings['torch']['found'] in torch.__version__
    assert not (tmp_path/'home').exists() and not (tmp_path/'runs').exists() # an examination leaves nothing

def test_torchvision_of_another_torch(tmp_path):
    error = 'raise RuntimeError("operator torchvision::nms does not exist")'
    code, findings = ask(tmp_path, {'torchvision': error})
    torchvision = findings['torchvision']
    assert code == 1 and torchvision['state'] == 'bad' and 'nms does not exist' in torchvision['found']
    assert torchvision['do'].endswith('torch torchvision')
    others = [findings[name]['state'] for name in ('torch', 'cpu', 'runs')]
    assert others == ['ok']*3 # the rest was examined too

def test_a_package_that_kills_the_process(tmp_path):
    code, findings = ask(tmp_path, {'scipy': 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'})
    assert code == 1 and 'killed by signal 11' in findings['next examination']['found']
    assert findings['torch']['state'] == 'ok'

def test_without_fastcore(tmp_path):
    code, findings = ask(tmp_path, {'fastcore': 'raise ImportError("gone")'})
    assert code == 1 and 'gone' in findings['fastcore']['found']
    assert findings['fastai']['state'] == 'bad' and findings['numpy']['state'] == 'ok'

def test_runs_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    finding = by_name(look_folders(tmp_path/'file'/'runs'))['runs']
    assert finding.state == 'bad' and 'Not a directory' in finding.found and '--runs' in finding.do

def test_an_examination_that_hangs(monkeypatch, tmp_path):
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{ROOT}')
    (tmp_path/'torch.py').write_text('import threading; threading.Event().wait()')
    *_, last = doctor.examine_apart(tmp_path, seconds=3)
    assert last.state == 'bad' and 'no answer in 3 s' in last.found

def test_an_examination_that_fails(monkeypatch, tmp_path):
    def look():
        yield Finding('data', 'first', 'ok', '')
        raise PermissionError(13, 'Permission denied')
    def looks(runs): return dict(data=look, tools=look_tools)
    monkeypatch.setattr(doctor, 'looks', looks)
    first, failed, *others = examine(tmp_path)
    assert first.name == 'first' and others[0].group == 'tools'
    assert failed.state == 'less' and 'Permission denied' in failed.found

def test_data(monkeypatch, tmp_path):
    monkeypatch.setenv('KSHOT_HOME', str(tmp_path))
    monkeypatch.setenv('KSHOT_DATA', str(tmp_path/'none'))
    (tmp_path/'tables').mkdir()
    (tmp_path/'tables'/'mine.parquet').write_bytes(b'PAR1 is not enough')
    findings = by_name(look_data())
    assert findings['table digits'].state == 'ok'
    assert findings['KSHOT_DATA'].state == findings['cifar10'].state == 'less'
    assert findings['table mine'].state == 'less' and 'mine.parquet' in findings['table mine'].do
    assert 'kshot tables import nb201' in findings['table nb201'].do

def test_data_that_can_be_imported(monkeypatch, tmp_path):
    monkeypatch.setenv('KSHOT_HOME', str(tmp_path))
    monkeypatch.setenv('KSHOT_DATA', str(tmp_path))
    (tmp_path/'nas_bench_macro_cifar10.parquet').write_bytes(b'')
    (tmp_path/'cifar10_part0.npz').write_bytes(b'')
    findings = by_name(look_data())
    assert findings['table macro'].found.startswith('importable') and findings['cifar10'].state == 'ok'

NO_GPU = [('13.0', True, 'finds no GPU'), (None, True, 'without CUDA'), ('13.0', False, 'no NVIDIA GPU')]

@pytest.mark.parametrize('version, has_driver, text', NO_GPU)
def test_no_gpu(monkeypatch, version, has_driver, text):
    def which(name): return '/usr/bin/nvidia-smi' if has_driver else None
    def nowhere(fname): return Path('/nowhere')/str(fname).lstrip('/')
    monkeypatch.setattr(torch.cuda, 'device_count', int)
    monkeypatch.setattr(torch.version, 'cuda', version)
    monkeypatch.setattr(doctor.shutil, 'which', which)
    monkeypatch.setattr(doctor, 'FilePath', nowhere)
    finding = by_name(look_devices())['cuda']
    assert finding.state == 'less' and text in finding.found and bool(finding.do) == has_driver

def test_gpus_of_two_ages(monkeypatch):
    Card = namedtuple('Card', 'name total_memory major')
    cards = [Card('new', 80e9, 9), Card('old', 16e9, 7)]
    def count(): return len(cards)
    monkeypatch.setattr(torch.cuda, 'device_count', count)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', cards.__getitem__)
    monkeypatch.setattr(torch.distributed, 'is_nccl_available', lambda: False)
    findings = by_name(look_devices())
    assert findings['cuda'].found.startswith('2 GPUs')
    assert [findings[f'cuda:{i}'].lost for i in (0, 1)] == ['', 'speed of large runs']
    assert findings['distributed'].state == 'less' and 'lacks nccl' in findings['distributed'].lost

def test_little_shared_memory(monkeypatch):
    if not Path('/dev/shm').is_dir(): pytest.skip('no /dev/shm here')
    Usage = namedtuple('Usage', 'total')
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda folder: Usage(64e6))
    assert '--shm-size' in by_name(look_devices())['shared memory'].do

def test_no_tools_and_no_extensions(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    monkeypatch.setattr(sys, 'base_prefix', str(tmp_path))
    missing = {finding.name for finding in look_tools() if finding.state == 'less'}
    assert missing >= {'git', 'quarto', 'chromium'}
    browser = [finding for finding in look_lab() if 'browser' in finding.name]
    assert browser and all(finding.state == 'less' and 'widgets' in finding.lost for finding in browser)

def test_tools_are_found_without_an_import(monkeypatch):
    monkeypatch.setattr(doctor, 'import_module', lambda name: pytest.fail(f'{name} is imported'))
    assert {'onnx', 'onnxscript'} <= {finding.name for finding in look_tools()}

def test_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor, 'version', lambda name: '1.2.post3')
    finding = doctor.check_package('numpy', '1.10')
    assert finding.state == 'bad' and finding.do == "pip install -U 'numpy>=1.10'"
