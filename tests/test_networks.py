"""Networks as people write them, from training to ONNX: each kind in `zoo` goes through each check.

The references are plain PyTorch: the network itself with weights mixed by hand, `update_bn`,
FlopCounterMode, an uninterrupted training. A check returns what it measured: the docs have a table.
"""
import copy
import io
from functools import cache
from itertools import count

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from zoo import KINDS

from kshot import networks
from kshot.base.inputs import map_tensors, n_rows, tensors_in
from kshot.checkpoint import CheckpointCallback, load_newest
from kshot.cost import Cost
from kshot.data import TensorLoader, loaders
from kshot.evaluate import calibrated_subnet, recalibrate_bn, score_path
from kshot.export import to_onnx, to_torch_export
from kshot.retrain import get_recipe, retrain
from kshot.supernet import Supernet
from kshot.train import cosine, kshot_learner

CODE = torch.tensor([.3, .7])
N = 64   # examples that train
BS = 16
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d # what `update_bn` knows

# the plain network, and its weights mixed by hand

def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind.make()

def part(x, start, stop): return map_tensors(lambda t: t[start:stop], x)

def batches(kind, n, start=0): # of BS
    x, y = kind.data(start + n*BS)
    return [(part(x, i, i+BS), y[i:i+BS]) for i in range(start, start + n*BS, BS)]

def mixed(kind, supernet, code=CODE):
    "Return the plain network: what people would write without a supernet."
    net = make(kind)
    net.load_state_dict(supernet.net.state_dict(), strict=False) # buffers that training has moved
    with torch.no_grad():
        for name,W in supernet.tensors().items():
            net.get_parameter(name).copy_(torch.tensordot(code.to(W.dtype), W, dims=1))
    return net

@cache
def supernet_of(kind):
    "Return two supernets whose buffers have seen a batch of training."
    supernet = Supernet(make(kind), K=2)
    x, _ = batches(kind, 1)[0]
    with torch.no_grad(): supernet(x, kind.paths[-1], CODE)
    return supernet

def assert_close(a, b, tol=1e-5):
    "Compare outputs of any structure, and return the largest difference."
    a, b = tensors_in(a), tensors_in(b)
    assert len(a) == len(b) > 0
    for one,other in zip(a, b): torch.testing.assert_close(one, other, atol=tol, rtol=tol)
    return max(float((one.detach() - other.detach()).abs().max()) for one,other in zip(a, b))

def shown(gap): return f'{gap:.0e}' if gap else '0'

def paths_of(kind): return [kind.paths[-1], kind.paths[len(kind.paths)//2]]

def has_statistics(module): return getattr(module, 'running_mean', None) is not None

class Calibrating(nn.Module):
    "Only the norms train in `update_bn`, dropout and the like do not."
    def __init__(self, net, path):
        super().__init__()
        self.net, self.path = net, path

    def forward(self, x): return self.net(x, self.path)

    def train(self, mode=True):
        super().train(False)
        for m in filter(has_statistics, self.net.modules()): m.train(mode)
        return self

def average(norm):
    "Make another norm average over batches as `update_bn` does, and return how to stop."
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    momentum = norm.momentum
    calls = count(1)
    def set_momentum(m, args): m.momentum = 1/next(calls)
    hook = norm.register_forward_pre_hook(set_momentum)
    def stop():
        hook.remove()
        norm.momentum = momentum
    return stop

def calibrated(kind, supernet, path, calibration):
    "Return the mixed network with statistics averaged over batches, by PyTorch."
    net = mixed(kind, supernet)
    norms = filter(has_statistics, net.modules())
    stops = [average(m) for m in norms if not isinstance(m, BATCH_NORMS)]
    update_bn([(x,) for x,_ in calibration], Calibrating(net, path))
    for stop in stops: stop()
    return net.eval()

# training

def data_of(kind):
    "Return kshot's loaders for images with classes, else PyTorch's, as people have them."
    x, y = kind.data(N + 2*BS)
    if isinstance(x, torch.Tensor) and x.ndim == 4 and y.dtype == torch.long and y.ndim == 1:
        train = TensorLoader(x[:N], y[:N], BS, shuffle=True)
        return loaders(4, train, TensorLoader(x[N:], y[N:], 2*BS))
    examples = [(part(x, i, i+1), y[i:i+1]) for i in range(N + 2*BS)]
    examples = [map_tensors(lambda t: t[0], example) for example in examples]
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(examples[:N], BS, shuffle=True, generator=generator)
    dls = DataLoaders(train, DataLoader(examples[N:], 2*BS))
    dls.c = 4
    return dls

class StopAfter(Callback):
    "End a fit early, as if it had been killed after a checkpoint."
    order = CheckpointCallback.order + 1
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1 == self.n: raise CancelFitException

def fit(kind, epochs, *cbs, seed=0):
    learn = kshot_learner(make(kind, seed), kind.space, data_of(kind), 2, branch=(), warmup=0., n_paths=3,
                          loss_func=kind.loss_func, metrics=kind.metric)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[cosine(kind.lr), *cbs])
    return learn

def mean_loss(kind, supernet):
    "Return the loss of training examples over all paths, with the batch's statistics."
    (x, y), = batches(kind, 1)
    supernet.eval()
    with torch.no_grad(): losses = [kind.loss_func(supernet(x, p, CODE), y) for p in kind.paths]
    supernet.train()
    return float(torch.stack(losses).mean())

def gradients(supernet): # by name, zeros for weights that the path does not read
    banks = {}
    for key,bank in supernet.banks.items():
        banks[key] = torch.zeros_like(bank) if bank.grad is None else bank.grad
    return supernet.tensors(banks)

def check_gradients(kind, path):
    "Compare the gradients of weights and code with those of the plain network."
    (x, y), = batches(kind, 1)
    supernet = Supernet(make(kind), K=2, even_step=False)
    net = mixed(kind, supernet)
    code = CODE.clone().requires_grad_()
    outs = []
    for forward in (lambda: supernet(x, path, code), lambda: net(x, path)):
        torch.manual_seed(1) # of dropout
        outs.append(forward())
        kind.loss_func(outs[-1], y).backward()
    assert_close(*outs)
    of_code = torch.zeros(2)
    W = supernet.tensors()
    for name,grad in gradients(supernet).items():
        p = net.get_parameter(name)
        g = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, torch.stack([c*g for c in CODE]), atol=1e-5, rtol=1e-4)
        of_code += (W[name]*g).reshape(2, -1).sum(1)
    torch.testing.assert_close(code.grad, of_code, atol=1e-4, rtol=1e-4)

