"""`run_ranks`: run a function of a test module on many ranks, in processes that live as long as the test session.

The ranks of a world size start once, by forkserver with torch preloaded, and make a fresh process group for each call:
that takes milliseconds where a start takes seconds. For GPUs they are spawned.
"""

import atexit
import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

# Slow to import. The server that forks the ranks loads those which this process has loaded: its tests need them.
# (pytest: a child imports what its parent's __main__ imports.)
SLOW = [
    "torch",
    "torch.distributed.device_mesh",
    "pytest",
    "hypothesis",
    "heterostep.parallel.attention",
    "heterostep.engine.engine",
    "heterostep.engine.denoise.session",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
]


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback or its stack."""


def run_ranks(world_size, fn, *args, timeout=60.0, backend="gloo"):
    """Call fn(*args) on every rank of a new process group, and return the results by rank.

    Args:
        world_size: number of ranks.
        fn: a function at the top of a module; the ranks load it from its file.
        args: what can be pickled, alike for all ranks; `torch.distributed.get_rank()` tells them apart.
        timeout: seconds for all of it. Ranks that do not make it are killed.
        backend: of the process group.

    Raises:
        RankError: with the traceback of the rank that failed first, or the stacks of all after the time limit.
    """
    # What a forkserver preloads may look at the GPU, after which no child of it can use one.
    team = _Team.of(world_size, "spawn" if backend == "nccl" else "forkserver")
    try:
        return team.call(fn, args, timeout, backend)
    except BaseException:
        team.kill()  # others may wait for the failed rank inside a collective, for ever
        raise


class _Team:
    """The processes of one world size, started in one way."""

    alive: ClassVar[dict] = {}

    @classmethod
    def of(cls, *key):
        if key not in cls.alive:
            cls.alive[key] = cls(*key)
        return cls.alive[key]

    def __init__(self, world_size, method):
        self.key, context = (world_size, method), multiprocessing.get_context(method)
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.calls = 0
        if method == "forkserver":
            context.set_forkserver_preload([name for name in SLOW if name in sys.modules])
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            stack = Path(self.folder.name) / f"stack-{rank}"
            process = context.Process(target=_serve, args=(theirs, rank, world_size, str(stack)), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, fn, args, timeout, backend):
        assert "." not in fn.__qualname__, "the function must be at the top of its module"
        self.calls += 1
        rendezvous = Path(self.folder.name) / f"rendezvous-{self.calls}"
        task = (inspect.getsourcefile(fn), fn.__name__, args, timeout, backend, str(rendezvous))
        payload = pickle.dumps(task)
        for pipe in self.pipes:
            pipe.send_bytes(payload)
        results = {}
        deadline = time.monotonic() + timeout
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise RankError(f"no result within {timeout} s\n{self.stacks(results)}")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    failed, results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(5.0)
                    code = self.processes[rank].exitcode
                    raise RankError(f"rank {rank} of {len(self.pipes)} died with exit code {code}") from None
                if failed:
                    raise RankError(f"rank {rank} of {len(self.pipes)}\n{results[rank]}")
        return [results[rank] for rank in range(len(self.pipes))]

    def stacks(self, results):
        texts = []
        for rank in range(len(self.pipes)):
            path = Path(self.folder.name) / f"stack-{rank}"
            text = "finished" if rank in results else path.read_text() if path.exists() else "not started"
            texts.append(f"rank {rank}: {text}")
        return "\n".join(texts)

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.alive.pop(self.key, None)
        self.folder.cleanup()


@atexit.register
def _kill_all():
    for team in list(_Team.alive.values()):
        team.kill()


def _serve(pipe, rank, world_size, stack):
    """Life of a rank: take a function, run it, send its result, until the parent is gone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    modules = {}
    with contextlib.suppress(EOFError), open(stack, "w") as stack_file:
        while True:
            file, name, args, timeout, backend, rendezvous = pickle.loads(pipe.recv_bytes())
            faulthandler.dump_traceback_later(0.9 * timeout, file=stack_file)
            try:
                if file not in modules:
                    modules[file] = _load(file)
                dist.init_process_group(
                    backend,
                    init_method=f"file://{rendezvous}",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout),
                )
                reply = False, getattr(modules[file], name)(*args)
                dist.destroy_process_group()
                message = pickle.dumps(reply)
            except Exception:
                message = pickle.dumps((True, traceback.format_exc()))
            faulthandler.cancel_dump_traceback_later()
            pipe.send_bytes(message)


def _load(file):
    """Import a test module from its file, whatever name pytest gave it."""
    name = f"ranks_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
