"Files of benchmarks: imported, damaged, malicious; and, where the shared data is, whole"
import bz2
import json
import os
import pickle
import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import processes
from helpers.processes import command

from kshot.baselines import baselines
from kshot.benchmark import get_space
from kshot.cli.tables import tables
from kshot.datasets.tfrecord import masked_crc32c
from kshot.tables import (devices, get_table, import_table, latency, list_tables, read_table,
                          write_table)

@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder of tables."
    monkeypatch.setenv('KSHOT_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('KSHOT_DATA', raising=False)
    return tmp_path/'home'

@pytest.fixture
def call(capsys):
    "`kshot tables` in this process: exit code, standard output and error."
    def run(*args):
        capsys.readouterr()
        code = 0
        try: tables([*map(str, args)])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return run

# Sources, small ones

CELL = '|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|none~2|'

class Touch:
    "Unpickled without care it makes a file."
    def __init__(self, fname): self.fname = fname
    def __reduce__(self): return os.system, (f'touch {self.fname}',)

def nats_cell(arch_str=CELL, **more):
    training = dict(params=.3, flop=47., seed=777, epochs=200, eval_losses={'ori-test@199': .3},
                    eval_acc1es={'ori-test@199': 90., 'ori-test@0': 10.})
    return {'200': dict(arch_str=arch_str, all_results={('cifar10', 777): training | more})}

def pack(o): return bz2.compress(pickle.dumps(o))

def checksum(part): return struct.pack('<I', masked_crc32c([part])[0])

def tfrecord(fname, records):
    with fname.open('wb') as f:
        for record in records:
            size = struct.pack('<Q', len(record))
            f.write(size + checksum(size) + record + checksum(record))
    return fname

def macro_file(fname, n=3):
    space = get_space('macro')
    networks = {}
    for i in range(n):
        acc = dict(test_acc=[50+i, 51+i, 52+i], mean_acc=0, std=0)
        networks[space.format(space.at(i))] = dict(acc, params=i+1, flops=9-i)
    fname.write_text(json.dumps(networks))
    return fname

def nats_folder(folder, n=3, **more):
    space = get_space('nb201')
    folder.mkdir()
    for i in range(n):
        cell = nats_cell(space.native(space.at(i)), **more)
        (folder/f'{i:06d}.pickle.pbz2').write_bytes(pack(cell))
    return folder

# The command

def test_import_show_list(home, tmp_path, call):
    code, out, err = call('import', 'macro', macro_file(tmp_path/'m.json'), '--json')
    assert code == 0, err
    split = dict(dataset='cifar10', split='test', epochs=50, paths=3, seeds=3)
    spread = dict(acc_min=.5, acc_median=.52, acc_max=.54)
    result = json.loads(out)
    assert result.pop('splits') == [split | spread]
    assert result == dict(name='macro', space='macro', source='m.json', devices=[])
    assert os.listdir(home/'tables') == ['macro.parquet']
    assert json.loads(call('show', 'macro', '--json')[1]) == json.loads(out)
    listed = json.loads(call('list', '--json')[1])['tables']
    assert dict(name='macro', kind='imported', file=str(home/'tables/macro.parquet')) in listed
    code, out, err = call('baselines', 'macro', '--json')
    assert code == 0, err
    taus = {name: row['tau'] for name,row in json.loads(out)['baselines'].items()}
    assert taus == {'macs': -1, 'params': 1, 'ceiling': 1, 'seed 0 against seed 1': 1}

def test_json_is_alone_on_stdout(home, tmp_path):
    "A long import shows a bar, which is not part of the result."
    source = nats_folder(tmp_path/'NATS-simple', 120)
    argv = 'import', 'nb201', source, '--save_as', 'nats', '--json'
    code, out, err = processes.call(command('tables'), *argv)
    assert code == 0, err
    result = json.loads(out)
    assert result['name'] == 'nats' and result['splits'][0]['paths'] == 120

@pytest.mark.parametrize('args,text', [
    (['show', 'nb201'], 'expected one of digits, views or a .parquet file; kshot tables import nb201 FILE'),
    (['import', 'cifar', 'x'], "space 'cifar', expected one of digits, views, macro"),
    (['import', 'macro'], 'no source of table macro'),
    (['drop'], "subcommand 'drop', expected list"),
    (['baselines', 'digits', '--epochs', '7'], 'has no epochs 7, expected one of [20]')])
def test_wrong_argument(args, text, home, call):
    code, out, err = call(*args)
    assert (code, out, err.count('\n')) == (2, '', 1) and text in err

# Damaged and malicious sources. Functions of a folder, and of a file that must never appear.

def cut_json(d, ran):
    f = macro_file(d/'m.json')
    f.write_text(f.read_text()[:-4])
    return 'macro', f

def json_of_percent(d, ran): return 'macro', macro_file(d/'m.json', 60)

def cut_pickle(d, ran):
    folder = nats_folder(d/'source')
    cell = folder/'000001.pickle.pbz2'
    cell.write_bytes(cell.read_bytes()[:-9])
    return 'nb201', folder

def pickle_that_runs(d, ran): return 'nb201', nats_folder(d/'source', latency=Touch(ran))

def pth_that_runs(d, ran):
    torch.save(dict(arch2infos={0: nats_cell(latency=Touch(ran))}), d/'x.pth')
    return 'nb201', d/'x.pth'

def cut_pth(d, ran):
    f = d/'x.pth'
    torch.save(dict(arch2infos={0: nats_cell()}), f)
    f.write_bytes(f.read_bytes()[:-99])
    return 'nb201', f

def wrong_cell(d, ran):
    folder = d/'source'
    folder.mkdir()
    (folder/'000000.pickle.pbz2').write_bytes(pack(nats_cell('64:64')))
    return 'nb201', folder

def cut_record(d, ran):
    f = tfrecord(d/'n.tfrecord', [b'[]  '])
    f.write_bytes(f.read_bytes()[:-1])
    return 'nb101', f

def wrong_checksum(d, ran):
    f = tfrecord(d/'n.tfrecord', [b'[]  '])
    f.write_bytes(f.read_bytes().replace(b'[', b'{'))
    return 'nb101', f

def other_nds(d, ran):
    f = d/'ResNet.json'
    f.write_text('[{"net": {"block_type": "res"}}]')
    return 'nds', f

def wrong_suffix(d, ran):
    f = d/'source'
    f.write_text('x')
    return 'macro', f

def other_parquet(d, ran):
    f = d/'o.parquet'
    pd.DataFrame(dict(a=[1])).to_parquet(f)
    return 'nb101', f

def missing(d, ran): return 'macro', d/'source'

DAMAGED = {
    cut_json: 'cannot be read as the JSON', json_of_percent: 'accuracy 1.',
    cut_pickle: 'cannot be read', pickle_that_runs: 'system, expected plain containers',
    cut_pth: 'cannot be read', pth_that_runs: 'system, expected plain containers',
    wrong_cell: "cell '64:64'", cut_record: 'beyond the end', wrong_checksum: 'wrong checksum',
    other_nds: "no 'genotype'", wrong_suffix: 'expected .json or .parquet',
    other_parquet: 'cannot be read as a Parquet', missing: 'is not there'}

@pytest.mark.parametrize('make', DAMAGED)
def test_damaged_source(make, home, tmp_path):
    ran = tmp_path/'ran'
    space, source = make(tmp_path, ran)
    with pytest.raises(ValueError) as e: import_table(space, source)
    assert DAMAGED[make] in str(e.value) and '\n' not in str(e.value)
    assert not home.exists() and not ran.exists()

@pytest.mark.parametrize('make', [pickle_that_runs, wrong_checksum])
def test_damaged_source_ends_the_command(make, home, tmp_path, call):
    ran = tmp_path/'ran'
    code, out, err = call('import', *make(tmp_path, ran))
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('kshot tables import: ') and DAMAGED[make] in err
    assert not home.exists() and not ran.exists()

def test_a_failed_import_keeps_the_table(home, tmp_path):
    def content(): return {f: f.read_bytes() for f in home.rglob('*') if f.is_file()}
    import_table('macro', macro_file(tmp_path/'m.json'))
    before = content()
    with pytest.raises(ValueError): import_table(*cut_json(tmp_path, None))
    assert content() == before

# The file

class CountingFile:
    "A file that counts the bytes that are read."
    def __init__(self, fname):
        self.f = open(fname, 'rb')
        self.n_read = 0
    def read(self, *args):
        data = self.f.read(*args)
        self.n_read += len(data)
        return data
    def __getattr__(self, name): return getattr(self.f, name)

def test_a_query_reads_one_group(tmp_path, monkeypatch):
    n = 20_000
    paths = [f'{i:08d}' for i in range(n)]
    def rows_of(epochs):
        acc = np.random.default_rng(epochs).random(n)
        return pd.DataFrame(dict(path=paths, dataset='d', split='test', epochs=epochs, acc=acc))
    frames = list(map(rows_of, range(10)))
    table = write_table(pd.concat(frames), tmp_path/'t.parquet', 'macro')
    opened = []
    def open_counting(self):
        opened.append(CountingFile(self.file))
        return pq.ParquetFile(pa.PythonFile(opened[-1], 'r'))
    monkeypatch.setattr(type(table), 'open', open_counting)
    assert len(table.mean(epochs=3)) == n
    assert sum(f.n_read for f in opened) < table.file.stat().st_size/5

def test_a_table_file_has_a_name(tmp_path):
    rows = pd.DataFrame(dict(path=['0'], dataset='d', split='s', epochs=1, acc=[.5]))
    table = write_table(rows, tmp_path/'t.parquet', 'x')
    assert table.name == read_table(table.file).name == 't'
    assert get_table(str(table.file)).space == 'x'

# With the shared data

@pytest.fixture
def shared(home, data, monkeypatch):
    monkeypatch.setenv('KSHOT_DATA', str(data))
    if not (data/'nas_bench_macro_cifar10.parquet').exists():
        pytest.skip(f'no benchmark tables in {data}')

def test_macro_table(shared, capsys):
    table = get_table('macro')
    assert 'importing table macro from' in capsys.readouterr().err
    assert len(table.frame) == 3*6561 and table.info['groups'][0]['seeds'] == [0, 1, 2]
    mean = table.mean()
    assert mean.idxmax() == '22212202' and abs(mean.max()-.93127) < 1e-5
    frame = baselines(table, n_boot=2).set_index('scorer')
    taus = frame.tau[['macs', 'params', 'seed 0 against seed 1']]
    assert taus.round(3).tolist() == [.556, .218, .882]
    kinds = [t['kind'] for t in list_tables()]
    assert kinds == ['packaged', 'packaged', 'imported', 'importable', 'importable']

def test_nb201_table(shared):
    table = get_table('nb201')
    assert len(table.frame) == 9*15_625
    def best(dataset, epochs):
        return round(table.mean(dataset=dataset, split='test', epochs=epochs).max(), 5)
    assert (best('cifar10', 200), best('cifar100', 200)) == (.94373, .73513)
    assert best('ImageNet16-120', 200) == .47311
    assert best('cifar10', 12) == .8916
    def n_runs(dataset, split, epochs):
        return table.select(['n_runs'], dataset=dataset, split=split, epochs=epochs).n_runs
    assert n_runs('cifar10-valid', 'valid', 12).eq(2).all()
    assert n_runs('cifar10', 'test', 12).eq(1).all() and n_runs('cifar10', 'test', 200).isna().all()
    frame = baselines(table, n_boot=2).set_index('scorer')
    assert round(frame.tau['convs'], 3) == .578 and 'ceiling' not in frame.index

def other_drawings(space, path):
    "Yield paths of the same NAS-Bench-101 cell, two of its inner vertices exchanged."
    matrix, ops = json.loads(space.native(space.parse(path)))
    for i in range(1, len(ops)-2):
        if matrix[i][i+1]: continue
        order = [*range(i), i+1, i, *range(i+2, len(ops))]
        exchanged = [[matrix[a][b] for b in order] for a in order]
        other = space.format(space.parse(json.dumps([exchanged, [ops[a] for a in order]])))
        if other != path: yield other

def test_nb101_table(shared):
    table = get_table('nb101')
    assert len(table.frame) == 4*20_001
    rows = table.select(epochs=108, split='valid').set_index('hash')
    cell = rows.loc['00005c142e6f48ac74fdcf73e3439874']
    assert cell.n_params == 8_555_530 and abs(cell.acc-.930489) < 1e-6
    other = next(other_drawings(get_space('nb101'), cell.path)) # finds the same row
    assert table.mean([other, cell.path], epochs=108).tolist() == [cell.acc]*2

def test_latencies(shared, data):
    assert len(devices()) == 27 and {'fpga', 'pixel2', 'titan_rtx_256'} < set(devices())
    cells = pd.read_parquet(data/'nas_bench_201_12epoch.parquet').arch_str
    raw = pd.read_parquet(data/'nas_bench_201_latency_help.parquet')
    space = get_space('nb201')
    on_fpga = latency('nb201', 'fpga')
    for i in (0, 1, 777, 15_624): assert on_fpga(space.parse(cells[i])) == raw.lat_ms_fpga[i]
    with pytest.raises(ValueError, match="device 'abacus', expected one of 1080ti_1, "):
        latency('nb201', 'abacus')
