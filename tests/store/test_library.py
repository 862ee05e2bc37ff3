"""The library keeps what it acknowledged, answers like a search through everything, and can be put together."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from stemloop.core.errors import InputError, IntegrityError, StorageError, UnreadableFile
from stemloop.store import neighbours
from stemloop.store.entries import row_of
from stemloop.store.library import Element, Library, same, sha256_of

DIMENSION = 48
SHA = "ab" * 32


def elements(rng, n, kind="column", scatter=1.0, middle=0.0, **more):
    vectors = (middle + scatter * rng.normal(size=(n, DIMENSION))).astype(np.float32)
    places = rng.uniform(0, 512, (n, 2))
    return [Element(v, kind, tuple(p), scatter=scatter, **more) for v, p in zip(vectors, places, strict=True)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_what_is_added_comes_back(tmp_path, rng):
    patch = np.arange(1024.0).reshape(32, 32)
    (one,) = elements(rng, 1, "vacancy", 1.3, phase="SrTiO3", p=0.9, frame=7, patch=patch, detail={"z_score": 5.5})
    with Library(tmp_path / "seen.library") as library:
        assert library.add([one], "a.tif", SHA) == 1
    with Library(tmp_path / "seen.library") as library:
        entry = library.entry(1)
        assert (entry.source, entry.source_sha256, entry.frame, entry.place) == ("a.tif", SHA, 7, one.place)
        assert (entry.kind, entry.phase, entry.p, entry.scatter) == ("vacancy", "SrTiO3", 0.9, 1.3)
        assert entry.detail == {"z_score": 5.5} and entry.pixel_size_m is None
        assert abs(entry.added - time.time()) < 60
        assert np.array_equal(library.vector(1), one.vector)
        assert np.abs(library.patch(1) / 255 - patch / 1023).max() <= 0.5 / 255 + 1e-9
        assert library.verify() == 1
        assert library.about()["kinds"] == {"vacancy": 1}
        with pytest.raises(InputError, match="no entry 2"):
            library.entry(2)


def test_the_same_content_is_kept_once(tmp_path, rng):
    some = elements(rng, 50)
    with Library(tmp_path / "seen.library") as library:
        assert library.add(some, "a.tif", SHA) == 50
        assert library.add(some, "copy of a.tif", SHA) == 0  # the file's content counts, not its name
        assert library.add(some, "b.tif", "cd" * 32) == 50  # the same from another file is another sighting
        assert len(library) == 100


def test_merging_is_the_union_and_any_order_gives_the_same(tmp_path, rng):
    a, b, c = elements(rng, 30), elements(rng, 40, patch=np.eye(4)), elements(rng, 20)
    with Library(tmp_path / "1") as one, Library(tmp_path / "2") as two:
        one.add(a, "a", SHA), one.add(c, "c", "cc" * 32)
        two.add(b, "b", "bb" * 32), two.add(c, "c", "cc" * 32)
        assert one.merge(two) == 40
        assert two.merge(tmp_path / "1") == 30
        assert len(one) == len(two) == 90
        assert one.merge(two) == two.merge(one) == 0
        assert one.verify() == two.verify() == 90
        query = b[3].vector
        left, right = one.search(query, 5), two.search(query, 5)
        assert [m.entry.place for m in left] == [m.entry.place for m in right]
        assert one.patch(left[0].entry.id) is not None


def test_libraries_of_other_fingerprints_are_not_mixed(tmp_path, rng):
    with Library(tmp_path / "1") as one, Library(tmp_path / "2", scale="metres") as two:
        with pytest.raises(InputError, match="cannot be compared"):
            one.merge(two)
        bad = elements(rng, 1)[0]
        bad.vector[3] = np.nan
        with pytest.raises(InputError, match="leave the image"):
            one.add([*elements(rng, 3), bad], "a", SHA)
        assert len(one) == 0  # all or nothing
        with pytest.raises(InputError, match="48 finite"):
            one.search(np.zeros(7))


def test_a_search_finds_what_comparing_everything_finds(tmp_path, rng):
    middles = rng.normal(size=(300, DIMENSION)) * np.geomspace(15, 0.5, DIMENSION)
    vectors = (middles[rng.integers(0, 300, 30_000)] + rng.normal(size=(30_000, DIMENSION))).astype(np.float32)
    with Library(tmp_path / "seen.library") as library:
        for part, sha in zip(np.array_split(vectors, 3), ("aa", "bb", "cc"), strict=True):
            library.add([Element(v, "column", (0.0, float(i))) for i, v in enumerate(part)], sha, sha * 32)
        queries = middles[:40] + rng.normal(size=(40, DIMENSION))
        index, loose = library._nearby.fresh()
        assert len(index) == 30_000 and len(index.centre) > 100 and len(loose.entry) == 0
        hits = 0
        for query in queries.astype(np.float32):
            square = ((vectors - query) ** 2).sum(axis=1)
            order = np.argsort(square)[:5]
            entry, distance = library.nearest(query, 5, exact=True)
            assert np.array_equal(entry, order + 1)
            assert distance == pytest.approx(np.sqrt(square[order]), rel=1e-5)
            hits += library.nearest(query, 1)[0][0] == order[0] + 1
            other = library.nearest(query, 1, exact=True, without_source="aa" * 32)[0][0]
            assert other == np.argmin(np.where(np.arange(30_000) < 10_000, np.inf, square)) + 1
        assert hits >= 38
        # what comes later is searched, too
        library.add([Element(queries[0].astype(np.float32), "vacancy", (1.0, 1.0))], "dd", "dd" * 32)
        assert library.search(queries[0], 1)[0].entry.kind == "vacancy"


def test_another_image_is_found_behind_the_many_frames_of_the_own(rng):
    # a stack fills the cells about its own surroundings; what is asked for is the one sighting elsewhere
    own = rng.normal(size=(40_000, DIMENSION))
    elsewhere = np.concatenate([rng.normal(size=(50, DIMENSION)), 30 + rng.normal(size=(3000, DIMENSION))])
    vectors = np.concatenate([own, elsewhere]).astype(np.float32)
    source = np.repeat([1, 2], [len(own), len(elsewhere)]).astype(np.int32)
    index = neighbours.build(np.arange(len(vectors)), source, vectors)
    assert len(index.centre) > 2 * neighbours.PROBES
    hits = 0
    for query in vectors[:40]:
        best = len(own) + np.argmin(((elsewhere - query) ** 2).sum(axis=1))
        hits += index.search(query, 1, without=1)[0][0] == best
    assert hits == 40


def test_the_index_is_checked_and_made_again(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("stemloop.store.nearby._LOOSE", 100)
    path = tmp_path / "seen.library"
    some = elements(rng, 5000)
    with Library(path) as library:
        library.add(some, "a", SHA)
        truth = library.nearest(some[7].vector, 3, exact=True)[0]
        index = library.index_path
    assert index.exists() and neighbours.load(index, "another library") is None
    whole = index.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1], whole[:4000] + b"\xff" + whole[4001:], b"nothing of the kind"):
        index.write_bytes(damaged)
        with Library(path) as library:
            assert np.array_equal(library.nearest(some[7].vector, 3, exact=True)[0], truth)
        assert index.read_bytes() == whole
    index.unlink()
    with Library(path) as library:
        assert np.array_equal(library.nearest(some[7].vector, 3, exact=True)[0], truth)
        # a tenth more: the index grows, and its file with it
        library.add(elements(np.random.default_rng(1), 1000), "b", "bb" * 32)
        found, loose = library._nearby.fresh()
        assert len(found) == 6000 and len(loose.entry) == 0
        assert len(np.unique(found.entry)) == 6000
    assert len(neighbours.load(index, library.name)) == 6000


def test_the_chance_of_being_the_same_is_uniform_over_equal_pairs(rng):
    # pairs of one vector seen in an image of scatter 1 and one of scatter 2, which scatter in eight directions
    one, other = rng.normal(size=(2, 2000, 8)) * np.sqrt(DIMENSION / 8)
    chance = np.array([same(d, 1.0, 2.0, DIMENSION) for d in np.linalg.norm(one - 2 * other, axis=1)])
    share = [(chance < level).mean() for level in (0.05, 0.32, 0.5, 0.9)]
    assert np.allclose(share, (0.05, 0.32, 0.5, 0.9), atol=3 * 0.5 / np.sqrt(2000))


def test_where_else_was_this_seen(tmp_path, rng):
    with Library(tmp_path / "seen.library") as library:
        for name in "abc":
            library.add(elements(rng, 300), name, name * 64)
            library.add(elements(rng, 2, "vacancy", middle=6.0), name, name * 64)
        library.add(elements(rng, 300), "d", "d" * 64)
        query = elements(rng, 1, "vacancy", middle=6.0)[0].vector
        sightings = library.seen(query, without_source="a" * 64)
        assert {s.source for s in sightings} == {"b", "c"}
        assert all(m.entry.kind == "vacancy" for s in sightings for m in s.matches)
        assert sum(len(s.matches) for s in sightings) == 4
        assert sightings[0].distance <= sightings[1].distance
        assert library.seen(query + 30) == []


WRITER = """
import sys
import numpy as np
from stemloop.store.library import Element, Library
path, first = sys.argv[1], int(sys.argv[2])
with Library(path) as library:
    for batch in range(first, 10**9):
        vectors = np.random.default_rng(batch).normal(size=(5, 48)).astype(np.float32)
        some = [Element(v, "column", (batch, k), patch=np.eye(8)) for k, v in enumerate(vectors)]
        library.add(some, "f", f"{batch:064x}")
        print(batch, flush=True)
