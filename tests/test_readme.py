"README.md and nbs/index.ipynb say the same, and what they say exists"
import re

from conftest import ROOT
from readme import readme

TEXT = (ROOT/'README.md').read_text(encoding='utf-8')

def test_is_index(): assert TEXT == readme(), 'run `make readme`'

def test_targets_exist():
    rules = re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(), flags=re.M)
    named = re.findall(r'^make ([a-z]+)', TEXT, flags=re.M)
    assert {'demo', 'test'} <= set(named) <= set(rules)

def test_links_exist():
    links = re.findall(r'\]\(([^)#]+)', TEXT) + re.findall(r'src="([^"]+)', TEXT)
    assert not [l for l in links if '://' not in l and not (ROOT/l).exists()]

def test_no_markup_left(): assert not re.search(r'^#\s*\||^---$', TEXT, flags=re.M)
