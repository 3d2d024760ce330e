"AutoFormer from training to an exported subnet, on a CIFAR-10 of 120 images that the test makes"
import numpy as np
import pytest
import torch

from kshot.benchmark import get_net, get_space
from kshot.config import Config
from kshot.cost import Cost
from kshot.evaluate import accuracy_loss
from kshot.export import load_subnet
from kshot.jobs import export_run, retrain_run, search_run
from kshot.runs import train_run
from kshot.settings import Budget
from test_rank import make_images

SMALL = dict(space='autoformer', data='cifar10', channels=8, px=8, bs=10, epochs=1)

@pytest.fixture
def images(monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    make_images(home/'data'/'cifar10', np.random.default_rng(0))
    monkeypatch.setenv('KSHOT_HOME', str(home))
    monkeypatch.setenv('KSHOT_DATA', str(home/'data'))

def test_a_transformer_from_training_to_export(images, tmp_path):
    space = get_space('autoformer')
    learn = train_run(Config(K=2, drop_path=.1, **SMALL), tmp_path, progress=False)
    assert learn.model.sizes == space.sizes
    cost = Cost(get_net('autoformer', 8, px=8), (3,8,8))
    most = cost.macs((1,1) + (0,1)*14)
    frame = search_run(tmp_path, 3, algorithm='random', budget=Budget(max_macs=most))
    paths = [space.parse(path) for path in frame.path]
    assert frame.macs.tolist() == [cost.macs(path) for path in paths]
    assert len(frame) == 3 and frame.macs.max() <= most
    result = retrain_run(tmp_path, epochs=1)
    module, about = load_subnet(tmp_path)
    assert (about['px'], about['n_params']) == (8, sum(p.numel() for p in module.parameters()))
    test_images = learn.dls.loaders[2]
    assert accuracy_loss(module, test_images).metric == pytest.approx(result['acc_alone'], abs=1e-6)
    exported = torch.export.load(export_run(tmp_path)[-1]).module()
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(exported(x), module(x))

WRONG = [
    (dict(px=10), 'px=10, expected a multiple of 4'),
    (dict(widths='0.5 1'), 'widths'),
    (dict(n_cells=2), 'it has no cells'),
    (dict(kernel='crop'), "kernel='crop' for space 'autoformer', expected only in")]

@pytest.mark.parametrize('options,text', WRONG)
def test_what_a_transformer_cannot_have(images, options, text, tmp_path):
    with pytest.raises(ValueError, match=text): train_run(Config(**SMALL | options), tmp_path)
