import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_block import PlainBlock, pieces

from stemloop.core.errors import InputError
from stemloop.core.protocols import Camera
from stemloop.reduce.detectors import Patterns, Radial, Virtual, ring
from stemloop.reduce.disks import FindDisks, Template
from stemloop.reduce.dpc import CentreOfMass
from stemloop.reduce.engine import Reduction, Together, reduce
from stemloop.reduce.ptychography import SingleSideband
from stemloop.reduce.strain import StrainMap

SCAN, SHAPE = (5, 7), (24, 20)
CAMERA = Camera(SHAPE, 1e-3, (11.3, 9.6))
DATA = np.random.default_rng(0).poisson(ring(CAMERA, 0, 6e-3) * 4 + 0.3, (*SCAN, *SHAPE)).astype(np.uint16)
PROBE = Template.disk(2.0)
FOLDS = [
    Virtual({"adf": ring(CAMERA, 4.3e-3, 9.1e-3), "bf": ring(CAMERA, 0, 3e-3)}),
    CentreOfMass(CAMERA, ring(CAMERA, 0, 8.2e-3)),
    Patterns(),
    Radial(CAMERA, 1.3e-3, 6),
    FindDisks(PROBE, threshold=3.0),
    StrainMap(PROBE, np.array([[11.0, 9.0], [0.0, 6.0], [6.0, 0.0]]), threshold=3.0),
    SingleSideband(CAMERA, 6e-3, 2e-11, 80e3),
]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


WHOLE = reduce(FOLDS, pieces(DATA, []), SCAN, SHAPE)


@given(
    cuts=st.sets(st.integers(1, 34), max_size=12).map(sorted),
    shuffle=st.randoms(use_true_random=False),
    parts=st.integers(1, 4),
)
@settings(max_examples=8, deadline=None)
def test_any_split_any_order_any_merge_gives_the_same_bits(cuts, shuffle, parts):
    cut = pieces(DATA, cuts)
    shuffle.shuffle(cut)
    several = [Reduction(Together(tuple(FOLDS)), SCAN, SHAPE) for _ in range(parts)]
    for i, (first, block) in enumerate(cut):
        several[i % parts].take(first, block)
    shuffle.shuffle(several)
    for other in several[1:]:
        several[0].join(other)
    same(WHOLE, several[0].result())


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bits(threads):
    same(WHOLE, reduce(FOLDS, pieces(DATA, range(1, 35)), SCAN, SHAPE, threads=threads))


def test_a_piece_may_be_read_where_the_work_is_done():
    cut = pieces(DATA, [9, 20])
    for threads in (1, 2):
        same(WHOLE, reduce(FOLDS, [lambda p=p: iter([p]) for p in cut], SCAN, SHAPE, threads=threads))


def test_two_dask_workers_give_the_same_bits():
    distributed = pytest.importorskip("distributed", reason="distributed is not installed (the extra dask)")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        client.run(_find, __file__)
        done = []
        maps = reduce(FOLDS, pieces(DATA, range(3, 35, 3)), SCAN, SHAPE, client=client, progress=done.append)
        assert done[-1] == 35 and done == sorted(done)
        same(WHOLE, maps)
        with pytest.raises(InputError, match="came twice"):
            reduce(FOLDS[0], pieces(DATA, [9])[:1] * 2, SCAN, SHAPE, client=client)


def _find(path):
    """Let a worker import the blocks of these tests."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(path).parent))


def test_a_stream_is_known_while_it_goes_on():
    going = Reduction(Together((FOLDS[0], FOLDS[2])), SCAN, SHAPE)
    for first, block in pieces(DATA, [10, 22]):
        going.take(first, block)
        maps = going.result()
        known = np.isfinite(maps["adf"]).ravel()
        assert going.done == first + block.frames == known.sum() and known[: going.done].all()
        assert going.missing().tolist() == list(range(going.done, 35))
        assert maps["sum_pattern"].sum() == DATA.reshape(35, *SHAPE)[: going.done].sum()
    same({k: v for k, v in WHOLE.items() if k in maps}, maps)


def test_what_does_not_fit_is_refused():
    going = Reduction(FOLDS[0], SCAN, SHAPE)
    going.take(0, PlainBlock(DATA[0]))
    with pytest.raises(InputError, match="came twice"):
        going.take(6, PlainBlock(DATA[0]))
    with pytest.raises(InputError, match="give the scan"):
        going.take(30, PlainBlock(DATA[0]))
    with pytest.raises(InputError, match="frames of"):
        going.take(7, PlainBlock(DATA[0][:, :5]))
    other = Reduction(FOLDS[0], SCAN, SHAPE)
    other.take(3, PlainBlock(DATA[0]))
    with pytest.raises(InputError, match="position 3 came twice"):
        going.join(other)
    with pytest.raises(InputError, match="two folds give a map called bf"):
        reduce([Virtual({"bf": np.ones(SHAPE)}), Virtual({"bf": np.ones(SHAPE)})], [], SCAN, SHAPE)


def test_an_error_in_a_thread_reaches_the_caller():
    with pytest.raises(InputError, match="came twice"):
        reduce(FOLDS[0], pieces(DATA, [9])[:1] * 5, SCAN, SHAPE, threads=2)
