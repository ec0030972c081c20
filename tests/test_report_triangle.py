"""Triangles have the lengths that the fusion network saw; the extremes are told as they are."""

from __future__ import annotations

import base64
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from tests import finished_runs
from tgeo_jax import geometry, samples
from tgeo_jax.reporting import extremes, triangle


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _corners(svg: str) -> dict[str, np.ndarray]:
    found = re.findall(r'data-corner="(\w)" cx="([-\d.]+)" cy="([-\d.]+)"', svg)
    return {name: np.array([float(x), float(y)]) for name, x, y in found}


def test_a_triangle_of_three_by_four_by_five_is_drawn_so():
    """G and S 0.3 apart, G and T 0.4, S and T 0.5: a right angle at G."""
    lengths = {"GS": 0.3, "TG": 0.4, "TS": 0.5, "MS": np.nan, "MG": np.nan}
    corners = _corners(triangle.svg(lengths, "a triangle"))
    assert set(corners) == set("STG")
    for one, other, length in (("G", "S", 0.3), ("G", "T", 0.4), ("S", "T", 0.5)):
        drawn = np.linalg.norm(corners[one] - corners[other])
        assert drawn == pytest.approx(length * triangle.UNIT, abs=0.02)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    folder = finished_runs.write(tmp_path_factory.mktemp("samples") / "run")
    finished_runs.write_samples(folder)
    return dict(np.load(folder.samples))


@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_every_drawn_edge_is_as_long_as_the_squares_that_went_into_the_network(arrays, end):
    student, teacher, labels, means = finished_runs.predictions()
    title = dict(extremes.ENDS)[end]
    for sample in extremes.of(arrays)[title]:
        i, corners = sample.number, _corners(sample.drawing)
        features = geometry.trilateral_features(
            _softmax(student[0, [i]]), _softmax(teacher[[i]]), labels[[i]], means, "edges"
        )
        squares = np.asarray(features).reshape(5, finished_runs.CLASSES).sum(axis=1)
        for edge, square in zip(geometry.relation_blocks("edges"), squares, strict=True):
            one, other = edge.split("-")
            drawn = np.linalg.norm(corners[one] - corners[other]) / triangle.UNIT
            assert drawn == pytest.approx(np.sqrt(square), abs=2e-4), (i, edge)


def test_the_drawing_is_that_of_points_in_the_space_of_probabilities(arrays):
    """By another way: distances between the probability vectors themselves."""
    student, teacher, labels, means = finished_runs.predictions()
    for sample in extremes.of(arrays)["Trusted most"]:
        i, corners = sample.number, _corners(sample.drawing)
        vectors = {
            "S": _softmax(student[0, i]), "T": _softmax(teacher[i]),
            "G": np.eye(finished_runs.CLASSES)[labels[i]], "M": means[labels[i]],
        }  # fmt: skip
        for pair in ("ST", "TG", "SG", "SM", "MG"):  # T and M lie in different planes
            true = np.linalg.norm(vectors[pair[0]] - vectors[pair[1]])
            drawn = np.linalg.norm(corners[pair[0]] - corners[pair[1]]) / triangle.UNIT
            assert drawn == pytest.approx(true, abs=2e-4)


def test_angles_are_those_between_the_vectors(arrays):
    student, teacher, labels, _ = finished_runs.predictions()
    for end in ("lowest", "highest"):
        for i, degrees in zip(arrays[end], arrays[f"{end}_angles"], strict=True):
            s, t = _softmax(student[0, i]), _softmax(teacher[i])
            g = np.eye(finished_runs.CLASSES)[labels[i]]
            for (corner, one, other), angle in zip(
                ((s, t, g), (t, s, g), (g, s, t)), degrees, strict=True
            ):
                a, b = one - corner, other - corner
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                assert angle == pytest.approx(np.degrees(np.arccos(cosine)), abs=0.1)
            assert degrees.sum() == pytest.approx(180, abs=0.01)


def test_the_angle_at_the_student_is_that_of_the_angle_features():
    """`sum_k (T-S)_k (G-S)_k = |TS| |GS| cos(angle at S)`."""
    student, teacher, labels, means = finished_runs.predictions(seed=3)
    lengths, degrees = samples.lengths_and_angles(student[0], teacher, labels, means)
    features = geometry.trilateral_features(
        _softmax(student[0]), _softmax(teacher), labels, means, "angles"
    )
    products = np.asarray(features).reshape(-1, 2, finished_runs.CLASSES).sum(axis=2)[:, 1]
    both = lengths[:, samples.EDGES.index("GS")] * lengths[:, samples.EDGES.index("TS")]
    np.testing.assert_allclose(both * np.cos(np.radians(degrees[:, 0])), products, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({"GS": 0.0, "TG": 0.5, "TS": 0.5}, {"S": (0, 0), "T": (0, 0.5)}),  # S on G
        ({"GS": 0.5, "TG": 0.0, "TS": 0.5}, {"S": (0.5, 0), "T": (0, 0)}),  # T on G
        ({"GS": 0.5, "TG": 0.5, "TS": 0.0}, {"S": (0.5, 0), "T": (0.5, 0)}),  # T on S
        ({"GS": 0.5, "TG": 0.8, "TS": 0.3}, {"T": (0.8, 0)}),  # in one line
        ({"GS": 0.0, "TG": 0.0, "TS": 0.0}, {"S": (0, 0), "T": (0, 0)}),
    ],
)
def test_corners_that_lie_on_each_other_or_in_a_line_are_drawn(lengths, expected):
    found = triangle.points(lengths)
    for corner, place in expected.items():
        assert found[corner] == pytest.approx(place, abs=1e-7)


