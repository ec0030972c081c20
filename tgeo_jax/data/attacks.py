"""Attack detection: NSL-KDD's network connections and the power systems of Mississippi and ORNL."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from sklearn.model_selection import train_test_split

from tgeo_jax.data import layouts
from tgeo_jax.data.layouts import Content, Layout, Row, Tally
from tgeo_jax.errors import DataError

# NSL-KDD.

_NSL_KDD_COLUMNS = (
    *("duration", "protocol_type", "service", "flag", "src_bytes", "dst_bytes", "land"),
    *("wrong_fragment", "urgent", "hot", "num_failed_logins", "logged_in", "num_compromised"),
    *("root_shell", "su_attempted", "num_root", "num_file_creations", "num_shells"),
    *("num_access_files", "num_outbound_cmds", "is_host_login", "is_guest_login", "count"),
    *("srv_count", "serror_rate", "srv_serror_rate", "rerror_rate", "srv_rerror_rate"),
    *("same_srv_rate", "diff_srv_rate", "srv_diff_host_rate", "dst_host_count"),
    *("dst_host_srv_count", "dst_host_same_srv_rate", "dst_host_diff_srv_rate"),
    *("dst_host_same_src_port_rate", "dst_host_srv_diff_host_rate", "dst_host_serror_rate"),
    *("dst_host_srv_serror_rate", "dst_host_rerror_rate", "dst_host_srv_rerror_rate"),
)
_SYMBOLIC = ("protocol_type", "service", "flag")
_NSL_KDD_CLASSES = ("normal", "dos", "probe", "r2l", "u2r")
# As the KDD Cup 1999 counted them. Some authors count worm as dos and httptunnel as r2l.
ATTACKS: dict[str, tuple[str, ...]] = {
    "normal": ("normal",),
    "dos": (
        *("back", "land", "neptune", "pod", "smurf", "teardrop"),
        *("apache2", "mailbomb", "processtable", "udpstorm"),
    ),
    "probe": ("ipsweep", "nmap", "portsweep", "satan", "mscan", "saint"),
    "r2l": (
        *("ftp_write", "guess_passwd", "imap", "multihop", "phf", "spy"),
        *("warezclient", "warezmaster", "named", "sendmail", "snmpgetattack", "snmpguess"),
        *("worm", "xlock", "xsnoop"),
    ),
    "u2r": (
        *("buffer_overflow", "loadmodule", "perl", "rootkit"),
        *("httptunnel", "ps", "sqlattack", "xterm"),
    ),
}
_CLASS_OF = {
    attack: index
    for index, name in enumerate(_NSL_KDD_CLASSES)
    for attack in ATTACKS[name]
}  # fmt: skip


def _read_nsl_kdd(source: pathlib.Path, tally: Tally) -> Content:
    files = {
        "train": layouts.needed(source, "KDDTrain+.txt", "KDDTrain+_20Percent.txt"),
        "test": layouts.needed(source, "KDDTest+.txt"),
        "test_hard": layouts.needed(source, "KDDTest-21.txt"),
    }
    values: dict[str, list[str]] = {column: [] for column in _SYMBOLIC}
    places = {column: dict[str, int]() for column in _SYMBOLIC}

    def parse(line: str) -> tuple[list[float], int]:
        # The last field, how many of 21 classifiers were right, is not known of a connection.
        found = layouts.fields(line, ",", (42, 43))
        numbers = [
            0.0 if column in places else _finite(column, text)
            for column, text in zip(_NSL_KDD_COLUMNS, found, strict=False)
        ]
        label = _CLASS_OF[found[41]]
        for column, index in _SYMBOLIC_PLACES:
            text = found[index]
            if text not in places[column]:
                places[column][text] = len(values[column])
                values[column].append(text)
            numbers[index] = places[column][text]
        return numbers, label

    splits = {split: layouts.rows(path, tally, parse, np.float64) for split, path in files.items()}
    named = {split: path.name for split, path in files.items()}
    return Content(splits, {"files": named, "values": values})


def _finite(column: str, text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{column}={text}: not finite")
    return number


_SYMBOLIC_PLACES = tuple((column, _NSL_KDD_COLUMNS.index(column)) for column in _SYMBOLIC)

NSL_KDD = Layout(
    name="nsl_kdd",
    kind="numeric",
    columns=_NSL_KDD_COLUMNS,
    class_names=_NSL_KDD_CLASSES,
    read=_read_nsl_kdd,
    files="KDDTrain+.txt (or KDDTrain+_20Percent.txt), KDDTest+.txt and KDDTest-21.txt",
    description="""
NSL-KDD: network connections of the KDD Cup 1999 without its duplicates, 41 features, attacks in
four kinds. Test files hold attacks that the training file does not. Split `test_hard` is
KDDTest-21: what not all of 21 classifiers got right.
""",
    citation="""
@inproceedings{tavallaee2009nslkdd, title={A detailed analysis of the {KDD CUP} 99 data set},
  author={Tavallaee, M. and Bagheri, E. and Lu, W. and Ghorbani, A.},
  booktitle={CISDA}, year={2009}}
