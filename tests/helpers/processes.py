"""Start processes quickly: forks of one that has imported kshot, so that none waits for an import.

torchrun, accelerate and entry points are started in earnest where they are the subject of a test.
"""
import atexit
import os
import signal
import socket
import sys
import tempfile
import warnings
from multiprocessing import active_children, get_context, set_start_method
from pathlib import Path

import torch

CONTEXT = get_context('forkserver')
CONTEXT.set_forkserver_preload(['kshot.cli.work', 'kshot.studies.study', 'kshot.cli.bench'])

@atexit.register
def kill_leftovers(): # of a failed test: Python would wait for them
    for process in active_children(): process.kill()

def run_code(code, args, env, before, streams):
    "Run code as the main module of this process, which writes to two files."
    for fd,fname in enumerate(streams, 1): os.dup2(os.open(fname, os.O_WRONLY|os.O_APPEND), fd)
    os.environ.clear()
    os.environ.update(env)
    # also where the tests run in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter('ignore')
    set_start_method('fork', force=True) # fastai's choice; a process of this kind would keep its own
    torch.set_num_threads(1)
    sys.argv = ['-c', *args]
    for function,*values in before: function(*values)
    exec(code, {'__name__': '__main__'})

class Fork:
    "Process with the methods of `subprocess.Popen` that tests use."
    def __init__(self,
        code:str,  # Python, as after `python -c`
        *args,     # of its command line
        env=None,  # further variables of its environment
        before=(), # `(function, *arguments)` to call first
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [f'{self.folder.name}/{name}' for name in ('out', 'err')]
        for fname in self.streams: Path(fname).touch()
        call = code, [*map(str, args)], os.environ | (env or {}), before, self.streams
        self.process = CONTEXT.Process(target=run_code, args=call)
        self.process.start()
        self.pid = self.process.pid

    def poll(self): return self.process.exitcode

    @property
    def returncode(self): return self.poll()

    def send_signal(self, number): os.kill(self.pid, number)

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise TimeoutError(f'still running after {timeout} s: {self.read()}')
        return self.poll()

    def read(self): return tuple(Path(fname).read_text() for fname in self.streams)

    def communicate(self, timeout=300):
        self.wait(timeout)
        return self.read()

def command(name) -> str:
    "Return code that runs a console command."
    return f'import sys; from kshot.cli.main import main; sys.exit(main([{name!r}, *sys.argv[1:]]))'

def call(code, *args, **kwargs) -> tuple[int, str, str]: # exit code, standard output, standard error
    "Run code in a process and wait for it."
    process = Fork(code, *args, **kwargs)
    out, err = process.communicate()
    return process.returncode, out, err

def free_port() -> int:
    "Return a port that nobody listens on."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def call_ranks(n, code, *args) -> tuple[int, str, str]: # worst exit code, all output, all errors
    "Run code in `n` processes of a group, as torchrun starts them; none ends the others if it fails."
    if n == 1: return call(code, *args)
    group = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    group |= dict.fromkeys(('WORLD_SIZE', 'LOCAL_WORLD_SIZE'), str(n))
    ranks = [Fork(code, *args, env=group | dict.fromkeys(('RANK', 'LOCAL_RANK'), str(i))) for i in range(n)]
    outs, errs = zip(*[process.communicate() for process in ranks])
    return max((process.returncode for process in ranks), key=abs), ''.join(outs), ''.join(errs)
