"README.md is nbs/index.ipynb; what it names exists, and what it tells you to type works"
import re, shlex

import pytest, torch
from conftest import ROOT
from kshot.cli.main import main
from kshot.nets.layers import SupernetOnly
from kshot.networks import Subnet
from kshot.rank import BY
from kshot.supernet import Supernet
from readme import gains, readme

TEXT = (ROOT/'README.md').read_text(encoding='utf-8')
MAKE = (ROOT/'Makefile').read_text()
# 8 updates instead of 6,000: that it runs, not what it reaches
SMALLER = {'passes=25': 'passes=1', 'fit(30': 'fit(1'}
SHORT = dict(
    rank='--epochs 1 --passes 2 --n_paths 12',
    search='--n_paths 4',
    retrain='--epochs 1',
    export='')

def blocks(
    lang:str, # of a code block
) -> list[str]:
    "The README's code blocks in a language."
    return re.findall(rf'^```{lang}\n(.*?)^```', TEXT, re.M|re.S)

def test_is_index(): assert TEXT == readme(), 'run `make readme`'

def test_targets_exist():
    "`make demo` runs what tests/test_launch.py runs with --quick, `make test` runs these tests."
    named = set(re.findall(r'\bmake ([a-z]+)', TEXT))
    assert {'demo', 'test', 'lab'} <= named <= set(re.findall(r'^([a-z]+):', MAKE, re.M))
    assert re.search(r'^demo:.*\n\t@\$\(BIN\)/kshot demo', MAKE, re.M)
    assert re.search(r'^test:(.*\n\t)+.*-m pytest tests', MAKE, re.M)

def test_links_exist():
    links = re.findall(r'\]\(([^)#]+)', TEXT) + re.findall(r'src="([^"]+)', TEXT)
    assert not [link for link in links if '://' not in link and not (ROOT/link).exists()]

def test_no_markup_left(): assert not re.search(r'^#\s*\||^---$', TEXT, flags=re.M)

def test_code_is_fifteen_lines():
    code, = blocks('python')
    lines = [line for line in code.splitlines() if line]
    assert len(lines) == 15 and max(map(len, lines)) <= 100
    assert sum(line.startswith(('import', 'from')) for line in lines) <= 3

def test_code_runs(capsys):
    code, = blocks('python')
    for a,b in SMALLER.items():
        assert code.count(a) == 1
        code = code.replace(a, b)
    names = {}
    exec(compile(code, 'README.md', 'exec'), names)
    printed = re.findall(r'^\d +(\w+) +(-?0\.\d+|NaN)', capsys.readouterr().out, re.M)
    by_score = [f'supernet_{by}' for by in BY if by != 'ranks_macs'] # there are no MACs
    assert [scorer for scorer,_ in printed] == ['supernet', *by_score, 'ceiling']
    best = names['scores'].loss_super.idxmin()
    assert len(names['scores']) == 625 and names['path'] == list(names['space'])[best]
    kinds = {type(module) for module in names['net'].modules()}
    assert Subnet in kinds and not any(issubclass(kind, Supernet | SupernetOnly) for kind in kinds)
    assert next(names['net'].parameters()).is_cuda == torch.cuda.is_available()

def test_commands_run(tmp_path, monkeypatch, capsys):
    "All commands of the second block, one after another, with less of everything."
    _, block = blocks('sh')
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [line[:2] for line in lines] == [['kshot', name] for name in SHORT]
    monkeypatch.chdir(tmp_path)
    for _,name,*args in lines: main([name, *args, *shlex.split(SHORT[name])])
    made = {p.name for p in (tmp_path/'runs'/'first'/'seed_0').iterdir()}
    subnet = {'subnet.safetensors', 'subnet.pt2', 'subnet.onnx'}
    assert {'run.json', 'report.html', 'search.parquet', *subnet} <= made

@pytest.mark.parametrize('bench', ['Views', 'Digits'])
def test_numbers_are_those_of_results(bench):
    "What the picture's text says is what results/ says."
    text = re.search(r'!\[What eight supernets gain[^\]]*\]', TEXT)[0]
    said = re.search(rf'{bench}-Bench ([^;\]]*)', text)[1]
    found = gains()
    found = found[(found.label == f'{bench}-Bench') & (found.metric == 'tau by loss')].sort_values('updates')
    assert re.findall(r'\(([\d,]+)', said) == [f'{n:,}' for n in found.updates]
    assert [*map(float, re.findall(r'[-+]\.\d+', said))] == pytest.approx(found.gain.tolist(), abs=.0051)

def test_table_and_citations():
    section = TEXT.partition('Facts as of 2026-11')[2].partition('## Cite')[0]
    rows = re.findall(r'^\| (.+) \| (.+) \| (.+) \| (.+) \|$', section, re.M)[1:]
    packages = [re.sub(r'\[(.*?)\].*', r'\1', row[0]) for row in rows]
    expected = 'kshot NNI NASLib AutoDL-Projects MMRazor archai once-for-all Model_Optimizer few-shot-NAS'
    assert packages == [name.replace('_', ' ') for name in expected.split()]
    assert all('https://' in row[0] for row in rows[1:]) # where it can be looked up
    bib, = blocks('bibtex')
    assert bib.count('{') == bib.count('}')
    assert re.findall(r'eprint *= \{(.*?)\}', bib) == ['2106.06442', '2110.01154']