"""


def killed_writer(path, first, seconds):
    """The last batch that a writer acknowledged before it was killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, "-c", WRITER, str(path), str(first)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        said = [writer.stdout.readline()]  # it has begun
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.read().splitlines()
    return max(int(word) for word in said if word.strip())


def check_after_kills(path, kills, rng):
    acknowledged = -1
    for _ in range(kills):
        acknowledged = killed_writer(path, acknowledged + 1, rng.uniform(0, 0.15))
        with Library(path) as library:
            found = {int(y): n for y, n in library._shelf.ask("SELECT y, count(*) FROM entries GROUP BY y")}
            assert all(found[batch] == 5 for batch in range(acknowledged + 1))  # nothing acknowledged is lost
            assert set(found.values()) == {5}  # and nothing is there by half
            assert library.verify() == 5 * len(found)
            vector = np.random.default_rng(acknowledged).normal(size=(5, 48)).astype(np.float32)[4]
            assert library.search(vector, 1)[0].distance == 0
            acknowledged = max(found)


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path, rng):
    check_after_kills(tmp_path / "seen.library", 3, rng)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_acknowledged_is_lost_in_forty_kills(tmp_path, rng):
    check_after_kills(tmp_path / "seen.library", 40, rng)


def test_readers_are_served_while_one_writes(tmp_path):
    path = tmp_path / "seen.library"
    Library(path).close()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, "-c", WRITER, str(path), "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        writer.stdout.readline()
        vector = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)[2]
        sizes = []
        with Library(path) as one, Library(path) as two:
            for _ in range(20):
                for library in (one, two):
                    assert library.search(vector, 1)[0].distance == 0
                    sizes.append(len(library))
                time.sleep(0.01)
        writer.kill()
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0] and all(n % 5 == 0 for n in sizes)


