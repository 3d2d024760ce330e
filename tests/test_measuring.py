"The scripts that compare kshot with others, and with itself at other sizes, run when everything is tiny"
import json
import subprocess
import sys

from conftest import ROOT

TINY = '''
import sys
from pathlib import Path
import peers
from kshot.benchmark import get_net
def contest(): return peers.contest(get_net('nb201', 4, 1), peers.draw(6, 4), {})
peers.CONTESTS = dict(small=(contest, dict(tiny=peers.Size(2, 8, 1, 1))))
peers.OUT = Path(sys.argv.pop())
peers.main()
'''

TINY_ELASTIC = '''
import sys
from pathlib import Path
import elastic
def broken(model, x): raise ValueError('no\\nmore lines')
elastic.NETWORKS = dict(resnet18=elastic.Network(2, 32, 1))
elastic.PACKAGES = dict(kshot=elastic.kshot, json=broken) # a package that is installed
elastic.OUT = Path(sys.argv.pop())
elastic.main()
'''

def run(*argv): # in a process of its own: the scripts hide the GPU
    done = subprocess.run([sys.executable, '-W', 'ignore', *map(str, argv)], cwd=ROOT/'tools',
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout

def test_peers(tmp_path):
    fname = tmp_path/'peers.json'
    other = dict(net='another', name='ofa')
    fname.write_text(json.dumps(dict(rows=[other], networks={}, versions=dict(ofa='1'))))
    run('-c', TINY, fname)
    result = json.loads(fname.read_text())
    kept, *rows = result['rows']
    assert kept == other and result['versions']['ofa'] == '1' and 'ofa' not in result['absent']
    names = ['plain', 'kshot K=1', 'kshot K=4', 'kshot K=8']
    assert [(row['what'], row['name']) for row in rows] == [(w, n) for w in ('step', 'score') for n in names]
    assert all(row['over_plain'] == [1, 1, 1] for row in rows if row['name'] == 'plain')

def test_growth():
    few, many = (json.loads(run('growth.py', '--child', 'search_journal', n)) for n in (20, 40))
    assert few.keys() == {'ms', 'journal_mb', 'resume_ms', 'peak_mib'}
    assert 1.5 < many['journal_mb']/few['journal_mb'] < 2.5 # twice as many paths

def test_elastic(tmp_path):
    fname = tmp_path/'elastic.json'
    other = dict(model='resnet18', package='another')
    fname.write_text(json.dumps(dict(rows=[other], versions=dict(another='1'))))
    run('-c', TINY_ELASTIC, fname)
    result = json.loads(fname.read_text())
    kept, ours, broken = result['rows']
    assert kept == other and result['versions']['another'] == '1'
    assert broken == dict(model='resnet18', package='json', error='ValueError: no')
    assert ours['macs_full'] == (1_814_073_344-512_000)//7**2 + 512_000 # of its 224 pixels and its classifier
    assert ours['macs_small'] < ours['macs_drawn'] < ours['macs_full']
    assert ours['full_differs'] < 1e-5 and ours['alone_differs'] == 0 and len(ours['over_alone']) == 3
