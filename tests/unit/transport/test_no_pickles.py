"""Data from the network is never unpickled or evaluated: static and runtime checks.

Exception: the verifier pool and the engine of an actor are child processes started through
multiprocessing, which pickles the data between them. Network data never passes there as a pickle:
it is decoded, validated and converted to plain records first.
"""

import ast
import pickle
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

import speed_async
from speed_async.transport import messages as m
from speed_async.transport.codec import decode, encode
from speed_async.types import WeightBackend
from tests.fakes.weights_contract import (
    TorchEndpoints,
    assert_arrived,
    mixed_tensors,
    open_channel,
    send_to,
)

PACKAGES = ("transport", "weight_sync")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"load", "loads", "Unpickler", "StatelessProcessGroup", "allow_pickle"}
JSON = {"json.loads", "json.load"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"pickle", "torch", "np", "numpy", "marshal", "yaml", "joblib", "dill", "shelve", "runpy"}
"""Modules whose `load` functions may execute their input."""
CHILD_PROCESS_MODULES = {
    "actors/stepped_engine/process.py": {"multiprocessing"},
    "environments/verifier.py": {"pickle", "multiprocessing"},
    "environments/verifier_worker.py": {"pickle", "multiprocessing", "pickle.loads"},
}
"""Modules that may use them, as explained above."""


def pickle_uses(source: str) -> Iterator[str]:
    """Yield imports and names of a module that could read a pickle."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (a.name for a in names if a.name.split(".")[0] in MODULES)
                yield from (a.name for a in names if "multiprocessing" in a.name)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES or "multiprocessing" in module:
                    yield module
                yield from (f"{module}.{a.name}" for a in names if a.name in MODULES | CALLS)
            case ast.Attribute() if ast.unparse(node) not in JSON:
                if node.attr in CALLS or "_object" in node.attr:
                    yield ast.unparse(node)
            case ast.keyword(arg="allow_pickle"):
                yield "allow_pickle"
            case _:
                pass


def evaluations(source: str) -> Iterator[str]:
    """Yield constructs of a module that could execute its input."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (a.name for a in names if a.name.split(".")[0] in MODULES | {"yaml"})
                yield from (a.name for a in names if a.name.startswith("multiprocessing"))
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES | {"yaml"} or "multiprocessing" in module:
                    yield module
                yield from (a.name for a in names if a.name in {"literal_eval", "Unpickler"})
            case ast.Call(func=ast.Name(id=name)) if name in EVALUATORS:
                yield name
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                if name.startswith("__"):
                    yield f"getattr {name}"
            case ast.Attribute(value=ast.Name(id=module), attr=attribute) if module in LOADERS:
                if attribute in CALLS:
                    yield f"{module}.{attribute}"
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" | "shell"):
                yield str(node.arg)
            case _:
                pass


def test_source_checks_detect_violations():
    for source in (
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'eval')",
        "__import__(name)",
        "import yaml",
        "import marshal",
        "from pickle import loads",
        "from ast import literal_eval",
        "torch.load(file)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "getattr(thing, '__class__')",
    ):
        assert list(evaluations(source)), source
    harmless = (
        "model.eval()\nre.compile(x)\njson.loads(x)\ncurriculum.load(state)\ngetattr(x, name)"
    )
    assert list(evaluations(harmless)) == []
    for source in (
        "import pickle",
        "from torch.multiprocessing import reductions",
        "torch.load(file)",
        "dist.broadcast_object_list(things)",
        "from pickle import loads",
        "np.frombuffer(data, allow_pickle=True)",
    ):
        assert list(pickle_uses(source)), source
    assert list(pickle_uses("import json\njson.loads(text)\nmodel.load_weights(x)")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_transport_and_weight_sync_never_read_pickles(package: str):
    files = sorted((Path(speed_async.__file__).parent / package).glob("*.py"))
    assert len(files) > 5
    assert {
        file.name: found for file in files if (found := list(pickle_uses(file.read_text())))
    } == {}


def test_no_module_executes_its_input():
    root = Path(speed_async.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 100
    found = {str(file.relative_to(root)): set(evaluations(file.read_text())) for file in files}
    surplus = {
        name: kinds - CHILD_PROCESS_MODULES.get(name, set()) for name, kinds in found.items()
    }
    assert {name: kinds for name, kinds in surplus.items() if kinds} == {}


class Trapped(Exception):
    pass


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Trapped

    for name in ("loads", "load", "Unpickler", "_loads", "_load", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(ForkingPickler, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(Trapped):
        pickle.loads(b"\x80\x04N.")


@pytest.mark.usefixtures("trapped")
@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_transfer_unpickles_nothing(backend: WeightBackend):
    with open_channel(TorchEndpoints(backend, 1024)) as channel:
        for policy_version in (1, 2):
            loaded = send_to(channel, channel.offer(policy_version), mixed_tensors())
            assert_arrived(loaded[1], mixed_tensors())


@pytest.mark.usefixtures("trapped")
def test_a_message_unpickles_nothing():
    message = m.PublishWeights(
        policy_version=3, store_host="h", store_port=1, backend="ipc", deadline_s=1.0
    )
    assert decode(encode(message)) == message
