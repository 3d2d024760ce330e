"Images as other programs write and read them, splits that hold across processes, the real CIFAR-10, a GPU"
import gc, os, pickle, struct
from pathlib import Path as FilePath
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

from kshot.data import TensorLoader, crop_and_flip, get_data, image_splits, mean_std, move
from kshot.datasets.folder import Files, ImageFiles, folder_splits, list_split, read_image
from kshot.datasets.images import IMAGE_SETS, find_images, load_images, read_images
from processes import Fork, call

# A small set as Python 2 would have written it, and as pictures

def python2_string(b):
    length = bytes([len(b)]) if len(b) < 256 else len(b).to_bytes(4, 'little')
    return (b'U' if len(b) < 256 else b'T') + length + b

def python2_int(n): return b'J' + n.to_bytes(4, 'little', signed=True)

def python2_dict(d):
    items = [python2_value(k) + python2_value(v) for k,v in d.items()]
    return b'}(' + b''.join(items) + b'u'

def python2_array(a): # of uint8, as the numpy of 2009 writes it
    dtype = b'cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN' + python2_int(-1)*2 + b'K\x00tb'
    empty = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR'
    shape = b'(K\x01(' + b''.join(map(python2_int, a.shape)) + b't'
    return empty + shape + dtype + b'\x89' + python2_string(a.tobytes()) + b'tb'

def python2_value(o):
    "Return the opcodes of Python 2, which nothing writes any more."
    if isinstance(o, str): return python2_string(o.encode())
    if isinstance(o, int): return python2_int(o)
    if isinstance(o, list): return b'](' + b''.join(map(python2_value, o)) + b'e'
    return python2_dict(o) if isinstance(o, dict) else python2_array(o)

def python2_pickle(o): return b'\x80\x02' + python2_value(o) + b'.'

N_PER_CLASS = {'train': 5, 'test': 2}

def draw_images(s, rng):
    "Draw images and classes of each split."
    out = {}
    for split,n in N_PER_CLASS.items():
        n *= s.n_classes
        out[split] = rng.integers(0, 256, (n,3,32,32), np.uint8), rng.permutation(np.arange(n)%s.n_classes)
    return out

def write_batches(folder, s, raw, classes):
    folder.mkdir(parents=True)
    for split,files in (('train', s.train), ('test', s.test)):
        parts = zip(*(np.array_split(o, len(files)) for o in raw[split]))
        for f,(x,y) in zip(files, parts):
            batch = {'data': x.reshape(len(x), -1), s.labels: y.tolist(), 'filenames': ['a.png']*len(x)}
            (folder/f).write_bytes(python2_pickle(batch))
    (folder/s.meta).write_bytes(python2_pickle({s.names: classes}))

def write_pictures(folder, raw, classes, has_superclasses):
    for split,(x,y) in raw.items():
        for i,(o,c) in enumerate(zip(x, y)):
            above = folder/split/(f'super_{c%20}' if has_superclasses else '.')/classes[c]
            above.mkdir(parents=True, exist_ok=True)
            Image.fromarray(o.transpose(1, 2, 0)).save(above/f'{i}.png')

@pytest.fixture(scope='module', params=['cifar10', 'cifar100'])
def tiny(request, tmp_path_factory):
    "Name of a small set, its images, its class names, and a folder with its batches and its pictures"
    name = request.param
    s = IMAGE_SETS[name]
    root = tmp_path_factory.mktemp(name)
    classes = [f'class_{c:03d}' for c in range(s.n_classes)]
    raw = draw_images(s, np.random.default_rng(0))
    write_batches(root/'batches'/s.folder, s, raw, classes)
    write_pictures(root/'pictures'/name, raw, classes, name == 'cifar100') # as fastai keeps them
    return name, raw, classes, root

@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home of kshot, and no data folder but the one that is named"
    monkeypatch.setenv('KSHOT_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('KSHOT_DATA', raising=False)
    return tmp_path/'home'

def rows(x, y): return sorted((o.tobytes(), int(c)) for o,c in zip(np.asarray(x), y))

def same_splits(a, b): return all(torch.equal(t, u) for k in a for t,u in zip(a[k], b[k], strict=True))

def test_batches_as_torchvision_reads_them(tiny, home):
    name, raw, classes, root = tiny
    images, names = read_images(name, root/'batches')
    assert names == classes
    theirs = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)[name]
    with patch('torchvision.datasets.cifar.check_integrity', return_value=True): # of the whole set
        for k in raw:
            set_ = theirs(root/'batches', train=k == 'train')
            assert set_.classes == names
            assert rows(*images[k]) == rows(*raw[k])
            assert rows(*raw[k]) == rows(set_.data.transpose(0, 3, 1, 2), set_.targets)

