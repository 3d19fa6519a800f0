"""The engine on a Ray cluster: the same rows as here, also when a replica is killed in the middle.

Slow: a cluster is started, and each of its workers imports torch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lrpfast.errors import InputError, ScreeningError
from lrpfast.screening import explain_dataset, open_source
from tests.screening_data import PREPROCESSING, a_recipe, environment, pictures, rows

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

KILLS = """
import os, time
from pathlib import Path

class Slow:
    # The first replica that is called kills itself in the middle; all others go on slowly enough to be several.
    def __init__(self, explain, mark):
        self.explain, self.mark, self.calls = explain, Path(mark), 0
    def __call__(self, inputs, **options):
        self.calls += 1
        Path(f"{self.mark}-{os.getpid()}").touch()
        if self.calls == 3:
            try:
                self.mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), 9)
        time.sleep(0.7)
        return self.explain(inputs, **options)

class Build:
    def __init__(self, build, mark):
        self.build, self.mark = build, mark
    def __call__(self):
        import dataclasses
        made = self.build()
        return dataclasses.replace(made, explain=Slow(made.explain, self.mark))
"""


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment()})
    yield ray
    ray.shutdown()


def screen(made, data, folder, engine="ray", **options):
    source = open_source(data, PREPROCESSING, made.model)
    return explain_dataset(made, source, folder, engine=engine, shard_size=7, batch_size=4, pool=4, **options)


def test_a_replica_is_killed_in_the_middle(cluster, tmp_path, monkeypatch):
    data = pictures(tmp_path / "data", 30)
    (data / "ox" / "04.png").write_bytes(b"no image")
    (tmp_path / "slow_replicas.py").write_text(KILLS)
    monkeypatch.syspath_prepend(tmp_path)
    import slow_replicas

    cluster.cloudpickle.register_pickle_by_value(slow_replicas)
    made = a_recipe()
    mark = tmp_path / "killed"
    slow = dataclasses.replace(made, build=slow_replicas.Build(made.build, str(mark)))
    summary = screen(slow, data, tmp_path / "out", workers=3)
    assert mark.exists()
    replicas = list(tmp_path.glob("killed-*"))
    assert len(replicas) >= 3, "one replica did it all"
    assert summary.samples == 90 and [entry.sample for entry in summary.skipped] == [64]
    screen(made, data, tmp_path / "here", "local", workers=0)
    one, other = rows(tmp_path / "here"), rows(tmp_path / "out")
    assert [*other["sample"]] == [i for i in range(90) if i != 64]
    for name in one:
        if np.issubdtype(one[name].dtype, np.floating) and name != "scale":
            largest = np.nanmax(np.abs(one[name]))
            np.testing.assert_allclose(other[name], one[name], rtol=2e-3, atol=1e-3 * largest, err_msg=name)
        elif name != "scale":
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_errors_of_replicas_and_going_on(cluster, tmp_path):
    data = pictures(tmp_path / "data", 6)
    made = a_recipe()

    def refuse():
        raise InputError("the model cannot be had")

    with pytest.raises((InputError, ScreeningError), match="the model cannot be had"):
        screen(dataclasses.replace(made, build=refuse), data, tmp_path / "out", workers=1)
    screen(made, data, tmp_path / "out", workers=1)
    (tmp_path / "out" / "shards" / "shard-000001.parquet").unlink()
    assert screen(made, data, tmp_path / "out", workers=1).earlier == 11
    assert [*rows(tmp_path / "out")["sample"]] == [*range(18)]