def train(kind, folder):
    "Gradients are those of the plain network, shared out by the code; the loss falls."
    for path in paths_of(kind): check_gradients(kind, path)
    before = mean_loss(kind, Supernet(make(kind), 2))
    after = mean_loss(kind, fit(kind, 3).model)
    assert after < before
    return f'{before:.2f} to {after:.2f}'

def resume(kind, folder):
    "Two epochs at once are one, a checkpoint, and one more in a learner of other weights."
    fit(kind, 2, CheckpointCallback(folder/'whole'))
    fit(kind, 2, CheckpointCallback(folder/'halves'), StopAfter(1))
    fit(kind, 2, CheckpointCallback(folder/'halves', resume=True), seed=7)
    (whole, meta), (halves, other) = (load_newest(folder/name) for name in ('whole', 'halves'))
    assert meta | dict(seconds=0) == other | dict(seconds=0)
    assert set(whole) == set(halves)
    for name,t in whole.items(): assert t.equal(halves[name]), name
    return 'to the bit'

# scoring and extraction

def score(kind, folder):
    "Calibration and score are those of `update_bn` and of the plain network."
    supernet = supernet_of(kind)
    calibration = batches(kind, 3)
    scored = batches(kind, 2, start=3*BS)
    gaps = []
    for path in paths_of(kind):
        got = score_path(supernet, path, CODE, scored, calibration, loss_func=kind.loss_func,
                         metric=kind.metric)
        net = calibrated(kind, supernet, path, calibration)
        with torch.no_grad(): outs = [net(x, path) for x,_ in scored]
        for ours,f in zip(got, (kind.metric, kind.loss_func)):
            expected = np.mean([float(f(out, y)) for out,(_,y) in zip(outs, scored)])
            assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5)
            gaps.append(abs(ours - expected))
    assert supernet.training
    return shown(max(gaps))

def subnet(kind, folder):
    "A subnet does what the plain network does, with weights and modes of its own."
    supernet = supernet_of(kind)
    calibration = batches(kind, 3)
    x = batches(kind, 1, start=3*BS)[0][0]
    gaps = []
    for path in paths_of(kind):
        module = calibrated_subnet(supernet, path, CODE, calibration)
        net = calibrated(kind, supernet, path, calibration)
        weights, = supernet.weights([path], CODE[None])
        stats = recalibrate_bn(supernet, path, weights, calibration)
        with torch.no_grad():
            gaps.append(assert_close(module(x), net(x, path)))
            supernet.eval()
            gaps.append(assert_close(module(x), supernet.run_with(x, path, weights, stats)))
            supernet.train()
        check_weights(kind, module, path)
        check_modes(module, net, x, path)
        other = networks.subnet(make(kind, 7), path).eval()
        other.load_state_dict(module.state_dict())
        with torch.no_grad():
            for same in (other, *copies(module)): assert_close(same(x), module(x), 1e-6)
    return shown(max(gaps))

