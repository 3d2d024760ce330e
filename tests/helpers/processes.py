"""Processes for tests: forks of one that has imported kshot, so that none has to wait for an import.
What starts a process in earnest (torchrun, accelerate, entry points) is started in earnest where it is the subject."""
import atexit, os, signal, socket, sys, tempfile, warnings
from multiprocessing import active_children, get_context, set_start_method
from pathlib import Path

import torch

CONTEXT = get_context('forkserver')
CONTEXT.set_forkserver_preload(['kshot.cli.launch', 'kshot.studies.study', 'kshot.cli.bench'])

@atexit.register
def _end(): # of what a failed test has left, which Python would wait for
    for p in active_children(): p.kill()

def _run(code, args, env, before, streams):
    for fd,fname in enumerate(streams, 1): os.dup2(os.open(fname, os.O_WRONLY|os.O_APPEND), fd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler) # also where the tests themselves run in the background of a shell
    warnings.simplefilter('ignore')
    set_start_method('fork', force=True) # as fastai sets it: a process of this kind would go on with its own
    torch.set_num_threads(1)
    sys.argv = ['-c', *args]
    for f,*a in before: f(*a)
    exec(code, {'__name__': '__main__'})

class Fork:
    "A process with the methods of `subprocess.Popen` that tests use."
    def __init__(self,
        code:str,  # Python, as after `python -c`
        *args,     # of its command line
        env=None,  # variables that it has besides
        before=(), # `(function, *arguments)` that are called first
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [f'{self.folder.name}/{s}' for s in ('out', 'err')]
        for s in self.streams: Path(s).touch()
        self.process = CONTEXT.Process(target=_run, args=(code, [*map(str, args)], os.environ | (env or {}), before, self.streams))
        self.process.start()
        self.pid = self.process.pid
    def poll(self): return self.process.exitcode
    @property
    def returncode(self): return self.poll()
    def send_signal(self, how): os.kill(self.pid, how)
    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise TimeoutError(f'still at work after {timeout} s: {self.read()}')
        return self.poll()
    def read(self): return tuple(Path(s).read_text() for s in self.streams)
    def communicate(self, timeout=300):
        self.wait(timeout)
        return self.read()

def command(name, module='cli.launch') -> str: # code of a command
    return f'import sys; from kshot.{module} import {name}; sys.exit({name}())'

def call(code, *args, **kwargs) -> tuple[int, str, str]: # its end, what it printed, its errors
    p = Fork(code, *args, **kwargs)
    out, err = p.communicate()
    return p.returncode, out, err

def call_ranks(n, code, *args) -> tuple[int, str, str]: # the worst end, what all printed, all errors
    "As many processes of one group, as torchrun would start them; nobody ends the others if one fails."
    if n == 1: return call(code, *args)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    group = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=f'{port}', WORLD_SIZE=f'{n}', LOCAL_WORLD_SIZE=f'{n}')
    ranks = [Fork(code, *args, env=group | dict(RANK=f'{i}', LOCAL_RANK=f'{i}')) for i in range(n)]
    said = [p.communicate() for p in ranks]
    return max((p.returncode for p in ranks), key=abs), *map(''.join, zip(*said))
