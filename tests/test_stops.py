"Whatever ends a job in the middle of a write is reported as that, never as an error of the file"
import errno, os, pty, subprocess, sys
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kshot import checkpoint, record, standalone
from kshot.base import files
from kshot.base.files import LostProcess, StopSignal, Unwritable
from kshot.base.storage import open_study, storage_errors
from kshot.cli import work
from kshot.datasets.folder import Files, ImageFiles
from kshot.datasets.images import decode_images, save_images
from kshot.figures.page import write_report
from kshot.standalone import make_table
from kshot.tables import write_parquet, write_table
from processes import call_ranks

ENDS = dict(stop=StopSignal('told to stop'), interrupt=KeyboardInterrupt('Ctrl-C'),
            lost=LostProcess('rank 1 of 2 has lost another process'))
FRAME = pd.DataFrame(dict(path=['0000'], dataset='digits', split='test', epochs=1, seed=0, acc=.5))

def part(): return torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)

# what writes a file into a folder -> the file
WRITERS = dict(
    text=(lambda d: files.write_file(d/'a', 'text'), 'a'),
    json=(lambda d: files.write_json(d/'a', {}), 'a'),
    tensors=(lambda d: checkpoint.save_tensors(d/'a', {}, {}), 'a'),
    checkpoint=(lambda d: checkpoint.save_newest(d, {}, dict(epoch=1, log=[])),
                'checkpoint/epoch_00001.safetensors'),
    log=(lambda d: checkpoint.tidy(d, [{}]), 'log.jsonl'),
    record=(lambda d: record.write_run(d, dict(config={})), 'run.json'),
    parquet=(lambda d: write_parquet(FRAME, d/'a'), 'a'),
    table=(lambda d: write_table(FRAME, d/'a', 'digits'), 'a'),
    page=(lambda d: write_report(d/'a', 'title', []), 'a'),
    images=(lambda d: save_images(d/'a', dict(train=part(), test=part()), ['a']), 'a'))

def raises(error):
    def call(*_, **__): raise error
    return call

@pytest.fixture(params=ENDS)
def end(request): return ENDS[request.param]

@pytest.mark.parametrize('step', ['os.fsync', 'os.replace'])
@pytest.mark.parametrize('name', WRITERS)
def test_what_ends_a_write_comes_through(name, step, end, tmp_path):
    write, fname = WRITERS[name]
    fname = tmp_path/fname
    fname.parent.mkdir(exist_ok=True)
    fname.write_text('old')
    with patch(step, raises(end)), pytest.raises(type(end)) as e: write(tmp_path)
    assert e.value is end
    assert fname.read_text() == 'old' and not list(tmp_path.rglob('*.part'))

@pytest.mark.parametrize('name', WRITERS)
def test_a_full_disk_names_the_file(name, tmp_path):
    "What the test above relies on: its steps are those at which a file is written."
    write, fname = WRITERS[name]
    full = OSError(errno.ENOSPC, 'full')
    with patch('os.fsync', raises(full)), pytest.raises(Unwritable, match='cannot be written: No space') as e:
        write(tmp_path)
    assert os.path.basename(fname) in str(e.value)

def test_a_log_that_grows(end, tmp_path):
    with patch('kshot.base.files.to_json', raises(end)), pytest.raises(type(end)):
        files.append_log(tmp_path/'log', [{}])

def test_work_under_a_lock(end, tmp_path):
    with pytest.raises(type(end)), files.locked(tmp_path/'lock'): raise end
    assert not list(tmp_path.iterdir())

def test_a_storage(end, tmp_path):
    storage, locks = str(tmp_path/'search.journal'), tmp_path/'locks'
    study = open_study(storage, locks, 'one', ['maximize'], {})
    with patch('optuna.storages.journal.JournalFileBackend.append_logs', raises(end)):
        with pytest.raises(type(end)), storage_errors(storage): study.ask()
        with pytest.raises(type(end)): open_study(storage, locks, 'two', ['maximize'], {})

def test_a_report(end, tmp_path):
    with patch.object(work, 'make_report', raises(end)), pytest.raises(type(end)):
        work.try_report(tmp_path)

class Pool:
    def __init__(self, end): self.end = end
    def submit(self, *_): return self
    def result(self): raise self.end
    def shutdown(self, **_): pass

ERRORS = dict(worker=OSError(errno.EIO, 'of a worker')) | ENDS