def test_all_layouts_give_the_same_tensors(tiny, home):
    name, raw, classes, root = tiny
    layouts = 'batches', 'pictures'
    assert [find_images(name, root/o).layout for o in layouts] == ['batches', 'folder']
    (a, names_a), (b, names_b) = (read_images(name, root/o) for o in layouts)
    assert names_a == names_b == classes
    assert same_splits(a, b)
    assert len(list((home/'images').iterdir())) == 2

def test_broken_batches(tiny, home, tmp_path):
    name, _, _, root = tiny
    s = IMAGE_SETS[name]
    folder = tmp_path/s.folder
    folder.mkdir()
    for f in (root/'batches'/s.folder).iterdir(): (folder/f.name).write_bytes(f.read_bytes())
    first = folder/s.train[0]
    whole = first.read_bytes()
    evil = b'cos\nsystem\n(' + python2_string(f'touch {tmp_path}/ran'.encode()) + b'tR.'
    for content,message in ((whole[:-100], first.name), (b'', first.name), (b'not a pickle', first.name),
                            (evil, 'system'), (python2_pickle({'data': 1}), "no 'data'")):
        first.write_bytes(content)
        with pytest.raises(ValueError, match=message) as e: read_images(name, folder)
        assert '\n' not in str(e.value)
    assert not (tmp_path/'ran').exists() and not home.exists()
    first.unlink()
    with pytest.raises(ValueError, match=f'lacks the file {first.name!r}'): read_images(name, tmp_path)

