"""`Popen` of `python -m ...` without the seconds that imports take.

`Popen` is subprocess's, but what it runs by this Python is forked from a server that has loaded PyTorch and diffusers:
a process with its own id, signals, folder, environment and files, as a user's, that starts in a tenth of the time. What
it starts itself (ranks, workers) is forked from the same server. For tests that are not about the start.
"""

import atexit
import contextlib
import ctypes
import os
import pickle
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

_PRELOADED = (
    "torch",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "heterostep.launch.generate",
    "heterostep.launch.serve",
    "heterostep.launch.workers.process",
    "heterostep.launch.workers.rank",
    "heterostep.engine.media.video",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.tokenization_t5",
    "torch.distributed.run",
    "heterostep.launch.service.app",
    "heterostep.launch.service.service",
    "uvicorn",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
)
WORKS = sys.platform == "linux"
"""Elsewhere every process starts as usual."""
_MAX_REQUEST = 1 << 20
_address = None
_start = threading.Lock()
_Stock = subprocess.Popen


class Popen(_Stock):
    """A process; forked from the server if it is this Python's."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, *rest,
    ):  # fmt: skip
        words = [os.fsdecode(word) for word in args] if isinstance(args, list | tuple) else []
        self._line = None
        if not WORKS or not words or words[0] != sys.executable:
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, *rest,
            )  # fmt: skip
        *_, new_session, _ = rest
        self._reading, self._line = threading.Lock(), _connect()
        files = [own if file == -1 else file for own, file in enumerate((p2cread, c2pwrite, errwrite))]
        request = {
            "argv": words[1:],
            "cwd": os.getcwd() if cwd is None else os.fspath(cwd),
            "env": {os.fsdecode(k): os.fsdecode(v) for k, v in (os.environ if env is None else env).items()},
            "session": bool(new_session),
            "spaces": f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns",
        }
        socket.send_fds(self._line, [pickle.dumps(request)], files)
        what, self.pid = pickle.loads(self._line.recv(1024))
        assert what == "pid", "the process ended before it began"
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _look(self, timeout):
        """Take the exit code if it is there in time."""
        if self.returncode is None and select.select([self._line], [], [], timeout)[0]:
            with self._reading:
                if self.returncode is None:
                    told = self._line.recv(1024)
                    assert told, "the server of forks is gone"
                    _, self.returncode = pickle.loads(told)
        return self.returncode

    def _internal_poll(self, *args, **kwargs):
        return super()._internal_poll(*args, **kwargs) if self._line is None else self._look(0.0)

    def _wait(self, timeout):
        if self._line is None:
            return super()._wait(timeout)
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run(command, timeout=None, **settings):
    """`subprocess.run` with the output captured as text."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def find(**variables):
    """Process number of a forked process with these environment variables; None while there is none."""
    with _connect() as line:
        line.send(pickle.dumps({"find": variables}))
        return pickle.loads(line.recv(1024))


def _connect():
    global _address  # noqa: PLW0603 - one server for each process of pytest
    with _start:
        if _address is None:
            _address = _start_server()
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST)
    line.connect(_address)
    return line


def _start_server():
    address = os.path.join(tempfile.mkdtemp(prefix="forks-"), "server")
    server = _Stock(  # also where subprocess's was replaced
        [sys.executable, os.path.abspath(__file__), address],
        stdin=subprocess.PIPE,  # when it ends, the server and all that it forked do
        stdout=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout.readline() == b"ready\n", "the server of forks did not start"

    @atexit.register
    def end():
        server.stdin.close()
        server.wait()

    return address


class _Server:
    """Forks what is asked for, and tells how it ended."""

    def __init__(self, address):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(address)
        self.folder = os.path.dirname(address)
        self.listener.listen(64)
        # A signal handler does nothing but wake `select`.
        self.woken, wake = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(wake, False)
        self.wake = wake
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.children = {}

    def next(self):
        """Serve until there is a request for whose sake this process is forked: it returns in the child."""
        while True:
            ready, _, _ = select.select([self.listener, self.woken, 0], [], [])
            if 0 in ready:
                for pid in self.children:
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(self.folder, ignore_errors=True)
                os._exit(0)
            if self.woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.woken, 1024)
                self.bury()
            if self.listener in ready:
                request = self.answer(self.listener.accept()[0])
                if request is not None:
                    return request

    def bury(self):
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            line, _ = self.children.pop(pid)
            with line, contextlib.suppress(OSError):  # whoever asked is gone
                line.send(pickle.dumps(("status", os.waitstatus_to_exitcode(status))))

    def answer(self, line):
        data, files, _, _ = socket.recv_fds(line, _MAX_REQUEST, 3)
        if not data:
            return line.close()
        request = pickle.loads(data)
        if "find" in request:
            wanted = request["find"].items()
            found = [pid for pid, (_, env) in self.children.items() if wanted <= env.items()]
            with line:
                line.send(pickle.dumps(found[0] if found else None))
            return None
        pid = os.fork()
        if pid:
            self.children[pid] = line, request["env"]
            for file in files:
                os.close(file)
            return None
        self.become(request, files)
        line.send(pickle.dumps(("pid", os.getpid())))
        line.close()
        return request

    def become(self, request, files):
        """Leave all that is the server's, in the child."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for other, _ in self.children.values():
            other.close()
        self.listener.close()
        for file in (self.woken, self.wake):
            os.close(file)
        _enter(request["spaces"])
        if request["session"]:
            os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        tempfile.tempdir = None


def _enter(spaces):
    """Be on the machine of whoever asked, which may be in a network of its own (`machines.py`)."""
    for kind in ("net", "uts"):
        if os.stat(f"{spaces}/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino:
            with open(f"{spaces}/{kind}") as space:
                assert ctypes.CDLL(None).setns(space.fileno(), 0) == 0


def _run(argv):
    """What `python` does with these arguments."""
    path = list(sys.path)
    while argv[0] not in ("-m", "-c") and argv[0].startswith("-"):
        argv.pop(0)  # such as -P
    kind, *rest = argv
    if kind == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # runpy would warn
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path = argv, [os.path.dirname(os.path.abspath(kind)), *path]
        runpy.run_path(kind, run_name="__main__")


def _serve(address):
    import gc
    import importlib

    # This module, as those that are preloaded may already look for it.
    sys.modules["forked"] = sys.modules["__main__"]
    globals()["_address"] = address
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.Popen = Popen
    for name in _PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    gc.collect()
    gc.freeze()
    server = _Server(address)
    os.write(1, b"ready\n")
    argv = server.next()["argv"]
    status = 0
    try:
        _run(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        status = end.code or 0
    # As an interpreter ends, but without taking all modules apart.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
