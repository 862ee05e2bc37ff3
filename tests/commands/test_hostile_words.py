"""Whatever is wrong with words or files: one clear line, an exit status that is not 0, and nothing is touched."""

import h5py
import numpy as np
import pytest

from stemloop import cli


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things")
    rng = np.random.default_rng(0)
    np.save(folder / "noise.npy", rng.poisson(30, (64, 64)).astype(np.uint16))
    np.save(folder / "nan.npy", np.full((64, 64), np.nan))
    np.save(folder / "scan.npy", rng.poisson(1, (4, 5, 16, 16)).astype(np.uint16))
    np.save(folder / "objects.npy", np.array([{}, 1], object), allow_pickle=True)
    for name in ("empty.tif", "empty.h5"):
        (folder / name).touch()
    (folder / "text.dm3").write_text("hello")
    (folder / "note").write_text("x")
    (folder / "folder").mkdir()
    h5py.File(folder / "bare.h5", "w").close()
    return folder


REFUSED = {
    "analyze missing.tif --out out": "no file missing.tif",
    "analyze folder --out out": "is a folder",
    "analyze empty.tif --out out": "is empty",
    "analyze text.dm3 --out out": "text.dm3",
    "analyze nan.npy --out out": "not finite",
    "analyze objects.npy --out out": "objects.npy",
    "analyze noise.npy --out note": "cannot make the folder note",
    "analyze noise.npy --out note/below": "cannot make the folder",
    "analyze noise.npy --out out --pixel-nm 0": "a pixel of 0.0 nm",
    "analyze noise.npy --out out --pixel-nm -1": "a pixel of -1.0 nm",
    "analyze noise.npy --out out --pixel-nm nan": "a pixel of nan nm",
    "analyze noise.npy --out out --workers 0": "at least 1",
    "analyze noise.npy --out out --finder moon": "classical, network",
    "analyze noise.npy --out out --which 7": "there is no 7",
    "analyze noise.npy --out out --material cheese": "no lattice is known for 'cheese'",
    "analyze noise.npy --out out --map missing.tif": "no file missing.tif",
    "analyze noise.npy --out out --library folder": "folder is a folder",
    "analyze noise.npy --out out --library note": "note is there already and is not a library",
    "analyze noise.npy --out out --library nowhere/x": "no folder nowhere",
    "analyze noise.npy --out out --frame-s -1": "time from frame to frame [s] must be",
    "analyze noise.npy --out out --memory-MB nan": "memory [MB] must be",
    "convert noise.npy out.h5 --memory-MB nan": "memory [MB] must be",
    "reduce missing.npy --out out": "no file missing.npy",
    "reduce bare.h5 --out out": "bare.h5",
    "reduce noise.npy --out out": "no 4D-STEM data",
    "reduce scan.npy --out note": "cannot make the folder note",
    "reduce scan.npy --out out --fold moon": "known: patterns",
    "reduce scan.npy --out out --pixel-mrad 0": "pixel [rad] must be a finite number above zero; got 0",
    "reduce scan.npy --out out --semiangle-mrad -1": "semiangle [rad] must be",
    "reduce scan.npy --out out --energy-keV nan": "energy [eV] must be",
    "reduce scan.npy --out out --step-nm inf": "step [m] must be",
    "reduce scan.npy --out out --memory-MB 0": "memory [MB] must be",
    "reduce scan.npy --out out --rotation-deg nan --fold dpc": "rotation [rad] must be a finite number",
    "reduce scan.npy --out out --defocus-nm nan --fold ssb": "defocus [m] must be a finite number",
    "reduce scan.npy --out out --threads 0": "give at least 1",
    "reduce scan.npy --out out --mask m=missing.npy": "missing.npy cannot be read: No such file or directory.",
    "convert missing.tif out.h5": "no file missing.tif",
    "convert empty.tif out.h5": "is empty",
    "convert noise.npy folder": "(--overwrite)",
    "convert noise.npy nowhere/out.h5": "make it first",
    "convert noise.npy note": "(--overwrite)",
    "file info folder": "folder is a folder",
    "file info empty.h5": "is empty",
    "file verify bare.h5": "no sealed file",
    "file verify note": "no sealed file",
    "file seal missing.log out.h5": "no file missing.log",
    "file seal folder out.h5": "folder is a folder",
    "file repair bare.h5 out.h5": "no sealed file",
    "library add folder noise.npy": "folder is a folder",
    "library add note noise.npy": "note is there already and is not a library",
    "library add nowhere/x noise.npy": "no folder nowhere",
    "library info missing": "no library missing",
    "library info note": "is not a library",
    "library info bare.h5": "bare.h5 is there already and is not a library",
    "library merge new.library note": "is not a library",
}


@pytest.mark.parametrize("line", REFUSED)
def test_one_clear_line_and_nothing_is_touched(things, monkeypatch, capsys, line):
    monkeypatch.chdir(things)
    before = {path: path.stat().st_size for path in things.iterdir()}
    assert cli.main(line.split()) == 2
    said = capsys.readouterr()
    assert REFUSED[line] in said.err and said.err.startswith("stemloop: "), said.err
    assert len(said.err.splitlines()) == 1 and said.err.endswith((".\n", ")\n")), said.err
    assert {path: path.stat().st_size for path in before} == before


@pytest.mark.parametrize("place", ["a,b", "1", "nan,3", "1,2,3"])
def test_a_place_that_is_none(things, capsys, place):
    with pytest.raises(SystemExit) as left:
        cli.main(["library", "search", str(things / "x"), str(things / "noise.npy"), "--at", place])
    assert left.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"a place is ROW,COL in pixels, such as 120.5,88; got {place!r}")
    )


def test_a_file_of_the_library_command_that_is_not_there(things, tmp_path, capsys):
    library = str(tmp_path / "seen.library")
    missing = str(tmp_path / "missing.tif")
    assert cli.main(["library", "add", library, missing]) == 2
    assert capsys.readouterr().err == f"stemloop: there is no file {missing}.\n"
    assert cli.main(["library", "search", library, str(things / "noise.npy"), "--at", "5,5"]) == 2
    assert "columns were found in the image: too few" in capsys.readouterr().err