def test_splits_are_disjoint_stratified_and_whole(tiny, home):
    name, raw, _, root = tiny
    n = IMAGE_SETS[name].n_classes
    splits = image_splits(name, root/'pictures', portion=.6)
    assert [len(x) for x,_ in splits.values()] == [3*n, 2*n, 2*n]
    assert all((y.bincount() == len(y)//n).all() for _,y in splits.values())
    assert rows(*map(torch.cat, zip(splits['train'], splits['valid']))) == rows(*raw['train'])
    assert rows(*splits['test']) == rows(*raw['test'])
    for layout in 'pictures', 'batches':
        assert same_splits(splits, image_splits(name, root/layout, portion=.6))

def test_seed_moves_order_and_augmentation_only(tiny, home):
    name, _, _, root = tiny
    a, b, c = (get_data(name, bs=10, seed=s, folder=root/'pictures') for s in (0, 1, 1))
    assert all(torch.equal(u.x, v.x) and torch.equal(u.y, v.y) for u,v in zip(a, b))
    first, other, same = (next(iter(o.train)) for o in (a, b, c))
    assert not torch.equal(first[0], other[0])
    assert all(map(torch.equal, other, same))
    state = b.train.generator.get_state()
    later = list(b.train)
    b.train.generator.set_state(state)
    assert same_batches(later, b.train)

HASH = '''
import hashlib, sys
from kshot.data import get_data
h = hashlib.sha256()
for dl in get_data('cifar10', bs=5, folder=sys.argv[1]):
    for x,y in dl: h.update(x.numpy().tobytes() + y.numpy().tobytes())
print(h.hexdigest())
'''

def test_two_processes_at_once(tiny, home):
    name, _, _, root = tiny
    if name != 'cifar10': pytest.skip('one set is enough')
    processes = [Fork(HASH, root/'pictures') for _ in range(2)]
    (out, err), (out_2, err_2) = (p.communicate() for p in processes)
    assert out == out_2 and len(out) == 65 and not err and not err_2
    fname, = (home/'images').iterdir()
    assert load_images(fname)

# The real CIFAR-10

@pytest.fixture(scope='session')
def cached(tmp_path_factory): return tmp_path_factory.mktemp('kshot') # decoded once for all tests

@pytest.fixture
def cifar10(data, cached, monkeypatch):
    if not list(data.glob('cifar10_part*.npz')): pytest.skip(f'no CIFAR-10 in {data}')
    monkeypatch.setenv('KSHOT_HOME', str(cached))
    return data

def test_real_cifar10(cifar10, cached):
    images, names = read_images('cifar10', cifar10)
    assert names == 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    assert [y.bincount().tolist() for _,y in images.values()] == [[5000]*10, [1000]*10]
    mean, std = mean_std(images['train'][0])
    assert np.allclose(mean, [.4914, .4822, .4465], atol=5e-5)
    assert np.allclose(std, [.2470, .2435, .2616], atol=5e-5)
    assert len({o.tobytes() for x,_ in images.values() for o in x.numpy()}) == 60_000
    with patch('kshot.datasets.images.decode_images', side_effect=AssertionError('decoded twice')):
        again, _ = read_images('cifar10', cifar10)
    assert same_splits(images, again)
    assert len(os.listdir(cached/'images')) == 1

def test_real_loaders(cifar10):
    dls = get_data('cifar10', bs=256, folder=cifar10)
    assert [(len(dl), dl.bs) for dl in dls] == [(97, 256), (50, 500), (20, 500)]
    x, y = map(torch.cat, zip(*list(dls)[1]))
    assert y.bincount().tolist() == [2500]*10
    assert x.mean().abs() < .02 and abs(x.std() - 1) < .02
    small = get_data('cifar10', bs=100, folder=cifar10, n_train=1000, n_valid=500, px=16)
    assert [dl.x.shape for dl in small] == [(1000,3,16,16), (500,3,16,16), (10_000,3,16,16)]
    assert small.train.y.bincount().tolist() == [100]*10

@pytest.mark.cuda
def test_loader_never_waits_for_the_gpu():
    x = torch.randint(0, 256, (1000,3,32,32), dtype=torch.uint8)
    y = torch.arange(1000)%10
    dl = TensorLoader(x, y, 128, augment=crop_and_flip, shuffle=True, stats=([.5]*3, [.25]*3))
    plain = TensorLoader(x, y, 300, stats=([.5]*3, [.25]*3))
    want = torch.cat([x for x,_ in plain])
    for o in (dl, plain): o.to('cuda')
    torch.cuda.set_sync_debug_mode('error')
    try: batches = list(dl)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(batches) == 7
    assert all(x.is_cuda and y.is_cuda and x.dtype == torch.float32 for x,y in batches)
    assert torch.allclose(torch.cat([x for x,_ in plain]).cpu(), want, atol=1e-6)

@pytest.mark.cuda
def test_images_move_alike_on_the_gpu():
    x = torch.randint(0, 256, (1000,3,32,32), dtype=torch.uint8)
    dy, dx = torch.randint(0, 9, (2,1000,1))
    flip = torch.randint(0, 2, (1000,1)).bool()
    there = move(x.cuda(), dy.cuda(), dx.cuda(), 4, flip.cuda())
    assert torch.equal(there.cpu(), move(x, dy, dx, 4, flip))

# Folders of files, read by workers

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of three classes, 12 noisy JPEGs to train and 3 to test each, and three broken files"
    root = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for split,n in (('train', 12), ('val', 3)):
        for c in ('ant', 'bee', 'cat'):
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40+i, 60-i, 3), np.uint8)
                Image.fromarray(pixels).save(root/split/c/f'{i:02d}.jpg')
    whole = (root/BROKEN[0]).read_bytes()
    for f,content in zip(BROKEN, (whole[:500], b'', b'text')): (root/f).write_bytes(content)
    return root

BROKEN = ['train/ant/03.jpg', 'train/cat/11.jpg', 'val/bee/01.jpg']

def same_batches(a, b):
    return all(torch.equal(t, u) for xy,uv in zip(a, b, strict=True) for t,u in zip(xy, uv, strict=True))

def photo_loaders(folder, **kwargs):
    usual = dict(folder=folder, bs=6, px=24, n_valid=11, n_workers=0)
    return get_data('imagenet', **usual | kwargs)

def broken_of(*loaders): return sorted({f for dls in loaders for dl in dls for f in dl.broken})

@pytest.mark.parametrize('augment', ['mild', 'strong'])
def test_workers_leave_no_trace(photos, augment):
    here, there = (photo_loaders(photos, augment=augment, n_workers=n) for n in (0, 2))
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for a,b in zip(here, there):
        for _ in range(2): assert same_batches(list(a), list(b)) # two epochs
        assert torch.equal(a.generator.get_state(), b.generator.get_state())
        assert same_batches(a.fixed(7), b.fixed(7))
    assert torch.equal(torch.get_rng_state(), state) and np.random.get_state()[1].tolist() == numpy_state
    for dls in here, there: assert sorted(f for dl in dls for f in dl.broken) == BROKEN

