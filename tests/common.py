"""What the tests share: the command line as a process, and a recipe that trains in seconds."""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from fork_server import ForkServer

ROOT = Path(__file__).parents[1]

# Narrow and short: what is tested with it is the machinery, not the accuracy.
TINY = """
[data]
name = "tiny-clothes"
batch_size = 50

[teacher]
architecture = "vgg5"
width = 4
epochs = 2

[student]
architecture = "vgg5"
width = 4
timesteps = 2
init = "random"

[distill]
epochs = 2
lr = 0.05
"""

# The first images of the shipped subset under a name of their own, as a user would register a data set.
TINY_DATA = '''
from lasnn import datasets
from lasnn.data import Dataset, Images
from lasnn.data.fashion_mnist import FashionMnistMini


@datasets.register("tiny-clothes")
class TinyClothes(Dataset):
    """400 training and 120 test images of the shipped subset."""

    channels, height, width = 1, 28, 28
    classes = FashionMnistMini.classes
    mean, std = FashionMnistMini.mean, FashionMnistMini.std
    train_size, test_size = 400, 120
    augment = ("flip",)

    def __init__(self, root):
        self.root = root

    def load(self):
        train, test = FashionMnistMini(self.root).load()
        return (
            Images(train.pixels[::12][:400], train.labels[::12][:400]),
            Images(test.pixels[::16][:120], test.labels[::16][:120]),
        )
'''


@cache
def fork_server() -> ForkServer:
    server = ForkServer()
    atexit.register(server.end)
    return server


class Command:
    """Runs `lasnn` as a process in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}

    def start(self, *arguments, **options) -> subprocess.Popen:
        """A process that goes on by itself, started as a user does."""
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "lasnn", *map(str, arguments)]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **{**piped, **options})

    def __call__(self, *arguments, code: int = 0, **options) -> subprocess.CompletedProcess:
        """What a command writes until its end; with options of Popen it is started as a user does."""
        arguments = [str(argument) for argument in arguments]
        if options:
            process = self.start(*arguments, **options)
            out, err = process.communicate(timeout=600)
            ended = process.returncode
        else:
            ended, out, err = fork_server().run(arguments, self.folder, self.environment)
        assert ended == code, f"exit code {ended}, expected {code}\n{out}\n{err}"
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, ended, out, err)

    def json(self, *arguments) -> dict:
        """The one JSON object that a command prints on standard output."""
        return json.loads(self(*arguments, "--json").stdout)