""",
    homepage="https://www.unb.ca/cic/datasets/nsl.html",
    symbolic=_SYMBOLIC,
)

# Power systems.

_FILES = tuple(f"data{number}.csv" for number in range(1, 16))
_RELAY = (
    *(f"{kind}{n}:{of}" for n in (1, 2, 3) for kind, of in (("PA", "VH"), ("PM", "V"))),
    *(f"{kind}{n}:{of}" for n in (4, 5, 6) for kind, of in (("PA", "IH"), ("PM", "I"))),
    *(f"{kind}{n}:{of}" for n in (7, 8, 9) for kind, of in (("PA", "VH"), ("PM", "V"))),
    *(f"{kind}{n}:{of}" for n in (10, 11, 12) for kind, of in (("PA", "IH"), ("PM", "I"))),
)
_POWER_COLUMNS = (
    *(
        column
        for relay in ("R1", "R2", "R3", "R4")
        for column in (
            *(f"{relay}-{name}" for name in _RELAY),
            *(f"{relay}:F", f"{relay}:DF", f"{relay}-PA:Z", f"{relay}-PA:ZH", f"{relay}:S"),
        )
    ),
    *(f"{log}{n}" for log in ("control_panel_log", "relay_log", "snort_log") for n in range(1, 5)),
)
_TEST_SHARE = 0.2
_UNKNOWN = ("", "?")  # an empty field, and what Weka writes for it


def _read_power(class_names: tuple[str, ...], source: pathlib.Path, tally: Tally) -> Content:
    paths = [layouts.needed(source, file) for file in _FILES]
    columns = _header(paths[0])
    for path in paths[1:]:
        if _header(path) != columns:
            raise DataError(f"{path}: its header is not that of {paths[0].name}")
    places = {name: index for index, name in enumerate(class_names)}

    def parse(line: str) -> tuple[list[float], int]:
        *numbers, marker = layouts.fields(line, ",", len(columns) + 1)
        return [math.nan if n in _UNKNOWN else float(n) for n in numbers], places[marker.strip()]

    found = [
        row for path in paths for row in layouts.rows(path, tally, parse, np.float64, header=True)
    ]
    labels = np.array([label for _, label in found])
    values = np.stack([row for row, _ in found]) if found else np.zeros((0, len(columns)))
    about = {"columns": list(columns), "not_finite": _not_finite(columns, values)}
    return Content(halves(source, values, labels), about)


def halves(
    source: pathlib.Path, values: np.ndarray, labels: np.ndarray
) -> dict[str, Iterator[Row]]:
    """Training and test split of a set that has none: 80/20, stratified, fixed by the version.

    Args:
        source: for messages.
        values: rows in the order of the files, [N, F].
        labels: [N].

    Raises:
        DataError: too few rows of a class.

    Examples:
        >>> found = halves(pathlib.Path("x"), np.arange(10)[:, None], np.repeat([0, 1], 5))
        >>> [int(label) for _, label in found["test"]]
        [0, 1]
    """
    try:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=0
        )
    except ValueError as error:
        raise DataError(f"{source}: {len(labels)} rows cannot be split ({error})") from error
    return {
        split: ((values[index], int(labels[index])) for index in np.sort(indices))
        for split, indices in (("train", train), ("test", test))
    }


def _header(path: pathlib.Path) -> tuple[str, ...]:
    for _, line in layouts.numbered(path):
        *columns, marker = (name.strip() for name in line.split(","))
        if len(columns) == len(_POWER_COLUMNS) and marker == "marker":
            return tuple(columns)
        break
    raise DataError(
        f"{path}: its first line must name {len(_POWER_COLUMNS)} features and then marker"
    )


def _not_finite(columns: tuple[str, ...], values: np.ndarray) -> dict[str, dict[str, int]]:
    """How often a column holds what, of those that do."""
    counts = {
        "inf": np.isposinf(values).sum(0),
        "-inf": np.isneginf(values).sum(0),
        "nan": np.isnan(values).sum(0),
    }
    return {
        column: {kind: int(count[index]) for kind, count in counts.items() if count[index]}
        for index, column in enumerate(columns)
        if any(count[index] for count in counts.values())
    }


# Of the 41 scenario numbers of the experiment, 31 to 34 do not occur.
_SCENARIOS = tuple(str(number) for number in (*range(1, 31), *range(35, 42)))
_POWER_CLASSES = {
    "binary": ("Natural", "Attack"),
    "3class": ("NoEvents", "Natural", "Attack"),
    "37class": _SCENARIOS,
}


def _power(variant: str) -> Layout:
    classes = _POWER_CLASSES[variant]
    return Layout(
        name=f"power_attack_{variant}",
        kind="numeric",
        columns=_POWER_COLUMNS,
        class_names=classes,
        read=functools.partial(_read_power, classes),
        files=f"data1.csv to data15.csv of the {variant} version",
        description=f"""
Power System Attack Datasets of Mississippi State University and Oak Ridge National Laboratory,
{variant} version: 128 features of four phasor measurement units and their logs. The split into
train and test (80/20, stratified) is fixed by this builder's version.
""",
        citation="""
@misc{hink2014power, title={Power system disturbance and cyber-attack discrimination datasets},
  author={Adhikari, U. and Pan, S. and Morris, T. and Borges, R. and Beaver, J.}, year={2014}}
""",
        homepage="https://sites.google.com/a/uah.edu/tommy-morris-uah/ics-data-sets",
    )


POWER_ATTACK = tuple(_power(variant) for variant in _POWER_CLASSES)