@pytest.mark.parametrize('n_workers', [0, 2])
def test_resume_to_the_bit(photos, n_workers):
    dls = photo_loaders(photos, n_workers=n_workers, passes=2)
    list(dls.train)
    state = dls.train.generator.get_state()
    later = [list(dls.train) for _ in range(2)]
    new = photo_loaders(photos, n_workers=2-n_workers, passes=2, seed=9)
    new.train.generator.set_state(state)
    assert all(same_batches(epoch, list(new.train)) for epoch in later)
    assert not same_batches(*later)
    assert torch.equal(new.train.generator.get_state(), dls.train.generator.get_state())

def test_an_epoch_that_is_left_does_not_leak_into_the_next(photos):
    a, b = (photo_loaders(photos, n_workers=2).train for _ in range(2))
    next(iter(a))
    list(b)
    assert same_batches(a.fixed(2), b.fixed(2))
    assert same_batches(list(a), list(b))
    for (x,_),_ in zip(a, range(2)): a.fixed(1) # in the middle of an epoch
    assert x.shape == (6,3,24,24) and not same_batches(list(a), list(b)) # one epoch ahead

def test_shards_with_workers(photos):
    one = photo_loaders(photos)
    ranks = [photo_loaders(photos, n_workers=n, shard=shard) for n,shard in ((1, (0, 2)), (2, (1, 2)))]
    for k,dl in enumerate(one):
        batches = list(dl)
        for r,dls in enumerate(ranks): assert same_batches(dls[k], [(x[r::2], y[r::2]) for x,y in batches])
    assert broken_of(*ranks) == broken_of(one)

def test_workers_are_told_to_stop(photos, monkeypatch):
    "Workers hear it although the loader is collected with a cycle, whose queue would be closed before."
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers
    ends = []
    plain = Workers._shutdown_workers
    def shutdown(self):
        ends.append([len(q._buffer) for q in self._index_queues])
        plain(self)
    monkeypatch.setattr(Workers, '_shutdown_workers', shutdown)
    dl = photo_loaders(photos, n_workers=2).train
    for _ in range(2): list(dl)
    dl.cycle = [dl]
    del dl
    gc.collect()
    assert ends == [[0, 0]]

def test_workers_that_are_not_forked(photos):
    images = photo_loaders(photos, augment='strong').train.images
    assert torch.equal(pickle.loads(pickle.dumps(images))[5, 7][0], images[5, 7][0])

def tiff(values, bits, signed=0, is_float=False, big_endian=False, white_is_zero=False):
    "Return a gray TIFF of one strip, by hand: PIL does not write most of these types."
    e = '>' if big_endian else '<'
    if bits == 12: # two values in three bytes
        a, b = values.reshape(-1, 2).T
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    else: data = values.astype(f'{e}{"f" if is_float else "ui"[signed]}{bits//8}').tobytes()
    height, width = values.shape
    kind = 3 if is_float else 1 + signed
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: not white_is_zero, 273: 8, 277: 1,
            278: height, 279: len(data), 339: kind} # size, depth, no compression, gray, where the strip is
    entries = [struct.pack(f'{e}HHII', tag, 4, 1, value) for tag,value in tags.items()]
    head = (b'MM\0*' if big_endian else b'II*\0') + struct.pack(f'{e}I', 8 + len(data))
    return head + data + struct.pack(f'{e}H', len(tags)) + b''.join(entries) + bytes(4)

RANGES = { # bits, sign, float?, big-endian?, white is zero? -> largest value, value of white
    '16': (dict(bits=16), 65535, 65536), '16 big': (dict(bits=16, big_endian=True), 65535, 65536),
    '16 dark': (dict(bits=16), 300, 65536), '12': (dict(bits=12), 4095, 4096),
    '16 negative': (dict(bits=16, white_is_zero=True), 65535, 65536),
    'int16': (dict(bits=16, signed=1), 32767, 65536), 'int16 small': (dict(bits=16, signed=1), 255, 256),
    'int16 big': (dict(bits=16, signed=1, big_endian=True), 32767, 65536),
    'uint32': (dict(bits=32), 65535, 65536), 'uint32 small': (dict(bits=32), 255, 256),
    'int32 big': (dict(bits=32, signed=1, big_endian=True), 65535, 65536),
    'int32 small': (dict(bits=32, signed=1), 255, 256),
    'share': (dict(bits=32, is_float=True), 1, 1),
    'share big': (dict(bits=32, is_float=True, big_endian=True), 1, 1),
    'share negative': (dict(bits=32, is_float=True, white_is_zero=True), 1, 1),
    'float': (dict(bits=32, is_float=True), 255, 256)}