@pytest.mark.parametrize('name', ERRORS)
def test_a_table_of_trainings(name, monkeypatch, tmp_path):
    "What ends a training says nothing about the log."
    error = ERRORS[name]
    monkeypatch.setattr(standalone, 'ProcessPoolExecutor', lambda *_, **__: Pool(error))
    monkeypatch.setattr(standalone, 'as_completed', list)
    with pytest.raises(type(error)) as e:
        make_table('digits', tmp_path, epochs=1, seeds=1, paths=['0000'], n_workers=1)
    assert e.value is error

at_any_moment = pytest.mark.parametrize('end', [ENDS['stop'], ENDS['interrupt']], ids=['stop', 'interrupt'])

@at_any_moment
def test_waiting_for_a_lock(end, tmp_path):
    with patch('kshot.base.files.flock', raises(end)), pytest.raises(type(end)):
        with files.locked(tmp_path/'lock', wait=True): pass
    with files.locked(tmp_path/'lock'): pass

@at_any_moment
def test_a_stop_is_no_broken_image(end, tmp_path):
    (tmp_path/'a').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'a'/'0.png')
    images = ImageFiles(Files(tmp_path, np.array([b'a/0.png']), torch.zeros(1)), px=8)
    with patch('PIL.Image.open', raises(end)):
        with pytest.raises(type(end)): images[0, 0]
        with pytest.raises(type(end)): decode_images([('0.png', tmp_path/'a'/'0.png')], 8)

STOPPED = """
import os, signal, sys
from kshot.base.distributed import distributed
from kshot.base.files import write_file
fsync = os.fsync
def stopped(fd):
    signal.raise_signal(signal.SIGTERM)
    fsync(fd)
with distributed(timeout=60) as w, distributed():
    os.fsync = stopped
    try: write_file(f'{sys.argv[1]}/{w.rank}', 'new')
    except Exception as e: print('caught', e)
"""

def test_a_signal_in_the_middle_of_a_write(tmp_path):
    code, out, err = call_ranks(2, STOPPED, tmp_path)
    assert code and not out and 'cannot be written' not in err
    for rank in 0, 1: assert f'LostProcess: rank {rank} of 2 was told to stop' in err
    assert not list(tmp_path.iterdir())

IN_A_TERMINAL = """
import os, subprocess, sys, warnings
from kshot.base import progress
from kshot.base.files import write_file
from kshot.cli.command import plain_end
progress._EVERY['terminal'] = 0
progress.shutil.get_terminal_size = lambda: os.terminal_size((80, 24))
other = 'from kshot.cli.command import say; say("another process")'
with plain_end('kshot test'):
    with progress.Progress('letters', 9) as bar:
        bar.update(1)
        warnings.warn('a warning')
        bar.update(2)
        print('a line')
        bar.update(3)
        print('half', end='')
        bar.update(4)
        bar.write('epoch 1')
        bar.update(5)
        subprocess.run([sys.executable, '-c', other])
        bar.update(6)
        END
"""

def lines_of_a_terminal(code):
    "Run code in a terminal; return the lines that stand there in the end."
    master, terminal = pty.openpty()
    with subprocess.Popen([sys.executable, '-c', code], stdin=terminal, stdout=terminal, stderr=terminal):
        os.close(terminal)
        written = b''
        while True:
            try: written += os.read(master, 4096)
            except OSError: break # the other end is closed
    os.close(master)
    lines = written.decode().split('\r\n')
    return [line.rpartition('\r\x1b[2K')[2] for line in lines] # from where it was last cleared

@pytest.mark.parametrize('end, last', [
    ("raise ValueError('wrong')", 'kshot test: wrong'),
    ('raise KeyboardInterrupt', 'kshot test: interrupted; run the same command again to resume'),
    ("raise RuntimeError('strange')", 'kshot test: RuntimeError: strange')])
def test_a_line_beside_a_bar_stands_alone(end, last):
    lines = lines_of_a_terminal(IN_A_TERMINAL.replace('END', end))
    assert lines[0].endswith('UserWarning: a warning') and lines[0].startswith('<string>')
    rest = lines[lines.index('a line'):]
    assert rest[:4] == ['a line', 'half', 'epoch 1', 'another process']
    assert rest[-2].startswith(last) and rest[-1] == '' and set(rest[4:-2]) <= {''}
    assert not any('█' in line for line in lines)
