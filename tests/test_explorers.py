"Explorers of accuracies and rankings take whatever scores there are"
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from kshot.benchmark import get_space
from kshot.figures.accuracy import Distribution
from kshot.lab.accuracy import AccuracyExplorer
from kshot.lab.dashboard import RankDashboard

SPACE = get_space('digits')
RNG = np.random.default_rng(0)
NAMES = [SPACE.format(p) for p in SPACE]
ACC = RNG.random(625)
MACS = RNG.integers(1, 9, 625)*1000
SCORES = pd.DataFrame(dict(path=NAMES, acc_super=ACC, acc_alone=.9+.05*ACC, macs=MACS, K=4))
FEW = SCORES[:20]
IS_LATE = FEW.index > 4
FRAMES = {
    'no run': FEW.drop(columns='K'),
    'no truth': FEW.drop(columns=['acc_alone', 'macs']),
    'all equal': FEW.assign(acc_super=.5, acc_alone=.5),
    'one row': FEW[:1],
    'no row': FEW[:0],
    'nothing': pd.DataFrame(),
    'accuracies NaN': FEW.assign(acc_super=np.nan),
    'some accuracies NaN': FEW.assign(acc_super=FEW.acc_super.where(IS_LATE)),
    'truth NaN': FEW.assign(acc_alone=np.nan),
    'some truth NaN': FEW.assign(acc_alone=FEW.acc_alone.where(IS_LATE)),
    'infinite costs': FEW.assign(macs=FEW.index.map({0: np.inf, 1: -np.inf})),
    'costs side by side': FEW.assign(macs=1e6+np.arange(20)),
}

def drag(view, x, y): # as a page does
    view.on['box'](dict(x=x, y=y))

@pytest.mark.parametrize('scores', FRAMES.values(), ids=FRAMES)
def test_accuracies(scores):
    e = AccuracyExplorer(scores, SPACE)
    for kind in get_args(Distribution)[::-1]:
        e.kind.value = kind
        e.select((0, 1), (0, .99) if e.has_truth else None)
    for _,split in e.split.options[::-1]:
        e.split.value = split
        drag(e.hills, (0, 1), (0, 1))
    columns = list(scores) if len(scores) else ['acc_super']
    assert len(e.chosen) <= len(scores) and list(e.chosen) == columns

def test_rows_without_accuracy_are_counted():
    explorer = AccuracyExplorer(FRAMES['some accuracies NaN'], SPACE)
    assert '5 of 20 rows left out' in explorer.message.value

def test_names_are_escaped():
    explorer = AccuracyExplorer(FEW, SPACE, names={4: '<img src=x>'})
    explorer.select((0, .5))
    text = explorer.message.value
    assert 'of &lt;img src=x&gt;' in text and '<img' not in text

LONE = SCORES[['path', 'acc_super']]
NOISE = RNG.normal(0, .005, (625, 3))
TRUTH = pd.DataFrame(SCORES.acc_alone.to_numpy()[:,None] + NOISE, index=NAMES)
RANKINGS = {
    'one seed': (LONE, TRUTH[[0]]),
    'two paths': (LONE[:2], TRUTH),
    'one path': (LONE[:1], TRUTH),
    'no path': (LONE[:0], TRUTH),
    'no run': ({}, TRUTH),
    'all equal': (LONE.assign(acc_super=.5), TRUTH),
    'some accuracies NaN': (LONE.assign(acc_super=LONE.acc_super.where(LONE.index > 4)), TRUTH),
    'truth zero': (LONE, TRUTH*0),
    'some truth NaN': (LONE, TRUTH.where(TRUTH > .91)),
}

@pytest.mark.parametrize('scores, truth', RANKINGS.values(), ids=RANKINGS)
def test_rankings(scores, truth):
    board = RankDashboard(scores, truth, n_boot=2)
    board.top.value = 50
    has_seeds = len(truth.dropna(axis=1).columns) > 1
    assert ('ceiling' in board.protocol.index) == (len(board.protocol) > 0 and has_seeds)