@pytest.mark.parametrize('kind, top, size', RANGES.values(), ids=RANGES)
def test_gray_tiffs_show_their_values(kind, top, size, tmp_path):
    shares = np.random.default_rng(0).random((6, 8))
    shares[0, :2] = 0, 1
    values = shares*top if kind.get('is_float') else np.floor(shares*top).astype(int)
    (tmp_path/'x.tif').write_bytes(tiff(values, **kind))
    expected = values/size*256
    if kind.get('white_is_zero'): expected = 255 - expected
    seen = np.asarray(read_image(tmp_path/'x.tif')).astype(float)
    assert seen.shape == (6, 8, 3) and np.abs(seen - expected[..., None]).max() <= 1

UNREADABLE = { # a whole value of the type -> a picture of it has no known range
    'int32': (dict(bits=32, signed=1), [0, 65536]), 'negative': (dict(bits=32, signed=1), [-1, 9]),
    'negative int16': (dict(bits=16, signed=1), [-1, 9]), 'uint32': (dict(bits=32), [0, 2**32-1]),
    'float': (dict(bits=32, is_float=True), [0, 256]), 'below': (dict(bits=32, is_float=True), [-.5, .5]),
    'nan': (dict(bits=32, is_float=True), [0, np.nan]), 'inf': (dict(bits=32, is_float=True), [0, np.inf])}

@pytest.mark.parametrize('kind, values', UNREADABLE.values(), ids=UNREADABLE)
def test_gray_tiffs_without_a_range_count_as_broken(kind, values, tmp_path):
    (tmp_path/'0.tif').write_bytes(tiff(np.array([values, values]), **kind))
    with pytest.raises(ValueError, match='gray values .* expected 0-1 or 0-255'): read_image(tmp_path/'0.tif')
    Image.new('L', (2, 2), 77).save(tmp_path/'1.png')
    images = ImageFiles(Files(tmp_path, np.array([b'0.tif', b'1.png']), torch.tensor([0, 1])), 2)
    x, y, index, n_skipped = images[0, 0]
    assert (x == 77).all() and (y, index, n_skipped) == (1, 0, 1)

def colors_of(mode, a): # `(h, w, bands)` -> what it shows in 8 bits a color
    if mode == '1': return np.where(a[..., :1] > 127, 255, 0)
    if mode in ('L', 'LA', 'RGB', 'RGBA'): return a[..., :3 if mode[0] == 'R' else 1]
    return (255 - a[..., :3].astype(int))*(255 - a[..., 3:].astype(int))/255 # CMYK

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'RGB', 'RGBA', 'CMYK'])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_modes_show_their_colors(mode, suffix, tmp_path):
    if (mode, suffix) == ('CMYK', 'png'): pytest.skip('PNG has no such mode')
    a = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
    bands = a[..., :len(Image.new(mode, (1, 1)).getbands())]
    if mode == '1': img = Image.fromarray(bands[..., 0] > 127)
    else: img = Image.frombytes(mode, (8, 6), bands.tobytes())
    img.save(tmp_path/f'x.{suffix}')
    seen = np.asarray(read_image(tmp_path/f'x.{suffix}')).astype(float)
    assert np.abs(seen - colors_of(mode, bands)).max() <= 1

def test_palettes_pages_and_wide_gray(tmp_path):
    colors, fname = np.random.default_rng(0).integers(0, 256, (4, 3), np.uint8), tmp_path/'x.png'
    indexes = Image.frombytes('P', (4, 4), bytes([*range(4)]*4))
    indexes.putpalette(colors.tobytes())
    for kwargs in {}, dict(transparency=b'\0\x80\xff\1'), dict(transparency=2):
        indexes.save(fname, **kwargs)
        assert (np.asarray(read_image(fname)) == colors[None]).all()
    first, second = (Image.new('RGB', (4, 4), color) for color in ('red', 'blue'))
    for suffix in 'tif', 'gif', 'webp', 'png':
        kwargs = dict(lossless=True) if suffix == 'webp' else {}
        first.save(tmp_path/f'pages.{suffix}', save_all=True, append_images=[second], **kwargs)
        assert read_image(tmp_path/f'pages.{suffix}').getpixel((2, 2)) == (255, 0, 0)
    wide = np.random.default_rng(0).integers(0, 65536, (4, 4), np.uint16)
    for suffix in 'png', 'pgm', 'tif':
        for top in wide, wide >> 8:
            Image.fromarray(top).save(tmp_path/f'wide.{suffix}')
            assert (np.asarray(read_image(tmp_path/f'wide.{suffix}'))[..., 0] == top >> 8).all()