def check_weights(kind, module, path):
    "The subnet has the parameters that the path reads, and those alone."
    x, _ = batches(kind, 1)[0]
    net = make(kind)
    sum(out.sum() for out in tensors_in(net(x, path))).backward()
    of_net = dict(net.named_parameters(remove_duplicate=False)) # by all the names that they have
    read = {p for p in of_net.values() if p.grad is not None}
    frozen = {p for p in of_net.values() if not p.requires_grad}
    own = {of_net[name.removeprefix('net.')]: p.requires_grad for name,p in module.named_parameters()}
    assert {p for p,is_trained in own.items() if is_trained} == read
    assert {p for p,is_trained in own.items() if not is_trained} <= frozen

def check_modes(module, net, x, path):
    "Training and evaluation differ where they do in the plain network."
    for mode in (True, False):
        outs = []
        for forward in (module.train(mode), lambda x: net.train(mode)(x, path)):
            torch.manual_seed(3) # of dropout
            with torch.no_grad(): outs.append(forward(x))
        assert_close(*outs)

def copies(module):
    "Return copies, pickled ones where PyTorch allows that."
    yield copy.deepcopy(module)
    if any(map(is_parametrized, module.modules())): return
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)

def counted(kind, x, path):
    "Return the MACs of the plain network, by kernels in which PyTorch's counter sees all."
    net = make(kind).eval() # gradients stay on: no fused attention
    x = part(x, 0, 1)
    if not kind.needs_values:
        net = net.to('meta')
        x = map_tensors(lambda t: t.to('meta'), x)
    counter = FlopCounterMode(display=False)
    with torch.backends.mkldnn.flags(enabled=False), counter: net(x, path)
    return counter.get_total_flops()//2

def cost(kind, folder):
    "MACs and parameters are those of the plain network at each path."
    x = kind.data(2)[0]
    some = kind.paths[::max(1, len(kind.paths)//6)]
    for path,(macs,n_params) in zip(some, Cost(make(kind), x)(some)):
        assert macs == counted(kind, x, path)
        net = make(kind)
        sum(out.sum() for out in tensors_in(net(x, path))).backward()
        assert n_params == sum(p.numel() for p in net.parameters() if p.grad is not None)
    return f'{macs:,} MACs, {n_params:,} parameters'

# a subnet's later life

def taken_out(kind): return calibrated_subnet(supernet_of(kind), kind.paths[-1], CODE, batches(kind, 3))

def retrain_subnet(kind, folder):
    "Retraining lowers the loss, and the supernet keeps its weights."
    module = taken_out(kind)
    before = supernet_of(kind).tensors()
    recipe = get_recipe('quick', epochs=4, lr=kind.lr)
    log = retrain(module, data_of(kind), recipe, loss_func=kind.loss_func, metric=kind.metric).log
    assert log[-1]['loss'] < log[0]['loss'] and not module.training
    for name,W in supernet_of(kind).tensors().items(): assert W.equal(before[name]), name
    return f'{log[0]["loss"]:.2f} to {log[-1]["loss"]:.2f}'

def torch_export(kind, folder):
    "The exported program computes what the subnet does, for any batch."
    module = taken_out(kind)
    x = part(kind.data(5)[0], 0, 5)
    to_torch_export(module, x, folder/'subnet.pt2')
    program = torch.export.load(folder/'subnet.pt2').module()
    with torch.no_grad(): return shown(assert_close(program(x), module(x)))

def onnx(kind, folder):
    "onnxruntime computes what the subnet does, for any batch."
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    from onnxruntime import InferenceSession
    module = taken_out(kind)
    x = part(kind.data(5)[0], 0, 5)
    to_onnx(module, x, folder/'subnet.onnx')
    session = InferenceSession(folder/'subnet.onnx', providers=['CPUExecutionProvider'])
    inputs = {arg.name: t.numpy() for arg,t in zip(session.get_inputs(), tensors_in(x), strict=True)}
    outs = [torch.from_numpy(out) for out in session.run(None, inputs)]
    with torch.no_grad(): return shown(assert_close(outs, module(x), 1e-4))

CHECKS = dict(train=train, resume=resume, score=score, subnet=subnet, cost=cost, retrain=retrain_subnet,
              torch_export=torch_export, onnx=onnx)

def cells():
    "Return all kinds with all checks; ONNX takes long, so operators are converted once."
    for name,kind in KINDS.items():
        for check in CHECKS:
            is_slow = check == 'onnx' and kind.is_variant
            yield pytest.param(name, check, marks=[pytest.mark.slow] if is_slow else [])

@pytest.mark.parametrize('name, check', list(cells()))
def test_kind(name, check, tmp_path, record_property):
    kind = KINDS[name]
    line = kind.refused.get(check)
    if line is None: cell = CHECKS[check](kind, tmp_path)
    else:
        with pytest.raises(ValueError) as e: CHECKS[check](kind, tmp_path)
        assert line in str(e.value) and len(str(e.value).splitlines()) == 1
        cell = f'refused: {e.value}'
    record_property('cell', cell)
