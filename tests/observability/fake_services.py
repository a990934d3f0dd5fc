"""Fakes of the services' packages, which keep the calls that are made to them."""

import importlib.machinery
import sys
import types


class Calls(list):
    """(name, positional arguments, keywords) of each call, in order; `fails` makes the named calls raise."""

    def __init__(self):
        super().__init__()
        self.fails = set()

    def taker(self, name, answer=None):
        def call(*args, **keywords):
            self.append((name, args, keywords))
            if name in self.fails:
                raise ConnectionError("no route")
            return answer() if callable(answer) else answer

        return call

    def named(self, name):
        return [(args, keywords) for own, args, keywords in self if own == name]


def put(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def fake_wandb(monkeypatch):
    calls = Calls()
    methods = {name: calls.taker(name) for name in ("define_metric", "log", "finish")}
    put(
        monkeypatch,
        "wandb",
        init=calls.taker("init", lambda: types.SimpleNamespace(**methods)),
        Settings=lambda **settings: settings,
    )
    return calls


def fake_trackio(monkeypatch):
    calls = Calls()
    methods = {name: calls.taker(name) for name in ("log", "finish")}
    put(monkeypatch, "trackio", init=calls.taker("init", lambda: types.SimpleNamespace(**methods)))
    return calls


def fake_mlflow(monkeypatch):
    calls = Calls()
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
    methods = {name: calls.taker(name) for name in ("log_batch", "set_terminated", "update_run")}
    methods |= {
        "get_experiment_by_name": calls.taker("get_experiment_by_name"),
        "create_experiment": calls.taker("create_experiment", "7"),
        "create_run": calls.taker("create_run", run),
    }
    entities = types.SimpleNamespace(Metric=lambda *values: values, Param=lambda *values: values)
    put(
        monkeypatch,
        "mlflow",
        MlflowClient=calls.taker("client", lambda: types.SimpleNamespace(**methods)),
        entities=entities,
    )
    return calls
