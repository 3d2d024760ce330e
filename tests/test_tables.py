"The benchmarks' files: imported by processes, damaged, malicious; and, where the shared data is, whole"
import bz2, json, os, pickle, struct
import numpy as np
import pandas as pd
import processes, pytest
import torch
from kshot.datasets.tfrecord import masked_crc32c
from kshot.cli.launch import tables
from kshot.benchmark import get_space, read_source
from kshot.baselines import baselines
from kshot.tables import devices, get_table, import_table, latency, list_tables, read_table, write_table
from processes import command

@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder of tables"
    monkeypatch.setenv('KSHOT_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('KSHOT_DATA', raising=False)
    return tmp_path/'home'

@pytest.fixture
def call(capsys):
    "`kshot_tables` in this process: exit code, standard output and error"
    def f(*args):
        capsys.readouterr()
        try: tables([*map(str, args)]); code = 0
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return f

CELL = '|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|none~2|'

class Touch:
    "Unpickled without care it makes a file"
    def __init__(self, fname): self.fname = fname
    def __reduce__(self): return os.system, (f'touch {self.fname}',)

def nats_cell(arch_str=CELL, **more):
    run = dict(params=.3, flop=47., seed=777, epochs=200, eval_acc1es={'ori-test@199': 90., 'ori-test@0': 10.}, eval_losses={'ori-test@199': .3})
    return {'200': dict(arch_str=arch_str, all_results={('cifar10', 777): run | more})}

def tfrecord(path, records):
    out = b''
    for r in records:
        size = struct.pack('<Q', len(r))
        a, b = (struct.pack('<I', s) for s in (masked_crc32c([size])[0], masked_crc32c([r])[0]))
        out += size + a + r + b
    path.write_bytes(out)
    return path

def macro_file(path, n=3):
    space = get_space('macro')
    rows = {space.format(space.at(i)): dict(test_acc=[50+i, 51+i, 52+i], mean_acc=0, std=0, params=i+1, flops=9-i) for i in range(n)}
    path.write_text(json.dumps(rows))
    return path

def nats_folder(folder, n=3, **more):
    space = get_space('nb201')
    folder.mkdir()
    for i in range(n):
        (folder/f'{i:06d}.pickle.pbz2').write_bytes(bz2.compress(pickle.dumps(nats_cell(space.native(space.at(i)), **more))))
    return folder

def test_import_show_list(home, tmp_path, call):
    code, out, err = call('import', 'macro', macro_file(tmp_path/'m.json'), '--json')
    assert code == 0, err
    assert json.loads(out) == dict(name='macro', space='macro', source='m.json', splits=[
        dict(dataset='cifar10', split='test', epochs=50, paths=3, seeds=3, acc_min=.5, acc_median=.52, acc_max=.54)], devices=[])
    assert os.listdir(home/'tables') == ['macro.parquet']
    assert json.loads(call('show', 'macro', '--json')[1]) == json.loads(out)
    assert json.loads(call('list', '--json')[1])['tables'][1] == dict(name='macro', kind='imported', file=str(home/'tables/macro.parquet'))
    code, out, err = call('baselines', 'macro', '--json')
    assert code == 0, err
    taus = {k: v['tau'] for k,v in json.loads(out)['baselines'].items()}
    assert taus == {'macs': -1, 'params': 1, 'ceiling': 1, 'seed 0 against seed 1': 1}

def test_json_is_alone_on_stdout(home, tmp_path):
    "A long import shows a bar, which is not part of the result"
    code, out, err = processes.call(command('tables'), 'import', 'nb201', nats_folder(tmp_path/'NATS-simple', 120), '--save_as', 'nats', '--json')
    assert code == 0, err
    assert json.loads(out)['name'] == 'nats' and json.loads(out)['splits'][0]['paths'] == 120

def damaged(kind, tmp_path, ran):
    "Format, damaged source and what the message says"
    f = tmp_path/'source'
    if kind == 'json cut off': f = macro_file(tmp_path/'m.json'); f.write_text(f.read_text()[:-4]); return 'macro', f, 'cannot be read as the JSON'
    if kind == 'json of percent': f = macro_file(tmp_path/'m.json', 60); return 'macro', f, 'accuracy 1.'
    if kind == 'pickle cut off':
        nats_folder(f); cell = f/'000001.pickle.pbz2'; cell.write_bytes(cell.read_bytes()[:-9]); return 'nb201', f, 'cannot be read'
    if kind == 'pickle that runs': return 'nb201', nats_folder(f, latency=Touch(ran)), 'system, expected plain containers'
    if kind == 'pth that runs':
        torch.save(dict(arch2infos={0: nats_cell(latency=Touch(ran))}), f := tmp_path/'x.pth'); return 'nb201', f, 'system, expected plain containers'
    if kind == 'pth cut off':
        torch.save(dict(arch2infos={0: nats_cell()}), f := tmp_path/'x.pth'); f.write_bytes(f.read_bytes()[:-99]); return 'nb201', f, 'cannot be read'
    if kind == 'wrong cell': f.mkdir(); (f/'000000.pickle.pbz2').write_bytes(bz2.compress(pickle.dumps(nats_cell('64:64')))); return 'nb201', f, "cell '64:64'"
    if kind == 'record cut off': f = tfrecord(tmp_path/'n.tfrecord', [b'[]  ']); f.write_bytes(f.read_bytes()[:-1]); return 'nb101', f, 'beyond the end'
    if kind == 'wrong checksum': f = tfrecord(tmp_path/'n.tfrecord', [b'[]  ']); f.write_bytes(f.read_bytes().replace(b'[', b'{')); return 'nb101', f, 'wrong checksum'
    if kind == 'nds of others': (f := tmp_path/'ResNet.json').write_text('[{"net": {"block_type": "res"}}]'); return 'nds', f, "no 'genotype'"
    if kind == 'wrong ending': f.write_text('x'); return 'macro', f, 'expected .json or .parquet'
    if kind == 'other parquet': pd.DataFrame(dict(a=[1])).to_parquet(f := tmp_path/'o.parquet'); return 'nb101', f, 'cannot be read as a Parquet'
    if kind == 'missing': return 'macro', f, 'is not there'

KINDS = ('json cut off', 'json of percent', 'pickle cut off', 'pickle that runs', 'pth that runs', 'pth cut off', 'wrong cell', 'record cut off',
         'wrong checksum', 'nds of others', 'wrong ending', 'other parquet', 'missing')

@pytest.mark.parametrize('kind', KINDS)
def test_damaged_source(kind, home, tmp_path):
    space, source, text = damaged(kind, tmp_path, ran := tmp_path/'ran')
    with pytest.raises(ValueError) as e: import_table(space, source)
    assert text in str(e.value) and '\n' not in str(e.value)
    assert not home.exists() and not ran.exists()

@pytest.mark.parametrize('kind', ['pickle that runs', 'wrong checksum'])
def test_damaged_source_ends_the_command(kind, home, tmp_path, call):
    space, source, text = damaged(kind, tmp_path, ran := tmp_path/'ran')
    code, out, err = call('import', space, source)
    assert (code, out, err.count('\n')) == (2, '', 1) and err.startswith('kshot_tables import: ') and text in err
    assert not home.exists() and not ran.exists()

@pytest.mark.parametrize('args,text', [(['show', 'nb201'], "table 'nb201', expected one of digits or a .parquet file; kshot_tables import nb201 FILE"),
    (['import', 'cifar', 'x'], "space 'cifar', expected one of digits, macro"), (['import', 'macro'], 'no source of table macro'), (['drop'], "subcommand 'drop', expected list"),
    (['baselines', 'digits', '--epochs', '7'], 'has no epochs 7, expected one of [20]')])
def test_wrong_argument(args, text, home, call):
    code, out, err = call(*args)
    assert (code, out, err.count('\n')) == (2, '', 1) and text in err

def test_a_failed_import_keeps_the_table(home, tmp_path):
    import_table('macro', macro_file(tmp_path/'m.json'))
    before = {f: f.read_bytes() for f in home.rglob('*') if f.is_file()}
    _, source, _ = damaged('json cut off', tmp_path, None)
    with pytest.raises(ValueError): import_table('macro', source)
    assert {f: f.read_bytes() for f in home.rglob('*') if f.is_file()} == before

def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    "Of a table with many groups a query touches a few pages of the file"
    n = 20_000
    frame = pd.concat([pd.DataFrame(dict(path=[f'{i:08d}' for i in range(n)], dataset='d', split='test', epochs=e, acc=np.random.default_rng(e).random(n)))
                       for e in range(10)])
    table = write_table(frame, tmp_path/'t.parquet', 'macro')
    size, read = table.file.stat().st_size, []
    class Counting:
        def __init__(self, f): self.f = open(f, 'rb')
        def read(self, *a): out = self.f.read(*a); read.append(len(out)); return out
        def __getattr__(self, k): return getattr(self.f, k)
    import pyarrow as pa, pyarrow.parquet as pq
    monkeypatch.setattr(type(table), 'open', lambda self: pq.ParquetFile(pa.PythonFile(Counting(self.file), 'r')))
    assert len(table.mean(epochs=3)) == n
    assert sum(read) < size/5

# with the shared data

@pytest.fixture
def shared(home, data, monkeypatch):
    monkeypatch.setenv('KSHOT_DATA', str(data))
    if not (data/'nas_bench_macro_cifar10.parquet').exists(): pytest.skip(f'no benchmark tables in {data}')

def test_macro_table(shared, capsys):
    table = get_table('macro')
    assert 'importing table macro from' in capsys.readouterr().err
    assert len(table.frame) == 3*6561 and table.info['groups'][0]['seeds'] == [0, 1, 2]
    mean = table.mean()
    assert mean.idxmax() == '22212202' and abs(mean.max()-.93127) < 1e-5
    frame = baselines(table, n_boot=2).set_index('scorer')
    assert frame.tau[['macs', 'params', 'seed 0 against seed 1']].round(3).tolist() == [.556, .218, .882]
    assert [t['kind'] for t in list_tables()] == ['packaged', 'imported', 'importable', 'importable']

def test_nb201_table(shared):
    table = get_table('nb201')
    assert len(table.frame) == 9*15_625
    best = lambda d, split, e: round(table.mean(dataset=d, split=split, epochs=e).max(), 5)
    assert [best(d, 'test', 200) for d in ('cifar10', 'cifar100', 'ImageNet16-120')] == [.94373, .73513, .47311]
    assert best('cifar10', 'test', 12) == .8916
    runs = {(g['dataset'], g['split'], g['epochs']): table.select(['n_runs'], **{k: g[k] for k in ('dataset', 'split', 'epochs')}).n_runs for g in table.info['groups']}
    assert runs['cifar10-valid', 'valid', 12].eq(2).all() and runs['cifar10', 'test', 12].eq(1).all() and runs['cifar10', 'test', 200].isna().all()
    frame = baselines(table, n_boot=2).set_index('scorer')
    assert round(frame.tau['convs'], 3) == .578 and 'ceiling' not in frame.index

def test_nb101_table(shared):
    table, space = get_table('nb101'), get_space('nb101')
    assert len(table.frame) == 4*20_001
    rows = table.select(epochs=108, split='valid')
    mine = rows.set_index('hash').loc['00005c142e6f48ac74fdcf73e3439874']
    assert mine.n_params == 8_555_530 and abs(mine.acc-.930489) < 1e-6
    matrix, ops = json.loads(space.native(space.parse(mine.path)))
    inner = [o for o in range(1, len(ops)-1)]
    for i,j in zip(inner, inner[1:]): # any other drawing of the cell finds the same row
        if matrix[i][j]: continue
        order = [*range(i), j, i, *range(j+1, len(ops))]
        other = json.dumps([[[matrix[a][b] for b in order] for a in order], [ops[a] for a in order]])
        path = space.format(space.parse(other))
        if path != mine.path: break
    else: pytest.fail('no other drawing')
    assert table.mean([path, mine.path], epochs=108).tolist() == [mine.acc]*2

def test_latencies(shared, data):
    assert len(devices()) == 27 and {'fpga', 'pixel2', 'titan_rtx_256'} < set(devices())
    cells = pd.read_parquet(data/'nas_bench_201_12epoch.parquet').arch_str
    raw = pd.read_parquet(data/'nas_bench_201_latency_help.parquet')
    fpga, space = latency('nb201', 'fpga'), get_space('nb201')
    for i in (0, 1, 777, 15_624): assert fpga(space.parse(cells[i])) == raw.lat_ms_fpga[i]
    with pytest.raises(ValueError, match="device 'abacus', expected one of 1080ti_1, "): latency('nb201', 'abacus')
