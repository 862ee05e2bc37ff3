"""Calculations: kept by content, in order, killed when they must be."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from stemloop.core.errors import CalculationError, StorageError
from stemloop.energetics import CALCULATORS, Calculations, Task
from stemloop.energetics.cache import Cache, default_place
from stemloop.energetics.calculators import Calculator, calculate

COPPER = [Task.of(bulk("Cu", a=a), "EMT") for a in (3.5, 3.6, 3.7, 3.8, 3.6)]


@pytest.fixture
def calculations(tmp_path):
    made = Calculations(Cache(tmp_path), workers=2)
    yield made
    made.close()


def test_results_come_in_the_order_asked_and_equal_those_of_this_process(calculations):
    results = calculations.run(COPPER)
    for task, result in zip(COPPER, results, strict=True):
        here = calculate(task)
        assert result.energy == here.energy
        np.testing.assert_array_equal(result.stress, here.stress)
    assert (calculations.calls, calculations.hits) == (4, 0)
    again = calculations.run(COPPER)
    assert [r.energy for r in again] == [r.energy for r in results]
    assert (calculations.calls, calculations.hits) == (4, 4)


def test_a_key_is_the_content(monkeypatch):
    same = Task.of(bulk("Cu", a=3.6 + 1e-13), "EMT")
    assert same.key == COPPER[1].key != COPPER[0].key
    assert Task.of(bulk("Cu", a=3.6), "EMT", relax_steps=5).key != same.key
    assert Task.of(bulk("Cu", a=3.6), "GFN1-xTB").key != same.key


@pytest.mark.parametrize(
    "damage", [lambda t: t[: len(t) // 2], lambda t: t.replace('"energy": -', '"energy": '), str.upper]
)
def test_a_damaged_entry_is_calculated_again(tmp_path, damage):
    cache = Cache(tmp_path)
    work = Calculations(cache, workers=0)
    task = COPPER[0]
    good = work.run([task])[0]
    path = cache.path(task.key)
    sound = path.read_text()
    path.write_text(damage(sound) if damage(sound) != sound else "{}")
    assert work.run([task])[0].energy == good.energy and work.calls == 2
    assert json.loads(path.read_text())["result"]["energy"] == good.energy


def test_two_processes_may_share_a_cache(tmp_path):
    code = (
        "import sys; from ase.build import bulk; from stemloop.energetics import *; from stemloop.energetics.cache "
        "import Cache; w = Calculations(Cache(sys.argv[1]), workers=0); "
        "print(sum(r.energy for r in w.run([Task.of(bulk('Cu', a=3.4 + i / 50), 'EMT') for i in range(20)])))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    said = [p.communicate(timeout=60)[0] for p in both]
    assert said[0] == said[1] != b""
    assert len(list(tmp_path.rglob("*.json"))) == 20 and not list(tmp_path.rglob(".*-*"))


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="STEMLOOP_CACHE"):
        Calculations(Cache(tmp_path / "file"), workers=0).run(COPPER[:1])


def test_the_default_place_can_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("STEMLOOP_CACHE", str(tmp_path))
    assert default_place() == tmp_path
    monkeypatch.delenv("STEMLOOP_CACHE")
    assert default_place().parts[-3:] == (".cache", "stemloop", "energies")


def test_a_calculation_that_takes_too_long_is_ended(tmp_path):
    slow = Calculations(Cache(tmp_path), workers=1, timeout_s=0.5)
    big = Task.of(bulk("Si", cubic=True).repeat(3), "GFN1-xTB")
    started = time.monotonic()
    with pytest.raises(CalculationError, match=r"longer than 0\.5 s"):
        slow.run([big])
    assert time.monotonic() - started < 5
    assert slow._pool == []


def test_a_process_that_dies_is_an_error_and_the_next_run_works(calculations):
    calculations.run(COPPER[:2])
    for worker in calculations._pool:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    with pytest.raises(CalculationError, match="ended"):
        calculations.run([COPPER[2]])
    assert calculations.run([COPPER[2]])[0].energy == calculate(COPPER[2]).energy


def test_an_error_crosses_from_the_worker(calculations):
    """EMT has no uranium."""
    with pytest.raises(CalculationError, match="EMT did not converge on U"):
        calculations.run([Task.of(Atoms("U", cell=[5, 5, 5], pbc=True), "EMT")])


def test_workers_end_with_their_owner(tmp_path):
    work = Calculations(Cache(tmp_path), workers=1)
    work.run(COPPER[:1])
    process = work._pool[0].process
    del work
    assert process.wait(timeout=10) is not None


def test_a_worker_does_not_outlive_a_killed_owner(tmp_path):
    """A calculation of minutes is under way when its owner is killed: the worker is gone within seconds."""
    code = (
        "import sys; from ase.build import bulk; from stemloop.energetics import *; from stemloop.energetics.cache "
        "import Cache; import stemloop.energetics.jobs as jobs; w = Calculations(Cache(sys.argv[1]), workers=1); "
        "ask = jobs._Worker.ask\n"
        "def told(self, *a): ask(self, *a); print(self.process.pid, flush=True)\n"
        "jobs._Worker.ask = told; w.run([Task.of(bulk('Si', cubic=True).repeat(4), 'GFN1-xTB')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    worker = int(owner.stdout.readline())
    time.sleep(2)
    os.kill(worker, 0)  # still at work
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(worker):
        time.sleep(0.1)
    assert not _runs(worker)


def _runs(pid):
    """Whether a process is there and not merely waiting to be collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True).stdout
    return not state.strip().startswith("Z")


def test_the_ladder_is_climbed_and_its_rung_told(monkeypatch):
    def broken():
        raise RuntimeError("SCF not converged in 1 cycles")

    emt = CALCULATORS["EMT"]
    monkeypatch.setitem(CALCULATORS._plugs, "EMT", Calculator("EMT", "ase", {}, (broken, *emt.ladder), 1e-9, 1e-6))
    assert calculate(COPPER[0]).rung == 1
    monkeypatch.setitem(CALCULATORS._plugs, "EMT", Calculator("EMT", "ase", {}, (broken, broken), 1e-9, 1e-6))
    with pytest.raises(CalculationError, match="in 2 attempts: SCF not converged"):
        calculate(COPPER[0])


def test_all_rungs_of_gfn1_find_the_same_energy():
    task = Task.of(Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.13)]), "GFN1-xTB")
    energies = []
    for make in CALCULATORS["GFN1-xTB"].ladder:
        atoms = task.atoms
        atoms.calc = make()
        energies.append(atoms.get_potential_energy())
    assert np.ptp(energies) < 1e-5
