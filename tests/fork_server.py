"""Starts `lasnn` commands as forks of a process that has imported what they need: importing PyTorch anew for each of a
hundred commands is most of what they take. A command is a process of its own all the same, with its own arguments,
folder, environment, standard output and exit code.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile

IMPORTED = (
    "lasnn.cli",
    "lasnn.compare",
    "lasnn.console",
    "lasnn.evaluation.evaluate",
    "lasnn.kernels.cpu.loops",
    "lasnn.report",
    "lasnn.training.distill",
    # What an optimiser imports when it is first made.
    "torch._dynamo",
)


class ForkServer:
    """The process that forks; it is started at the first command."""

    def __init__(self):
        self.socket, other = socket.socketpair()
        command = [sys.executable, __file__, str(other.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[other.fileno()])
        other.close()

    def run(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
        """Run `lasnn ARGUMENTS`; returns the exit code (negative: the signal that ended it) and what it wrote."""
        with TemporaryFile() as out, TemporaryFile() as err:
            request = json.dumps([arguments, str(folder), environment]).encode()
            socket.send_fds(self.socket, [len(request).to_bytes(4), request], [out.fileno(), err.fileno()])
            code = json.loads(self.socket.recv(64))
            out.seek(0)
            err.seek(0)
            return code, out.read().decode(), err.read().decode()

    def end(self) -> None:
        self.socket.close()
        self.process.wait()


def serve(requests: socket.socket) -> None:
    """Run a command for each request, to the end of the requests."""
    for name in IMPORTED:
        import_module(name)
    load_kernels()
    while True:
        head, files, *_ = socket.recv_fds(requests, 4, 2)
        if not head:
            return
        arguments, folder, environment = json.loads(requests.recv(int.from_bytes(head), socket.MSG_WAITALL))
        command = get_context("fork").Process(target=run_command, args=(arguments, folder, environment, files))
        command.start()
        for file in files:
            os.close(file)
        command.join()
        requests.sendall(json.dumps(command.exitcode).encode())


def load_kernels() -> None:
    """Compile the CPU kernels, or read them from their cache."""
    import torch

    from lasnn.kernels import lif, norm_lif

    lif(torch.zeros(1, 1))
    norm_lif(torch.zeros(2, 1, 2, 2), torch.nn.BatchNorm2d(1), timesteps=1)


def run_command(arguments: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """The command, in its own process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
    sys.argv = ["lasnn", *arguments]
    # As `python -m` has it.
    sys.path[0] = folder
    runpy.run_module("lasnn", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