def test_nothing_readable(tmp_path):
    for above in 'train/a', 'train/b', 'val/a', 'val/b':
        (tmp_path/above).mkdir(parents=True)
        for i in range(3): (tmp_path/above/f'{i}.jpg').touch()
    for n_workers in 0, 2:
        dls = photo_loaders(tmp_path, n_valid=2, bs=2, n_workers=n_workers)
        with pytest.raises(ValueError, match='cannot be read') as e: list(dls[2])
        assert str(e.value) == "image 'val/a/0.jpg' and the 5 after it cannot be read"

SPLIT = '''
import hashlib, sys
from kshot.datasets.folder import folder_splits
splits, classes = folder_splits(sys.argv[1], 11)
h = hashlib.sha256()
for files in splits.values(): h.update(files.names.tobytes() + files.y.numpy().tobytes())
print(h.hexdigest())
'''

def test_splits_hold_across_processes_and_copies(photos, tmp_path):
    for f in sorted(photos.rglob('*.jpg'), key=lambda f: f.name[::-1], reverse=True):
        copy = tmp_path/f.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(f)
    out, out_copy = (call(SPLIT, d)[1] for d in (photos, tmp_path))
    assert out == out_copy and len(out) == 65

def grow(folder, rng, depth=0):
    "Put images, other files, folders, broken links and links to folders elsewhere below a folder."
    folder.mkdir(parents=True)
    for i in range(rng.integers(0, 4)):
        letter, suffix = rng.choice([*'aB-1é']), rng.choice(['png', 'JPG'])
        (folder/f'{letter}{i}.{suffix}').touch()
    for name in 'notes.txt', 'no_suffix': (folder/name).touch()
    (folder/'broken.png').symlink_to('nowhere.png')
    (folder/'broken').symlink_to('nowhere')
    if depth == 3: return
    for name in rng.permutation(['a', 'a-b', 'a b', 'x.png', 'B'])[:rng.integers(0, 4)]:
        if rng.random() > .2: grow(folder/name, rng, depth+1)
        else: (folder/name).symlink_to(folder.parents[depth+1]/'elsewhere')

@pytest.mark.parametrize('seed', range(20))
def test_nested_classes_are_those_of_torchvision(seed, tmp_path):
    rng = np.random.default_rng(seed)
    for name in 'x/1.png', 'x/y/2.png', '3.jpg':
        (tmp_path/'elsewhere'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'elsewhere'/name).touch()
    for c in 'b', 'a', 'a-c': grow(tmp_path/'train'/c, rng)
    for c in 'b', 'a', 'a-c': (tmp_path/'train'/c/'0.png').touch()
    (tmp_path/'train/linked').symlink_to('../elsewhere')
    theirs = [sample for sample in ImageFolder(tmp_path/'train').samples if os.path.exists(sample[0])]
    by_class = list_split(tmp_path, 'train')
    ours = [(str(tmp_path/name.decode()), y) for y,names in enumerate(by_class.values()) for name in names]
    assert ours == theirs and len(by_class) == 4

@pytest.mark.parametrize('link', ['self', 'cat/self', 'cat/self.png'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_link_to_itself_ends_a_split_in_one_line(split, link, tmp_path):
    for name in 'train', 'val':
        (tmp_path/name/'cat').mkdir(parents=True)
        for i in range(3): (tmp_path/name/f'cat/{i}.png').touch()
    folder_splits(tmp_path, 1)
    (tmp_path/split/link).symlink_to(FilePath(link).name)
    with pytest.raises(ValueError, match=f"{split}/{link}' cannot be listed") as e: folder_splits(tmp_path, 1)
    assert len(str(e.value).splitlines()) == 1

@pytest.mark.cuda
def test_files_on_the_gpu(photos):
    here, there = (photo_loaders(photos, n_workers=2) for _ in range(2))
    there.to('cuda')
    for a,b in zip(here, there):
        for (x,y),(u,v) in zip(a, b, strict=True):
            assert u.is_cuda and v.is_cuda and u.is_contiguous(memory_format=torch.channels_last)
            assert torch.allclose(u.cpu(), x, atol=1e-6) and torch.equal(v.cpu(), y)
        assert torch.equal(a.generator.get_state(), b.generator.get_state())
