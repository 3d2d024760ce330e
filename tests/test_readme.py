"README.md and nbs/index.ipynb say the same, what they say exists, and what they tell to type works"
import json, re, shlex
from configparser import ConfigParser
from importlib import import_module

import numpy as np, pytest, torch
from conftest import ROOT
from readme import readme, taus

TEXT = (ROOT/'README.md').read_text(encoding='utf-8')
MAKE = (ROOT/'Makefile').read_text()
BLOCKS = {k: re.findall(rf'^```{k}\n(.*?)^```', TEXT, re.M|re.S) for k in ('python', 'sh')}
SMALLER = {'passes=25': 'passes=1', 'fit(30': 'fit(1'} # 8 updates instead of 6,000: that it runs, not what it reaches
SHORT = dict(kshot_rank='--epochs 1 --passes 2 --n_paths 12', kshot_search='--n_paths 4', kshot_retrain='--epochs 1', kshot_export='')

def test_is_index(): assert TEXT == readme(), 'run `make readme`'

def test_targets_exist():
    "`make demo` runs what tests/test_launch.py runs with --quick, `make test` what runs now, `make lab` what tests/browser opens."
    named = set(re.findall(r'\bmake ([a-z]+)', TEXT))
    assert {'demo', 'test', 'lab'} <= named <= set(re.findall(r'^([a-z]+):', MAKE, re.M))
    assert re.search(r'^demo:.*\n\t@\$\(BIN\)/kshot_demo', MAKE, re.M) and re.search(r'^test:(.*\n\t)+.*-m pytest tests', MAKE, re.M)

def test_links_exist():
    links = re.findall(r'\]\(([^)#]+)', TEXT) + re.findall(r'src="([^"]+)', TEXT)
    assert not [l for l in links if '://' not in l and not (ROOT/l).exists()]

def test_no_markup_left(): assert not re.search(r'^#\s*\||^---$', TEXT, flags=re.M)

def test_code_runs(capsys):
    code, = BLOCKS['python']
    assert len([line for line in code.splitlines() if line]) <= 17
    for a,b in SMALLER.items():
        assert code.count(a) == 1
        code = code.replace(a, b)
    exec(compile(code, 'README.md', 'exec'), names := {})
    assert re.search(r'^0?-?0\.\d+$', capsys.readouterr().out, re.M) # tau
    best = names['scores'].loss_super.idxmin()
    assert len(names['scores']) == 625 and names['path'] == list(names['space'])[best]
    assert not {m.partition('.')[0] for m in (type(o).__module__ for o in names['net'].modules())} & {'kshot'}
    assert next(names['net'].parameters()).is_cuda == torch.cuda.is_available()

def test_commands_run(tmp_path, monkeypatch, capsys):
    "All of the second block, one after another, with less of everything."
    _, block = BLOCKS['sh']
    cfg = ConfigParser(delimiters='=', interpolation=None)
    cfg.read(ROOT/'settings.ini')
    scripts = dict(o.split('=') for o in cfg['DEFAULT']['console_scripts'].split())
    lines = [shlex.split(l, comments=True) for l in block.splitlines()]
    assert [l[0] for l in lines] == list(SHORT)
    monkeypatch.chdir(tmp_path)
    for name,*args in lines:
        module, func = scripts[name].split(':')
        getattr(import_module(module), func)([*args, *shlex.split(SHORT[name])])
    made = {p.name for p in (tmp_path/'runs'/'first'/'seed_0').iterdir()}
    assert {'run.json', 'report.html', 'search.parquet', 'subnet.safetensors', 'subnet.pt2', 'subnet.onnx'} <= made

def test_numbers_are_those_of_results():
    "What the picture's text says is what results/ and the table say."
    said = [float(v) for v in re.findall(r'(?<= )\.\d+', re.search(r'!\[Kendall tau on Digits-Bench, by loss: ([^\]]*)\]', TEXT)[1])]
    assert said == pytest.approx([np.mean(taus()[k]) for k in ('counting MACs', 'one-shot', 'K-shot, K = 4', 'seed ceiling')], abs=.005)

def test_table_and_citations():
    rows = re.findall(r'^\| (.+) \| (.+) \| (.+) \| (.+) \|$', TEXT.partition('Facts as of 2026-11')[2].partition('## Cite')[0], re.M)[1:]
    assert [re.sub(r'\[(.*?)\].*', r'\1', r[0]) for r in rows] == ['kshot', *'NNI NASLib AutoDL-Projects MMRazor archai once-for-all few-shot-NAS'.split()]
    assert all('https://' in r[0] for r in rows[1:]) # where it can be looked up
    bib = re.search(r'^```bibtex\n(.*?)^```', TEXT, re.M|re.S)[1]
    assert bib.count('{') == bib.count('}') and re.findall(r'eprint *= \{(.*?)\}', bib) == ['2106.06442', '2110.01154']
