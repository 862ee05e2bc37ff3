"""Any image or stack as frames with the size of a pixel; what is no image is refused in words that say what to do."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from stemloop.core.errors import InputError, UnreadableFile
from stemloop.store.convert import convert
from stemloop.store.stack import open_stack

DATA = Path(os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "../shared/data")
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real files: {DATA} is not there (set STEMLOOP_DATA)")
STACK = np.random.default_rng(0).integers(0, 999, (5, 20, 24), "u2")


def test_frames_of_an_array_file_are_its_own(tmp_path):
    np.save(tmp_path / "stack.npy", STACK)
    with open_stack(tmp_path / "stack.npy") as stack:
        assert stack.shape == (5, 20, 24) and len(stack) == 5
        for k in range(5):
            np.testing.assert_array_equal(stack[k], STACK[k])
        np.testing.assert_array_equal(stack[-1], STACK[4])
        with pytest.raises(IndexError):
            stack[5]
    np.save(tmp_path / "image.npy", STACK[0])
    with open_stack(tmp_path / "image.npy") as stack:
        assert stack.shape == (1, 20, 24)
        np.testing.assert_array_equal(stack[0], STACK[0])


def test_a_foreign_stack_and_its_sealed_copy_have_the_same_frames(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", STACK, imagej=True)
    convert(tmp_path / "stack.tif", tmp_path / "stack.h5")
    for name in ("stack.tif", "stack.h5"):
        with open_stack(tmp_path / name) as stack:
            assert stack.shape == STACK.shape
            np.testing.assert_array_equal([stack[k] for k in (3, 0, 4)], STACK[[3, 0, 4]])


def test_a_converted_stack_is_chunked_by_frame(tmp_path):
    np.save(tmp_path / "stack.npy", np.zeros((6, 160, 160), "u2"))
    convert(tmp_path / "stack.npy", tmp_path / "stack.h5")
    chunks = []
    with h5py.File(tmp_path / "stack.h5") as file:
        file.visititems(
            lambda _, item: chunks.append(item.chunks) if getattr(item, "shape", ()) == (6, 160, 160) else None
        )
    assert chunks and all(chunk == (1, 160, 160) for chunk in chunks)


@pytest.mark.parametrize(
    ("told", "metres"),
    [
        ({"pixel_size_nm": 0.02}, 2e-11),
        ({"pixel_size_pm": 15}, 1.5e-11),
        ({"deep": {"field_of_view_x": 4.8, "field_of_view_units": "nm"}}, 2e-10),
        ({"field_of_view_x": 48, "field_of_view_units": "angstrom"}, 2e-10),
        ({"pixel_size_nm": -1}, None),
        ({"pixel_size_nm": "wide"}, None),
    ],
)
def test_a_sidecar_tells_the_size_of_a_pixel(tmp_path, told, metres):
    np.save(tmp_path / "image.npy", STACK[0])
    (tmp_path / "image.json").write_text(json.dumps(told))
    with open_stack(tmp_path / "image.npy") as stack:
        size = stack.pixel_size
    assert size.value_m == pytest.approx(metres) if metres else size.value_m is None
    assert (size.source, size.trust) == (("sidecar", "stated") if metres else ("none", "none"))


def test_a_broken_sidecar_is_named_and_not_used(tmp_path):
    np.save(tmp_path / "image.npy", STACK[0])
    (tmp_path / "image.json").write_text("{")
    with open_stack(tmp_path / "image.npy") as stack:
        assert stack.pixel_size.value_m is None and "image.json" in stack.notes[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((1, 1)), "1 x 1 px"),
        (np.zeros((64, 64, 3), "u1"), "colour picture"),
        (np.zeros((64, 64, 4), "u1"), "colour picture"),
        (np.zeros(100), "spectra"),
        (np.zeros((3, 3, 20, 20)), "frames of a scan"),
        (np.zeros((32, 32), complex), "complex128"),
        (np.zeros((0, 32, 32)), "is empty"),
    ],
)
def test_what_is_no_image_is_refused_with_how_to_mend_it(tmp_path, data, words):
    np.save(tmp_path / "data.npy", data)
    with pytest.raises(InputError, match=words) as error:
        open_stack(tmp_path / "data.npy")
    assert "\n" not in str(error.value) and "data.npy" in str(error.value)


def test_a_colour_picture_of_a_microscope_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((32, 40, 3), "u1"), photometric="rgb")
    with pytest.raises(InputError, match="colour picture"):
        open_stack(tmp_path / "rgb.tif")


def test_a_matlab_file_gives_its_matrix_and_its_step(tmp_path):
    from scipy.io import savemat

    image = np.random.default_rng(1).random((32, 48))
    savemat(tmp_path / "image.mat", {"input": {"obs": image, "dx": 0.15, "note": "x"}, "table": np.zeros((30, 2))})
    with open_stack(tmp_path / "image.mat") as stack:
        assert stack.title == "input.obs" and stack.pixel_size.value_m == pytest.approx(1.5e-11)
        np.testing.assert_array_equal(stack[0], image)
    (tmp_path / "broken.mat").write_bytes(b"MATLAB 5.0" + bytes(300))
    with pytest.raises(UnreadableFile):
        open_stack(tmp_path / "broken.mat")


def test_a_dataset_is_chosen_by_number_or_title(tmp_path):
    np.savez(tmp_path / "two.npz", small=STACK[0, :18, :18], large=STACK[1])
    with open_stack(tmp_path / "two.npz") as stack:
        assert stack.title == "large" and "2 datasets" in stack.notes[0]
    for which in (0, "0", "small"):
        with open_stack(tmp_path / "two.npz", which) as stack:
            assert stack.shape == (1, 18, 18)
    with pytest.raises(InputError, match="'large'"):
        open_stack(tmp_path / "two.npz", "tiny")
    with pytest.raises(InputError, match="2 datasets"):
        open_stack(tmp_path / "two.npz", 7)


@real
@pytest.mark.parametrize(
    ("name", "shape", "metres", "trust"),
    [
        ("haadf/openNCEM/Acquisition_18.emd", (1, 1024, 1024), 1.2247e-11, "doubtful"),  # its unit is "n_m"
        ("haadf/atomap/test_ADF_cropped.hdf5", (1, 400, 380), 9.326e-12, "doubtful"),  # a step without a unit
        ("haadf/TEMUL/Cropped_PTO-SRO_Aligned.hspy", (1, 224, 1312), 1.5e-11, "stated"),
        ("haadf/StatSTEM/ExamplePtIr.mat", (1, 512, 512), 1.211e-11, "stated"),
        ("haadf/SciLink/MoS2_stem_Exp-002-5.npy", (1, 512, 512), 1.7578e-11, "stated"),
        ("haadf/SciFiReaders/DMReader_Image_SI-Survey.dm3", (1, 512, 512), None, "none"),
        ("haadf/AtomDetection_ACSTEM/021_HAADF_15nm_Sample_PtNC_21Oct20.tif", (1, 512, 512), 2.9297e-11, "stated"),
        ("4dstem/rosettasciio/03_Scanning Preview_1.ser", (5, 128, 128), 3.844e-10, "stated"),
        ("formats/rosettasciio/multi_signal.dm3", (1, 512, 512), 1.775e-11, "stated"),
    ],
)
def test_real_files(name, shape, metres, trust):
    with open_stack(DATA / name) as stack:
        assert stack.shape == shape and stack[0].shape == shape[1:]
        assert stack.pixel_size.trust == trust
        assert stack.pixel_size.value_m == (None if metres is None else pytest.approx(metres, rel=1e-3))


@real
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eels/pyTEMlib/EELS_STO.dm3", "spectra"),
        ("formats/rosettasciio/test_diffraction_pattern.dm3", "diffraction pattern"),
        ("formats/rosettasciio/test_fft_packed_complex8.dm4", "complex"),
        ("4dstem/rosettasciio/test1.blo", "frames of a scan"),
    ],
)
def test_real_files_that_are_no_images(name, words):
    with pytest.raises(InputError, match=words):
        open_stack(DATA / name)