def test_an_angle_at_a_corner_that_another_one_lies_on_is_not_told():
    same = np.array([[2.0, 0.0, 0.0]])
    _, degrees = samples.lengths_and_angles(same, same, np.array([0]))
    assert np.isnan(degrees[0]).tolist() == [True, True, False]  # S and T are one point
    assert degrees[0, 2] == 0


def test_a_ratio_that_did_not_ask_for_class_means_has_no_m(arrays):
    without = {key: value for key, value in arrays.items() if not key.endswith("_class_mean")}
    for end in ("lowest", "highest"):
        without[f"{end}_edges"] = arrays[f"{end}_edges"].copy()
        without[f"{end}_edges"][:, [0, 4]] = np.nan
    sample = extremes.of(without)["Trusted least"][0]
    assert set(_corners(sample.drawing)) == set("STG")
    assert not any("M" in head for head in sample.heads)
    assert [name for name, _ in sample.measures][:4] == ["|GS|", "|TS|", "|TG|", "angle at S"]


def test_the_extremes_are_told_as_the_arrays_say(arrays):
    student, teacher, labels, _ = finished_runs.predictions()
    ends = extremes.of(arrays)
    assert [sample.number for sample in ends["Trusted least"]] == list(range(16))
    assert [sample.number for sample in ends["Trusted most"]] == list(range(39, 23, -1))
    for sample in itertools.chain(*ends.values()):
        i = sample.number
        said = teacher[i].argmax()
        assert (sample.label, sample.teacher) == (str(labels[i]), str(said))
        assert sample.student == str(student[0, i].argmax())
        assert sample.teacher_right == (said == labels[i])
        assert float(sample.ratio) == pytest.approx(i / 39, abs=5e-4)


def test_features_are_those_of_the_network_by_class(arrays):
    student, teacher, labels, means = finished_runs.predictions()
    sample = extremes.of(arrays)["Trusted least"][3]
    i = sample.number
    assert [name for name, _ in sample.features] == ["0", "1", "2", "3"]
    shown = np.array([[float(v) for v in values] for _, values in sample.features])
    s, t = _softmax(student[0, i]), _softmax(teacher[i])
    g, m = np.eye(4)[labels[i]], means[labels[i]]
    expected = [s, t, g, m, (m - s) ** 2, (g - s) ** 2, (t - s) ** 2, (t - g) ** 2, (m - g) ** 2]
    np.testing.assert_allclose(shown, np.transpose(expected), atol=0.0051)
    assert extremes.of(arrays, "sg_tg")["Trusted least"][3].heads == sample.heads[5:8:2]


def test_of_many_classes_the_largest_are_shown_and_the_rest_summed():
    classes = 30
    student, teacher = np.zeros((1, 5, classes), np.float32), np.zeros((5, classes), np.float32)
    teacher[:, 7] = 4.0
    arrays = {"label": np.full(5, 11), "ratio": np.full((1, 5), 0.5), "class_names": ()}
    arrays |= {"teacher_class": teacher.argmax(1)[None]}
    for end in ("lowest", "highest"):
        arrays |= {
            end: np.arange(2), f"{end}_images": np.zeros((2, 3)),
            f"{end}_student_logits": student[0, :2], f"{end}_teacher_logits": teacher[:2],
            f"{end}_edges": np.zeros((2, 5)), f"{end}_angles": np.zeros((2, 3)),
        }  # fmt: skip
    sample = extremes.of(arrays, "intra")["Trusted least"][0]
    names = [name for name, _ in sample.features]
    assert {"7", "11"} < set(names)
    assert names[-1] == "21 others, summed"
    assert len(names) == 10
    by_name = dict(sample.features)
    assert by_name["21 others, summed"][0] == f"{21 / 30:.2f}"  # of the student's even prediction
    assert float(by_name["7"][1]) == pytest.approx(np.exp(4) / (np.exp(4) + 29), abs=0.005)


def test_large_pictures_become_small_ones():
    random = np.random.RandomState(0)
    data = extremes.data_uri(random.randint(0, 256, (224, 160, 3)).astype(np.uint8))
    kind, _, content = data.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (80, 112)


def test_pictures_of_floats_fill_the_range_and_small_bytes_stay_as_they_are():
    def decoded(pixels):
        content = extremes.data_uri(pixels).partition(",")[2]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))

    bytes_ = np.array([[[10], [20]]], np.uint8)
    np.testing.assert_array_equal(decoded(bytes_), [[10, 20]])
    np.testing.assert_array_equal(decoded(np.array([[[-1.0], [3.0]]])), [[0, 255]])
