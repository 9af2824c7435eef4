"""DICOM files of every syntax and fault to pixels, header fields and reasons."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medim_ray.data.dicom import (
    SECONDARY_CAPTURE,
    TAGS_REPAIRED,
    WINDOW_IGNORED,
    decode_dicom,
    refuse_burned_in,
    refuse_other,
)
from medim_ray.data.dicom_header import FIELDS, read_header
from medim_ray.data.images import BadImageError
from tests.unit.data.dicom_files import compressed, dataset, file_of, gradient

REAL = Path(__file__).parents[3] / "../shared/data/dicom"
TWELVE, EIGHT = gradient(), gradient(bits=8)


def decoded(ds: Dataset, window: Any = "none") -> Any:
    return decode_dicom(file_of(ds), window=window).image_HW


LOSSLESS = [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless]


@pytest.mark.parametrize(
    "syntax", [*LOSSLESS, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=lambda uid: uid.name
)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_syntaxes_give_every_pixel_back(syntax: UID, bits: int) -> None:
    pixels = gradient(bits=bits)
    radiograph = decode_dicom(compressed(file_of(dataset(pixels, bits=bits)), syntax), window="none")
    assert radiograph.image_HW.dtype == pixels.dtype and np.array_equal(radiograph.image_HW, pixels)
    assert radiograph.flags == () and radiograph.header.sop_uid == "1.2.826.0.1.3680043.8.498.1"


@pytest.mark.parametrize(
    ("syntax", "bits", "worst"),
    [(JPEGBaseline8Bit, 8, 40), (JPEGExtended12Bit, 12, 300), (JPEG2000, 8, 16), (JPEGLSNearLossless, 12, 2)],
)
def test_lossy_syntaxes_come_close(syntax: UID, bits: int, worst: int) -> None:
    pixels = gradient(bits=bits)
    image = decode_dicom(compressed(file_of(dataset(pixels, bits=bits)), syntax), window="none").image_HW
    assert np.abs(image.astype(int) - pixels).max() <= worst and abs(image.mean() - pixels.mean()) < worst / 10


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_signed_values_survive_codecs_that_know_no_signs(syntax: UID) -> None:
    signed = TWELVE.astype(np.int16) - 2048
    ds = dataset((signed & 0xFFF).astype(np.uint16), bits=12)
    again = pydicom.dcmread(io.BytesIO(compressed(file_of(ds), syntax)))
    again.PixelRepresentation = 1
    assert np.array_equal(decode_dicom(file_of(again), window="none").image_HW, TWELVE - TWELVE.min())


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, JPEGBaseline8Bit])
def test_compressed_data_cut_off_are_found(syntax: UID) -> None:
    ds = pydicom.dcmread(io.BytesIO(compressed(file_of(dataset(EIGHT)), syntax)))
    (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
    for keep in (0.3, 0.7, 0.95):
        ds.PixelData = encapsulate([frame[: int(len(frame) * keep)]])
        with pytest.raises(BadImageError, match="damaged"):
            decode_dicom(file_of(ds), window="none")


def test_monochrome1_is_inverted_within_the_stored_bits() -> None:
    assert np.array_equal(decoded(dataset(EIGHT, PhotometricInterpretation="MONOCHROME1")), 255 - EIGHT)
    inverted = decoded(dataset(TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted, 4095 - TWELVE)


def test_signed_values_and_rescale_keep_their_order() -> None:
    signed = TWELVE.astype(np.int16) - 2000
    assert np.array_equal(decoded(dataset(signed, bits=12)), TWELVE - TWELVE.min())
    scaled = decoded(dataset(TWELVE, bits=12, RescaleSlope=-2.0, RescaleIntercept=100.0))
    expected = (TWELVE.max() - TWELVE.astype(float)) / (int(TWELVE.max()) - int(TWELVE.min())) * 65535
    assert np.abs(scaled - expected).max() <= 0.5


def test_the_window_of_the_file_is_applied() -> None:
    ds = dataset(TWELVE, bits=12, WindowCenter=["1000", "50"], WindowWidth=["800", "100"])  # the first one counts
    image = decoded(ds, "voi")
    # PS3.3 C.11.2.1.2.1: below centre - 0.5 - (width - 1) / 2 black, above white, linear between
    assert image.dtype == np.uint16
    assert (image[TWELVE < 600] == 0).all() and (image[TWELVE > 1400] == 65535).all()
    inside = (TWELVE > 620) & (TWELVE < 1380)
    expected = ((TWELVE[inside] - 999.5) / 799 + 0.5) * 65535
    assert np.abs(image[inside] - expected).max() <= 2
    assert np.array_equal(decoded(ds, "none"), TWELVE)
    inverted = dataset(TWELVE, bits=12, WindowCenter=1000, WindowWidth=800, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(decoded(inverted, "voi").astype(int) - (65535 - image.astype(int))).max() <= 1


def test_a_voi_lut_is_applied() -> None:
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [256, 0, 8], list(range(255, -1, -1))
    ds = dataset(EIGHT)
    ds.VOILUTSequence = Sequence([lut])
    ds["VOILUTSequence"].value[0]["LUTDescriptor"].VR = "US"
    ds["VOILUTSequence"].value[0]["LUTData"].VR = "US"
    image = decoded(ds, "voi").astype(float)
    expected = (EIGHT.max() - EIGHT.astype(float)) / (int(EIGHT.max()) - int(EIGHT.min()))
    assert np.abs((image - image.min()) / (image.max() - image.min()) - expected).max() < 0.01


@pytest.mark.parametrize(("center", "width"), [(1000, 0), (1000, -5), (60000, 10), ("x", 5)])
def test_a_window_that_shows_nothing_is_left_out_and_flagged(center: Any, width: Any) -> None:
    ds = dataset(TWELVE, bits=12, WindowWidth=width)
    with pydicom.config.disable_value_validation():
        ds.add_new("WindowCenter", "LO" if center == "x" else "DS", center)
        data = file_of(ds)
    radiograph = decode_dicom(data, window="voi")
    assert radiograph.flags == (WINDOW_IGNORED,) and np.array_equal(radiograph.image_HW, TWELVE)


def test_percentiles_cut_outliers_and_do_not_see_padding() -> None:
    pixels = TWELVE.copy()
    pixels[0, :2] = 4095  # a lead letter
    pixels[:, :8] = 0
    image = decoded(dataset(pixels, bits=12, PixelPaddingValue=0), "percentile")
    low, high = np.percentile(pixels[:, 8:], (0.5, 99.5))
    body = pixels[:, 8:].astype(float)
    expected = (np.clip(body, low, high) - low) / (high - low) * 65535
    assert np.abs(image[:, 8:] - expected).max() <= 1 and (image[:, :8] == 0).all()


def test_padding_is_black_also_in_monochrome1() -> None:
    pixels = TWELVE.copy()
    pixels[:, :8] = 0
    image = decoded(dataset(pixels, bits=12, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"))
    assert (image[:, :8] == image[:, 8:].min()).all()


def test_colour_becomes_luma() -> None:
    red = np.zeros((16, 20, 3), np.uint8)
    red[..., 0] = 255
    ds = dataset(red, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    assert decoded(ds).shape == (16, 20) and decoded(ds)[0, 0] == 76


@pytest.mark.parametrize("window", ["voi", "none"])
def test_missing_tags_are_repaired_and_flagged(window: Any) -> None:
    missing: dict[str, Any] = {
        "PhotometricInterpretation": None,
        "BitsStored": None,
        "HighBit": None,
        "PixelRepresentation": None,
    }
    ds = dataset(EIGHT, **missing, SamplesPerPixel=None, BodyPartExamined=None)
    radiograph = decode_dicom(file_of(ds), window=window)
    assert np.array_equal(radiograph.image_HW, EIGHT) and radiograph.flags == (TAGS_REPAIRED,)


def test_more_bits_than_the_header_says() -> None:
    radiograph = decode_dicom(file_of(dataset(TWELVE, bits=10)), window="none")
    assert np.array_equal(radiograph.image_HW, TWELVE) and radiograph.flags == (TAGS_REPAIRED,)


def test_a_drawing_in_the_high_bits_is_cut_off() -> None:
    ds = dataset(TWELVE | np.uint16(0x8000), bits=12)
    ds.add_new(0x60000102, "US", 15)
    assert np.array_equal(decoded(ds), TWELVE)


def test_a_wrong_or_missing_transfer_syntax_is_read_from_the_data() -> None:
    data = compressed(file_of(dataset(EIGHT)), JPEGLosslessSV1)
    ds = pydicom.dcmread(io.BytesIO(data))
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    radiograph = decode_dicom(file_of(ds), window="none")
    assert np.array_equal(radiograph.image_HW, EIGHT) and radiograph.flags == (TAGS_REPAIRED,)
    native = pydicom.dcmread(io.BytesIO(file_of(dataset(EIGHT))))
    native["PixelData"].is_undefined_length = False
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, native, implicit_vr=False, little_endian=True, enforce_file_format=False)
    broken = buffer.getvalue().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1)
    assert f"{RLELossless}\0".encode() in broken
    radiograph = decode_dicom(broken, window="none")
    assert np.array_equal(radiograph.image_HW, EIGHT) and radiograph.flags == (TAGS_REPAIRED,)


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble(implicit: bool) -> None:
    ds = dataset(TWELVE, bits=12)
    del ds.file_meta
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, implicit_vr=implicit, little_endian=True)
    assert buffer.getvalue()[128:132] != b"DICM"
    radiograph = decode_dicom(buffer.getvalue(), window="none")
    assert np.array_equal(radiograph.image_HW, TWELVE) and radiograph.header.patient_id == "patient-7"
    assert read_header(buffer).fields["view"] == "PA" if not buffer.seek(0) else False


def test_big_endian() -> None:
    ds = dataset(TWELVE.astype(">u2"), bits=12)
    buffer = io.BytesIO()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    pydicom.dcmwrite(buffer, ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert np.array_equal(decode_dicom(buffer.getvalue(), window="none").image_HW, TWELVE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"NumberOfFrames": 30}, r"multi-frame file \(30 frames\)"),
        ({"PixelData": None}, "no pixel data"),
        ({"Rows": None}, "no Rows or Columns"),
        ({"Columns": 0}, "no Rows or Columns"),
        ({"Rows": 60000, "Columns": 60000}, "more than .* pixels"),
        ({"PixelData": b"\0" * 100}, "damaged or short pixel data"),
    ],
)
def test_what_has_no_image_says_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decoded(dataset(TWELVE, bits=12, **change))


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n" + b"\0" * 300, b"report: normal", b"\x08\x00\x05\x00CS" + b"x" * 9]
)
def test_what_is_no_dicom(data: bytes) -> None:
    with pytest.raises(BadImageError, match=r"empty file|not a DICOM file|damaged DICOM header"):
        decode_dicom(data, window="none")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: uid.name)
def test_damage_is_a_reason_and_never_a_crash(syntax: UID) -> None:
    data = compressed(file_of(dataset(TWELVE, bits=12)), syntax)
    rng = np.random.default_rng(5)
    refused = 0
    for k in range(60):
        broken = bytearray(data)
        if k % 2:
            broken = broken[: int(rng.integers(1, len(data)))]
        else:
            at = int(rng.integers(132, len(data) - 32))
            broken[at : at + 32] = rng.bytes(32)
        try:
            decode_dicom(bytes(broken), window="voi")
        except BadImageError as error:
            refused += 1
            assert "Secret" not in str(error)
    assert refused >= 25


def test_only_the_fixed_list_of_fields_is_read() -> None:
    ds = dataset(EIGHT, Manufacturer="ACME", PixelSpacing=[0.1, 0.2], SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    radiograph = decode_dicom(file_of(ds), window="none")
    header = radiograph.header
    assert header == read_header(io.BytesIO(file_of(ds)))
    assert header.fields == {
        "view": "PA",
        "sex": "F",
        "age": "62",
        "modality": "DX",
        "body_part": "CHEST",
        "manufacturer": "ACME",
        "photometric": "MONOCHROME2",
        "pixel_spacing": "0.1/0.2",
        "bits_stored": "8",
        "rows": "48",
        "columns": "64",
    }
    assert set(header.fields) <= set(FIELDS) and radiograph.flags == (SECONDARY_CAPTURE,)
    assert not any(word in repr(header) for word in ("Secret", "20200102", "A77"))
    for keyword in ("PatientName", "PatientBirthDate", "StudyDate", "AccessionNumber", "StudyDescription"):
        assert keyword not in FIELDS.values()


def test_odd_values_are_quoted_nowhere(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    with pydicom.config.disable_value_validation():
        data = file_of(dataset(EIGHT, PatientID="Zebrowski\u00a0" * 9, PatientSex="Zebrowski, W.", KVP="7531"))
    data = data.replace(b"7531", b"Zeb!")
    recwarn.clear()
    radiograph = decode_dicom(data, window="voi")
    assert {"kvp", "sex"} & set(radiograph.header.fields) == set()
    broken = data.replace(b"US\x02\x00\x30\x00", b"US\x03\x00\x30\x00", 1)  # Rows of three bytes
    with pytest.raises(BadImageError) as error:
        decode_dicom(broken, window="voi")
    assert "Zeb" not in str(error.value)
    assert "Zeb" not in caplog.text and not [w for w in recwarn if "Zeb" in str(w.message)]


@pytest.mark.parametrize(("age", "years"), [("062Y", "62"), ("62", "62"), ("011M", "0"), ("104Y", "90"), ("old", None)])
def test_ages_are_whole_years(age: str, years: str | None) -> None:
    with pydicom.config.disable_value_validation():
        data = file_of(dataset(EIGHT, PatientAge=age))
    assert read_header(io.BytesIO(data)).fields.get("age") == years


def test_refusals_name_the_tag_and_pass_what_is_not_stated() -> None:
    def header(**tags: Any) -> Any:
        return read_header(io.BytesIO(file_of(dataset(EIGHT, **tags))))

    wanted: dict[str, Any] = {"body_parts": ("CHEST", "TORAX"), "modalities": ("DX", "CR")}
    refuse_other(header(BodyPartExamined="TORAX PA"), **wanted)
    refuse_other(header(BodyPartExamined=None, Modality=None), **wanted)
    with pytest.raises(BadImageError, match="body part 'KNEE' is not wanted"):
        refuse_other(header(BodyPartExamined="KNEE"), **wanted)
    for odd in ("ROTULA DER.", "knee\u00b2"):
        with pydicom.config.disable_value_validation(), pytest.raises(BadImageError, match="body part"):
            refuse_other(header(BodyPartExamined=odd, SpecificCharacterSet="ISO_IR 192"), **wanted)
    refuse_other(header(BodyPartExamined="KNEE", Modality="CT"), body_parts=(), modalities=())
    with pytest.raises(BadImageError, match="modality 'CT' is not wanted"):
        refuse_other(header(Modality="CT"), **wanted)
    refuse_burned_in(header(BurnedInAnnotation="NO"))
    with pytest.raises(BadImageError, match="BurnedInAnnotation is YES"):
        refuse_burned_in(header(BurnedInAnnotation="YES"))


@pytest.mark.skipif(not REAL.exists(), reason="../shared/data/dicom is not here")
def test_the_real_pair_is_each_others_negative() -> None:
    one, two = (decode_dicom(path.read_bytes(), window="voi") for path in sorted(REAL.glob("*.dcm")))
    assert one.header.sop_uid == two.header.sop_uid and one.image_HW.shape == (1024, 1024)
    assert np.array_equal(one.image_HW, 255 - two.image_HW)
    assert one.flags == two.flags == (SECONDARY_CAPTURE,)


def test_implicit_files_with_preamble() -> None:
    ds = dataset(TWELVE, bits=12)
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    assert np.array_equal(decoded(ds), TWELVE)


def test_colour_of_16_bits_becomes_luma_of_16_bits() -> None:
    ramp_HW = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    ds = dataset(np.stack([ramp_HW] * 3, axis=2), SamplesPerPixel=3, PlanarConfiguration=0)
    ds.PhotometricInterpretation = "RGB"
    assert np.array_equal(decoded(ds), ramp_HW)


def test_a_window_of_width_1_is_left_out_and_flagged() -> None:
    """It leaves two grays of all."""
    radiograph = decode_dicom(file_of(dataset(TWELVE, bits=12, WindowCenter=2000, WindowWidth=1)), window="voi")
    assert radiograph.flags == (WINDOW_IGNORED,) and np.array_equal(radiograph.image_HW, TWELVE)