def test_a_reader_opens_while_a_writer_is_in_the_middle(tmp_path, rng):
    path = tmp_path / "seen.library"
    with Library(path) as writer:
        writer.add(elements(rng, 5), "a", SHA)
        with writer._shelf.writing():
            writer._insert([row_of(e, "bb" * 32, DIMENSION) for e in elements(rng, 5)], "b", "bb" * 32)
            begun = time.monotonic()
            with Library(path) as reader:
                assert len(reader) == 5  # what is not finished is not seen
            assert time.monotonic() - begun < 5  # and nobody waited for the lock
        assert len(writer) == 10


def test_two_writers_wait_for_each_other(tmp_path):
    path = tmp_path / "seen.library"
    short = WRITER.replace("10**9", "first + 20")
    writers = [
        subprocess.Popen([sys.executable, "-c", short, str(path), str(first)], stdout=subprocess.DEVNULL)
        for first in (0, 1000)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    with Library(path) as library:
        assert library.verify() == 200


def test_damage_is_named(tmp_path, rng):
    path = tmp_path / "seen.library"
    with Library(path) as library:
        library.add(elements(rng, 10), "a", SHA)
    base = sqlite3.connect(path)
    with base:
        base.execute("UPDATE entries SET kind = 'vacancy' WHERE id = 4")
    base.close()
    with Library(path) as library, pytest.raises(IntegrityError, match="was changed"):
        library.verify()


def test_what_is_no_library_is_refused(tmp_path):
    (tmp_path / "text").write_text("no library at all, and long enough to be read as one" * 20)
    with pytest.raises(UnreadableFile, match="not a library"):
        Library(tmp_path / "text")
    base = sqlite3.connect(tmp_path / "other.sqlite")
    with base:
        base.execute("CREATE TABLE things (name)")
    base.close()
    with pytest.raises(UnreadableFile, match="not a library"):
        Library(tmp_path / "other.sqlite")
    with pytest.raises(StorageError, match="no folder"):
        Library(tmp_path / "nowhere" / "seen.library")
    with pytest.raises(UnreadableFile, match="no library"), Library(tmp_path / "new") as library:
        library.merge(tmp_path / "missing")
    with pytest.raises(UnreadableFile, match="cannot be read"):
        sha256_of(tmp_path / "missing")


def test_fingerprints_of_the_describing_room_fit(tmp_path):
    from stemloop.describe.fingerprints import DIMENSION as described
    from stemloop.describe.fingerprints import VERSION

    path = Path(tmp_path) / "seen.library"
    with Library(path, version=VERSION) as library:
        assert library.dimension == described == DIMENSION
    Library(path).close()  # what is taken if nothing is said is this version
    with pytest.raises(InputError, match="version 1"):
        Library(path, version=VERSION + 1)


def test_what_cannot_be_kept_is_refused_and_not_forgotten(tmp_path, rng):
    vector = elements(rng, 1)[0].vector
    nan = float("nan")
    with Library(tmp_path / "seen.library") as library:
        for bad in (
            Element(vector, "column", (nan, 1.0)),
            Element(vector, "column", (1.0, 1.0), p=nan),
            Element(vector, "column", (1.0, 1.0), scatter=nan),
            Element(vector, "column", (1.0, 1.0), scatter=-1.0),
            Element(vector, "column", (1.0, 1.0), pixel_size_m=nan),
            Element(vector, "column", (1.0, 1.0), frame=2**70),
            Element(vector, "column", (1.0, 1.0), detail={"z": np.float32(1)}),
            Element(vector, "column", (1.0, 1.0), patch=np.zeros((0, 4))),
            Element(vector, "no \udcff text", (1.0, 1.0)),
        ):
            with pytest.raises(InputError):
                library.add([bad], "a", SHA)
        assert library.about()["sources"] == 0
        # SQLite keeps -0.0 as 0.0
        assert library.add([Element(vector, "column", (-0.0, 1.0))], "na\udcffme", SHA) == library.verify() == 1


def test_the_scatter_of_a_noiseless_image_may_be_zero(tmp_path, rng):
    one, other = elements(rng, 2, scatter=0.0)
    one.vector[0] = 1
    with Library(tmp_path / "seen.library") as library:
        library.add([one], "a", SHA)
        assert library.search(one.vector, 1, scatter=0.0)[0].p_same == 1
        assert library.search(one.vector, 10**15, scatter=0.0)[0].p_same == 1  # and no more than there are
        assert library.search(other.vector, 1, scatter=1.0)[0].p_same > 0
        assert library.search(one.vector + 1, 1, scatter=0.0)[0].p_same == 0
        with pytest.raises(InputError, match="whole number"):
            library.search(one.vector, 2.5)


def test_versions_are_not_mixed(tmp_path, rng):
    with Library(tmp_path / "1") as one, Library(tmp_path / "2", version=2) as two, pytest.raises(InputError):
        two.add(elements(rng, 3), "a", SHA)
        one.merge(two)
    with Library(tmp_path / "2b", version=2) as two:
        assert two.merge(tmp_path / "2") == 3


def test_an_older_file_put_back_is_not_searched_with_a_newer_index(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("stemloop.store.nearby._LOOSE", 5)
    path = tmp_path / "seen.library"
    with Library(path) as library:
        library.add(elements(rng, 10), "a", SHA)
    older = path.read_bytes()
    later, others = elements(rng, 10), elements(rng, 10)
    with Library(path) as library:
        library.add(later, "b", "bb" * 32)
        assert library.search(later[0].vector, 1)[0].distance == 0
        assert library.index_path.exists()
    path.write_bytes(older)
    with Library(path) as library:
        assert library.search(later[0].vector, 1)[0].distance > 1
        library.add(others, "c", "cc" * 32)
    with Library(path) as library:
        assert library.search(later[0].vector, 1)[0].distance > 1
        assert library.search(others[3].vector, 1)[0].entry.place == others[3].place


@pytest.mark.parametrize(
    "name, change",
    [
        ("start", lambda a: a + 10**12),
        ("start", lambda a: a[::-1]),
        ("vectors", lambda a: a[:, :7]),
        ("source", lambda a: a[:5]),
        ("entry", lambda a: a.astype(np.float64)),
        ("centre", lambda a: a[:0]),
    ],
)
def test_an_index_that_was_made_up_is_not_followed(tmp_path, rng, name, change):
    vectors = rng.normal(size=(100, DIMENSION)).astype(np.float32)
    index = neighbours.build(np.arange(1, 101), np.zeros(100, np.int32), vectors)
    neighbours.save(index, tmp_path / "index", "name")
    assert len(neighbours.load(tmp_path / "index", "name")) == 100
    forged = neighbours.Index(**{**vars(index), name: change(getattr(index, name))})
    neighbours.save(forged, tmp_path / "index", "name")
    assert neighbours.load(tmp_path / "index", "name") is None


@pytest.mark.parametrize(
    "words",
    [
        "DELETE FROM about WHERE name = 'dimension'",
        "DELETE FROM about WHERE name = 'version'",
        "UPDATE about SET value = 'many' WHERE name = 'dimension'",
        "UPDATE about SET value = '1000000000000' WHERE name = 'dimension'",
        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END",
        "CREATE VIEW v AS SELECT 1",
    ],
)
def test_the_library_of_a_stranger_is_refused(tmp_path, rng, words):
    with Library(tmp_path / "theirs") as library:
        library.add(elements(rng, 3), "a", SHA)
    with sqlite3.connect(tmp_path / "theirs") as base:
        base.execute(words)
    with pytest.raises(UnreadableFile):
        Library(tmp_path / "theirs")


@pytest.mark.parametrize(
    "words",
    [
        "vector = x'00000000'",
        "vector = 'words'",
        "vector = CAST(zeroblob(188) || x'0000c07f' AS BLOB)",
        "detail = '{'",
        "detail = '[1]'",
        "y = 'abc'",
        "scatter = 'x'",
        "scatter = 9e999",
        "kind = CAST(x'ff' AS TEXT)",
        "frame = x'00'",
        "digest = x'00'",
        "p = 0.5",
    ],
)
def test_entries_of_a_stranger_are_looked_at_before_they_are_kept(tmp_path, rng, words):
    some = elements(rng, 4, patch=np.eye(4))
    with Library(tmp_path / "theirs") as library:
        library.add(some, "a", SHA)
    with sqlite3.connect(tmp_path / "theirs") as base:
        base.execute(f"UPDATE entries SET {words} WHERE id = 2")
    with Library(tmp_path / "theirs") as theirs, Library(tmp_path / "ours") as ours:
        for answer in (lambda: theirs.search(some[1].vector, 4), lambda: (theirs.vector(2), theirs.patch(2))):
            try:
                answer()
            except IntegrityError:
                pass  # nothing else
        with pytest.raises(IntegrityError):
            theirs.verify()
        if "CAST(x'ff'" in words:
            with pytest.raises(IntegrityError):
                ours.merge(theirs)
            return
        with pytest.raises(IntegrityError, match=r"1 entries .* left out.*3 new"):
            ours.merge(theirs)
        assert ours.verify() == 3 and len(ours.search(some[0].vector, 9)) == 3


def test_threads_share_a_library(tmp_path, rng):
    parts = [elements(rng, 20) for _ in range(16)]
    with Library(tmp_path / "seen.library") as library, ThreadPoolExecutor(4) as pool:

        def work(k):
            new = library.add(parts[k], "f", f"{k:064x}")
            return new, library.search(parts[k][3].vector, 1)[0].distance

        assert list(pool.map(work, range(16))) == [(20, 0.0)] * 16
        assert library.verify() == 320
